//! The connection to one peer: dialled when a call wants it, replaced when it breaks or falls silent.
//!
//! ```text
//!            a call                    connected                 broken
//!   parked ---------> dialling ----------------------> up ----------------> parked (at once dialling, if wanted)
//!      ^                 |  nobody calls any more       |  silent, or another address: dialled anew, the old
//!      +-----------------+                              |  connection serves until the new one is up
//! ```
//! One task dials, however many calls wait. Calls never dial; they tell the task that a connection is wanted.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use optimus_common::env::Env;
use optimus_host::tls::SERVER_NAME;
use optimus_host::transport::{self, close};
use quinn::{Connection, ConnectionError, Endpoint, VarInt};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::wire::{self, Fault};
use crate::raft::{Peer, PeerError, PeerRpc};

/// A link nobody called over for so long is not dialled.
const WANTED: Duration = Duration::from_secs(2);
/// Pause between two attempts to reach a peer that does not answer. Short, because a restarted server should be back
/// within it, and a lost one costs only a packet each time.
const REDIAL: Duration = Duration::from_millis(80);
/// First and longest pause after a peer has refused us or closed a connection without having answered.
const REFUSED_PAUSE: Duration = Duration::from_millis(50);
const REFUSED_PAUSE_MAX: Duration = Duration::from_secs(1);
/// Longest handshake. Far above [`REDIAL`], so that a slow network is no lost one: attempts overlap.
const ATTEMPT: Duration = Duration::from_millis(800);
/// Most overlapping attempts.
const ATTEMPTS_MAX: usize = 12;
/// A connection on which calls stay without answer and no packet came for so long is dialled anew.
const SILENT: Duration = Duration::from_millis(100);
/// Most addresses of one name that are tried.
const ADDRESSES_MAX: usize = 8;

/// A connection, and whether it has proved itself: a server that refuses our certificate does so after the handshake
/// has ended on our side.
#[derive(Debug)]
struct Live {
    connection: Connection,
    answered: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    live: Option<Arc<Live>>,
    /// Grows with each refusal, and why it came.
    refusals: u64,
    reason: String,
}

pub(super) struct Link {
    id: u64,
    endpoint: Endpoint,
    config: quinn::ClientConfig,
    env: Env,
    address: Mutex<Arc<str>>,
    born: Instant,
    /// Milliseconds since `born` of the newest call.
    wanted: AtomicU64,
    /// The connection should be replaced: it is silent, or leads to an address that holds no more.
    stale: AtomicBool,
    /// The peer was heard on a connection it dialled.
    knocked: AtomicBool,
    /// Look again at the four above.
    poke: Notify,
    state: watch::Sender<State>,
    /// Since when no packet has come while calls wait: the moment, the connection, the packets it had then.
    silence: Mutex<Option<(Instant, usize, u64)>>,
}

/// Why one attempt failed.
enum Failed {
    /// No answer: it may be down, or the network slow.
    Silent,
    Refused(String),
}

impl Link {
    pub fn new(peer: &Peer, endpoint: Endpoint, config: quinn::ClientConfig, env: Env) -> Arc<Self> {
        Arc::new(Link {
            id: peer.id,
            endpoint,
            config,
            env,
            address: Mutex::new(peer.addr.as_str().into()),
            born: Instant::now(),
            wanted: AtomicU64::new(0),
            stale: AtomicBool::new(false),
            knocked: AtomicBool::new(false),
            poke: Notify::new(),
            state: watch::Sender::new(State::default()),
            silence: Mutex::new(None),
        })
    }

    /// One call. `ttl` covers the wait for a connection too.
    pub async fn call(&self, address: &str, kind: PeerRpc, body: Bytes, ttl: Duration) -> Result<Bytes, PeerError> {
        let most = wire::body_max(kind);
        if body.len() > most {
            return Err(PeerError::Refused(format!("{kind:?} request of {} bytes is longer than {most}", body.len())));
        }
        let deadline = Instant::now() + ttl;
        self.want(address);
        timeout_at(deadline, self.answered(kind, body)).await.unwrap_or(Err(PeerError::Timeout))
    }

