//! Where a copy may run, and where best.
//!
//! [`fits`] is the only judge of whether, [`Score`] of where best. A [`View`] holds the sums of every node, so that
//! a batch of placements costs one pass over the copies; it is made of one state and then follows the batch.

mod fit;

pub use fit::{Taken, eligible, fits, fits_resized, fits_with, taken};

use std::collections::BTreeMap;

use optimus_common::reason::NodeRefusal;
use optimus_common::spec::WorkloadSpec;
use optimus_common::{AllocId, NodeId, Reason, Timestamp, WorkloadKey};

use crate::state::{Alloc, Node, Release, State};

/// Most nodes named in a refusal.
const NODES_NAMED: usize = 10;

/// The terms of a node's score, each in `0..=1000`, always all present. Integers, so that every machine agrees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Score {
    /// 1000, or 0 where a copy of this slot could not run lately.
    pub untroubled: u32,
    /// Few copies of the same workload: 1000 with none.
    pub spread: u32,
    /// Free share of the scarcer of CPU and memory after placing.
    pub room: u32,
}

impl Score {
    /// Each term outweighs all below it: a node that just failed is the last choice, and two copies on one host
    /// die together whatever room it has.
    pub fn total(self) -> u64 {
        let Score { untroubled, spread, room } = self;
        (u64::from(untroubled) * 1001 + u64::from(spread)) * 1001 + u64::from(room)
    }

    fn of(node: &Node, taken: &Taken, spec: &WorkloadSpec, same: u32, troubled: bool) -> Score {
        let share = |capacity: u64, used: u64| (capacity.saturating_sub(used) * 1000).checked_div(capacity).unwrap_or(0) as u32;
        let cpu = share(u64::from(node.facts.cpu.0), taken.cpu + u64::from(spec.resources.cpu.0));
        let memory = share(node.facts.memory.0, taken.memory + spec.resources.memory_request.0);
        Score { untroubled: if troubled { 0 } else { 1000 }, spread: 1000 / (1 + same), room: cpu.min(memory) }
    }
}

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
    pub verdict: Result<Score, optimus_common::reason::Refusal>,
}

/// The nodes with what is taken of them, following a batch of placements as it is made.
pub struct View<'a> {
    state: &'a State,
    now: Timestamp,
    /// In the order of their ids: ties go to the lowest.
    nodes: Vec<(NodeId, &'a Node, Taken)>,
    /// Copies of the workload placed last, by node; most batches place many of one workload.
    same: Option<(WorkloadKey, BTreeMap<NodeId, u32>)>,
}

impl<'a> View<'a> {
    pub fn of(state: &'a State, now: Timestamp) -> Self {
        let nodes = state.nodes.iter().map(|(id, node)| (*id, &**node, taken(state, *id))).collect();
        View { state, now, nodes, same: None }
    }

    fn same_on(&mut self, key: &WorkloadKey) -> &mut BTreeMap<NodeId, u32> {
        if self.same.as_ref().is_none_or(|(known, _)| known != key) {
            let mut counts = BTreeMap::new();
            for alloc in self.state.allocs_of(key).filter(|a| a.run) {
                *counts.entry(alloc.node).or_default() += 1;
            }
            self.same = Some((key.clone(), counts));
        }
        &mut self.same.get_or_insert_with(|| (key.clone(), BTreeMap::new())).1
    }

    /// Chooses a node and ports for one more copy and takes them, or nothing when no node can.
    pub fn place(&mut self, ask: Ask<'_>) -> Option<(NodeId, Vec<(String, u16)>)> {
        self.same_on(ask.key);
        let same = self.same.as_ref().map(|(_, counts)| counts)?;
        let mut best: Option<(u64, usize)> = None;
        for (at, (id, node, taken)) in self.nodes.iter().enumerate() {
            if fits_with(node, taken, ask.spec, None, self.now).is_err() {
                continue;
            }
            let score = Score::of(node, taken, ask.spec, same.get(id).copied().unwrap_or(0), ask.troubled.contains(id)).total();
            if best.is_none_or(|(most, _)| score > most) {
                best = Some((score, at));
            }
        }
        let (id, node, taken) = &mut self.nodes[best?.1];
        let ports = fit::choose_ports(node, taken, ask.spec, ask.alloc, self.now)?;
        taken.add(&ports, ask.spec);
        let id = *id;
        *self.same_on(ask.key).entry(id).or_default() += 1;
        Some((id, ports))
    }

    /// Whether one more copy of `spec` fits on some node.
    pub fn could_place(&self, spec: &WorkloadSpec) -> bool {
        self.nodes.iter().any(|(_, node, taken)| fits_with(node, taken, spec, None, self.now).is_ok())
    }

    /// Takes ports and room for one more copy on this very node, or nothing when it has none.
    pub fn place_on(&mut self, node: NodeId, spec: &WorkloadSpec, alloc: AllocId) -> Option<Vec<(String, u16)>> {
        let at = self.nodes.binary_search_by_key(&node, |(id, ..)| *id).ok()?;
        let (_, node, taken) = &mut self.nodes[at];
        fits_with(node, taken, spec, None, self.now).ok()?;
        let ports = fit::choose_ports(node, taken, spec, alloc, self.now)?;
        taken.add(&ports, spec);
        Some(ports)
    }

    /// Whether `spec` would fit on the node of `old` once that has stopped.
    pub fn fits_instead(&self, old: &Alloc, old_release: &Release, spec: &WorkloadSpec) -> bool {
        let Ok(at) = self.nodes.binary_search_by_key(&old.node, |(id, ..)| *id) else { return false };
        let (_, node, taken) = &self.nodes[at];
        fits_with(node, &taken.without(old, &old_release.spec), spec, None, self.now).is_ok()
    }
}

/// Every node with its score or its refusal, best first. For people who ask why.
pub fn judge(state: &State, key: &WorkloadKey, spec: &WorkloadSpec, now: Timestamp) -> Vec<Judged> {
    let mut view = View::of(state, now);
    let same = view.same_on(key).clone();
    let mut judged: Vec<Judged> = view
        .nodes
        .iter()
        .map(|(id, node, taken)| {
            let score = || Score::of(node, taken, spec, same.get(id).copied().unwrap_or(0), false);
            Judged { node: *id, name: node.facts.name.clone(), verdict: fits_with(node, taken, spec, None, now).map(|()| score()) }
        })
        .collect();
    judged.sort_by_key(|j| std::cmp::Reverse(j.verdict.as_ref().ok().map(|score| score.total())));
    judged
}

/// Why no node takes a copy, computed when somebody asks; unset when one would.
pub fn why_nowhere(state: &State, spec: &WorkloadSpec, now: Timestamp) -> Option<Reason> {
    if state.nodes.is_empty() {
        return Some(Reason::NoNodes);
    }
    let mut refusals = Vec::new();
    for (id, node) in &state.nodes {
        let refusal = fits(state, *id, spec, None, now).err()?;
        if refusals.len() < NODES_NAMED {
            refusals.push(NodeRefusal { node: node.facts.name.clone(), refusal });
        }
    }
    Some(Reason::NoNodeFits { nodes: refusals })
}
