// SHIM
use crate::state::State;
use optimus_common::{
    NodeId,
    protocol::{Blob, DesiredAlloc},
};
pub fn desired_for(state: &State, node: NodeId) -> Vec<DesiredAlloc> {
    state
        .allocs
        .values()
        .filter(|a| a.node == node)
        .filter_map(|a| {
            let release = state.releases.get(&(a.key.clone(), a.release))?;
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
