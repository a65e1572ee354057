//! One live process run: its supervisor's pidfd, its group, its directory.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use optimus_common::env::Env;
use optimus_common::reason::{Exit, Reason};
use optimus_common::time::{Span, Timestamp};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::seam::{ExitFacts, Group, Supervised, Supervisor, Unenforced};
use crate::driver::{Boxed, Ended, Run, RunError, Stats};

pub(super) struct ProcessRun {
    env: Env,
    supervisor: Arc<dyn Supervisor>,
    /// Unset: this host has no cgroups we may use, and the start was allowed without.
    group: Option<Arc<dyn Group>>,
    run_dir: PathBuf,
    attempt: u32,
    pid: u32,
    started_at: Timestamp,
    /// On our monotonic clock.
    started: Duration,
    unenforced: Vec<Unenforced>,
    pidfd: AsyncFd<OwnedFd>,
}

impl ProcessRun {
    pub(super) fn new(
        env: Env,
        supervisor: Arc<dyn Supervisor>,
        group: Option<Arc<dyn Group>>,
        run_dir: PathBuf,
        attempt: u32,
        supervised: Supervised,
        unenforced: Vec<Unenforced>,
    ) -> io::Result<Self> {
        let Supervised { supervisor: pidfd, pid, started_at, up } = supervised;
        let started = env.clock.monotonic().saturating_sub(up);
        let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE)?;
        Ok(ProcessRun { env, supervisor, group, run_dir, attempt, pid, started_at, started, unenforced, pidfd })
    }

    /// The supervisor has exited: whatever is left of the run goes too, then the end is read. Repeatable.
    async fn collect(&self) -> Ended {
        // A supervisor we started is our child; nobody else waits for it. One of an earlier agent is not: no error then.
        let _ = rustix::process::waitid(rustix::process::WaitId::PidFd(self.pidfd.as_fd()), rustix::process::WaitIdOptions::EXITED);
        let (supervisor, group, run_dir) = (Arc::clone(&self.supervisor), self.group.clone(), self.run_dir.clone());
        let ended = tokio::task::spawn_blocking(move || end_of(&*supervisor, group.as_deref(), &run_dir, None)).await;
        ended.unwrap_or_else(|error| Ended { reason: Reason::ExitUnknown { what: format!("reading its end failed: {error}") } })
    }
}

/// How the run in a directory ended; kills what is left of it first. `lost` says more of a missing record. Blocking.
pub(super) fn end_of(supervisor: &dyn Supervisor, group: Option<&dyn Group>, run_dir: &Path, lost: Option<String>) -> Ended {
    if let Some(Err(error)) = group.map(|g| if g.pids().is_empty() { Ok(()) } else { g.kill() }) {
        tracing::error!(run_dir = %run_dir.display(), %error, "failed to kill what is left of a run");
    }
    let reason = match supervisor.exit(run_dir) {
        Ok(Some(ExitFacts { code, signal, at, ran_for })) => {
            let oom = group.and_then(Group::oom);
            let exit = Exit { code, signal, oom, at, ran_for };
            match oom {
                // A child of it may have been killed and the exit be its own choice: then it is told with the exit only.
                Some(oom) if code != Some(0) => Reason::OutOfMemory { exit, oom },
                _ => Reason::Exited { exit },
            }
        }
        Ok(None) => Reason::ExitUnknown { what: lost.unwrap_or_else(|| "its supervisor was killed".to_owned()) },
        Err(error) => Reason::ExitUnknown { what: format!("its exit record cannot be read: {error}") },
    };
    Ended { reason }
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
        self.unenforced.iter().map(ToString::to_string).collect()
    }
    fn wait(&self) -> Boxed<'_, Ended> {
        Box::pin(async {
            // The guard is not cleared: once readable, a pidfd stays so. An error means no more events: look at once.
            drop(self.pidfd.readable().await);
            self.collect().await
        })
    }
    fn stop(&self, signal: i32, grace: Span) -> Boxed<'_, Result<(), RunError>> {
        let asked = self.supervisor.stop(&self.run_dir, signal, grace);
        Box::pin(async move { asked.await.map_err(|source| RunError { step: "ask the supervisor to stop it", source }) })
    }
    fn kill(&self) -> Boxed<'_, Result<(), RunError>> {
        Box::pin(async {
            // First the supervisor's own way, which still gives an exit record.
            let asked = self.supervisor.stop(&self.run_dir, libc::SIGKILL, Span(0)).await;
            let Some(group) = self.group.clone() else {
                return asked.map_err(|source| RunError { step: "ask the supervisor to kill it", source });
            };
            let killed = tokio::task::spawn_blocking(move || group.kill()).await.unwrap_or_else(|e| Err(io::Error::other(e)));
            killed.map_err(|source| RunError { step: "kill its group", source })
        })
    }
    fn pids(&self) -> Vec<u32> {
        self.group.as_ref().map_or_else(|| vec![self.pid], |g| g.pids())
    }
    fn stats(&self) -> Result<Stats, RunError> {
        let failed = |source| RunError { step: "read its use of resources", source };
        self.group.as_ref().ok_or_else(|| failed(io::ErrorKind::Unsupported.into()))?.stats().map_err(failed)
    }
    fn dropped_lines(&self) -> u64 {
        self.supervisor.dropped_lines(&self.run_dir)
    }
}
