//! What each node should hold.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use optimus_common::protocol::{Blob, DesiredAlloc};
use optimus_common::{NodeId, WorkloadKey};

use crate::state::{Alloc, State};

/// The copies a node should hold: those that run or should, and those that have not ended yet.
pub fn desired_allocs(state: &State, node: NodeId) -> impl Iterator<Item = &Arc<Alloc>> {
    state.allocs_on(node).filter(|a| !a.has_ended())
}

/// [`desired_allocs`] as the agent receives them.
pub fn desired_for(state: &State, node: NodeId) -> Vec<DesiredAlloc> {
    // A node holds many copies of few releases, and a spec costs more to write than all the rest of a copy.
    let mut specs: BTreeMap<(&WorkloadKey, u64), Blob> = BTreeMap::new();
    desired_allocs(state, node)
        .filter_map(|a| {
            let spec = match specs.entry((&a.key, a.release)) {
                Entry::Occupied(known) => known.get().clone(),
                Entry::Vacant(fresh) => fresh.insert(Blob::of(&*state.release(&a.key, a.release)?.spec)).clone(),
            };
            Some(DesiredAlloc {
                id: a.id,
                key: a.key.clone(),
                index: a.index,
                release: a.release,
                run: a.run,
                ports: a.ports.clone(),
                spec,
            })
        })
        .collect()
}
