//! `/v1`: what the API takes and gives. Additive only.
//!
//! Times are RFC 3339, spans `"30s"`, sizes integer bytes, cpu in cores. Lists are pages. Errors are
//! [`Problem`] (RFC 9457) with a code of [`crate::reason::CODES`].

mod operate;

pub use operate::*;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::{AllocId, ClusterId, DeploymentId, NodeId, WorkloadKey};
use crate::join_token::Role;
use crate::protocol::Phase;
use crate::reason::{Exit, Reason};
use crate::spec::{ProjectSpec, WorkloadSpec};
use crate::time::{Span, Timestamp};
use crate::units::{Bytes, Millicores};

/// One page of a collection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// Give it as `page_token` for the next page; unset on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_page_token: Option<String>,
    /// State index the page was read at.
    pub index: u64,
}

/// Default and largest page.
pub const PAGE_DEFAULT: usize = 50;
pub const PAGE_MAX: usize = 1000;

/// An error, as `application/problem+json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// URI of the kind of problem: `https://optimus.dev/errors/OPT-1104`.
    #[serde(rename = "type")]
    pub kind: String,
    pub title: String,
    pub status: u16,
    pub detail: String,
    /// Stable code; `optimus explain CODE`.
    pub code: String,
    pub request_id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Several faults of one body.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
    pub retryable: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FieldError {
    /// JSON pointer into the body.
    pub pointer: String,
    pub message: String,
}

/// A reason for people and programs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ReasonView {
    /// `OPT-2302`
    pub code: String,
    /// `out of memory`
    pub title: String,
    pub message: String,
    pub hint: String,
    pub detail: Reason,
}

impl From<&Reason> for ReasonView {
    fn from(reason: &Reason) -> Self {
        // A crash loop or a missed deadline is named by what it stands on: that is what can be mended.
        let code = reason.root().code();
        ReasonView {
            code: code.code.into(),
            title: code.title.into(),
            message: reason.to_string(),
            hint: code.about.into(),
            detail: reason.clone(),
        }
    }
}

/// `GET /v1/version` (no credential needed).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    pub version: String,
    pub api: Vec<String>,
    pub cluster: Option<ClusterId>,
}

/// `GET /v1/status`: the fleet in one answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ClusterStatus {
    pub cluster: ClusterId,
    pub index: u64,
    pub leader: Option<u64>,
    pub term: u64,
    pub servers: u32,
    pub nodes_up: u32,
    pub nodes_down: u32,
    pub workloads: u32,
    pub copies_wanted: u32,
    pub copies_ready: u32,
    /// One sentence: `all 3 copies of 1 workload are ready`.
    pub summary: String,
}

/// `POST /v1/deploy`: sets the workloads of the file to what it says and starts a deployment for each that changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DeployRequest {
    #[serde(flatten)]
    pub spec: ProjectSpec,
    /// The text it came from, kept with the release for people to read again. At most 256 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Only if no workload of the file changed after this state index (`revision`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_revision: Option<u64>,
    /// Only if it would do exactly what a plan said: the plan's `digest`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_plan: Option<String>,
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
    /// `place`, `stop`, `in_place`.
    pub action: String,
    pub release: u64,
    pub node: NodeId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DeployAnswer {
    pub deployments: Vec<Deployment>,
    /// Workloads that already were as the file says.
    pub unchanged: Vec<WorkloadKey>,
    pub index: u64,
}

/// What a workload is doing, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum WorkloadPhase {
    /// All wanted copies are ready.
    Ready,
    /// A deployment is under way.
    Deploying,
    /// Some or all copies are not ready, and no deployment is under way.
    Degraded,
    /// Stopped on request.
    Stopped,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Workload {
    #[serde(flatten)]
    pub key: WorkloadKey,
    /// Release that should run.
    pub release: u64,
    pub phase: WorkloadPhase,
    pub copies_wanted: u32,
    pub copies_ready: u32,
    pub copies_running: u32,
    pub restarts: u32,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    /// State index of the last change.
    pub revision: u64,
    pub spec: WorkloadSpec,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deployment: Option<Deployment>,
    /// Why it is not ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<ReasonView>,
    /// `http://address:port` of ready copies (first port).
    pub endpoints: Vec<String>,
}

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

