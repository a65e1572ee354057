//! How servers talk to each other: openraft's requests as sealed bytes over a [`PeerTransport`].
//!
//! The transport (QUIC with mTLS) authenticates the peer and moves bytes; what the bytes mean, and guard G3, live here.

mod client;
mod early;
pub(crate) mod forwarded;
mod guard;
mod memory;
mod snapshot;
mod wire;

use std::fmt::Debug;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;

pub(crate) use self::client::{Contacts, PeerNetwork};
pub(crate) use self::early::Early;
pub use self::guard::{Refusal, check_append};
pub use self::memory::MemoryNetwork;
pub(crate) use self::snapshot::{PART, Pace};
pub(crate) use self::wire::{Reply, Request, SnapshotKey, SnapshotPart, SnapshotProgress};

/// A server to call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its id; the transport must check that the certificate says the same.
    pub id: u64,
    /// Its address as the membership has it.
    pub addr: String,
}

/// The kinds of request. The numbers are on the wire and are never reused.
///
/// `Snapshot` bodies hold up to 1 MiB; a transport gives each request a stream of its own, so that a snapshot never
/// blocks a heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum PeerRpc {
    /// Log entries and heartbeats.
    Append = 1,
    /// A request for a vote.
    Vote = 2,
    /// A part of a snapshot.
    Snapshot = 3,
    /// Commands that the leader shall commit for another server.
    Propose = 4,
    /// The index a linearizable read must have reached.
    ReadIndex = 5,
    /// Around an election: the hand-over of leadership, and the question before one stands.
    Transfer = 6,
    /// Of a server to the leader: which agents it hears.
    Leases = 7,
    /// Of a server to the leader, for a person: how the cluster is, and who shall lead.
    Admin = 8,
}

impl TryFrom<u8> for PeerRpc {
    type Error = PeerError;

    fn try_from(number: u8) -> Result<Self, PeerError> {
        match number {
            1 => Ok(Self::Append),
            2 => Ok(Self::Vote),
            3 => Ok(Self::Snapshot),
            4 => Ok(Self::Propose),
            5 => Ok(Self::ReadIndex),
            6 => Ok(Self::Transfer),
            7 => Ok(Self::Leases),
            8 => Ok(Self::Admin),
            _ => Err(PeerError::Refused(format!("unknown peer request {number}"))),
        }
    }
}

/// Why a call to a peer failed. openraft retries all of them after a pause.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// Nothing of the request was sent: there is no connection. What was asked has certainly not happened.
    #[error("peer is unreachable: {0}")]
    NotSent(String),
    /// No connection, or it broke; the request may have arrived.
    #[error("peer is unreachable: {0}")]
    Unreachable(String),
    /// No answer in time.
    #[error("peer did not answer in time")]
    Timeout,
    /// The request is malformed, meant for another server, or would damage the log.
    #[error("peer refused: {0}")]
    Refused(String),
    /// The peer is stopping or has failed.
    #[error("peer has stopped: {0}")]
    Stopped(String),
}

/// Moves one request to a peer and its answer back.
pub trait PeerTransport: Send + Sync + Debug + 'static {
    /// Calls `to` and waits for the answer, `ttl` at most. The other side passes the body to
    /// [`RaftNode::handle_peer_rpc`](super::RaftNode::handle_peer_rpc).
    fn call(&self, to: Peer, kind: PeerRpc, body: Bytes, ttl: Duration) -> BoxFuture<'static, Result<Bytes, PeerError>>;
}

/// Answers what peers ask beside Raft's own requests; see [`RaftNode::set_handler`](super::RaftNode::set_handler).
pub trait PeerHandler: Send + Sync + 'static {
    /// Answers one request of server `from`, whose identity the transport has proven.
    fn handle(&self, from: u64, kind: PeerRpc, body: Bytes) -> BoxFuture<'static, Result<Bytes, PeerError>>;
}

/// The transport of a server without peers: reaches nobody.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoPeers;

impl PeerTransport for NoPeers {
    fn call(&self, to: Peer, _: PeerRpc, _: Bytes, _: Duration) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        Box::pin(async move { Err(PeerError::Unreachable(format!("this server has no transport to reach server {}", to.id))) })
    }
}
