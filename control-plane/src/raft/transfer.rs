//! Handing leadership over on purpose.
//!
//! ```text
//! leader                                   voters                     target
//!   | 1. wait: target nearly level            |                          |
//!   | 2. Allow(target) ---------------------->| note it for one vote --->| the same
//!   |    a quorum with the target agreed      |                          |
//!   | 3. stop proposing, wait: target level   |                          |
//!   | 4. Lead(vote, last log id) ----------------------------------------| elect
//!   |    <------------------------------------|<-- request for a vote ---|
//!   | 5. a new leader is known: refuse what waited, with its id          |
//! ```
//! Nothing is stopped before the target and a quorum have agreed, so a hand-over that cannot work costs nothing. From
//! step 3 on it is bounded by [`PAUSE`]; whatever fails, proposals are then taken again, here or by whoever was elected.
//! The election itself is an ordinary one; see docs/adr/0007.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use openraft::{AsyncRuntime, BasicNode, RaftMetrics, ServerState};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use super::election::{Elector, Standing};
use super::error::TransferError;
use super::network::{Peer, PeerError, PeerRpc};
use super::record::{Damage, Kind};
use super::runtime::Runtime;
use super::stored::{LogIdV1, VoteV1, decode, encode};
use super::types::{LogId, Raft, Vote};

/// Longest wait for the target to come within [`NEARLY`] of the leader, while proposals go on.
const LEVEL: Duration = Duration::from_secs(1);
/// Entries the target may miss when proposals stop; a single message carries as many.
const NEARLY: u64 = 256;
/// Longest time proposals wait for the hand-over.
pub(crate) const PAUSE: Duration = Duration::from_secs(1);
/// How long a permission lives: until the pause is over.
const PERMISSION: Duration = Duration::from_secs(2);

/// What servers say to each other around an election, beside openraft's own requests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Message {
    /// Of a server that misses its leader: would you vote for me? Changes nothing.
    WouldVote {
        /// Its last entry.
        last: Option<LogIdV1>,
    },
    /// Of the leader: let `target` be elected once although I lead.
    Allow {
        /// The leader's vote.
        leader: VoteV1,
        /// The server that shall lead next.
        target: u64,
        /// How long this holds, in milliseconds.
        ttl_ms: u64,
    },
    /// Of the leader to the target: stand for election now.
    Lead {
        /// The leader's vote.
        leader: VoteV1,
        /// Its last entry; nothing follows it in its term.
        last: Option<LogIdV1>,
    },
}

#[derive(Serialize, Deserialize)]
struct EnvelopeV1 {
    to: u64,
    message: Message,
}

impl Message {
    pub(crate) fn encode(&self, to: u64) -> Bytes {
        encode(Kind::Request, PeerRpc::Transfer as u64, &EnvelopeV1 { to, message: self.clone() }).into()
    }

    /// Decodes a message meant for server `me`, sent by the authenticated server `from`.
    pub(crate) fn decode(me: u64, from: u64, body: &[u8]) -> Result<Self, PeerError> {
        let damaged = |d: Damage| PeerError::Refused(format!("Transfer request from server {from}: {d}"));
        let EnvelopeV1 { to, message } = decode(Kind::Request, PeerRpc::Transfer as u64, body).map_err(damaged)?;
        if to != me {
            return Err(PeerError::Refused(format!("Transfer request for server {to} reached server {me}")));
        }
        match &message {
            Self::Allow { leader, .. } | Self::Lead { leader, .. } if leader.node != from || !leader.committed => {
                Err(PeerError::Refused(format!("server {from} sent a Transfer request in the name of server {}", leader.node)))
            }
            _ => Ok(message),
        }
    }
}

/// The answer to every [`Message`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Consent {
    pub agreed: bool,
    /// Why not.
    pub reason: String,
}

impl Consent {
    fn new(objection: Option<String>) -> Self {
        Self { agreed: objection.is_none(), reason: objection.unwrap_or_default() }
    }

