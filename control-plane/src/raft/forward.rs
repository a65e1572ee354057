//! Proposals and reads on a server that does not lead.
//!
//! A proposal goes to the leader once and never further: a server that is asked in vain says so. While requests are under
//! way further proposals gather, and go out together, so forwarding costs a request per batch and not per command. Reads
//! ask for the index they must have reached the same way: one question at a time, for all that came before it.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use openraft::AsyncRuntime;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

use super::batcher::{Outcome, Proposal, answer_all, next_batch};
use super::error::{ProposeError, ReadError};
use super::machine::Machine;
use super::network::{PeerError, PeerRpc};
use super::node::RaftNode;
use super::record::Kind;
use super::runtime::Runtime;
use super::stored::{decode, encode};
use super::types::Blob;

/// Requests to the leader under way at once; more would only make the batches smaller.
const IN_FLIGHT: usize = 4;
/// Reads answered by one question to the leader.
const READS_MAX: usize = 4096;
/// Pauses while there is no leader: an election takes a few hundred milliseconds.
const PAUSE_FIRST: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(200);
/// Longest wait for the leader's word on a read; after it another may lead.
const READ_TTL: Duration = Duration::from_millis(1000);

#[derive(Serialize, Deserialize)]
struct ProposeV1 {
    to: u64,
    /// Proposals; the commands of each stay together.
    proposals: Vec<Vec<Blob>>,
}

/// What came of one proposal.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AnswerV1 {
    Done {
        index: u64,
        answers: Vec<Blob>,
    },
    Overloaded,
    /// Not taken: the server asked does not lead.
    NotLeader {
        leader: Option<u64>,
    },
    /// It may or may not take effect.
    Unknown,
    Failed {
        reason: String,
    },
}

#[derive(Serialize, Deserialize)]
struct ReadIndexV1 {
    to: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ReadIndexReplyV1 {
    Index(u64),
    NotLeader { leader: Option<u64> },
}

fn misread(e: impl std::fmt::Display) -> PeerError {
    PeerError::Refused(format!("malformed request: {e}"))
}

/// Longer and longer pauses, up to a bound, each a random part of it so that waiting clients do not come back at once.
pub(super) struct Pause(Duration);

impl Pause {
    pub(super) fn new() -> Self {
        Pause(PAUSE_FIRST)
    }

    pub(super) async fn wait(&mut self) {
        use rand_core_06::RngCore as _;
        let percent = 50 + Runtime::thread_rng().next_u32() % 51;
        Runtime::sleep(self.0 * percent / 100).await;
        self.0 = (self.0 * 2).min(PAUSE_MAX);
    }
}

/// The task that carries proposals to the leader.
pub(super) struct Forwarder<M: Machine> {
    pub node: RaftNode<M>,
    pub queue: mpsc::Receiver<Proposal<M::Answer>>,
    pub stop: watch::Receiver<bool>,
}

impl<M: Machine> Forwarder<M> {
    pub(super) async fn run(mut self) {
        let mut waiting = VecDeque::new();
        let mut taken = Vec::new();
        let mut flying = FuturesUnordered::new();
        loop {
            let mut stop = self.stop.clone();
            tokio::select! {
                biased;
                _ = stop.wait_for(|s| *s) => break,
                Some(()) = flying.next(), if !flying.is_empty() => {}
                n = self.queue.recv_many(&mut taken, super::MAX_BATCH_COMMANDS), if flying.len() < IN_FLIGHT => {
                    if n == 0 {
                        break;
                    }
                    waiting.extend(taken.drain(..));
                }
            }
            while !waiting.is_empty() && flying.len() < IN_FLIGHT {
                flying.push(carry(&self.node, next_batch(&mut waiting)));
            }
        }
        drop(flying); // their proposers are told that the node stops
        self.queue.close();
        let mut left: Vec<_> = waiting.into();
        while let Some(proposal) = self.queue.recv().await {
            left.push(proposal);
        }
        answer_all(left, &ProposeError::Stopped);
    }
}

/// Takes one batch to the leader and gives each proposer what came of it.
async fn carry<M: Machine>(node: &RaftNode<M>, batch: Vec<Proposal<M::Answer>>) {
    let Some(leader) = node.other_leader() else {
        return answer_all(batch, &ProposeError::NoLeader { leader: None });
    };
    let proposals = batch.iter().map(|p| p.commands.clone()).collect();
    let body = encode(Kind::Request, PeerRpc::Propose as u64, &ProposeV1 { to: leader.id, proposals });
    let answers = node.ask(leader, PeerRpc::Propose, body.into(), node.tuning().patience).await;
    let answers = answers.and_then(|b| decode::<Vec<AnswerV1>>(Kind::Reply, PeerRpc::Propose as u64, &b).map_err(misread));
    match answers {
        Ok(answers) if answers.len() == batch.len() => {
            for (proposal, answer) in batch.into_iter().zip(answers) {
                // A proposer that went away does not need its answer.
                let _ = proposal.reply.send(outcome::<M>(answer));
            }
        }
        // Whether the request arrived is not known, nor what became of it.
        Ok(_) | Err(PeerError::Unreachable(_) | PeerError::Timeout | PeerError::Stopped(_) | PeerError::Refused(_)) => {
            answer_all(batch, &ProposeError::Unknown);
        }
    }
}

fn outcome<M: Machine>(answer: AnswerV1) -> Outcome<M::Answer> {
    match answer {
        AnswerV1::Done { index, answers } => {
            let answers = answers.iter().map(|b| rmp_serde::from_slice(&b.0)).collect::<Result<_, _>>();
            // It was committed, so a server that reads this must not call it failed.
            answers.map(|answers| (index, answers)).map_err(|_| ProposeError::Unknown)
        }
        AnswerV1::Overloaded => Err(ProposeError::Overloaded),
        AnswerV1::NotLeader { leader } => Err(ProposeError::NoLeader { leader }),
        AnswerV1::Unknown => Err(ProposeError::Unknown),
        AnswerV1::Failed { reason } => Err(ProposeError::Encode(reason)),
    }
}

impl<M: Machine> RaftNode<M> {
    /// Serves proposals that another server forwards; never forwards them again.
    pub(super) async fn serve_propose(&self, body: &[u8]) -> Result<Bytes, PeerError> {
        let ProposeV1 { to, proposals } = decode(Kind::Request, PeerRpc::Propose as u64, body).map_err(misread)?;
        self.meant_for_us(PeerRpc::Propose, to)?;
        let answers = proposals.into_iter().map(|commands| async {
            match self.propose_here(commands).await {
                Ok((index, answers)) => {
                    let encoded = answers.iter().map(|a| rmp_serde::to_vec_named(a).map(|b| Blob(b.into()))).collect::<Result<_, _>>();
                    encoded.map_or(AnswerV1::Unknown, |answers| AnswerV1::Done { index, answers })
                }
                Err(ProposeError::Overloaded) => AnswerV1::Overloaded,
                Err(ProposeError::NoLeader { leader }) => AnswerV1::NotLeader { leader },
                Err(e @ (ProposeError::TooLarge { .. } | ProposeError::Encode(_))) => AnswerV1::Failed { reason: e.to_string() },
                Err(ProposeError::Unknown | ProposeError::Timeout | ProposeError::Stopped | ProposeError::Fatal(_)) => AnswerV1::Unknown,
            }
        });
        let answers = futures_util::future::join_all(answers).await;
        Ok(encode(Kind::Reply, PeerRpc::Propose as u64, &answers).into())
    }

