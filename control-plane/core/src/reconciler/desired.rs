//! What each node should hold.

use std::sync::Arc;

use optimus_common::NodeId;
use optimus_common::protocol::{Blob, DesiredAlloc};

use crate::state::{Alloc, State};

/// The copies a node should hold: those that run or should, and those that have not ended yet.
pub fn desired_allocs(state: &State, node: NodeId) -> impl Iterator<Item = &Arc<Alloc>> {
    state.allocs_on(node).filter(|a| !a.has_ended())
}

/// [`desired_allocs`] as the agent receives them.
pub fn desired_for(state: &State, node: NodeId) -> Vec<DesiredAlloc> {
    desired_allocs(state, node)
        .filter_map(|a| {
            let release = state.release(&a.key, a.release)?;
            Some(DesiredAlloc {
                id: a.id,
                key: a.key.clone(),
                index: a.index,
                release: a.release,
                run: a.run,
                ports: a.ports.clone(),
                spec: Blob::of(&*release.spec),
            })
        })
        .collect()
}
