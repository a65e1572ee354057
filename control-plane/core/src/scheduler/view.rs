//! The nodes with what is taken of them, following a batch of placements as it is made.

use std::collections::BTreeMap;
use std::sync::Arc;

use optimus_common::reason::Refusal;
use optimus_common::spec::WorkloadSpec;
use optimus_common::{AllocId, Name, NodeId, Timestamp, WorkloadKey};

use super::batch::Batch;
use super::fit::{self, Taken};
use super::quota::{self, Usage};
use super::score::Score;
use super::{constraint, device};
use crate::state::{Alloc, Node, QuotaKey, Release, State};

/// What one placement asks for.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    pub key: &'a WorkloadKey,
    pub spec: &'a WorkloadSpec,
    pub alloc: AllocId,
    /// Nodes where a copy of the slot could not run lately.
    pub troubled: &'a [NodeId],
}

/// A node as one row of the answer to "why there?".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judged {
    pub node: NodeId,
    pub name: String,
    pub verdict: Result<Score, Refusal>,
}

/// One node in a view.
pub(super) struct Row<'a> {
    pub id: NodeId,
    pub node: &'a Node,
    pub taken: Arc<Taken>,
    /// Nodes of one class have one number.
    pub class: usize,
    /// What will be taken once displaced copies have ended and those they gave way to are there; unset: nothing of the kind.
    pub promised: Option<Box<Taken>>,
}

pub struct View<'a> {
    pub(super) state: &'a State,
    pub(super) now: Timestamp,
    /// In the order of their ids: ties go to the lowest.
    pub(super) rows: Vec<Row<'a>>,
    classes: usize,
    /// The workload placed last; most plans place many copies of one.
    batch: Option<Batch>,
    /// Where copies were placed since the state was read.
    placed: BTreeMap<WorkloadKey, Vec<usize>>,
    /// What they reserve.
    reserved: BTreeMap<Name, BTreeMap<Name, Usage>>,
}

impl<'a> View<'a> {
    pub fn of(state: &'a State, now: Timestamp) -> Self {
        let none = Arc::new(Taken::default());
        let mut known: BTreeMap<u128, usize> = BTreeMap::new();
        let rows = state
            .nodes
            .iter()
            .map(|(id, node)| {
                let next = known.len();
                let class = *known.entry(state.class_of(node)).or_insert(next);
                Row { id: *id, node, taken: state.taken_of(*id).unwrap_or(&none).clone(), class, promised: None }
            })
            .collect();
        View { state, now, rows, classes: known.len(), batch: None, placed: BTreeMap::new(), reserved: BTreeMap::new() }
    }

    pub(super) fn batch(&mut self, key: &WorkloadKey, spec: &WorkloadSpec) -> &mut Batch {
        let fresh = match self.batch.take().filter(|batch| batch.key == *key && batch.spec == *spec) {
            Some(batch) => batch,
            None => {
                let placed = self.placed.get(key).map_or(&[][..], Vec::as_slice);
                Batch::new(self.state, self.now, &self.rows, self.classes, key, spec, placed)
            }
        };
        self.batch.insert(fresh)
    }

    pub(super) fn current(&self) -> Option<&Batch> {
        self.batch.as_ref()
    }

    /// What is reserved under a quota, with what this view has placed.
    fn used(&self, scope: &QuotaKey) -> Usage {
        let mut sum = quota::usage(self.state, scope);
        for (environment, usage) in self.reserved.get(&scope.project).into_iter().flatten() {
            if scope.environment.as_ref().is_none_or(|wanted| wanted == environment) {
                sum.add(usage);
            }
        }
        sum
    }

    /// Whether the quotas allow one more copy.
    pub(super) fn allowed(&self, key: &WorkloadKey, spec: &WorkloadSpec) -> Result<(), Refusal> {
        quota::within(self.state, key, spec, |scope| self.used(scope))
    }

    /// Chooses a node and ports for one more copy and takes them, or nothing when no node can.
    pub fn place(&mut self, ask: Ask<'_>) -> Option<(NodeId, Vec<(String, u16)>)> {
        self.allowed(ask.key, ask.spec).ok()?;
        self.batch(ask.key, ask.spec);
        let at = self.batch.as_mut()?.best(&self.rows, ask.troubled)?;
        let ports = self.take(&ask, at)?;
        Some((self.rows[at].id, ports))
    }

