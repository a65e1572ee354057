//! The gateway: where agents connect, and other servers.
//!
//! One QUIC endpoint serves three protocols, told apart by ALPN: agents with a certificate, joiners with a
//! token, and servers, which are passed on to [`crate::peers`]. Before a peer has shown who it is it may hold one of a bounded number of places and nothing else.
//!
//! ```text
//! incoming -> Admission (places in all and per address, Retry when busy) -> handshake
//!    ALPN join  -> join::serve     token -> AdmitNode -> certificate
//!    ALPN agent -> session::serve  certificate checked against state -> NodeUp -> Welcome
//!                     pushes Desired   (woken by desired::Hub)
//!                     takes Reports    -> reports::Reports -> Command::Report
//!                     takes Usage      -> usage::Usages
//!                     Ping / Pong      -> Heard            -> leases -> the leader -> Command::NodeDown
//!    ALPN raft  -> PeerServe::serve
//!    ALPN relay -> relay::serve   another server's request to an agent that is connected here
//! ```
//! Every server holds sessions, as long as it hears a leader. What an agent says is believed about the node in its
//! certificate and about nothing else.

mod admission;
mod calls;
mod desired;
mod join;
mod known_keys;
mod leases;
mod relay;
mod reports;
mod servers;
mod session;
mod sessions;
mod trust;
pub mod usage;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use optimus_common::protocol::{ALPN_AGENT, ALPN_JOIN, ALPN_RAFT, ALPN_RELAY};
use optimus_common::{NodeId, Span};
use optimus_host::telemetry::Chain;
use optimus_host::tls::NoPins;
use optimus_host::transport::{self, HANDSHAKE_TIMEOUT, close};
use quinn::crypto::rustls::HandshakeData;
use quinn::{Connection, Endpoint, Incoming, VarInt};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::auth::AdminToken;
use crate::identity::{Identity, IdentityError};
use crate::peers::PeerServe;
use crate::raft::PeerHandler;
use crate::store::Store;
use admission::{Admission, Place};
use known_keys::KnownKeys;
use sessions::Sessions;

pub use leases::LeaseReports;

/// How often an agent is asked whether it is there.
pub const HEARTBEAT: Duration = Duration::from_secs(1);
/// A node not heard for so long is down.
pub const LEASE: Duration = Duration::from_secs(5);
/// After a start of the whole cluster nodes get this long to come back before silence counts.
pub const GRACE: Duration = Duration::from_secs(10);
/// Longest wait at the end for sessions to close.
const CLOSE_PATIENCE: Duration = Duration::from_secs(5);

/// Where the gateway listens and what join tokens say of it.
#[derive(Debug, Clone)]
pub struct GatewayConfig {
    /// UDP.
    pub listen: SocketAddr,
    /// `host:port` of this cluster's servers for join tokens, the preferred one first. Empty: the
    /// address listened on.
    pub advertise: Vec<String>,
    /// The administrator's token, which a joining server is handed.
    pub admin: AdminToken,
}

/// Why the gateway cannot start.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    #[error("failed to listen on UDP {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("`{0}` is not an address of the form host:port")]
    Advertise(String),
}

/// What the parts of the gateway share.
struct Shared {
    store: Store,
    identity: Arc<Identity>,
    advertise: Vec<String>,
    admin: AdminToken,
    admission: Arc<Admission>,
    sessions: Sessions,
    reports: reports::Reports,
    /// Who serves other servers; without it they find no common protocol.
    peers: Option<Arc<dyn PeerServe>>,
    leases: leases::Leases,
    usages: usage::Usages,
    relays: relay::Relays,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// The server's side of all agents.
pub struct Gateway {
    shared: Arc<Shared>,
    endpoint: Endpoint,
    local: SocketAddr,
}

impl Gateway {
    /// Takes the UDP port. Nothing is served before [`Gateway::run`].
    pub fn bind(store: Store, identity: Arc<Identity>, config: GatewayConfig) -> Result<Arc<Self>, GatewayError> {
        Self::bind_with_peers(store, identity, config, None)
    }

    /// The same, also for other servers, whose connections go to `peers`.
    pub fn bind_with_peers(
        store: Store,
        identity: Arc<Identity>,
        config: GatewayConfig,
        peers: Option<Arc<dyn PeerServe>>,
    ) -> Result<Arc<Self>, GatewayError> {
        let listen = |source| GatewayError::Listen { address: config.listen, source };
        let quic = match &peers {
            Some(peers) => identity.quic_server_with_peers(KnownKeys::new(peers.pins(), store.clone()))?,
            None => identity.quic_server(KnownKeys::new(Arc::new(NoPins), store.clone()))?,
        };
        let endpoint = transport::server_endpoint(quic, config.listen, &identity.reset_secret()).map_err(listen)?;
        let local = endpoint.local_addr().map_err(listen)?;
        let advertise = if config.advertise.is_empty() { vec![local.to_string()] } else { config.advertise };
        if let Some(bad) = advertise.iter().find(|a| !optimus_common::join_token::is_host_port(a)) {
            return Err(GatewayError::Advertise(bad.clone()));
        }
        let shared = Shared {
            store,
            identity,
            advertise,
            admin: config.admin,
            admission: Admission::new(),
            sessions: Sessions::default(),
            reports: reports::Reports::default(),
            peers,
            leases: leases::Leases::default(),
            usages: usage::Usages::default(),
            relays: relay::Relays::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        };
        Ok(Arc::new(Gateway { shared: Arc::new(shared), endpoint, local }))
    }

    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Sets the way to the leader; without one this server is taken to be alone. The first call counts.
    pub fn set_peers(&self, peers: Arc<dyn LeaseReports>) {
        self.shared.leases.set_peers(peers);
    }

