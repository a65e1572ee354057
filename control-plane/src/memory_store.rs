//! A store without Raft and without a disk: for tests of what stands on a [`Store`].

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use optimus_common::env::Env;
use optimus_core::state::{Applied, Proposal, State};
use tokio::sync::watch;

use crate::store::{Consensus, ConsensusStatus, ProposeError, Store};

/// Applies proposals at once, one index each.
pub struct MemoryConsensus {
    state: Mutex<State>,
    applied: watch::Sender<u64>,
}

/// A fresh, empty store of one server that leads.
pub fn memory_store(env: Env) -> Store {
    Store::new(Arc::new(MemoryConsensus { state: Mutex::default(), applied: watch::Sender::new(0) }), env)
}

impl Consensus for MemoryConsensus {
    fn propose(&self, proposal: Proposal) -> Pin<Box<dyn Future<Output = Result<Applied, ProposeError>> + Send + '_>> {
        let (answer, index) = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let index = state.index + 1;
            (state.apply(index, proposal), index)
        };
        self.applied.send_replace(index);
        Box::pin(async move { Ok(answer) })
    }

    fn state(&self) -> State {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn applied(&self) -> watch::Receiver<u64> {
        self.applied.subscribe()
    }

    fn linearizable(&self) -> Pin<Box<dyn Future<Output = Result<(), ProposeError>> + Send + '_>> {
        Box::pin(async { Ok(()) })
    }

    fn status(&self) -> ConsensusStatus {
        let applied = *self.applied.borrow();
        ConsensusStatus {
            server: 1,
            leader: Some(1),
            term: 1,
            last_log: applied,
            applied,
            voters: 1,
            is_leader: true,
            leader_age: Some(std::time::Duration::ZERO),
            ..ConsensusStatus::default()
        }
    }
}
