//! Talking to the API: one place for TLS, timeouts, retries and what an answer's status means.
//!
//! Every request is bounded in time and size. A write carries an `Idempotency-Key`, so repeating it
//! after a lost answer or a 503 has one effect.

use std::time::{Duration, Instant};

use optimus_common::api::v1::{PAGE_MAX, Page, Problem};
use optimus_common::reason::code;
use reqwest::{Method, Response, StatusCode, Url, header};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::context::Context;
use crate::error::{Exit, Failure, unreachable};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Longest wait for an ordinary answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// What a long poll asks the server to wait, and how much longer we wait for its answer.
pub const LONG_POLL: Duration = Duration::from_secs(30);
const LONG_POLL_SLACK: Duration = Duration::from_secs(15);
/// A stream that sends nothing, not even a heartbeat, for this long is taken for dead.
pub const STREAM_IDLE: Duration = Duration::from_secs(60);
/// Tries of one request, and how long they may take together.
const TRIES_MAX: u32 = 6;
const TRIES_FOR: Duration = Duration::from_secs(20);
/// Longest wait for the newest state of who only looks, before what the server last knew is shown instead.
const FRESH_WITHIN: Duration = Duration::from_secs(3);
/// Longest `Retry-After` obeyed.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(5);
/// Largest answer and longest line of a stream.
const BODY_MAX: usize = 64 << 20;
const LINE_MAX: usize = 1 << 20;
/// Most objects of a list gathered by [`Client::list`].
const LIST_MAX: usize = 100_000;

/// A connection to one cluster.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
    token: String,
    /// Whether reads are answered from what the server knows, leader or not.
    stale: bool,
}

/// An answer and what its headers say.
#[derive(Debug)]
pub struct Answer<T> {
    pub value: T,
    /// State index the answer was made at (`Optimus-Index`).
    pub index: Option<u64>,
    /// How long before the answer a stale read's server heard the leader (`Optimus-Staleness`).
    pub staleness: Option<String>,
    pub request_id: Option<String>,
}

/// One request before it is sent.
struct Ask<'a> {
    method: Method,
    path: &'a str,
    query: &'a [(&'a str, String)],
    body: Option<Vec<u8>>,
    timeout: Duration,
    ndjson: bool,
    what: &'a str,
}

impl Client {
    /// # Errors
    /// Exit code 2 when the URL or the CA cannot be used.
    pub fn new(context: &Context) -> Result<Self, Failure> {
        let bad = |why: String| Failure::usage("cannot use the server's address").because(why).hint("see `optimus help credentials`");
        let base = Url::parse(&context.url).map_err(|error| bad(format!("`{}` is not a URL: {error}", context.url)))?;
        if base.scheme() != "https" || base.cannot_be_a_base() {
            return Err(bad(format!("`{}` is not an https:// URL", context.url)));
        }
        let certificates = reqwest::Certificate::from_pem_bundle(context.ca_pem.as_bytes())
            .map_err(|error| bad(format!("the CA certificate cannot be read: {}", cause(&error))))?;
        if certificates.is_empty() {
            return Err(bad("the CA file holds no certificate".into()));
        }
        if !context.token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(bad("the token holds characters that no token has".into()));
        }
        let http = reqwest::Client::builder()
            .tls_certs_only(certificates)
            .https_only(true)
            // A proxy for the web is no way to a cluster, and must not see its token.
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_keepalive(Duration::from_secs(15))
            .user_agent(concat!("optimus/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| bad(cause(&error)))?;
        Ok(Client { http, base, token: context.token.clone(), stale: false })
    }

    /// Whether it was made of this context.
    pub fn is_of(&self, context: &Context) -> bool {
        self.token == context.token && Url::parse(&context.url).is_ok_and(|url| url == self.base)
    }

    /// The server's address, for messages.
    pub fn url(&self) -> &str {
        self.base.as_str().trim_end_matches('/')
    }

    /// `what` names the intention in errors: `cannot list workloads`.
    pub async fn get<T: DeserializeOwned>(&self, path: &str, query: &[(&str, String)], what: &str) -> Result<Answer<T>, Failure> {
        self.answer(Ask { method: Method::GET, path, query, body: None, timeout: REQUEST_TIMEOUT, ndjson: false, what }).await
    }

    /// The same, or what the server last knew if no leader is found within [`FRESH_WITHIN`]: then the client that comes with
    /// the answer goes on reading so. Only for paths with `consistency`.
    pub async fn get_or_stale<T: DeserializeOwned>(&self, path: &str, what: &str) -> Result<(Client, Answer<T>), Failure> {
        let refused = match tokio::time::timeout(FRESH_WITHIN, self.get(path, &[], what)).await {
            Ok(Ok(answer)) => return Ok((self.clone(), answer)),
            Ok(Err(failure)) if failure.code.as_deref() != Some(code::NO_LEADER.code) => return Err(failure),
            Ok(Err(failure)) => Some(failure),
            Err(_) => None,
        };
        let stale = Client { stale: true, ..self.clone() };
        let answer = stale.get(path, &[], what).await.map_err(|failure| refused.unwrap_or(failure))?;
        Ok((stale, answer))
    }

    /// A `GET` that the server answers on a change after `index`, or after [`LONG_POLL`].
    pub async fn get_changed<T: DeserializeOwned>(&self, path: &str, index: u64, what: &str) -> Result<Answer<T>, Failure> {
        let query = [("index", index.to_string()), ("wait", format!("{}s", LONG_POLL.as_secs()))];
        let timeout = LONG_POLL + LONG_POLL_SLACK;
        self.answer(Ask { method: Method::GET, path, query: &query, body: None, timeout, ndjson: false, what }).await
    }

    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize, what: &str) -> Result<Answer<T>, Failure> {
        self.post_query(path, &[], body, what).await
    }