    async fn answered(&self, kind: PeerRpc, body: Bytes) -> Result<Bytes, PeerError> {
        // What Raft asks may be asked twice; whether a proposal is repeated is for its sender to decide.
        let mut again = matches!(kind, PeerRpc::Append | PeerRpc::Vote | PeerRpc::ReadIndex);
        loop {
            let live = self.connected().await?;
            let mut waiting = Waiting { link: self, live: &live, answered: false };
            let outcome = wire::exchange(&live.connection, kind, body.clone()).await;
            waiting.answered = true;
            drop(waiting);
            match outcome {
                Ok(answer) => {
                    live.answered.store(true, Ordering::Relaxed);
                    return answer;
                }
                Err(Fault::Lost(_)) if again => {
                    self.forget(&live);
                    again = false;
                }
                Err(Fault::Lost(error)) => {
                    self.forget(&live);
                    return Err(PeerError::Unreachable(transport::explain(&error)));
                }
                Err(fault @ Fault::GivenUp) => return Err(PeerError::Unreachable(fault.to_string())),
                Err(Fault::Violation(what)) => {
                    tracing::warn!(peer = self.id, error = what, "a peer broke the protocol");
                    live.connection.close(VarInt::from_u32(close::PROTOCOL), what.as_bytes());
                    self.forget(&live);
                    return Err(PeerError::Unreachable(what));
                }
            }
        }
    }

    /// The connection, as soon as there is one; the reason when the peer refuses.
    async fn connected(&self) -> Result<Arc<Live>, PeerError> {
        if let Some(live) = &self.state.borrow().live {
            return Ok(live.clone());
        }
        let mut state = self.state.subscribe();
        let refusals = state.borrow().refusals;
        self.poke.notify_one();
        match state.wait_for(|s| s.live.is_some() || s.refusals != refusals).await {
            Ok(s) => s.live.clone().ok_or_else(|| PeerError::NotSent(s.reason.clone())),
            Err(_) => Err(PeerError::NotSent("this server is stopping".to_owned())),
        }
    }

    fn want(&self, address: &str) {
        let now = u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.wanted.store(now, Ordering::Relaxed);
        let mut held = self.address.lock().unwrap_or_else(PoisonError::into_inner);
        if **held != *address {
            tracing::info!(peer = self.id, from = %held, to = address, "a peer has another address");
            *held = address.into();
            drop(held);
            self.replace();
        }
    }

    fn is_wanted(&self) -> bool {
        self.born.elapsed().saturating_sub(Duration::from_millis(self.wanted.load(Ordering::Relaxed))) < WANTED
    }

    fn replace(&self) {
        self.stale.store(true, Ordering::Release);
        self.poke.notify_one();
    }

    pub fn knocked(&self) {
        self.knocked.store(true, Ordering::Release);
        self.poke.notify_one();
    }

    /// Takes a broken connection out of use.
    fn forget(&self, broken: &Arc<Live>) {
        let forgotten = self.state.send_if_modified(|state| {
            let same = state.live.as_ref().is_some_and(|live| Arc::ptr_eq(live, broken));
            if same {
                state.live = None;
            }
            same
        });
        if forgotten {
            self.poke.notify_one();
        }
    }

    /// A call was given up. One alone may be slow work at the peer; but a peer that is there acknowledges packets.
    fn unanswered(&self, live: &Live) {
        let (id, packets) = (live.connection.stable_id(), live.connection.stats().udp_rx.datagrams);
        let now = Instant::now();
        let mut silence = self.silence.lock().unwrap_or_else(PoisonError::into_inner);
        match *silence {
            Some((since, of, then)) if of == id && then == packets => {
                if now - since >= SILENT {
                    drop(silence);
                    self.replace();
                }
            }
            _ => *silence = Some((now, id, packets)),
        }
    }

