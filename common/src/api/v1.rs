//! `/v1`: what the API takes and gives. Additive only.
//!
//! Times are RFC 3339, spans `"30s"`, sizes integer bytes, cpu in cores. Lists are pages. Errors are
//! [`Problem`] (RFC 9457) with a code of [`crate::reason::CODES`].

mod deployments;
mod operate;
mod placing;
mod secrets;

pub use deployments::*;
pub use operate::*;
pub use placing::*;
pub use secrets::*;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::{AllocId, ClusterId, Name, NodeId, WorkloadKey};
use crate::join_token::Role;
use crate::protocol::Phase;
use crate::reason::{Exit, Reason};
use crate::spec::{ProjectSpec, Resources, WorkloadSpec};
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
    /// The limits in force, as its agent says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Resources>,
    /// Devices it has for itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<AllocationDevice>,
    /// Volumes of its node that it uses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Name>,
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
    /// Size of the disk of its agent's data, what of it copies reserve, and what is free of it now.
    #[serde(default)]
    pub disk: Bytes,
    #[serde(default)]
    pub disk_reserved: Bytes,
    #[serde(default)]
    pub disk_free: Bytes,
    /// What is kept for the host itself: copies get the rest.
    #[serde(default)]
    pub host_reserve: NodeReserve,
    /// What its agent found out, for rules of placement.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub attributes: BTreeMap<String, String>,
    /// At most 1000.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<NodeDevice>,
    /// Volumes that live on it, `shop/prod/data`, at most 100.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<String>,
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
    /// How many copies. Unset: as many as now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copies: Option<u32>,
    /// Cores of each copy, changed as it runs; likewise the other limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Millicores>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_request: Option<Bytes>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_limit: Option<Bytes>,
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
    /// Raft id of the leader; none while no server leads. Then the servers are shown as the one that answers sees them.
    pub leader: Option<u64>,
    pub term: u64,
    /// Last entry of the leader's log, or of the server's that answers.
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

/// A code that opens one session of a browser.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LoginCodeAnswer {
    /// For the page, behind `#code=` of the console's address; shown once.
    pub code: String,
    pub expires_at: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LoginRequest {
    pub code: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SessionAnswer {
    /// When the session ends by itself.
    pub expires_at: Timestamp,
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
