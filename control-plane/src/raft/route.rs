//! Which way a request goes: who leads, how long to wait for a leader, when to ask again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use openraft::AsyncRuntime;
use rand_core_06::RngCore;
use serde::Serialize;

use super::network::{Peer, PeerError, PeerRpc, PeerTransport};
use super::runtime::Runtime;
use super::tuning::Tuning;
use super::types::Raft;

pub(crate) type Instant = <Runtime as AsyncRuntime>::Instant;

/// Longest wait for a leader to appear, within the patience of the request. An election takes one to two rounds of the
/// election timeout; who waits longer is better told.
const LEADER_WAIT: Duration = Duration::from_secs(3);
/// First and longest pause before the same server is asked again; drawn below it (full jitter), so that the callers of a
/// lost leader do not all come at once.
const PAUSE_MIN: Duration = Duration::from_millis(4);
const PAUSE_MAX: Duration = Duration::from_millis(200);

/// What went between this server and the leader, counted since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Traffic {
    /// Proposals sent to the leader, each time they were sent.
    pub forwarded: u64,
    /// Requests they went in.
    pub forwards: u64,
    /// Proposals taken from other servers.
    pub taken: u64,
    /// Rounds that confirmed a read index, at the leader or with its help.
    pub read_rounds: u64,
    /// Reads they served.
    pub reads: u64,
    /// Proposals and reads tried again.
    pub retries: u64,
}

/// The counters behind [`Traffic`].
#[derive(Default)]
pub(crate) struct Counters {
    pub forwarded: AtomicU64,
    pub forwards: AtomicU64,
    pub taken: AtomicU64,
    pub read_rounds: AtomicU64,
    pub reads: AtomicU64,
    pub retries: AtomicU64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64, n: usize) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }

    pub(crate) fn now(&self) -> Traffic {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Self { forwarded, forwards, taken, read_rounds, reads, retries } = self;
        Traffic {
            forwarded: of(forwarded),
            forwards: of(forwards),
            taken: of(taken),
            read_rounds: of(read_rounds),
            reads: of(reads),
            retries: of(retries),
        }
    }
}

/// When the leader was last heard here.
#[derive(Default)]
pub(crate) struct Heard(Mutex<Option<Instant>>);

impl Heard {
    pub(crate) fn now(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    pub(crate) fn age_ms(&self) -> Option<u64> {
        let at = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        at.map(|at| u64::try_from((Instant::now() - at).as_millis()).unwrap_or(u64::MAX))
    }
}

/// Who leads, as far as this server knows, and the way there.
#[derive(Clone)]
pub(crate) struct Compass {
    pub id: u64,
    pub raft: Raft,
    pub transport: Arc<dyn PeerTransport>,
}

impl Compass {
    pub(crate) fn leader(&self) -> Option<u64> {
        self.raft.server_metrics().borrow().current_leader
    }

    pub(crate) fn leads(&self) -> bool {
        self.leader() == Some(self.id)
    }

    /// Member `id`, unless it is this server.
    pub(crate) fn peer(&self, id: u64) -> Option<Peer> {
        let metrics = self.raft.server_metrics();
        let m = metrics.borrow();
        let node = m.membership_config.membership().get_node(&id).filter(|_| id != self.id)?;
        Some(Peer { id, addr: node.addr.clone() })
    }

    /// Resolves once another server leads than `before`, or none does any more.
    pub(crate) async fn moved(&self, before: Option<u64>) {
        let mut metrics = self.raft.server_metrics();
        if metrics.wait_for(|m| m.current_leader != before).await.is_err() {
            std::future::pending::<()>().await; // openraft has ended; the stop signal ends those who wait
        }
    }

    /// Asks `peer`, and gives up `grace` after the leadership has moved: an old leader that is cut off never answers.
    pub(crate) async fn ask(&self, peer: Peer, kind: PeerRpc, body: Bytes, ttl: Duration, grace: Duration) -> Result<Bytes, PeerError> {
        let seen = self.leader();
        let call = self.transport.call(peer, kind, body, ttl);
        let moved = async {
            self.moved(seen).await;
            Runtime::sleep(grace).await;
        };
        tokio::select! {
            biased;
            answer = Runtime::timeout(ttl, call) => answer.map_err(|_| PeerError::Timeout)?,
            () = moved => Err(PeerError::Unreachable("it leads no more".to_owned())),
        }
    }
}

/// Draws the pauses. Seeded once where the node starts: callers run outside of the simulator's scope of the node.
pub(crate) struct Jitter(AtomicU64);

impl Jitter {
    pub(crate) fn new() -> Self {
        Self(AtomicU64::new(Runtime::thread_rng().next_u64()))
    }

    /// Between a fourth of a millisecond and `most`. (SplitMix64.)
    fn below(&self, most: Duration) -> Duration {
        let mut z = self.0.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let micros = u64::try_from(most.as_micros()).unwrap_or(u64::MAX).max(251);
        Duration::from_micros(250 + (z ^ (z >> 31)) % (micros - 250))
    }
}

/// How long one request goes on trying.
pub(crate) struct Patience {
    pub deadline: Instant,
    /// When it stops waiting for a leader; set while nobody takes it.
    leader_by: Option<Instant>,
    leader_wait: Duration,
    pause: Duration,
}

impl Patience {
    pub(crate) fn new(tuning: &Tuning, total: Duration) -> Self {
        Self { deadline: Instant::now() + total, leader_by: None, leader_wait: LEADER_WAIT.min(tuning.patience), pause: PAUSE_MIN }
    }

    pub(crate) fn left(&self) -> Duration {
        let now = Instant::now();
        if now >= self.deadline { Duration::ZERO } else { self.deadline - now }
    }

    /// Waits before the next try, until `asked` leads no more at the longest. False when it is time to give up.
    pub(crate) async fn pause(&mut self, compass: &Compass, jitter: &Jitter, asked: Option<u64>) -> bool {
        let now = Instant::now();
        let until = (*self.leader_by.get_or_insert(now + self.leader_wait)).min(self.deadline);
        if now >= until {
            return false;
        }
        let pause = jitter.below(self.pause).min(until - now);
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        tokio::select! {
            biased;
            () = compass.moved(asked) => self.pause = PAUSE_MIN,
            () = Runtime::sleep(pause) => {}
        }
        true
    }
}
