//! The rows of the replicated state. All of it is stored as MessagePack with field names: a new field
//! needs `#[serde(default)]`.

use std::collections::BTreeMap;
use std::sync::Arc;

use imbl::OrdMap;
use optimus_common::api::v1::DeploymentPhase;
use optimus_common::join_token::Role;
use optimus_common::protocol::{AllocStatus, NodeFacts};
use optimus_common::spec::{Strategy, WorkloadSpec};
use optimus_common::{AllocId, ClusterId, DeploymentId, Name, NodeId, Reason, Span, Timestamp, TokenId, WorkloadKey};
use serde::{Deserialize, Serialize};

use crate::deployments::analysis::Traffic;

/// The whole replicated state. Cloning costs a few pointers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Raft index of the last command applied.
    pub index: u64,
    pub cluster: Option<Cluster>,
    /// The servers of the control plane, by their Raft id.
    #[serde(default)]
    pub servers: OrdMap<u64, Arc<ServerRow>>,
    /// Ids below were given once and never again: two servers under one id could split the cluster.
    #[serde(default)]
    pub next_server: u64,
    pub nodes: OrdMap<NodeId, Arc<Node>>,
    pub tokens: OrdMap<TokenId, Arc<JoinToken>>,
    pub workloads: OrdMap<WorkloadKey, Arc<Workload>>,
    /// The releases kept of each workload, newest [`RELEASES_KEPT`].
    pub releases: OrdMap<(WorkloadKey, u64), Arc<Release>>,
    pub allocs: OrdMap<AllocId, Arc<Alloc>>,
    pub deployments: OrdMap<DeploymentId, Arc<Deployment>>,
    /// Window of the newest [`EVENTS_KEPT`] events.
    pub events: OrdMap<(u64, u32), Arc<Event>>,
    /// Answers of the newest [`REQUESTS_KEPT`] requests, so that a retry has one effect.
    pub requests: OrdMap<optimus_common::ids::RequestId, Arc<Answered>>,
    /// Slots whose copies could not run where they were placed, until one is ready.
    #[serde(default)]
    pub failures: OrdMap<(WorkloadKey, u32), SlotFailures>,
    /// At which index the endpoints of a workload last changed: their generation.
    #[serde(default, skip_serializing_if = "OrdMap::is_empty")]
    pub routes: OrdMap<WorkloadKey, u64>,
    /// Who routes requests, by name.
    #[serde(default, skip_serializing_if = "OrdMap::is_empty")]
    pub routers: OrdMap<String, RouterRow>,
    /// What is known of each job beside its workload's row.
    #[serde(default)]
    pub jobs: OrdMap<WorkloadKey, Arc<JobRow>>,
    /// The runs kept of each job, by number.
    #[serde(default)]
    pub runs: OrdMap<(WorkloadKey, u64), Arc<JobRun>>,
    /// Whether copies are moved to even out the nodes. Unset: never by itself.
    #[serde(default)]
    pub rebalance: Option<RebalanceRow>,
    /// What projects and environments may take together.
    #[serde(default, skip_serializing_if = "OrdMap::is_empty")]
    pub quotas: OrdMap<super::QuotaKey, Arc<super::Quota>>,
    /// How copies are laid out in the pools that say so.
    #[serde(default, skip_serializing_if = "OrdMap::is_empty")]
    pub pools: OrdMap<optimus_common::Name, Arc<super::Pool>>,
    #[serde(default, skip_serializing_if = "OrdMap::is_empty")]
    pub secrets: OrdMap<super::SecretKey, Arc<super::Secret>>,
    /// The keys of those environments that have secrets.
    #[serde(default, skip_serializing_if = "OrdMap::is_empty")]
    pub vaults: OrdMap<super::VaultKey, Arc<super::Vault>>,
    /// Where volumes are.
    #[serde(default, skip_serializing_if = "OrdMap::is_empty")]
    pub volumes: OrdMap<super::VolumeKey, Arc<super::Volume>>,
    /// Derived from the tables, rebuilt when a snapshot is read.
    #[serde(skip)]
    pub(crate) indexes: super::indexes::Indexes,
}

