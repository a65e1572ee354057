//! Servers on loopback sockets, each with a runtime of its own, so that one can end as a killed process does: without a
//! word to the others.
#![allow(clippy::unwrap_used)]

mod certificates;
mod cluster;
mod gateway;
mod hostile;
mod links;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use optimus_common::env::{Clock, Env};
use optimus_common::protocol::{ALPN_AGENT, ALPN_RAFT};
use optimus_common::{ClusterId, NodeId, Span, Timestamp};
use optimus_host::clock::HostClock;
use optimus_host::env::HostEnv;
use optimus_host::tls::{self, Key, PinTable, Roots};
use optimus_host::transport;
use quinn::Endpoint;
use rustls::client::ResolvesClientCert;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::runtime::Runtime;

use super::{PeerServe as _, PeerServer, PeerSettings, QuicPeers};
use crate::identity::{Ca, CheckedRequest};
use crate::raft::{Peer, PeerError, PeerHandler, PeerRpc, PeerTransport as _};

/// The host's clock, moved.
#[derive(Default)]
struct Shifted(AtomicU64);

impl Clock for Shifted {
    fn now(&self) -> Timestamp {
        HostClock.now() + Span(self.0.load(Ordering::Relaxed))
    }
    fn monotonic(&self) -> Duration {
        HostClock.monotonic()
    }
    fn sleep(&self, duration: Duration) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> {
        HostClock.sleep(duration)
    }
}

/// One certificate, for both ends of a connection.
#[derive(Debug)]
struct Shown(Arc<CertifiedKey>);

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}
impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
    fn has_certs(&self) -> bool {
        true
    }
}

fn shown(certificate: Vec<u8>, key: &Key) -> Arc<Shown> {
    Arc::new(Shown(Arc::new(CertifiedKey::from_der(vec![certificate.into()], key.private_der(), &tls::provider()).unwrap())))
}

/// A cluster's authority and clock.
struct World {
    env: Env,
    clock: Arc<Shifted>,
    cluster: ClusterId,
    ca: Ca,
    roots: Arc<Roots>,
    /// What everybody believes who is given nothing else.
    pins: Arc<PinTable>,
}

impl World {
    fn new() -> Self {
        let clock = Arc::new(Shifted::default());
        let env = Env { clock: clock.clone(), ..HostEnv::new() };
        let cluster = ClusterId(env.new_id());
        let (ca, _) = Ca::create(cluster, &env).unwrap();
        let roots = Roots::new(&[ca.certificate()]).unwrap();
        World { env, clock, cluster, ca, roots, pins: PinTable::new([]) }
    }

    /// A certificate of server `number`, whose key everybody then has on record.
    fn server(&self, number: u64) -> Arc<Shown> {
        let key = Key::generate().unwrap();
        self.pins.set(number, key.fingerprint());
        shown(self.ca.issue_server(&key, number, &[], &self.env).unwrap().certificate, &key)
    }

    fn agent(&self) -> Arc<Shown> {
        let key = Key::generate().unwrap();
        let request = CheckedRequest::parse(&key.request().unwrap()).unwrap();
        shown(self.ca.issue_agent(&request, NodeId(self.env.new_id()), &self.env).unwrap().certificate, &key)
    }

    fn settings(&self, number: u64, certificate: Arc<Shown>) -> PeerSettings {
        let (roots, pins, env) = (self.roots.clone(), self.pins.clone(), self.env.clone());
        PeerSettings { cluster: self.cluster, server: number, roots, certificate, pins, env }
    }

    /// Server `number` that answers with `handler`.
    fn start(&self, number: u64, handler: Arc<dyn PeerHandler>) -> Listening {
        Listening::start(self.settings(number, self.server(number)), handler, None)
    }

    /// The caller's end of server `number`.
    fn caller(&self, number: u64) -> Arc<QuicPeers> {
        QuicPeers::new(self.settings(number, self.server(number))).unwrap()
    }

    fn days_later(&self, days: u64) {
        self.clock.0.fetch_add(days * 24 * 3_600_000, Ordering::Relaxed);
    }
}

