//! The settings of a node. All servers of a cluster should use the same timers.

use std::time::Duration;

use openraft::{AsyncRuntime, Config, SnapshotPolicy};

use super::clock::SCALE_MAX;
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
    /// Shortest silence of the leader before a server stands for election, on a fast disk: on a slow one both timeouts
    /// grow, to ten times the p99 of this server's flushes and eight times these values at most (`clock.rs`).
    pub election_min: Duration,
    /// Longest such silence; each server draws between the two, anew for every term.
    pub election_max: Duration,
    /// Entries after which a snapshot is taken.
    pub snapshot_every: u64,
    /// Entries kept behind a snapshot, so that a peer that was away briefly needs no snapshot.
    pub keep_logs: u64,
    /// Longest time without progress in sending a snapshot to one peer; covers its installation there.
    pub snapshot_ttl: Duration,
    /// Bytes of snapshots that leave this server in a second, to all peers together.
    pub snapshot_rate: u64,
    /// Proposals that may wait; beyond it [`ProposeError::Overloaded`](super::ProposeError::Overloaded).
    pub queue: usize,
    /// Longest wait of a proposal, a read or an administrative request.
    pub patience: Duration,
    /// Where disk work runs.
    pub io: IoMode,
}

impl Default for Tuning {
    /// For real disks and networks.
    ///
    /// The Raft paper (5.6) asks for broadcast time << election timeout << time between failures, and measures (9.3)
    /// that 150 to 300 ms elect within a second and that a spread of 50 ms already makes split votes rare. etcd's tuning
    /// guide puts the election timeout at ten round trips at least and the heartbeat at about one round trip. Servers of
    /// one site are below 5 ms apart and one heartbeat must survive a busy machine, so: five heartbeats may be lost
    /// before anyone stands, and the disk, which is the slowest part of a round trip, is measured rather than assumed.
    /// Votes that meet do not cost a round here: in one term openraft prefers the higher server id.
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(50),
            election_min: Duration::from_millis(250),
            election_max: Duration::from_millis(400),
            snapshot_every: 10_000,
            keep_logs: 1000,
            snapshot_ttl: Duration::from_secs(60),
            snapshot_rate: 64 << 20,
            queue: 4096,
            patience: Duration::from_secs(5),
            io: IoMode::Threads,
        }
    }
}

impl Tuning {
    /// Timers for tests in one process, whose servers share the machine with many other tests.
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
        if self.heartbeat.is_zero() || self.election_min >= self.election_max {
            let (min, max) = (self.election_min, self.election_max);
            return Err(StartError::Settings(format!(
                "`heartbeat` must not be zero and `election_min` {min:?} must be below `election_max` {max:?}"
            )));
        }
        // Heartbeats and elections are driven by `election.rs`. What openraft still takes from these three are its limits
        // on a call to a peer; the real ones are shorter and follow the disk (`Clock::call_ttl`).
        let call = ms(self.election_min * SCALE_MAX / 2);
        let config = Config {
            cluster_name: "optimus".to_owned(),
            enable_heartbeat: false,
            enable_elect: false,
            heartbeat_interval: call,
            election_timeout_min: call + 1,
            election_timeout_max: call + 2,
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
