//! openraft's calls to one peer, through the transport.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use openraft::error::{Fatal, RPCError, RaftError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse};
use openraft::storage::Snapshot;
use openraft::{AsyncRuntime, BasicNode, OptionalSend};

use super::super::IoMode;
use super::super::clock::Clock;
use super::super::fatal::Fatal as Signal;
use super::super::runtime::Runtime;
use super::super::types::{AppendRequest, LogId, Types, Vote};
use super::wire::{Reply, Request};
use super::{Early, Pace, Peer, PeerError, PeerRpc, PeerTransport, check_append};

/// Pause before a peer that could not be reached is tried again. Short: it is also how long a peer that is back, or whose
/// message was lost, waits for its next heartbeat.
pub(super) const RETRY: Duration = Duration::from_millis(50);

type CallError = RPCError<u64, BasicNode, RaftError<u64>>;

/// Makes a client for each peer.
pub(crate) struct PeerNetwork {
    pub transport: Arc<dyn PeerTransport>,
    /// Longest time without progress in sending a snapshot.
    pub snapshot_ttl: Duration,
    /// Says how long an append or a vote may take.
    pub clock: Arc<Clock>,
    pub contacts: Contacts,
    /// Entries that are on their way before openraft sends them.
    pub early: Arc<Early>,
    /// Shared by all peers: how fast snapshots leave this server.
    pub pace: Arc<Pace>,
    pub io: IoMode,
    pub fatal: Signal,
}

type Instant = <Runtime as AsyncRuntime>::Instant;

/// When each peer last answered this server.
#[derive(Clone, Default)]
pub(crate) struct Contacts(Arc<Mutex<BTreeMap<u64, Instant>>>);

impl Contacts {
    fn heard(&self, peer: u64) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(peer, Instant::now());
    }

    /// Milliseconds since each peer answered.
    pub(crate) fn ages_ms(&self) -> BTreeMap<u64, u64> {
        let now = Instant::now();
        let ages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ages.iter().map(|(peer, at)| (*peer, u64::try_from((now - *at).as_millis()).unwrap_or(u64::MAX))).collect()
    }
}

impl RaftNetworkFactory<Types> for PeerNetwork {
    type Network = PeerClient;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> PeerClient {
        let peer = Peer { id: target, addr: node.addr.clone() };
        let (transport, pace, fatal) = (self.transport.clone(), self.pace.clone(), self.fatal.clone());
        let (snapshot_ttl, clock, contacts, early) = (self.snapshot_ttl, self.clock.clone(), self.contacts.clone(), self.early.clone());
        PeerClient { transport, peer, snapshot_ttl, clock, contacts, early, sends_entries: false, told: None, pace, io: self.io, fatal }
    }
}

pub(crate) struct PeerClient {
    transport: Arc<dyn PeerTransport>,
    pub(super) peer: Peer,
    pub(super) snapshot_ttl: Duration,
    pub(super) pace: Arc<Pace>,
    pub(super) io: IoMode,
    pub(super) fatal: Signal,
    clock: Arc<Clock>,
    contacts: Contacts,
    early: Arc<Early>,
    /// Whether it has sent entries.
    sends_entries: bool,
    /// The newest commit it has spoken of.
    told: Option<LogId>,
}

impl PeerClient {
    pub(super) async fn call(&self, kind: PeerRpc, body: bytes::Bytes, ttl: Duration) -> Result<bytes::Bytes, PeerError> {
        let call = self.transport.call(self.peer.clone(), kind, body, ttl);
        // The transport is told the limit, but a call that ignores it must not hold up replication.
        let answer = Runtime::timeout(ttl, call).await.map_err(|_| PeerError::Timeout)?;
        if answer.is_ok() {
            self.contacts.heard(self.peer.id);
        }
        answer
    }
}

/// Every failure is "unreachable" to openraft: it then pauses instead of retrying at once.
fn unreachable(e: PeerError) -> CallError {
    RPCError::Unreachable(Unreachable::new(&e))
}

