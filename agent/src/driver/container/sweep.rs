//! Removing containers: of an attempt, of the past, and those the engine could not be asked to remove.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bollard::query_parameters::{ListContainersOptionsBuilder, RemoveContainerOptionsBuilder};
use optimus_common::AllocId;

use super::create::OWNER_LABEL;
use super::engine::{CALL_MAX, EngineError};
use super::record::container_name;
use super::run::off_thread;
use super::{Shared, cgroup_owner};
use crate::alloc::worker::alloc_dir;
use crate::driver::process::limits;
use crate::logs::segments;

/// How often what is left over is tried again.
const TIDY_EVERY: Duration = Duration::from_secs(15);
/// A request that was given up may still make its container for so long.
const LATE_MAX: Duration = Duration::from_secs(60);
/// Most containers removed later; a sweep at the next start finds those beyond.
const LEFTOVERS_MAX: usize = 10_000;
/// Owner, attempt, container, and what a container may make below itself.
const DEPTH_MAX: u32 = 8;

/// What is to be removed once the engine can be asked.
#[derive(Default)]
pub(super) struct Leftovers {
    /// Containers this agent has made or taken up: a sweep of the past does not touch them.
    pub known: BTreeSet<String>,
    /// By name, since when (monotonic).
    remove: BTreeMap<String, Duration>,
    /// A sweep that found no engine, and what it was to keep.
    sweep: Option<BTreeSet<AllocId>>,
}

