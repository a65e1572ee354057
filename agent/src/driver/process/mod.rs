//! The process driver: a plain process in its own cgroup, supervised by a runner that outlives the agent.
//!
//! [`prepare`] finds out and makes what a start needs, [`limits`] makes the group, [`supervisor`] starts the runner and
//! finds it again, [`run`] is the live run. One run directory and one group for each attempt:
//! `<data>/allocs/<alloc>/<attempt>/` and `<owner>/<alloc>.<attempt>`.

pub mod limits;
pub mod prepare;
mod run;
pub mod supervisor;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use optimus_common::AllocId;
use optimus_common::env::Env;
use optimus_common::reason::Reason;
use optimus_common::spec::Resources;
use optimus_runner::{StartFile, User as RunnerUser};

use self::limits::{Enforced, Enforcer};
use self::prepare::Prepared;
use self::run::{ProcessRun, off_thread};
use self::supervisor::{Found, Supervised};
use super::{Boxed, Driver, Ended, Fingerprint, Recovered, Run, StartError, StartRequest};
use crate::alloc::worker::alloc_dir;
use crate::devices::Devices;
use crate::isolation::Group;
use crate::logs::{retention, segments};

/// Segments the output of one attempt is kept in; the oldest goes when a new one is begun.
const LOG_SEGMENTS: u32 = 4;
/// File creation mask of workloads.
const UMASK: u32 = 0o022;

/// What the driver is told of its node.
#[derive(Debug, Clone)]
pub struct ProcessConfig {
    /// The `optimus-runner` binary.
    pub runner: PathBuf,
    /// Holds `<alloc>/<attempt>/`; an absolute path.
    pub allocs_dir: PathBuf,
    pub allow_unenforced: bool,
    /// User of workloads that name none; unset: the agent's own.
    pub workload_user: Option<String>,
    /// The node's name, for `OPTIMUS_NODE`.
    pub node: String,
    /// Cgroup directory that holds the groups.
    pub cgroup_owner: String,
    /// What the node offers.
    pub devices: Devices,
    /// Holds the volumes; an absolute path.
    pub volumes_dir: PathBuf,
}

/// Runs processes. Cheap to clone.
#[derive(Clone)]
pub struct ProcessDriver {
    config: Arc<ProcessConfig>,
    enforcer: Arc<Enforcer>,
    env: Env,
}

impl ProcessDriver {
    /// Opens the cgroups of this owner. Without any, starts are refused (or allowed, and said so).
    pub fn new(config: ProcessConfig, env: Env) -> Self {
        let enforcer = Arc::new(Enforcer::open(&config.cgroup_owner, config.allow_unenforced));
        ProcessDriver { config: Arc::new(config), enforcer, env }
    }

