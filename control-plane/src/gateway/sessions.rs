//! Which node is connected, and when each was last heard.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use optimus_common::NodeId;
use optimus_core::state::State;
use optimus_host::transport::close;
use quinn::{Connection, VarInt};
use tokio::sync::Notify;

use super::leases::{Hearing, RECENT};

/// When a node was last heard, in milliseconds of the monotonic clock.
#[derive(Debug, Default)]
pub struct Heard(AtomicU64);

impl Heard {
    pub fn touch(&self, now: Duration) {
        self.0.fetch_max(u64::try_from(now.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
    pub fn at(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}

/// One connected node.
#[derive(Clone)]
pub struct Session {
    /// Tells an ended session from the one that took its place.
    number: u64,
    /// On the monotonic clock.
    began: Duration,
    pub connection: Connection,
    /// Wakes the session to look at the desired set.
    pub wake: Arc<Notify>,
    pub heard: Arc<Heard>,
}

#[derive(Default)]
struct Inner {
    next: u64,
    sessions: BTreeMap<NodeId, Session>,
    /// Outlives sessions; pruned to the nodes of the state.
    heard: BTreeMap<NodeId, Arc<Heard>>,
}

#[derive(Default)]
pub struct Sessions(Mutex<Inner>);

impl Sessions {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Enters a proven session; the newest wins. Two hosts with one identity (a cloned disk) show up
    /// as sessions that keep replacing each other, so an older one that is still heard is a warning.
    pub fn enter(&self, node: NodeId, connection: Connection, now: Duration) -> Session {
        let mut inner = self.inner();
        inner.next += 1;
        let heard = inner.heard.entry(node).or_default().clone();
        let session = Session { number: inner.next, began: now, connection, wake: Arc::new(Notify::new()), heard };
        let older = inner.sessions.insert(node, session.clone());
        drop(inner);
        if let Some(older) = older {
            let silent_for = now.saturating_sub(session.heard.at());
            let (from, to): (SocketAddr, SocketAddr) = (older.connection.remote_address(), session.connection.remote_address());
            if silent_for < super::LEASE && older.connection.close_reason().is_none() {
                tracing::warn!(
                    %node, older = %from, newer = %to, silent_ms = silent_for.as_millis() as u64,
                    "second session of a node whose first was alive: the newer one is kept; if this repeats, two hosts use one identity"
                );
            }
            older.connection.close(VarInt::from_u32(close::REPLACED), b"replaced by a newer session of this node");
        }
        session.heard.touch(now);
        session
    }

    /// Removes an ended session; false: another has taken its place.
    pub fn leave(&self, node: NodeId, session: &Session) -> bool {
        let mut inner = self.inner();
        let last = inner.sessions.get(&node).is_some_and(|s| s.number == session.number);
        if last {
            inner.sessions.remove(&node);
        }
        last
    }

    pub fn get(&self, node: NodeId) -> Option<Session> {
        self.inner().sessions.get(&node).cloned()
    }

    pub fn connected(&self) -> Vec<NodeId> {
        self.inner().sessions.keys().copied().collect()
    }

    /// When the session of a node began.
    pub fn began(&self, node: NodeId) -> Option<Duration> {
        self.inner().sessions.get(&node).map(|s| s.began)
    }

    /// Every node connected, or heard lately.
    pub fn hearings(&self, now: Duration) -> BTreeMap<NodeId, Hearing> {
        let inner = self.inner();
        let hearings = inner.heard.iter().filter_map(|(&node, heard)| {
            let (heard, session) = (heard.at(), inner.sessions.get(&node).map(|s| s.began));
            (session.is_some() || now.saturating_sub(heard) <= RECENT).then_some((node, Hearing { heard, session }))
        });
        hearings.collect()
    }

    /// Ends the session of a node if it is older than the one it has at another server since `younger`.
    pub fn replace(&self, node: NodeId, younger: Duration) {
        let Some(session) = self.get(node).filter(|s| s.began < younger) else { return };
        tracing::info!(%node, address = %session.connection.remote_address(), "the node has a younger session at another server: this one ends");
        session.connection.close(VarInt::from_u32(close::REPLACED), b"replaced by a newer session of this node at another server");
    }

    /// Sends all agents to other servers. Gives how many there were.
    pub fn close_all(&self) -> usize {
        let inner = self.inner();
        for session in inner.sessions.values().filter(|s| s.connection.close_reason().is_none()) {
            session.connection.close(VarInt::from_u32(close::GOING_AWAY), b"this server has heard no leader for a while");
        }
        inner.sessions.len()
    }

    pub fn last_heard(&self, node: NodeId) -> Option<Duration> {
        self.inner().heard.get(&node).map(|h| h.at())
    }

    /// Ends the sessions of nodes that the state no longer has, and forgets when they were heard.
    pub fn prune(&self, state: &State) {
        let mut inner = self.inner();
        for (node, session) in inner.sessions.iter().filter(|(node, _)| !state.nodes.contains_key(*node)) {
            tracing::warn!(%node, "the node was removed: its session ends");
            session.connection.close(VarInt::from_u32(close::REFUSED), b"OPT-1202 the node was removed from the cluster");
        }
        if inner.heard.len() > state.nodes.len() {
            inner.heard.retain(|node, _| state.nodes.contains_key(node));
        }
    }
}
