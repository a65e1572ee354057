//! Which copies to move so that nodes are used more evenly: an opt-in, within a budget.
//!
//! First copies of one service that share a node while another that may take one has none; then from the node that is
//! used most to the one used least, as long as that brings the two nearer together. Copies move one by one on paper,
//! so that the next choice knows the one before; what is under way counts as done.

use std::collections::BTreeMap;

use optimus_common::spec::Kind;
use optimus_common::{AllocId, NodeId, Timestamp, WorkloadKey};

use super::kind_of;
use crate::scheduler::{Taken, fits_with, taken};
use crate::state::{Alloc, Node, State};

/// Nodes whose use differs by no more than this, in thousandths, are even enough.
const EVEN_ENOUGH: u64 = 200;

/// One move, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    pub alloc: AllocId,
    /// `shop/prod/web-0`
    pub copy: String,
    pub from: NodeId,
    /// Where there is room now; the scheduler has the last word.
    pub to: NodeId,
    pub why: String,
}

/// At most `most` moves, the most useful first.
pub fn rebalance(state: &State, now: Timestamp, most: usize) -> Vec<Move> {
    let mut paper = Paper::of(state, now);
    let mut moves = Vec::new();
    while moves.len() < most {
        let Some(next) = paper.shared().or_else(|| paper.uneven()) else { break };
        paper.take(&next);
        moves.push(next);
    }
    moves
}

/// The nodes as they would be after the moves so far.
struct Paper<'a> {
    state: &'a State,
    now: Timestamp,
    nodes: BTreeMap<NodeId, (&'a Node, Taken)>,
    /// Copies that may move, by where they are.
    copies: BTreeMap<NodeId, Vec<&'a Alloc>>,
    /// Copies of each service on each node.
    of: BTreeMap<(&'a WorkloadKey, NodeId), u32>,
}

impl<'a> Paper<'a> {
    fn of(state: &'a State, now: Timestamp) -> Self {
        let takes = |node: &&std::sync::Arc<Node>| node.up && !node.cordoned;
        let nodes = state.nodes.values().filter(takes).map(|n| (n.id, (&**n, taken(state, n.id)))).collect();
        let mut paper = Paper { state, now, nodes, copies: BTreeMap::new(), of: BTreeMap::new() };
        for workload in state.workloads.values().filter(|w| !w.stopped && !w.removing) {
            let moving = workload.deployment.and_then(|id| state.deployments.get(&id)).is_some_and(|d| !d.phase.is_final());
            let whole = state.allocs_of(&workload.key).filter(|a| a.run).all(|a| a.is_ready() && !a.migrate);
            for alloc in state.allocs_of(&workload.key).filter(|a| a.run && kind_of(state, a) == Some(Kind::Service)) {
                *paper.of.entry((&workload.key, alloc.node)).or_default() += 1;
                // One that is changing or not whole is left alone.
                if !moving && whole && paper.nodes.contains_key(&alloc.node) {
                    paper.copies.entry(alloc.node).or_default().push(alloc);
                }
            }
        }
        paper
    }

    fn share(&self, node: NodeId, more: Option<&Alloc>, less: Option<&Alloc>) -> u64 {
        let Some((row, taken)) = self.nodes.get(&node) else { return 0 };
        let ask = |alloc: Option<&Alloc>| {
            let release = alloc.and_then(|a| self.state.release(&a.key, a.release));
            release.map_or((0, 0), |r| (u64::from(r.spec.resources.cpu.0), r.spec.resources.memory_request.0))
        };
        let ((more_cpu, more_memory), (less_cpu, less_memory)) = (ask(more), ask(less));
        let share = |used: u64, of: u64| (used * 1000).checked_div(of).unwrap_or(1000);
        let cpu = share((taken.cpu + more_cpu).saturating_sub(less_cpu), u64::from(row.facts.cpu.0));
        cpu.max(share((taken.memory + more_memory).saturating_sub(less_memory), row.facts.memory.0))
    }

    fn fits(&self, alloc: &Alloc, node: NodeId) -> bool {
        let Some((row, taken)) = self.nodes.get(&node) else { return false };
        let release = self.state.release(&alloc.key, alloc.release);
        release.is_some_and(|r| fits_with(row, taken, &r.spec, None, self.now).is_ok())
    }

    fn count(&self, alloc: &'a Alloc, node: NodeId) -> u32 {
        self.of.get(&(&alloc.key, node)).copied().unwrap_or(0)
    }

    /// Two copies of one service on a node, while another node has two fewer.
    fn shared(&self) -> Option<Move> {
        for (from, copies) in &self.copies {
            for alloc in copies.iter().filter(|a| self.count(a, *from) > 1) {
                let better =
                    self.nodes.keys().filter(|to| self.count(alloc, **to) + 1 < self.count(alloc, *from) && self.fits(alloc, **to));
                if let Some(to) = better.min_by_key(|to| (self.count(alloc, **to), self.share(**to, None, None), **to)) {
                    let why = format!("{} copies of its workload share the node", self.count(alloc, *from));
                    return Some(self.moving(alloc, *to, why));
                }
            }
        }
        None
    }

    /// From the node used most to one used less, if that brings them nearer.
    fn uneven(&self) -> Option<Move> {
        let by_use = |node: &&NodeId| (self.share(**node, None, None), **node);
        let from = *self.nodes.keys().filter(|n| self.copies.contains_key(n)).max_by_key(by_use)?;
        let to = *self.nodes.keys().min_by_key(by_use)?;
        let (high, low) = (self.share(from, None, None), self.share(to, None, None));
        if high.saturating_sub(low) <= EVEN_ENOUGH {
            return None;
        }
        let candidates = self.copies.get(&from)?.iter().filter(|a| self.fits(a, to) && self.count(a, to) < self.count(a, from));
        // The one after which the fuller of the two is used least, and never more than before.
        let after = |a: &&&Alloc| self.share(from, None, Some(a)).max(self.share(to, Some(a), None));
        let best = candidates.min_by_key(|a| (after(a), a.id))?;
        (after(&best) < high).then(|| self.moving(best, to, format!("its node is used to {}%, the other to {}%", high / 10, low / 10)))
    }

    fn moving(&self, alloc: &Alloc, to: NodeId, why: String) -> Move {
        Move { alloc: alloc.id, copy: alloc.subject(), from: alloc.node, to, why }
    }

    fn take(&mut self, done: &Move) {
        let Some(copies) = self.copies.get_mut(&done.from) else { return };
        let Some(at) = copies.iter().position(|a| a.id == done.alloc) else { return };
        let alloc = copies.remove(at); // moved once is enough
        if copies.is_empty() {
            self.copies.remove(&done.from);
        }
        let Some(release) = self.state.release(&alloc.key, alloc.release) else { return };
        if let Some((_, taken)) = self.nodes.get_mut(&done.from) {
            *taken = taken.without(alloc, &release.spec);
        }
        if let Some((_, taken)) = self.nodes.get_mut(&done.to) {
            taken.add(&[], &[], &release.spec);
        }
        *self.of.entry((&alloc.key, done.from)).or_default() -= 1;
        *self.of.entry((&alloc.key, done.to)).or_default() += 1;
    }
}
