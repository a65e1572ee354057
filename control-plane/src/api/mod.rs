//! The REST API, `/v1`, over TLS.
//!
//! A connection ([`server`]) hands each request to the gate (`gate`: request id, bounds, host check,
//! panics, log), the router picks a route from the table ([`routes`]), the route's permission is
//! checked, and its handler (`v1`) answers from a snapshot of the state or proposes a command. The
//! API decides nothing: `apply` does, and core renders the views.

mod console;
mod context;
mod gate;
mod host;
mod idempotency;
mod json;
mod logs;
mod merge;
mod ndjson;
pub mod openapi;
mod paging;
pub mod problem;
pub mod routes;
pub mod server;
mod v1;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

pub use console::is_built as console_is_built;
pub use json::{BODY_MAX, DEPTH_MAX};
pub use server::serve;
pub use watch::WAIT_MAX;

use crate::agent_calls::AgentCalls;
use crate::auth::Auth;
use crate::cluster_admin::ClusterAdmin;
use crate::identity::SecretBox;
use crate::join_tokens::JoinTokens;
use crate::metrics::Metrics;
use crate::store::Store;
use host::AllowedHosts;

/// Most requests being answered at once; further ones get 503.
pub const IN_FLIGHT_MAX: usize = 1024;
/// Most long polls and streams at once; further ones get 503.
pub const WAITERS_MAX: usize = 1024;

/// Most exports at once; further ones get 503. Each holds the state as bytes, and with a passphrase 128 MiB for a moment.
pub const EXPORTS_MAX: usize = 1;

/// Bounds of one server. The defaults are what production runs with; tests take smaller ones.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// [`server::CONNECTIONS_MAX`]
    pub connections: usize,
    /// [`IN_FLIGHT_MAX`]
    pub in_flight: usize,
    /// [`WAITERS_MAX`]
    pub waiters: usize,
    /// [`server::HANDSHAKE_TIMEOUT`]
    pub handshake: Duration,
    /// [`server::HEADER_TIMEOUT`]
    pub header: Duration,
    /// [`routes::REQUEST_TIMEOUT`]
    pub request: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: server::CONNECTIONS_MAX,
            in_flight: IN_FLIGHT_MAX,
            waiters: WAITERS_MAX,
            handshake: server::HANDSHAKE_TIMEOUT,
            header: server::HEADER_TIMEOUT,
            request: routes::REQUEST_TIMEOUT,
        }
    }
}

/// Where and as whom to serve.
pub struct ApiConfig {
    /// Bound by the caller.
    pub listeners: Vec<TcpListener>,
    /// Certificate and protocol versions; ALPN is set here.
    pub tls: Arc<rustls::ServerConfig>,
    /// Names (or `name:port`) answered to, beside `localhost`, loopback and the listen addresses.
    pub allowed_hosts: Vec<String>,
    pub limits: Limits,
}

/// What the API stands on.
#[derive(Clone)]
pub struct ApiDeps {
    pub store: Store,
    pub agents: Arc<dyn AgentCalls>,
    pub auth: Arc<Auth>,
    pub joins: Arc<dyn JoinTokens>,
    pub cluster: Arc<dyn ClusterAdmin>,
    pub secrets: Arc<dyn SecretBox>,
    /// Others register their figures with it too.
    pub metrics: Arc<Metrics>,
}

/// One server's shared parts.
pub(crate) struct Shared {
    pub deps: ApiDeps,
    pub hosts: AllowedHosts,
    /// The document, as bytes.
    pub openapi: bytes::Bytes,
    pub in_flight: Arc<Semaphore>,
    pub waiters: Arc<Semaphore>,
    /// Places of exports under way.
    pub exports: Arc<Semaphore>,
    pub limits: Limits,
    pub shutdown: CancellationToken,
}

impl Shared {
    fn new(deps: ApiDeps, hosts: AllowedHosts, openapi: bytes::Bytes, limits: Limits, shutdown: CancellationToken) -> Self {
        Shared {
            deps,
            hosts,
            openapi,
            in_flight: Arc::new(Semaphore::new(limits.in_flight)),
            waiters: Arc::new(Semaphore::new(limits.waiters)),
            exports: Arc::new(Semaphore::new(EXPORTS_MAX)),
            limits,
            shutdown,
        }
    }
}