pub const RELEASES_KEPT: usize = 20;
pub const EVENTS_KEPT: usize = 10_000;
pub const REQUESTS_KEPT: usize = 10_000;
/// Ended deployments kept of each workload.
pub const DEPLOYMENTS_KEPT: usize = 20;
/// Most live join tokens, nodes, workloads and copies of one workload the state accepts.
pub const TOKENS_MAX: usize = 1000;
/// Labels an operator gives a node.
pub const NODE_LABELS_MAX: usize = 100;
/// Runs of all jobs that wait or are active.
pub const RUNS_MAX: usize = 2000;
/// The pool of nodes that were given none.
pub const DEFAULT_POOL: &str = "default";
/// Servers the state accepts: 5 voters, and their replacements while they change places.
pub const SERVERS_MAX: usize = 16;
/// Routers that say what they have taken on.
pub const ROUTERS_MAX: usize = 256;
pub const NODES_MAX: usize = 10_000;
pub const WORKLOADS_MAX: usize = 100_000;
pub const COPIES_MAX: u32 = 10_000;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    pub id: ClusterId,
    pub created_at: Timestamp,
    /// Certificate of the cluster CA, DER.
    pub ca_certificate: Vec<u8>,
    /// Its private key, sealed with the root key, which is never in this state.
    pub ca_key_sealed: Vec<u8>,
    /// Gates commands: a new kind is proposed only once every server decodes it.
    pub version: u32,
    /// Which CA signs, and the one that takes its place.
    #[serde(default)]
    pub authorities: super::authority::Authorities,
}

/// One server of the control plane.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServerRow {
    pub id: u64,
    /// Its host's name.
    pub name: String,
    /// `host:port` (UDP) where its peers and agents reach it.
    pub address: String,
    /// `host:port` of its API.
    pub api: String,
    /// SHA-256 of its public key. Peers refuse every other key under its id.
    pub key_fingerprint: Vec<u8>,
    /// What it runs, for people.
    pub version: String,
    /// The highest [`Cluster::version`] it understands.
    pub level: u32,
    pub joined_at: Timestamp,
    /// It is to lose its vote and then its row.
    #[serde(default)]
    pub leaving: bool,
    /// Number of the newest CA it trusts, and of the one that signed its certificate, as it told.
    #[serde(default)]
    pub ca_trusted: u32,
    #[serde(default)]
    pub ca_signer: u32,
    /// How far its clock is ahead of the leader's, in milliseconds; only while that is worth telling.
    #[serde(default)]
    pub clock_skew_ms: Option<i64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Node {
    pub id: NodeId,
    pub facts: NodeFacts,
    pub joined_at: Timestamp,
    pub up: bool,
    /// When `up` last changed.
    pub changed_at: Timestamp,
    pub certificate_expires_at: Timestamp,
    /// SHA-256 of the public key the node was certified with.
    pub key_fingerprint: Vec<u8>,
    #[serde(default)]
    pub cordoned: bool,
    /// Ports on the host that a stranger held when a copy wanted them, and until when we avoid them.
    #[serde(default)]
    pub blocked_ports: OrdMap<u16, Timestamp>,
    /// Number of the newest CA it trusts, and of the one that signed its certificate, as it told.
    #[serde(default)]
    pub ca_trusted: u32,
    #[serde(default)]
    pub ca_signer: u32,
    /// How far its clock is ahead of the servers', in milliseconds; only while that is worth telling.
    #[serde(default)]
    pub clock_skew_ms: Option<i64>,
    /// Set by operators; over the labels of its facts.
    #[serde(default)]
    pub labels: OrdMap<String, String>,
    /// Set by operators, over that of its facts. Unset in both: [`DEFAULT_POOL`].
    #[serde(default)]
    pub pool: Option<Name>,
    /// It is being emptied, or has been.
    #[serde(default)]
    pub drain: Option<Drain>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JoinToken {
    pub id: TokenId,
    /// SHA-256 of the secret part.
    pub secret_hash: Vec<u8>,
    pub created_at: Timestamp,
    pub expires_at: Timestamp,
    pub uses_left: u32,
    /// What its holder may become.
    #[serde(default, skip_serializing_if = "Role::is_agent")]
    pub role: Role,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    pub key: WorkloadKey,
    /// Release that should run.
    pub release: u64,
    /// Highest release number ever given.
    pub newest: u64,
    /// The last release that was deployed with success.
    #[serde(default)]
    pub stable: Option<u64>,
    pub copies: u32,
    pub stopped: bool,
    /// Removed once its last copy is gone.
    pub removing: bool,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    pub revision: u64,
    /// The newest deployment.
    #[serde(default)]
    pub deployment: Option<DeploymentId>,
}

/// Immutable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Release {
    pub key: WorkloadKey,
    pub number: u64,
    pub spec: Arc<WorkloadSpec>,
    #[serde(default)]
    pub source: Option<Arc<str>>,
    pub created_at: Timestamp,
    /// Its copies are started afresh, even where the spec would allow to change those of another release in place.
    #[serde(default, skip_serializing_if = "is_false")]
    pub fresh: bool,
    /// The versions of its secrets, so that going back to it brings them back as well.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub secrets: BTreeMap<String, u64>,
}

impl Release {
    /// Copies of both are the same, down to the secrets they were given.
    pub fn runs_as(&self, other: &Release) -> bool {
        self.spec == other.spec && self.secrets == other.secrets
    }
}