impl Shared {
    /// Removes a container of ours by name, whatever state it is in. One that is not there is no error; one without our
    /// label is not touched.
    pub(super) async fn remove(&self, name: &str) -> Result<(), EngineError> {
        match self.inspect(name).await {
            Ok(found) if self.is_ours(&found) => {}
            Ok(_) => return Err(EngineError::Refused { status: 409, message: format!("the container {name} is not ours") }),
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) => return Err(error),
        }
        let name = name.to_owned();
        // Its anonymous volumes too: nobody could name them any more.
        let options = RemoveContainerOptionsBuilder::default().force(true).v(true).build();
        let removed = self.engine.call(4 * CALL_MAX, |docker| async move { docker.remove_container(&name, Some(options)).await });
        match removed.await {
            Err(error) if error.is_not_found() => Ok(()),
            other => other,
        }
    }

    /// Removes what there is of an attempt but its output; later, if the engine is away.
    pub(super) async fn remove_attempt(self: &Arc<Self>, alloc: AllocId, attempt: u32) {
        let name = container_name(alloc, attempt);
        let removed = self.remove(&name).await;
        let this = Arc::clone(self);
        let ended = off_thread(move || {
            if let Some(group) = this.enforcer.group(alloc, attempt) {
                limits::end(&group);
            }
            remove_cgroup_dirs(&format!("{}/{alloc}.{attempt}", cgroup_owner(&this.config)));
            Ok(())
        });
        if let Err(error) = ended.await {
            tracing::error!(%alloc, %error, "failed to end a container's group");
        }
        match removed {
            Ok(()) => {
                self.leftovers().known.remove(&name);
            }
            Err(EngineError::Refused { status: 409, message }) => tracing::warn!(%alloc, message, "a container was not removed"),
            Err(error) => {
                tracing::warn!(%alloc, %error, "failed to remove a container; tried again later");
                let now = self.env.clock.monotonic();
                let mut leftovers = self.leftovers();
                if leftovers.remove.len() < LEFTOVERS_MAX {
                    leftovers.remove.insert(name, now);
                }
            }
        }
    }

    /// Tries again what could not be removed.
    pub(super) async fn tidy(self: &Arc<Self>) {
        loop {
            tokio::select! {
                () = self.env.clock.sleep(TIDY_EVERY) => {}
                () = self.close.cancelled() => return,
            }
            if self.engine.up().is_err() {
                continue;
            }
            let (names, sweep) = {
                let mut leftovers = self.leftovers();
                (leftovers.remove.clone(), leftovers.sweep.take())
            };
            for (name, since) in names {
                let removed = self.remove(&name).await.is_ok();
                let old = self.env.clock.monotonic().saturating_sub(since) > LATE_MAX;
                if removed && old {
                    self.leftovers().remove.remove(&name);
                }
            }
            if let Some(keep) = sweep {
                self.sweep(keep).await;
            }
        }
    }

    /// Removes containers of ours that belong to no allocation in `keep`, or to an attempt before its newest.
    pub(super) async fn sweep(self: &Arc<Self>, keep: BTreeSet<AllocId>) {
        let names = match self.ours().await {
            Ok(names) => names,
            Err(error) if error.is_absence() => {
                self.leftovers().sweep = Some(keep);
                return;
            }
            Err(error) => return tracing::warn!(%error, "failed to look for leaked containers"),
        };
        let allocs_dir = self.config.allocs_dir.clone();
        let newest = |id: &AllocId| {
            let attempt = *segments::attempts(&alloc_dir(&allocs_dir, *id)).ok()?.last()?;
            Some(container_name(*id, attempt))
        };
        let kept: BTreeSet<String> = keep.iter().filter_map(newest).collect();
        for name in names {
            if kept.contains(&name) || self.leftovers().known.contains(&name) {
                continue;
            }
            match self.remove(&name).await {
                Ok(()) => tracing::warn!(container = name, "removed a leaked container"),
                Err(error) => tracing::warn!(container = name, %error, "failed to remove a leaked container"),
            }
        }
    }

    /// Kills and removes groups of ours without an allocation in `keep`. Before anything is started.
    pub(super) async fn sweep_groups(self: &Arc<Self>, keep: BTreeSet<AllocId>) {
        let this = Arc::clone(self);
        let swept = off_thread(move || {
            this.enforcer.sweep(&this.config.allocs_dir, &keep);
            Ok(())
        });
        if let Err(error) = swept.await {
            tracing::error!(%error, "failed to look for leaked groups of containers");
        }
    }

    /// Names of all containers with this agent's label.
    async fn ours(&self) -> Result<Vec<String>, EngineError> {
        let filters = HashMap::from([("label".to_owned(), vec![format!("{OWNER_LABEL}={}", self.owner)])]);
        let options = ListContainersOptionsBuilder::default().all(true).filters(&filters).build();
        let found = self.engine.call(CALL_MAX, |docker| async move { docker.list_containers(Some(options)).await }).await?;
        let names = found.into_iter().filter_map(|c| Some(c.names?.first()?.trim_start_matches('/').to_owned()));
        Ok(names.collect())
    }

    pub(super) async fn remove_everything(&self) {
        match self.ours().await {
            Ok(names) => {
                for name in names {
                    if let Err(error) = self.remove(&name).await {
                        tracing::warn!(container = name, %error, "failed to remove a container");
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "failed to look for containers to remove"),
        }
    }
}

/// Removes the directories of a group, and those below, that the engine's runtime made under controllers we do not use
/// (v1). Only without processes: the kernel refuses others. Blocking.
pub(super) fn remove_cgroup_dirs(group: &str) {
    let Ok(mounts) = fs::read_dir("/sys/fs/cgroup") else { return };
    let group = Path::new(group.trim_start_matches('/'));
    if group.as_os_str().is_empty() || group.components().any(|c| !matches!(c, std::path::Component::Normal(_))) {
        return;
    }
    for mount in mounts.filter_map(Result::ok) {
        remove_tree(&mount.path().join(group), DEPTH_MAX);
    }
}

/// Every directory from the leaves up. What else is in them is the kernel's and goes with them.
fn remove_tree(dir: &Path, depth: u32) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    if depth > 0 {
        let below = entries.filter_map(Result::ok).filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
        below.for_each(|e| remove_tree(&e.path(), depth - 1));
    }
    if let Err(error) = fs::remove_dir(dir) {
        tracing::debug!(dir = %dir.display(), %error, "a directory of a container's group stays");
    }
}
