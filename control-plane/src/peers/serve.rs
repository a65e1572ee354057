//! The called side: who is it, may it still call, and one task a request.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use optimus_common::ClusterId;
use optimus_host::tls::{PeerIdentity, PinnedKeys, Role};
use optimus_host::transport::{self, PEER_STREAMS, close};
use quinn::{Connection, RecvStream, SendStream, VarInt};
use rustls_pki_types::CertificateDer;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use super::wire::{self, BODY_MAX, Fault, PART_MAX};
use super::{PeerSettings, QuicPeers};
use crate::raft::{Machine, PeerError, PeerHandler, PeerRpc, RaftNode};

/// Connections of one peer. It uses one; while it redials there may be more, and the oldest is closed.
const CONNECTIONS_MAX: usize = 4;
/// Longest wait for the rest of a request.
const BODY_PATIENCE: Duration = Duration::from_secs(30);
/// A body longer than this takes its length out of [`LARGE_TOTAL`] until the request is answered.
const LARGE: usize = 256 << 10;
/// Bytes of long bodies held at once for one connection, in KiB; further ones wait.
const LARGE_TOTAL: usize = 2 * BODY_MAX / 1024;

/// Serves connections of other servers.
pub trait PeerServe: Send + Sync + 'static {
    /// Serves one accepted connection with ALPN `optimus-raft/1` to its end.
    fn serve(&self, connection: Connection) -> BoxFuture<'static, ()>;

    /// The members, for the check of certificates in the handshake.
    fn pins(&self) -> Arc<dyn PinnedKeys>;

    /// The number of the member at the other end, or why it is none.
    fn identify(&self, connection: &Connection) -> Result<u64, String>;
}

/// A node answers its peers itself.
impl<M: Machine> PeerHandler for RaftNode<M> {
    fn handle(&self, from: u64, kind: PeerRpc, body: bytes::Bytes) -> BoxFuture<'static, Result<bytes::Bytes, PeerError>> {
        let node = self.clone();
        Box::pin(async move { node.handle_peer_rpc(from, kind, body).await })
    }
}

/// [`PeerServe`] for any [`PeerHandler`]; cheap to clone.
#[derive(Clone)]
pub struct PeerServer(Arc<Shared>);

struct Shared {
    cluster: ClusterId,
    server: u64,
    pins: Arc<dyn PinnedKeys>,
    handler: Arc<dyn PeerHandler>,
    peers: Option<Arc<QuicPeers>>,
    connections: Mutex<BTreeMap<u64, VecDeque<Connection>>>,
    tasks: TaskTracker,
    home: Handle,
}

impl fmt::Debug for PeerServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerServer(server {})", self.0.server)
    }
}

impl PeerServer {
    /// `handler` answers the requests, on the caller's runtime. `peers`, if given, is told which peers came up.
    pub fn new(settings: &PeerSettings, handler: Arc<dyn PeerHandler>, peers: Option<Arc<QuicPeers>>) -> Self {
        PeerServer(Arc::new(Shared {
            cluster: settings.cluster,
            server: settings.server,
            pins: settings.pins.clone(),
            handler,
            peers,
            connections: Mutex::default(),
            tasks: TaskTracker::new(),
            home: Handle::current(),
        }))
    }

    /// Closes all connections of peers and waits until every request taken has been answered or has failed, at most
    /// for `patience`; tells whether that was enough.
    pub async fn close(&self, patience: Duration) -> bool {
        for connection in self.0.connections().values().flatten() {
            connection.close(VarInt::from_u32(close::GOING_AWAY), b"the server is stopping");
        }
        self.0.tasks.close();
        tokio::time::timeout(patience, self.0.tasks.wait()).await.is_ok()
    }
}

