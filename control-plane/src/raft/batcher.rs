//! Many proposals, one log entry.
//!
//! openraft 0.9 flushes once per entry and never overlaps two flushes, so an entry per command would cap the cluster at a
//! few hundred writes a second on a slow disk. While one entry is being flushed and replicated, proposals gather; then all
//! of them become the next entry. Under load batches grow by themselves, and a lone proposal waits for nobody.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use openraft::error::{ClientWriteError, Fatal as RaftFatal, RaftError};
use tokio::sync::{mpsc, oneshot, watch};

use super::clock::Clock;
use super::error::ProposeError;
use super::fatal::Fatal;
use super::machine::Machine;
use super::tuning::Tuning;
use super::types::{Batch, Blob, Raft};

/// Most commands in one log entry.
pub const MAX_BATCH_COMMANDS: usize = 512;
/// Most encoded bytes in one log entry.
pub const MAX_BATCH_BYTES: usize = 1 << 20;

pub(crate) type Outcome<A> = Result<(u64, Vec<A>), ProposeError>;

/// Encoded commands that stay together, and who waits for their answers.
pub(crate) struct Proposal<A> {
    pub commands: Vec<Blob>,
    pub reply: oneshot::Sender<Outcome<A>>,
}

impl<A> Proposal<A> {
    pub(crate) fn bytes(&self) -> usize {
        self.commands.iter().map(|c| c.0.len()).sum()
    }
}

/// Encodes commands and checks that they fit one entry.
pub(crate) fn encode<M: Machine>(commands: &[M::Command]) -> Result<Vec<Blob>, ProposeError> {
    let encoded = commands.iter().map(|c| rmp_serde::to_vec_named(c).map(|bytes| Blob(bytes.into())));
    let encoded: Vec<Blob> = encoded.collect::<Result<_, _>>().map_err(|e| ProposeError::Encode(e.to_string()))?;
    let bytes = encoded.iter().map(|c| c.0.len()).sum();
    if encoded.len() > MAX_BATCH_COMMANDS || bytes > MAX_BATCH_BYTES {
        let (max_commands, max_bytes) = (MAX_BATCH_COMMANDS, MAX_BATCH_BYTES);
        return Err(ProposeError::TooLarge { commands: encoded.len(), bytes, max_commands, max_bytes });
    }
    Ok(encoded)
}

/// The task that turns proposals into entries.
pub(crate) struct Batcher<M: Machine> {
    pub raft: Raft,
    pub queue: mpsc::Receiver<Proposal<M::Answer>>,
    pub stop: watch::Receiver<bool>,
    pub fatal: Fatal,
    pub tuning: Arc<Tuning>,
    pub clock: Arc<Clock>,
    /// Held while an entry is written, and by a hand-over of leadership: meanwhile proposals wait here.
    pub gate: Arc<tokio::sync::Mutex<()>>,
}

impl<M: Machine> Batcher<M> {
    pub(crate) async fn run(mut self) {
        let mut waiting = VecDeque::new();
        let mut taken = Vec::with_capacity(MAX_BATCH_COMMANDS);
        loop {
            if waiting.is_empty() {
                let mut stop = self.stop.clone();
                tokio::select! {
                    biased;
                    _ = stop.wait_for(|s| *s) => break,
                    n = self.queue.recv_many(&mut taken, MAX_BATCH_COMMANDS) => if n == 0 { break },
                }
                waiting.extend(taken.drain(..));
            }
            let batch = next_batch(&mut waiting);
            self.write(batch).await;
        }
        self.queue.close();
        let mut left: Vec<_> = waiting.into();
        while let Some(proposal) = self.queue.recv().await {
            left.push(proposal);
        }
        // After a hand-over these were never appended, and there is somebody to go to.
        let elsewhere = self.cannot_lead().flatten().map(|leader| ProposeError::NoLeader { leader: Some(leader) });
        answer_all(left, &elsewhere.unwrap_or(ProposeError::Stopped));
    }

    /// Proposes one entry and gives each proposer its part of the answers.
    async fn write(&mut self, batch: Vec<Proposal<M::Answer>>) {
        let gate = self.gate.clone();
        let _writing = gate.lock().await;
        if let Some(reason) = self.fatal.get() {
            return answer_all(batch, &ProposeError::Fatal(reason));
        }
        if let Some(leader) = self.cannot_lead() {
            return answer_all(batch, &ProposeError::NoLeader { leader });
        }
        let commands: Vec<Blob> = batch.iter().flat_map(|p| p.commands.iter().cloned()).collect();
        let mut stop = self.stop.clone();
        let written = tokio::select! {
            biased;
            written = self.tuning.patiently(self.raft.client_write(Batch(Arc::new(commands)))) => written,
            _ = stop.wait_for(|s| *s) => return answer_all(batch, &ProposeError::Stopped),
            // openraft 0.9.25 drops no proposal when the task of the state machine dies; it would wait out the patience.
            reason = self.fatal.wait() => return answer_all(batch, &ProposeError::Fatal(reason)),
        };
        let response = match written {
            None => return answer_all(batch, &ProposeError::Timeout),
            Some(Err(e)) => return answer_all(batch, &self.explain(e)),
            Some(Ok(response)) => response,
        };
        let answers = response.data.0.and_then(|any| any.downcast::<Vec<M::Answer>>().ok());
        let expected: usize = batch.iter().map(|p| p.commands.len()).sum();
        match answers {
            Some(answers) if answers.len() == expected => fan_out(response.log_id.index, batch, *answers),
            // The state machine answers every command of every batch it applies; anything else is a bug that would hand
            // one client another's answer.
            _ => {
                let reason = format!("log entry {} of {expected} commands came back with other answers", response.log_id.index);
                self.fatal.raise(reason.clone());
                answer_all(batch, &ProposeError::Fatal(reason));
            }
        }
    }

