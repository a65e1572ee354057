//! A scripted API behind real TLS: answers what a test says, and remembers what it was asked.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, Request};
use axum::response::Response;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// Token the fake expects in every request.
pub const TOKEN: &str = "secret-token";

#[derive(Debug, Clone)]
pub struct Seen {
    pub method: String,
    /// Path and query.
    pub target: String,
    pub headers: HeaderMap,
    pub body: Value,
}

impl Seen {
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

pub struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    /// Sent one after the other.
    pieces: Vec<String>,
    /// Leaves the answer open after the last piece.
    hang: bool,
    delay: Duration,
}

impl Reply {
    pub fn json(value: impl serde::Serialize) -> Self {
        Reply {
            status: 200,
            headers: vec![("content-type", "application/json".into()), ("x-request-id", "req-42".into())],
            pieces: vec![serde_json::to_string(&value).unwrap()],
            hang: false,
            delay: Duration::ZERO,
        }
    }

    pub fn lines(lines: &[&str]) -> Self {
        let pieces = lines.iter().map(|line| format!("{line}\n")).collect();
        Reply { pieces, headers: vec![("content-type", "application/x-ndjson".into())], ..Reply::json(()) }
    }

    pub fn problem(status: u16, code: &str, detail: &str) -> Self {
        let body = serde_json::json!({
            "type": format!("https://optimus.dev/errors/{code}"), "title": "title", "status": status, "detail": detail,
            "code": code, "request_id": "req-42", "retryable": status == 503,
        });
        Reply { status, ..Reply::json(body) }
    }

    /// Another body.
    pub fn with(mut self, body: Value) -> Self {
        self.pieces = vec![body.to_string()];
        self
    }

    pub fn header(mut self, name: &'static str, value: impl ToString) -> Self {
        self.headers.push((name, value.to_string()));
        self
    }

    pub fn hanging(mut self) -> Self {
        self.hang = true;
        self
    }

    pub fn after(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }
}

type Script = dyn Fn(&Seen) -> Reply + Send + Sync;

pub struct Fake {
    pub address: SocketAddr,
    pub ca_pem: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    // Dropped last: ends the server.
    _runtime: tokio::runtime::Runtime,
}

impl Fake {
    pub fn start(script: impl Fn(&Seen) -> Reply + Send + Sync + 'static) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (acceptor, ca_pem) = tls();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let script: Arc<Script> = Arc::new(script);
        let router = {
            let seen = seen.clone();
            Router::new().fallback(move |request: Request<Body>| answer(script.clone(), seen.clone(), request))
        };
        runtime.spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { return };
                let (acceptor, router) = (acceptor.clone(), router.clone());
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let service = TowerToHyperService::new(router);
                    let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                    let _ = builder.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Fake { address, ca_pem, seen, _runtime: runtime }
    }

    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// Requests of one method and path, without the query.
    pub fn seen_of(&self, method: &str, path: &str) -> Vec<Seen> {
        self.seen().into_iter().filter(|seen| seen.method == method && seen.path() == path).collect()
    }
}

fn tls() -> (TlsAcceptor, String) {
    let mut ca = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let ca_certificate = ca.self_signed(&ca_key).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let certificate = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let private = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], private)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    (TlsAcceptor::from(Arc::new(config)), ca_certificate.pem())
}

async fn answer(script: Arc<Script>, all: Arc<Mutex<Vec<Seen>>>, request: Request<Body>) -> Response {
    let (parts, body) = request.into_parts();
    let bytes = axum::body::to_bytes(body, 1 << 20).await.unwrap();
    let seen = Seen {
        method: parts.method.to_string(),
        target: parts.uri.path_and_query().unwrap().to_string(),
        headers: parts.headers,
        body: serde_json::from_slice(&bytes).unwrap_or(Value::Null),
    };
    all.lock().unwrap().push(seen.clone());
    let authorised = seen.header("authorization") == Some(&format!("Bearer {TOKEN}"));
    let reply = if authorised { script(&seen) } else { Reply::problem(401, "OPT-1102", "the token is not known") };
    tokio::time::sleep(reply.delay).await;
    let mut response = Response::builder().status(reply.status);
    for (name, value) in reply.headers {
        response = response.header(name, value);
    }
    let pieces = futures_util::stream::iter(reply.pieces.into_iter().map(|piece| Ok::<_, std::io::Error>(Bytes::from(piece))));
    let body = if reply.hang {
        use futures_util::StreamExt;
        Body::from_stream(pieces.chain(futures_util::stream::pending()))
    } else {
        Body::from_stream(pieces)
    };
    response.body(body).unwrap()
}
