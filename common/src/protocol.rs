//! What servers and agents say to each other over QUIC.
//!
//! One connection per agent, ALPN [`ALPN_AGENT`], mTLS with the cluster CA. The agent opens a
//! bidirectional **control stream** and sends [`Hello`]; the server answers [`Welcome`] (or
//! [`Refused`] and closes). After that the server sends [`Desired`] and [`Ping`]; the agent sends
//! [`Report`] and [`Pong`]. The server opens further bidirectional streams for requests to the agent
//! ([`LogRequest`]), each answered on its own stream.
//!
//! Redeeming a join token uses ALPN [`ALPN_JOIN`] (server authenticated by its pinned CA, no client
//! certificate) and one bidirectional stream: [`JoinRequest`] then [`JoinAnswer`] or [`Refused`].
//!
//! Frames are those of [`crate::codec`]: bincode, positional. Values that grow with time (spec, status,
//! node facts) travel as MessagePack inside a [`Blob`], so an agent may be one release behind.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::codec::{self, DecodeError};
use crate::ids::{AllocId, ClusterId, NodeId, WorkloadKey};
use crate::reason::{Exit, Reason};
use crate::spec::{Resources, WorkloadSpec};
use crate::time::{Span, Timestamp};
use crate::units::{Bytes, Millicores};
use crate::usage::{HistoryAnswer, HistoryRequest, Usage, UsageEvery};

pub const ALPN_AGENT: &[u8] = b"optimus-agent/1";
pub const ALPN_JOIN: &[u8] = b"optimus-join/1";
pub const ALPN_RAFT: &[u8] = b"optimus-raft/1";
/// Servers passing requests on to agents that are connected to another one.
pub const ALPN_RELAY: &[u8] = b"optimus-relay/1";

/// Versions of the agent protocol this build speaks, oldest and newest.
///
/// 2: the server tells the agent the addresses of all servers ([`Servers`]).
/// 3: the server tells which CAs to trust ([`Trust`]), and pongs carry the agent's clock ([`ClockPong`]).
/// 4: agents tell what they use ([`Usage`]) and answer for its history ([`HistoryRequest`]).
pub const PROTOCOL: (u16, u16) = (1, 4);
/// First version with [`Servers`].
pub const VERSION_SERVERS: u16 = 2;
/// First version with [`Trust`], [`Trusting`] and [`ClockPong`].
pub const VERSION_TRUST: u16 = 3;
/// First version with [`Usage`] and [`HistoryRequest`].
pub const VERSION_USAGE: u16 = 4;
/// Most CAs told at once.
pub const ROOTS_MAX: usize = 4;

/// Most allocations in one desired set.
pub const ALLOCS_PER_NODE_MAX: usize = 4096;
/// Longest status of one allocation, as MessagePack. A longer one is neither sent nor taken.
pub const STATUS_MAX: usize = 64 << 10;
/// Most bytes of text from a workload inside a reason or status.
pub const TEXT_MAX: usize = 512;

/// MessagePack of a value that may gain fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob(pub Vec<u8>);

impl Blob {
    pub fn of<T: Serialize>(value: &T) -> Self {
        Blob(codec::to_msgpack(value))
    }
    pub fn open<T: DeserializeOwned>(&self) -> Result<T, DecodeError> {
        codec::from_msgpack(&self.0)
    }
}

macro_rules! messages {
    ($(#[$doc:meta])* $vis:vis enum $name:ident { $($variant:ident = $kind:literal v $version:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq)]
        $vis enum $name { $($variant($variant)),+ }
        impl $name {
            /// The whole frame.
            pub fn encode(&self) -> Vec<u8> {
                match self { $($name::$variant(m) => codec::frame($kind, $version, m)),+ }
            }
            /// Reads the payload of a frame whose head said `kind` and `version`.
            pub fn decode(kind: u16, version: u16, payload: &[u8]) -> Result<Self, DecodeError> {
                match (kind, version) {
                    $(($kind, $version) => Ok($name::$variant(codec::from_wire(payload)?)),)+
                    (kind, version) => Err(DecodeError::Unknown { kind, version }),
                }
            }
        }
        $(impl From<$variant> for $name { fn from(m: $variant) -> Self { $name::$variant(m) } })+
    };
}

messages! {
    /// Every frame of the agent and join protocols. Numbers are never reused.
    pub enum Message {
        Hello = 1 v 1,
        Welcome = 2 v 1,
        Refused = 3 v 1,
        Desired = 4 v 1,
        Report = 5 v 1,
        Ping = 6 v 1,
        Pong = 7 v 1,
        JoinRequest = 8 v 1,
        JoinAnswer = 9 v 1,
        LogRequest = 10 v 1,
        LogChunk = 11 v 1,
        RenewRequest = 12 v 1,
        RenewAnswer = 13 v 1,
        ServerJoinRequest = 14 v 1,
        ServerJoinAnswer = 15 v 1,
        Servers = 16 v 1,
        Trust = 17 v 1,
        Trusting = 18 v 1,
        ClockPong = 19 v 1,
        Usage = 20 v 1,
        UsageEvery = 21 v 1,
        HistoryRequest = 22 v 1,
        HistoryAnswer = 23 v 1,
    }
}

/// First frame of an agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// Oldest and newest protocol version the agent speaks.
    pub versions: (u16, u16),
    /// Must equal the node id in the certificate.
    pub node: NodeId,
    /// Generation of the desired set the agent holds (0: none).
    pub generation: u64,
    /// [`NodeFacts`].
    pub facts: Blob,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Welcome {
    pub version: u16,
    pub cluster: ClusterId,
    /// How often the agent must be heard (a report or a pong).
    pub heartbeat: Span,
}

/// Why the other side is sent away. The connection closes after it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Refused {
    pub code: String,
    pub message: String,
}

