//! Who drives heartbeats and elections, and who may have this server's vote.
//!
//! openraft 0.9 fixes its election timers at the start, draws each server's timeout once for its lifetime, stacks the
//! timeout on top of the leader lease and knows neither a pre-vote nor a way through the lease. Its engine is sound and
//! stays as it is; only *when* to stand and *whom to let through to it* is decided here:
//!
//! ```text
//! append, snapshot --heard--> Clock --due--> driver: ask the others first (pre-vote) --quorum--> trigger().elect()
//! request for a vote --> lease of the leader heard, unless that leader allowed it --> openraft (log, term, flush)
//! ```
//! A pre-vote changes nothing anywhere: a server that cannot hear the leader, or that comes back from a partition, does
//! not depose a leader whom the others hear.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use openraft::error::{Fatal as RaftFatal, RaftError};
use openraft::raft::{VoteRequest, VoteResponse};
use openraft::storage::Snapshot;
use openraft::{AsyncRuntime, ServerState};
use rand_core_06::RngCore;
use tokio::sync::watch;

use super::clock::{Clock, Writing};
use super::log_store::LogReader;
use super::network::{Peer, PeerError, PeerRpc, PeerTransport};
use super::runtime::Runtime;
use super::snapshots::SnapshotFile;
use super::transfer::{Consent, Message};
use super::types::{LogId, Membership, Raft, SnapshotMeta, Vote};

pub(crate) type Now = <Runtime as AsyncRuntime>::Instant;

/// The permission of a leader to elect its successor before its lease has run out; good for one vote.
#[derive(Debug)]
struct Allowed {
    leader: Vote,
    target: u64,
    /// On this server's election clock.
    until: Duration,
}

/// One server's part in elections.
pub(crate) struct Elector {
    id: u64,
    raft: Raft,
    log: LogReader,
    pub clock: Arc<Clock>,
    transport: Arc<dyn PeerTransport>,
    /// Whether this server leads and reaches a quorum.
    leads: watch::Receiver<bool>,
    allowed: Mutex<Option<Allowed>>,
}

/// What openraft's core says of itself: the truth, once it has worked off what was queued before.
#[derive(Clone, Debug)]
pub(crate) struct Standing {
    pub vote: Vote,
    pub last: Option<LogId>,
    pub membership: Membership,
}

impl Standing {
    pub(crate) fn voters(&self) -> BTreeMap<u64, Peer> {
        let m = &self.membership;
        let peer = |id| Peer { id, addr: m.get_node(&id).map(|n| n.addr.clone()).unwrap_or_default() };
        m.voter_ids().map(|id| (id, peer(id))).collect()
    }

    /// Whether `agreed` is a majority of every configuration in force.
    pub(crate) fn is_quorum(&self, agreed: &[u64]) -> bool {
        self.membership.get_joint_config().iter().all(|set| set.iter().filter(|id| agreed.contains(id)).count() > set.len() / 2)
    }
}

impl Elector {
    pub(crate) fn new(
        id: u64,
        raft: Raft,
        log: LogReader,
        clock: Arc<Clock>,
        transport: Arc<dyn PeerTransport>,
        leads: watch::Receiver<bool>,
    ) -> Self {
        Self { id, raft, log, clock, transport, leads, allowed: Mutex::default() }
    }

    pub(crate) async fn standing(&self) -> Result<Standing, RaftFatal<u64>> {
        let core = self.raft.with_raft_state(|s| (*s.vote_ref(), s.membership_state.effective().membership().clone()));
        let (vote, membership) = core.await?;
        Ok(Standing { vote, last: self.last(), membership })
    }

    /// The last entry that is durable here.
    pub(crate) fn last(&self) -> Option<LogId> {
        self.log.last()
    }

    /// The loop of a node: heartbeats while it leads, elections while nobody does.
    pub(crate) async fn run(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let stopped = async move { stop.wait_for(|s| *s).await.is_ok() };
        tokio::select! {
            biased;
            _ = stopped => {}
            // Ends only with openraft, and the watcher of its metrics tells everybody.
            e = self.drive() => tracing::debug!(error = %e, "elections end"),
        }
    }

