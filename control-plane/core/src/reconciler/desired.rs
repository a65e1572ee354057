//! What each node should hold.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use optimus_common::protocol::{Blob, DesiredAlloc};
use optimus_common::spec::placement::GivenDevice;
use optimus_common::spec::{Kind, Placement, RunInput, Runs, WorkloadSpec};
use optimus_common::{NodeId, WorkloadKey};

use crate::state::{Alloc, State};

/// The copies a node should hold: those that run or should, and those that have not ended yet.
pub fn desired_allocs(state: &State, node: NodeId) -> impl Iterator<Item = &Arc<Alloc>> {
    state.allocs_on(node).filter(|a| !a.has_ended())
}

/// The spec as the agent of a copy receives it: that of a job's copy with what its run was given.
fn spec_for(state: &State, alloc: &Alloc, spec: &WorkloadSpec) -> Blob {
    let run = (spec.kind == Kind::Job).then(|| state.run_of_slot(&alloc.key, alloc.index)).flatten();
    let Some(run) = run else { return Blob::of(spec) };
    let input = RunInput {
        run: run.id.to_string(),
        number: run.number,
        scheduled_for: run.scheduled_for,
        params: run.params.clone(),
        payload: run.payload.as_ref().map(|p| Vec::clone(p)),
    };
    let runs = Runs { input: Some(Box::new(input)), ..spec.job_runs() };
    Blob::of(&WorkloadSpec { runs: Some(runs), ..spec.clone() })
}

/// Whether an agent must be told which devices a copy was given, beside its spec.
fn has_devices(alloc: &Alloc, spec: &WorkloadSpec) -> bool {
    !alloc.devices.is_empty() || !spec.placement.given.is_empty()
}

/// The spec with the devices of one copy in it, and nobody else's.
fn with_devices(alloc: &Alloc, spec: &WorkloadSpec) -> WorkloadSpec {
    let given = alloc.devices.iter().map(|(kind, id)| GivenDevice { kind: kind.clone(), id: id.clone() }).collect();
    WorkloadSpec { placement: Placement { given, ..spec.placement.clone() }, ..spec.clone() }
}

/// [`desired_allocs`] as the agent receives them.
pub fn desired_for(state: &State, node: NodeId) -> Vec<DesiredAlloc> {
    // A node holds many copies of few releases, and a spec costs more to write than all the rest of a copy.
    let mut specs: BTreeMap<(&WorkloadKey, u64), Blob> = BTreeMap::new();
    desired_allocs(state, node)
        .filter_map(|a| {
            let release = state.release(&a.key, a.release)?;
            let spec = match specs.entry((&a.key, a.release)) {
                _ if a.is_release_step() => Blob::of(&with_devices(a, &release.spec.release_step()?)),
                // Each run has its own input, each copy its own devices.
                _ if has_devices(a, &release.spec) => spec_for(state, a, &with_devices(a, &release.spec)),
                _ if release.spec.kind == Kind::Job => spec_for(state, a, &release.spec),
                Entry::Occupied(known) => known.get().clone(),
                Entry::Vacant(fresh) => fresh.insert(Blob::of(&*release.spec)).clone(),
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