/// One copy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Allocation {
    pub id: AllocId,
    #[serde(flatten)]
    pub key: WorkloadKey,
    /// `web-0`
    pub name: String,
    pub index: u32,
    pub release: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<NodeId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// Whether it should run.
    pub desired_run: bool,
    pub phase: Phase,
    pub ready: bool,
    /// Its node answers; false: what is shown is what was last seen.
    pub current: bool,
    pub restarts: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    pub ports: BTreeMap<String, u16>,
    /// `address:port` of the first port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    pub created_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<ReasonView>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_exit: Option<Exit>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unenforced: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub last_lines: Vec<String>,
}

/// `GET /v1/.../allocations/{name}:explain`: why a copy is as it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Explanation {
    /// One sentence.
    pub summary: String,
    pub allocation: Option<Allocation>,
    pub workload: Workload,
    /// What was looked at, in order, each a sentence.
    pub evidence: Vec<String>,
    /// Last events of the copy, newest last.
    pub events: Vec<Event>,
    /// The next thing to do, unless all is well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum NodePhase {
    Up,
    Down,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Node {
    pub id: NodeId,
    pub name: String,
    pub phase: NodePhase,
    pub address: String,
    pub version: String,
    pub arch: String,
    pub kernel: String,
    pub cgroup: String,
    pub unenforced: Vec<String>,
    pub drivers: Vec<String>,
    pub cpu: Millicores,
    pub cpu_reserved: Millicores,
    pub memory: Bytes,
    pub memory_reserved: Bytes,
    pub copies: u32,
    pub joined_at: Timestamp,
    pub last_seen: Timestamp,
    pub certificate_expires_at: Timestamp,
    /// How far the node's clock is ahead of the servers', in milliseconds (negative: behind). Only when it is off by more than 1 s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_skew_ms: Option<i64>,
    /// Those of operators over those of its agent.
    pub labels: BTreeMap<String, String>,
    pub pool: String,
    /// It takes no new copies.
    pub cordoned: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainView>,
}

/// Something that happened. `index` and `n` order and name it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    pub index: u64,
    pub n: u32,
    pub at: Timestamp,
    /// `deployment_started`, `copy_ready`, `copy_exited`, `node_joined`, ...
    pub kind: String,
    /// What it is about: `shop/prod/web`, `node/host-1`, ...
    pub subject: String,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<ReasonView>,
}

/// `POST .../workloads/{name}:scale`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ScaleRequest {
    pub copies: u32,
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
}

/// Answer to scale, restart, stop and remove.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ActionAnswer {
    pub index: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deployment: Option<Deployment>,
    /// False: it was so already.
    pub changed: bool,
}

/// `GET /v1/cluster/digest`: what the asked server's own state amounts to. Servers at one index have one digest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StateDigest {
    /// Raft id of the server that answers.
    pub server: u64,
    /// Log index its state has reached.
    pub index: u64,
    /// BLAKE3 of the whole state, in hex.
    pub digest: String,
}

/// `GET /v1/cluster`: the servers of the control plane.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ClusterView {
    pub cluster: ClusterId,
    /// Raft id of the leader.
    pub leader: u64,
    pub term: u64,
    /// Last entry of the leader's log.
    pub last_log: u64,
    /// Version of the commands every server understands.
    pub version: u32,
    pub servers: Vec<ServerView>,
    /// Number of the CA that signs; the first one is 0.
    #[serde(default)]
    pub ca: u32,
    /// Certificates of the CAs trusted at the moment, the one that signs first, for HTTPS clients.
    #[serde(default)]
    pub ca_pem: String,
    /// The replacement of the CA that is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotation: Option<CaRotation>,
    /// What a person should know, in sentences.
    pub warnings: Vec<String>,
}

