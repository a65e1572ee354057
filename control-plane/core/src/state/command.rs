//! What may be proposed. Each command fixes everything uncertain: ids, times, ports, resolved defaults.

use std::sync::Arc;

use optimus_common::ids::RequestId;
use optimus_common::join_token::Role;
use optimus_common::protocol::{AllocStatus, NodeFacts};
use optimus_common::spec::WorkloadSpec;
use optimus_common::{AllocId, ClusterId, DeploymentId, NodeId, Reason, Timestamp, TokenId, WorkloadKey};
use serde::{Deserialize, Serialize};

/// A command with what makes a retry harmless.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Proposal {
    /// The proposer's wall clock. State never reads another.
    pub at: Timestamp,
    /// Set for requests of users: the id, and the digest of the request's body.
    #[serde(default)]
    pub request: Option<(RequestId, Vec<u8>)>,
    pub command: Command,
}

/// Boxing the large ones would save nothing: commands are few and short-lived.
#[allow(clippy::large_enum_variant)]
/// Variants are only ever added at the end, and only proposed once the cluster's version allows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// The first command of a cluster. A second one changes nothing.
    CreateCluster {
        id: ClusterId,
        ca_certificate: Vec<u8>,
        ca_key_sealed: Vec<u8>,
    },
    CreateToken {
        id: TokenId,
        secret_hash: Vec<u8>,
        expires_at: Timestamp,
        uses: u32,
        #[serde(default, skip_serializing_if = "Role::is_agent")]
        role: Role,
    },
    RevokeToken {
        id: TokenId,
    },
    /// Uses a token once and admits the node.
    AdmitNode {
        token: TokenId,
        node: NodeId,
        name: String,
        key_fingerprint: Vec<u8>,
        certificate_expires_at: Timestamp,
    },
    /// A node's agent has connected (or its facts changed).
    NodeUp {
        node: NodeId,
        facts: NodeFacts,
    },
    NodeDown {
        node: NodeId,
    },
    NodeCertificate {
        node: NodeId,
        key_fingerprint: Vec<u8>,
        expires_at: Timestamp,
    },
    /// Sets several workloads of one project and environment: all or none.
    Deploy {
        items: Vec<DeployItem>,
    },
    /// A rolling restart: a new release with the same spec.
    Restart {
        key: WorkloadKey,
        deployment: DeploymentId,
    },
    Scale {
        key: WorkloadKey,
        copies: u32,
        deployment: DeploymentId,
    },
    /// Stops all copies; a later deploy or restart starts them again.
    StopWorkload {
        key: WorkloadKey,
    },
    RemoveWorkload {
        key: WorkloadKey,
    },
    /// One batch of the reconciler's decisions.
    Plan(Plan),
    /// Status changes of one node's agent, batched.
    Report {
        node: NodeId,
        statuses: Vec<AllocStatus>,
        gone: Vec<AllocId>,
    },
    /// Uses a token once and admits a server; its id is given here. Without a token: the only server.
    AdmitServer {
        token: Option<TokenId>,
        server: ServerFacts,
        key_fingerprint: Vec<u8>,
    },
    /// A server has started with other facts than it had.
    ServerUp {
        id: u64,
        server: ServerFacts,
    },
    /// All servers understand `to` from now on.
    RaiseVersion {
        to: u32,
    },
    /// A server shall leave: first it loses its vote.
    RemoveServer {
        id: u64,
    },
    /// A leaving server has lost its vote: peers no longer accept its key.
    ForgetServer {
        id: u64,
    },
    /// Revokes a node: its key is no longer accepted, and its copies count as gone.
    RemoveNode {
        node: NodeId,
    },
    /// Sets what a project, or one of its environments, may take together. What runs already stays.
    SetQuota {
        key: super::QuotaKey,
        quota: super::Quota,
    },
    RemoveQuota {
        key: super::QuotaKey,
    },
    SetPool {
        pool: super::Pool,
    },
    RemovePool {
        name: optimus_common::Name,
    },
    /// A volume is on this node from now on.
    SetVolume {
        volume: super::Volume,
    },
    RemoveVolume {
        key: super::VolumeKey,
    },
}

/// The highest [`Cluster::version`](super::Cluster::version) this build understands.
pub const LEVEL: u32 = 3;

