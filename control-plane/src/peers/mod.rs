//! Servers calling each other: [`PeerTransport`] over QUIC with mTLS, on the port agents use ([`ALPN_RAFT`] tells them apart).
//!
//! ```text
//! RaftNode --> QuicPeers::call --> link (one connection a peer, dialled when first wanted, redialled when it falls silent)
//!                                    |  one bidirectional stream a call: kind, length, body / status, length, body
//! RaftNode <-- PeerHandler <-- serve (certificate checked before the first byte, membership at every call)
//! ```
//! Each direction has a connection of its own, so neither side has to agree with the other on who dials. A large body
//! never delays a small one: every call has its own stream, streams have priorities, and the send window holds them all.
//!
//! What this never does: decide what a request means, or repeat one whose effect might differ the second time.

mod link;
mod serve;
mod wire;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use optimus_common::ClusterId;
use optimus_common::env::Env;
use optimus_common::protocol::ALPN_RAFT;
use optimus_host::tls::{self, ExpectedServer, PinnedKeys, Roots, TlsError};
use optimus_host::transport::{self, SetupError, close};
use quinn::{Endpoint, VarInt};
use rustls::client::ResolvesClientCert;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::raft::{Peer, PeerError, PeerRpc, PeerTransport};
use link::Link;

pub(crate) use serve::refuse;
pub use serve::{PeerServe, PeerServer};
pub use wire::{BODY_MAX, PART_MAX};

/// Most servers called by one. A cluster has five, and a few more while it changes.
pub const LINKS_MAX: usize = 32;
/// Longest wait at the end for connections to say good-bye.
const CLOSE_PATIENCE: Duration = Duration::from_millis(500);

/// Who this server is to the others, and whom it believes.
#[derive(Clone)]
pub struct PeerSettings {
    pub cluster: ClusterId,
    /// This server's number.
    pub server: u64,
    pub roots: Arc<Roots>,
    /// This server's certificate, asked for at each handshake, so that renewals are followed.
    pub certificate: Arc<dyn ResolvesClientCert>,
    /// The members.
    pub pins: Arc<dyn PinnedKeys>,
    pub env: Env,
}

impl fmt::Debug for PeerSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerSettings(server {} of {})", self.server, self.cluster)
    }
}

/// Why a peer cannot be dialled at all.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("failed to prepare TLS")]
    Tls(#[from] TlsError),
    #[error("failed to prepare QUIC")]
    Quic(#[from] SetupError),
}

/// The way to the other servers.
pub struct QuicPeers {
    settings: PeerSettings,
    endpoint: Endpoint,
    /// Where links are made, so that their connections are driven there, whoever makes the first call.
    home: Handle,
    links: Mutex<BTreeMap<u64, (Arc<Link>, CancellationToken)>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl fmt::Debug for QuicPeers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QuicPeers(server {})", self.settings.server)
    }
}

impl QuicPeers {
    /// Dials from a UDP socket of its own, on the caller's runtime. The port agents connect to would do, but then a storm
    /// of agents could push the answers of peers out of its receive buffer, and one task would read for both.
    ///
    /// # Errors
    /// [`SetupError::Bind`] when the host gives no socket.
    pub fn new(settings: PeerSettings) -> Result<Arc<Self>, SetupError> {
        Ok(Self::on(settings, transport::client_endpoint()?))
    }

    /// Dials from `endpoint`.
    pub fn on(settings: PeerSettings, endpoint: Endpoint) -> Arc<Self> {
        let (links, tasks, stop) = (Mutex::default(), TaskTracker::new(), CancellationToken::new());
        Arc::new(QuicPeers { settings, endpoint, home: Handle::current(), links, tasks, stop })
    }

    fn links(&self) -> MutexGuard<'_, BTreeMap<u64, (Arc<Link>, CancellationToken)>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn link(&self, peer: &Peer) -> Result<Arc<Link>, PeerError> {
        let mut links = self.links();
        if let Some((link, _)) = links.get(&peer.id) {
            return Ok(link.clone());
        }
        let unreachable = |why: String| Err(PeerError::NotSent(why));
        if self.stop.is_cancelled() {
            return unreachable("this server is stopping".to_owned());
        }
        // A new peer is the moment to forget those that were removed.
        let pins = &self.settings.pins;
        links.retain(|id, (_, stop)| {
            let member = pins.key_of(*id).is_some();
            if !member {
                stop.cancel();
            }
            member
        });
        if links.len() >= LINKS_MAX {
            return unreachable(format!("there are links to {LINKS_MAX} servers already"));
        }
        let config = match self.client_config(peer.id) {
            Ok(config) => config,
            Err(error) => return unreachable(optimus_host::telemetry::Chain(&error).to_string()),
        };
        let link = Link::new(peer, self.endpoint.clone(), config, self.settings.env.clone());
        let stop = self.stop.child_token();
        self.tasks.spawn_on(link.clone().run(stop.clone()), &self.home);
        links.insert(peer.id, (link.clone(), stop));
        Ok(link)
    }

    fn client_config(&self, server: u64) -> Result<quinn::ClientConfig, LinkError> {
        let PeerSettings { cluster, server: _, roots, certificate, pins, env } = &self.settings;
        let expected = ExpectedServer { cluster: *cluster, server };
        let tls = tls::peer_client(roots, expected, certificate.clone(), pins.clone(), ALPN_RAFT, &env.clock)?;
        Ok(transport::peer_config(tls)?)
    }

    /// Server `id` has just connected to this one: if it is being dialled, it will answer now.
    pub fn knocked(&self, id: u64) {
        if let Some((link, _)) = self.links().get(&id) {
            link.knocked();
        }
    }

    /// Closes all connections and waits for their tasks. Later calls fail.
    pub async fn close(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.links().clear();
    }

    /// [`close`](Self::close), and the UDP socket with it. Not for one that is shared.
    pub async fn close_endpoint(&self) {
        self.close().await;
        self.endpoint.close(VarInt::from_u32(close::GOING_AWAY), b"the server is stopping");
        let _ = tokio::time::timeout(CLOSE_PATIENCE, self.endpoint.wait_idle()).await; // the peers notice anyway, later
    }
}

impl PeerTransport for QuicPeers {
    fn call(&self, to: Peer, kind: PeerRpc, body: Bytes, ttl: Duration) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        match self.link(&to) {
            Ok(link) => Box::pin(async move { link.call(&to.addr, kind, body, ttl).await }),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }
}
