//! One server of the replicated control plane: starting, proposing, reading, stopping.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use openraft::error::{ClientWriteError, InitializeError, RaftError};
use openraft::raft::AppendEntriesResponse;
use openraft::{AsyncRuntime, BasicNode};
use optimus_common::disk::Disk;
use tokio::sync::{mpsc, watch};

use super::batcher::{self, Batcher};
use super::clock::Clock;
use super::election::{Elector, Now};
use super::error::{AdminError, ProposeError, ReadError, StartError, StoreError, TransferError};
use super::fatal::Fatal;
use super::forward::{Carrier, Forwarder, Proposer};
use super::log_store::{LogReader, LogStore, WriterHandle};
use super::machine::Machine;
use super::network::{Contacts, Early, Pace, PeerError, PeerHandler, PeerNetwork, PeerRpc, PeerTransport, Reply, Request, check_append};
use super::read_index::{Reader, Rounds};
use super::receiving::Receiver;
use super::route::{Compass, Counters, Heard, Jitter, Patience, Traffic};
use super::runtime::Runtime;
use super::seed::{self, LogEntry};
use super::snapshots::SnapshotStore;
use super::state_machine::{self, StateMachine};
use super::status::Status;
use super::transfer::{self, HandOver};
use super::tuning::Tuning;
use super::types::Raft;
use super::watchdog;

/// What a node is made of.
pub struct RaftConfig<M: Machine> {
    /// This server's id. Never reused, also not after the server is gone: two servers under one id split the cluster.
    pub node_id: u64,
    /// The directory of this server's log and snapshots; nothing else may use it.
    pub disk: Arc<dyn Disk>,
    /// The state at the beginning of the log.
    pub machine: M,
    /// Timers and bounds.
    pub tuning: Tuning,
    /// The way to the other servers.
    pub network: Arc<dyn PeerTransport>,
}

/// A running node; cloning gives another handle on the same one.
pub struct RaftNode<M: Machine> {
    inner: Arc<Inner<M>>,
}

impl<M: Machine> Clone for RaftNode<M> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

struct Inner<M: Machine> {
    id: u64,
    raft: Raft,
    log: LogReader,
    proposer: Proposer<M>,
    reader: Reader,
    heard: Heard,
    applied: watch::Receiver<u64>,
    leads: watch::Receiver<bool>,
    fatal: Fatal,
    tuning: Arc<Tuning>,
    transport: Arc<dyn PeerTransport>,
    contacts: Contacts,
    handler: std::sync::OnceLock<Arc<dyn PeerHandler>>,
    /// Taken by `shutdown`, so that a stopped node holds the disk no more.
    receiver: std::sync::Mutex<Option<Arc<Receiver>>>,
    stop: watch::Sender<bool>,
    /// Taken by the first `shutdown`; the others wait for it on this lock.
    parts: tokio::sync::Mutex<Option<Parts>>,
    /// One membership change at a time: openraft may answer two concurrent ones with success and end in between.
    membership: tokio::sync::Mutex<()>,
    elector: Arc<Elector>,
    /// Shared with the batcher, see there.
    gate: Arc<tokio::sync::Mutex<()>>,
}

