//! One slot of a workload: what is in it, and how far it is.

use std::sync::Arc;

use optimus_common::{Span, Timestamp};

use super::silent::{Returned, returned};
use crate::state::{Alloc, State, Workload};

/// The copies of one index. At rest it holds one; while it moves to another release, or away from a lost node, two.
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub index: u32,
    /// Copies of other releases that should run, and those that are to move to another node.
    pub current: Vec<Arc<Alloc>>,
    /// Copies of the wanted release that should run, oldest first.
    pub next: Vec<Arc<Alloc>>,
    /// Copies that should run and never will: they gave up on their node.
    pub broken: Vec<Arc<Alloc>>,
    /// Copies that get no more requests and are stopped next.
    pub draining: Vec<Arc<Alloc>>,
    /// Copies told to stop whose end is not known yet.
    pub stopping: Vec<Arc<Alloc>>,
}

/// How far a slot is on its way to the wanted release.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Stage {
    /// A copy of the wanted release has been ready for long enough.
    Settled { keep: Arc<Alloc> },
    /// A copy of the wanted release is on its way; ready copies count at `counts_at`.
    Starting { counts_at: Option<Timestamp> },
    /// Only copies of another release are there. `serving`: one of them is ready on a node that answers.
    Old { serving: bool },
    /// Nothing is there that could become the wanted copy. `lost`: but for copies on nodes that do not answer.
    Empty { lost: bool },
}

/// Sorts the copies of a workload into its first `count` slots. What is beyond the last is returned apart.
pub(super) fn slots(state: &State, workload: &Workload, count: u32) -> (Vec<Slot>, Vec<Arc<Alloc>>) {
    let mut slots: Vec<Slot> = (0..count).map(|index| Slot { index, ..Slot::default() }).collect();
    let mut beyond = Vec::new();
    for alloc in state.allocs_of(&workload.key).filter(|a| !a.has_ended() && !a.is_release_step()) {
        let Some(slot) = slots.get_mut(alloc.index as usize) else {
            beyond.push(alloc.clone());
            continue;
        };
        let list = match alloc {
            alloc if !alloc.run => &mut slot.stopping,
            alloc if alloc.phase().is_terminal() => &mut slot.broken,
            alloc if alloc.draining_since.is_some() => &mut slot.draining,
            alloc if alloc.release == workload.release && !alloc.migrate => &mut slot.next,
            _ => &mut slot.current,
        };
        list.push(alloc.clone());
    }
    (slots, beyond)
}

impl Slot {
    pub fn stage(&self, state: &State, now: Timestamp, min_ready: Span) -> Stage {
        match returned(state, &self.next, now) {
            Returned::Stays(original) => return Stage::Settled { keep: original.clone() },
            Returned::NotYet(at) => return Stage::Starting { counts_at: Some(at) },
            Returned::No => {}
        }
        let mut counts_at = None;
        let mut on_its_way = false;
        // The newest first: with a lost node back, what replaced its copy stays.
        for alloc in self.next.iter().rev().filter(|a| answers(state, a)) {
            on_its_way = true;
            let resized = state.release(&alloc.key, alloc.release).is_none_or(|release| !alloc.awaits_limits(&release.spec));
            if let Some(since) = ready_since(alloc).filter(|_| resized) {
                let at = super::over_at(since, min_ready, now);
                if now >= at {
                    return Stage::Settled { keep: alloc.clone() };
                }
                counts_at = Some(counts_at.map_or(at, |earlier: Timestamp| earlier.min(at)));
            }
        }
        match (on_its_way, self.current.is_empty()) {
            (true, _) => Stage::Starting { counts_at },
            (false, false) => Stage::Old { serving: self.current.iter().any(|a| a.is_ready() && answers(state, a)) },
            (false, true) => Stage::Empty { lost: !self.next.is_empty() },
        }
    }

    /// Copies that run beyond the one a slot is for.
    pub fn extra(&self, state: &State) -> u32 {
        let run = self.next.iter().chain(&self.current).filter(|a| answers(state, a)).count() as u32;
        run.saturating_sub(1)
    }

    /// All that was not told to stop.
    pub fn should_run(&self) -> impl Iterator<Item = &Arc<Alloc>> {
        self.current.iter().chain(&self.next).chain(&self.broken).chain(&self.draining)
    }

    /// Somebody serves.
    pub fn serves(&self, state: &State) -> bool {
        self.next.iter().chain(&self.current).any(|a| a.is_ready() && answers(state, a))
    }
}

/// Whether the copy's node answers.
pub(super) fn answers(state: &State, alloc: &Alloc) -> bool {
    state.nodes.get(&alloc.node).is_some_and(|n| n.up)
}

fn ready_since(alloc: &Alloc) -> Option<Timestamp> {
    alloc.status.as_ref().filter(|_| alloc.is_ready())?.ready_since
}
