//! What a deploy would do: the very decisions of the reconciler, played through on a copy of the state with agents that
//! do as they are told at once. Nothing of it is kept.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use optimus_common::protocol::{AllocStatus, Phase, RELEASE_SLOT};
use optimus_common::reason::Exit;
use optimus_common::{AllocId, NodeId, Reason, Span, Timestamp, WorkloadKey};
use uuid::Uuid;

use super::{Findings, preflight};
use crate::reconciler::reconcile_some;
use crate::state::{Applied, Command, DeployItem, Proposal, Refusal, State};

/// Most looks that are played through; a plan that needs more says that it is cut short.
pub const LOOKS_MAX: usize = 400;

/// What would become of one workload.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    pub key: WorkloadKey,
    pub action: Action,
    /// The release that would run.
    pub release: u64,
    /// In the order in which it would happen.
    pub moves: Vec<Planning>,
    /// What it would wait for before anything is touched.
    pub waits: Option<Reason>,
    /// Slots that would find no room, and why.
    pub unplaced: Vec<(u32, Reason)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Create,
    Update,
    /// Copies are changed as they run.
    InPlace,
    Unchanged,
}

/// One copy that would come, go or change.
#[derive(Debug, Clone, PartialEq)]
pub struct Planning {
    pub slot: u32,
    pub release: u64,
    pub node: NodeId,
    pub what: What,
}

#[derive(Debug, Clone, PartialEq)]
pub enum What {
    Place,
    Stop(Reason),
    Adopt,
    /// Runs the release command, before all else.
    ReleaseCommand,
}

/// A plan of a deploy.
#[derive(Debug, Clone, PartialEq)]
pub struct DeployPlan {
    /// The state it was made from.
    pub index: u64,
    pub workloads: Vec<Planned>,
    /// There would be more to say; it was not played through to the end.
    pub cut_short: bool,
}

/// Plays a deploy through.
///
/// # Errors
/// What the deploy itself would be refused for.
pub fn plan_deploy(state: &State, items: Vec<DeployItem>, now: Timestamp) -> Result<DeployPlan, Refusal> {
    let keys: Vec<WorkloadKey> = items.iter().map(|i| i.key.clone()).collect();
    let index = state.index;
    let mut play = Play { state: state.clone(), now, ids: 0, seen: BTreeMap::new() };
    let unchanged: BTreeSet<WorkloadKey> = match play.apply(Command::Deploy { items }) {
        Applied::Refused(refusal) => return Err(refusal),
        Applied::Deployed { unchanged, .. } => unchanged.into_iter().collect(),
        _ => BTreeSet::new(),
    };
    let waits: BTreeMap<WorkloadKey, Reason> = keys.iter().filter_map(|key| Some((key.clone(), play.waits(key, &keys)?))).collect();
    let cut_short = !play.through(&keys);
    let workloads = keys.iter().map(|key| play.planned(key, state, &unchanged, waits.get(key).cloned())).collect();
    Ok(DeployPlan { index, workloads, cut_short })
}

struct Play {
    state: State,
    now: Timestamp,
    ids: u128,
    seen: BTreeMap<WorkloadKey, Vec<Planning>>,
}

impl Play {
    fn apply(&mut self, command: Command) -> Applied {
        let index = self.state.index + 1;
        self.state.apply(index, Proposal { at: self.now, request: None, command })
    }

    /// What a workload waits for that is not itself being deployed.
    fn waits(&self, key: &WorkloadKey, deployed: &[WorkloadKey]) -> Option<Reason> {
        let workload = self.state.workload(key)?;
        let release = self.state.release(key, workload.release)?;
        preflight(&self.state, workload, release, &Findings::default(), self.now).filter(|reason| match reason {
            Reason::WaitsFor { workload } => !deployed.iter().any(|other| other.workload.as_str() == workload),
            _ => true,
        })
    }

    /// False: it was not over after [`LOOKS_MAX`].
    fn through(&mut self, keys: &[WorkloadKey]) -> bool {
        for _ in 0..LOOKS_MAX {
            let mut ids = self.ids;
            let outcome = reconcile_some(&self.state, keys, self.now, &mut || {
                ids += 1;
                // The tail is what ports are chosen by; it is not shown.
                AllocId(Uuid::from_u128(u128::MAX - (1 << 64) + ids))
            });
            self.ids = ids;
            self.note(&outcome.plan);
            let mut decided = false;
            for command in outcome.commands.into_iter().chain((!outcome.plan.is_empty()).then_some(Command::Plan(outcome.plan))) {
                decided |= !matches!(self.apply(command), Applied::Unchanged { .. });
            }
            if self.agents(keys) || decided {
                continue;
            }
            // Bakes and holds pass in an instant; a deadline is where the play ends, and nobody promotes.
            let open = |key: &WorkloadKey| {
                let id = self.state.workload(key)?.deployment?;
                self.state.deployments.get(&id).filter(|d| !d.phase.is_final()).cloned()
            };
            let waits = keys.iter().filter_map(open).any(|d| {
                use optimus_common::api::v1::DeploymentPhase::{Baking, Shifting};
                matches!(d.phase, Baking | Shifting)
            });
            match outcome.wake_at.filter(|at| *at > self.now && (waits || at.since(self.now) <= Span::secs(600) && self.ripens(keys))) {
                Some(at) => self.now = at,
                None => return true,
            }
        }
        false
    }