    /// `v1`, `v2`, `hybrid` or `none`.
    pub fn cgroup(&self) -> &'static str {
        self.enforcer.version()
    }

    /// Kills and removes everything of this driver, the cgroup directory too.
    pub async fn remove_all(&self) {
        let (enforcer, owner) = (Arc::clone(&self.enforcer), self.config.cgroup_owner.clone());
        self.blocking(move || enforcer.remove_all(&owner)).await;
    }

    async fn blocking(&self, work: impl FnOnce() + Send + 'static) {
        if let Err(error) = tokio::task::spawn_blocking(work).await {
            tracing::error!(%error, "a step of the process driver failed");
        }
    }

    fn run_dir(&self, alloc: AllocId, attempt: u32) -> PathBuf {
        alloc_dir(&self.config.allocs_dir, alloc).join(attempt.to_string())
    }

    fn live(&self, alloc: AllocId, attempt: u32, supervised: Supervised, enforced: Enforced) -> io::Result<Arc<dyn Run>> {
        let Enforced { group, unenforced } = enforced;
        let run = ProcessRun::new(self.env.clone(), group, self.run_dir(alloc, attempt), attempt, supervised, unenforced)?;
        Ok(Arc::new(run))
    }

    async fn start_run(self, request: StartRequest) -> Result<Arc<dyn Run>, StartError> {
        let (this, alloc, attempt) = (self.clone(), request.alloc.id, request.attempt);
        let started = tokio::task::spawn_blocking(move || this.start_blocking(&request)).await;
        let (supervised, enforced) = match started {
            Ok(started) => started?,
            // The runtime ends and with it the agent: that is no failed start, and nobody is there to be told.
            Err(cut_off) if cut_off.is_cancelled() => std::future::pending().await,
            Err(panicked) => return Err(StartError::step("start the process", panicked)),
        };
        let group = enforced.group.clone();
        self.live(alloc, attempt, supervised, enforced).map_err(|error| {
            // Not watched, so not kept.
            if let Some(group) = group {
                group.kill_all();
            }
            StartError::step("watch the process", error)
        })
    }

    fn start_blocking(&self, request: &StartRequest) -> Result<(Supervised, Enforced), StartError> {
        let StartRequest { alloc, spec, attempt } = request;
        let run_dir = self.run_dir(alloc.id, *attempt);
        let fresh = !run_dir.exists();
        let started = prepare::prepare(request, &self.config).and_then(|prepared| {
            let mut enforced = self.enforcer.create(alloc.id, *attempt, &spec.resources, &prepared.kept_from).map_err(StartError::here)?;
            enforced.unenforced.extend(prepared.unmounted.iter().cloned());
            let start = start_file(request, &prepared, enforced.group.as_deref());
            match supervisor::launch(&self.config.runner, &prepared.run_dir, &start) {
                Ok(supervised) => Ok((supervised, enforced)),
                Err(error) => {
                    enforced.group.iter().for_each(|g| limits::end(g));
                    Err(error)
                }
            }
        });
        if started.is_err() && fresh {
            // Nothing ran in it: it must not be found as a run that was lost.
            match fs::remove_dir_all(&run_dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(alloc = %alloc.id, attempt, %error, "failed to remove the directory of a failed start");
                }
                _ => {}
            }
        }
        started
    }

    /// The newest attempt that has something to tell, and the newest of all. Blocking.
    fn look_back(&self, alloc: AllocId) -> Option<(u32, u32, Found)> {
        let dir = alloc_dir(&self.config.allocs_dir, alloc);
        let attempts = segments::attempts(&dir).unwrap_or_default();
        let newest = attempts.last().copied()?;
        for attempt in attempts.into_iter().rev() {
            let found = supervisor::find(&dir.join(attempt.to_string()));
            if !matches!(found, Found::Alive(_)) {
                // Whatever an ended, lost or interrupted run left.
                if let Some(group) = self.enforcer.group(alloc, attempt) {
                    limits::end(&group);
                }
            }
            if !matches!(found, Found::Nothing) {
                return Some((attempt, newest, found));
            }
        }
        None
    }

    async fn recover_run(self, alloc: AllocId) -> Option<Recovered> {
        let this = self.clone();
        let found = off_thread(move || Ok(this.look_back(alloc))).await;
        let (attempt, newest, found) = match found {
            Ok(found) => found?,
            Err(error) => {
                tracing::error!(%alloc, %error, "failed to look for its runs");
                return None;
            }
        };
        let reason = match found {
            Found::Alive(supervised) => {
                let group = self.enforcer.group(alloc, attempt);
                let enforced = Enforced { group, unenforced: self.enforcer.unenforced() };
                match self.live(alloc, attempt, supervised, enforced) {
                    Ok(run) => return Some(Recovered::Alive(run)),
                    Err(error) => {
                        self.reap_run(alloc, attempt).await;
                        Reason::ExitUnknown { what: format!("it could not be watched any more: {error}") }
                    }
                }
            }
            Found::Ended(exit) => supervisor::reason(exit),
            Found::Lost(what) => Reason::ExitUnknown { what },
            Found::Nothing => return None,
        };
        Some(Recovered::Ended { attempt, newest, ended: Ended { reason } })
    }

    async fn reap_run(&self, alloc: AllocId, attempt: u32) {
        let (this, run_dir) = (self.clone(), self.run_dir(alloc, attempt));
        self.blocking(move || {
            if let Found::Alive(supervised) = supervisor::find(&run_dir) {
                use std::os::fd::AsFd;
                supervisor::kill_runner(supervised.pidfd.as_fd());
                supervisor::reap(supervised.pidfd.as_fd());
            }
            if let Some(group) = this.enforcer.group(alloc, attempt) {
                limits::end(&group);
            }
        })
        .await;
    }
}

