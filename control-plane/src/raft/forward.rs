//! Writes on any server: a server that does not lead sends proposals to the leader.
//!
//! ```text
//! propose --> leads? --> batcher
//!               | no
//!               +--> queue --> few requests in flight, the others gather --> leader: its batcher, never further
//! ```
//! A proposal is sent again only when the first one was certainly not taken, or when a second one has no second effect
//! ([`Machine::retry_safe`]). Otherwise its outcome is unknown, and its proposer is told so.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use openraft::AsyncRuntime;
use tokio::sync::{mpsc, oneshot, watch};

use super::batcher::{self, MAX_BATCH_BYTES, MAX_BATCH_COMMANDS, Outcome, Proposal};
use super::error::ProposeError;
use super::fatal::Fatal;
use super::machine::Machine;
use super::network::forwarded::{self, Taken};
use super::network::{PeerError, PeerRpc};
use super::route::{Compass, Counters, Jitter, Patience};
use super::runtime::Runtime;
use super::tuning::Tuning;
use super::types::Blob;

/// Proposers' patience, in patiences of one entry: a leader may be lost while it has the proposal, then there is time for
/// the next one.
const TRIES: u32 = 2;

/// Requests to the leader under way at once: one whose entry is being written, and the next, so that the leader need not
/// wait for it. More would only make the batches smaller.
const IN_FLIGHT: usize = 2;

/// Where a proposal ended: its index, its answers, and whether another server committed it.
pub(crate) type Committed<A> = (u64, Vec<A>, bool);

/// Proposes here or at the leader; what [`RaftNode::propose`](super::RaftNode::propose) stands on.
pub(crate) struct Proposer<M: Machine> {
    pub compass: Compass,
    /// The batcher's queue.
    pub here: mpsc::Sender<Proposal<M::Answer>>,
    /// The forwarder's queue.
    pub away: mpsc::Sender<Proposal<M::Answer>>,
    pub tuning: Arc<Tuning>,
    pub fatal: Fatal,
    pub jitter: Arc<Jitter>,
    pub counters: Arc<Counters>,
}

impl<M: Machine> Proposer<M> {
    fn stopped(&self) -> ProposeError {
        self.fatal.get().map_or(ProposeError::Stopped, ProposeError::Fatal)
    }

    /// Proposes on this server only, once.
    pub(crate) async fn propose_here(&self, commands: Vec<Blob>) -> Outcome<M::Answer> {
        self.send(&self.here, commands).await
    }