struct Parts {
    /// In the order they are waited for.
    tasks: Vec<(&'static str, tokio::task::JoinHandle<()>)>,
    writer: WriterHandle,
}

impl<M: Machine> RaftNode<M> {
    /// Opens the store, restores the state and starts taking part. A single voter leads when this returns, or within
    /// milliseconds.
    ///
    /// # Errors
    /// [`StartError`]; a damaged store names the file, the record and what to do.
    pub async fn start(config: RaftConfig<M>) -> Result<Self, StartError> {
        let RaftConfig { node_id, disk, machine, tuning, network } = config;
        let settings = Arc::new(tuning.openraft()?);
        let tuning = Arc::new(tuning);
        let fatal = Fatal::new();

        let snapshot_disk = disk.clone();
        seed::refuse_half_seeded(&*disk)?;
        let (snapshots, newest) = tuning.io.run(move || SnapshotStore::open(snapshot_disk)).await?;
        let snapshots = Arc::new(snapshots);
        let receiver = Arc::new(Receiver::new(snapshots.disk(), fatal.clone(), tuning.io));
        let (mut log, writer) = LogStore::open(disk, node_id, snapshots.gate(), fatal.clone(), tuning.io).await?;
        let (clock, log_reader) = (Arc::new(Clock::new(&tuning, log.flushes())), log.reader());

        let early = Arc::new(Early::new(node_id, network.clone(), clock.clone()));
        log.send_early(early.clone());

        let at_start = newest.as_ref().and_then(|s| state_machine::mark(&s.meta));
        log.tell_opened(at_start);
        let purged = log.bounds().0.map(|id| id.index);
        let reached = newest.as_ref().and_then(|s| s.meta.last_log_id).map(|id| id.index);
        if let Some(purged) = purged.filter(|p| reached.is_none_or(|r| r < *p)) {
            writer.stop().await;
            return Err(StartError::SnapshotMissing { purged, snapshot: reached.unwrap_or(0) });
        }

        let applied = watch::Sender::new(0);
        let applied_seen = applied.subscribe();
        let snapshot_id = newest.as_ref().map(|s| s.meta.snapshot_id.clone()).unwrap_or_default();
        let machine = match StateMachine::new(machine, newest, snapshots, applied, fatal.clone(), tuning.io) {
            Ok(machine) => machine,
            Err(reason) => {
                writer.stop().await;
                return Err(StartError::Restore { id: snapshot_id, reason });
            }
        };
        let contacts = Contacts::default();
        let (pace, snapshot_ttl) = (Arc::new(Pace::new(tuning.snapshot_rate)), tuning.snapshot_ttl);
        let (transport, contacts_in, clock_in) = (network.clone(), contacts.clone(), clock.clone());
        let peers = PeerNetwork {
            transport,
            snapshot_ttl,
            clock: clock_in,
            contacts: contacts_in,
            early,
            pace,
            io: tuning.io,
            fatal: fatal.clone(),
        };
        let busy = log.busy();
        let raft = match Raft::new(node_id, settings, peers, log, machine).await {
            Ok(raft) => raft,
            Err(e) => {
                writer.stop().await;
                return Err(StartError::Raft(fatal.get().unwrap_or_else(|| e.to_string())));
            }
        };

        let (stop, stopping) = watch::channel(false);
        let (proposals, queue) = mpsc::channel(tuning.queue);
        let gate = Arc::new(tokio::sync::Mutex::new(()));
        let batcher = Batcher::<M> {
            raft: raft.clone(),
            queue,
            stop: stopping.clone(),
            fatal: fatal.clone(),
            tuning: tuning.clone(),
            clock: clock.clone(),
            gate: gate.clone(),
        };
        let batcher = Runtime::spawn(batcher.run());

        let compass = Compass { id: node_id, raft: raft.clone(), transport: network.clone() };
        let (jitter, counters) = (Arc::new(Jitter::new()), Arc::new(Counters::default()));
        let (away, queue) = mpsc::channel(tuning.queue);
        let carrier = Carrier::new(compass.clone(), tuning.clone(), counters.clone());
        let forwarder = Forwarder::<M> { carrier, queue, stop: stopping.clone() };
        let forwarder = Runtime::spawn(forwarder.run());
        let (asks, asked) = mpsc::channel(tuning.queue);
        let rounds = Rounds {
            compass: compass.clone(),
            asks: asked,
            stop: stopping.clone(),
            tuning: tuning.clone(),
            fatal: fatal.clone(),
            counters: counters.clone(),
        };
        let rounds = Runtime::spawn(rounds.run());
        let proposer = Proposer {
            compass: compass.clone(),
            here: proposals,
            away,
            tuning: tuning.clone(),
            fatal: fatal.clone(),
            jitter: jitter.clone(),
            counters: counters.clone(),
        };
        let reader = Reader { compass, asks, fatal: fatal.clone(), jitter, counters };

        let (leads_now, leads) = watch::channel(false);
        let follow = watch_metrics(raft.clone(), clock.clone(), leads_now, stopping.clone(), fatal.clone());
        let guard = watch_core(raft.clone(), busy, receiver.clone(), applied_seen.clone(), stopping.clone(), fatal.clone());
        let watcher = Runtime::spawn(async { _ = tokio::join!(follow, guard) });
        let elector = Arc::new(Elector::new(node_id, raft.clone(), log_reader.clone(), clock, network.clone(), leads.clone()));
        let elections = Runtime::spawn(elector.clone().run(stopping));
        let tasks =
            vec![("elections", elections), ("forwarder", forwarder), ("rounds", rounds), ("batcher", batcher), ("watcher", watcher)];
        let membership = tokio::sync::Mutex::new(());
        let inner = Inner {
            id: node_id,
            raft,
            log: log_reader,
            proposer,
            reader,
            heard: Heard::default(),
            applied: applied_seen,
            leads,
            fatal,
            tuning,
            transport: network,
            contacts,
            handler: std::sync::OnceLock::new(),
            receiver: std::sync::Mutex::new(Some(receiver)),
            stop,
            parts: tokio::sync::Mutex::new(Some(Parts { tasks, writer })),
            membership,
            elector,
            gate,
        };
        let node = Self { inner: Arc::new(inner) };

        // Nobody else can win, so waiting out an election timeout would only delay the start.
        // The metrics do not show the membership yet; openraft's own state does.
        let elected = if node.is_alone().await { node.inner.raft.trigger().elect().await } else { Ok(()) };
        if let Err(e) = elected {
            node.shutdown().await;
            return Err(StartError::Raft(node.reason(e.to_string())));
        }
        Ok(node)
    }

