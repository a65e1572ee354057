//! New entries leave for the followers while the leader is still writing them (Raft dissertation, 10.2.1).
//!
//! openraft 0.9 writes first and sends then, so that a commit costs two flushes one after the other. Here the log store
//! hands new entries over the moment their write has begun; when openraft gets to sending the same request, it finds the
//! answer on its way:
//!
//! ```text
//! log_store.append --> writer: flush ------------------------------> openraft: append_entries --> PeerClient
//!          +--------> Early::send: the same request --> follower: flush --> answer <-- taken ---------+
//! ```
//! What is sent is exactly what openraft sends a moment later: the entries of a leader whose vote is committed and stored,
//! right behind what the follower has confirmed. Whether the leader counts itself is openraft's matter and still waits for
//! its own flush. An answer that is not a plain success is thrown away, and openraft sends as ever.
//!
//! After each commit openraft tells every follower of it in a request without entries. Under load the next entries are
//! about to say the same, so such a request waits a moment for them and is answered by their answer.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::Shared;
use openraft::AsyncRuntime;
use openraft::raft::AppendEntriesResponse;
use tokio::sync::{Notify, oneshot};

use super::super::clock::Clock;
use super::super::runtime::Runtime;
use super::super::types::{AppendRequest, Entry, LogId, Vote};
use super::wire::{Reply, Request};
use super::{Peer, PeerError, PeerRpc, PeerTransport, check_append};

/// An answer to a request sent longer ago is not used: openraft counts the follower's confirmation from when it asks.
const FRESH: Duration = Duration::from_millis(50);

/// Longest time a request without entries waits for some. Clients of a follower wait as much longer for the end of their
/// write when there is no other.
const RIDE: Duration = Duration::from_millis(1);

type Instant = <Runtime as AsyncRuntime>::Instant;

/// What is known of one follower, and what is on its way to it.
struct Lane {
    peer: Peer,
    /// The vote of the leader this server was when the follower answered last.
    vote: Vote,
    /// The entry the follower has confirmed.
    matching: Option<LogId>,
    flying: Option<Flying>,
    /// Something has been sent.
    sent: Arc<Notify>,
}

#[derive(Clone)]
struct Flying {
    sent: Instant,
    vote: Vote,
    prev: Option<LogId>,
    last: LogId,
    commit: Option<LogId>,
    /// Whether the follower has taken all of it.
    taken: Shared<oneshot::Receiver<bool>>,
}

/// Shared by the log store and the clients of all peers. Holds one request a follower at most.
pub(crate) struct Early {
    id: u64,
    transport: Arc<dyn PeerTransport>,
    clock: Arc<Clock>,
    lanes: Mutex<BTreeMap<u64, Lane>>,
}

impl Early {
    pub(crate) fn new(id: u64, transport: Arc<dyn PeerTransport>, clock: Arc<Clock>) -> Self {
        Self { id, transport, clock, lanes: Mutex::default() }
    }

    fn lanes(&self) -> MutexGuard<'_, BTreeMap<u64, Lane>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether `entries` are new ones of this server, which leads by the stored `vote`, and some follower waits for them.
    pub(crate) fn wanted(&self, vote: Option<Vote>, prev: Option<LogId>, entries: &[Entry]) -> bool {
        let Some(vote) = vote.filter(|v| v.committed && v.leader_id.node_id == self.id) else { return false };
        let own = |e: &Entry| e.log_id.leader_id.term == vote.leader_id.term && e.log_id.leader_id.node_id == self.id;
        !entries.is_empty() && entries.iter().all(own) && self.lanes().values().any(|lane| lane.vote == vote && lane.matching == prev)
    }

    /// Sends `entries`, which follow `prev`, to every follower that has confirmed `prev` to the leader by `vote`.
    pub(crate) fn send(&self, vote: Vote, prev: Option<LogId>, commit: Option<LogId>, entries: Vec<Entry>) {
        let Some(last) = entries.last().map(|e| e.log_id) else { return };
        let request = AppendRequest { vote, prev_log_id: prev, leader_commit: commit, entries };
        if check_append(&request).is_err() {
            return; // openraft will be told
        }
        let ttl = self.clock.call_ttl();
        for lane in self.lanes().values_mut().filter(|lane| lane.vote == vote && lane.matching == prev) {
            let body = Request::encode_append(lane.peer.id, &request);
            let call = self.transport.call(lane.peer.clone(), PeerRpc::Append, body, ttl);
            let (told, taken) = oneshot::channel();
            lane.flying = Some(Flying { sent: Instant::now(), vote, prev, last, commit, taken: taken.shared() });
            lane.sent.notify_waiters();
            Runtime::spawn(async move {
                let answer = Runtime::timeout(ttl, call).await.unwrap_or(Err(PeerError::Timeout));
                let answer = answer.and_then(|body| Reply::decode_append(&body));
                // Nobody waits any more when openraft has turned to something else.
                let _ = told.send(matches!(answer, Ok(AppendEntriesResponse::Success)));
            });
        }
    }

    /// The answer to `request` if it was sent already and accepted; otherwise it is to be sent. A `notice` of a commit,
    /// without entries, waits for some that are sent in a moment.
    pub(crate) async fn answer(&self, peer: u64, request: &AppendRequest, notice: bool) -> Option<AppendEntriesResponse<u64>> {
        let flying = match request.entries.last() {
            None if notice => self.ride(peer, request).await?,
            None => return None,
            Some(last) => {
                let flying = self.lanes().get(&peer)?.flying.clone()?;
                let same = flying.vote == request.vote && flying.prev == request.prev_log_id && flying.last == last.log_id;
                (same && Instant::now() - flying.sent <= FRESH).then_some(flying)?
            }
        };
        matches!(flying.taken.await, Ok(true)).then_some(AppendEntriesResponse::Success)
    }

    /// Waits for entries that are sent after this request without entries was made, and say more than it.
    async fn ride(&self, peer: u64, request: &AppendRequest) -> Option<Flying> {
        let confirmed = |lane: &&Lane| lane.vote == request.vote && lane.matching == request.prev_log_id;
        let sent = self.lanes().get(&peer).filter(confirmed)?.sent.clone();
        Runtime::timeout(RIDE, sent.notified()).await.ok()?;
        let flying = self.lanes().get(&peer)?.flying.clone()?;
        let says = flying.vote == request.vote && flying.prev == request.prev_log_id && flying.commit >= request.leader_commit;
        says.then_some(flying)
    }

    /// Notes what `peer` has confirmed to the leader by `vote`.
    pub(crate) fn confirmed(&self, peer: &Peer, request: (Vote, Option<LogId>), answer: &AppendEntriesResponse<u64>) {
        let mut lanes = self.lanes();
        let (vote, matching) = request;
        match (lanes.get_mut(&peer.id), answer) {
            (Some(lane), AppendEntriesResponse::Success) => {
                if lane.vote != vote || lane.matching < matching {
                    (lane.vote, lane.matching) = (vote, matching);
                }
                if lane.peer != *peer {
                    lane.peer.clone_from(peer);
                }
            }
            (None, AppendEntriesResponse::Success) => {
                lanes.insert(peer.id, Lane { peer: peer.clone(), vote, matching, flying: None, sent: Arc::default() });
            }
            // What it holds is to be found out.
            (_, _) => _ = lanes.remove(&peer.id),
        }
    }
}
