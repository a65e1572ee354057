//! A server over real TLS on a fresh loopback port, on a store without Raft.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use optimus_common::api::v1::JoinTokenAnswer;
use optimus_common::env::{Clock, Entropy, Env, Spawn};
use optimus_common::join_token::Role;
use optimus_common::protocol::{LogChunk, LogLine, LogRequest, NodeFacts};
use optimus_common::secret::SecretValue;
use optimus_common::{AllocId, Bytes, ClusterId, Millicores, Name, NodeId, Span, Timestamp, TokenId, WorkloadKey};
use optimus_control_plane::agent_calls::{AgentCallError, AgentCalls, LogAnswer};
use optimus_control_plane::api::{ApiConfig, ApiDeps, Limits, serve};
use optimus_control_plane::auth::{AdminToken, Auth};
use optimus_control_plane::cluster_admin::{self, AdminError, ClusterAdmin, MemberReport, Report};
use optimus_control_plane::identity::SecretBox;
use optimus_control_plane::identity::root_key::RootKeyError;
use optimus_control_plane::join_tokens::{JoinTokenError, JoinTokens};
use optimus_control_plane::metrics::Metrics;
use optimus_control_plane::store::{Consensus, ConsensusStatus, ProposeError, Store};
use optimus_core::state::command::{Placement, Plan};
use optimus_core::state::{Applied, Command, Proposal, SecretKey, SecretVersion, State, Vault};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// A workload that many tests deploy.
pub const WEB: &str = "/v1/projects/shop/envs/prod/workloads/web";
/// How long a test waits for anything before it fails.
pub const DEADLINE: Duration = Duration::from_secs(20);

struct RealClock(std::time::Instant);
impl Clock for RealClock {
    fn now(&self) -> Timestamp {
        Timestamp(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64)
    }
    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(tokio::time::sleep(duration))
    }
}

/// Different bytes at each call; what tests need of randomness.
struct Counting(AtomicU64);
impl Entropy for Counting {
    fn fill(&self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let n = self.0.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(17);
            chunk.copy_from_slice(&n.to_le_bytes()[..chunk.len()]);
        }
    }
}

struct TokioSpawn;
impl Spawn for TokioSpawn {
    fn spawn(&self, _name: &'static str, task: Pin<Box<dyn Future<Output = ()> + Send>>) {
        tokio::spawn(task);
    }
}

pub fn env() -> Env {
    Env {
        clock: Arc::new(RealClock(std::time::Instant::now())),
        entropy: Arc::new(Counting(AtomicU64::new(1))),
        spawn: Arc::new(TokioSpawn),
    }
}

/// A state machine without Raft, and with faults on request.
pub struct Memory {
    state: Mutex<State>,
    applied: watch::Sender<u64>,
    /// What every proposal and linearizable read answers instead.
    pub fault: Mutex<Option<ProposeError>>,
    /// Linearizable reads never come back.
    pub hangs: AtomicBool,
}

impl Memory {
    fn apply(&self, proposal: Proposal) -> Applied {
        let mut state = self.state.lock().unwrap();
        let index = state.index + 1;
        let answer = state.apply(index, proposal);
        drop(state);
        self.applied.send_replace(index);
        answer
    }
    /// How many wait for the next change.
    pub fn listeners(&self) -> usize {
        self.applied.receiver_count()
    }
    /// Changes the state behind the API's back.
    pub fn edit(&self, edit: impl FnOnce(&mut State)) {
        let mut state = self.state.lock().unwrap();
        edit(&mut state);
        let index = state.index;
        drop(state);
        self.applied.send_replace(index);
    }
}