    /// Keeps the connection until `stop`; then closes it.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            never = self.keep() => match never {},
        }
        self.state.send_modify(|state| {
            if let Some(live) = state.live.take() {
                live.connection.close(VarInt::from_u32(close::GOING_AWAY), b"the server is stopping");
            }
            state.refusals += 1;
            "this server is stopping".clone_into(&mut state.reason);
        });
    }

    async fn keep(&self) -> std::convert::Infallible {
        let mut refusals = 0u32;
        loop {
            let live = self.state.borrow().live.clone();
            if self.is_wanted() && (live.is_none() || self.stale.load(Ordering::Acquire)) {
                let Some(connection) = self.dial(&mut refusals).await else { continue };
                self.publish(connection);
                continue;
            }
            let broken = async {
                match &live {
                    Some(live) => live.connection.closed().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.poke.notified() => {}
                error = broken => if let Some(live) = live {
                    self.ended(&live, &error, &mut refusals);
                },
            }
        }
    }

    fn publish(&self, connection: Connection) {
        tracing::debug!(peer = self.id, address = %connection.remote_address(), "connected to a peer");
        self.stale.store(false, Ordering::Release);
        let fresh = Arc::new(Live { connection, answered: AtomicBool::new(false) });
        let mut old = None;
        self.state.send_modify(|state| old = state.live.replace(fresh));
        if let Some(old) = old {
            // Calls that wait on it fail now, and those that may are sent again on the new one.
            old.connection.close(VarInt::from_u32(close::REPLACED), b"replaced by a newer connection");
        }
    }

    fn ended(&self, live: &Arc<Live>, error: &ConnectionError, refusals: &mut u32) {
        let reason = transport::explain(error);
        if live.answered.load(Ordering::Relaxed) {
            *refusals = 0;
            tracing::info!(peer = self.id, reason, "the connection to a peer ended");
            self.forget(live);
            return;
        }
        *refusals = refusals.saturating_add(1);
        self.forget(live);
        self.refused(reason, *refusals);
    }

    fn refused(&self, reason: String, refusals: u32) {
        if refusals == 1 {
            tracing::warn!(peer = self.id, address = %self.address(), reason, "a peer refuses this server; trying again");
        } else {
            tracing::debug!(peer = self.id, reason, refusals, "a peer refuses this server");
        }
        self.state.send_modify(|state| {
            state.refusals += 1;
            state.reason = reason;
        });
    }

    fn address(&self) -> Arc<str> {
        self.address.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Dials until connected; `None` once nobody wants it. A refusal makes the pauses longer, a knock ends them.
    async fn dial(&self, refusals: &mut u32) -> Option<Connection> {
        let mut flying = FuturesUnordered::new();
        let mut started = 0;
        let mut next = Instant::now() + if *refusals == 0 { Duration::ZERO } else { self.pause(*refusals) };
        loop {
            tokio::select! {
                biased;
                Some(done) = flying.next() => match done {
                    Ok(connection) => return Some(connection),
                    Err(Failed::Silent) => {}
                    Err(Failed::Refused(reason)) => {
                        *refusals = refusals.saturating_add(1);
                        self.refused(reason, *refusals);
                        next = Instant::now() + self.pause(*refusals);
                    }
                },
                () = tokio::time::sleep_until(next), if flying.len() < ATTEMPTS_MAX => {
                    if self.is_wanted() {
                        flying.push(self.attempt(started));
                        started += 1;
                    } else if flying.is_empty() {
                        return None;
                    }
                    next = Instant::now() + self.pause(*refusals);
                }
                () = self.poke.notified() => if self.knocked.swap(false, Ordering::AcqRel) {
                    *refusals = 0;
                    next = Instant::now();
                },
            }
        }
    }

    fn pause(&self, refusals: u32) -> Duration {
        let pause = match refusals {
            0 => REDIAL,
            n => (REFUSED_PAUSE * 2u32.saturating_pow(n.min(8) - 1)).min(REFUSED_PAUSE_MAX),
        };
        pause.mul_f64(0.75 + self.env.fraction() / 2.0)
    }

    async fn attempt(&self, number: usize) -> Result<Connection, Failed> {
        let connect = async {
            let address = self.address();
            let target = self.resolve(&address, number).await.map_err(Failed::Refused)?;
            let connecting = self.endpoint.connect_with(self.config.clone(), target, SERVER_NAME);
            connecting.map_err(|e| Failed::Refused(format!("{address}: {e}")))?.await.map_err(|e| match e {
                ConnectionError::TimedOut => Failed::Silent,
                other => Failed::Refused(format!("{address}: {}", transport::explain(&other))),
            })
        };
        timeout(ATTEMPT, connect).await.unwrap_or(Err(Failed::Silent))
    }

    /// The address to try in attempt `number`: those of a name take turns.
    async fn resolve(&self, address: &str, number: usize) -> Result<SocketAddr, String> {
        let all_families = self.endpoint.local_addr().is_ok_and(|a| a.is_ipv6());
        let found = tokio::net::lookup_host(address).await.map_err(|e| format!("{address}: {e}"))?;
        let usable: Vec<_> = found.filter(|a| all_families || a.is_ipv4()).take(ADDRESSES_MAX).collect();
        match usable.len() {
            0 => Err(format!("{address}: no address this server can reach")),
            n => Ok(usable[number % n]),
        }
    }
}

/// A call on its way; dropped without an answer, it counts towards silence, whoever gave it up.
struct Waiting<'a> {
    link: &'a Link,
    live: &'a Live,
    answered: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.answered {
            self.link.unanswered(self.live);
        }
    }
}
