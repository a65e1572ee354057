//! Jobs and their runs; what operators do with nodes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ReasonView;
use crate::ids::{AllocId, Name, NodeId, RunId, WorkloadKey};
use crate::spec::Schedule;
use crate::time::{Span, Timestamp};

/// What a run is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RunPhase {
    /// For its turn.
    Waiting,
    Active,
    Succeeded,
    Failed,
    Cancelled,
}

impl RunPhase {
    /// No further change will come.
    pub fn is_final(self) -> bool {
        !matches!(self, RunPhase::Waiting | RunPhase::Active)
    }
}

/// What started a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RunTrigger {
    Schedule,
    Deploy,
    Request,
}

/// One run of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JobRun {
    pub id: RunId,
    #[serde(flatten)]
    pub key: WorkloadKey,
    /// Counts the runs of the job from 1.
    pub number: u64,
    pub trigger: RunTrigger,
    pub phase: RunPhase,
    pub release: u64,
    /// The instant of the schedule, and the same with its zone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheduled_for: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scheduled_local: Option<String>,
    /// Names of its copies; those that are gone are left out.
    pub copies: Vec<String>,
    pub copies_wanted: u32,
    pub copies_done: u32,
    /// Copies placed, and tries that failed.
    pub attempts: u32,
    pub failures: u32,
    pub created_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// No copy is placed before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<Timestamp>,
    /// Exit status of the last copy that ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<i32>,
    /// Why it failed, waits or was cancelled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<ReasonView>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub params: BTreeMap<String, String>,
}

/// `POST .../workloads/{job}:run`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// Exactly those the job asks for; each at most 1 KiB.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub params: BTreeMap<String, String>,
    /// Base64; at most 16 KiB of bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<String>,
}

/// Answer to a request for a run, and to its cancelling.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RunAnswer {
    pub index: u64,
    pub run: JobRun,
    /// False: it was so already.
    pub changed: bool,
}

/// A job in one line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Job {
    #[serde(flatten)]
    pub key: WorkloadKey,
    pub release: u64,
    pub stopped: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<Schedule>,
    /// When the schedule starts it next, and the same with its zone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_local: Option<String>,
    pub waiting: u32,
    pub active: u32,
    /// Scheduled runs that were not started, and why the last was not.
    pub skipped: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_skip: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_run: Option<JobRun>,
}

/// How a node is being emptied.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DrainView {
    pub started_at: Timestamp,
    /// What is left then is stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
    pub keep_daemons: bool,
    /// Since when its agent holds no copy any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub done_at: Option<Timestamp>,
    /// Copies that are left, at most 100, each with why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub left: Vec<DrainLeft>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DrainLeft {
    /// `shop/prod/web-0`
    pub copy: String,
    pub why: String,
}

/// `POST /v1/nodes/{node}:drain`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    /// What is left after so long is stopped; unset: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Span>,
    /// Stops everything now, whether there is room elsewhere or not.
    #[serde(default)]
    pub force: bool,
    /// Daemons stay.
    #[serde(default)]
    pub keep_daemons: bool,
}

/// `GET /v1/nodes/{node}:preview-drain`: what a drain would do if nothing else happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DrainPreview {
    pub node: NodeId,
    pub copies: Vec<DrainFate>,
    /// Most waves any workload needs.
    pub waves: u32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DrainFate {
    /// `shop/prod/web-0`
    pub copy: String,
    /// `moves`, `waits`, `finishes`, `stops_last` or `stays`.
    pub fate: String,
    /// Name of the node it would move to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// Why it would wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<ReasonView>,
}

/// `POST /v1/nodes/{node}:label`: sets labels; null takes one away.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LabelRequest {
    pub labels: BTreeMap<String, Option<String>>,
}

/// `POST /v1/nodes/{node}:pool`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolRequest {
    /// Unset: `default`.
    pub pool: Option<Name>,
}

/// `POST /v1/rebalance`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RebalanceRequest {
    /// Only say what would move.
    #[serde(default)]
    pub dry_run: bool,
}

/// `PUT /v1/rebalance`, and part of the answer of `GET /v1/rebalance`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RebalanceSettings {
    /// It also runs by itself, once in each interval.
    pub automatic: bool,
    /// Most copies moved in each interval: 1 to 1000.
    pub moves: u32,
    /// Length of an interval: 1m to 30d.
    pub every: Span,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RebalanceAnswer {
    pub index: u64,
    /// Copies that move, or would.
    pub moves: Vec<RebalanceMove>,
    /// False: nothing was touched.
    pub changed: bool,
    pub settings: RebalanceSettings,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RebalanceMove {
    pub allocation: AllocId,
    /// `shop/prod/web-0`
    pub copy: String,
    pub from: String,
    /// Where there is room now; the scheduler has the last word.
    pub to: String,
    pub why: String,
}