    async fn drive(&self) -> RaftFatal<u64> {
        let mut before = Now::now();
        let mut beat = before;
        // Last moment in which this server did not lead, or led with a quorum.
        let mut sound = before;
        loop {
            let tick = self.clock.tick();
            let (state, voter) = {
                let metrics = self.raft.metrics();
                let m = metrics.borrow();
                (m.state, m.membership_config.membership().voter_ids().any(|id| id == self.id))
            };
            let pause = match state {
                ServerState::Follower | ServerState::Candidate => self.due_in().clamp(Duration::from_millis(1), tick),
                _ => tick,
            };
            Runtime::sleep(pause).await;
            let now = Now::now();
            self.clock.advance(now - before);
            before = now;
            if state != ServerState::Leader || *self.leads.borrow() {
                sound = now;
            }
            let done = match state {
                ServerState::Leader if now - sound > self.clock.timeout_max() => {
                    sound = now;
                    self.step_down().await
                }
                ServerState::Leader => {
                    self.clock.restart();
                    if now < beat {
                        continue;
                    }
                    beat = now + tick * 2;
                    self.heartbeat().await
                }
                ServerState::Follower | ServerState::Candidate if voter && self.due_in().is_zero() => self.stand().await,
                _ => Ok(()),
            };
            if let Err(e) = done {
                return e;
            }
        }
    }

    fn due_in(&self) -> Duration {
        self.clock.due_in(|| Runtime::thread_rng().next_u64())
    }

    /// Sends one heartbeat and waits until openraft has taken it, so that they do not pile up behind a slow flush.
    async fn heartbeat(&self) -> Result<(), RaftFatal<u64>> {
        self.raft.trigger().heartbeat().await?;
        self.raft.with_raft_state(|_| ()).await
    }

    /// Ends an own leadership that reaches no quorum. If only the answers of the others are lost, its heartbeats would keep
    /// them from electing a leader that can commit.
    ///
    /// The term that follows is given to server 0, which does not exist: any candidate of that term comes after it.
    async fn step_down(&self) -> Result<(), RaftFatal<u64>> {
        let standing = self.standing().await?;
        let own = standing.vote.committed && standing.vote.leader_id.node_id == self.id;
        if !own || *self.leads.borrow() {
            return Ok(());
        }
        tracing::warn!(term = standing.vote.leader_id.term, "no quorum confirms this leader, it steps down");
        self.leave_leader(Vote::new(standing.vote.leader_id.term + 1, 0)).await
    }

    /// Stands for election if nobody objects.
    async fn stand(&self) -> Result<(), RaftFatal<u64>> {
        let standing = self.standing().await?;
        // An append of the leader may have been waiting before our question.
        if !self.due_in().is_zero() || !standing.voters().contains_key(&self.id) {
            return Ok(());
        }
        if !self.agreed(&standing).await {
            // Not a whole timeout: it cost nobody anything, and the others may miss the leader a moment later.
            let spread = self.clock.tick() * (1 + Runtime::thread_rng().next_u32() % 3);
            self.clock.put_off(self.clock.tick() + spread);
            return Ok(());
        }
        if !self.due_in().is_zero() {
            return Ok(());
        }
        tracing::info!(term = standing.vote.leader_id.term + 1, "standing for election");
        self.clock.restart();
        self.raft.trigger().elect().await
    }

    /// Asks the other voters whether they would vote for this server. One slow or dead voter holds up nobody: the answer
    /// is known as soon as a quorum agrees.
    async fn agreed(&self, standing: &Standing) -> bool {
        let mut agreed = vec![self.id];
        if standing.is_quorum(&agreed) {
            return true;
        }
        let question = Message::WouldVote { last: standing.last.map(Into::into) };
        let ttl = self.clock.call_ttl();
        let others = standing.voters().into_values().filter(|p| p.id != self.id);
        let mut answers: FuturesUnordered<_> = others.map(|peer| self.ask(peer, &question, ttl)).collect();
        while let Some((id, answer)) = answers.next().await {
            match answer {
                Ok(consent) if consent.agreed => agreed.push(id),
                Ok(consent) => tracing::debug!(peer = id, reason = consent.reason, "no pre-vote"),
                Err(e) => tracing::debug!(peer = id, error = %e, "no answer to a pre-vote"),
            }
            if standing.is_quorum(&agreed) {
                return true;
            }
        }
        false
    }

    /// Sends `message` to `peer` and gives its answer.
    pub(crate) fn ask(
        &self,
        peer: Peer,
        message: &Message,
        ttl: Duration,
    ) -> impl Future<Output = (u64, Result<Consent, PeerError>)> + use<> {
        let id = peer.id;
        let call = self.transport.call(peer, PeerRpc::Transfer, message.encode(id), ttl);
        async move {
            // The transport is told the limit, but a call that ignores it must not hold up an election.
            let answer = Runtime::timeout(ttl, call).await.unwrap_or(Err(PeerError::Timeout));
            (id, answer.and_then(|body| Consent::decode(&body)))
        }
    }

