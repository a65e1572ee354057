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

/// Longest a proposal may take before the caller is told.
const WRITE_DEADLINE: Duration = Duration::from_secs(10);
/// Longest a linearizable read may take.
const READ_DEADLINE: Duration = Duration::from_secs(5);
/// What a caller without a leader is told to wait. An election takes one to two seconds.
const RETRY_AFTER: Span = Span::secs(1);

/// The state as readers see it: replaced after each batch of applies.
struct Published {
    state: RwLock<State>,
    index: watch::Sender<u64>,
}

/// Sees what happens to the state of one server, as it happens. For the simulator.
pub trait Observer: Send + Sync + 'static {
    /// A proposal was applied; `state` is the state after it.
    fn applied(&self, index: u64, proposal: &Proposal, answer: &Applied, state: &State);
    /// The state was replaced by a snapshot's.
    fn restored(&self, state: &State);
}

/// Applies committed proposals to the state.
pub struct CoreMachine {
    state: State,
    published: Arc<Published>,
    observer: Option<Arc<dyn Observer>>,
}

impl Machine for CoreMachine {
    type Command = Proposal;
    type Answer = Applied;

    fn apply(&mut self, index: u64, proposal: Proposal) -> Applied {
        let Some(observer) = &self.observer else { return self.state.apply(index, proposal) };
        let answer = self.state.apply(index, proposal.clone());
        observer.applied(index, &proposal, &answer, &self.state);
        answer
    }

    fn retry_safe(proposal: &Proposal) -> bool {
        // Not so: what sets a value that another command may have set since (a node that was down is up again, a
        // certificate has a successor). Its proposer looks again before it repeats it.
        let by_nature = match &proposal.command {
            // An older status than the one held is passed over.
            Command::Report { .. } => true,
            // A node said to be up that is not is found out by its lease.
            Command::NodeUp { .. } => true,
            // Ids are never used again.
            Command::RevokeToken { .. } => true,
            _ => false,
        };
        by_nature || proposal.request.is_some()
    }

    fn snapshot(&self) -> Box<dyn FnOnce() -> Vec<u8> + Send> {
        let state = self.state.clone();
        Box::new(move || state.to_bytes())
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.state = State::from_bytes(bytes).map_err(|e| e.to_string())?;
        if let Some(observer) = &self.observer {
            observer.restored(&self.state);
        }
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
        Self::machine_seen_by(None)
    }

    /// The same, with somebody who sees every change of the state.
    pub fn machine_seen_by(observer: Option<Arc<dyn Observer>>) -> (CoreMachine, impl FnOnce(RaftNode<CoreMachine>) -> RaftConsensus) {
        let published = Arc::new(Published { state: RwLock::default(), index: watch::Sender::new(0) });
        let machine = CoreMachine { state: State::default(), published: published.clone(), observer };
        (machine, move |node| RaftConsensus { node, published })
    }

    pub fn node(&self) -> &RaftNode<CoreMachine> {
        &self.node
    }
}

impl Consensus for RaftConsensus {
    fn propose(&self, proposal: Proposal) -> Pin<Box<dyn Future<Output = Result<Applied, ProposeError>> + Send + '_>> {
        Box::pin(async move {
            let proposed = tokio::time::timeout(WRITE_DEADLINE, self.node.propose(proposal)).await;
            answer(proposed.unwrap_or(Err(raft::ProposeError::Timeout)))
        })
    }

    fn propose_leading(&self, proposal: Proposal) -> Pin<Box<dyn Future<Output = Result<Applied, ProposeError>> + Send + '_>> {
        Box::pin(async move {
            let proposed = tokio::time::timeout(WRITE_DEADLINE, self.node.propose_here(proposal)).await;
            answer(proposed.unwrap_or(Err(raft::ProposeError::Timeout)))
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
            let read = tokio::time::timeout(READ_DEADLINE, self.node.linearizable()).await;
            match read.unwrap_or(Err(raft::ReadError::Timeout)) {
                Ok(_) => Ok(()),
                Err(raft::ReadError::Overloaded) => Err(ProposeError::Overloaded { retry_after: RETRY_AFTER }),
                Err(raft::ReadError::Stopped) => Err(ProposeError::Stopping),
                Err(error) => {
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
            leader_age: status.leader_age_ms.map(Duration::from_millis),
            traffic: self.node.traffic(),
        }
    }
}

/// Consensus' answer in the words of its users.
fn answer(proposed: Result<(u64, Applied), raft::ProposeError>) -> Result<Applied, ProposeError> {
    let error = match proposed {
        Ok((_, applied)) => return Ok(applied),
        Err(error) => error,
    };
    Err(match error {
        raft::ProposeError::Overloaded => ProposeError::Overloaded { retry_after: RETRY_AFTER },
        raft::ProposeError::NoLeader { .. } => ProposeError::NoLeader { retry_after: RETRY_AFTER },
        raft::ProposeError::Timeout | raft::ProposeError::Unknown => ProposeError::Unknown { retry_after: RETRY_AFTER },
        raft::ProposeError::Stopped => ProposeError::Stopping,
        other => {
            tracing::error!(error = %other, "proposal failed");
            ProposeError::Stopping
        }
    })
}

#[cfg(test)]
mod tests {
    use optimus_common::ids::RequestId;
    use optimus_common::{NodeId, Timestamp};

    use super::*;

    #[test]
    fn only_what_may_be_applied_twice_is_sent_twice() {
        let node = NodeId(uuid::Uuid::from_u128(1));
        let safe = |command: &Command, request| CoreMachine::retry_safe(&Proposal { at: Timestamp(0), request, command: command.clone() });
        let report = Command::Report { node, statuses: vec![], gone: vec![] };
        assert!(safe(&report, None));
        // Late, these would undo what others have done since.
        let down = Command::NodeDown { node };
        let certificate = Command::NodeCertificate { node, key_fingerprint: vec![], expires_at: Timestamp(0) };
        for command in [down, certificate, Command::Plan(Default::default())] {
            assert!(!safe(&command, None), "{command:?}");
            assert!(safe(&command, Some((RequestId(uuid::Uuid::from_u128(2)), vec![]))));
        }
    }
}
