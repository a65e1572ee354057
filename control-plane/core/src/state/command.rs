//! What may be proposed. Each command fixes everything uncertain: ids, times, ports, resolved defaults.

use std::collections::BTreeMap;
use std::sync::Arc;

use optimus_common::api::v1::DeploymentPhase;
use optimus_common::ids::RequestId;
use optimus_common::join_token::Role;
use optimus_common::protocol::{AllocStatus, NodeFacts};
use optimus_common::spec::{Kind, Resources, WorkloadSpec};
use optimus_common::{
    AllocId, Bytes, ClusterId, DeploymentId, Millicores, Name, NodeId, Reason, RunId, Span, Timestamp, TokenId, WorkloadKey,
};
use serde::{Deserialize, Serialize};

use super::authority::{Member, RotationPhase};
use crate::deployments::analysis::Sample;

use super::operations::{Due, RunPhase, SkipReason};

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
    /// Announces a new CA, number `number`: its certificate, its sealed key, and its key certified by the CA that signs.
    RotateCa {
        number: u32,
        certificate: Vec<u8>,
        key_sealed: Vec<u8>,
        cross: Vec<u8>,
        /// How long both CAs are trusted at most.
        overlap: Span,
    },
    /// The rotation to CA `number` shall not take place. Possible while the old CA signs.
    AbortRotation {
        number: u32,
    },
    /// The phase the CA rotation is in shall not wait for nodes any longer.
    ForceRotation,
    /// The phase `from` of the rotation to CA `number` is over.
    StepRotation {
        number: u32,
        from: RotationPhase,
    },
    /// The newest CA that a member trusts, and the one that signed the certificate it holds. It says so itself.
    MemberCa {
        member: Member,
        trusted: u32,
        signer: u32,
    },
    /// So long the phase of the rotation to CA `number` has lasted, by the leaders' monotonic clocks.
    RotationWaited {
        number: u32,
        phase: RotationPhase,
        waited: Span,
    },
    /// A member's clock has come to differ so much that people should know (milliseconds it is ahead), or no longer does.
    MemberClock {
        member: Member,
        skew_ms: Option<i64>,
    },
    /// What a person asks of a deployment.
    Steer {
        key: WorkloadKey,
        act: Steering,
        #[serde(default)]
        why: Option<String>,
        /// Id of the deployment it starts, if it starts one.
        deployment: DeploymentId,
    },
    /// [`Command::Deploy`], if none of the workloads changed after a revision.
    DeployIf {
        items: Vec<DeployItem>,
        revision: u64,
    },
    /// A router has taken on all endpoints up to a generation.
    AckEndpoints {
        router: String,
        generation: u64,
    },
    /// Somebody asks for a run of a job.
    StartRun(RunOrder),
    CancelRun {
        key: WorkloadKey,
        number: u64,
    },
    /// What the leader decided of the runs of jobs.
    RunSteps(Vec<RunStep>),
    /// What an operator sets of a node.
    ChangeNode {
        node: NodeId,
        change: NodeChange,
    },
    /// A draining node holds no copy any more.
    NodeDrained {
        node: NodeId,
    },
    /// Sets how much may be moved to even out the nodes.
    SetRebalance {
        automatic: bool,
        moves: u32,
        every: Span,
    },
    /// Flags copies to be moved to even out the nodes, within the budget.
    Rebalance {
        moves: Vec<AllocId>,
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
        name: Name,
    },
    /// A volume is on this node from now on.
    SetVolume {
        volume: super::Volume,
    },
    RemoveVolume {
        key: super::VolumeKey,
    },
    /// [`Command::AckEndpoints`], with what the router counted since it said so last.
    CountTraffic {
        router: String,
        generation: u64,
        counts: Vec<(AllocId, Sample)>,
    },
    /// Other limits for a service: a release that its copies take on as they run.
    Resize {
        key: WorkloadKey,
        limits: NewLimits,
        /// And another number of copies.
        #[serde(default)]
        copies: Option<u32>,
        deployment: DeploymentId,
    },
    /// Another root key takes the place of the present one.
    Rewrap(super::Rewrap),
    /// A new version of a secret.
    SetSecret {
        key: super::SecretKey,
        sealed: Vec<u8>,
        /// The key it is sealed with: that of the environment, or a new one if that has none yet.
        vault: super::Vault,
    },
    RemoveSecret {
        key: super::SecretKey,
    },
}