impl Command {
    /// The cluster version from which on every server decodes this command; before it, none may propose it.
    pub fn level(&self) -> u32 {
        match self {
            Command::RemoveServer { .. } | Command::ForgetServer { .. } | Command::RemoveNode { .. } => 2,
            Command::SetQuota { .. }
            | Command::RemoveQuota { .. }
            | Command::SetPool { .. }
            | Command::RemovePool { .. }
            | Command::SetVolume { .. }
            | Command::RemoveVolume { .. } => 3,
            // A server that does not know the rules would place against them.
            Command::Deploy { items } if items.iter().any(|item| !item.spec.placement.is_default()) => 3,
            _ => 1,
        }
    }
}

/// What a server says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServerFacts {
    pub name: String,
    /// `host:port` (UDP) where its peers and agents reach it.
    pub address: String,
    /// `host:port` of its API.
    pub api: String,
    /// What it runs, for people.
    pub version: String,
    /// Its [`LEVEL`].
    pub level: u32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeployItem {
    pub key: WorkloadKey,
    pub spec: Arc<WorkloadSpec>,
    #[serde(default)]
    pub source: Option<Arc<str>>,
    pub deployment: DeploymentId,
}

/// The reconciler's decisions: checked again by the same `fits` when applied.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub place: Vec<Placement>,
    pub stop: Vec<(AllocId, Reason)>,
    /// Allocations that ended and whose records may go.
    pub forget: Vec<AllocId>,
    pub deployments: Vec<DeploymentStep>,
    /// Workloads marked for removal whose last copy is gone.
    pub remove: Vec<WorkloadKey>,
}

impl Plan {
    pub fn is_empty(&self) -> bool {
        self == &Plan::default()
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Placement {
    pub alloc: AllocId,
    pub key: WorkloadKey,
    pub index: u32,
    pub release: u64,
    pub node: NodeId,
    pub ports: Vec<(String, u16)>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum DeploymentStep {
    /// More copies are ready than ever before in this deployment.
    Progress {
        id: DeploymentId,
        ready: u32,
    },
    Succeed {
        id: DeploymentId,
    },
    /// With a stable release to go back to: roll back. Without: leave the copies for people to look at.
    Fail {
        id: DeploymentId,
        reason: Reason,
    },
    /// The copies of the release before all run again.
    RolledBack {
        id: DeploymentId,
    },
}

/// What applying a command did. A refusal is a value, not an error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Applied {
    /// Done; `index` is where.
    Done {
        index: u64,
    },
    /// It was so already; nothing changed.
    Unchanged {
        index: u64,
    },
    Deployed {
        index: u64,
        deployments: Vec<DeploymentId>,
        unchanged: Vec<WorkloadKey>,
    },
    /// Refused; the state is as before.
    Refused(Refusal),
}

/// Why a command was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    #[error("there is no workload {0}")]
    NoSuchWorkload(WorkloadKey),
    #[error("there is no node {0}")]
    NoSuchNode(NodeId),
    #[error("workload {0} is being removed; wait until its last copy is gone")]
    BeingRemoved(WorkloadKey),
    #[error("the join token is not known")]
    TokenUnknown,
    #[error("the join token has expired")]
    TokenExpired,
    #[error("the join token has been used up")]
    TokenUsedUp,
    #[error("too many {what}: the limit is {limit}")]
    TooMany { what: String, limit: u64 },
    #[error("the request id was used before with another body")]
    RequestReused,
    #[error("the cluster exists already")]
    ClusterExists,
    #[error("there is no server {0}")]
    NoSuchServer(u64),
    #[error("the join token is for {is}s, not for {wanted}s")]
    TokenRole { is: Role, wanted: Role },
    #[error("the cluster is at version {cluster}, this server understands up to {server}; upgrade it first")]
    TooOld { cluster: u32, server: u32 },
    #[error("server {0} is the last one; it cannot leave")]
    LastServer(u64),
    #[error("there is no quota of {0}")]
    NoSuchQuota(super::QuotaKey),
    #[error("there is no pool {0}")]
    NoSuchPool(optimus_common::Name),
    #[error("there is no volume {0}")]
    NoSuchVolume(super::VolumeKey),
    #[error("the cluster is at version {cluster}; this needs {needed}: upgrade the remaining servers first")]
    NotYet { cluster: u32, needed: u32 },
}
