//! Tells sessions when the desired set of their node may have changed.
//!
//! Comparing two states costs as much as they differ, so a change that concerns one node wakes one
//! session, however many are connected. A wake-up carries no data: the session reads the whole set
//! and sends it if it differs from what it sent last.

use std::collections::BTreeSet;
use std::sync::Arc;

use imbl::ordmap::DiffItem;
use optimus_common::NodeId;
use optimus_core::state::{Alloc, State};

use super::Shared;

/// Nodes whose desired set may differ between two states.
fn concerned(before: &State, now: &State) -> BTreeSet<NodeId> {
    let mut nodes = BTreeSet::new();
    for change in before.allocs.diff(&now.allocs) {
        match change {
            DiffItem::Add(_, alloc) | DiffItem::Remove(_, alloc) => {
                nodes.insert(alloc.node);
            }
            DiffItem::Update { old: (_, old), new: (_, new) } => {
                if wanted(old) != wanted(new) {
                    nodes.insert(new.node);
                }
            }
        }
    }
    nodes
}

/// The part of an allocation its node is told. Most changes are reports of the node itself.
fn wanted(alloc: &Alloc) -> (bool, u64, u32, NodeId, &[(String, u16)]) {
    (alloc.run, alloc.release, alloc.index, alloc.node, &alloc.ports)
}

pub async fn run(shared: Arc<Shared>) {
    let mut applied = shared.store.applied();
    applied.mark_unchanged();
    let mut before = shared.store.state();
    loop {
        tokio::select! {
            () = shared.stop.cancelled() => return,
            changed = applied.changed() => if changed.is_err() { return },
        }
        let now = shared.store.state();
        for node in concerned(&before, &now) {
            if let Some(session) = shared.sessions.get(node) {
                session.wake.notify_one();
            }
        }
        before = now;
    }
}
