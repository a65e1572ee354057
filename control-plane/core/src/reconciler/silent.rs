//! Copies on nodes that do not answer, of workloads that say what is to become of them.
//!
//! Such a copy is **unknown**: it is replaced at once, and may take up its place again when its node is back in time.
//! Without a word of the workload it is replaced as well, and what replaced it stays.

use std::sync::Arc;

use optimus_common::spec::{Disconnect, Keep};
use optimus_common::{Reason, Span, Timestamp};

use super::slot::{Slot, answers};
use super::{Pass, over_at};
use crate::state::{Alloc, State};

/// So long after its node came back, what was last seen of a copy is not taken for what it does now.
const NEWS_WITHIN: Span = Span::secs(3);

fn disconnect(state: &State, alloc: &Alloc) -> Option<Disconnect> {
    state.release(&alloc.key, alloc.release)?.spec.disconnect
}

/// It is not told to stop yet: it may take up its place again.
pub(super) fn is_unknown(state: &State, alloc: &Alloc) -> bool {
    let waits = disconnect(state, alloc).is_some_and(|d| d.keep == Keep::Original);
    waits && alloc.status.is_some() && !answers(state, alloc)
}

impl Pass<'_> {
    /// Gives up the unknown copies of a slot that were away for too long, or never started, and have been replaced.
    pub(super) fn give_up_unknown(&mut self, slot: &Slot) {
        let state = self.state;
        let here = slot.next.iter().chain(&slot.current).any(|a| answers(state, a));
        for alloc in slot.next.iter().chain(&slot.current).filter(|a| here && !answers(state, a)) {
            let Some((policy, node)) = disconnect(state, alloc).zip(state.nodes.get(&alloc.node)) else { continue };
            let lost_at = if alloc.status.is_none() { self.now } else { over_at(node.changed_at, policy.lost_after, self.now) };
            if lost_at <= self.now {
                let reason = Reason::NodeDown { node: node.facts.name.clone(), since: node.changed_at };
                self.outcome.plan.stop.push((alloc.id, reason));
            } else {
                self.wake(lost_at);
            }
        }
    }
}

/// Of two copies of one release: the one that was cut off and is well again, if that is what the workload wants.
pub(super) enum Returned<'a> {
    No,
    /// Its agent has had no time to say how it is.
    NotYet(Timestamp),
    Stays(&'a Arc<Alloc>),
}

/// `next`: copies of the wanted release, oldest first.
pub(super) fn returned<'a>(state: &State, next: &'a [Arc<Alloc>], now: Timestamp) -> Returned<'a> {
    let [older @ .., _] = next else { return Returned::No };
    for alloc in older.iter().filter(|a| answers(state, a)) {
        let Some(node) = state.nodes.get(&alloc.node) else { continue };
        if disconnect(state, alloc).is_none_or(|d| d.keep != Keep::Original) {
            continue;
        }
        // The clock of the log counts, and a time far ahead is nobody's.
        let known_at = over_at(node.changed_at, NEWS_WITHIN, now);
        if now < known_at {
            return Returned::NotYet(known_at);
        }
        if alloc.is_ready() {
            return Returned::Stays(alloc);
        }
    }
    Returned::No
}
