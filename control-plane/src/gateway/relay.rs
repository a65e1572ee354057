//! Requests to agents that are connected to another server.
//!
//! ```text
//! asking server                        server with the session           agent
//!    | -- node's id, 16 bytes, request --> | -- request ------------------> |
//!    | <- HERE, answer ------------------- | <- answer -------------------- |
//! ```
//! What follows the id and the first byte is passed on as it is, so a new kind of request needs nothing here. Only the
//! leader knows which server holds a session, and it may be wrong for a moment; so all are asked at once, and those
//! without the session say ELSEWHERE. Connections are apart from those of Raft, which no log may hold up.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use optimus_common::NodeId;
use optimus_common::protocol::ALPN_RELAY;
use optimus_host::telemetry::Chain;
use optimus_host::tls::{self, ExpectedServer, SERVER_NAME};
use optimus_host::transport::{self, HANDSHAKE_TIMEOUT, RELAY_STREAMS, close};
use quinn::{Connection, Endpoint, RecvStream, SendStream, VarInt};

use super::Shared;
use crate::agent_calls::AgentCallError;
use crate::peers::{self, PeerServe};

/// Longest wait for a connection to another server.
const DIAL_TIMEOUT: Duration = Duration::from_secs(2);
/// Most bytes passed on at once.
const STEP: usize = 64 << 10;
/// First byte of an answer: the agent's own follows.
const HERE: u8 = 1;
/// And the only one: no session of that node.
const ELSEWHERE: u8 = 0;

/// Connections to other servers, by their number.
#[derive(Default)]
pub struct Relays(Mutex<BTreeMap<u64, Connection>>);

impl Relays {
    fn held(&self) -> MutexGuard<'_, BTreeMap<u64, Connection>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream to the agent of `node` through whichever server it is connected to.
pub async fn open(shared: &Arc<Shared>, endpoint: &Endpoint, node: NodeId) -> Result<(SendStream, RecvStream), AgentCallError> {
    let (state, me) = (shared.store.state(), shared.store.status().server);
    let others = state.servers.values().filter(|row| row.id != me).map(|row| row.id);
    let mut asked: FuturesUnordered<_> = others.map(|server| through(shared, endpoint, server, node)).collect();
    while let Some(answer) = asked.next().await {
        match answer {
            Ok(Some(streams)) => return Ok(streams),
            Ok(None) => {}
            Err(why) => tracing::debug!(%node, why, "a server cannot be asked for a node"),
        }
    }
    Err(AgentCallError::NotConnected)
}

/// The stream through `server`; none if it has no session of the node.
async fn through(shared: &Shared, endpoint: &Endpoint, server: u64, node: NodeId) -> Result<Option<(SendStream, RecvStream)>, String> {
    let connection = connection(shared, endpoint, server).await?;
    let ask = async {
        let (mut send, mut receive) = connection.open_bi().await.map_err(|e| transport::explain(&e))?;
        send.write_all(node.0.as_bytes()).await.map_err(|e| e.to_string())?;
        let mut first = [ELSEWHERE];
        receive.read_exact(&mut first).await.map_err(|e| e.to_string())?;
        Ok((first == [HERE]).then_some((send, receive)))
    };
    ask.await
}

async fn connection(shared: &Shared, endpoint: &Endpoint, server: u64) -> Result<Connection, String> {
    let held = shared.relays.held().get(&server).filter(|c| c.close_reason().is_none()).cloned();
    if let Some(connection) = held {
        return Ok(connection);
    }
    let members = shared.identity.members();
    let address = members.address(server).ok_or_else(|| format!("server {server} has no address"))?;
    let settings = shared.identity.peer_settings(Arc::new(members.clone()));
    let expected = ExpectedServer { cluster: settings.cluster, server };
    let tls = tls::peer_client(&settings.roots, expected, settings.certificate, settings.pins, ALPN_RELAY, &settings.env.clock);
    let config = transport::relay_config(tls.map_err(|e| Chain(&e).to_string())?).map_err(|e| Chain(&e).to_string())?;
    let dial = async {
        let ours: SocketAddr = endpoint.local_addr().map_err(|e| e.to_string())?;
        let mut found = tokio::net::lookup_host(&*address).await.map_err(|e| format!("{address}: {e}"))?;
        let target = found.find(|a| ours.is_ipv6() || a.is_ipv4()).ok_or_else(|| format!("{address}: no address this server can reach"))?;
        let connecting = endpoint.connect_with(config, target, SERVER_NAME).map_err(|e| e.to_string())?;
        connecting.await.map_err(|e| transport::explain(&e))
    };
    let connection = tokio::time::timeout(DIAL_TIMEOUT, dial).await.map_err(|_| format!("server {server} does not answer"))??;
    let mut held = shared.relays.held();
    held.retain(|id, connection| connection.close_reason().is_none() && members.address(*id).is_some());
    // Two that dialled at once each keep theirs; the one not held ends when it falls silent.
    held.insert(server, connection.clone());
    Ok(connection)
}

/// Serves the requests of another server to its end.
pub async fn serve(shared: &Arc<Shared>, peers: &dyn PeerServe, connection: Connection) {
    connection.set_max_concurrent_bi_streams(VarInt::from_u32(RELAY_STREAMS));
    loop {
        // Asked each time: a server that was removed gets nothing more.
        if let Err(reason) = peers.identify(&connection) {
            return peers::refuse(&connection, &reason);
        }
        let Ok((send, receive)) = connection.accept_bi().await else { return };
        let (shared, stop) = (shared.clone(), shared.stop.clone());
        shared.tasks.clone().spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = pass_on(&shared, send, receive) => {}
            }
        });
    }
}

async fn pass_on(shared: &Shared, mut send: SendStream, mut receive: RecvStream) {
    let mut id = [0u8; 16];
    if !matches!(tokio::time::timeout(HANDSHAKE_TIMEOUT, receive.read_exact(&mut id)).await, Ok(Ok(()))) {
        return;
    }
    let session = shared.sessions.get(NodeId(uuid::Uuid::from_bytes(id)));
    let opened = match &session {
        Some(session) => session.connection.open_bi().await.ok(),
        None => None,
    };
    let first = if opened.is_some() { HERE } else { ELSEWHERE };
    if send.write_all(&[first]).await.is_ok()
        && let Some((to_agent, from_agent)) = opened
    {
        tokio::join!(copy(receive, to_agent), copy(from_agent, send));
    }
}

/// Passes on what comes until its end, and in the other direction that nobody wants it any more.
async fn copy(mut from: RecvStream, mut to: SendStream) {
    let unwanted = to.stopped();
    tokio::pin!(unwanted);
    loop {
        let step = tokio::select! {
            step = from.read_chunk(STEP, true) => step,
            _ = &mut unwanted => {
                let _ = from.stop(VarInt::from_u32(close::DONE)); // ended meanwhile
                return;
            }
        };
        match step {
            Ok(Some(chunk)) => {
                if to.write_chunk(chunk.bytes).await.is_err() {
                    let _ = from.stop(VarInt::from_u32(close::DONE));
                    return;
                }
            }
            Ok(None) => {
                let _ = to.finish(); // fails only if it is finished
                return;
            }
            // The reader must see a break, not an end.
            Err(_) => {
                let _ = to.reset(VarInt::from_u32(close::GOING_AWAY));
                return;
            }
        }
    }
}
