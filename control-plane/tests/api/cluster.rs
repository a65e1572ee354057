//! Three servers with one state: any of them takes reads and writes, and says so when it cannot.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use optimus_common::ClusterId;
use optimus_common::disk::sim::MemDisk;
use optimus_control_plane::api::{ApiConfig, ApiDeps, Limits, serve};
use optimus_control_plane::auth::{AdminToken, Auth};
use optimus_control_plane::consensus::{CoreMachine, RaftConsensus};
use optimus_control_plane::metrics::Metrics;
use optimus_control_plane::raft::{MemoryNetwork, RaftConfig, RaftNode, Tuning};
use optimus_control_plane::store::Store;
use optimus_core::state::Command;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::support::{Alone, Answer, DEADLINE, FakeAgents, FakeJoins, Reversed, WEB, env, join_node, project, tls};

struct Front {
    address: SocketAddr,
    client: reqwest::Client,
    token: String,
    store: Store,
    node: RaftNode<CoreMachine>,
    task: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Front {
    fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let url = format!("https://localhost:{}{path}", self.address.port());
        self.client.request(method.parse().unwrap(), url).bearer_auth(&self.token)
    }

    async fn get(&self, path: &str) -> Answer {
        Answer::of(self.request("GET", path).send().await.unwrap()).await
    }

    async fn deploy(&self, key: &str, names: &[&str]) -> Answer {
        let request = self.request("POST", "/v1/deploy").header("idempotency-key", key).json(&project(names));
        Answer::of(request.send().await.unwrap()).await
    }
}

struct Cluster {
    network: MemoryNetwork,
    /// Servers 1 to 3.
    fronts: Vec<Front>,
    shutdown: CancellationToken,
}

impl Cluster {
    async fn start() -> Self {
        let (network, shutdown) = (MemoryNetwork::new(), CancellationToken::new());
        let token = AdminToken::generate(&*env().entropy);
        let mut fronts = Vec::new();
        for id in 1..=3 {
            let (machine, consensus) = RaftConsensus::machine();
            let tuning = Tuning { ..Tuning::fast() };
            let config = RaftConfig { node_id: id, disk: Arc::new(MemDisk::new()), machine, tuning, network: network.transport(id) };
            let node = RaftNode::start(config).await.unwrap();
            network.connect(&node);
            let store = Store::new(Arc::new(consensus(node.clone())), env());
            let (server_tls, client_tls) = tls();
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let deps = ApiDeps {
                store: store.clone(),
                agents: Arc::new(FakeAgents::default()),
                auth: Arc::new(Auth::new(&token)),
                cluster: Arc::new(Alone),
                joins: Arc::new(FakeJoins),
                secrets: Arc::new(Reversed),
                metrics: Arc::new(Metrics::new()),
            };
            let config =
                ApiConfig { listeners: vec![listener], tls: Arc::new(server_tls), allowed_hosts: vec![], limits: Limits::default() };
            let task = tokio::spawn(serve(config, deps, shutdown.clone()));
            let client = reqwest::Client::builder().tls_backend_preconfigured(client_tls).read_timeout(DEADLINE).build().unwrap();
            fronts.push(Front { address, client, token: token.expose().to_owned(), store, node, task });
        }
        let members = (1..=3).map(|id| (id, format!("s{id}:1"))).collect();
        fronts[0].node.initialize(members).await.unwrap();
        let cluster = Cluster { network, fronts, shutdown };
        cluster.leader().await;
        let store = &cluster.fronts[0].store;
        let id = ClusterId(store.env.new_id());
        store.propose(Command::CreateCluster { id, ca_certificate: vec![], ca_key_sealed: vec![] }).await.unwrap();
        join_node(store).await;
        cluster
    }

    fn front(&self, id: u64) -> &Front {
        &self.fronts[id as usize - 1]
    }