    #[cfg(test)]
    pub(crate) fn raft(&self) -> &Raft {
        &self.inner.raft
    }

    /// This server's id.
    pub fn id(&self) -> u64 {
        self.inner.id
    }

    /// Founds a cluster of this server alone. Idempotent: a server that already is a member does nothing.
    ///
    /// # Errors
    /// See [`AdminError`].
    pub async fn initialize_single(&self, addr: &str) -> Result<(), AdminError> {
        self.initialize(BTreeMap::from([(self.inner.id, addr.to_owned())])).await
    }

    /// Founds a cluster of `members` (id to address); call it on one of them. Idempotent.
    ///
    /// # Errors
    /// [`AdminError::Refused`] when this server is not among the members.
    pub async fn initialize(&self, members: BTreeMap<u64, String>) -> Result<(), AdminError> {
        // Asked first: openraft logs an error when it is told twice.
        if matches!(self.inner.tuning.patiently(self.inner.raft.is_initialized()).await, Some(Ok(true))) {
            return Ok(());
        }
        let members: BTreeMap<u64, BasicNode> = members.into_iter().map(|(id, addr)| (id, BasicNode { addr })).collect();
        match self.inner.tuning.patiently(self.inner.raft.initialize(members)).await {
            None => Err(AdminError::Timeout),
            Some(Ok(())) | Some(Err(RaftError::APIError(InitializeError::NotAllowed(_)))) => Ok(()),
            Some(Err(RaftError::APIError(e))) => Err(AdminError::Refused(e.to_string())),
            Some(Err(RaftError::Fatal(e))) => Err(AdminError::Fatal(self.reason(e.to_string()))),
        }
    }

    /// Replicates one command and gives its log index and answer once it is durable on a quorum and applied here.
    ///
    /// A server that does not lead has the leader propose it, and tries again while that is harmless: for twice the
    /// patience at most, without a leader for three seconds.
    ///
    /// # Errors
    /// See [`ProposeError`] for which of them leave the outcome unknown.
    pub async fn propose(&self, command: M::Command) -> Result<(u64, M::Answer), ProposeError> {
        single(self.propose_many(vec![command]).await?)
    }

