//! One server of the replicated control plane: starting, proposing, reading, stopping.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use openraft::error::{CheckIsLeaderError, ClientWriteError, InitializeError, RaftError};
use openraft::storage::Snapshot;
use openraft::{AsyncRuntime, BasicNode};
use optimus_common::disk::Disk;
use tokio::sync::{mpsc, oneshot, watch};

use super::batcher::{self, Batcher, Proposal};
use super::error::{AdminError, ProposeError, ReadError, StartError};
use super::fatal::Fatal;
use super::log_store::{LogStore, WriterHandle};
use super::machine::Machine;
use super::network::{Contacts, Peer, PeerError, PeerHandler, PeerNetwork, PeerRpc, PeerTransport, Reply, Request, check_append};
use super::runtime::Runtime;
use super::snapshots::SnapshotStore;
use super::state_machine::StateMachine;
use super::status::Status;
use super::tuning::Tuning;
use super::types::{Raft, SnapshotBytes};

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
    proposals: mpsc::Sender<Proposal<M::Answer>>,
    applied: watch::Receiver<u64>,
    leads: watch::Receiver<bool>,
    fatal: Fatal,
    tuning: Arc<Tuning>,
    transport: Arc<dyn PeerTransport>,
    contacts: Contacts,
    handler: std::sync::OnceLock<Arc<dyn PeerHandler>>,
    stop: watch::Sender<bool>,
    /// Taken by the first `shutdown`; the others wait for it on this lock.
    parts: tokio::sync::Mutex<Option<Parts>>,
    /// One membership change at a time: openraft may answer two concurrent ones with success and end in between.
    membership: tokio::sync::Mutex<()>,
}

struct Parts {
    batcher: tokio::task::JoinHandle<()>,
    watcher: tokio::task::JoinHandle<()>,
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
        let (snapshots, newest) = tuning.io.run(move || SnapshotStore::open(snapshot_disk)).await?;
        let snapshots = Arc::new(snapshots);
        let (log, writer) = LogStore::open(disk, node_id, snapshots.gate(), fatal.clone(), tuning.io).await?;

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
        let peers = PeerNetwork { transport: network.clone(), snapshot_ttl: tuning.snapshot_ttl, contacts: contacts.clone() };
        let raft = match Raft::new(node_id, settings, peers, log, machine).await {
            Ok(raft) => raft,
            Err(e) => {
                writer.stop().await;
                return Err(StartError::Raft(fatal.get().unwrap_or_else(|| e.to_string())));
            }
        };