impl PeerServe for PeerServer {
    fn serve(&self, connection: Connection) -> BoxFuture<'static, ()> {
        let shared = self.0.clone();
        let home = shared.home.clone();
        Box::pin(async move {
            let served = AbortOnDropHandle::new(home.spawn(shared.serve(connection))).await;
            if let Err(error) = served {
                tracing::error!(%error, "serving a peer ended badly");
            }
        })
    }

    fn pins(&self) -> Arc<dyn PinnedKeys> {
        self.0.pins.clone()
    }

    fn identify(&self, connection: &Connection) -> Result<u64, String> {
        self.0.identify(connection)
    }
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, BTreeMap<u64, VecDeque<Connection>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of the server at the other end. The handshake has checked the certificate.
    fn identify(&self, connection: &Connection) -> Result<u64, String> {
        let chain = connection.peer_identity().and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok());
        let Some(certificate) = chain.as_ref().and_then(|chain| chain.first()) else {
            return Err("servers must show a certificate".to_owned());
        };
        let identity = PeerIdentity::of(certificate).map_err(|e| e.to_string())?;
        if identity.cluster != self.cluster {
            return Err(format!("the certificate is for cluster {}, this is {}", identity.cluster, self.cluster));
        }
        match identity.role {
            Role::Server(number) if number == self.server => Err(format!("the certificate is that of server {number}, which is this one")),
            Role::Server(number) => self.member(number).map(|()| number),
            role @ Role::Agent(_) => Err(format!("the certificate is that of {role}, not of a server")),
        }
    }

    fn member(&self, number: u64) -> Result<(), String> {
        self.pins
            .key_of(number)
            .map(drop)
            .ok_or_else(|| format!("server {number} is not a member of this cluster: it was removed, or never joined"))
    }

    async fn serve(self: Arc<Self>, connection: Connection) {
        let address = connection.remote_address();
        // Before the first byte: who is it?
        let from = match self.identify(&connection) {
            Ok(from) => from,
            Err(reason) => return refuse(&connection, &reason),
        };
        let entered = Entered::new(self.clone(), from, connection);
        let connection = &entered.connection;
        connection.set_max_concurrent_bi_streams(VarInt::from_u32(PEER_STREAMS));
        tracing::debug!(peer = from, %address, "a peer connected");
        if let Some(peers) = &self.peers {
            peers.knocked(from);
        }
        // A request whose caller gave up frees its stream while it is still worked on: the bound on streams is not enough.
        let places = Arc::new(Semaphore::new(PEER_STREAMS as usize));
        let large = Arc::new(Semaphore::new(LARGE_TOTAL));
        loop {
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let (send, receive) = match connection.accept_bi().await {
                Ok(streams) => streams,
                Err(error) => {
                    tracing::debug!(peer = from, %address, reason = %transport::explain(&error), "a peer disconnected");
                    return;
                }
            };
            if let Err(reason) = self.member(from) {
                return refuse(connection, &reason);
            }
            let (shared, connection, large) = (self.clone(), connection.clone(), large.clone());
            self.tasks.spawn(async move {
                let _place = place;
                match shared.answer(from, send, receive, &large).await {
                    Ok(()) => {}
                    Err(Fault::Violation(what)) => {
                        tracing::warn!(peer = from, %address, error = what, "a peer broke the protocol");
                        connection.close(VarInt::from_u32(close::PROTOCOL), what.as_bytes());
                    }
                    Err(fault @ (Fault::Lost(_) | Fault::GivenUp)) => {
                        tracing::trace!(peer = from, error = %fault, "an answer was not wanted any more");
                    }
                }
            });
        }
    }

    async fn answer(&self, from: u64, send: SendStream, mut receive: RecvStream, large: &Arc<Semaphore>) -> Result<(), Fault> {
        let read = async {
            let (number, length, rest) = wire::read_head(&mut receive).await?;
            let kind = PeerRpc::try_from(number);
            // A kind we do not know yet gets an answer, if it is not too long.
            let most = kind.as_ref().map_or(PART_MAX, |kind| wire::body_max(*kind));
            if length > most {
                return Err(Fault::Violation(format!("request {number} of {length} bytes is longer than {most}")));
            }
            let room = match length {
                0..=LARGE => None,
                _ => {
                    let kib = u32::try_from(length.div_ceil(1024)).map_err(|e| Fault::Violation(e.to_string()))?;
                    Some(large.clone().acquire_many_owned(kib).await.map_err(|_| Fault::GivenUp)?)
                }
            };
            let body = wire::read_body(&mut receive, length, rest).await?;
            Ok((kind, body, room))
        };
        let (kind, body, room) = match tokio::time::timeout(BODY_PATIENCE, read).await {
            Ok(read) => read?,
            Err(_) => return Err(Fault::GivenUp),
        };
        let kind = match kind {
            Ok(kind) => kind,
            Err(unknown) => return wire::reply(send, PeerRpc::Append, Err(unknown)).await,
        };
        let answer = self.handler.handle(from, kind, body).await;
        drop(room);
        wire::reply(send, kind, answer).await?;
        wire::end(&mut receive)
    }
}

/// Sends a caller away that is no member.
pub(crate) fn refuse(connection: &Connection, reason: &str) {
    tracing::warn!(address = %connection.remote_address(), reason, "peer refused");
    connection.close(VarInt::from_u32(close::REFUSED), reason.as_bytes());
}

/// A connection in the table of those that are served; taken out at its end.
struct Entered {
    shared: Arc<Shared>,
    from: u64,
    connection: Connection,
}

impl Entered {
    fn new(shared: Arc<Shared>, from: u64, connection: Connection) -> Self {
        {
            let mut connections = shared.connections();
            let held = connections.entry(from).or_default();
            if held.len() >= CONNECTIONS_MAX
                && let Some(oldest) = held.pop_front()
            {
                oldest.close(VarInt::from_u32(close::REPLACED), b"replaced by a newer connection");
            }
            held.push_back(connection.clone());
        }
        Entered { shared, from, connection }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut connections = self.shared.connections();
        if let Some(held) = connections.get_mut(&self.from) {
            held.retain(|c| c.stable_id() != self.connection.stable_id());
            if held.is_empty() {
                connections.remove(&self.from);
            }
        }
    }
}