    /// Replicates commands that stay together, in order, in one log entry (all or none of them are applied).
    ///
    /// # Errors
    /// [`ProposeError::TooLarge`] above [`MAX_BATCH_COMMANDS`](super::MAX_BATCH_COMMANDS) or
    /// [`MAX_BATCH_BYTES`](super::MAX_BATCH_BYTES); otherwise as [`propose`](Self::propose).
    pub async fn propose_many(&self, commands: Vec<M::Command>) -> Result<(u64, Vec<M::Answer>), ProposeError> {
        let retry_safe = commands.iter().all(M::retry_safe);
        let encoded = batcher::encode::<M>(&commands)?;
        if encoded.is_empty() {
            return Ok((*self.inner.applied.borrow(), Vec::new()));
        }
        let (index, answers, elsewhere) = self.inner.proposer.propose(encoded, retry_safe).await?;
        // Whoever reads this server next shall see what it wrote. It is committed in any case.
        if elsewhere && let Err(error) = self.wait_applied(index).await {
            tracing::warn!(index, %error, "answering a proposal before this server has applied it");
        }
        Ok((index, answers))
    }

    /// Like [`propose`](Self::propose), on this server only: what a leader has decided is void once it leads no more.
    ///
    /// # Errors
    /// [`ProposeError::NoLeader`] at once when this server does not lead.
    pub async fn propose_here(&self, command: M::Command) -> Result<(u64, M::Answer), ProposeError> {
        let encoded = batcher::encode::<M>(&[command])?;
        single(self.inner.proposer.propose_here(encoded).await?)
    }

    /// Waits until this server's state holds every write acknowledged before the call, anywhere, and gives that index.
    /// The leader confirms with a quorum that it leads; another server asks it to, for as long as the patience lasts.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn linearizable(&self) -> Result<u64, ReadError> {
        let mut patience = Patience::new(&self.inner.tuning, self.inner.tuning.patience);
        let index = self.inner.reader.anywhere(&mut patience).await?;
        let applied = Runtime::timeout(patience.left(), self.wait_applied(index)).await;
        applied.unwrap_or(Err(ReadError::Timeout)).map(|()| index)
    }

    /// The index a linearizable read must have seen, confirmed by this server with a quorum.
    ///
    /// # Errors
    /// [`ReadError::NoLeader`] at once when this server does not lead.
    pub async fn read_index(&self) -> Result<u64, ReadError> {
        self.inner.reader.here().await
    }

    /// Waits until this server's state has reached `index`.
    ///
    /// # Errors
    /// [`ReadError::Timeout`] when it has not in time, [`ReadError::Stopped`] or [`ReadError::Fatal`] when it never will.
    pub async fn wait_applied(&self, index: u64) -> Result<(), ReadError> {
        let (mut applied, mut stop) = (self.inner.applied.clone(), self.inner.stop.subscribe());
        let wait = async {
            tokio::select! {
                biased;
                reached = applied.wait_for(|at| *at >= index) => reached.map(drop).map_err(|_| ReadError::Stopped),
                reason = self.inner.fatal.wait() => Err(ReadError::Fatal(reason)),
                _ = stop.wait_for(|s| *s) => Err(ReadError::Stopped),
            }
        };
        self.inner.tuning.patiently(wait).await.unwrap_or(Err(ReadError::Timeout))
    }

    /// Committed entries of `from..=upto`, in order: those that are applied here and not purged yet, about `max_bytes` of
    /// them and at least one. The first one having another index than `from` says that the log has been purged past it.
    ///
    /// # Errors
    /// [`StoreError`]; a damaged log also stops the server.
    pub async fn read_entries(&self, from: u64, upto: u64, max_bytes: usize) -> Result<Vec<LogEntry>, StoreError> {
        let upto = upto.min(*self.inner.applied.borrow());
        if from > upto {
            return Ok(Vec::new());
        }
        let log = self.inner.log.clone();
        let entries = self.inner.tuning.io.run(move || log.read(from, upto, max_bytes)).await?;
        Ok(entries.into_iter().map(LogEntry::from).collect())
    }

    /// Where this node stands.
    pub fn status(&self) -> Status {
        let Inner { raft, contacts, elector, fatal, heard, .. } = &*self.inner;
        Status::new(&raft.metrics().borrow(), heard.age_ms(), contacts.ages_ms(), &elector.clock, fatal.get())
    }

