//! openraft's calls to one peer, through the transport.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use openraft::error::{Fatal, RPCError, RaftError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse};
use openraft::storage::Snapshot;
use openraft::{AsyncRuntime, BasicNode, OptionalSend};

use super::super::runtime::Runtime;
use super::super::types::{AppendRequest, Types, Vote};
use super::wire::{Reply, Request};
use super::{Peer, PeerError, PeerRpc, PeerTransport, check_append};

/// Pause before a peer that could not be reached is tried again.
const RETRY: Duration = Duration::from_millis(100);

type CallError = RPCError<u64, BasicNode, RaftError<u64>>;

/// Makes a client for each peer.
pub(crate) struct PeerNetwork {
    pub transport: Arc<dyn PeerTransport>,
    /// Longest transfer of one snapshot.
    pub snapshot_ttl: Duration,
}

impl RaftNetworkFactory<Types> for PeerNetwork {
    type Network = PeerClient;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> PeerClient {
        let peer = Peer { id: target, addr: node.addr.clone() };
        PeerClient { transport: self.transport.clone(), peer, snapshot_ttl: self.snapshot_ttl }
    }
}

pub(crate) struct PeerClient {
    transport: Arc<dyn PeerTransport>,
    peer: Peer,
    snapshot_ttl: Duration,
}

impl PeerClient {
    async fn call(&self, kind: PeerRpc, body: bytes::Bytes, ttl: Duration) -> Result<bytes::Bytes, PeerError> {
        let call = self.transport.call(self.peer.clone(), kind, body, ttl);
        // The transport is told the limit, but a call that ignores it must not hold up replication.
        Runtime::timeout(ttl, call).await.map_err(|_| PeerError::Timeout)?
    }
}

/// Every failure is "unreachable" to openraft: it then pauses instead of retrying at once.
fn unreachable(e: PeerError) -> CallError {
    RPCError::Unreachable(Unreachable::new(&e))
}

impl RaftNetwork<Types> for PeerClient {
    async fn append_entries(&mut self, rpc: AppendRequest, option: RPCOption) -> Result<AppendEntriesResponse<u64>, CallError> {
        // G3, the sender's side.
        if let Err(refusal) = check_append(&rpc) {
            tracing::warn!(peer = self.peer.id, %refusal, "a stale replication stream was stopped");
            return Err(unreachable(PeerError::Refused(refusal.to_string())));
        }
        let body = Request::encode_append(self.peer.id, &rpc);
        let answer = self.call(PeerRpc::Append, body, option.hard_ttl()).await;
        answer.and_then(|b| Reply::decode_append(&b)).map_err(unreachable)
    }

    async fn vote(&mut self, rpc: VoteRequest<u64>, option: RPCOption) -> Result<VoteResponse<u64>, CallError> {
        let body = Request::encode_vote(self.peer.id, &rpc);
        let answer = self.call(PeerRpc::Vote, body, option.hard_ttl()).await;
        answer.and_then(|b| Reply::decode_vote(&b)).map_err(unreachable)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot<Types>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<u64>, StreamingError<Types, Fatal<u64>>> {
        let body = Request::encode_snapshot(self.peer.id, vote, &snapshot.meta, &snapshot.snapshot.0);
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            answer = self.call(PeerRpc::Snapshot, body, self.snapshot_ttl) => {
                let reply = answer.and_then(|b| Reply::decode_snapshot(&b));
                reply.map_err(|e| StreamingError::Unreachable(Unreachable::new(&e)))
            }
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(RETRY))
    }
}