/// What a person may ask of a workload's newest deployment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Steering {
    /// What proved itself takes over.
    Promote,
    /// Nothing more is moved; what dies is replaced.
    Pause,
    Resume,
    /// Call it off: the release before stays, or comes back.
    Abort,
    /// Once more the release that failed.
    Retry,
    /// Back to a release, or to the one that ran before.
    RollBack {
        to: Option<u64>,
    },
}

/// Limits somebody asks for; unset: as they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewLimits {
    #[serde(default)]
    pub cpu: Option<Millicores>,
    #[serde(default)]
    pub memory_request: Option<Bytes>,
    #[serde(default)]
    pub memory_limit: Option<Bytes>,
}

impl NewLimits {
    /// A limit below the request takes it along, and the other way round, where only one was given.
    pub fn of(self, now: Resources) -> Resources {
        let cpu = self.cpu.unwrap_or(now.cpu);
        let (memory_request, memory_limit) = match (self.memory_request, self.memory_limit) {
            (None, Some(limit)) => (now.memory_request.min(limit), limit),
            (Some(request), None) => (request, now.memory_limit.max(request)),
            (request, limit) => (request.unwrap_or(now.memory_request), limit.unwrap_or(now.memory_limit)),
        };
        Resources { cpu, memory_request, memory_limit, ..now }
    }
}

/// A run somebody asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunOrder {
    pub key: WorkloadKey,
    pub id: RunId,
    #[serde(default)]
    pub params: BTreeMap<String, String>,
    #[serde(default)]
    pub payload: Option<Arc<Vec<u8>>>,
}

/// One decision of the leader about the runs of a job. Each is looked at again when it is applied.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum RunStep {
    /// From now on the schedule of `release` counts; instants up to `decided` are no longer of interest.
    Arm { key: WorkloadKey, release: u64, decided: Timestamp, next: Option<Due> },
    /// The instant `due` has come.
    Due { key: WorkloadKey, due: Due, start: Result<RunId, SkipReason>, next: Option<Due> },
    /// The run of a new release.
    Deploy { key: WorkloadKey, release: u64, id: RunId },
    /// The turn of a run that waits has come.
    Begin { key: WorkloadKey, number: u64 },
    /// A copy of it has ended well.
    Done { key: WorkloadKey, number: u64, alloc: AllocId },
    /// A try of it has failed; the next may be placed at `retry_at`. Without one the run has failed.
    Tried { key: WorkloadKey, number: u64, alloc: AllocId, retry_at: Option<Timestamp> },
    /// It is over for another reason than its copies.
    End { key: WorkloadKey, number: u64, phase: RunPhase, reason: Option<Reason> },
}

/// What an operator sets of a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum NodeChange {
    /// Sets labels, or takes away those without a value.
    Labels(BTreeMap<String, Option<String>>),
    Pool(Option<Name>),
    Cordon,
    /// Also ends a drain.
    Uncordon,
    Drain {
        deadline: Option<Timestamp>,
        keep_daemons: bool,
    },
    CancelDrain,
}

/// The highest [`Cluster::version`](super::Cluster::version) this build understands.
pub const LEVEL: u32 = 3;

