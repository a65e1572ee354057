//! Linearizable reads on any server: which index a read must have seen.
//!
//! The leader proves by a round of heartbeats that nobody else leads. One round is in flight at a time and serves all
//! reads that came before it began; those that come later wait for the next. A server that does not lead asks the leader,
//! in rounds of its own.

use std::sync::Arc;

use bytes::Bytes;
use openraft::AsyncRuntime;
use openraft::error::{CheckIsLeaderError, RaftError};
use optimus_common::planted::planted;
use tokio::sync::{mpsc, oneshot, watch};

use super::error::ReadError;
use super::fatal::Fatal;
use super::forward::grace;
use super::network::forwarded::{self, ReadAt};
use super::network::{PeerError, PeerRpc};
use super::route::{Compass, Counters, Jitter, Patience};
use super::runtime::Runtime;
use super::tuning::Tuning;

/// Reads answered by one round at most; the others wait for the next.
const ROUND_MAX: usize = 4096;

/// One read that waits for its index.
pub(crate) struct Ask {
    /// Only this server may confirm it.
    here: bool,
    reply: oneshot::Sender<Result<u64, ReadError>>,
}

/// Asks for read indexes; what [`RaftNode::linearizable`](super::RaftNode::linearizable) stands on.
pub(crate) struct Reader {
    pub compass: Compass,
    pub asks: mpsc::Sender<Ask>,
    pub fatal: Fatal,
    pub jitter: Arc<Jitter>,
    pub counters: Arc<Counters>,
}

impl Reader {
    /// The index as this server confirms it, if it leads.
    pub(crate) async fn here(&self) -> Result<u64, ReadError> {
        self.ask(true).await
    }

    async fn ask(&self, here: bool) -> Result<u64, ReadError> {
        let (reply, answer) = oneshot::channel();
        self.asks.try_send(Ask { here, reply }).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => ReadError::Overloaded,
            mpsc::error::TrySendError::Closed(_) => self.stopped(),
        })?;
        answer.await.unwrap_or_else(|_| Err(self.stopped()))
    }

    fn stopped(&self) -> ReadError {
        self.fatal.get().map_or(ReadError::Stopped, ReadError::Fatal)
    }

    /// The index as the leader confirms it, whoever that is; asks again until the patience is over.
    pub(crate) async fn anywhere(&self, patience: &mut Patience) -> Result<u64, ReadError> {
        loop {
            let leader = self.compass.leader();
            let asked = match leader {
                None if self.asks.is_closed() || self.fatal.get().is_some() => return Err(self.stopped()),
                None => Err(ReadError::NoLeader { leader: None }),
                Some(_) => Runtime::timeout(patience.left(), self.ask(false)).await.unwrap_or(Err(ReadError::Timeout)),
            };
            let error = match asked {
                Err(error @ (ReadError::NoLeader { .. } | ReadError::Timeout)) => error,
                done => return done,
            };
            if !patience.pause(&self.compass, &self.jitter, leader).await {
                return Err(error);
            }
            Counters::add(&self.counters.retries, 1);
        }
    }

    /// Answers a request of another server: confirms here, never asks further.
    pub(crate) async fn serve(&self, from: u64, body: &[u8]) -> Result<Bytes, PeerError> {
        forwarded::decode_read_index(self.compass.id, from, body)?;
        let at = match self.here().await {
            Ok(index) => ReadAt::Index(index),
            Err(ReadError::NoLeader { leader }) => ReadAt::NotLeader { leader },
            Err(ReadError::Stopped | ReadError::Fatal(_)) => return Err(PeerError::Stopped("it is stopping".to_owned())),
            Err(ReadError::Overloaded | ReadError::Timeout) => ReadAt::NotLeader { leader: None },
        };
        Ok(forwarded::encode_read_at(at))
    }
}

/// The task that makes the rounds.
pub(crate) struct Rounds {
    pub compass: Compass,
    pub asks: mpsc::Receiver<Ask>,
    pub stop: watch::Receiver<bool>,
    pub tuning: Arc<Tuning>,
    pub fatal: Fatal,
    pub counters: Arc<Counters>,
}

impl Rounds {
    pub(crate) async fn run(mut self) {
        let mut stop = self.stop.clone();
        // What waits when it ends is dropped, and its readers are told that the node stops.
        tokio::select! {
            biased;
            _ = stop.wait_for(|s| *s) => {}
            () = self.go_round() => {}
        }
    }

    async fn go_round(&mut self) {
        let mut waiting = Vec::new();
        while self.asks.recv_many(&mut waiting, ROUND_MAX).await > 0 {
            waiting.retain(|ask| !ask.reply.is_closed());
            let leader = self.compass.leader();
            let leads = leader == Some(self.compass.id);
            // A server that asked us because it believes we lead is told at once.
            for ask in waiting.extract_if(.., |ask| ask.here && !leads) {
                let _ = ask.reply.send(Err(ReadError::NoLeader { leader }));
            }
            if waiting.is_empty() {
                continue;
            }
            let index = match leader {
                Some(_) if leads => self.confirm().await,
                Some(other) => self.ask(other).await,
                None => Err(ReadError::NoLeader { leader: None }),
            };
            Counters::add(&self.counters.read_rounds, 1);
            Counters::add(&self.counters.reads, waiting.len());
            for ask in waiting.drain(..) {
                let _ = ask.reply.send(index.clone()); // a reader that went away does not need it
            }
        }
    }

    /// Confirms with a quorum that this server leads.
    async fn confirm(&self) -> Result<u64, ReadError> {
        if planted("stale-read") {
            return Ok(0);
        }
        match self.tuning.patiently(self.compass.raft.get_read_log_id()).await {
            None => Err(ReadError::Timeout),
            Some(Ok((read, _))) => Ok(read.map_or(0, |id| id.index)),
            Some(Err(RaftError::APIError(CheckIsLeaderError::ForwardToLeader(f)))) => Err(ReadError::NoLeader { leader: f.leader_id }),
            Some(Err(RaftError::APIError(CheckIsLeaderError::QuorumNotEnough(_)))) => Err(ReadError::NoLeader { leader: None }),
            Some(Err(RaftError::Fatal(e))) => Err(match self.fatal.get() {
                Some(reason) => ReadError::Fatal(reason),
                None if matches!(e, openraft::error::Fatal::Stopped) => ReadError::Stopped,
                None => ReadError::Fatal(e.to_string()),
            }),
        }
    }

    async fn ask(&self, leader: u64) -> Result<u64, ReadError> {
        let Some(peer) = self.compass.peer(leader) else { return Err(ReadError::NoLeader { leader: None }) };
        let body = forwarded::encode_read_index(leader);
        let answer = self.compass.ask(peer, PeerRpc::ReadIndex, body, self.tuning.patience, grace(&self.tuning)).await;
        match answer.map(|body| forwarded::decode_read_at(&body)) {
            Ok(Some(ReadAt::Index(index))) => Ok(index),
            Ok(Some(ReadAt::NotLeader { leader })) => Err(ReadError::NoLeader { leader }),
            Err(PeerError::Timeout) => Err(ReadError::Timeout),
            Ok(None) | Err(_) => Err(ReadError::NoLeader { leader: None }),
        }
    }
}
