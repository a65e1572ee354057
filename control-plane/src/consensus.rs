//! Joins the pure state of `optimus-core` to Raft: the machine Raft drives, and the [`Consensus`] others use.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use optimus_common::Span;
use optimus_core::state::{Applied, Command, Proposal, State};
use tokio::sync::watch;

use crate::raft::{self, Machine, RaftNode};
use crate::store::{Consensus, ConsensusStatus, ProposeError};

/// Longest a proposal or a linearizable read may take before the caller is told; above what the node itself allows.
const DEADLINE: Duration = Duration::from_secs(11);
/// What a caller without a leader is told to wait. An election takes one to two seconds.
const RETRY_AFTER: Span = Span::secs(1);

/// The state as readers see it: replaced after each batch of applies.
struct Published {
    state: RwLock<State>,
    index: watch::Sender<u64>,
}

/// Applies committed proposals to the state.
pub struct CoreMachine {
    state: State,
    published: Arc<Published>,
}

impl Machine for CoreMachine {
    type Command = Proposal;
    type Answer = Applied;

    fn retry_safe(proposal: &Proposal) -> bool {
        // A plan is made from what its maker saw; all others say by their ids whether they were applied before.
        proposal.request.is_some()
            || !matches!(proposal.command, Command::Plan(_) | Command::Deploy { .. } | Command::Restart { .. } | Command::Scale { .. })
    }

    fn apply(&mut self, index: u64, proposal: Proposal) -> Applied {
        self.state.apply(index, proposal)
    }

    fn snapshot(&self) -> Box<dyn FnOnce() -> Vec<u8> + Send> {
        let state = self.state.clone();
        Box::new(move || state.to_bytes())
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.state = State::from_bytes(bytes).map_err(|e| e.to_string())?;
        Ok(())
    }

    fn published(&mut self, index: u64) {
        // A reader that panicked while holding the lock only ever read.
        *self.published.state.write().unwrap_or_else(|e| e.into_inner()) = self.state.clone();
        self.published.index.send_replace(index);
    }
}

/// Raft behind the [`Consensus`] trait.
pub struct RaftConsensus {
    node: RaftNode<CoreMachine>,
    published: Arc<Published>,
}

impl RaftConsensus {
    /// A machine for [`raft::RaftConfig`], and what becomes the consensus once the node runs.
    pub fn machine() -> (CoreMachine, impl FnOnce(RaftNode<CoreMachine>) -> RaftConsensus) {
        let published = Arc::new(Published { state: RwLock::default(), index: watch::Sender::new(0) });
        let machine = CoreMachine { state: State::default(), published: published.clone() };
        (machine, move |node| RaftConsensus { node, published })
    }

    pub fn node(&self) -> &RaftNode<CoreMachine> {
        &self.node
    }
}

impl Consensus for RaftConsensus {
    fn propose(&self, proposal: Proposal) -> Pin<Box<dyn Future<Output = Result<Applied, ProposeError>> + Send + '_>> {
        Box::pin(async move {
            match tokio::time::timeout(DEADLINE, self.node.propose(proposal)).await {
                Err(_) => Err(ProposeError::TimedOut(DEADLINE.into())),
                Ok(Ok((_, applied))) => Ok(applied),
                Ok(Err(error)) => Err(match error {
                    raft::ProposeError::Overloaded => ProposeError::Overloaded { retry_after: RETRY_AFTER },
                    raft::ProposeError::NoLeader { .. } => ProposeError::NoLeader { retry_after: RETRY_AFTER },
                    raft::ProposeError::Unknown | raft::ProposeError::Timeout => ProposeError::TimedOut(DEADLINE.into()),
                    other => {
                        tracing::error!(error = %other, "proposal failed");
                        ProposeError::Stopping
                    }
                }),
            }
        })
    }

    fn state(&self) -> State {
        self.published.state.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    fn applied(&self) -> watch::Receiver<u64> {
        self.published.index.subscribe()
    }

    fn linearizable(&self) -> Pin<Box<dyn Future<Output = Result<(), ProposeError>> + Send + '_>> {
        Box::pin(async move {
            match tokio::time::timeout(DEADLINE, self.node.linearizable()).await {
                Err(_) => Err(ProposeError::TimedOut(DEADLINE.into())),
                Ok(Ok(_)) => Ok(()),
                Ok(Err(error)) => {
                    tracing::debug!(%error, "no linearizable read");
                    Err(ProposeError::NoLeader { retry_after: RETRY_AFTER })
                }
            }
        })
    }

    fn status(&self) -> ConsensusStatus {
        let status = self.node.status();
        ConsensusStatus {
            server: status.node_id,
            leader: status.leader,
            term: status.term,
            last_log: status.last_log.unwrap_or(0),
            applied: status.applied.unwrap_or(0),
            voters: status.voters.len() as u32,
            is_leader: status.leader == Some(status.node_id),
            members: status.members,
        }
    }
}
