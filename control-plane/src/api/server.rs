//! Connections: accept, TLS, HTTP/1.1 or HTTP/2, and an orderly end.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::host::AllowedHosts;
use super::{ApiConfig, ApiDeps, Shared, gate, openapi, routes};

/// Most connections at once. Further ones wait in the kernel's queue.
pub const CONNECTIONS_MAX: usize = 4096;
/// A TLS handshake must be done by then.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// The head of a request must be there by then; an idle HTTP/1.1 connection is closed after it.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a request's head.
pub const HEADER_BYTES_MAX: usize = 32 * 1024;
/// Requests at once on one HTTP/2 connection.
pub const H2_STREAMS_MAX: u32 = 64;
/// An HTTP/2 peer that answers no ping for this long (twice) is gone.
pub const H2_KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Bytes sent but not acknowledged for this long end a connection: a half-open one, or a reader that stalls.
pub const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(30);
/// At shutdown, requests under way get this long.
pub const GRACE: Duration = Duration::from_secs(10);
/// Pause after a failed accept (out of file descriptors), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves the API until `shutdown`; returns when every connection has ended (after [`GRACE`] at the latest).
pub async fn serve(config: ApiConfig, deps: ApiDeps, shutdown: CancellationToken) -> io::Result<()> {
    let ApiConfig { listeners, tls, allowed_hosts, limits } = config;
    let addresses = listeners.iter().map(TcpListener::local_addr).collect::<io::Result<Vec<SocketAddr>>>()?;
    let hosts = AllowedHosts::new(&addresses, &allowed_hosts);
    let shared = Arc::new(Shared::new(deps, hosts, openapi::document_json(), limits, shutdown.clone()));
    let router = routes::router(shared.clone());
    let mut tls = ServerConfig::clone(&tls);
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let permits = Arc::new(Semaphore::new(limits.connections));
    let mut loops = JoinSet::new();
    for listener in listeners {
        loops.spawn(accept(listener, acceptor.clone(), permits.clone(), shared.clone(), router.clone(), shutdown.clone()));
    }
    while let Some(ended) = loops.join_next().await {
        ended.map_err(io::Error::other)?;
    }
    Ok(())
}

async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    permits: Arc<Semaphore>,
    shared: Arc<Shared>,
    router: Router,
    shutdown: CancellationToken,
) {
    let mut connections = JoinSet::new();
    loop {
        let permit = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            permit = permits.clone().acquire_owned() => match permit { Ok(permit) => permit, Err(_) => break },
        };
        let accepted = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            Some(ended) = connections.join_next() => {
                log_end(ended);
                continue;
            }
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                let connection = connection(stream, peer, acceptor.clone(), shared.clone(), router.clone(), shutdown.clone());
                connections.spawn(async move {
                    connection.await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "failed to accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    let drained = async {
        while let Some(ended) = connections.join_next().await {
            log_end(ended);
        }
    };
    if tokio::time::timeout(GRACE, drained).await.is_err() {
        tracing::warn!(connections = connections.len(), "ending connections that did not end by themselves");
        connections.shutdown().await;
    }
}

fn log_end(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection's task panicked");
    }
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    acceptor: TlsAcceptor,
    shared: Arc<Shared>,
    router: Router,
    shutdown: CancellationToken,
) {
    let unacknowledged = UNACKNOWLEDGED_MAX.as_millis() as u32;
    if let Err(error) = stream.set_nodelay(true).and_then(|()| Ok(rustix::net::sockopt::set_tcp_user_timeout(&stream, unacknowledged)?)) {
        tracing::debug!(%error, %peer, "failed to set socket options");
    }
    let handshake = tokio::time::timeout(shared.limits.handshake, acceptor.accept(stream));
    let tls = tokio::select! {
        () = shutdown.cancelled() => return,
        handshake = handshake => match handshake {
            Ok(Ok(tls)) => tls,
            Ok(Err(error)) => return tracing::debug!(%error, %peer, "TLS handshake failed"),
            Err(_) => return tracing::debug!(%peer, "TLS handshake took too long"),
        },
    };
    // The protocol is what TLS agreed on; guessing it from the bytes would wait for them without a limit.
    let h2 = tls.get_ref().1.alpn_protocol() == Some(b"h2");
    let header_timeout = shared.limits.header;
    let service = hyper::service::service_fn(move |request: hyper::Request<Incoming>| {
        let (shared, router) = (shared.clone(), router.clone());
        async move { Ok::<_, std::convert::Infallible>(gate::answer(shared, router, peer, request.map(Body::new)).await) }
    });
    let builder = builder(h2, header_timeout);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(tls), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, %peer, "connection ended with an error");
    }
}

fn builder(h2: bool, header_timeout: Duration) -> auto::Builder<TokioExecutor> {
    let builder = auto::Builder::new(TokioExecutor::new());
    let mut builder = if h2 { builder.http2_only() } else { builder.http1_only() };
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_buf_size(HEADER_BYTES_MAX)
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(H2_STREAMS_MAX)
        .max_header_list_size(HEADER_BYTES_MAX as u32)
        .keep_alive_interval(H2_KEEP_ALIVE)
        .keep_alive_timeout(H2_KEEP_ALIVE);
    builder
}
