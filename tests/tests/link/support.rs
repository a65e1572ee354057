//! A server with a gateway on loopback, over a store without Raft; an agent with workloads that do nothing.

use std::collections::VecDeque;
use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use optimus_agent::link::{AgentIdentity, Link, LinkStatus};
use optimus_agent::workloads::{Boxed, LogError, OlderGeneration, Workloads};
use optimus_common::env::{Clock, Env};
use optimus_common::join_token::Role;
use optimus_common::protocol::{AllocStatus, Blob, Desired, LogChunk, LogLine, LogRequest, NodeFacts, Phase, Report};
use optimus_common::{AllocId, Name, NodeId, Span, Timestamp, WorkloadKey};
use optimus_control_plane::auth::AdminToken;
use optimus_control_plane::gateway::{Gateway, GatewayConfig};
use optimus_control_plane::identity::{Identity, ServerNames};
use optimus_control_plane::join_tokens::JoinTokens;
use optimus_control_plane::store::{Consensus, ConsensusStatus, ProposeError, Store};
use optimus_core::state::{Alloc, Applied, Proposal, Release, State};
use optimus_host::clock::HostClock;
use optimus_host::env::HostEnv;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Every wait in these tests ends here at the latest.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Polls until `condition` holds.
pub async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "gave up waiting until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The real clock with its date shifted.
pub struct ShiftedClock(AtomicI64);

impl Clock for ShiftedClock {
    fn now(&self) -> Timestamp {
        Timestamp(HostClock.now().0.saturating_add_signed(self.0.load(Ordering::Relaxed)))
    }
    fn monotonic(&self) -> Duration {
        HostClock.monotonic()
    }
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        HostClock.sleep(duration)
    }
}

/// An environment whose date the test moves.
#[derive(Clone)]
pub struct TestEnv {
    pub env: Env,
    clock: Arc<ShiftedClock>,
}

impl TestEnv {
    pub fn new() -> Self {
        let clock = Arc::new(ShiftedClock(AtomicI64::new(0)));
        TestEnv { env: Env { clock: clock.clone(), ..HostEnv::new() }, clock }
    }
    /// Moves the date by milliseconds, either way.
    pub fn shift(&self, by: i64) {
        self.clock.0.fetch_add(by, Ordering::Relaxed);
    }
    pub fn advance(&self, by: Span) {
        self.clock.0.fetch_add(by.0 as i64, Ordering::Relaxed);
    }
}

pub const HOUR: Span = Span(3_600_000);

/// A store of one server without a log: what the gateway needs of consensus, under the test's control.
pub struct TestStore {
    state: Mutex<State>,
    applied: watch::Sender<u64>,
    leader: AtomicBool,
    pub proposals: AtomicU64,
}

impl TestStore {
    pub fn new() -> Arc<Self> {
        let store = TestStore {
            state: Mutex::default(),
            applied: watch::Sender::new(0),
            leader: AtomicBool::new(true),
            proposals: AtomicU64::new(0),
        };
        Arc::new(store)
    }
    pub fn lead(&self, leads: bool) {
        self.leader.store(leads, Ordering::Relaxed);
    }
    /// Changes the state as some command would.
    pub fn edit(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock().unwrap();
        change(&mut state);
        state.reindex();
        state.index += 1;
        self.applied.send_replace(state.index);
    }
    pub fn now(&self) -> State {
        self.state.lock().unwrap().clone()
    }
    pub fn status_of(&self, alloc: AllocId) -> Option<Arc<AllocStatus>> {
        self.now().allocs.get(&alloc)?.status.clone()
    }
    pub fn is_up(&self, node: NodeId) -> bool {
        self.now().nodes.get(&node).is_some_and(|n| n.up)
    }
    /// Places a copy of a workload on a node.
    pub fn place(&self, node: NodeId) -> AllocId {
        let id = AllocId(HostEnv::new().new_id());
        self.edit(|state| {
            let name = |n: &str| Name::new(n).unwrap();
            let key = WorkloadKey { project: name("shop"), environment: name("prod"), workload: name("web") };
            let spec = Arc::new(super::spec());
            let release = Release {
                key: key.clone(),
                number: 1,
                spec,
                source: None,
                created_at: Timestamp(1),
                fresh: false,
                secrets: Default::default(),
            };
            state.releases.insert((key.clone(), 1), Arc::new(release));
            let alloc = Alloc {
                id,
                key,
                index: 0,
                release: 1,
                node,
                ports: vec![],
                devices: vec![],
                run: true,
                stop_reason: None,
                created_at: Timestamp(1),
                status: None,
                migrate: false,
                draining_since: None,
                unrouted_at: None,
            };
            state.allocs.insert(id, Arc::new(alloc));
        });
        id
    }
}

