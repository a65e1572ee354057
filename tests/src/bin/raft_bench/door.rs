//! etcd's put over HTTP/2, each request proposed on its own.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use h2::server::SendResponse;
use http::{HeaderMap, HeaderValue, Request, Response};
use optimus_control_plane::consensus::RaftConsensus;
use optimus_control_plane::store::Consensus as _;
use optimus_core::state::{Applied, Command, Proposal};
use tokio::net::TcpListener;

use crate::etcd_wire;
use crate::node::{HostTime, facts};

/// Requests of one connection at a time; etcd's own bound is higher.
const STREAMS: u32 = 1024;
/// Longest message.
const MESSAGE_MAX: usize = 64 << 10;

pub async fn serve(at: SocketAddr, consensus: Arc<RaftConsensus>) -> anyhow::Result<()> {
    let listener = TcpListener::bind(at).await?;
    loop {
        let (socket, _) = listener.accept().await?;
        socket.set_nodelay(true)?;
        let consensus = consensus.clone();
        tokio::spawn(async move {
            let mut builder = h2::server::Builder::new();
            builder.max_concurrent_streams(STREAMS).initial_window_size(1 << 20).initial_connection_window_size(1 << 24);
            let Ok(mut connection) = builder.handshake::<_, Bytes>(socket).await else { return };
            while let Some(Ok((request, respond))) = connection.accept().await {
                let consensus = consensus.clone();
                tokio::spawn(async move {
                    // A client that went away does not need its answer.
                    let _ = answer(&consensus, request, respond).await;
                });
            }
        });
    }
}

async fn answer(consensus: &RaftConsensus, request: Request<h2::RecvStream>, mut respond: SendResponse<Bytes>) -> anyhow::Result<()> {
    let mut body = request.into_body();
    let mut message = Bytes::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        anyhow::ensure!(message.len() + chunk.len() <= MESSAGE_MAX, "the message is too long");
        message = match message.is_empty() {
            true => chunk,
            false => {
                let mut whole = BytesMut::from(message);
                whole.extend_from_slice(&chunk);
                whole.freeze()
            }
        };
    }
    let status = match etcd_wire::decode(&message) {
        None => "3",
        Some((key, value)) => put(consensus, key, value).await,
    };
    let mut response = Response::new(());
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    let mut send = respond.send_response(response, false)?;
    // An empty PutResponse.
    send.send_data(Bytes::from_static(&[0; 5]), false)?;
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static(status));
    send.send_trailers(trailers)?;
    Ok(())
}

/// Sets the row of server 1 to the key and value, and gives the gRPC status.
async fn put(consensus: &RaftConsensus, key: &[u8], value: &[u8]) -> &'static str {
    let mut text = String::with_capacity(2 * key.len() + value.len());
    for byte in key {
        use std::fmt::Write as _;
        let _ = write!(text, "{byte:02x}"); // writing to a string cannot fail
    }
    text.push_str(&String::from_utf8_lossy(value));
    let command = Command::ServerUp { id: 1, server: facts(text) };
    match consensus.propose(Proposal { at: HostTime::now(), request: None, command }).await {
        Ok(Applied::Done { .. } | Applied::Unchanged { .. }) => "0",
        Ok(_) => "9",
        Err(_) => "14",
    }
}