    /// The leader all three agree on.
    async fn leader(&self) -> u64 {
        let began = Instant::now();
        loop {
            let leaders: Vec<_> = self.fronts.iter().map(|f| f.store.status().leader).collect();
            match leaders[0] {
                Some(leader) if leaders.iter().all(|l| *l == Some(leader)) => return leader,
                _ => assert!(began.elapsed() < DEADLINE, "{leaders:?}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The two that do not lead.
    async fn others(&self) -> (u64, [u64; 2]) {
        let leader = self.leader().await;
        let others: Vec<u64> = (1..=3).filter(|id| *id != leader).collect();
        (leader, [others[0], others[1]])
    }

    async fn stop(self) {
        self.shutdown.cancel();
        for front in self.fronts {
            tokio::time::timeout(DEADLINE, front.task).await.expect("the API did not stop").unwrap().unwrap();
            front.node.shutdown().await;
        }
    }
}

fn deployment(answer: &Answer) -> Value {
    assert_eq!(answer.status, 200, "{}", answer.json());
    answer.json()["deployments"][0]["id"].clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retry_on_another_server_has_one_effect_and_the_same_answer() {
    let cluster = Cluster::start().await;
    let (leader, [a, b]) = cluster.others().await;
    let first = cluster.front(a).deploy("k1", &["web"]).await;
    let again = cluster.front(b).deploy("k1", &["web"]).await;
    assert_eq!(deployment(&again), deployment(&first));
    assert_eq!((first.header("idempotency-replayed"), again.header("idempotency-replayed")), ("", "true"));
    cluster.front(leader).deploy("k1", &["other"]).await.problem(422, "OPT-1109");

    // At the same time through all three.
    let (x, y, z) = tokio::join!(
        cluster.front(a).deploy("k2", &["api"]),
        cluster.front(b).deploy("k2", &["api"]),
        cluster.front(leader).deploy("k2", &["api"])
    );
    assert_eq!(deployment(&x), deployment(&y));
    assert_eq!(deployment(&y), deployment(&z));
    assert_eq!(cluster.front(a).get("/v1/deployments").await.json()["items"].as_array().unwrap().len(), 2);

    // The answer is lost on its way back to the first server: it asks again itself, or its client asks another.
    cluster.network.cut(leader, a);
    let began = Instant::now();
    let lost = cluster.front(a).deploy("k3", &["late"]).await;
    assert!(began.elapsed() < Duration::from_secs(16), "{:?}", began.elapsed());
    if lost.status != 200 {
        lost.problem(503, "OPT-1110");
        assert_ne!(lost.header("retry-after"), "");
    }
    cluster.network.heal();
    cluster.leader().await;
    let retried = cluster.front(b).deploy("k3", &["late"]).await;
    if lost.status == 200 {
        assert_eq!(deployment(&retried), deployment(&lost));
    }
    deployment(&retried);
    assert_eq!(cluster.front(a).get("/v1/deployments").await.json()["items"].as_array().unwrap().len(), 3);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_is_seen_on_every_server_and_by_index_without_a_leader() {
    let cluster = Cluster::start().await;
    let (leader, [a, b]) = cluster.others().await;
    let written = cluster.front(a).deploy("k", &["web"]).await;
    let index: u64 = written.header("optimus-index").parse().unwrap();
    for id in [leader, a, b] {
        let read = cluster.front(id).get(WEB).await;
        assert_eq!((read.status, read.header("optimus-staleness")), (200, ""));
        assert_eq!(read.header("optimus-leader"), leader.to_string());
    }
    let at_b = cluster.front(b).get(&format!("{WEB}?consistency=stale&min_index={index}")).await;
    assert_eq!(at_b.status, 200);
    assert!(at_b.header("optimus-index").parse::<u64>().unwrap() >= index);
    let began = Instant::now();
    let ahead = cluster.front(b).get(&format!("{WEB}?min_index={}", index + 1_000_000)).await;
    ahead.problem(503, "OPT-1115");
    assert_eq!(ahead.header("retry-after"), "1");
    assert!(began.elapsed() < Duration::from_secs(7), "{:?}", began.elapsed());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_reaches_nobody_answers_stale_reads_and_refuses_the_rest_in_time() {
    let cluster = Cluster::start().await;
    let (leader, [lost, other]) = cluster.others().await;
    deployment(&cluster.front(lost).deploy("k", &["web"]).await);
    for id in [leader, other] {
        cluster.network.cut(id, lost);
        cluster.network.cut(lost, id);
    }
    let began = Instant::now();
    let front = cluster.front(lost);
    let (read, write) = tokio::join!(front.get(WEB), front.deploy("k2", &["api"]));
    assert!(began.elapsed() < Duration::from_secs(11), "{:?}", began.elapsed());
    for refused in [read, write] {
        refused.problem(503, "OPT-1110");
        assert_ne!(refused.header("retry-after"), "");
    }
    let began = Instant::now();
    let stale = front.get(&format!("{WEB}?consistency=stale")).await;
    assert_eq!(stale.status, 200);
    assert!(began.elapsed() < Duration::from_secs(1));
    let age = optimus_common::Span::as_duration(stale.header("optimus-staleness").parse().unwrap());
    assert!(age >= Duration::from_secs(2), "{age:?}");
    front.get(&format!("{WEB}?consistency=stale&max_staleness=1s")).await.problem(503, "OPT-1115");
    assert_eq!(cluster.front(leader).get(&format!("{WEB}?consistency=stale&max_staleness=5s")).await.status, 200);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_leader_costs_its_clients_an_election() {
    let cluster = Cluster::start().await;
    let (leader, [a, b]) = cluster.others().await;
    cluster.network.freeze(leader);
    let began = Instant::now();
    let (x, y) = tokio::join!(cluster.front(a).deploy("k1", &["web"]), cluster.front(b).deploy("k2", &["api"]));
    deployment(&x);
    deployment(&y);
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    // The frozen one thaws as a follower that knows the new leader.
    cluster.network.heal();
    assert_ne!(cluster.leader().await, leader);
    assert_eq!(cluster.front(leader).get(WEB).await.status, 200);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_and_long_polls_on_a_follower_need_no_leader() {
    let cluster = Cluster::start().await;
    let (leader, [a, b]) = cluster.others().await;
    deployment(&cluster.front(a).deploy("k", &["web"]).await);
    let index = cluster.front(a).get(WEB).await.header("optimus-index").to_owned();
    let mut events =
        cluster.front(a).request("GET", &format!("/v1/events?follow=true&since={index}&consistency=stale")).send().await.unwrap();
    let poll = format!("{WEB}?index={index}&wait=15s&consistency=stale");
    let change = async {
        let scaled = cluster.front(b).request("POST", &format!("{WEB}:scale")).json(&serde_json::json!({"copies": 7}));
        Answer::of(scaled.send().await.unwrap()).await
    };
    let (polled, changed) = tokio::join!(cluster.front(a).get(&poll), change);
    assert_eq!((changed.status, polled.status), (200, 200));
    assert_eq!(polled.json()["copies_wanted"], 7);
    let mut seen = String::new();
    while !seen.contains("shop/prod/web") {
        seen.push_str(&String::from_utf8_lossy(&events.chunk().await.unwrap().expect("the stream goes on")));
    }
    // Cut off from everybody, both still answer from what this server knows.
    for id in [leader, b] {
        cluster.network.cut(id, a);
        cluster.network.cut(a, id);
    }
    let began = Instant::now();
    let quiet = cluster.front(a).get(&format!("{WEB}?index={}&wait=1s&consistency=stale", polled.header("optimus-index"))).await;
    assert_eq!(quiet.status, 200);
    assert!(began.elapsed() >= Duration::from_millis(900));
    assert_eq!(cluster.front(a).get(&format!("/v1/events?since={index}&consistency=stale")).await.status, 200);
    drop(events);
    cluster.stop().await;
}