    /// Whether one more copy would find a place.
    pub fn could_place(&mut self, ask: Ask<'_>) -> bool {
        if self.allowed(ask.key, ask.spec).is_err() {
            return false;
        }
        let (state, now) = (self.state, self.now);
        self.batch(ask.key, ask.spec);
        let Some(batch) = &self.batch else { return false };
        self.rows.iter().enumerate().any(|(at, row)| batch.judge(state, now, row, at).is_ok())
    }

    /// Takes one more copy on a certain node, for what runs once on each. Gives its ports.
    pub fn place_on(&mut self, node: NodeId, ask: Ask<'_>) -> Result<Vec<(String, u16)>, Refusal> {
        self.allowed(ask.key, ask.spec)?;
        let at = self.rows.binary_search_by_key(&node, |row| row.id).map_err(|_| Refusal::NodeDown)?;
        let (state, now) = (self.state, self.now);
        self.batch(ask.key, ask.spec);
        if let Some(batch) = &self.batch {
            batch.judge(state, now, &self.rows[at], at)?;
        }
        self.take(&ask, at).ok_or(Refusal::NoFreePort)
    }

    fn take(&mut self, ask: &Ask<'_>, at: usize) -> Option<Vec<(String, u16)>> {
        let row = &mut self.rows[at];
        let ports = fit::choose_ports(row.node, &row.taken, ask.spec, ask.alloc, self.now)?;
        let devices = device::allot(row.node, &row.taken.devices, &ask.spec.placement.devices).ok()?;
        Arc::make_mut(&mut row.taken).add(&ports, &devices, ask.spec);
        if let Some(promised) = &mut row.promised {
            promised.add(&ports, &devices, ask.spec);
        }
        self.placed.entry(ask.key.clone()).or_default().push(at);
        if !self.state.quotas.is_empty() {
            let of_project = self.reserved.entry(ask.key.project.clone()).or_default();
            of_project.entry(ask.key.environment.clone()).or_default().add(&Usage::of(Some(ask.spec)));
        }
        if let Some(batch) = &mut self.batch {
            batch.took(self.state, self.now, &self.rows[at], at);
        }
        Some(ports)
    }

    /// What is promised of a node changed.
    pub(super) fn promise(&mut self, at: usize, taken: Taken) {
        self.rows[at].promised = Some(Box::new(taken));
        if let Some(batch) = &mut self.batch {
            batch.rescore(self.state, self.now, &self.rows[at], at);
        }
    }

    /// Whether `spec` would fit on the node of `old` once that has stopped.
    pub fn fits_instead(&self, old: &Alloc, old_release: &Release, spec: &WorkloadSpec) -> bool {
        let Ok(at) = self.rows.binary_search_by_key(&old.node, |row| row.id) else { return false };
        let row = &self.rows[at];
        let given_back = Usage::of(Some(&old_release.spec));
        let used = |scope: &QuotaKey| {
            let mut used = self.used(scope);
            used.subtract(&given_back);
            used
        };
        let another = |a: &&Arc<Alloc>| a.key == old.key && a.id != old.id && !a.has_ended();
        quota::within(self.state, &old.key, spec, used).is_ok()
            && fit::volumes(self.state, old.node, &old.key, spec).is_ok()
            && !(spec.placement.distinct_hosts && self.state.allocs_on(old.node).any(|a| another(&a)))
            && fit::is_open(row.node).is_ok()
            && constraint::suits(row.node, spec).is_ok()
            && fit::has_room(row.node, &row.taken.without(old, &old_release.spec), spec, None, self.now).is_ok()
    }

    /// Every node with its score or its refusal, best first.
    pub fn judge(&mut self, ask: Ask<'_>) -> Vec<Judged> {
        let allowed = self.allowed(ask.key, ask.spec);
        let (state, now) = (self.state, self.now);
        self.batch(ask.key, ask.spec);
        let Some(batch) = &self.batch else { return vec![] };
        let verdict = |at: usize, row: &Row<'_>| {
            allowed.clone()?;
            batch.explain(state, now, row, at, ask.troubled)
        };
        let mut judged: Vec<Judged> = self
            .rows
            .iter()
            .enumerate()
            .map(|(at, row)| Judged { node: row.id, name: row.node.facts.name.clone(), verdict: verdict(at, row) })
            .collect();
        judged.sort_by_key(|j| std::cmp::Reverse(j.verdict.as_ref().ok().map(|score| score.total())));
        judged
    }
}
