//! A small HTTP/1.1 router: what an ingress does with weighted endpoint sets, and nothing else.
//!
//! Every request goes to one endpoint over a connection of its own and is never tried again, so each mistake of the order
//! "out of the set, drained, stopped" is a failed request that is counted.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Longest time a removed endpoint's requests are waited for before its set is acknowledged.
const DRAIN_MAX: Duration = Duration::from_secs(2);
/// Longest body passed on, either way.
const BODY_MAX: usize = 1 << 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// The copy.
    pub id: String,
    pub address: SocketAddr,
    pub weight: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EndpointSet {
    pub generation: u64,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Default)]
struct Table {
    set: EndpointSet,
    /// Smooth weighted round robin, as nginx does it: what each endpoint is owed.
    owed: BTreeMap<String, i64>,
    /// Requests under way, by endpoint.
    open: BTreeMap<String, u64>,
    served: BTreeMap<String, u64>,
    failed: Vec<String>,
    /// Since they were last asked for: requests, faults, and answers by latency, by endpoint.
    counts: BTreeMap<String, Counts>,
}

/// What was counted of one endpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    pub requests: u64,
    pub errors: u64,
    /// Below 1 ms, below 2 ms, below 4 ms, and so on.
    pub latency: Vec<u64>,
}

impl Counts {
    fn note(&mut self, took: Duration, failed: bool) {
        self.requests += 1;
        self.errors += u64::from(failed);
        let bucket = (u64::BITS - (took.as_millis() as u64).leading_zeros()).min(31) as usize;
        if self.latency.len() <= bucket {
            self.latency.resize(bucket + 1, 0);
        }
        self.latency[bucket] += 1;
    }
}

impl Table {
    /// The endpoint whose turn it is. Over any run of requests each gets its weight's share, within one request.
    fn next(&mut self) -> Option<Endpoint> {
        let total: i64 = self.set.endpoints.iter().map(|e| i64::from(e.weight)).sum();
        for endpoint in &self.set.endpoints {
            *self.owed.entry(endpoint.id.clone()).or_default() += i64::from(endpoint.weight);
        }
        let turn = self.set.endpoints.iter().filter(|e| e.weight > 0).max_by_key(|e| self.owed.get(&e.id).copied().unwrap_or(0))?.clone();
        *self.owed.entry(turn.id.clone()).or_default() -= total;
        Some(turn)
    }
}

/// A router on a port of its own.
pub struct Router {
    pub address: SocketAddr,
    table: Arc<Mutex<Table>>,
    /// Told whenever a request has ended.
    ended: watch::Sender<u64>,
    _tasks: JoinSet<()>,
}