/// The whole set of allocations a node should hold. Replaces any older one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Desired {
    /// Raft index the set was read at. A set with a generation older than the one held is refused.
    pub generation: u64,
    pub allocs: Vec<DesiredAlloc>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DesiredAlloc {
    pub id: AllocId,
    pub key: WorkloadKey,
    /// Slot of the copy: 0 to copies-1.
    pub index: u32,
    /// Release number the copy belongs to.
    pub release: u64,
    /// False: stop it, keep its records until the server drops it from the set.
    pub run: bool,
    /// Host port of each port of the spec, in the spec's order.
    pub ports: Vec<(String, u16)>,
    /// [`WorkloadSpec`].
    pub spec: Blob,
}

impl DesiredAlloc {
    pub fn spec(&self) -> Result<WorkloadSpec, DecodeError> {
        self.spec.open()
    }
}

/// What changed on a node since the last report (all of it in the first one of a session).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Generation of the desired set the agent works on.
    pub generation: u64,
    /// Each an [`AllocStatus`].
    pub statuses: Vec<Blob>,
    /// Allocations the agent has stopped, cleaned up and forgotten.
    pub gone: Vec<AllocId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ping {
    pub n: u64,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    pub n: u64,
}

/// The CAs an agent shall trust from now on, and no others. After the welcome and at each change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trust {
    /// Grows with each step of each rotation; an agent takes no older word than it has, from a server that lags.
    pub progress: u64,
    /// Certificates in DER, at most [`ROOTS_MAX`]; the one that signs first. An agent whose certificate another one signed
    /// renews it.
    pub roots: Vec<Vec<u8>>,
}

/// What an agent trusts, told once it is durable: after each [`Trust`] and each renewal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trusting {
    /// SHA-256 of each CA certificate it trusts.
    pub roots: Vec<[u8; 32]>,
    /// SHA-256 of the CA certificate that signed the one it holds.
    pub signer: [u8; 32],
}

/// A pong with the agent's clock, from which the server tells how far it is off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockPong {
    pub n: u64,
    /// The agent's wall clock as it answers.
    pub at: Timestamp,
}

/// Redeems a join token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JoinRequest {
    pub versions: (u16, u16),
    /// The secret part of the token.
    pub token_id: String,
    pub secret: String,
    /// PKCS#10 request in DER; only its public key is used.
    pub csr: Vec<u8>,
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JoinAnswer {
    pub cluster: ClusterId,
    pub node: NodeId,
    /// DER.
    pub certificate: Vec<u8>,
    pub ca: Vec<u8>,
}

/// Redeems a server's join token, on the same stream as an agent's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServerJoinRequest {
    /// Oldest and newest version of this exchange.
    pub versions: (u16, u16),
    pub token_id: String,
    pub secret: String,
    /// PKCS#10 request in DER; only its public key is used. The key stays the server's for its life.
    pub csr: Vec<u8>,
    /// MessagePack of what the server says of itself.
    pub server: Blob,
}

/// What makes a server one of the cluster. It holds the root key: sent only to the holder of a server's token.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct ServerJoinAnswer {
    /// The Raft id given to it.
    pub server: u64,
    /// MessagePack of the cluster's row, with the CA's sealed key.
    pub cluster: Blob,
    /// The text of the root key's file.
    pub root_key: Vec<u8>,
    /// The text of the administrator's token.
    pub admin_token: String,
    /// The servers it will talk to, MessagePack.
    pub servers: Blob,
}

impl std::fmt::Debug for ServerJoinAnswer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerJoinAnswer").field("server", &self.server).finish_non_exhaustive()
    }
}