    /// Why this server would not vote for a candidate whose log ends at `last`.
    pub(crate) fn objection(&self, standing: &Standing, last: Option<LogId>) -> Option<String> {
        if let Some(reason) = self.bound_to(standing) {
            return Some(reason);
        }
        (last < standing.last).then(|| "it holds less of the log".to_owned())
    }

    /// Why this server holds to its leader, if it does.
    fn bound_to(&self, standing: &Standing) -> Option<String> {
        let leader = standing.vote.leader_id.node_id;
        if !standing.vote.committed {
            return self.clock.voted_lately().then(|| format!("it has just voted for server {leader}"));
        }
        let held = match leader == self.id {
            true => *self.leads.borrow(),
            false => self.clock.lease_holds(standing.vote),
        };
        held.then(|| format!("server {leader} leads"))
    }

    /// Lets `target` be elected once although `leader` leads, for `ttl`.
    pub(crate) fn allow(&self, leader: Vote, target: u64, ttl: Duration) {
        let allowed = Allowed { leader, target, until: self.clock.now() + ttl };
        *self.allowed.lock().unwrap_or_else(PoisonError::into_inner) = Some(allowed);
    }

    /// Takes the permission of `leader` for `target`, if there is one.
    fn take_permission(&self, leader: Vote, target: u64) -> bool {
        let now = self.clock.now();
        let mut allowed = self.allowed.lock().unwrap_or_else(PoisonError::into_inner);
        allowed.take_if(|a| a.leader == leader && a.target == target && now <= a.until).is_some()
    }

    /// A message of this leader has come and is being worked on until the guard is dropped.
    pub(crate) fn hear(&self, leader: Vote) -> Option<Heard<'_>> {
        if leader < self.raft.metrics().borrow().vote {
            return None; // deposed, and about to learn it
        }
        self.clock.heard(leader);
        Some(Heard { _writing: self.clock.writing(), clock: &self.clock, leader })
    }

    /// Answers a request for a vote.
    pub(crate) async fn vote(&self, request: VoteRequest<u64>) -> Result<VoteResponse<u64>, RaftError<u64>> {
        let standing = self.standing().await.map_err(RaftError::Fatal)?;
        let candidate = request.vote.leader_id.node_id;
        if standing.vote.committed && request.vote > standing.vote {
            let allowed = self.take_permission(standing.vote, candidate);
            if !allowed && let Some(reason) = self.bound_to(&standing) {
                tracing::debug!(candidate, reason, "no vote");
                return Ok(VoteResponse { vote: standing.vote, vote_granted: false, last_log_id: standing.last });
            }
            if request.last_log_id >= standing.last {
                self.leave_leader(request.vote).await.map_err(RaftError::Fatal)?;
            }
        }
        let answer = self.raft.vote(request).await?;
        if answer.vote_granted {
            self.clock.voted();
        }
        Ok(answer)
    }

    /// Moves openraft to a later term, that of a candidate, so that its own lease (which is longer than ours, and knows no exception)
    /// no longer guards the old leader. This is Raft's rule for any message of a higher term and gives no vote: openraft
    /// decides on that next, by log and term, as always.
    ///
    /// The messenger is a snapshot of nothing: openraft takes over the term of every snapshot it is offered, and ignores
    /// one that covers no more than what is committed.
    async fn leave_leader(&self, later: Vote) -> Result<(), RaftFatal<u64>> {
        let nothing = Snapshot { meta: SnapshotMeta::default(), snapshot: Box::new(SnapshotFile::default()) };
        self.raft.install_full_snapshot(later, nothing).await.map(drop)
    }

    /// Starts an election now: the leader wants it.
    pub(crate) async fn take_over(&self) -> Result<(), RaftFatal<u64>> {
        self.clock.restart();
        self.raft.trigger().elect().await
    }
}

/// See [`Elector::hear`]. Dropped, it counts as hearing the leader again: its next message could not come any earlier.
pub(crate) struct Heard<'a> {
    _writing: Writing<'a>,
    clock: &'a Clock,
    leader: Vote,
}

impl Drop for Heard<'_> {
    fn drop(&mut self) {
        self.clock.heard(self.leader);
    }
}