impl Consensus for Memory {
    fn propose(&self, proposal: Proposal) -> Pin<Box<dyn Future<Output = Result<Applied, ProposeError>> + Send + '_>> {
        Box::pin(async move {
            let fault = self.fault.lock().unwrap().clone();
            fault.map_or_else(|| Ok(self.apply(proposal)), Err)
        })
    }
    fn state(&self) -> State {
        self.state.lock().unwrap().clone()
    }
    fn applied(&self) -> watch::Receiver<u64> {
        self.applied.subscribe()
    }
    fn linearizable(&self) -> Pin<Box<dyn Future<Output = Result<(), ProposeError>> + Send + '_>> {
        let fault = self.fault.lock().unwrap().clone();
        Box::pin(async move {
            if self.hangs.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
            fault.map_or(Ok(()), Err)
        })
    }
    fn status(&self) -> ConsensusStatus {
        let has_leader = !matches!(*self.fault.lock().unwrap(), Some(ProposeError::NoLeader { .. }));
        let index = self.state.lock().unwrap().index;
        ConsensusStatus {
            server: 1,
            leader: has_leader.then_some(1),
            term: 1,
            last_log: index,
            applied: index,
            voters: 1,
            is_leader: has_leader,
            ..ConsensusStatus::default()
        }
    }
}

/// What a node answers for one allocation.
#[derive(Clone)]
pub enum Output {
    Lines(Vec<(u64, &'static str)>),
    Refuse(AgentCallError),
    Panic,
}

/// Agents that answer from a table. Followed copies stay open until the test ends.
#[derive(Default)]
pub struct FakeAgents {
    pub outputs: Mutex<BTreeMap<AllocId, Output>>,
    pub open: Mutex<Vec<(AllocId, mpsc::Sender<LogChunk>)>>,
    pub asked: Mutex<Vec<LogRequest>>,
}

pub fn chunk(lines: &[(u64, &str)]) -> LogChunk {
    LogChunk { lines: lines.iter().map(|(at, text)| LogLine { at: Timestamp(*at), stderr: false, text: (*text).into() }).collect() }
}

impl AgentCalls for FakeAgents {
    fn logs(&self, _node: NodeId, request: LogRequest) -> LogAnswer<'_> {
        Box::pin(async move {
            self.asked.lock().unwrap().push(request.clone());
            let output = self.outputs.lock().unwrap().get(&request.alloc).cloned();
            let lines = match output {
                None => return Err(AgentCallError::NotConnected),
                Some(Output::Refuse(error)) => return Err(error),
                Some(Output::Panic) => panic!("an agent call that panics"),
                Some(Output::Lines(lines)) => lines,
            };
            let (sender, receiver) = mpsc::channel(16);
            sender.try_send(chunk(&lines)).unwrap();
            if request.follow {
                self.open.lock().unwrap().push((request.alloc, sender));
            }
            Ok(receiver)
        })
    }
}

pub struct FakeJoins;
impl JoinTokens for FakeJoins {
    fn create(&self, _: Role, ttl: Span, uses: u32) -> Pin<Box<dyn Future<Output = Result<JoinTokenAnswer, JoinTokenError>> + Send + '_>> {
        Box::pin(async move { Ok(JoinTokenAnswer { token: "join".into(), id: "id".into(), expires_at: Timestamp(0) + ttl, uses }) })
    }
}

pub struct Server {
    pub address: SocketAddr,
    pub memory: Arc<Memory>,
    pub agents: Arc<FakeAgents>,
    pub store: Store,
    pub token: AdminToken,
    pub client: reqwest::Client,
    pub tls: Arc<rustls::ClientConfig>,
    pub shutdown: CancellationToken,
    pub task: tokio::task::JoinHandle<std::io::Result<()>>,
}

pub fn tls() -> (rustls::ServerConfig, rustls::ClientConfig) {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let rcgen::CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(["localhost".into(), "127.0.0.1".into()]).unwrap();
    let key = rustls_pki_types::PrivateKeyDer::try_from(signing_key.serialize_der()).unwrap();
    let server = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(cert.der().clone()).unwrap();
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    (server, client)
}

pub async fn start() -> Server {
    start_with(Limits::default()).await
}