impl Router {
    pub async fn start() -> anyhow::Result<Router> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let table = Arc::new(Mutex::new(Table::default()));
        let (ended, _) = watch::channel(0);
        let mut tasks = JoinSet::new();
        let (accepting, counting) = (Arc::clone(&table), ended.clone());
        tasks.spawn(async move {
            let mut clients = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (table, ended) = (Arc::clone(&accepting), counting.clone());
                let service = service_fn(move |request| {
                    let (table, ended) = (Arc::clone(&table), ended.clone());
                    async move { Ok::<_, Infallible>(pass(&table, &ended, request).await) }
                });
                clients.spawn(async move {
                    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                });
                while clients.try_join_next().is_some() {}
            }
        });
        Ok(Router { address, table, ended, _tasks: tasks })
    }

    /// Takes a newer set; an older one changes nothing. Returns, for the acknowledgement, when no request is under way to
    /// an endpoint that is no longer in it, or after [`DRAIN_MAX`].
    pub async fn take(&self, set: EndpointSet) -> u64 {
        let removed: Vec<String> = {
            let mut table = lock(&self.table);
            if set.generation < table.set.generation {
                return table.set.generation;
            }
            let stays = |id: &String| set.endpoints.iter().any(|e| e.id == *id && e.weight > 0);
            let removed = table.open.keys().filter(|id| !stays(id)).cloned().collect();
            table.owed.retain(|id, _| stays(id));
            table.set = set;
            removed
        };
        let mut ended = self.ended.subscribe();
        let drained = async {
            while removed.iter().any(|id| lock(&self.table).open.get(id).is_some_and(|open| *open > 0)) {
                if ended.changed().await.is_err() {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(DRAIN_MAX, drained).await;
        lock(&self.table).set.generation
    }

    /// Takes what was counted since the last time.
    pub fn take_counts(&self) -> BTreeMap<String, Counts> {
        std::mem::take(&mut lock(&self.table).counts)
    }

    /// Requests answered so far, by endpoint.
    pub fn served(&self) -> BTreeMap<String, u64> {
        lock(&self.table).served.clone()
    }

    /// What went wrong so far.
    pub fn failed(&self) -> Vec<String> {
        lock(&self.table).failed.clone()
    }
}

async fn pass(table: &Mutex<Table>, ended: &watch::Sender<u64>, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let endpoint = {
        let mut table = lock(table);
        let Some(endpoint) = table.next() else {
            let generation = table.set.generation;
            table.failed.push(format!("generation {generation} has no endpoint"));
            return answer(StatusCode::SERVICE_UNAVAILABLE, "no endpoint");
        };
        *table.open.entry(endpoint.id.clone()).or_default() += 1;
        endpoint
    };
    let began = std::time::Instant::now();
    let answered = ask(endpoint.address, request).await;
    let response = {
        let mut table = lock(table);
        let open = table.open.entry(endpoint.id.clone()).or_default();
        *open = open.saturating_sub(1);
        let failed = answered.as_ref().map_or(true, |response| response.status().is_server_error());
        table.counts.entry(endpoint.id.clone()).or_default().note(began.elapsed(), failed);
        match answered {
            Ok(response) => {
                if response.status().is_server_error() {
                    table.failed.push(format!("{} answered {}", endpoint.id, response.status()));
                }
                *table.served.entry(endpoint.id).or_default() += 1;
                response
            }
            Err(error) => {
                table.failed.push(format!("{} at {}: {error:#}", endpoint.id, endpoint.address));
                answer(StatusCode::BAD_GATEWAY, "the endpoint did not answer")
            }
        }
    };
    ended.send_modify(|n| *n += 1);
    response
}

async fn ask(address: SocketAddr, request: Request<Incoming>) -> anyhow::Result<Response<Full<Bytes>>> {
    let (mut parts, body) = request.into_parts();
    let body = http_body_util::Limited::new(body, BODY_MAX).collect().await.map_err(|e| anyhow::anyhow!(e))?.to_bytes();
    // One request a connection: nothing stale is ever reused.
    parts.headers.insert("connection", hyper::header::HeaderValue::from_static("close"));
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let response = sender.send_request(Request::from_parts(parts, Full::new(body))).await?;
    let (parts, body) = response.into_parts();
    let body = http_body_util::Limited::new(body, BODY_MAX).collect().await.map_err(|e| anyhow::anyhow!(e))?.to_bytes();
    connection.abort();
    Ok(Response::from_parts(parts, Full::new(body)))
}

fn answer(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    *response.status_mut() = status;
    response
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::oneshot;

    use super::*;

    /// Asks once, over a connection of its own.
    async fn get(address: SocketAddr) -> (u16, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    fn endpoint(id: &str, address: SocketAddr, weight: u32) -> Endpoint {
        Endpoint { id: id.into(), address, weight }
    }

    /// Answers each connection with its name, once `go` allows.
    async fn upstream(name: &'static str, mut go: Option<oneshot::Receiver<()>>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut buffer = [0; 1024];
                let _ = stream.read(&mut buffer).await;
                if let Some(go) = go.take() {
                    go.await.unwrap();
                }
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{name}", name.len());
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        address
    }

    #[test]
    fn each_endpoint_gets_its_share() {
        let nowhere: SocketAddr = "127.0.0.1:1".parse().unwrap();
        let endpoints = vec![endpoint("old", nowhere, 95), endpoint("new", nowhere, 5), endpoint("off", nowhere, 0)];
        let mut table = Table { set: EndpointSet { generation: 1, endpoints }, ..Table::default() };
        let mut shares = BTreeMap::<String, u64>::new();
        for _ in 0..1000 {
            *shares.entry(table.next().unwrap().id).or_default() += 1;
        }
        assert_eq!(shares, BTreeMap::from([("new".into(), 50), ("old".into(), 950)]));
    }

    #[tokio::test]
    async fn a_set_is_acknowledged_when_the_endpoint_that_left_has_answered() {
        let (go, held) = oneshot::channel();
        let (slow, quick) = (upstream("slow", Some(held)).await, upstream("quick", None).await);
        let router = Arc::new(Router::start().await.unwrap());
        router.take(EndpointSet { generation: 1, endpoints: vec![endpoint("slow", slow, 1)] }).await;
        let first = tokio::spawn(get(router.address));
        while !lock(&router.table).open.contains_key("slow") {
            assert!(!first.is_finished(), "it waits for the endpoint");
            tokio::task::yield_now().await;
        }
        let taking = tokio::spawn({
            let router = Arc::clone(&router);
            async move { router.take(EndpointSet { generation: 2, endpoints: vec![endpoint("quick", quick, 1)] }).await }
        });
        while lock(&router.table).set.generation < 2 {
            tokio::task::yield_now().await;
        }
        assert_eq!(get(router.address).await.1, "quick", "new requests go elsewhere at once");
        assert!(!taking.is_finished(), "one request is still under way");
        go.send(()).unwrap();
        assert_eq!(taking.await.unwrap(), 2);
        assert_eq!(first.await.unwrap().1, "slow");
        assert_eq!(router.failed(), Vec::<String>::new());
        assert_eq!(router.take(EndpointSet { generation: 1, endpoints: vec![] }).await, 2, "an older set changes nothing");
    }

    #[tokio::test]
    async fn a_failure_is_seen_and_not_tried_again() {
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let router = Router::start().await.unwrap();
        assert_eq!(get(router.address).await.0, 503);
        router.take(EndpointSet { generation: 1, endpoints: vec![endpoint("dead", closed, 1)] }).await;
        assert_eq!(get(router.address).await.0, 502);
        assert_eq!(router.failed().len(), 2);
    }
}