fn start_file(request: &StartRequest, prepared: &Prepared, group: Option<&Group>) -> StartFile {
    let StartRequest { alloc, spec, attempt } = request;
    let Prepared { run_dir: _, argv, dir, env, kept_from: _, binds, unmounted: _, user } = prepared;
    let budget = retention::attempt_budget(spec.logs.size);
    StartFile {
        alloc: alloc.id.to_string(),
        attempt: *attempt,
        argv: argv.clone(),
        env: env.iter().map(|(k, v)| (k.clone(), v.clone())).collect(),
        cwd: dir.display().to_string(),
        user: user.as_ref().map(|u| RunnerUser { uid: u.uid, gid: u.gid, groups: u.groups.clone() }),
        cgroup_procs: group.map_or_else(Vec::new, Group::procs_files),
        cgroup_kill: group.and_then(Group::kill_file),
        cgroup_freezer: group.and_then(Group::freezer_file),
        oom_file: group.and_then(Group::oom_file),
        peak_file: group.and_then(Group::peak_file),
        memory_limit: group.map(|_| spec.resources.memory_limit.0),
        log_segment: budget.0 / u64::from(LOG_SEGMENTS),
        log_segments: LOG_SEGMENTS,
        nofile: None,
        umask: UMASK,
        binds: binds.clone(),
    }
}

fn remove_tmp(run_dir: &Path) {
    match fs::remove_dir_all(run_dir.join("tmp")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(run_dir = %run_dir.display(), %error, "failed to remove the private tmp");
        }
        _ => {}
    }
}

impl Driver for ProcessDriver {
    fn name(&self) -> &'static str {
        "process"
    }
    fn fingerprint(&self) -> Fingerprint {
        Fingerprint { name: "process", usable: true, unenforced: self.enforcer.unenforced() }
    }
    fn start(&self, request: StartRequest) -> Boxed<'static, Result<Arc<dyn Run>, StartError>> {
        Box::pin(self.clone().start_run(request))
    }
    fn recover(&self, alloc: AllocId) -> Boxed<'static, Option<Recovered>> {
        Box::pin(self.clone().recover_run(alloc))
    }
    fn reap(&self, alloc: AllocId, attempt: u32) -> Boxed<'static, ()> {
        let this = self.clone();
        Box::pin(async move { this.reap_run(alloc, attempt).await })
    }
    fn sweep(&self, keep: BTreeSet<AllocId>) -> Boxed<'static, ()> {
        let this = self.clone();
        let (enforcer, allocs_dir) = (Arc::clone(&self.enforcer), self.config.allocs_dir.clone());
        Box::pin(async move { this.blocking(move || enforcer.sweep(&allocs_dir, &keep)).await })
    }
    fn resize(&self, alloc: AllocId, attempt: u32, resources: Resources) -> Boxed<'static, Result<(), Reason>> {
        let enforcer = Arc::clone(&self.enforcer);
        Box::pin(async move {
            let done = tokio::task::spawn_blocking(move || enforcer.resize(alloc, attempt, &resources)).await;
            done.unwrap_or_else(|error| Err(Reason::LimitNotEnforceable { what: "limits".into(), why: error.to_string() }))
        })
    }
    fn clean_up(&self, alloc: AllocId, attempt: u32) -> Boxed<'static, ()> {
        let (this, run_dir) = (self.clone(), self.run_dir(alloc, attempt));
        Box::pin(async move {
            let enforcer = Arc::clone(&this.enforcer);
            this.blocking(move || {
                if let Some(group) = enforcer.group(alloc, attempt) {
                    limits::end(&group);
                }
                remove_tmp(&run_dir);
            })
            .await;
        })
    }
}