    pub(crate) fn decode(body: &[u8]) -> Result<Self, PeerError> {
        let answer = decode(Kind::Reply, PeerRpc::Transfer as u64, body);
        answer.map_err(|d| PeerError::Refused(format!("answer of the peer: {d}")))
    }

    fn encode(&self) -> Bytes {
        encode(Kind::Reply, PeerRpc::Transfer as u64, self).into()
    }
}

impl Elector {
    /// Answers a [`Message`] of server `from`, whose identity the transport has proven.
    pub(crate) async fn handle(&self, me: u64, from: u64, body: &[u8]) -> Result<Bytes, PeerError> {
        let message = Message::decode(me, from, body)?;
        let stopped = |e: openraft::error::Fatal<u64>| PeerError::Stopped(e.to_string());
        let standing = self.standing().await.map_err(stopped)?;
        let objection = match message {
            Message::WouldVote { last } => self.objection(&standing, last.map(Into::into)),
            Message::Allow { leader, target, ttl_ms } => {
                let objection = follows(&standing, leader);
                if objection.is_none() {
                    self.allow(leader.into(), target, Duration::from_millis(ttl_ms).min(PERMISSION));
                }
                objection
            }
            Message::Lead { leader, last } => {
                let objection = follows(&standing, leader).or_else(|| behind(&standing, me, last.map(Into::into)));
                if objection.is_none() {
                    self.take_over().await.map_err(stopped)?;
                }
                objection
            }
        };
        Ok(Consent::new(objection).encode())
    }
}

fn follows(standing: &Standing, leader: VoteV1) -> Option<String> {
    (standing.vote != Vote::from(leader)).then(|| format!("it follows vote {}, not that of server {}", standing.vote, leader.node))
}

fn behind(standing: &Standing, me: u64, last: Option<LogId>) -> Option<String> {
    if !standing.membership.voter_ids().any(|id| id == me) {
        return Some("it has no vote".to_owned());
    }
    (standing.last < last).then(|| "it does not hold the whole log".to_owned())
}

/// How many entries `server` is known to hold, purged ones included.
fn held(m: &RaftMetrics<u64, BasicNode>, server: u64) -> u64 {
    let held = m.replication.as_ref().and_then(|r| r.get(&server).copied().flatten());
    held.map_or(0, |id| id.index + 1)
}

/// One hand-over, on the leader.
pub(crate) struct HandOver<'a> {
    pub id: u64,
    pub raft: &'a Raft,
    pub elector: &'a Elector,
    /// Held by the batcher around each entry it writes.
    pub gate: &'a Arc<Mutex<()>>,
    /// Held around each change of the membership.
    pub membership: &'a Mutex<()>,
}