    /// What went between this server and the leader.
    pub fn traffic(&self) -> Traffic {
        self.inner.reader.counters.now()
    }

    /// Index up to which the published state reaches.
    pub fn applied(&self) -> watch::Receiver<u64> {
        self.inner.applied.clone()
    }

    /// Whether this server leads, as far as it knows. For starting and stopping leader loops, never as proof for a read.
    pub fn is_leader(&self) -> watch::Receiver<bool> {
        self.inner.leads.clone()
    }

    /// Resolves with the reason when this server must stop; the owner then exits the process.
    pub async fn fatal(&self) -> String {
        self.inner.fatal.wait().await
    }

    /// Starts a snapshot of what is applied now, in the background.
    ///
    /// # Errors
    /// [`AdminError::Fatal`] when the node has stopped.
    pub async fn trigger_snapshot(&self) -> Result<(), AdminError> {
        self.inner.raft.trigger().snapshot().await.map_err(|e| AdminError::Fatal(self.reason(e.to_string())))
    }

    /// Adds a server without a vote and waits until it is reached and not thousands of entries behind. Gives the log index.
    ///
    /// # Errors
    /// [`AdminError::Timeout`] when that did not happen in time: it stays a learner, call again to wait on.
    pub async fn add_learner(&self, id: u64, addr: &str) -> Result<u64, AdminError> {
        let node = BasicNode { addr: addr.to_owned() };
        self.change(self.inner.raft.add_learner(id, node, true)).await
    }

    /// Adds a server without a vote and waits for the change only, not for the server. Gives the log index.
    ///
    /// # Errors
    /// See [`AdminError`].
    pub async fn start_learner(&self, id: u64, addr: &str) -> Result<u64, AdminError> {
        let node = BasicNode { addr: addr.to_owned() };
        self.change(self.inner.raft.add_learner(id, node, false)).await
    }

    /// Takes a server without a vote out of the cluster. Gives the log index.
    ///
    /// # Errors
    /// See [`AdminError`].
    pub async fn remove_learner(&self, id: u64) -> Result<u64, AdminError> {
        self.change(self.inner.raft.change_membership(openraft::ChangeMembers::RemoveNodes(BTreeSet::from([id])), true)).await
    }

    /// Whether this server is the only one with a vote: then it leads as soon as its disk has taken the vote.
    pub async fn is_alone(&self) -> bool {
        let id = self.inner.id;
        let alone = self.inner.raft.with_raft_state(move |s| s.membership_state.effective().membership().voter_ids().eq([id]));
        alone.await.unwrap_or(false)
    }

    /// Makes exactly `voters` the servers with a vote (through joint consensus); they must be members already. Servers that
    /// lose their vote leave the cluster. Gives the log index.
    ///
    /// # Errors
    /// See [`AdminError`].
    pub async fn change_voters(&self, voters: BTreeSet<u64>) -> Result<u64, AdminError> {
        self.change(self.inner.raft.change_membership(voters, false)).await
    }

