//! Rows of jobs and their runs, of drains and of rebalancing.

use std::collections::BTreeMap;
use std::sync::Arc;

use imbl::OrdSet;
use optimus_common::protocol::Phase;
use optimus_common::{Reason, RunId, Span, Timestamp, WorkloadKey};
use serde::{Deserialize, Serialize};

use super::{Alloc, State};

/// One job. Made with its first release, gone with its workload.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct JobRow {
    /// Number of the newest run.
    pub newest: u64,
    /// Slot of the first copy of the next run: no two runs share one.
    pub next_index: u32,
    /// Release whose own run (`runs.on = "deploy"`) was started.
    #[serde(default)]
    pub ran_release: u64,
    /// Release whose schedule `next` follows.
    #[serde(default)]
    pub armed_release: u64,
    /// Every instant up to this one has been decided: none of them is ever started again.
    #[serde(default)]
    pub decided: Timestamp,
    /// The next instant of the schedule.
    #[serde(default)]
    pub next: Option<Due>,
    /// Scheduled runs that were not started, and the last of them.
    #[serde(default)]
    pub skipped: u64,
    #[serde(default)]
    pub last_skip: Option<Skip>,
}

/// An instant of a schedule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Due {
    pub at: Timestamp,
    /// The same with its zone, for people.
    pub local: String,
    /// When it starts: `at`, and the jitter.
    pub start_at: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skip {
    pub at: Timestamp,
    pub why: SkipReason,
}

/// Why an instant of a schedule had no run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SkipReason {
    /// Another run was active.
    Overlap { run: u64 },
    /// Nobody was there to start it in time, and the schedule says not to make up for it.
    Missed,
    /// A newer one made up for it.
    MadeUp,
    /// As many runs as may were waiting.
    Full,
}

/// One run of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobRun {
    pub id: RunId,
    pub job: WorkloadKey,
    /// Counts the runs of the job from 1.
    pub number: u64,
    pub trigger: Trigger,
    /// The instant of the schedule, with its zone in `local`.
    #[serde(default)]
    pub scheduled_for: Option<Timestamp>,
    #[serde(default)]
    pub local: Option<String>,
    pub release: u64,
    pub phase: RunPhase,
    /// Its copies have the slots `first_index .. first_index + copies`.
    pub first_index: u32,
    pub copies: u32,
    /// Slots whose copy is done, never to run again.
    #[serde(default)]
    pub done: OrdSet<u32>,
    /// Tries that failed, of all copies.
    #[serde(default)]
    pub failures: u32,
    /// Copies that were placed.
    #[serde(default)]
    pub attempts: u32,
    /// No copy is placed before.
    #[serde(default)]
    pub retry_at: Option<Timestamp>,
    pub created_at: Timestamp,
    /// When its turn came.
    #[serde(default)]
    pub started_at: Option<Timestamp>,
    #[serde(default)]
    pub ended_at: Option<Timestamp>,
    /// Why it failed or was cancelled, or how its last try failed.
    #[serde(default)]
    pub reason: Option<Reason>,
    /// Exit status of the last copy that ended.
    #[serde(default)]
    pub exit: Option<i32>,
    #[serde(default)]
    pub params: BTreeMap<String, String>,
    /// Dropped when it ends.
    #[serde(default)]
    pub payload: Option<Arc<Vec<u8>>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trigger {
    Schedule,
    Deploy,
    Request,
}

/// ```text
///   Waiting ──► Active ──► Succeeded (all its copies are done)
///      │           ├─────► Failed (more tries failed than may, or no room in time)
///      └───────────┴─────► Cancelled (on request, replaced by the next, its job stopped)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunPhase {
    Waiting,
    Active,
    Succeeded,
    Failed,
    Cancelled,
}

impl RunPhase {
    pub fn is_final(self) -> bool {
        !matches!(self, RunPhase::Waiting | RunPhase::Active)
    }
}