/// A fresh certificate for the same node and the same key, on the control stream. With a certificate
/// that expired it is the first and only message, instead of [`Hello`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RenewRequest {
    pub csr: Vec<u8>,
}
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RenewAnswer {
    pub certificate: Vec<u8>,
    pub ca: Vec<u8>,
}

/// Where the cluster's servers are: after the welcome, and whenever that changes. From [`VERSION_SERVERS`] on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Servers {
    /// `host:port` of each; at most [`SERVERS_MAX`](crate::join_token::SERVERS_MAX), never empty.
    pub addresses: Vec<String>,
}

/// Asks an agent for the output of one allocation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LogRequest {
    pub alloc: AllocId,
    /// Only lines from this time on.
    pub since: Option<Timestamp>,
    /// Only the last so many lines of what is there (0: none; unset: all).
    pub tail: Option<u32>,
    pub follow: bool,
}

/// A run of log lines; the stream's end is the end of the answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LogChunk {
    pub lines: Vec<LogLine>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    pub at: Timestamp,
    /// False: stdout, true: stderr.
    pub stderr: bool,
    pub text: String,
}

// ---- values inside blobs ------------------------------------------------------------------------

/// What an agent says of its host. Stored in replicated state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default, utoipa::ToSchema)]
pub struct NodeFacts {
    /// Host name.
    pub name: String,
    pub version: String,
    pub cpu: Millicores,
    pub memory: Bytes,
    pub arch: String,
    pub kernel: String,
    /// `v1`, `v2`, `hybrid` or `none`.
    pub cgroup: String,
    /// Limits this node cannot enforce and why, empty when all can be.
    #[serde(default)]
    pub unenforced: Vec<String>,
    /// Names of usable drivers.
    #[serde(default)]
    pub drivers: Vec<String>,
    /// First and last port of the dynamic range.
    pub ports: (u16, u16),
    /// Address other hosts and users reach its workloads at.
    pub address: String,
    /// Changes at each boot of the host.
    pub boot_id: String,
    #[serde(default)]
    pub labels: std::collections::BTreeMap<String, String>,
    /// What else the agent found out, by name: `kernel.version`, `os.name`, `driver.nvidia`.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub attributes: std::collections::BTreeMap<String, String>,
    /// The pool it belongs to; unset: `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<crate::Name>,
    /// Size of the disk that workloads use.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub disk: Bytes,
    /// Free of it when the agent connected, for people; what counts is what is reserved.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub disk_free: Bytes,
    /// Kept from workloads, for the host itself.
    #[serde(default, skip_serializing_if = "HostReserve::is_none")]
    pub reserved: HostReserve,
    /// Devices that can be given to copies.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceGroup>,
    /// How busy its CPUs were when it connected, in thousandths, in steps of [`LOAD_STEP`].
    #[serde(default, skip_serializing_if = "is_idle")]
    pub load: u16,
}

/// Coarse, so that an agent's facts do not change each time it connects.
pub const LOAD_STEP: u16 = 250;

fn is_zero(bytes: &Bytes) -> bool {
    bytes.0 == 0
}
fn is_idle(load: &u16) -> bool {
    *load == 0
}

impl NodeFacts {
    /// Without what servers below the cluster version cannot read: all must hold the same rows.
    pub fn at_version(mut self, version: u32) -> NodeFacts {
        if version < 3 {
            self.attributes.clear();
            self.pool = None;
            (self.disk, self.disk_free) = (Bytes(0), Bytes(0));
            self.reserved = HostReserve::default();
            self.devices.clear();
            self.load = 0;
        }
        self
    }
}

/// What a node keeps for itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct HostReserve {
    pub cpu: Millicores,
    pub memory: Bytes,
    #[serde(default)]
    pub disk: Bytes,
}

impl HostReserve {
    pub fn is_none(&self) -> bool {
        *self == HostReserve::default()
    }
}

/// Devices of one kind with the same attributes.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
pub struct DeviceGroup {
    /// `nvidia`
    pub vendor: String,
    /// `gpu`
    #[serde(rename = "type")]
    pub kind: String,
    /// `a100`
    pub name: String,
    /// What names each of them, unique on the node.
    pub ids: Vec<String>,
    /// Paths of character devices of each id, if it has any.
    #[serde(default)]
    pub paths: std::collections::BTreeMap<String, Vec<String>>,
    #[serde(default)]
    pub attributes: std::collections::BTreeMap<String, String>,
}

/// Where a copy stands, as its agent last reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Placed, not yet taken up by the agent.
    Pending,
    /// Being prepared or started.
    Starting,
    /// The process runs.
    Running,
    /// Ended; waits for its next start.
    Backoff,
    /// Asked to stop.
    Stopping,
    /// Stopped as wished. Terminal.
    Stopped,
    /// Cannot run here; the control plane must place another. Terminal.
    Failed,
}

