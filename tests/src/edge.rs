//! A router in front of a real cluster: it follows the endpoint sets, and says what it has taken on (`docs/endpoints.md`).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::api_client::ApiClient;
use crate::router::{Counts, Endpoint, EndpointSet, Router};

/// How long an answer without news is waited for.
const WAIT: Duration = Duration::from_secs(20);
/// Longest time between two acknowledgements: they tell what was counted.
const COUNTS_EVERY: Duration = Duration::from_millis(500);
/// Pause after a server that did not answer.
const AGAIN: Duration = Duration::from_millis(50);

/// What the edge knows of a workload.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub set: EndpointSet,
    /// Each endpoint's release.
    pub releases: BTreeMap<String, u64>,
    /// Each endpoint's name, such as `web-0`.
    pub names: BTreeMap<String, String>,
    /// When it was taken on.
    pub at: Option<Instant>,
}

/// Follows the sets of all workloads, with a [`Router`] for each that it was asked to route.
pub struct Edge {
    routers: BTreeMap<String, Arc<Router>>,
    seen: watch::Receiver<BTreeMap<String, Seen>>,
    /// The index that was acknowledged last, and when.
    acked: watch::Receiver<(u64, Option<Instant>)>,
    /// True: what is taken on is not acknowledged.
    held: watch::Sender<bool>,
    _tasks: JoinSet<()>,
}

impl Edge {
    /// A router called `name` in front of these workloads.
    ///
    /// # Errors
    /// When there are no ports.
    pub async fn start(api: ApiClient, name: &str, workloads: &[&str]) -> anyhow::Result<Edge> {
        let mut routers = BTreeMap::new();
        for workload in workloads {
            routers.insert((*workload).to_owned(), Arc::new(Router::start().await?));
        }
        let (see, seen) = watch::channel(BTreeMap::new());
        let (ack, acked) = watch::channel((0, None));
        let (held, hold) = watch::channel(false);
        let (take, taken) = watch::channel(0);
        let mut tasks = JoinSet::new();
        tasks.spawn(Follow { api: api.clone(), routers: routers.clone(), see, take }.run());
        tasks.spawn(Tell { api, name: name.to_owned(), routers: routers.clone(), taken, ack, hold, acks: 0 }.run());
        Ok(Edge { routers, seen, acked, held, _tasks: tasks })
    }

    /// The router in front of a workload.
    pub fn router(&self, workload: &str) -> &Arc<Router> {
        &self.routers[workload]
    }

    /// What is known of a workload now.
    pub fn seen(&self, workload: &str) -> Seen {
        self.seen.borrow().get(workload).cloned().unwrap_or_default()
    }

    /// The index acknowledged last, and when.
    pub fn acked(&self) -> (u64, Option<Instant>) {
        *self.acked.borrow()
    }

    /// Takes sets on, but keeps silent about it for as long as `held`.
    pub fn hold(&self, held: bool) {
        self.held.send_replace(held);
    }
}

/// Asks for the sets and takes them on.
struct Follow {
    api: ApiClient,
    routers: BTreeMap<String, Arc<Router>>,
    see: watch::Sender<BTreeMap<String, Seen>>,
    /// The index that was taken on.
    take: watch::Sender<u64>,
}

impl Follow {
    async fn run(self) {
        loop {
            if self.turn().await.is_err() {
                tokio::time::sleep(AGAIN).await; // the server is away; ask again
            }
        }
    }

    async fn turn(&self) -> anyhow::Result<()> {
        let before = *self.take.borrow();
        let wait = if before == 0 { String::new() } else { format!("&index={before}&wait={}s", WAIT.as_secs()) };
        let answer = self.api.get(0, &format!("/v1/endpoints?page_size=1000{wait}"), WAIT + Duration::from_secs(5)).await?;
        anyhow::ensure!(answer.is_success(), "{}: {}", answer.status, answer.body);
        let index = answer.body["index"].as_u64().context("an index")?;
        let mut all = BTreeMap::new();
        for item in answer.body["items"].as_array().context("items")? {
            let (workload, seen) = parse(item).with_context(|| format!("not an endpoint set: {item}"))?;
            all.insert(workload, seen);
        }
        let mut taking = JoinSet::new();
        for (workload, router) in &self.routers {
            let set = all.get(workload).map(|seen: &Seen| seen.set.clone()).unwrap_or_default();
            let router = Arc::clone(router);
            taking.spawn(async move { router.take(set).await });
        }
        // Seen as soon as new requests go by it; taken on when the old ones are answered.
        self.see.send_replace(all);
        while taking.join_next().await.is_some() {}
        self.take.send_replace(index);
        Ok(())
    }
}

/// Says what was taken on.
struct Tell {
    api: ApiClient,
    name: String,
    routers: BTreeMap<String, Arc<Router>>,
    taken: watch::Receiver<u64>,
    ack: watch::Sender<(u64, Option<Instant>)>,
    hold: watch::Receiver<bool>,
    acks: u64,
}

impl Tell {
    async fn run(mut self) {
        // At news, and now and then to tell what was counted.
        while !matches!(tokio::time::timeout(COUNTS_EVERY, self.taken.changed()).await, Ok(Err(_))) {
            while let Err(error) = self.turn().await {
                eprintln!("{} could not say what it has taken on: {error:#}", self.name);
                tokio::time::sleep(AGAIN).await;
            }
        }
    }

    async fn turn(&mut self) -> anyhow::Result<()> {
        self.hold.wait_for(|held| !held).await?;
        let index = *self.taken.borrow_and_update();
        self.acks += 1;
        let counts = self.routers.values().flat_map(|router| router.take_counts());
        let traffic: Vec<Value> = counts
            .map(|(alloc, Counts { requests, errors, latency })| {
                json!({ "alloc": alloc, "requests": requests, "errors": errors, "latency": latency })
            })
            .collect();
        let body = json!({ "router": self.name, "generation": index, "traffic": traffic });
        let key = format!("{}-{}", self.name, self.acks);
        let answer = self.api.post(0, "/v1/endpoints/acks", &key, &body, WAIT).await?;
        anyhow::ensure!(answer.is_success(), "{}: {}", answer.status, answer.body);
        self.ack.send_replace((index, Some(Instant::now())));
        Ok(())
    }
}

fn parse(item: &Value) -> Option<(String, Seen)> {
    let workload = item["workload"].as_str()?.to_owned();
    let set = EndpointSet { generation: item["generation"].as_u64()?, endpoints: vec![] };
    let mut seen = Seen { set, at: Some(Instant::now()), ..Seen::default() };
    for endpoint in item["endpoints"].as_array()? {
        let id = endpoint["alloc"].as_str()?.to_owned();
        let port = endpoint["ports"].as_object()?.values().next()?.as_u64()?;
        let address: SocketAddr = format!("{}:{port}", endpoint["address"].as_str()?).parse().ok()?;
        seen.releases.insert(id.clone(), endpoint["release"].as_u64()?);
        seen.names.insert(id.clone(), endpoint["name"].as_str()?.to_owned());
        seen.set.endpoints.push(Endpoint { id, address, weight: u32::try_from(endpoint["weight"].as_u64()?).ok()? });
    }
    Some((workload, seen))
}