    async fn send(&self, queue: &mpsc::Sender<Proposal<M::Answer>>, commands: Vec<Blob>) -> Outcome<M::Answer> {
        let (reply, answer) = oneshot::channel();
        queue.try_send(Proposal { commands, reply }).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => ProposeError::Overloaded,
            mpsc::error::TrySendError::Closed(_) => self.stopped(),
        })?;
        answer.await.unwrap_or_else(|_| Err(self.stopped()))
    }

    /// Proposes wherever the leader is, and again while that is harmless and the patience lasts.
    pub(crate) async fn propose(&self, commands: Vec<Blob>, retry_safe: bool) -> Result<Committed<M::Answer>, ProposeError> {
        let mut patience = Patience::new(&self.tuning, self.tuning.patience * TRIES);
        let mut unknown = None;
        loop {
            if self.here.is_closed() || self.fatal.get().is_some() {
                return Err(unknown.unwrap_or_else(|| self.stopped()));
            }
            let leader = self.compass.leader();
            let queue = match leader {
                None => None,
                Some(id) if id == self.compass.id => Some(&self.here),
                Some(_) => Some(&self.away),
            };
            let outcome = match queue {
                None => Err(ProposeError::NoLeader { leader: None }),
                Some(queue) => {
                    let sent = self.send(queue, commands.clone());
                    Runtime::timeout(patience.left(), sent).await.unwrap_or(Err(ProposeError::Timeout))
                }
            };
            let error = match outcome {
                Ok((index, answers)) => return Ok((index, answers, leader != Some(self.compass.id))),
                Err(error) => error,
            };
            match error {
                ProposeError::NoLeader { .. } => {}
                ProposeError::Timeout | ProposeError::Unknown if retry_safe => unknown = Some(error.clone()),
                _ => return Err(error),
            }
            if !patience.pause(&self.compass, &self.jitter, leader).await {
                // An earlier try may have been taken, whatever the last one says.
                return Err(unknown.unwrap_or(error));
            }
            Counters::add(&self.counters.retries, 1);
        }
    }

    /// Answers a request of another server: proposes here, never further.
    pub(crate) async fn serve(&self, from: u64, body: &[u8]) -> Result<Bytes, PeerError> {
        let groups = forwarded::decode_propose(self.compass.id, from, body)?;
        check_bounds(&groups).map_err(PeerError::Refused)?;
        if !self.compass.leads() {
            let leader = self.compass.leader();
            return Ok(forwarded::encode_taken(groups.iter().map(|_| Taken::NotLeader { leader }).collect()));
        }
        Counters::add(&self.counters.taken, groups.len());
        // All are queued before any is waited for, so that they share an entry.
        let waiting: Vec<_> = groups.into_iter().map(|commands| self.take(commands)).collect();
        let mut taken = Vec::with_capacity(waiting.len());
        for group in waiting {
            taken.push(match group {
                Err(refused) => refused,
                Ok(answer) => self.told(answer.await.unwrap_or_else(|_| Err(self.stopped()))),
            });
        }
        Ok(forwarded::encode_taken(taken))
    }

    /// Queues one group, or says why not.
    fn take(&self, commands: Vec<Blob>) -> Result<oneshot::Receiver<Outcome<M::Answer>>, Taken> {
        // A command the log holds but this binary cannot decode would stop every server.
        for command in &commands {
            if let Err(e) = rmp_serde::from_slice::<M::Command>(&command.0) {
                return Err(Taken::Refused(format!("the command does not decode here: {e}")));
            }
        }
        let (reply, answer) = oneshot::channel();
        match self.here.try_send(Proposal { commands, reply }) {
            Ok(()) => Ok(answer),
            Err(mpsc::error::TrySendError::Full(_)) => Err(Taken::Overloaded),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(Taken::NotLeader { leader: None }),
        }
    }

    fn told(&self, outcome: Outcome<M::Answer>) -> Taken {
        match outcome {
            Ok((index, answers)) => {
                let answers: Result<Vec<Blob>, _> = answers.iter().map(|a| rmp_serde::to_vec_named(a).map(|b| Blob(b.into()))).collect();
                match answers {
                    Ok(answers) => Taken::Done { index, answers },
                    Err(e) => {
                        tracing::error!(index, error = %e, "the answer to a forwarded proposal does not encode");
                        Taken::Unknown
                    }
                }
            }
            Err(ProposeError::NoLeader { leader }) => Taken::NotLeader { leader },
            Err(ProposeError::Overloaded) => Taken::Overloaded,
            Err(_) => Taken::Unknown,
        }
    }
}

fn check_bounds(groups: &[Vec<Blob>]) -> Result<(), String> {
    let commands: usize = groups.iter().map(Vec::len).sum();
    let bytes: usize = groups.iter().flatten().map(|c| c.0.len()).sum();
    if commands > MAX_BATCH_COMMANDS || bytes > MAX_BATCH_BYTES {
        return Err(format!(
            "{commands} commands and {bytes} bytes are more than the {MAX_BATCH_COMMANDS} and {MAX_BATCH_BYTES} of one request"
        ));
    }
    match groups.iter().any(Vec::is_empty) {
        true => Err("a proposal without commands".to_owned()),
        false => Ok(()),
    }
}

/// The task that carries proposals to the leader.
pub(crate) struct Forwarder<M: Machine> {
    pub carrier: Carrier,
    pub queue: mpsc::Receiver<Proposal<M::Answer>>,
    pub stop: watch::Receiver<bool>,
}

impl<M: Machine> Forwarder<M> {
    pub(crate) async fn run(mut self) {
        let mut stop = self.stop.clone();
        // What waits when it ends is dropped, and its proposers are told that the node stops.
        tokio::select! {
            biased;
            _ = stop.wait_for(|s| *s) => {}
            () = self.carry() => {}
        }
    }