pub async fn start_with(limits: Limits) -> Server {
    let (server_tls, client_tls) = tls();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let memory = Arc::new(Memory {
        state: Mutex::default(),
        applied: watch::Sender::new(0),
        fault: Mutex::default(),
        hangs: AtomicBool::new(false),
    });
    let env = env();
    let token = AdminToken::generate(&*env.entropy);
    let store = Store::new(memory.clone(), env.clone());
    let id = ClusterId(env.new_id());
    store.propose(Command::CreateCluster { id, ca_certificate: vec![], ca_key_sealed: vec![] }).await.unwrap();
    join_node(&store).await;
    let agents = Arc::new(FakeAgents::default());
    let deps = ApiDeps {
        store: store.clone(),
        agents: agents.clone(),
        auth: Arc::new(Auth::new(&token)),
        cluster: Arc::new(Alone),
        joins: Arc::new(FakeJoins),
        secrets: Arc::new(Reversed),
        metrics: Arc::new(Metrics::new()),
    };
    let shutdown = CancellationToken::new();
    let allowed_hosts = vec!["optimus.example".into()];
    let config = ApiConfig { listeners: vec![listener], tls: Arc::new(server_tls), allowed_hosts, limits };
    let task = tokio::spawn(serve(config, deps, shutdown.clone()));
    let client = reqwest::Client::builder().tls_backend_preconfigured(client_tls.clone()).read_timeout(DEADLINE).build().unwrap();
    Server { address, memory, agents, store, token, client, tls: Arc::new(client_tls), shutdown, task }
}

/// An answer, read whole.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub bytes: Vec<u8>,
}

impl Answer {
    pub async fn of(response: reqwest::Response) -> Self {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Answer { status, headers, bytes: response.bytes().await.unwrap().to_vec() }
    }
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.bytes)))
    }
    /// Asserts a whole and consistent problem, and gives it.
    #[track_caller]
    pub fn problem(&self, status: u16, code: &str) -> Value {
        let problem = self.json();
        assert_eq!((self.status, problem["code"].as_str().unwrap_or_default()), (status, code), "{problem}");
        assert_eq!(self.header("content-type"), "application/problem+json");
        assert_eq!(problem["status"], status);
        assert_eq!(problem["request_id"].as_str().unwrap(), self.header("x-request-id"));
        for field in ["type", "title", "detail", "hint"] {
            assert!(problem[field].as_str().is_some_and(|text| !text.is_empty()), "{field}: {problem}");
        }
        problem
    }
}

impl Server {
    pub fn url(&self, path: &str) -> String {
        format!("https://localhost:{}{path}", self.address.port())
    }
    /// A request with the right credential.
    pub fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        self.bare(method, path).bearer_auth(self.token.expose())
    }
    pub fn bare(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        self.client.request(method.parse().unwrap(), self.url(path))
    }
    pub async fn get(&self, path: &str) -> Answer {
        Answer::of(self.request("GET", path).send().await.unwrap()).await
    }
    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        Answer::of(self.request("POST", path).json(body).send().await.unwrap()).await
    }
    /// Deploys workloads of these names to shop/prod.
    pub async fn deploy(&self, names: &[&str]) -> Answer {
        self.post("/v1/deploy", &project(names)).await
    }
    /// Places a copy, as the reconciler would.
    pub async fn place(&self, workload: &str, index: u32) -> AllocId {
        let alloc = AllocId(self.store.env.new_id());
        let port = 20_000 + self.store.state().allocs.len() as u16;
        let placement = Placement { alloc, key: key(workload), index, release: 1, node: NODE, ports: vec![("http".into(), port)] };
        let place = vec![placement];
        self.store.propose(Command::Plan(Plan { place, ..Plan::default() })).await.unwrap();
        assert!(self.store.state().allocs.contains_key(&alloc), "the plan was not taken");
        alloc
    }
    /// A TLS connection of HTTP/1.1 to write anything into.
    pub async fn raw(&self) -> tokio_rustls::client::TlsStream<TcpStream> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let name = rustls_pki_types::ServerName::try_from("localhost").unwrap();
        tokio_rustls::TlsConnector::from(self.tls.clone()).connect(name, stream).await.unwrap()
    }
    /// Stops the server and asserts that it ends by itself.
    pub async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(DEADLINE, self.task).await.expect("the server did not stop").unwrap().unwrap();
    }
}

pub const NODE: NodeId = NodeId(uuid::Uuid::from_u128(1));

