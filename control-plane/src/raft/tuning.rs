//! The settings of a node. All servers of a cluster should use the same timers.

use std::time::Duration;

use openraft::{AsyncRuntime, Config, SnapshotPolicy};

use super::error::{StartError, StoreError};
use super::runtime::{self, Runtime};

/// Where disk work runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoMode {
    /// On threads of its own, away from the runtime.
    Threads,
    /// On the runtime itself: for the simulator, whose clock a thread would escape.
    Inline,
}

impl IoMode {
    /// Runs disk work and waits for it.
    pub(crate) async fn run<T: Send + 'static>(
        self,
        work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        match self {
            Self::Inline => {
                runtime::disk_delay().await;
                work()
            }
            Self::Threads => {
                let done = tokio::task::spawn_blocking(work).await;
                done.unwrap_or_else(|e| Err(StoreError::Stopped(format!("disk work did not finish: {e}"))))
            }
        }
    }
}

/// Timers and bounds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Pause between two heartbeats of the leader. Below half of `election_min`.
    pub heartbeat: Duration,
    /// Shortest silence of the leader before a server stands for election. At least ten times a slow flush.
    pub election_min: Duration,
    /// Longest such silence; each server draws between the two.
    pub election_max: Duration,
    /// Entries after which a snapshot is taken.
    pub snapshot_every: u64,
    /// Entries kept behind a snapshot, so that a peer that was away briefly needs no snapshot.
    pub keep_logs: u64,
    /// Longest transfer of a snapshot to one peer.
    pub snapshot_ttl: Duration,
    /// Proposals that may wait; beyond it [`ProposeError::Overloaded`](super::ProposeError::Overloaded).
    pub queue: usize,
    /// Longest wait of a proposal, a read or an administrative request.
    pub patience: Duration,
    /// Where disk work runs.
    pub io: IoMode,
}

impl Default for Tuning {
    /// For real disks and networks.
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(250),
            election_min: Duration::from_millis(1000),
            election_max: Duration::from_millis(2000),
            snapshot_every: 10_000,
            keep_logs: 1000,
            snapshot_ttl: Duration::from_secs(60),
            queue: 4096,
            patience: Duration::from_secs(5),
            io: IoMode::Threads,
        }
    }
}

impl Tuning {
    /// Short timers, for tests in one process.
    pub fn fast() -> Self {
        Self {
            heartbeat: Duration::from_millis(50),
            election_min: Duration::from_millis(200),
            election_max: Duration::from_millis(400),
            ..Self::default()
        }
    }

    pub(crate) fn openraft(&self) -> Result<Config, StartError> {
        let ms = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        if self.queue == 0 || self.snapshot_every == 0 {
            return Err(StartError::Settings("`queue` and `snapshot_every` must be at least 1".to_owned()));
        }
        if self.heartbeat * 2 > self.election_min {
            let (beat, least) = (self.heartbeat, self.election_min);
            return Err(StartError::Settings(format!("`heartbeat` {beat:?} must be at most half of `election_min` {least:?}")));
        }
        let config = Config {
            cluster_name: "optimus".to_owned(),
            heartbeat_interval: ms(self.heartbeat),
            election_timeout_min: ms(self.election_min),
            election_timeout_max: ms(self.election_max),
            install_snapshot_timeout: ms(self.snapshot_ttl),
            snapshot_policy: SnapshotPolicy::LogsSinceLast(self.snapshot_every),
            max_in_snapshot_log_to_keep: self.keep_logs,
            max_payload_entries: 256,
            ..Config::default()
        };
        config.validate().map_err(|e| StartError::Settings(e.to_string()))
    }

    /// Waits for `work`, as long as the patience lasts.
    pub(crate) async fn patiently<T>(&self, work: impl Future<Output = T> + Send) -> Option<T> {
        Runtime::timeout(self.patience, work).await.ok()
    }
}
