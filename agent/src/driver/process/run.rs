//! One live process run: its runner's pidfd, its group, its directory.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use optimus_common::env::Env;
use optimus_common::reason::Reason;
use optimus_common::time::{Span, Timestamp};
use optimus_common::units::Bytes;
use optimus_runner::{ExitRecord, Request};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::supervisor::{self, Supervised};
use crate::driver::{Boxed, Ended, Run, RunError, Stats};
use crate::isolation::Group;
use crate::metrics::group::GroupFiles;

pub(super) struct ProcessRun {
    env: Env,
    /// Unset: this host has no cgroups for us, and the start was allowed without.
    group: Option<Arc<Group>>,
    run_dir: PathBuf,
    attempt: u32,
    pid: u32,
    started_at: Timestamp,
    /// On our monotonic clock.
    started: Duration,
    unenforced: Vec<String>,
    pidfd: AsyncFd<OwnedFd>,
}

impl ProcessRun {
    pub(super) fn new(
        env: Env,
        group: Option<Arc<Group>>,
        run_dir: PathBuf,
        attempt: u32,
        supervised: Supervised,
        unenforced: Vec<String>,
    ) -> io::Result<Self> {
        let Supervised { pidfd, pid, started_at, up } = supervised;
        let started = env.clock.monotonic().saturating_sub(up);
        // SAFETY: the `OwnedFd` is moved in, keeps its number, and is closed by nobody else.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }.map_err(io::Error::from)?;
        Ok(ProcessRun { env, group, run_dir, attempt, pid, started_at, started, unenforced, pidfd })
    }

    /// The runner has exited: reads how the run ended, after killing what a killed runner left. Repeatable.
    async fn collect(&self) -> Ended {
        supervisor::reap(self.pidfd.as_fd());
        let (group, run_dir) = (self.group.clone(), self.run_dir.clone());
        let read = off_thread(move || {
            let exit = ExitRecord::read(&run_dir);
            if !matches!(exit, Ok(Some(_)))
                && let Some(group) = group
            {
                group.kill_all();
            }
            exit
        });
        let reason = match read.await {
            Ok(Some(exit)) => supervisor::reason(exit),
            Ok(None) => Reason::ExitUnknown { what: "its supervisor was killed".to_owned() },
            Err(error) => Reason::ExitUnknown { what: format!("its exit record cannot be read: {error}") },
        };
        Ended { reason }
    }

    async fn ask(&self, request: Request) -> io::Result<()> {
        let run_dir = self.run_dir.clone();
        off_thread(move || supervisor::ask(&run_dir, request)).await
    }
}

pub(super) async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        // The runtime ends and the agent with it: this says nothing of the run, and nobody is there to be told.
        Err(cut_off) if cut_off.is_cancelled() => std::future::pending().await,
        Err(panicked) => Err(io::Error::other(panicked)),
    }
}

impl Run for ProcessRun {
    fn attempt(&self) -> u32 {
        self.attempt
    }
    fn pid(&self) -> u32 {
        self.pid
    }
    fn started_at(&self) -> Timestamp {
        self.started_at
    }
    fn up(&self) -> Duration {
        self.env.clock.monotonic().saturating_sub(self.started)
    }
    fn unenforced(&self) -> Vec<String> {
        self.unenforced.clone()
    }
    fn wait(&self) -> Boxed<'_, Ended> {
        Box::pin(async {
            // The readiness is not cleared: a pidfd stays readable. An error means that no event will come: look at once.
            drop(self.pidfd.readable().await);
            self.collect().await
        })
    }
    fn stop(&self, signal: i32, grace: Span) -> Boxed<'_, Result<(), RunError>> {
        Box::pin(async move {
            let asked = self.ask(Request::Stop { signal, grace_ms: grace.0 }).await;
            asked.map_err(|source| RunError { step: "ask the runner to stop it", source })
        })
    }
    fn kill(&self) -> Boxed<'_, Result<(), RunError>> {
        Box::pin(async {
            // The runner's own way still gives an exit record.
            if let Err(error) = self.ask(Request::Kill).await {
                tracing::warn!(%error, run_dir = %self.run_dir.display(), "the runner does not answer: killing it too");
                supervisor::kill_runner(self.pidfd.as_fd());
            }
            let Some(group) = self.group.clone() else { return Ok(()) };
            let failed = |source| RunError { step: "kill its processes", source };
            match off_thread(move || Ok(group.kill_all())).await.map_err(failed)? {
                true => Ok(()),
                false => Err(failed(io::Error::other("some outlive SIGKILL"))),
            }
        })
    }
    fn pids(&self) -> Vec<u32> {
        self.group.as_ref().map_or_else(|| vec![self.pid], |g| g.pids())
    }
    fn stats(&self) -> Result<Stats, RunError> {
        let failed = |source| RunError { step: "read its use of resources", source };
        let usage = self.group.as_ref().ok_or_else(|| failed(io::ErrorKind::Unsupported.into()))?.usage().map_err(failed)?;
        Ok(Stats {
            cpu: Duration::from_micros(usage.cpu_usec),
            memory: Bytes(usage.memory_current),
            memory_peak: Bytes(usage.memory_peak),
            processes: u32::try_from(usage.pids).unwrap_or(u32::MAX),
        })
    }
    fn group_files(&self) -> Option<GroupFiles> {
        self.group.as_ref().map(|g| g.files())
    }
    fn dropped_lines(&self) -> u64 {
        supervisor::dropped_lines(&self.run_dir).unwrap_or(0)
    }
}
