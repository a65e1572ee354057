//! The rows of the replicated state. All of it is stored as MessagePack with field names: a new field
//! needs `#[serde(default)]`.

use std::sync::Arc;

use imbl::OrdMap;
use optimus_common::api::v1::DeploymentPhase;
use optimus_common::join_token::Role;
use optimus_common::protocol::{AllocStatus, NodeFacts};
use optimus_common::spec::WorkloadSpec;
use optimus_common::{AllocId, ClusterId, DeploymentId, NodeId, Reason, Span, Timestamp, TokenId, WorkloadKey};
use serde::{Deserialize, Serialize};

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
    /// What projects and environments may take together.
    #[serde(default, skip_serializing_if = "OrdMap::is_empty")]
    pub quotas: OrdMap<super::QuotaKey, Arc<super::Quota>>,
    /// How copies are laid out in the pools that say so.
    #[serde(default, skip_serializing_if = "OrdMap::is_empty")]
    pub pools: OrdMap<optimus_common::Name, Arc<super::Pool>>,
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
/// Servers the state accepts: 5 voters, and their replacements while they change places.
pub const SERVERS_MAX: usize = 16;
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
}

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