    async fn carry(&mut self) {
        let mut waiting: VecDeque<Proposal<M::Answer>> = VecDeque::new();
        let mut taken = Vec::with_capacity(MAX_BATCH_COMMANDS);
        let mut flying = FuturesUnordered::new();
        loop {
            // Whoever has given up shall not have it proposed after all.
            waiting.retain(|p| !p.reply.is_closed());
            if !waiting.is_empty() && flying.len() < IN_FLIGHT {
                flying.push(self.carrier.carry::<M>(batcher::next_batch(&mut waiting)));
                continue;
            }
            tokio::select! {
                biased;
                Some(()) = flying.next(), if !flying.is_empty() => {}
                n = self.queue.recv_many(&mut taken, MAX_BATCH_COMMANDS), if waiting.is_empty() => {
                    if n == 0 {
                        return;
                    }
                    waiting.extend(taken.drain(..));
                }
            }
        }
    }
}

/// Sends requests to the leader.
pub(crate) struct Carrier {
    compass: Compass,
    tuning: Arc<Tuning>,
    counters: Arc<Counters>,
    /// Who leads by the word of the server asked last, for the next request only; 0 for nobody.
    hint: AtomicU64,
}

impl Carrier {
    pub(crate) fn new(compass: Compass, tuning: Arc<Tuning>, counters: Arc<Counters>) -> Self {
        Self { compass, tuning, counters, hint: AtomicU64::new(0) }
    }

    /// Takes one batch to the leader and gives each proposer what came of it.
    async fn carry<M: Machine>(&self, batch: Vec<Proposal<M::Answer>>) {
        let known = self.compass.leader();
        let hint = Some(self.hint.swap(0, Ordering::Relaxed)).filter(|id| *id != 0);
        let Some(peer) = hint.or(known).and_then(|id| self.compass.peer(id)) else {
            return batcher::answer_all(batch, &ProposeError::NoLeader { leader: known });
        };
        Counters::add(&self.counters.forwards, 1);
        Counters::add(&self.counters.forwarded, batch.len());
        let body = forwarded::encode_propose(peer.id, batch.iter().map(|p| p.commands.clone()).collect());
        let (asked, grace) = (peer.id, grace(&self.tuning));
        let answer = self.compass.ask(peer, PeerRpc::Propose, body, self.tuning.patience, grace).await;
        let error = match answer {
            Ok(body) => match forwarded::decode_taken(&body).filter(|groups| groups.len() == batch.len()) {
                Some(groups) => {
                    for (proposal, taken) in batch.into_iter().zip(groups) {
                        // Heartbeats have told us no better than what was wrong: try the one it names, once.
                        if let Taken::NotLeader { leader: Some(leader) } = &taken
                            && ![asked, self.compass.id].contains(leader)
                            && known == Some(asked)
                        {
                            self.hint.store(*leader, Ordering::Relaxed);
                        }
                        let outcome = outcome::<M>(taken, proposal.commands.len());
                        let _ = proposal.reply.send(outcome); // a proposer that went away does not need its answer
                    }
                    return;
                }
                None => {
                    tracing::warn!(peer = asked, "the answer to forwarded proposals is not one");
                    ProposeError::Unknown
                }
            },
            Err(PeerError::NotSent(_)) => ProposeError::NoLeader { leader: known },
            Err(PeerError::Timeout) => ProposeError::Timeout,
            // A refusal as well: it may be the answer that could not be sent.
            Err(PeerError::Unreachable(_) | PeerError::Stopped(_) | PeerError::Refused(_)) => ProposeError::Unknown,
        };
        tracing::debug!(peer = asked, %error, "proposals were not forwarded");
        batcher::answer_all(batch, &error);
    }
}

/// How long an answer may still come after the leadership has moved: what the old leader has committed is on its way.
pub(crate) fn grace(tuning: &Tuning) -> Duration {
    tuning.heartbeat / 2
}

fn outcome<M: Machine>(taken: Taken, expected: usize) -> Outcome<M::Answer> {
    match taken {
        Taken::Done { index, answers } => {
            let wrong = |reason: String| ProposeError::Answer { index, reason };
            if answers.len() != expected {
                return Err(wrong(format!("{} answers to {expected} commands", answers.len())));
            }
            let answers = answers.iter().map(|a| rmp_serde::from_slice(&a.0)).collect::<Result<_, _>>();
            answers.map(|answers| (index, answers)).map_err(|e| wrong(e.to_string()))
        }
        Taken::NotLeader { leader } => Err(ProposeError::NoLeader { leader }),
        Taken::Overloaded => Err(ProposeError::Overloaded),
        Taken::Refused(reason) => Err(ProposeError::Refused(reason)),
        Taken::Unknown => Err(ProposeError::Unknown),
    }
}
