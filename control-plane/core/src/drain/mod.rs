//! Emptying nodes, and evening them out. Pure: says which copies are to move; the reconciler moves them.
//!
//! ```text
//!   cordoned, draining ── services, wave by wave ── jobs left to finish ── daemons ── agent holds none ──► drained
//!          └── deadline ──► what is left is stopped, whether there is room elsewhere or not
//! ```
//!
//! A wave of a workload is as large as may be missing of it (`update.parallel`): a copy is flagged only while so many
//! others are really ready that the rest may be missing. A replacement that merely runs counts for nothing.

mod preview;
mod rebalance;

use std::collections::BTreeMap;

use optimus_common::spec::{Kind, WorkloadSpec};
use optimus_common::{AllocId, NodeId, Reason, Timestamp, WorkloadKey};

use crate::state::{Alloc, Command, Drain, Node, State, Workload};

pub use preview::{Fate, Fated, Preview, preview};
pub use rebalance::{Move, rebalance};

/// Most copies flagged or stopped in one batch.
const BATCH_MAX: usize = 500;

/// What to propose of drains.
#[derive(Debug, Default, PartialEq)]
pub struct Outcome {
    /// Copies to be replaced elsewhere.
    pub migrate: Vec<AllocId>,
    /// Copies that leave without waiting for a replacement.
    pub stop: Vec<(AllocId, Reason)>,
    pub commands: Vec<Command>,
    pub wake_at: Option<Timestamp>,
}

/// The next wave of every drain under way.
pub fn decide(state: &State, now: Timestamp) -> Outcome {
    let mut outcome = Outcome::default();
    let mut missing = Missing { state, may_move: BTreeMap::new() };
    for node in state.nodes.values() {
        let Some(drain) = node.drain.as_ref().filter(|d| d.done_at.is_none()) else { continue };
        if outcome.migrate.len() + outcome.stop.len() >= BATCH_MAX {
            outcome.wake_at = Some(now);
            break;
        }
        node_wave(state, node, drain, now, &mut missing, &mut outcome);
    }
    outcome
}

/// The moves of automatic rebalancing, once in each interval; none is an answer too, and begins the next interval.
pub fn by_itself(state: &State, now: Timestamp) -> Option<Command> {
    let row = state.rebalance.filter(|row| row.automatic && now >= row.since + row.every)?;
    let busy = state.nodes.values().any(|n| n.is_draining()) || state.allocs.values().any(|a| a.run && a.migrate);
    let moves = if busy { vec![] } else { rebalance(state, now, row.moves as usize) };
    Some(Command::Rebalance { moves: moves.into_iter().map(|m| m.alloc).collect() })
}

/// A copy that still keeps its node from being empty.
fn holds(state: &State, drain: &Drain, alloc: &Alloc) -> bool {
    !(alloc.has_ended() || drain.keep_daemons && kind_of(state, alloc) == Some(Kind::Daemon))
}

fn node_wave(state: &State, node: &Node, drain: &Drain, now: Timestamp, missing: &mut Missing<'_>, outcome: &mut Outcome) {
    let left: Vec<&Alloc> = state.allocs_on(node.id).map(|a| &**a).filter(|a| holds(state, drain, a)).collect();
    // What should not run on a node that does not answer will be stopped when it is back.
    if left.iter().all(|a| !node.up && !a.run) {
        return outcome.commands.push(Command::NodeDrained { node: node.id });
    }
    if let Some(deadline) = drain.deadline {
        if now >= deadline {
            let reason = Reason::Drained { node: node.facts.name.clone() };
            let all = left.iter().filter(|a| a.run).take(BATCH_MAX);
            return outcome.stop.extend(all.map(|a| (a.id, reason.clone())));
        }
        outcome.wake_at = Some(outcome.wake_at.map_or(deadline, |at| at.min(deadline)));
    }
    let only_daemons = left.iter().all(|a| kind_of(state, a) == Some(Kind::Daemon));
    for alloc in left.into_iter().filter(|a| a.run && !a.migrate) {
        if outcome.migrate.len() >= BATCH_MAX {
            outcome.wake_at = Some(now);
            return;
        }
        let goes = match kind_of(state, alloc) {
            Some(Kind::Service) => missing.may_move(alloc),
            Some(Kind::Daemon) => only_daemons,
            Some(Kind::Job) => false, // left to finish
            None => true,
        };
        if goes {
            outcome.migrate.push(alloc.id);
        }
    }
}

fn kind_of(state: &State, alloc: &Alloc) -> Option<Kind> {
    if alloc.is_release_step() {
        return Some(Kind::Job); // left to finish
    }
    state.release(&alloc.key, alloc.release).map(|r| r.spec.kind)
}

/// How many copies of a service may be missing at a time.
fn wave(spec: &WorkloadSpec) -> u32 {
    spec.update.parallel.max(1)
}

/// Counts, for each workload, how many more of its copies may be asked to move.
struct Missing<'a> {
    state: &'a State,
    may_move: BTreeMap<WorkloadKey, u32>,
}

impl Missing<'_> {
    fn may_move(&mut self, alloc: &Alloc) -> bool {
        // One that serves nobody costs nothing to move.
        if !alloc.is_ready() {
            return true;
        }
        let Some(workload) = self.state.workload(&alloc.key) else { return true };
        let left = self.may_move.entry(alloc.key.clone()).or_insert_with(|| Self::count(self.state, workload));
        if *left == 0 {
            return false;
        }
        *left -= 1;
        true
    }

    /// Ready copies that stay, beyond those that must: `parallel` may be missing.
    fn count(state: &State, workload: &Workload) -> u32 {
        let Some(release) = state.release(&workload.key, workload.release) else { return 0 };
        let stays = |a: &&std::sync::Arc<Alloc>| a.run && !a.migrate && a.is_ready() && crate::reconciler::answers(state, a);
        let ready: std::collections::BTreeSet<u32> =
            state.allocs_of(&workload.key).filter(|a| a.index < workload.copies).filter(stays).map(|a| a.index).collect();
        let must = workload.copies.saturating_sub(wave(&release.spec));
        (ready.len() as u32).saturating_sub(must)
    }
}

/// What is left on a draining node, and why it has not gone yet.
pub fn waiting(state: &State, node: NodeId) -> Vec<(String, String)> {
    let Some((row, drain)) = state.nodes.get(&node).and_then(|n| Some((n, n.drain.as_ref()?))) else { return vec![] };
    let why = |alloc: &Alloc| match kind_of(state, alloc) {
        _ if !alloc.run => "is stopping".to_owned(),
        Some(Kind::Job) => "is left to finish its run".to_owned(),
        Some(Kind::Daemon) => "goes last".to_owned(),
        _ if alloc.migrate => match state.workload(&alloc.key).and_then(|w| state.release(&w.key, w.release)) {
            Some(release) if replacement(state, alloc).is_none() => {
                crate::scheduler::why_nowhere(state, &alloc.key, &release.spec, row.changed_at)
                    .map_or("its replacement is placed next".into(), |r| r.to_string())
            }
            _ => "waits until its replacement is ready".to_owned(),
        },
        _ => "waits for its turn: as many copies of its workload as may are moving or not ready".to_owned(),
    };
    state.allocs_on(node).filter(|a| holds(state, drain, a)).map(|a| (a.subject(), why(a))).collect()
}

fn replacement<'a>(state: &'a State, alloc: &'a Alloc) -> Option<&'a std::sync::Arc<Alloc>> {
    state.allocs_in(&alloc.key, alloc.index).find(|a| a.run && !a.migrate && a.id != alloc.id)
}