impl HandOver<'_> {
    /// Hands over to `to`, or to the most up-to-date other voter. Gives who leads then.
    pub(crate) async fn run(&self, to: Option<u64>) -> Result<u64, TransferError> {
        let _no_change = self.membership.try_lock().map_err(|_| TransferError::Busy)?;
        let standing = self.standing().await?;
        self.check_leading(&standing)?;
        let target = self.choose(&standing, to)?;
        self.wait_level(target.id, NEARLY, LEVEL).await?;
        self.ask_all(&standing, &target).await?;

        let paused = async {
            let _nothing_proposed = self.gate.lock().await;
            let standing = self.standing().await?;
            self.check_leading(&standing)?;
            self.wait_level(target.id, 0, PAUSE).await?;
            let lead = Message::Lead { leader: standing.vote.into(), last: standing.last.map(Into::into) };
            self.agree(&target, &lead).await?;
            self.successor().await
        };
        let done = Runtime::timeout(PAUSE, paused).await.unwrap_or(Err(TransferError::Timeout { target: target.id }));
        match &done {
            Ok(leader) => tracing::info!(leader, "leadership is handed over"),
            Err(e) => tracing::warn!(target = target.id, error = %e, "leadership is not handed over"),
        }
        done
    }

    async fn standing(&self) -> Result<Standing, TransferError> {
        self.elector.standing().await.map_err(|e| TransferError::Fatal(e.to_string()))
    }

    fn check_leading(&self, standing: &Standing) -> Result<(), TransferError> {
        if standing.vote.committed && standing.vote.leader_id.node_id == self.id {
            return Ok(());
        }
        let leader = self.raft.metrics().borrow().current_leader.filter(|l| *l != self.id);
        Err(TransferError::NoLeader { leader })
    }

    fn choose(&self, standing: &Standing, to: Option<u64>) -> Result<Peer, TransferError> {
        let mut voters = standing.voters();
        if let Some(to) = to {
            let known = voters.remove(&to).filter(|_| to != self.id);
            return known.ok_or(TransferError::NotVoter(to));
        }
        voters.remove(&self.id);
        let best = voters.into_values().max_by_key(|p| (self.held(p.id), std::cmp::Reverse(p.id)));
        best.ok_or(TransferError::NoOther)
    }

    fn held(&self, server: u64) -> u64 {
        held(&self.raft.metrics().borrow(), server)
    }

    /// Waits until the target misses at most `lag` entries.
    async fn wait_level(&self, target: u64, lag: u64, patience: Duration) -> Result<(), TransferError> {
        let mut metrics = self.raft.metrics();
        let last = || self.elector.last().map_or(0, |id| id.index + 1);
        let level = metrics.wait_for(|m| held(m, target) >= last().saturating_sub(lag));
        let waited = Runtime::timeout(patience, level).await;
        match waited {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(TransferError::Fatal("openraft has ended".to_owned())),
            Err(_) => Err(TransferError::Behind { target, held: self.held(target).saturating_sub(1), last: last().saturating_sub(1) }),
        }
    }

    /// Has every voter let the target through its lease once; a quorum of them, the target among them, must agree.
    async fn ask_all(&self, standing: &Standing, target: &Peer) -> Result<(), TransferError> {
        let leader = standing.vote;
        self.elector.allow(leader, target.id, PERMISSION);
        let ttl_ms = u64::try_from(PERMISSION.as_millis()).unwrap_or(u64::MAX);
        let allow = Message::Allow { leader: leader.into(), target: target.id, ttl_ms };
        let ttl = self.elector.clock.call_ttl();
        let others = standing.voters().into_values().filter(|p| p.id != self.id);
        let mut answers: FuturesUnordered<_> = others.map(|p| self.elector.ask(p, &allow, ttl)).collect();
        let mut agreed = vec![self.id];
        let mut reason = "no answer".to_owned();
        while let Some((id, answer)) = answers.next().await {
            match answer {
                Ok(Consent { agreed: true, .. }) => agreed.push(id),
                Ok(Consent { reason: r, .. }) => reason = format!("server {id}: {r}"),
                Err(e) => reason = format!("server {id}: {e}"),
            }
            if agreed.contains(&target.id) && standing.is_quorum(&agreed) {
                return Ok(());
            }
        }
        Err(TransferError::Refused { target: target.id, reason })
    }

    async fn agree(&self, target: &Peer, message: &Message) -> Result<(), TransferError> {
        let (_, answer) = self.elector.ask(target.clone(), message, PAUSE).await;
        let reason = match answer {
            Ok(Consent { agreed: true, .. }) => return Ok(()),
            Ok(Consent { reason, .. }) => reason,
            Err(e) => e.to_string(),
        };
        Err(TransferError::Refused { target: target.id, reason })
    }

    /// Waits until another server leads.
    async fn successor(&self) -> Result<u64, TransferError> {
        let mut metrics = self.raft.metrics();
        let other = metrics.wait_for(|m| m.state != ServerState::Leader && m.current_leader.is_some_and(|l| l != self.id)).await;
        let leader = other.ok().and_then(|m| m.current_leader);
        leader.ok_or_else(|| TransferError::Fatal("openraft has ended".to_owned()))
    }
}