impl TestStore {
    /// Applies a proposal as a leader would.
    pub fn commit(&self, proposal: Proposal) -> Applied {
        let mut state = self.state.lock().unwrap();
        let index = state.index + 1;
        let answer = state.apply(index, proposal);
        self.applied.send_replace(index);
        answer
    }
}

impl Consensus for TestStore {
    fn propose(&self, proposal: Proposal) -> Pin<Box<dyn Future<Output = Result<Applied, ProposeError>> + Send + '_>> {
        self.proposals.fetch_add(1, Ordering::Relaxed);
        Box::pin(async move {
            tokio::task::yield_now().await;
            if !self.leader.load(Ordering::Relaxed) {
                return Err(ProposeError::NoLeader { retry_after: Span::millis(10) });
            }
            Ok(self.commit(proposal))
        })
    }
    fn state(&self) -> State {
        self.now()
    }
    fn applied(&self) -> watch::Receiver<u64> {
        self.applied.subscribe()
    }
    fn linearizable(&self) -> Pin<Box<dyn Future<Output = Result<(), ProposeError>> + Send + '_>> {
        Box::pin(async { Ok(()) })
    }
    fn status(&self) -> ConsensusStatus {
        ConsensusStatus { server: 1, is_leader: self.leader.load(Ordering::Relaxed), voters: 1, ..ConsensusStatus::default() }
    }
}

