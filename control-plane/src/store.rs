//! The replicated state as the rest of the control plane sees it: propose, read, watch.
//!
//! API, gateway and leader loops take a [`Store`] and know nothing of Raft behind it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use optimus_common::Span;
use optimus_common::env::Env;
use optimus_common::ids::RequestId;
use optimus_core::state::{Applied, Command, Proposal, State};
use tokio::sync::watch;

pub use crate::raft::Traffic;

/// Why a command was not (or not known to be) committed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    #[error("the control plane has no leader")]
    NoLeader { retry_after: Span },
    #[error("too many commands are waiting")]
    Overloaded { retry_after: Span },
    #[error("the command was not committed within {0}; it may still take effect")]
    TimedOut(Span),
    /// The leader or its quorum was lost on the way.
    #[error("the control plane lost its leader while the command was under way; it may still take effect")]
    Unknown { retry_after: Span },
    #[error("the server is stopping")]
    Stopping,
}

/// Consensus as far as its users need it. Raft implements it; tests may use a store without Raft.
pub trait Consensus: Send + Sync + 'static {
    /// Commits a command, by way of the leader, and gives what it did; it is then in [`Consensus::state`].
    fn propose(&self, proposal: Proposal) -> Pin<Box<dyn Future<Output = Result<Applied, ProposeError>> + Send + '_>>;
    /// Commits a command if this server leads.
    fn propose_leading(&self, proposal: Proposal) -> Pin<Box<dyn Future<Output = Result<Applied, ProposeError>> + Send + '_>> {
        self.propose(proposal)
    }
    /// The newest state applied on this server. Costs one clone of a few pointers.
    fn state(&self) -> State;
    /// The index applied last; changes wake the loops.
    fn applied(&self) -> watch::Receiver<u64>;
    /// Resolves when this server may answer a linearizable read from [`Consensus::state`].
    fn linearizable(&self) -> Pin<Box<dyn Future<Output = Result<(), ProposeError>> + Send + '_>>;
    fn status(&self) -> ConsensusStatus;
}

/// Where consensus stands on this server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConsensusStatus {
    pub server: u64,
    pub leader: Option<u64>,
    pub term: u64,
    pub last_log: u64,
    pub applied: u64,
    pub voters: u32,
    pub is_leader: bool,
    /// Address of every member of the Raft cluster, learners included.
    pub members: std::collections::BTreeMap<u64, String>,
    /// Time since this server last heard the leader; on the leader, since a quorum last confirmed it. `None`: never yet.
    pub leader_age: Option<Duration>,
    /// What went between this server and the leader.
    pub traffic: Traffic,
}

/// A cheap handle to the replicated state.
#[derive(Clone)]
pub struct Store {
    consensus: Arc<dyn Consensus>,
    pub env: Env,
}

impl Store {
    pub fn new(consensus: Arc<dyn Consensus>, env: Env) -> Self {
        Store { consensus, env }
    }

    /// Commits a command of our own.
    pub async fn propose(&self, command: Command) -> Result<Applied, ProposeError> {
        self.consensus.propose(Proposal { at: self.env.clock.now(), request: None, command }).await
    }

    /// Commits what the leader has decided, unless another leads by now.
    pub async fn propose_leading(&self, command: Command) -> Result<Applied, ProposeError> {
        self.consensus.propose_leading(Proposal { at: self.env.clock.now(), request: None, command }).await
    }

    /// Commits a user's command; a retry with the same id has one effect and gets the same answer.
    pub async fn propose_for(&self, request: RequestId, digest: Vec<u8>, command: Command) -> Result<Applied, ProposeError> {
        self.consensus.propose(Proposal { at: self.env.clock.now(), request: Some((request, digest)), command }).await
    }

    pub fn state(&self) -> State {
        self.consensus.state()
    }

    pub fn applied(&self) -> watch::Receiver<u64> {
        self.consensus.applied()
    }

    /// The state, not older than any write acknowledged before the call.
    pub async fn read(&self) -> Result<State, ProposeError> {
        self.confirm().await?;
        Ok(self.consensus.state())
    }

    /// Resolves when [`Store::state`] is not older than any write acknowledged before the call.
    pub async fn confirm(&self) -> Result<(), ProposeError> {
        self.consensus.linearizable().await
    }

    pub fn status(&self) -> ConsensusStatus {
        self.consensus.status()
    }
}