impl Command {
    /// The cluster version from which on every server decodes this command; before it, none may propose it.
    pub fn level(&self) -> u32 {
        match self {
            Command::Resize { .. } | Command::CountTraffic { .. } => 3,
            Command::Steer { .. } | Command::AckEndpoints { .. } | Command::DeployIf { .. } => 3,
            Command::Plan(plan) => plan.level(),
            Command::StartRun(_)
            | Command::CancelRun { .. }
            | Command::RunSteps(_)
            | Command::ChangeNode { .. }
            | Command::NodeDrained { .. }
            | Command::SetRebalance { .. }
            | Command::Rebalance { .. } => 3,
            // An older server reads these, but would make something else of them.
            Command::Deploy { items } if items.iter().any(|i| i.spec.kind != Kind::Service) => 3,
            Command::RemoveServer { .. } | Command::ForgetServer { .. } | Command::RemoveNode { .. } => 2,
            Command::Rewrap(_) => 3,
            Command::RotateCa { .. } | Command::AbortRotation { .. } | Command::ForceRotation | Command::StepRotation { .. } => 3,
            Command::MemberCa { .. } | Command::MemberClock { .. } | Command::RotationWaited { .. } => 3,
            Command::SetQuota { .. }
            | Command::RemoveQuota { .. }
            | Command::SetPool { .. }
            | Command::RemovePool { .. }
            | Command::SetVolume { .. }
            | Command::RemoveVolume { .. }
            | Command::SetSecret { .. }
            | Command::RemoveSecret { .. } => 3,
            // Nor would it give them to anybody.
            Command::Deploy { items } if items.iter().any(|item| !item.spec.secrets.is_empty()) => 3,
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
    /// Copies that take on another release as they run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub adopt: Vec<(AllocId, u64)>,
    /// Copies that get no new requests from now on, and are stopped next.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drain: Vec<AllocId>,
    /// Copies that are to move to another node.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub migrate: Vec<AllocId>,
}

impl DeploymentStep {
    /// As [`Command::level`].
    pub fn level(&self) -> u32 {
        match self {
            DeploymentStep::Enter { .. } | DeploymentStep::Promote { .. } => 3,
            _ => 1,
        }
    }
}

impl Plan {
    /// As [`Command::level`]: a field that an older server does not know would be lost there.
    pub fn level(&self) -> u32 {
        let new = !self.adopt.is_empty() || !self.drain.is_empty() || !self.migrate.is_empty();
        if new { 3 } else { self.deployments.iter().map(DeploymentStep::level).max().unwrap_or(1) }
    }

    /// Leaves out what servers at `version` would not understand; it is decided again once they all do.
    pub fn cut_to(&mut self, version: u32) {
        if version < 3 {
            self.adopt.clear();
            self.drain.clear();
            self.migrate.clear();
            self.deployments.retain(|step| step.level() <= version);
        }
    }

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
    /// From one phase to the next.
    Enter {
        id: DeploymentId,
        from: DeploymentPhase,
        to: DeploymentPhase,
        step: u32,
        weight: Option<u32>,
    },
    /// What proved itself takes over.
    Promote {
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
    #[error("workload {key} has no deployment this could be done to: {why}")]
    CannotSteer { key: WorkloadKey, why: String },
    #[error("workload {key} changed at revision {now}, after revision {expected}; plan again")]
    ChangedSince { key: WorkloadKey, expected: u64, now: u64 },
    #[error("workload {key} has no release {release}; releases are kept for a while only")]
    NoSuchRelease { key: WorkloadKey, release: u64 },
    #[error("there is no secret {0}")]
    NoSuchSecret(super::SecretKey),
    #[error("secret {key} is used by {by}")]
    SecretInUse { key: super::SecretKey, by: WorkloadKey },
    #[error("the key of {0}'s secrets is another one; try again")]
    OtherVault(super::VaultKey),
    #[error("there is no quota of {0}")]
    NoSuchQuota(super::QuotaKey),
    #[error("there is no pool {0}")]
    NoSuchPool(optimus_common::Name),
    #[error("there is no volume {0}")]
    NoSuchVolume(super::VolumeKey),
    #[error("the cluster is at version {cluster}; this needs {needed}: upgrade the remaining servers first")]
    NotYet { cluster: u32, needed: u32 },
    #[error("the cluster has not been created yet")]
    NoCluster,
    #[error("a CA rotation is under way already; `optimus cluster status` tells what it waits for")]
    RotationUnderWay,
    #[error("server {0} does not hold the new root key; it joined meanwhile: try again")]
    RootKeyNotHeld(u64),
    #[error("no CA rotation is under way")]
    NoRotation,
    #[error("the new CA signs already, so the rotation can only go on; another one can begin once it is over")]
    RotationPastAbort,
    #[error("{0} is no job")]
    NotAJob(WorkloadKey),
    #[error("{0} is stopped; deploy or restart it first")]
    Stopped(WorkloadKey),
    #[error("there is no run {1} of {0}")]
    NoSuchRun(WorkloadKey, u64),
    #[error("run {1} of {0} is over")]
    RunOver(WorkloadKey, u64),
    #[error("{waiting} runs of {key} wait already, as many as may; try again when one has begun")]
    RunsFull { key: WorkloadKey, waiting: u32 },
    #[error("{0}")]
    RunInput(String),
    #[error("{key} is a {}; remove it before another kind of workload takes its name", .is.word())]
    KindChanged { key: WorkloadKey, is: Kind },
    #[error("{0} runs on every matching node; it has no number of copies to set")]
    NoCopies(WorkloadKey),
    #[error("`after` goes in a circle, with what is deployed already: {}", .path.join(" after "))]
    AfterCircle { path: Vec<String> },
    #[error("volume {volume} is used by {by}; {}", if *.moving { "it cannot move" } else { "it is not removed" })]
    VolumeInUse { volume: super::VolumeKey, by: String, moving: bool },
}