        let (stop, stopping) = watch::channel(false);
        let (proposals, queue) = mpsc::channel(tuning.queue);
        let batcher = Batcher::<M> { raft: raft.clone(), queue, stop: stopping.clone(), fatal: fatal.clone(), tuning: tuning.clone() };
        let batcher = Runtime::spawn(batcher.run());
        let (leads_now, leads) = watch::channel(false);
        let watcher = Runtime::spawn(watch_metrics(raft.clone(), leads_now, stopping, fatal.clone()));
        let parts = tokio::sync::Mutex::new(Some(Parts { batcher, watcher, writer }));
        let membership = tokio::sync::Mutex::new(());
        let inner = Inner {
            id: node_id,
            raft,
            proposals,
            applied: applied_seen,
            leads,
            fatal,
            tuning,
            transport: network,
            contacts,
            handler: std::sync::OnceLock::new(),
            stop,
            parts,
            membership,
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
    /// # Errors
    /// See [`ProposeError`] for which of them leave the outcome unknown.
    pub async fn propose(&self, command: M::Command) -> Result<(u64, M::Answer), ProposeError> {
        let (index, mut answers) = self.propose_many(vec![command]).await?;
        match answers.pop() {
            Some(answer) => Ok((index, answer)),
            None => Err(ProposeError::Fatal("a command came back without an answer".to_owned())),
        }
    }

    /// Replicates commands that stay together, in order, in one log entry (all or none of them are applied).
    ///
    /// # Errors
    /// [`ProposeError::TooLarge`] above [`MAX_BATCH_COMMANDS`](super::MAX_BATCH_COMMANDS) or
    /// [`MAX_BATCH_BYTES`](super::MAX_BATCH_BYTES); otherwise as [`propose`](Self::propose).
    pub async fn propose_many(&self, commands: Vec<M::Command>) -> Result<(u64, Vec<M::Answer>), ProposeError> {
        let commands = batcher::encode::<M>(&commands)?;
        if commands.is_empty() {
            return Ok((*self.inner.applied.borrow(), Vec::new()));
        }
        let (reply, answer) = oneshot::channel();
        self.inner.proposals.try_send(Proposal { commands, reply }).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => ProposeError::Overloaded,
            mpsc::error::TrySendError::Closed(_) => self.stopped(),
        })?;
        answer.await.unwrap_or_else(|_| Err(self.stopped()))
    }

    fn stopped(&self) -> ProposeError {
        self.inner.fatal.get().map_or(ProposeError::Stopped, ProposeError::Fatal)
    }

    /// Confirms with a quorum that this server leads and waits until its state holds every write acknowledged before the
    /// call, anywhere. Gives that index.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn linearizable(&self) -> Result<u64, ReadError> {
        let index = self.read_index().await?;
        self.wait_applied(index).await?;
        Ok(index)
    }

    /// Like [`linearizable`](Self::linearizable), without waiting for this server's own state: a follower asks the leader
    /// for it, waits with [`wait_applied`](Self::wait_applied), and then reads its own state.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub async fn read_index(&self) -> Result<u64, ReadError> {
        match self.inner.tuning.patiently(self.inner.raft.get_read_log_id()).await {
            None => Err(ReadError::Timeout),
            Some(Ok((read, _))) => Ok(read.map_or(0, |id| id.index)),
            Some(Err(RaftError::APIError(CheckIsLeaderError::ForwardToLeader(f)))) => Err(ReadError::NoLeader { leader: f.leader_id }),
            Some(Err(RaftError::APIError(CheckIsLeaderError::QuorumNotEnough(_)))) => Err(ReadError::NoLeader { leader: None }),
            Some(Err(RaftError::Fatal(e))) => Err(match self.inner.fatal.get() {
                Some(reason) => ReadError::Fatal(reason),
                None if matches!(e, openraft::error::Fatal::Stopped) => ReadError::Stopped,
                None => ReadError::Fatal(e.to_string()),
            }),
        }
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

    /// Where this node stands.
    pub fn status(&self) -> Status {
        Status::new(&self.inner.raft.metrics().borrow(), self.inner.contacts.ages_ms(), self.inner.fatal.get())
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

    /// Makes another voter the leader.
    pub async fn transfer_leader(&self, _to: Option<u64>) -> Result<u64, AdminError> {
        Err(AdminError::Refused("not yet".to_owned()))
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
    /// [`PeerError::Unreachable`] when no leader is known or this server leads itself.
    pub async fn ask_leader(&self, kind: PeerRpc, body: Bytes, ttl: std::time::Duration) -> Result<Bytes, PeerError> {
        let leader = {
            let metrics = self.inner.raft.metrics();
            let m = metrics.borrow();
            m.current_leader.filter(|l| *l != self.inner.id).and_then(|id| {
                let node = m.membership_config.membership().get_node(&id)?;
                Some(Peer { id, addr: node.addr.clone() })
            })
        };
        let leader = leader.ok_or_else(|| PeerError::Unreachable("no other server is known to lead".to_owned()))?;
        let call = self.inner.transport.call(leader, kind, body, ttl);
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
        if matches!(kind, PeerRpc::Leases | PeerRpc::Admin) {
            let handler = self.inner.handler.get().ok_or_else(|| PeerError::Refused("this server is still starting".to_owned()))?;
            return handler.handle(from, kind, body).await;
        }
        let raft = &self.inner.raft;
        let stopped = |e: String| PeerError::Stopped(e);
        match Request::decode(self.inner.id, from, kind, &body)? {
            Request::Append(request) => {
                // G3, the receiver's side.
                check_append(&request).map_err(|refusal| PeerError::Refused(refusal.to_string()))?;
                let answer = raft.append_entries(request).await.map_err(|e| stopped(e.to_string()))?;
                Ok(Reply::encode_append(&answer))
            }
            Request::Vote(request) => {
                let answer = raft.vote(request).await.map_err(|e| stopped(e.to_string()))?;
                Ok(Reply::encode_vote(&answer))
            }
            Request::Snapshot { vote, snapshot } => {
                let snapshot = Snapshot { meta: snapshot.meta, snapshot: Box::new(SnapshotBytes(snapshot.content)) };
                let answer = raft.install_full_snapshot(vote, snapshot).await.map_err(|e| stopped(e.to_string()))?;
                Ok(Reply::encode_snapshot(&answer))
            }
        }
    }

    /// Stops in the reverse order of the start: no new proposals, openraft, then the writer, which finishes what is queued
    /// and closes the file. Returns when all tasks and threads have ended; idempotent.
    pub async fn shutdown(&self) {
        self.inner.stop.send_replace(true);
        let mut parts = self.inner.parts.lock().await;
        let Some(Parts { batcher, watcher, writer }) = parts.take() else { return };
        for (name, task) in [("batcher", batcher), ("watcher", watcher)] {
            if let Err(e) = task.await {
                tracing::error!(task = name, error = %e, "a raft task did not end well");
            }
        }
        if let Err(e) = self.inner.raft.shutdown().await {
            tracing::error!(error = %e, "openraft did not end well");
        }
        writer.stop().await;
    }
}

/// Follows openraft's metrics: tells who leads, and notices when its core has died.
async fn watch_metrics(raft: Raft, leads: watch::Sender<bool>, mut stop: watch::Receiver<bool>, fatal: Fatal) {
    let mut metrics = raft.metrics();
    loop {
        let failed = {
            let m = metrics.borrow_and_update();
            let failed = m.running_state.as_ref().err().map(ToString::to_string);
            let now = failed.is_none() && m.current_leader == Some(m.id);
            leads.send_if_modified(|held| std::mem::replace(held, now) != now);
            failed
        };
        tokio::select! {
            biased;
            _ = stop.wait_for(|s| *s) => break,
            changed = metrics.changed(), if failed.is_none() => {
                if changed.is_err() {
                    fatal.raise("openraft has ended");
                    break;
                }
            }
            // Not stopped by us, so it never heals.
            () = std::future::ready(()), if failed.is_some() => {
                fatal.raise(format!("openraft has failed: {}", failed.unwrap_or_default()));
                break;
            }
        }
    }
    leads.send_replace(false);
}
