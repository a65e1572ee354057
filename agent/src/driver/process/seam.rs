//! What the process driver needs of a supervisor and of resource limits, and nothing more.
//!
//! The supervisor is the small program that is the parent of a workload, outlives the agent, writes the output and
//! the exit record. Limits are the cgroups. Both are known here only by these traits, so that every decision of the driver
//! is tested without them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use optimus_common::AllocId;
use optimus_common::reason::Oom;
use optimus_common::spec::Resources;
use optimus_common::time::{Span, Timestamp};
use optimus_common::units::Bytes;

use crate::driver::users::User;
use crate::driver::{Boxed, StartError, Stats};

/// A start with every question answered.
#[derive(Debug, Clone)]
pub struct Launch {
    /// Private to this attempt; the supervisor keeps its records, its socket and the output here.
    pub run_dir: PathBuf,
    /// Absolute path of the program.
    pub program: PathBuf,
    pub argv: Vec<String>,
    pub dir: PathBuf,
    /// The whole environment.
    pub env: BTreeMap<String, String>,
    /// Unset: the agent's own user.
    pub user: Option<User>,
    /// `cgroup.procs` files (v1: also `tasks`) the workload's process is written to before it executes.
    pub join: Vec<PathBuf>,
    /// Budget of the output of this attempt.
    pub log_size: Bytes,
}

/// A supervisor that lives.
#[derive(Debug)]
pub struct Supervised {
    /// A pidfd of the supervisor: readable once it has exited. Checked against the recorded start time and boot, so it
    /// is never that of another process.
    pub supervisor: OwnedFd,
    /// The workload's main process.
    pub pid: u32,
    pub started_at: Timestamp,
    /// On a clock that does not jump and counts suspend.
    pub up: Duration,
}

/// How the workload's main process ended, as its supervisor saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitFacts {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub at: Timestamp,
    pub ran_for: Span,
}

/// What is in a run directory.
#[derive(Debug)]
pub enum Found {
    Alive(Supervised),
    Exited(ExitFacts),
    /// There was a run; its supervisor is gone without an exit record (killed, or the host restarted).
    Lost(String),
    /// Nothing was started in it, and nothing will be: a supervisor that was about to start has been prevented.
    Nothing,
}

/// Starts supervisors and talks to them. Futures are bounded in time.
pub trait Supervisor: Send + Sync + 'static {
    /// Returns once the program has been executed or refused. On an error no process is left.
    fn launch(&self, launch: Launch) -> Boxed<'static, Result<Supervised, StartError>>;
    fn find(&self, run_dir: &Path) -> Boxed<'static, Found>;
    /// Asks for `signal`, then SIGKILL of all of it after `grace`.
    fn stop(&self, run_dir: &Path, signal: i32, grace: Span) -> Boxed<'static, io::Result<()>>;
    /// The exit record. Blocking, short.
    fn exit(&self, run_dir: &Path) -> io::Result<Option<ExitFacts>>;
    /// Lines of output lost so far. Blocking, short.
    fn dropped_lines(&self, run_dir: &Path) -> u64;
}

/// A limit that was asked for and cannot be set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unenforced {
    /// `memory`, `cpu`, `pids`.
    pub what: String,
    pub why: String,
}

impl std::fmt::Display for Unenforced {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.what, self.why)
    }
}

/// Makes and finds groups of processes with limits. All blocking, bounded.
pub trait Limits: Send + Sync + 'static {
    /// `v1`, `v2`, `hybrid` or `none`.
    fn version(&self) -> &'static str;
    /// What cannot be enforced on this host.
    fn unenforced(&self) -> Vec<Unenforced>;
    /// A group for one attempt, its limits set and read back; what could not be set is told.
    fn create(&self, alloc: AllocId, attempt: u32, resources: &Resources) -> io::Result<(Arc<dyn Group>, Vec<Unenforced>)>;
    /// The group of an attempt, if it exists.
    fn open(&self, alloc: AllocId, attempt: u32) -> Option<Arc<dyn Group>>;
    /// Kills and removes the groups of all other allocations.
    fn sweep(&self, keep: &BTreeSet<AllocId>);
    /// Kills and removes everything, the owner directory too.
    fn remove_all(&self);
}

/// The processes of one attempt. All blocking, bounded.
pub trait Group: Send + Sync + 'static {
    fn join(&self) -> Vec<PathBuf>;
    fn pids(&self) -> Vec<u32>;
    /// Kills every process until none is left, also those that fork meanwhile.
    fn kill(&self) -> io::Result<()>;
    /// Removes the group; it must be empty.
    fn remove(&self) -> io::Result<()>;
    /// Set if the kernel killed a process of it for want of memory.
    fn oom(&self) -> Option<Oom>;
    fn stats(&self) -> io::Result<Stats>;
}