    /// A copy is ready and has only to stay so.
    fn ripens(&self, keys: &[WorkloadKey]) -> bool {
        keys.iter().any(|key| {
            let Some(workload) = self.state.workload(key) else { return false };
            let min_ready = self.state.release(key, workload.release).map_or(Span(0), |r| r.spec.update.min_ready);
            let fresh = |since: Timestamp| self.now < since + min_ready;
            self.state.allocs_of(key).any(|a| a.run && a.status.as_ref().and_then(|s| s.ready_since).is_some_and(fresh))
        })
    }

    fn note(&mut self, plan: &crate::state::Plan) {
        let of = |id: &AllocId| self.state.allocs.get(id).cloned();
        let mut found: Vec<(WorkloadKey, Planning)> = Vec::new();
        for (id, reason) in &plan.stop {
            if let Some(a) = of(id).filter(|a| !a.is_release_step()) {
                found.push((a.key.clone(), Planning { slot: a.index, release: a.release, node: a.node, what: What::Stop(reason.clone()) }));
            }
        }
        for (id, release) in &plan.adopt {
            if let Some(a) = of(id) {
                found.push((a.key.clone(), Planning { slot: a.index, release: *release, node: a.node, what: What::Adopt }));
            }
        }
        for p in &plan.place {
            let what = if p.index == RELEASE_SLOT { What::ReleaseCommand } else { What::Place };
            found.push((p.key.clone(), Planning { slot: p.index, release: p.release, node: p.node, what }));
        }
        for (key, planning) in found {
            self.seen.entry(key).or_default().push(planning);
        }
    }

    /// Every copy does at once what it should.
    fn agents(&mut self, keys: &[WorkloadKey]) -> bool {
        let mut reports: BTreeMap<NodeId, Vec<AllocStatus>> = BTreeMap::new();
        for alloc in keys.iter().flat_map(|key| self.state.allocs_of(key)).filter(|a| !a.has_ended()) {
            let new = alloc.status.is_none();
            if !self.state.nodes.get(&alloc.node).is_some_and(|n| n.up) || (alloc.run && !new) {
                continue; // what runs already stays as it is
            }
            let old = alloc.status.as_ref().map_or_else(|| AllocStatus::unknown(alloc.id), |s| AllocStatus::clone(s));
            let phase = if alloc.run { Phase::Running } else { Phase::Stopped };
            if alloc.is_release_step() {
                let exit = Exit { code: Some(0), signal: None, oom: None, at: self.now, ran_for: Span(0) };
                let done = AllocStatus { seq: old.seq + 1, phase: Phase::Stopped, reason: Some(Reason::Exited { exit }), ..old };
                reports.entry(alloc.node).or_default().push(done);
                continue;
            }
            let ready_since = alloc.run.then_some(self.now);
            let status = AllocStatus { seq: old.seq + 1, phase, ready: alloc.run, ready_since, ..old };
            reports.entry(alloc.node).or_default().push(status);
        }
        let any = !reports.is_empty();
        for (node, statuses) in reports {
            self.apply(Command::Report { node, statuses, gone: vec![] });
        }
        any
    }

    fn planned(&mut self, key: &WorkloadKey, before: &State, unchanged: &BTreeSet<WorkloadKey>, waits: Option<Reason>) -> Planned {
        let moves = self.seen.remove(key).unwrap_or_default();
        let row: Option<Arc<_>> = self.state.workload(key).cloned();
        let action = if before.workload(key).is_none() {
            Action::Create
        } else if unchanged.contains(key) {
            Action::Unchanged
        } else if !moves.is_empty() && moves.iter().all(|m| matches!(m.what, What::Adopt)) {
            Action::InPlace
        } else {
            Action::Update
        };
        let unplaced = row.as_ref().map(|w| crate::reconciler::unplaced_slots(&self.state, w, self.now, 10)).unwrap_or_default();
        Planned { key: key.clone(), action, release: row.map_or(0, |w| w.newest), moves, waits, unplaced }
    }
}
