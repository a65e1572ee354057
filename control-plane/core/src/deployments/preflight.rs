//! Looks before anything is touched: whether a release could run at all.

use std::collections::BTreeMap;

use optimus_common::{Reason, Timestamp, WorkloadKey};

use crate::scheduler::{self, Taken};
use crate::state::{Release, State, Workload};

/// What the leader knows that is not in the state.
#[derive(Debug, Clone, Default)]
pub struct Findings {
    /// What a release needs and does not have, as a sentence: a secret, an artifact that cannot be reached.
    pub missing: BTreeMap<(WorkloadKey, u64), String>,
}

/// What a release still waits for, before its deployment begins; unset: nothing.
pub fn preflight(state: &State, workload: &Workload, release: &Release, findings: &Findings, now: Timestamp) -> Option<Reason> {
    if let Some(what) = findings.missing.get(&(release.key.clone(), release.number)) {
        return Some(Reason::Missing { what: what.clone() });
    }
    let key = &release.key;
    if let Some(name) = release.spec.secrets.iter().find(|name| state.secret_of(release, name).is_none()) {
        let scope = format!("{}/{}", key.project, key.environment);
        return Some(Reason::Missing { what: format!("there is no secret {name} in {scope}: optimus secret set {name}") });
    }
    for name in &release.spec.update.after {
        let before = WorkloadKey { workload: name.clone(), ..key.clone() };
        if *name != key.workload && !is_ready(state, &before) {
            return Some(Reason::WaitsFor { workload: name.to_string() });
        }
    }
    let could = |node: &crate::state::Node| scheduler::fits_with(node, &Taken::default(), &release.spec, None, now).is_ok();
    if workload.copies > 0 && !state.nodes.values().any(|node| could(node)) {
        return scheduler::why_nowhere(state, &workload.key, &release.spec, now);
    }
    None
}

/// All its copies are there and well.
fn is_ready(state: &State, key: &WorkloadKey) -> bool {
    let Some(workload) = state.workload(key).filter(|w| !w.stopped) else { return false };
    let up = |node| state.nodes.get(node).is_some_and(|n| n.up);
    let mut ready: Vec<u32> = state.allocs_of(key).filter(|a| a.run && a.is_ready() && up(&a.node)).map(|a| a.index).collect();
    ready.dedup(); // by slot, in order
    ready.len() >= workload.copies as usize
}