fn is_false(given: &bool) -> bool {
    !given
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Alloc {
    pub id: AllocId,
    pub key: WorkloadKey,
    pub index: u32,
    pub release: u64,
    pub node: NodeId,
    /// Host port of each port of the spec, in its order.
    pub ports: Vec<(String, u16)>,
    /// Devices given to it: kind and id of each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<(String, String)>,
    /// Desired: false means stop. Written by the reconciler only.
    pub run: bool,
    /// Why it should not run.
    #[serde(default)]
    pub stop_reason: Option<Reason>,
    pub created_at: Timestamp,
    /// Observed: the last report of its agent, but for `ready_since`, which is the time the report was
    /// committed: the clocks of hosts differ, and `min_ready` is counted by the leader's. Written by reports only.
    #[serde(default)]
    pub status: Option<Arc<AllocStatus>>,
    /// It is to move to another node: replaced like a copy of an older release, and no failure.
    #[serde(default, skip_serializing_if = "is_false")]
    pub migrate: bool,
    /// Since when it gets no new requests, on its way to be stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub draining_since: Option<Timestamp>,
    /// The first generation of endpoints without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unrouted_at: Option<u64>,
}

pub use super::operations::*;

/// How often in a row copies of one slot could not run where they were placed. Spaces the next tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotFailures {
    pub release: u64,
    pub count: u32,
    pub last_at: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Deployment {
    pub id: DeploymentId,
    pub key: WorkloadKey,
    pub release: u64,
    #[serde(default)]
    pub from_release: Option<u64>,
    pub trigger: String,
    pub phase: DeploymentPhase,
    pub created_at: Timestamp,
    #[serde(default)]
    pub ended_at: Option<Timestamp>,
    /// Longest time without progress.
    pub deadline: Span,
    /// Most copies that were ready at once, and when that number last grew.
    pub progress: u32,
    pub progress_at: Timestamp,
    #[serde(default)]
    pub reason: Option<Reason>,
    /// When its phase began.
    #[serde(default)]
    pub since: Option<Timestamp>,
    #[serde(default = "rolling")]
    pub strategy: Strategy,
    /// Which of the canary's steps it is at; of a blue-green one: 1 once the old set may go.
    #[serde(default)]
    pub step: u32,
    /// Percent of the traffic its release has; unset: each copy has the same.
    #[serde(default)]
    pub weight: Option<u32>,
    #[serde(default)]
    pub paused: Option<Pause>,
    /// Canaries were promoted: the rest may follow.
    #[serde(default)]
    pub promoted: bool,
    /// Somebody called it off: it ends as cancelled once the release before runs again.
    #[serde(default)]
    pub called_off: bool,
    /// Copies before it; what it goes back to.
    #[serde(default)]
    pub from_copies: Option<u32>,
    /// How often copies that had proved themselves were no longer ready.
    #[serde(default)]
    pub relapses: u32,
    /// It has been found fit to begin.
    #[serde(default)]
    pub prepared: bool,
    /// The copy that runs, or ran, its release command. Set once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release_step: Option<AllocId>,
    /// What routers counted since the present step began.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub traffic: Traffic,
}

fn is_nothing(traffic: &Traffic) -> bool {
    *traffic == Traffic::default()
}

fn rolling() -> Strategy {
    Strategy::Rolling
}

/// One that sends requests to copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouterRow {
    /// It has taken on all endpoints up to this index.
    pub generation: u64,
    pub heard_at: Timestamp,
}

/// Somebody paused a deployment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pause {
    pub since: Timestamp,
    #[serde(default)]
    pub why: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub index: u64,
    pub n: u32,
    pub at: Timestamp,
    pub kind: EventKind,
    /// What it is about: `shop/prod/web`, `shop/prod/web-0`, `node/host-1`.
    pub subject: String,
    pub message: String,
    #[serde(default)]
    pub reason: Option<Reason>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    ClusterCreated,
    ClusterUpgraded,
    ServerJoined,
    ServerLeaving,
    ServerLeft,
    NodeJoined,
    NodeUp,
    NodeDown,
    NodeRemoved,
    CaRotation,
    ClockSkew,
    TokenCreated,
    TokenRefused,
    DeploymentStarted,
    DeploymentEnded,
    WorkloadScaled,
    WorkloadStopped,
    WorkloadRemoved,
    CopyPlaced,
    CopyStarted,
    CopyReady,
    CopyNotReady,
    CopyExited,
    CopyStopped,
    CopyFailed,
    DeploymentShifted,
    DeploymentPromoted,
    DeploymentPaused,
    CopyUpdated,
    RunStarted,
    RunEnded,
    RunSkipped,
    NodeChanged,
    NodeDraining,
    NodeDrained,
    Rebalanced,
    SecretSet,
}

/// The answer a request got, for its retries.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answered {
    pub at: Timestamp,
    pub index: u64,
    /// Digest of the request's body, so that another body under the same key is told apart.
    pub digest: Vec<u8>,
    pub answer: super::Applied,
}