    /// What answers other servers' lease reports, for [`RaftNode::set_handler`](crate::raft::RaftNode::set_handler).
    pub fn lease_handler(&self) -> Arc<dyn PeerHandler> {
        Arc::new(leases::Handler::new(&self.shared))
    }

    /// The server that holds a node's session, if it is not this one. Known to the leader only.
    pub fn holder(&self, node: NodeId) -> Option<u64> {
        self.shared.leases.holder(node)
    }

    /// Nodes with a session here.
    pub fn connected(&self) -> Vec<NodeId> {
        self.shared.sessions.connected()
    }

    /// How long ago this server last heard of a node.
    pub fn last_heard(&self, node: NodeId) -> Option<Span> {
        let at = self.shared.sessions.last_heard(node)?;
        Some(self.shared.store.env.clock.monotonic().saturating_sub(at).into())
    }

    /// Serves until `shutdown`; then closes all sessions and waits for their tasks.
    pub async fn run(&self, shutdown: CancellationToken) {
        let shared = &self.shared;
        shared.tasks.spawn(desired::run(shared.clone()));
        shared.tasks.spawn(reports::run(shared.clone()));
        // From before the first session, so that those of the first moments count as heard.
        shared.leases.serving_since(shared.store.env.clock.monotonic(), &shared.store.status());
        shared.tasks.spawn(leases::watch(shared.clone()));
        shared.tasks.spawn(leases::report(shared.clone()));
        tracing::info!(address = %self.local, "waiting for agents");
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                incoming = self.endpoint.accept() => match incoming {
                    Some(incoming) => self.admit(incoming),
                    None => break,
                },
            }
        }
        shared.stop.cancel();
        self.endpoint.close(VarInt::from_u32(close::GOING_AWAY), b"the server is stopping");
        shared.tasks.close();
        if tokio::time::timeout(CLOSE_PATIENCE, shared.tasks.wait()).await.is_err() {
            tracing::warn!(tasks = shared.tasks.len(), "some sessions did not end in time");
        }
        // Lets the farewells leave; connections linger for a moment to answer late packets.
        let _ = tokio::time::timeout(Duration::from_millis(200), self.endpoint.wait_idle()).await;
    }

    /// Gives an incoming connection a place, a retry or a refusal; never waits.
    fn admit(&self, incoming: Incoming) {
        let shared = &self.shared;
        let address = incoming.remote_address();
        if shared.admission.busy() && !incoming.remote_address_validated() && incoming.may_retry() {
            // Whoever does not own the address never sees the answer, and we keep nothing.
            let _ = incoming.retry(); // `may_retry` was true
            return;
        }
        let Some(place) = shared.admission.enter(address.ip()) else {
            tracing::debug!(%address, "connection refused: too many handshakes");
            incoming.refuse();
            return;
        };
        let connecting = match incoming.accept() {
            Ok(connecting) => connecting,
            Err(error) => {
                tracing::debug!(%address, %error, "connection not accepted");
                return;
            }
        };
        let (shared, stop) = (shared.clone(), shared.stop.clone());
        self.shared.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = serve(shared, connecting, address, place) => {}
            }
        });
    }
}

/// One connection from its handshake to its end.
async fn serve(shared: Arc<Shared>, connecting: quinn::Connecting, address: SocketAddr, place: Place) {
    let connection: Connection = match tokio::time::timeout(HANDSHAKE_TIMEOUT, connecting).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            // Also where certificates of other clusters and long expired ones end up.
            tracing::warn!(%address, reason = %transport::explain(&error), "connection refused in the handshake");
            return;
        }
        Err(_) => {
            tracing::debug!(%address, "handshake not finished in time");
            return;
        }
    };
    let alpn = connection.handshake_data().and_then(|data| data.downcast::<HandshakeData>().ok()).and_then(|data| data.protocol);
    match (alpn.as_deref(), &shared.peers) {
        (Some(protocol), _) if protocol == ALPN_AGENT => session::serve(&shared, connection, place).await,
        (Some(protocol), _) if protocol == ALPN_JOIN => join::serve(&shared, connection, place).await,
        (Some(protocol), Some(peers)) if protocol == ALPN_RAFT => {
            drop(place); // who is no member is sent away before the first byte is read
            peers.serve(connection).await;
        }
        (Some(protocol), Some(peers)) if protocol == ALPN_RELAY => {
            drop(place);
            relay::serve(&shared, &**peers, connection).await;
        }
        // rustls refuses a handshake without a common ALPN; this is for the day that changes.
        _ => connection.close(VarInt::from_u32(close::PROTOCOL), b"no common protocol"),
    }
}

/// Logs an end that is the other side's or the network's doing.
fn log_end(address: SocketAddr, node: NodeId, error: &transport::FrameError) {
    match error.connection() {
        Some(lost) => tracing::info!(%node, %address, reason = %transport::explain(lost), "agent disconnected"),
        None if error.is_violation() => tracing::warn!(%node, %address, error = %Chain(error), "agent broke the protocol"),
        None => tracing::info!(%node, %address, error = %Chain(error), "agent disconnected"),
    }
}