/// A server's gateway with what is behind it.
pub struct Server {
    pub store: Arc<TestStore>,
    pub gateway: Arc<Gateway>,
    pub identity: Arc<Identity>,
    pub address: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Server {
    pub async fn start(test: &TestEnv, dir: &Path) -> Self {
        Self::start_on(test, dir, TestStore::new(), "127.0.0.1:0".parse().unwrap()).await
    }

    /// Starts (again) on a given address and store.
    pub async fn start_on(test: &TestEnv, dir: &Path, store: Arc<TestStore>, listen: SocketAddr) -> Self {
        let handle = Store::new(store.clone(), test.env.clone());
        let names = ServerNames { server: 1, names: vec![] };
        let identity = Identity::found(dir, &handle, &names).await.unwrap();
        let deadline = Instant::now() + PATIENCE;
        let gateway = loop {
            let config = GatewayConfig { listen, advertise: vec![], admin: AdminToken::generate(&*test.env.entropy) };
            match Gateway::bind(handle.clone(), identity.clone(), config) {
                Ok(gateway) => break gateway,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        let (stop, address) = (CancellationToken::new(), gateway.local_addr());
        let task = tokio::spawn({
            let (gateway, stop) = (gateway.clone(), stop.clone());
            async move { gateway.run(stop).await }
        });
        Server { store, gateway, identity, address, stop, task }
    }

    pub async fn token(&self, uses: u32) -> String {
        self.gateway.create(Role::Agent, HOUR, uses).await.unwrap().token
    }

    /// Stops it and starts it again, after `off`, on the same address and store.
    pub async fn restart_after(self, test: &TestEnv, dir: &Path, off: Span) -> Self {
        let address = self.address;
        let store = self.stop().await;
        test.advance(off);
        Self::start_on(test, dir, store, address).await
    }

    /// Stops it and frees its port; gives the store for the next.
    pub async fn stop(self) -> Arc<TestStore> {
        self.stop.cancel();
        self.task.await.unwrap();
        self.store
    }
}

/// Workloads that remember what they were told and report what the test says.
#[derive(Default)]
pub struct FakeWorkloads {
    pub accepted: Mutex<Vec<Desired>>,
    pub generation: AtomicU64,
    pub refused: AtomicU64,
    pub full: Mutex<Vec<AllocStatus>>,
    queue: Mutex<VecDeque<AllocStatus>>,
    wake: Notify,
    /// Lines of the allocation that has output, and whether more may come.
    pub lines: Mutex<Option<(AllocId, u32)>>,
    pub lines_sent: AtomicU64,
}

impl FakeWorkloads {
    pub fn report(&self, status: AllocStatus) {
        self.queue.lock().unwrap().push_back(status);
        self.wake.notify_one();
    }
    pub fn ids(&self) -> Vec<AllocId> {
        self.accepted.lock().unwrap().last().map(|d| d.allocs.iter().map(|a| a.id).collect()).unwrap_or_default()
    }
    pub fn sets(&self) -> usize {
        self.accepted.lock().unwrap().len()
    }
    fn batch(&self, statuses: Vec<AllocStatus>) -> Report {
        let statuses = statuses.iter().map(Blob::of).collect();
        Report { generation: self.generation.load(Ordering::Relaxed), statuses, gone: vec![] }
    }
}

pub fn status(id: AllocId, seq: u64) -> AllocStatus {
    AllocStatus {
        id,
        seq,
        phase: Phase::Running,
        ready: true,
        ready_since: None,
        reason: None,
        restarts: 0,
        pid: Some(1),
        started_at: None,
        last_exit: None,
        unenforced: vec![],
        last_lines: vec![],
        limits: None,
    }
}

impl Workloads for FakeWorkloads {
    fn facts(&self) -> NodeFacts {
        NodeFacts { name: "test-host".into(), ports: (20_000, 20_100), ..NodeFacts::default() }
    }
    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }
    fn accept(&self, desired: Desired) -> Boxed<'_, Result<(), OlderGeneration>> {
        Box::pin(async move {
            let held = self.generation();
            if desired.generation < held {
                self.refused.fetch_add(1, Ordering::Relaxed);
                return Err(OlderGeneration { offered: desired.generation, held });
            }
            self.generation.store(desired.generation, Ordering::Relaxed);
            self.accepted.lock().unwrap().push(desired);
            Ok(())
        })
    }
    fn full_report(&self) -> Report {
        self.batch(self.full.lock().unwrap().clone())
    }
    fn next_report(&self) -> Boxed<'_, Report> {
        Box::pin(async move {
            loop {
                let waiting: Vec<_> = self.queue.lock().unwrap().drain(..).collect();
                if !waiting.is_empty() {
                    return self.batch(waiting);
                }
                self.wake.notified().await;
            }
        })
    }
    fn logs(&self, request: LogRequest, out: mpsc::Sender<LogChunk>) -> Boxed<'_, Result<(), LogError>> {
        Box::pin(async move {
            let held = *self.lines.lock().unwrap();
            let Some((_, count)) = held.filter(|(id, _)| *id == request.alloc) else { return Err(LogError::NoSuchAlloc(request.alloc)) };
            for n in 0..count {
                let line = LogLine { at: Timestamp(u64::from(n)), stderr: false, text: format!("line {n} {}", "x".repeat(1000)) };
                if out.send(LogChunk { lines: vec![line] }).await.is_err() {
                    return Ok(());
                }
                self.lines_sent.fetch_add(1, Ordering::Relaxed);
            }
            if request.follow {
                out.closed().await;
            }
            Ok(())
        })
    }
}

/// A running link.
pub struct Agent {
    pub workloads: Arc<FakeWorkloads>,
    pub status: watch::Receiver<LinkStatus>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Agent {
    pub fn start(identity: AgentIdentity, workloads: Arc<FakeWorkloads>, env: &Env) -> Self {
        let link = Link::new(identity, workloads.clone(), env.clone());
        let (status, stop) = (link.status(), CancellationToken::new());
        let task = tokio::spawn(link.run(stop.clone()));
        Agent { workloads, status, stop, task }
    }
    pub async fn connected(&self) {
        until("the agent is connected", || matches!(*self.status.borrow(), LinkStatus::Connected { .. })).await;
    }
    /// Waits until it is sent away; gives why.
    pub async fn refused(&self) -> String {
        until("the agent is refused", || matches!(*self.status.borrow(), LinkStatus::Refused { .. })).await;
        match &*self.status.borrow() {
            LinkStatus::Refused { message, .. } => message.clone(),
            other => panic!("{other:?}"),
        }
    }
    pub async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}