/// The called end of a server.
struct Listening {
    settings: PeerSettings,
    addr: SocketAddr,
    accepted: Arc<AtomicUsize>,
    server: PeerServer,
    runtime: Option<Runtime>,
}

impl Listening {
    fn start(settings: PeerSettings, handler: Arc<dyn PeerHandler>, at: Option<SocketAddr>) -> Self {
        let server = PeerServer::new(&settings, handler, None);
        Self::serve(settings, server, at)
    }

    fn serve(settings: PeerSettings, server: PeerServer, at: Option<SocketAddr>) -> Self {
        let secret = [settings.server as u8; 32];
        Self::serve_with(settings, server, at, &secret)
    }

    /// `secret`: with another one than before, those who were connected are not told that they were forgotten.
    fn serve_with(settings: PeerSettings, server: PeerServer, at: Option<SocketAddr>, secret: &[u8; 32]) -> Self {
        // The certificate is for both ends; its other half is behind the trait.
        let certificate = Shown(settings.certificate.resolve(&[], &[]).unwrap());
        let alpn = [ALPN_AGENT, ALPN_RAFT];
        let tls = tls::machine_server(&settings.roots, Arc::new(certificate), settings.pins.clone(), &alpn, &settings.env.clock).unwrap();
        let config = transport::server_config(tls).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let at = at.unwrap_or((Ipv4Addr::LOCALHOST, 0).into());
        let deadline = Instant::now() + Duration::from_secs(10);
        let endpoint = loop {
            let _inside = runtime.enter();
            match transport::server_endpoint(config.clone(), at, secret) {
                Ok(endpoint) => break endpoint,
                // The one before has ended, but its socket is closed by another thread.
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        let addr = endpoint.local_addr().unwrap();
        let (accepted, serving) = (Arc::new(AtomicUsize::new(0)), server.clone());
        let count = accepted.clone();
        runtime.spawn(async move {
            while let Some(incoming) = endpoint.accept().await {
                let (serving, count) = (serving.clone(), count.clone());
                tokio::spawn(async move {
                    if let Ok(connection) = incoming.await {
                        count.fetch_add(1, Ordering::Relaxed);
                        serving.serve(connection).await;
                    }
                });
            }
        });
        Listening { settings, addr, accepted, server, runtime: Some(runtime) }
    }

    fn peer(&self) -> Peer {
        Peer { id: self.settings.server, addr: self.addr.to_string() }
    }

    fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }

    /// Ends it without a farewell. The port is free soon after.
    fn kill(mut self) -> (PeerSettings, SocketAddr) {
        self.runtime.take().unwrap().shutdown_background();
        (self.settings.clone(), self.addr)
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Answers with the body, and remembers who asked; `Propose` is never answered, `Transfer` is refused.
#[derive(Default)]
struct Echo {
    calls: Mutex<Vec<(u64, PeerRpc)>>,
}

impl Echo {
    fn calls(&self) -> usize {
        self.calls.lock().unwrap().len()
    }
}

impl PeerHandler for Echo {
    fn handle(&self, from: u64, kind: PeerRpc, body: Bytes) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        self.calls.lock().unwrap().push((from, kind));
        Box::pin(async move {
            match kind {
                PeerRpc::Propose => std::future::pending().await,
                PeerRpc::Transfer => Err(PeerError::Refused("not today".to_owned())),
                _ => Ok(body),
            }
        })
    }
}

const TTL: Duration = Duration::from_secs(10);

async fn append(from: &Arc<QuicPeers>, to: &Peer, body: &'static str) -> Result<Bytes, PeerError> {
    from.call(to.clone(), PeerRpc::Append, Bytes::from_static(body.as_bytes()), TTL).await
}

/// A call that must fail, with why.
async fn refused(from: &Arc<QuicPeers>, to: &Peer) -> String {
    match append(from, to, "let me in").await {
        Err(PeerError::Unreachable(reason) | PeerError::NotSent(reason)) => reason,
        other => panic!("{other:?}"),
    }
}

/// Polls until `condition` holds.
async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within 20 s");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
