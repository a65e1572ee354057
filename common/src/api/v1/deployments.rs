//! Deployments, plans of them, and the endpoints they move traffic between.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ReasonView;
use crate::ids::{AllocId, DeploymentId, NodeId, WorkloadKey};
use crate::spec::ProjectSpec;
use crate::time::{Span, Timestamp};

/// Where a deployment stands. It goes forward in this order, but for what its strategy has no use for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeploymentPhase {
    /// Looks whether it can succeed, waits for what it comes after, runs its release command. Nothing was touched yet.
    Preparing,
    /// Waits for room for a copy.
    #[serde(alias = "running")]
    Placing,
    /// Copies start.
    Starting,
    /// Copies run and have to prove that they are well.
    Health,
    /// The share of the traffic moves.
    Shifting,
    /// It has its share of the traffic and must go on well for a while.
    Baking,
    /// Waits for promotion, or takes over from the release before.
    Promoting,
    #[serde(rename = "done", alias = "succeeded")]
    Succeeded,
    /// Failed and left as it is.
    Failed,
    /// Failed or called off; going back to the release before.
    RollingBack,
    /// The release before runs again.
    RolledBack,
    Superseded,
    Cancelled,
}

impl DeploymentPhase {
    /// No further change will come.
    pub fn is_final(self) -> bool {
        use DeploymentPhase::*;
        matches!(self, Succeeded | Failed | RolledBack | Superseded | Cancelled)
    }

    /// On its way to the new release.
    pub fn is_forward(self) -> bool {
        !self.is_final() && self != DeploymentPhase::RollingBack
    }

    /// As people read it: `rolling back`.
    pub fn word(self) -> &'static str {
        use DeploymentPhase::*;
        match self {
            Preparing => "preparing",
            Placing => "placing",
            Starting => "starting",
            Health => "health",
            Shifting => "shifting",
            Baking => "baking",
            Promoting => "promoting",
            Succeeded => "done",
            Failed => "failed",
            RollingBack => "rolling back",
            RolledBack => "rolled back",
            Superseded => "superseded",
            Cancelled => "cancelled",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Deployment {
    pub id: DeploymentId,
    #[serde(flatten)]
    pub key: WorkloadKey,
    pub release: u64,
    /// The release that ran before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_release: Option<u64>,
    pub phase: DeploymentPhase,
    /// Since when it is in this phase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// Copies of the new release that are ready / that are wanted.
    pub ready: u32,
    pub wanted: u32,
    pub created_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// It fails at this time unless there is progress before; while it bakes, the time it is through with that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_at: Option<Timestamp>,
    /// Why it failed, or what it waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<ReasonView>,
    /// `deploy`, `restart`, `scale`, `retry`, `rollback`.
    pub trigger: String,
    /// `rolling`, `blue-green`, `canary`.
    #[serde(default)]
    pub strategy: String,
    /// Percent of the traffic the new release has; unset: what its copies make of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// The steps of a canary.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<DeploymentStepView>,
    /// Somebody paused it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// It was promoted, or needs no promotion.
    #[serde(default)]
    pub promoted: bool,
    /// The copy that runs, or ran, its release command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release_step: Option<AllocId>,
    /// What routers counted since its present step began, on both sides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic: Option<TrafficView>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TrafficView {
    pub new: TrafficSide,
    pub old: TrafficSide,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TrafficSide {
    pub requests: u64,
    /// Of them, answered by a fault of the server or not at all.
    pub errors: u64,
}

impl Deployment {
    /// Nothing more happens by itself: it has ended, or waits for a person.
    pub fn is_at_rest(&self) -> bool {
        self.phase.is_final() || self.paused || self.awaits_promotion()
    }

    /// It proved itself and waits for somebody to promote it.
    pub fn awaits_promotion(&self) -> bool {
        self.phase == DeploymentPhase::Promoting && !self.promoted
    }
}

/// One step of a canary.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DeploymentStepView {
    pub weight: u32,
    pub bake: Span,
    /// `waiting`, `current`, `done`.
    pub status: String,
}

/// `POST /v1/plan`: what a deploy would do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlanAnswer {
    /// State index it was made from.
    pub index: u64,
    /// Names the plan: a deploy with it as `if_plan` does the same, or is refused.
    pub digest: String,
    /// It was not played through to its end.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cut_short: bool,
    pub workloads: Vec<PlannedWorkload>,
    /// What was planned, so that the plan can be deployed without the file.
    pub spec: ProjectSpec,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlannedWorkload {
    #[serde(flatten)]
    pub key: WorkloadKey,
    /// `create`, `update`, `in_place`, `unchanged`.
    pub action: String,
    /// The release that would run.
    pub release: u64,
    /// State index of the workload's last change; unset: it would be new.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<u64>,
    pub strategy: String,
    pub changes: Vec<SpecChange>,
    /// How many copies would come, go, and change as they run.
    pub placed: u32,
    pub stopped: u32,
    pub in_place: u32,
    /// In their order; at most 1000.
    pub moves: Vec<PlannedMove>,
    /// What it would wait for before anything is touched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waits: Option<ReasonView>,
    /// Copies that would find no room, and why.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unplaced: Vec<String>,
}

/// A field of a spec that would be another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SpecChange {
    /// `update.parallel`
    pub field: String,
    /// As JSON; unset: it was not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
}

/// A copy that would come, go, or change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlannedMove {
    /// `web-0`
    pub copy: String,
    /// `place`, `stop`, `in_place`, `release_command`.
    pub action: String,
    pub release: u64,
    pub node: NodeId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// `POST .../workloads/{name}:promote`, `:pause`, `:resume`, `:abort`, `:retry`, `:rollback`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SteerRequest {
    /// Why, for those who look at it later: one line of at most 500 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Of a rollback: the release to go back to. Unset: the one that ran before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<u64>,
}

/// `GET /v1/endpoints`: where the copies of a workload are reached, for routers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EndpointSet {
    #[serde(flatten)]
    pub key: WorkloadKey,
    /// State index at which it last changed.
    pub generation: u64,
    pub endpoints: Vec<Endpoint>,
}

/// One copy that requests may be sent to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Endpoint {
    pub alloc: AllocId,
    /// `web-0`
    pub name: String,
    pub release: u64,
    pub address: String,
    /// Host port of each port of the spec.
    pub ports: BTreeMap<String, u16>,
    /// Its share among those of the set; 0: nothing for now.
    pub weight: u32,
}

/// `POST /v1/endpoints/acks`: a router has taken on all endpoints up to a generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EndpointAck {
    /// Names the router among all: 1 to 100 bytes.
    pub router: String,
    /// The `index` of the answer it took the endpoints from.
    pub generation: u64,
    /// What it counted since it said so last, of each copy; at most 1000.
    #[serde(default)]
    pub traffic: Vec<CopyTraffic>,
}

/// Requests a router sent to one copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CopyTraffic {
    pub alloc: AllocId,
    pub requests: u64,
    /// Of them, answered with a status of 500 or more, or not at all.
    #[serde(default)]
    pub errors: u64,
    /// Answered requests by latency, at most 32 numbers: below 1 ms, below 2 ms, below 4 ms, and so on.
    #[serde(default)]
    pub latency: Vec<u64>,
}
