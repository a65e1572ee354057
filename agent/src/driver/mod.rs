//! What runs workloads on this host: processes, containers, and a scripted mock for tests.
//!
//! A [`Driver`] makes runs and finds those of an earlier agent again; a [`Run`] is one live run. Drivers never
//! decide: whether to start again, and when, is the allocation machine's business.

pub mod container;
pub mod environment;
pub mod mock;
pub mod process;
pub mod script;
pub mod users;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use optimus_common::AllocId;
use optimus_common::protocol::DesiredAlloc;
use optimus_common::reason::Reason;
use optimus_common::spec::{Resources, WorkloadSpec};
use optimus_common::time::{Span, Timestamp};
use optimus_common::units::Bytes;

use crate::metrics::group::GroupFiles;
pub use crate::workloads::Boxed;

/// What a driver can do here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    pub name: &'static str,
    pub usable: bool,
    /// Limits it cannot enforce on this host and why.
    pub unenforced: Vec<String>,
}

/// What to start.
#[derive(Debug, Clone)]
pub struct StartRequest {
    pub alloc: Arc<DesiredAlloc>,
    pub spec: Arc<WorkloadSpec>,
    pub attempt: u32,
}

/// Why a run could not be started. Nothing is left of the try.
#[derive(Debug, Clone, PartialEq)]
pub struct StartError {
    pub reason: Reason,
    /// No use trying again on this node with these ports.
    pub elsewhere: bool,
}

impl StartError {
    pub fn here(reason: Reason) -> Self {
        StartError { reason, elsewhere: false }
    }
    /// A step failed for a reason of the system.
    pub fn step(step: &str, error: impl std::fmt::Display) -> Self {
        StartError::here(Reason::StartFailed { step: step.to_owned(), error: error.to_string() })
    }
}

/// The end of a run: every process of it is gone.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    /// [`Reason::Exited`], [`Reason::OutOfMemory`] or [`Reason::ExitUnknown`].
    pub reason: Reason,
}

impl Ended {
    /// An out-of-memory end names the limit in force, which may be another than it was started with.
    pub fn with_limit(mut self, limit: Option<Bytes>) -> Self {
        if let (Reason::OutOfMemory { oom, exit }, Some(limit)) = (&mut self.reason, limit) {
            oom.limit = limit;
            exit.oom = Some(*oom);
        }
        self
    }

    pub fn exit(&self) -> Option<&optimus_common::reason::Exit> {
        match &self.reason {
            Reason::Exited { exit } | Reason::OutOfMemory { exit, .. } => Some(exit),
            _ => None,
        }
    }
}

/// A run of an earlier agent.
pub enum Recovered {
    /// It is up; nobody noticed the change of agents.
    Alive(Arc<dyn Run>),
    /// It ended while no agent was there, or its supervisor was lost and what was left has been killed. `newest`: a later
    /// attempt may have been cut off before anything ran; its number is not used again.
    Ended { attempt: u32, newest: u32, ended: Ended },
}

/// What a run uses now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// CPU time since the start of the run.
    pub cpu: Duration,
    pub memory: Bytes,
    pub memory_peak: Bytes,
    pub processes: u32,
}

/// How a command inside a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecOutput {
    /// Exit status.
    pub code: i64,
    /// The beginning of its output, both streams as they came; bounded by the driver.
    pub output: Vec<u8>,
}

/// Why an order to a run was not carried out.
#[derive(Debug, thiserror::Error)]
#[error("failed to {step}")]
pub struct RunError {
    pub step: &'static str,
    #[source]
    pub source: std::io::Error,
}

/// Makes runs of one kind. Object-safe; every future is bounded in time by the driver.
pub trait Driver: Send + Sync + 'static {
    fn name(&self) -> &'static str;
    fn fingerprint(&self) -> Fingerprint;
    /// Starts a run. Dropping the future may leave a half-started run behind: [`Driver::reap`] it.
    fn start(&self, request: StartRequest) -> Boxed<'static, Result<Arc<dyn Run>, StartError>>;
    /// Finds what an earlier agent started for an allocation, newest attempt; unset: nothing was ever started.
    fn recover(&self, alloc: AllocId) -> Boxed<'static, Option<Recovered>>;
    /// Kills whatever exists of an attempt whose start was given up.
    fn reap(&self, alloc: AllocId, attempt: u32) -> Boxed<'static, ()>;
    /// Kills and removes whatever exists here of allocations not in `keep`, left by a crash.
    fn sweep(&self, keep: BTreeSet<AllocId>) -> Boxed<'static, ()>;
    /// Sets other limits on a run as it is. On an error those of before are in force; the reason says what is in the way.
    fn resize(&self, alloc: AllocId, attempt: u32, resources: Resources) -> Boxed<'static, Result<(), Reason>>;
    /// Removes what is kept of an ended attempt besides its output (limits, private files).
    fn clean_up(&self, alloc: AllocId, attempt: u32) -> Boxed<'static, ()>;
}

/// One live run.
pub trait Run: Send + Sync + 'static {
    fn attempt(&self) -> u32;
    /// The workload's main process.
    fn pid(&self) -> u32;
    fn started_at(&self) -> Timestamp;
    /// How long it has been up, on a clock that does not jump.
    fn up(&self) -> Duration;
    /// Limits asked for that are not enforced.
    fn unenforced(&self) -> Vec<String>;
    /// Resolves at the end, at once if it is over. Cancel-safe, any number of waiters.
    fn wait(&self) -> Boxed<'_, Ended>;
    /// Asks it to end: `signal`, then after `grace` SIGKILL for all of it. Returns when that is under way.
    fn stop(&self, signal: i32, grace: Span) -> Boxed<'_, Result<(), RunError>>;
    /// Kills every process of it now.
    fn kill(&self) -> Boxed<'_, Result<(), RunError>>;
    /// Its processes. Blocking but short; bounded by its pids limit.
    fn pids(&self) -> Vec<u32>;
    fn stats(&self) -> Result<Stats, RunError>;
    /// Where its use of resources can be read again and again; unset when it is not to be had.
    fn group_files(&self) -> Option<GroupFiles> {
        None
    }
    /// Lines of output lost because the disk is full, so far.
    fn dropped_lines(&self) -> u64;
    /// Why nothing is known of it at the moment, or it is not as wished, though it has not ended.
    fn trouble(&self) -> Option<Reason> {
        None
    }
    /// Runs a command inside it, at most `longest`. The error is for people.
    fn exec(&self, argv: Vec<String>, longest: Duration) -> Boxed<'_, Result<ExecOutput, String>> {
        let _ = (argv, longest);
        Box::pin(async { Err("no commands can be run inside this kind of workload yet".to_owned()) })
    }
}