impl JobRun {
    pub fn slots(&self) -> std::ops::Range<u32> {
        self.first_index..self.first_index.saturating_add(self.copies)
    }
    /// Slots that still need a copy that ends well.
    pub fn open_slots(&self) -> impl Iterator<Item = u32> + '_ {
        self.slots().filter(|slot| !self.done.contains(slot))
    }
}

impl Alloc {
    /// It ended by itself with status 0: for a copy of a job, its work is done.
    pub fn is_complete(&self) -> bool {
        self.phase() == Phase::Stopped
            && matches!(self.status.as_ref().and_then(|s| s.reason.as_ref()), Some(Reason::Exited { exit }) if exit.code == Some(0))
    }
}

/// The id of the run of a scheduled instant: the same whoever computes it.
pub fn scheduled_run_id(job: &WorkloadKey, at: Timestamp) -> RunId {
    let hash = blake3::hash(format!("{job}\0{}", at.0).as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash.as_bytes()[..16]);
    RunId(uuid::Builder::from_custom_bytes(bytes).into_uuid())
}

/// Why and how a node is being emptied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    pub started_at: Timestamp,
    /// What is left then is stopped, whether there is room elsewhere or not.
    #[serde(default)]
    pub deadline: Option<Timestamp>,
    /// Daemons stay.
    #[serde(default)]
    pub keep_daemons: bool,
    /// Whether the node was cordoned before; cancelling leaves it as it was.
    #[serde(default)]
    pub was_cordoned: bool,
    /// When its agent held no copy any more.
    #[serde(default)]
    pub done_at: Option<Timestamp>,
}

/// How much rebalancing may move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebalanceRow {
    /// It also runs by itself.
    pub automatic: bool,
    /// Most copies moved in each interval.
    pub moves: u32,
    pub every: Span,
    /// When the interval under way began, and what was moved in it.
    #[serde(default)]
    pub since: Timestamp,
    #[serde(default)]
    pub moved: u32,
}

impl Default for RebalanceRow {
    fn default() -> Self {
        RebalanceRow { automatic: false, moves: 3, every: Span::secs(600), since: Timestamp(0), moved: 0 }
    }
}

impl super::Node {
    /// Its labels: those of operators over those of its agent.
    pub fn labels(&self) -> BTreeMap<String, String> {
        let mut labels = self.facts.labels.clone();
        labels.extend(self.labels.iter().map(|(k, v)| (k.clone(), v.clone())));
        labels
    }
    pub fn pool(&self) -> &str {
        self.pool.as_ref().or(self.facts.pool.as_ref()).map_or(super::DEFAULT_POOL, |pool| pool.as_str())
    }
    /// It is being emptied and is not empty yet.
    pub fn is_draining(&self) -> bool {
        self.drain.as_ref().is_some_and(|d| d.done_at.is_none())
    }
}

impl State {
    pub fn job(&self, key: &WorkloadKey) -> Option<&Arc<JobRow>> {
        self.jobs.get(key)
    }
    pub fn run(&self, key: &WorkloadKey, number: u64) -> Option<&Arc<JobRun>> {
        self.runs.get(&(key.clone(), number))
    }
    /// The runs kept of a job, oldest first.
    pub fn runs_of<'a>(&'a self, key: &WorkloadKey) -> impl DoubleEndedIterator<Item = &'a Arc<JobRun>> + 'a {
        self.runs.range((key.clone(), 0)..=(key.clone(), u64::MAX)).map(|(_, run)| run)
    }
    /// Runs of a job that wait or are active, oldest first.
    pub fn live_runs<'a>(&'a self, key: &WorkloadKey) -> impl DoubleEndedIterator<Item = &'a Arc<JobRun>> + 'a {
        self.indexes.live_runs.range((key.clone(), 0)..=(key.clone(), u64::MAX)).filter_map(|row| self.runs.get(row))
    }
    /// The run a copy in this slot of a job belongs to.
    pub fn run_of_slot<'a>(&'a self, key: &WorkloadKey, index: u32) -> Option<&'a Arc<JobRun>> {
        self.runs_of(key).rev().find(|r| r.slots().contains(&index))
    }
}