    pub async fn post_query<T: DeserializeOwned>(
        &self,
        path: &str,
        query: &[(&str, String)],
        body: &impl Serialize,
        what: &str,
    ) -> Result<Answer<T>, Failure> {
        let body = serde_json::to_vec(body).map_err(|error| Failure::new(Exit::Failed, what).because(error.to_string()))?;
        self.answer(Ask { method: Method::POST, path, query, body: Some(body), timeout: REQUEST_TIMEOUT, ndjson: false, what }).await
    }

    pub async fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize, what: &str) -> Result<Answer<T>, Failure> {
        let body = serde_json::to_vec(body).map_err(|error| Failure::new(Exit::Failed, what).because(error.to_string()))?;
        self.answer(Ask { method: Method::PUT, path, query: &[], body: Some(body), timeout: REQUEST_TIMEOUT, ndjson: false, what }).await
    }

    pub async fn delete<T: DeserializeOwned>(&self, path: &str, what: &str) -> Result<Answer<T>, Failure> {
        self.answer(Ask { method: Method::DELETE, path, query: &[], body: None, timeout: REQUEST_TIMEOUT, ndjson: false, what }).await
    }

    /// All pages of a collection, as one page.
    pub async fn list<T: DeserializeOwned>(&self, path: &str, query: &[(&str, String)], what: &str) -> Result<Page<T>, Failure> {
        let mut query: Vec<(&str, String)> = query.to_vec();
        query.push(("page_size", PAGE_MAX.to_string()));
        let mut all: Page<T> = self.get(path, &query, what).await?.value;
        while let Some(token) = all.next_page_token.take() {
            if all.items.len() >= LIST_MAX {
                return Err(Failure::new(Exit::Failed, what)
                    .because(format!("there are more than {LIST_MAX}"))
                    .hint("narrow it with --project and --env"));
            }
            query.retain(|(name, _)| *name != "page_token");
            query.push(("page_token", token));
            let next: Page<T> = self.get(path, &query, what).await?.value;
            if next.items.is_empty() {
                break;
            }
            all.items.extend(next.items);
            all.next_page_token = next.next_page_token;
        }
        Ok(all)
    }

    /// A stream of JSON lines.
    pub async fn stream(&self, path: &str, query: &[(&str, String)], what: &str) -> Result<Lines, Failure> {
        let ask = Ask { method: Method::GET, path, query, body: None, timeout: REQUEST_TIMEOUT, ndjson: true, what };
        let response = self.send(&ask).await?;
        Ok(Lines { response, buffer: Vec::new(), scanned: 0, ended: false, what: what.to_owned() })
    }

    /// A `POST` whose answer is a file: hands its pieces to `sink`. An error, also of a broken answer, means the file is
    /// not whole. Gives the index it was made at.
    pub async fn download(
        &self,
        path: &str,
        body: &impl Serialize,
        what: &str,
        mut sink: impl FnMut(&[u8]) -> std::io::Result<()>,
    ) -> Result<Option<u64>, Failure> {
        let body = serde_json::to_vec(body).map_err(|error| Failure::new(Exit::Failed, what).because(error.to_string()))?;
        let ask = Ask { method: Method::POST, path, query: &[], body: Some(body), timeout: REQUEST_TIMEOUT, ndjson: false, what };
        let mut response = self.send(&ask).await?;
        let index = response.headers().get("optimus-index").and_then(|v| v.to_str().ok()).and_then(|v| v.parse().ok());
        loop {
            let broke = |why: String| Failure::new(Exit::Unreachable, what).because(why).with_code(&code::UNREACHABLE);
            match tokio::time::timeout(STREAM_IDLE, response.chunk()).await {
                Err(_) => return Err(broke(format!("the answer was silent for {} s", STREAM_IDLE.as_secs()))),
                Ok(Err(error)) => return Err(broke(format!("the answer broke off: {}", cause(&error)))),
                Ok(Ok(Some(piece))) => {
                    sink(&piece).map_err(|error| Failure::new(Exit::Failed, what).because(error.to_string()))?;
                }
                Ok(Ok(None)) => return Ok(index),
            }
        }
    }

    async fn answer<T: DeserializeOwned>(&self, ask: Ask<'_>) -> Result<Answer<T>, Failure> {
        let response = self.send(&ask).await?;
        let text = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let index = text("optimus-index").and_then(|value| value.parse().ok());
        let (staleness, request_id) = (text("optimus-staleness"), text("x-request-id"));
        let body = tokio::time::timeout(ask.timeout, read_body(response))
            .await
            .map_err(|_| self.no_answer(&ask))?
            .map_err(|why| Failure::new(Exit::Failed, ask.what).because(why))?;
        let value = serde_json::from_slice(&body).map_err(|error| {
            Failure::new(Exit::Failed, ask.what)
                .because(format!("the server's answer is not what this version expects: {error}"))
                .hint("compare `optimus version` here and on the server")
        })?;
        Ok(Answer { value, index, staleness, request_id })
    }

    /// Sends until there is an answer other than "not now"; a refusal comes back as the failure it means.
    async fn send(&self, ask: &Ask<'_>) -> Result<Response, Failure> {
        let started = Instant::now();
        let key = uuid::Uuid::now_v7().to_string();
        let mut tries = 0;
        loop {
            tries += 1;
            let again = tries < TRIES_MAX && started.elapsed() < TRIES_FOR;
            // The time limit covers the headers here; bodies and streams have limits of their own.
            let sent = tokio::time::timeout(ask.timeout, self.request(ask, &key).send()).await;
            let pause = match sent {
                Err(_) => return Err(self.no_answer(ask)),
                Ok(Err(error)) if error.is_connect() => return Err(self.not_connected(&error)),
                Ok(Err(error)) if again && !error.is_builder() => {
                    tracing::debug!(%error, "request failed on its way, trying again");
                    Duration::from_millis(100) * tries
                }
                Ok(Err(error)) => return Err(unreachable(self.url(), cause(&error)).doing(ask.what)),
                Ok(Ok(response)) if response.status().is_success() => return Ok(response),
                Ok(Ok(response)) => {
                    let status = response.status();
                    let not_now = matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS);
                    match retry_after(&response).filter(|_| not_now && again) {
                        Some(pause) => pause,
                        None => return Err(refusal(response, ask.what).await),
                    }
                }
            };
            tokio::time::sleep(pause).await;
        }
    }

    fn request(&self, ask: &Ask<'_>, key: &str) -> reqwest::RequestBuilder {
        let mut url = self.base.clone();
        url.set_path(&format!("{}{}", self.base.path().trim_end_matches('/'), ask.path));
        if !ask.query.is_empty() {
            url.query_pairs_mut().extend_pairs(ask.query);
        }
        if self.stale && ask.method == Method::GET {
            url.query_pairs_mut().append_pair("consistency", "stale");
        }
        let accept = if ask.ndjson { "application/x-ndjson" } else { "application/json" };
        let mut request = self.http.request(ask.method.clone(), url).bearer_auth(&self.token).header(header::ACCEPT, accept);
        if ask.method != Method::GET {
            request = request.header("idempotency-key", key);
        }
        if let Some(body) = &ask.body {
            request = request.header(header::CONTENT_TYPE, "application/json").body(body.clone());
        }
        request
    }

    fn no_answer(&self, ask: &Ask<'_>) -> Failure {
        unreachable(self.url(), format!("no answer within {} s", ask.timeout.as_secs())).doing(ask.what)
    }

    fn not_connected(&self, error: &reqwest::Error) -> Failure {
        let why = cause(error);
        let certificate = why.to_lowercase().contains("certificate");
        let failure = unreachable(self.url(), why);
        if certificate {
            failure.hint("the server is not one of the cluster this context was made for; choose another with `--context NAME`")
        } else {
            failure
        }
    }
}

