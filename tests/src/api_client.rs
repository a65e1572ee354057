//! A client of the REST API that tells a test everything: status, body, index, or that no answer came.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_millis(1000);

/// What the CLI keeps of a cluster: how to reach it and be let in.
#[derive(serde::Deserialize)]
struct Credentials {
    ca_pem: String,
    token: String,
}

/// A client of all servers of one cluster. Cheap to clone.
#[derive(Clone)]
pub struct ApiClient {
    http: reqwest::Client,
    token: String,
    servers: Vec<SocketAddr>,
}

/// An answer, of whatever status.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub body: Value,
    /// State index it was made at.
    pub index: Option<u64>,
}

impl Answer {
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// Whether asking again, maybe elsewhere, may succeed.
    pub fn is_retryable(&self) -> bool {
        matches!(self.status, 429 | 502 | 503 | 504)
    }
}

impl ApiClient {
    /// A client with the credentials a server wrote below `config` (its `XDG_CONFIG_HOME`).
    ///
    /// # Errors
    /// When there are none yet, or they are not understood.
    pub fn new(config: &Path, servers: Vec<SocketAddr>) -> anyhow::Result<Self> {
        let path = config.join("optimus/contexts/server.json");
        let text = std::fs::read(&path).with_context(|| format!("failed to read {}", path.display()))?;
        let Credentials { ca_pem, token } = serde_json::from_slice(&text).context("the credentials are not understood")?;
        // The second call of a process finds it installed.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = reqwest::Client::builder()
            .tls_certs_only(reqwest::Certificate::from_pem_bundle(ca_pem.as_bytes())?)
            .https_only(true)
            .no_proxy()
            .connect_timeout(CONNECT)
            .build()?;
        Ok(Self { http, token, servers })
    }

    /// How many servers it knows.
    pub fn servers(&self) -> usize {
        self.servers.len()
    }

    /// Another server to talk to.
    pub fn add_server(&mut self, addr: SocketAddr) {
        self.servers.push(addr);
    }

    fn url(&self, server: usize, path: &str) -> String {
        format!("https://{}{path}", self.servers[server])
    }

    /// `GET path` of a server, within `patience`.
    ///
    /// # Errors
    /// When no whole answer came.
    pub async fn get(&self, server: usize, path: &str, patience: Duration) -> anyhow::Result<Answer> {
        answer(self.http.get(self.url(server, path)).bearer_auth(&self.token).timeout(patience)).await
    }

    /// `POST path` of a server, within `patience`; the same `key` has one effect however often it is sent.
    ///
    /// # Errors
    /// When no whole answer came; it may have had its effect.
    pub async fn post(&self, server: usize, path: &str, key: &str, body: &Value, patience: Duration) -> anyhow::Result<Answer> {
        let request = self.http.post(self.url(server, path)).bearer_auth(&self.token).timeout(patience);
        answer(request.header("Idempotency-Key", key).json(body)).await
    }

    /// The head of a streamed answer; its body comes by [`reqwest::Response::chunk`] for as long as the server sends.
    ///
    /// # Errors
    /// When the server is not reached.
    pub async fn stream(&self, server: usize, path: &str) -> anyhow::Result<reqwest::Response> {
        Ok(self.http.get(self.url(server, path)).bearer_auth(&self.token).send().await?)
    }
}

async fn answer(request: reqwest::RequestBuilder) -> anyhow::Result<Answer> {
    let response = request.send().await?;
    let status = response.status().as_u16();
    let index = response.headers().get("optimus-index").and_then(|v| v.to_str().ok()?.parse().ok());
    let bytes = response.bytes().await?;
    let body = if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes).context("the answer is not JSON")? };
    Ok(Answer { status, body, index })
}