impl Phase {
    pub fn is_terminal(self) -> bool {
        matches!(self, Phase::Stopped | Phase::Failed)
    }
}

/// One allocation as its agent sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AllocStatus {
    pub id: AllocId,
    /// Grows with each change of this status on its node; an older one is ignored.
    pub seq: u64,
    pub phase: Phase,
    /// Readiness passes (or there is no readiness check and it runs).
    pub ready: bool,
    /// Since when it is ready.
    #[serde(default)]
    pub ready_since: Option<Timestamp>,
    /// Why it is not running and ready; unset when all is well.
    #[serde(default)]
    pub reason: Option<Reason>,
    /// Starts so far, less one.
    pub restarts: u32,
    #[serde(default)]
    pub pid: Option<u32>,
    #[serde(default)]
    pub started_at: Option<Timestamp>,
    #[serde(default)]
    pub last_exit: Option<Exit>,
    /// Limits asked for that this node does not enforce (only in `dev` without rights).
    #[serde(default)]
    pub unenforced: Vec<String>,
    /// The last lines of output, sent with failures only. At most [`LAST_LINES_MAX`], each at most [`TEXT_MAX`] bytes.
    #[serde(default)]
    pub last_lines: Vec<String>,
    /// The limits it was started with, or was given since. Unset: an older agent does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Resources>,
}

impl AllocStatus {
    /// Of an allocation of which nothing is known yet.
    pub fn unknown(id: AllocId) -> Self {
        AllocStatus {
            id,
            seq: 0,
            phase: Phase::Pending,
            ready: false,
            ready_since: None,
            reason: None,
            restarts: 0,
            pid: None,
            started_at: None,
            last_exit: None,
            unenforced: vec![],
            last_lines: vec![],
            limits: None,
        }
    }

    /// Why it is not well: its reason, unless that only says what it is doing and the end of its last run says more; with
    /// the last line it printed.
    pub fn trouble(&self) -> Option<Reason> {
        let crashed = self.last_exit.as_ref().filter(|exit| !self.ready && self.restarts > 0 && exit.code != Some(0));
        let reason = match (&self.reason, crashed) {
            // It has only just been started again: a check that fails now says nothing yet.
            (None | Some(Reason::Starting | Reason::NotReady { .. }), Some(exit)) => match exit.oom {
                Some(oom) => Reason::OutOfMemory { exit: exit.clone(), oom },
                None => Reason::Exited { exit: exit.clone() },
            },
            (reason, _) => reason.clone()?,
        };
        match self.last_lines.iter().rev().find(|line| !line.trim().is_empty()) {
            Some(line) if !reason.is_calm() => {
                let line = line.trim().chars().take(LAST_LINE_MAX).collect();
                Some(Reason::LastLine { reason: Box::new(reason), line })
            }
            _ => Some(reason),
        }
    }
}

/// The slot of a release command: the copy in it runs once, as that of a job does, and is called `web-release`.
pub const RELEASE_SLOT: u32 = u32::MAX;
/// Longest last line in a reason, in characters.
const LAST_LINE_MAX: usize = 200;
/// Most log lines that travel with a failure.
pub const LAST_LINES_MAX: usize = 20;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_message_survives_the_round_trip() {
        let message = Message::Ping(Ping { n: 300 });
        let bytes = message.encode();
        let (kind, version, length) = codec::frame_head(bytes[..8].try_into().unwrap()).unwrap();
        assert_eq!(length, bytes.len() - codec::FRAME_HEAD);
        assert_eq!(Message::decode(kind, version, &bytes[8..]).unwrap(), message);
        assert!(Message::decode(999, 1, &[]).is_err());
    }

    #[test]
    fn v1_bytes_still_decode() {
        // Ping { n: 300 } as release 0.1 wrote it.
        assert_eq!(Message::Ping(Ping { n: 300 }).encode(), [7, 0, 0, 0, 6, 0, 1, 0, 251, 44, 1]);
    }

    #[test]
    fn a_status_with_a_nested_reason_survives_msgpack() {
        let exit = Exit { code: Some(1), signal: None, oom: None, at: Timestamp(5), ran_for: Span(7) };
        let status = AllocStatus {
            id: AllocId(uuid::Uuid::from_u128(7)),
            seq: 1,
            phase: Phase::Backoff,
            ready: false,
            ready_since: None,
            reason: Some(Reason::CrashLoop {
                restarts: 3,
                next_start: Timestamp(9),
                last: Box::new(Reason::Exited { exit: exit.clone() }),
            }),
            restarts: 3,
            pid: None,
            started_at: None,
            last_exit: Some(exit),
            unenforced: vec![],
            last_lines: vec!["boom".into()],
            limits: None,
        };
        assert_eq!(Blob::of(&status).open::<AllocStatus>().unwrap(), status);
    }
}