/// The cause at the bottom, which says more than the layers above it.
fn cause(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// How long a 503 or 429 asks to wait; unset when it does not ask to be tried again.
fn retry_after(response: &Response) -> Option<Duration> {
    let text = response.headers().get(header::RETRY_AFTER)?.to_str().ok()?;
    let seconds: u64 = text.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).clamp(Duration::from_millis(100), RETRY_AFTER_MAX))
}

async fn read_body(mut response: Response) -> Result<Vec<u8>, String> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| format!("the answer broke off: {}", cause(&error)))? {
        if body.len() + chunk.len() > BODY_MAX {
            return Err(format!("the answer is larger than {} MiB", BODY_MAX >> 20));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

async fn refusal(response: Response, what: &str) -> Failure {
    let status = response.status();
    let request_id = response.headers().get("x-request-id").and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let body = tokio::time::timeout(REQUEST_TIMEOUT, read_body(response)).await.unwrap_or_else(|_| Ok(Vec::new())).unwrap_or_default();
    if let Ok(problem) = serde_json::from_slice::<Problem>(&body) {
        return Failure::from_problem(problem, what);
    }
    // Not our API, or a proxy before it.
    let known = match status.as_u16() {
        401 => Some(&code::UNAUTHENTICATED),
        403 => Some(&code::FORBIDDEN),
        404 => Some(&code::NOT_FOUND),
        503 => Some(&code::NO_LEADER),
        _ => None,
    };
    let problem = Problem {
        kind: String::new(),
        title: format!("the server answered {status} without a reason"),
        status: status.as_u16(),
        detail: String::new(),
        code: known.map(|code| code.code.to_owned()).unwrap_or_default(),
        request_id,
        hint: None,
        errors: Vec::new(),
        retryable: false,
    };
    Failure::from_problem(problem, what)
}

/// Lines of a running answer. Blank ones are heartbeats and are skipped.
pub struct Lines {
    response: Response,
    buffer: Vec<u8>,
    /// How far `buffer` is known to hold no line break.
    scanned: usize,
    ended: bool,
    what: String,
}

impl Lines {
    /// The next object; `None` at the end. A stream that breaks off or goes silent is an error with exit code 8.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Failure> {
        loop {
            while let Some(line) = self.take_line()? {
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return match serde_json::from_slice(&line) {
                    Ok(value) => Ok(Some(value)),
                    // The server's last word on a stream may be a problem.
                    Err(error) => Err(match serde_json::from_slice::<Problem>(&line) {
                        Ok(problem) => Failure::from_problem(problem, self.what.clone()),
                        Err(_) => Failure::new(Exit::Failed, self.what.clone())
                            .because(format!("a line of the stream is not what this version expects: {error}")),
                    }),
                };
            }
            if self.ended {
                return Ok(None);
            }
            let broke = |why: String| Failure::new(Exit::Unreachable, self.what.clone()).because(why).with_code(&code::UNREACHABLE);
            match tokio::time::timeout(STREAM_IDLE, self.response.chunk()).await {
                Err(_) => return Err(broke(format!("the stream was silent for {} s", STREAM_IDLE.as_secs()))),
                Ok(Err(error)) => return Err(broke(format!("the stream broke off: {}", cause(&error)))),
                Ok(Ok(Some(chunk))) => self.buffer.extend_from_slice(&chunk),
                Ok(Ok(None)) => {
                    self.ended = true;
                    self.buffer.push(b'\n');
                }
            }
        }
    }

    fn take_line(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        match self.buffer[self.scanned..].iter().position(|&b| b == b'\n') {
            Some(at) => {
                let rest = self.buffer.split_off(self.scanned + at + 1);
                self.scanned = 0;
                Ok(Some(std::mem::replace(&mut self.buffer, rest)))
            }
            None if self.buffer.len() > LINE_MAX => {
                Err(Failure::new(Exit::Failed, self.what.clone()).because(format!("a line of the stream is longer than {LINE_MAX} bytes")))
            }
            None => {
                self.scanned = self.buffer.len();
                Ok(None)
            }
        }
    }
}