/// One node, large enough for every test, joined and up.
pub async fn join_node(store: &Store) {
    let token = TokenId(store.env.new_id());
    let expires_at = store.env.clock.now() + Span::secs(60);
    let facts = NodeFacts {
        name: "host-1".into(),
        cpu: Millicores(64_000),
        memory: Bytes::mib(64 << 10),
        drivers: vec!["process".into()],
        ports: (20_000, 29_999),
        address: "192.0.2.1".into(),
        ..NodeFacts::default()
    };
    for command in [
        Command::CreateToken { id: token, secret_hash: vec![1], expires_at, uses: 1, role: Role::Agent },
        Command::AdmitNode { token, node: NODE, name: "host-1".into(), key_fingerprint: vec![2], certificate_expires_at: expires_at },
        Command::NodeUp { node: NODE, facts },
    ] {
        let applied = store.propose(command).await.unwrap();
        assert!(!matches!(applied, Applied::Refused(_)), "{applied:?}");
    }
}

pub fn key(workload: &str) -> WorkloadKey {
    let name = |text: &str| Name::new(text).unwrap();
    WorkloadKey { project: name("shop"), environment: name("prod"), workload: name(workload) }
}

/// A workload as resolved by a client.
pub fn spec() -> Value {
    json!({
        "kind": "service", "driver": "process", "run": {"argv": ["/bin/sleep", "60"]}, "env": {}, "ports": [{"name": "http"}], "copies": 3,
        "resources": {"cpu": 0.1, "memory_request": 33554432, "memory_limit": 67108864, "pids": 100},
        "health": {"readiness": {"check": "tcp", "interval": "1s", "timeout": "1s", "grace": "10s", "healthy_after": 1, "unhealthy_after": 3}},
        "restart": {"delay": "1s", "delay_max": "1m", "reset_after": "10m"},
        "stop": {"signal": "TERM", "grace": "10s"},
        "update": {"strategy": "rolling", "parallel": 1, "deadline": "5m", "min_ready": "1s"},
        "logs": {"size": 10485760}, "secrets": [], "labels": {}
    })
}

pub fn project(names: &[&str]) -> Value {
    let workloads: serde_json::Map<String, Value> = names.iter().map(|name| ((*name).to_owned(), spec())).collect();
    json!({"project": "shop", "environment": "prod", "workloads": workloads})
}

/// Until so many long polls listen for changes.
pub async fn until_waiting(server: &Server, count: usize) {
    let began = std::time::Instant::now();
    while server.memory.listeners() < count {
        assert!(began.elapsed() < DEADLINE, "nobody waits");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A cluster of one server.
pub struct Alone;

impl ClusterAdmin for Alone {
    fn report(&self) -> cluster_admin::Answer<'_, Report> {
        let me = MemberReport { id: 1, voter: true, silent_ms: Some(0), behind: Some(0) };
        Box::pin(async { Ok(Report { leader: 1, term: 1, last_log: 1, members: vec![me] }) })
    }
    fn transfer(&self, to: Option<u64>) -> cluster_admin::Answer<'_, u64> {
        Box::pin(async move {
            Err(AdminError::Refused(to.map_or_else(|| "no other server has a vote".into(), |id| format!("server {id} has no vote"))))
        })
    }
}

/// Seals a secret by turning it round: enough to tell what is sealed from what is not.
pub struct Reversed;

impl SecretBox for Reversed {
    fn seal(&self, _: &State, _: &SecretKey, value: &SecretValue) -> Result<(Vec<u8>, Vault), RootKeyError> {
        let vault = Vault { id: vec![1], key_sealed: vec![1] };
        Ok((value.reveal().chars().rev().collect::<String>().into_bytes(), vault))
    }
    fn open(&self, _: &State, _: &SecretKey, version: &SecretVersion) -> Result<SecretValue, RootKeyError> {
        let text: String = std::str::from_utf8(&version.sealed).unwrap().chars().rev().collect();
        Ok(SecretValue::new(text).unwrap())
    }
    fn blind(&self, body: &[u8]) -> Vec<u8> {
        body.iter().rev().copied().collect()
    }
}