    /// Serves the question which index a read must have reached.
    pub(super) async fn serve_read_index(&self, body: &[u8]) -> Result<Bytes, PeerError> {
        let ReadIndexV1 { to } = decode(Kind::Request, PeerRpc::ReadIndex as u64, body).map_err(misread)?;
        self.meant_for_us(PeerRpc::ReadIndex, to)?;
        let reply = if *self.is_leader().borrow() {
            match self.read_index().await {
                Ok(index) => ReadIndexReplyV1::Index(index),
                Err(ReadError::NoLeader { leader }) => ReadIndexReplyV1::NotLeader { leader },
                Err(e) => return Err(PeerError::Stopped(e.to_string())),
            }
        } else {
            ReadIndexReplyV1::NotLeader { leader: self.status().leader }
        };
        Ok(encode(Kind::Reply, PeerRpc::ReadIndex as u64, &reply).into())
    }

    /// Asks whoever leads for the index a read must have reached.
    async fn ask_read_index(&self) -> Result<u64, ReadError> {
        if *self.is_leader().borrow() {
            return self.confirm_read_index().await;
        }
        let Some(leader) = self.other_leader() else { return Err(ReadError::NoLeader { leader: None }) };
        let body = encode(Kind::Request, PeerRpc::ReadIndex as u64, &ReadIndexV1 { to: leader.id });
        let reply = self.ask(leader, PeerRpc::ReadIndex, body.into(), READ_TTL).await;
        match reply.map(|b| decode(Kind::Reply, PeerRpc::ReadIndex as u64, &b)) {
            Ok(Ok(ReadIndexReplyV1::Index(index))) => Ok(index),
            Ok(Ok(ReadIndexReplyV1::NotLeader { leader })) => Err(ReadError::NoLeader { leader }),
            Ok(Err(_)) | Err(_) => Err(ReadError::NoLeader { leader: None }),
        }
    }

    /// The same, again and again while an election may be under way, as long as the patience lasts.
    async fn find_read_index(&self) -> Result<u64, ReadError> {
        let mut pause = Pause::new();
        let mut last = ReadError::Timeout;
        let tries = async {
            loop {
                if let Some(reason) = self.status().fatal {
                    return Err(ReadError::Fatal(reason));
                }
                match self.ask_read_index().await {
                    Err(e @ (ReadError::NoLeader { .. } | ReadError::Timeout)) => last = e,
                    other => return other,
                }
                pause.wait().await;
            }
        };
        let found = Runtime::timeout(self.tuning().patience, tries).await;
        found.unwrap_or(Err(last))
    }
}

/// A read that waits for its index.
pub(super) type Read = oneshot::Sender<Result<u64, ReadError>>;

/// The task that finds the index of reads: one question at a time, for all reads that came before it.
pub(super) async fn read_loop<M: Machine>(node: RaftNode<M>, mut queue: mpsc::Receiver<Read>, mut stop: watch::Receiver<bool>) {
    let mut waiting: Vec<Read> = Vec::new();
    loop {
        tokio::select! {
            biased;
            _ = stop.wait_for(|s| *s) => break,
            n = queue.recv_many(&mut waiting, READS_MAX) => if n == 0 { break },
        }
        let found = tokio::select! {
            biased;
            _ = stop.wait_for(|s| *s) => Err(ReadError::Stopped),
            found = node.find_read_index() => found,
        };
        for read in waiting.drain(..) {
            // Who went away does not need it.
            let _ = read.send(found.clone());
        }
    }
}