/// A replacement of the CA that is under way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CaRotation {
    /// Number of the CA that is replaced.
    pub from: u32,
    /// Number of the new one.
    pub to: u32,
    pub phase: CaPhase,
    pub started_at: Timestamp,
    pub phase_since: Timestamp,
    /// How long the phase has lasted while the cluster had a leader.
    pub waited: Span,
    /// What is left until an announcement is given up, or the old CA is dropped without those who are away.
    pub left: Span,
    /// How long both are trusted at most once the new one signs.
    pub overlap: Span,
    /// Whom the phase waits for, in sentences.
    pub waits_for: Vec<String>,
    /// All of this in one sentence.
    pub text: String,
}

/// How far a replacement of the CA is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CaPhase {
    /// The new CA is made known; the old one signs. It can be taken back.
    Announce,
    /// The new CA signs; the old one is still trusted.
    Sign,
}

/// One server of the control plane.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ServerView {
    pub id: u64,
    pub name: String,
    /// `host:port` (UDP) for peers and agents.
    pub address: String,
    /// `host:port` of its API.
    pub api: String,
    pub version: String,
    /// Highest cluster version it understands.
    pub level: u32,
    pub role: ServerRole,
    /// Whether the leader hears it.
    pub alive: bool,
    /// Milliseconds since the leader heard it; unset: never since it leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub silent_ms: Option<u64>,
    /// Entries it is behind the leader; unset: not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub behind: Option<u64>,
    pub joined_at: Timestamp,
    /// How far its clock is ahead of the leader's, in milliseconds (negative: behind). Only when it is off by more than 1 s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_skew_ms: Option<i64>,
}

/// The part a server plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ServerRole {
    Leader,
    Voter,
    /// Receives the log and has no vote yet.
    Learner,
    /// Admitted, and not reached yet.
    Joining,
    Leaving,
}

/// `POST /v1/cluster:transfer-leader`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TransferRequest {
    /// Raft id of the server that shall lead; unset: the one that has most of the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct TransferAnswer {
    /// Raft id of the server that leads now.
    pub leader: u64,
}

/// `POST /v1/cluster:rotate-ca`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RotateCaRequest {
    /// True: the phase that the rotation under way is in waits for no node any longer.
    #[serde(default)]
    pub force: bool,
    /// True: the rotation under way is given up. Possible until the new CA signs.
    #[serde(default)]
    pub abort: bool,
    /// For a new one: how long both CAs are trusted at most, `1m` to `90d`; 7 days if unset.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlap: Option<Span>,
}

/// `POST /v1/join-tokens`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JoinTokenRequest {
    /// Default 1 h, at most 30 days.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl: Option<Span>,
    /// What its holder may become: `agent` (default) or `server`, which is handed the cluster's root key.
    #[serde(default, skip_serializing_if = "Role::is_agent")]
    pub role: Role,
    /// How many may use it; default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uses: Option<u32>,
}

/// `POST /v1/cluster/snapshot`: to whom the export is encrypted. Exactly one of the two.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotRequest {
    /// age recipients, `age1...`; at most 32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recipients: Vec<String>,
    /// At least 12 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passphrase: Option<String>,
}

impl std::fmt::Debug for SnapshotRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // A passphrase is not for logs.
        f.debug_struct("SnapshotRequest").field("recipients", &self.recipients).finish_non_exhaustive()
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JoinTokenAnswer {
    /// The copy-paste string; shown once.
    pub token: String,
    pub id: String,
    pub expires_at: Timestamp,
    pub uses: u32,
}

/// One line of `GET .../logs` (NDJSON).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LogRecord {
    pub at: Timestamp,
    /// `web-0`
    pub copy: String,
    /// `stdout` or `stderr`
    pub stream: String,
    pub text: String,
}
