//! From a spec's resources to the groups of processes that enforce them. Fails closed.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use optimus_common::AllocId;
use optimus_common::reason::Reason;
use optimus_common::spec::Resources;

use crate::alloc::worker::alloc_dir;
use crate::isolation::{CgroupRoot, DeviceNode, Group, Limits};
use crate::ledger::chain;
use crate::logs::segments;

/// The groups of this agent's workloads, or why there are none.
pub struct Enforcer {
    root: Result<CgroupRoot, String>,
    /// Start what asks for limits that cannot be set, and say so.
    allow_unenforced: bool,
}

/// A group, if there are any here, and what of the limits is not enforced.
pub struct Enforced {
    pub group: Option<Arc<Group>>,
    pub unenforced: Vec<String>,
}

/// What is not enforced where a copy could open devices of others.
const DEVICES: &str = "who may open which device";

const KINDS: [&str; 3] = ["cpu", "memory", "pids"];

impl Enforcer {
    pub fn open(owner: &str, allow_unenforced: bool) -> Self {
        let root = CgroupRoot::open(owner).map_err(|error| chain(&error));
        match &root {
            Ok(root) if root.missing().is_empty() => {}
            Ok(root) => tracing::warn!(missing = ?root.missing(), allow_unenforced, "this host cannot enforce every limit"),
            Err(why) => tracing::warn!(why, allow_unenforced, "this host has no cgroups for us: no limit can be enforced"),
        }
        Enforcer { root, allow_unenforced }
    }

    /// `v1`, `v2`, `hybrid` or `none`.
    pub fn version(&self) -> &'static str {
        self.root.as_ref().map_or("none", CgroupRoot::name)
    }

    /// What cannot be enforced here, each with why.
    pub fn unenforced(&self) -> Vec<String> {
        match &self.root {
            Ok(root) => root.missing().to_vec(),
            Err(why) => KINDS.iter().map(|kind| format!("{kind}: {why}")).collect(),
        }
    }

    /// Makes the group of an attempt with its limits set, or refuses. Blocking.
    pub fn create(&self, alloc: AllocId, attempt: u32, resources: &Resources, kept_from: &[DeviceNode]) -> Result<Enforced, Reason> {
        let mut unenforced = self.unenforced();
        if let (Some(first), false) = (unenforced.first(), self.allow_unenforced) {
            let (what, why) = first.split_once(": ").unwrap_or(("limits", first));
            return Err(Reason::LimitNotEnforceable { what: what.to_owned(), why: why.to_owned() });
        }
        let root = match &self.root {
            Ok(root) => root,
            Err(why) => {
                if !kept_from.is_empty() {
                    unenforced.push(format!("{DEVICES}: {why}"));
                }
                return Ok(Enforced { group: None, unenforced });
            }
        };
        let limits = limits_of(&unenforced, resources);
        let name = group_name(alloc, attempt);
        match root.create(&name, &limits) {
            Ok(group) => match group.deny(kept_from) {
                Ok(()) => Ok(Enforced { group: Some(Arc::new(group)), unenforced }),
                Err(error) if self.allow_unenforced => {
                    unenforced.push(format!("{DEVICES}: {}", chain(&error)));
                    Ok(Enforced { group: Some(Arc::new(group)), unenforced })
                }
                Err(error) => {
                    end(&group);
                    Err(Reason::LimitNotEnforceable { what: DEVICES.to_owned(), why: chain(&error) })
                }
            },
            Err(error) => {
                if let Some(half_made) = root.open_group(&name) {
                    end(&half_made);
                }
                Err(Reason::LimitNotEnforceable { what: error.what(), why: chain(&error) })
            }
        }
    }

    /// Sets other limits on the group of a run. What cannot be enforced here stays so. Blocking.
    pub fn resize(&self, alloc: AllocId, attempt: u32, resources: &Resources) -> Result<(), Reason> {
        let Some(group) = self.group(alloc, attempt) else { return Ok(()) };
        let limits = limits_of(&self.unenforced(), resources);
        group.resize(&limits).map_err(|error| Reason::LimitNotEnforceable { what: error.what(), why: chain(&error) })
    }

    /// The group of an attempt, if it exists.
    pub fn group(&self, alloc: AllocId, attempt: u32) -> Option<Arc<Group>> {
        self.root.as_ref().ok()?.open_group(&group_name(alloc, attempt)).map(Arc::new)
    }

    /// Kills and removes every group but that of the newest attempt of each allocation in `keep`. Blocking.
    pub fn sweep(&self, allocs_dir: &Path, keep: &BTreeSet<AllocId>) {
        let Ok(root) = &self.root else { return };
        let newest = |id: &AllocId| Some(group_name(*id, *segments::attempts(&alloc_dir(allocs_dir, *id)).ok()?.last()?));
        for name in root.sweep(&keep.iter().filter_map(newest).collect()) {
            tracing::warn!(cgroup = name, "removed a leaked cgroup and what was in it");
        }
    }

    /// Kills and removes every group, then the owner directory. Blocking.
    pub fn remove_all(&self, owner: &str) {
        let Ok(root) = &self.root else { return };
        root.sweep(&BTreeSet::new());
        // Opened anew: removing takes the value, and ours is shared.
        let removed = CgroupRoot::open(owner).map_err(|e| chain(&e)).and_then(|root| root.remove().map_err(|e| e.to_string()));
        if let Err(error) = removed {
            tracing::warn!(owner, error, "failed to remove the cgroup directory");
        }
    }
}

/// Those of the limits that can be set here.
fn limits_of(unenforced: &[String], resources: &Resources) -> Limits {
    let can = |kind: &str| !unenforced.iter().any(|u| u.starts_with(kind));
    let Resources { cpu, memory_request, memory_limit, pids } = resources;
    Limits {
        cpu_millicores: can("cpu").then_some(cpu.0),
        memory_limit: can("memory").then_some(memory_limit.0),
        memory_request: can("memory").then_some(memory_request.0),
        pids: can("pids").then_some(*pids),
    }
}

fn group_name(alloc: AllocId, attempt: u32) -> String {
    format!("{alloc}.{attempt}")
}

/// Kills what is in a group and removes it. Blocking.
pub fn end(group: &Group) {
    if !group.kill_all() {
        tracing::error!("processes of a cgroup outlive SIGKILL");
    }
    if let Err(error) = group.delete() {
        tracing::warn!(%error, "failed to remove a cgroup; it is swept at the next start");
    }
}