impl RaftNetwork<Types> for PeerClient {
    async fn append_entries(&mut self, rpc: AppendRequest, _: RPCOption) -> Result<AppendEntriesResponse<u64>, CallError> {
        // G3, the sender's side.
        if let Err(refusal) = check_append(&rpc) {
            tracing::warn!(peer = self.peer.id, %refusal, "a stale replication stream was stopped");
            return Err(unreachable(PeerError::Refused(refusal.to_string())));
        }
        // Not so heartbeats, and what a read asks by a client of its own: they must not wait.
        let notice = self.sends_entries && rpc.entries.is_empty() && rpc.leader_commit > self.told;
        self.sends_entries |= !rpc.entries.is_empty();
        self.told = self.told.max(rpc.leader_commit);
        let matching = (rpc.vote, rpc.entries.last().map(|e| e.log_id).or(rpc.prev_log_id));
        let answer = match self.early.answer(self.peer.id, &rpc, notice).await {
            Some(answer) => {
                self.contacts.heard(self.peer.id);
                answer
            }
            None => {
                let body = Request::encode_append(self.peer.id, &rpc);
                let answer = self.call(PeerRpc::Append, body, self.clock.call_ttl()).await;
                answer.and_then(|b| Reply::decode_append(&b)).map_err(unreachable)?
            }
        };
        self.early.confirmed(&self.peer, matching, &answer);
        Ok(answer)
    }

    async fn vote(&mut self, rpc: VoteRequest<u64>, _: RPCOption) -> Result<VoteResponse<u64>, CallError> {
        let body = Request::encode_vote(self.peer.id, &rpc);
        let answer = self.call(PeerRpc::Vote, body, self.clock.call_ttl()).await;
        answer.and_then(|b| Reply::decode_vote(&b)).map_err(unreachable)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot<Types>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<u64>, StreamingError<Types, Fatal<u64>>> {
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            sent = self.send_snapshot(vote, snapshot) => match sent {
                Ok(vote) => Ok(SnapshotResponse { vote }),
                Err(e) => Err(StreamingError::Unreachable(Unreachable::new(&e))),
            },
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(RETRY))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::future::BoxFuture;
    use openraft::{CommittedLeaderId, EntryPayload, LogId};

    use super::*;

    #[derive(Debug, Default)]
    struct Counting(AtomicUsize);

    impl PeerTransport for Counting {
        fn call(&self, _: Peer, _: PeerRpc, _: bytes::Bytes, _: Duration) -> BoxFuture<'static, Result<bytes::Bytes, PeerError>> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Box::pin(async { Ok(Reply::encode_append(&AppendEntriesResponse::Success)) })
        }
    }

    /// Guard G3 at the sender: what would tear a hole into the peer's log is never sent.
    #[tokio::test]
    async fn g3_an_append_with_a_hole_is_not_sent() {
        let transport = Arc::new(Counting::default());
        let mut network = PeerNetwork {
            transport: transport.clone(),
            snapshot_ttl: Duration::from_secs(1),
            clock: Arc::new(Clock::new(&crate::raft::Tuning::fast(), Arc::default())),
            contacts: Contacts::default(),
            early: Arc::new(Early::new(1, transport.clone(), Arc::new(Clock::new(&crate::raft::Tuning::fast(), Arc::default())))),
            pace: Arc::new(Pace::new(1 << 20)),
            io: IoMode::Inline,
            fatal: Signal::new(),
        };
        let mut client = network.new_client(2, &BasicNode::default()).await;
        let request = |term, index| AppendRequest {
            vote: Vote::new_committed(5, 1),
            prev_log_id: None,
            entries: vec![openraft::Entry { log_id: LogId::new(CommittedLeaderId::new(term, 1), index), payload: EntryPayload::Blank }],
            leader_commit: None,
        };
        let option = || RPCOption::new(Duration::from_secs(1));
        for (term, index) in [(5, 3), (6, 0)] {
            let refused = client.append_entries(request(term, index), option()).await;
            assert!(matches!(refused, Err(RPCError::Unreachable(_))), "{refused:?}");
        }
        assert_eq!(transport.0.load(Ordering::Relaxed), 0);
        client.append_entries(request(5, 0), option()).await.unwrap();
        assert_eq!(transport.0.load(Ordering::Relaxed), 1);
    }
}