    async fn change(
        &self,
        work: impl Future<
            Output = Result<openraft::raft::ClientWriteResponse<super::types::Types>, RaftError<u64, ClientWriteError<u64, BasicNode>>>,
        > + Send,
    ) -> Result<u64, AdminError> {
        let change = async {
            let _one_at_a_time = self.inner.membership.lock().await;
            work.await
        };
        match self.inner.tuning.patiently(change).await {
            None => Err(AdminError::Timeout),
            Some(Ok(response)) => Ok(response.log_id.index),
            Some(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(f)))) => Err(AdminError::NoLeader { leader: f.leader_id }),
            Some(Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(e)))) => Err(AdminError::Refused(e.to_string())),
            Some(Err(RaftError::Fatal(e))) => Err(AdminError::Fatal(self.reason(e.to_string()))),
        }
    }

    fn reason(&self, otherwise: String) -> String {
        self.inner.fatal.get().unwrap_or(otherwise)
    }

    /// Sets who answers the requests that are not Raft's own ([`PeerRpc::Leases`], [`PeerRpc::Admin`]). The first call counts.
    pub fn set_handler(&self, handler: Arc<dyn PeerHandler>) {
        let _ = self.inner.handler.set(handler); // a second handler is a mistake of ours, and the first one keeps working
    }

    /// Asks the server that leads as far as this one knows, `ttl` at most.
    ///
    /// # Errors
    /// [`PeerError::NotSent`] when no leader is known or this server leads itself.
    pub async fn ask_leader(&self, kind: PeerRpc, body: Bytes, ttl: std::time::Duration) -> Result<Bytes, PeerError> {
        let leader = self.inner.reader.compass.leader();
        let leader = leader.ok_or_else(|| PeerError::NotSent("no other server is known to lead".to_owned()))?;
        self.ask(leader, kind, body, ttl).await
    }

    /// Asks another server what its handler answers. An error says nothing about whether it heard.
    ///
    /// # Errors
    /// [`PeerError::NotSent`] when it is no other member.
    pub async fn ask(&self, server: u64, kind: PeerRpc, body: Bytes, ttl: std::time::Duration) -> Result<Bytes, PeerError> {
        let peer = self.inner.reader.compass.peer(server);
        let peer = peer.ok_or_else(|| PeerError::NotSent(format!("server {server} is not known here")))?;
        let call = self.inner.transport.call(peer, kind, body, ttl);
        Runtime::timeout(ttl, call).await.map_err(|_| PeerError::Timeout)?
    }

    /// Answers a request of server `from`, whose identity the transport has proven.
    ///
    /// # Errors
    /// [`PeerError::Refused`] for a malformed request, one meant for another server, one sent in another server's name,
    /// and one that would tear a hole into the log; [`PeerError::Stopped`] when this node has stopped.
    pub async fn handle_peer_rpc(&self, from: u64, kind: PeerRpc, body: Bytes) -> Result<Bytes, PeerError> {
        if let Some(reason) = self.inner.fatal.get() {
            return Err(PeerError::Stopped(reason));
        }
        match kind {
            PeerRpc::Leases | PeerRpc::Admin => {
                let handler = self.inner.handler.get().ok_or_else(|| PeerError::Refused("this server is still starting".to_owned()))?;
                return handler.handle(from, kind, body).await;
            }
            PeerRpc::Propose => return self.inner.proposer.serve(from, &body).await,
            PeerRpc::ReadIndex => return self.inner.reader.serve(from, &body).await,
            PeerRpc::Transfer => return self.inner.elector.handle(self.inner.id, from, &body).await,
            PeerRpc::Append | PeerRpc::Vote | PeerRpc::Snapshot => {}
        }
        let raft = &self.inner.raft;
        let stopped = |e: String| PeerError::Stopped(e);
        let request = Request::decode(self.inner.id, from, kind, &body)?;
        let _heard = request.leader().and_then(|leader| self.inner.elector.hear(leader));
        match request {
            Request::Append(request) => {
                // G3, the receiver's side.
                check_append(&request).map_err(|refusal| PeerError::Refused(refusal.to_string()))?;
                let answer = raft.append_entries(request).await.map_err(|e| stopped(e.to_string()))?;
                if !matches!(answer, AppendEntriesResponse::HigherVote(_)) {
                    self.inner.heard.now();
                }
                Ok(Reply::encode_append(&answer))
            }
            Request::Vote(request) => {
                let answer = self.inner.elector.vote(request).await.map_err(|e| stopped(e.to_string()))?;
                Ok(Reply::encode_vote(&answer))
            }
            Request::Snapshot { vote, part } => {
                let receiver = self.inner.receiver.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let receiver = receiver.ok_or_else(|| stopped("it is shutting down".to_owned()))?;
                receiver.take(raft, vote, part).await
            }
        }
    }

    /// Hands leadership over to `to`, or to the most up-to-date other voter, and gives who leads then. Proposals wait
    /// meanwhile, a second at most, and are then refused with the new leader's id.
    ///
    /// # Errors
    /// See [`TransferError`]; a hand-over that cannot work is refused before anything has stopped.
    pub async fn transfer_leader(&self, to: Option<u64>) -> Result<u64, TransferError> {
        if let Some(reason) = self.inner.fatal.get() {
            return Err(TransferError::Fatal(reason));
        }
        let Inner { id, raft, elector, gate, membership, .. } = &*self.inner;
        HandOver { id: *id, raft, elector, gate, membership }.run(to).await
    }

    /// Stops in the reverse order of the start: a leader hands over first (a second at most), then no new proposals,
    /// openraft, and the writer, which finishes what is queued and closes the file. Returns when all tasks and threads have
    /// ended; idempotent.
    pub async fn shutdown(&self) {
        let mut parts = self.inner.parts.lock().await;
        if parts.is_some() && *self.inner.leads.borrow() {
            // Logged where it happens; without a successor the others elect one.
            let _ = Runtime::timeout(transfer::PAUSE, self.transfer_leader(None)).await;
        }
        self.inner.stop.send_replace(true);
        let Some(Parts { tasks, writer }) = parts.take() else { return };
        for (name, task) in tasks {
            if let Err(e) = task.await {
                tracing::error!(task = name, error = %e, "a raft task did not end well");
            }
        }
        if let Err(e) = self.inner.raft.shutdown().await {
            tracing::error!(error = %e, "openraft did not end well");
        }
        self.inner.receiver.lock().unwrap_or_else(PoisonError::into_inner).take();
        writer.stop().await;
    }
}

