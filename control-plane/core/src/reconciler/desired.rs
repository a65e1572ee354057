//! What each node should hold.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use optimus_common::protocol::{Blob, DesiredAlloc};
use optimus_common::secret::SecretValue;
use optimus_common::spec::placement::GivenDevice;
use optimus_common::spec::{Kind, Placement, RunInput, Runs, WorkloadSpec};
use optimus_common::{NodeId, WorkloadKey};

use crate::state::{Alloc, Release, SecretKey, SecretVersion, State};

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

/// Opens a secret. Unset: not at the moment.
pub type OpenSecret<'o> = &'o dyn Fn(&SecretKey, &SecretVersion) -> Option<SecretValue>;

/// The spec of a release with the values of its secrets in it. What does not exist is not there: agents start nothing without.
fn with_secrets(state: &State, release: &Release, open: OpenSecret<'_>) -> Option<Arc<WorkloadSpec>> {
    if release.spec.secrets.is_empty() {
        return Some(release.spec.clone());
    }
    let found = release.spec.secrets.iter().filter_map(|name| state.secret_of(release, name));
    let values = found.map(|(key, version)| Some((key.name.clone(), open(&key, version)?)));
    Some(Arc::new(WorkloadSpec { secret_values: values.collect::<Option<_>>()?, ..(*release.spec).clone() }))
}

/// The spec of a release with its secrets, and encoded once it is wanted.
type Told = (Arc<WorkloadSpec>, Option<Blob>);

/// [`desired_allocs`] as the agent receives them. Unset: a secret could not be opened, and half a set would stop the other half.
pub fn desired_for(state: &State, node: NodeId, open: OpenSecret<'_>) -> Option<Vec<DesiredAlloc>> {
    // A node holds many copies of few releases, and a spec costs more to write than all the rest of a copy.
    let mut specs: BTreeMap<(&WorkloadKey, u64), Told> = BTreeMap::new();
    let mut desired = Vec::new();
    for a in desired_allocs(state, node) {
        let Some(release) = state.release(&a.key, a.release) else { continue };
        let (spec, blob) = match specs.entry((&a.key, a.release)) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(fresh) => fresh.insert((with_secrets(state, release, open)?, None)),
        };
        let spec = match a.is_release_step().then(|| spec.release_step()) {
            Some(Some(step)) => Blob::of(&with_devices(a, &step)),
            Some(None) => continue,
            // Each run has its own input, each copy its own devices.
            None if has_devices(a, spec) => spec_for(state, a, &with_devices(a, spec)),
            None if spec.kind == Kind::Job => spec_for(state, a, spec),
            None => blob.get_or_insert_with(|| Blob::of(&**spec)).clone(),
        };
        let (id, key, ports) = (a.id, a.key.clone(), a.ports.clone());
        desired.push(DesiredAlloc { id, key, index: a.index, release: a.release, run: a.run, ports, spec });
    }
    Some(desired)
}