    /// `Some(leader)` when a proposal would be in vain. openraft 0.9 has no check-quorum: a leader cut off from its peers
    /// goes on believing in itself, and every proposal would wait out its patience.
    fn cannot_lead(&self) -> Option<Option<u64>> {
        let metrics = self.raft.metrics();
        let m = metrics.borrow();
        if m.current_leader != Some(m.id) {
            return Some(m.current_leader);
        }
        let alone = m.membership_config.membership().voter_ids().eq([m.id]);
        let limit = self.clock.timeout_max() * 2;
        let silent = m.millis_since_quorum_ack.is_some_and(|ms| Duration::from_millis(ms) > limit);
        (silent && !alone).then_some(None)
    }

    fn explain(&self, e: RaftError<u64, ClientWriteError<u64, openraft::BasicNode>>) -> ProposeError {
        match e {
            // openraft says so before it appends, and also when a new leader has cut the entry off this log; then another
            // server may still hold it and win the next election.
            RaftError::APIError(ClientWriteError::ForwardToLeader(_)) => ProposeError::Unknown,
            RaftError::APIError(ClientWriteError::ChangeMembershipError(e)) => ProposeError::Fatal(e.to_string()),
            RaftError::Fatal(RaftFatal::Stopped) => match self.fatal.get() {
                Some(reason) => ProposeError::Fatal(reason),
                None => ProposeError::Stopped,
            },
            RaftError::Fatal(e) => ProposeError::Fatal(self.fatal.get().unwrap_or_else(|| e.to_string())),
        }
    }
}

/// Takes as many whole proposals from the front as fit one entry, at least one.
pub(crate) fn next_batch<A>(waiting: &mut VecDeque<Proposal<A>>) -> Vec<Proposal<A>> {
    let (mut commands, mut bytes) = (0, 0);
    let fits = |p: &Proposal<A>| {
        commands += p.commands.len();
        bytes += p.bytes();
        commands <= MAX_BATCH_COMMANDS && bytes <= MAX_BATCH_BYTES
    };
    let count = waiting.iter().map(fits).take_while(|fits| *fits).count();
    waiting.drain(..count.max(1).min(waiting.len())).collect()
}

fn fan_out<A>(index: u64, batch: Vec<Proposal<A>>, answers: Vec<A>) {
    let mut answers = answers.into_iter();
    for proposal in batch {
        let own: Vec<A> = answers.by_ref().take(proposal.commands.len()).collect();
        // A proposer that went away does not need its answers.
        let _ = proposal.reply.send(Ok((index, own)));
    }
}

pub(crate) fn answer_all<A>(batch: Vec<Proposal<A>>, error: &ProposeError) {
    for proposal in batch {
        let _ = proposal.reply.send(Err(error.clone()));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn proposal(commands: usize, size: usize) -> (Proposal<u64>, oneshot::Receiver<Outcome<u64>>) {
        let (reply, answer) = oneshot::channel();
        (Proposal { commands: vec![Blob(vec![0; size].into()); commands], reply }, answer)
    }

    proptest! {
        /// Whatever the sizes, every proposal ends up whole in exactly one entry, in order, within the bounds, and gets
        /// exactly its own answers.
        #[test]
        fn batches_keep_order_and_bounds(sizes in proptest::collection::vec((1usize..300, 0usize..4000), 1..40)) {
            let (proposals, mut replies): (VecDeque<_>, Vec<_>) = sizes.iter().map(|&(n, size)| proposal(n, size)).unzip();
            let mut waiting = proposals;
            let mut next = 0u64;
            let mut entries = 0;
            while !waiting.is_empty() {
                let batch = next_batch(&mut waiting);
                let commands: usize = batch.iter().map(|p| p.commands.len()).sum();
                prop_assert!(commands <= MAX_BATCH_COMMANDS || batch.len() == 1);
                prop_assert!(batch.iter().map(Proposal::bytes).sum::<usize>() <= MAX_BATCH_BYTES || batch.len() == 1);
                let answers = (next..next + commands as u64).collect();
                next += commands as u64;
                entries += 1;
                fan_out(entries, batch, answers);
            }
            let mut expected = 0u64;
            for (reply, (n, _)) in replies.iter_mut().zip(&sizes) {
                let (_, answers) = reply.try_recv().expect("every proposal is answered").expect("with success");
                let own: Vec<u64> = (expected..expected + *n as u64).collect();
                prop_assert_eq!(answers, own);
                expected += *n as u64;
            }
        }
    }
}