fn single<A>((index, mut answers): (u64, Vec<A>)) -> Result<(u64, A), ProposeError> {
    match answers.pop() {
        Some(answer) => Ok((index, answer)),
        None => Err(ProposeError::Fatal("a command came back without an answer".to_owned())),
    }
}

/// Sees to it that openraft's core is alive, and that no half snapshot stays behind.
async fn watch_core(
    raft: Raft,
    busy: impl Fn() -> bool,
    receiver: Arc<Receiver>,
    applied: watch::Receiver<u64>,
    stop: watch::Receiver<bool>,
    fatal: Fatal,
) {
    let ask = || async {
        let committed = raft.with_raft_state(|state| state.committed.map_or(0, |id| id.index)).await;
        committed.map_err(|e| e.to_string())
    };
    watchdog::watch(ask, busy, applied, || receiver.tick(), stop, fatal).await;
}

/// Follows openraft's metrics: tells who leads, and notices when its core has died.
///
/// openraft 0.9 has no check-quorum: a leader cut off from the others goes on believing in itself. Here it counts as leader
/// only while a quorum has confirmed it within an election timeout, so that two servers never run the leader loops for long.
async fn watch_metrics(raft: Raft, clock: Arc<Clock>, leads: watch::Sender<bool>, mut stop: watch::Receiver<bool>, fatal: Fatal) {
    let mut metrics = raft.metrics();
    let mut seen = Now::now();
    loop {
        let (failed, leading) = {
            let m = metrics.borrow_and_update();
            let failed = m.running_state.as_ref().err().map(ToString::to_string);
            let alone = m.membership_config.membership().voter_ids().eq([m.id]);
            // Without a number the leader is new: a quorum has just elected it.
            let confirmed = Duration::from_millis(m.millis_since_quorum_ack.unwrap_or(0)) + (Now::now() - seen);
            let leading = failed.is_none() && m.current_leader == Some(m.id);
            (failed, leading && (alone || confirmed <= clock.timeout_max()))
        };
        leads.send_if_modified(|held| std::mem::replace(held, leading) != leading);
        tokio::select! {
            biased;
            _ = stop.wait_for(|s| *s) => break,
            changed = metrics.changed(), if failed.is_none() => {
                seen = Now::now();
                if changed.is_err() {
                    fatal.raise("openraft has ended");
                    break;
                }
            }
            // The last word ages although openraft says nothing new: its core may be waiting for the disk.
            () = Runtime::sleep(clock.tick() * 2), if failed.is_none() && leading => {}
            // Not stopped by us, so it never heals.
            () = std::future::ready(()), if failed.is_some() => {
                fatal.raise(format!("openraft has failed: {}", failed.unwrap_or_default()));
                break;
            }
        }
    }
    leads.send_replace(false);
}
