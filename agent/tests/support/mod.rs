//! A real agent on this host in a directory, a cgroup owner and ports of its own.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use optimus_agent::agent::{Agent, AgentConfig};
use optimus_agent::testing::test_env;
use optimus_agent::workloads::Workloads;
use optimus_common::AllocId;
use optimus_common::protocol::{AllocStatus, Desired, DesiredAlloc, LogChunk, LogRequest, Phase};
use optimus_common::spec::{Run, WorkloadSpec};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

/// Nothing here takes near so long; the machine may be busy.
pub const DEADLINE: Duration = Duration::from_secs(30);

static NEXT: AtomicU32 = AtomicU32::new(0);

pub struct Node {
    pub dir: tempfile::TempDir,
    pub owner: String,
    pub ports: (u16, u16),
    pub config: AgentConfig,
    /// Its own runtime: dropping it is the agent's sudden death.
    runtime: Option<Runtime>,
    agent: Option<Agent>,
    statuses: BTreeMap<AllocId, AllocStatus>,
    generation: u64,
    allocs: BTreeMap<AllocId, DesiredAlloc>,
}

/// The runner of this build. `cargo test --workspace` builds it beside the test.
pub fn runner() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let runner = exe.parent().unwrap().parent().unwrap().join("optimus-runner");
    assert!(runner.exists(), "{} is missing: build the workspace first", runner.display());
    runner
}

impl Node {
    pub fn new() -> Self {
        Node::with(|_| {})
    }
    pub fn with(change: impl FnOnce(&mut AgentConfig)) -> Self {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let owner = format!("optimus-test-{}-{n}", std::process::id());
        let dir = tempfile::tempdir().unwrap();
        // Below the kernel's ephemeral ports, apart for each test of each process.
        let first = 10_000 + (std::process::id() % 100) as u16 * 200 + n as u16 % 20 * 10;
        let ports = (first, first + 9);
        let mut config = AgentConfig {
            data_dir: dir.path().join("agent"),
            runner: runner(),
            ports,
            allow_unenforced: false,
            workload_user: None,
            address: "127.0.0.1".into(),
            name: Some("test-node".into()),
            cgroup_owner: owner.clone(),
            labels: BTreeMap::new(),
            mock: false,
            // A user's engine is none of these tests' business.
            container_engine: Some("/nonexistent/docker.sock".into()),
        };
        change(&mut config);
        let mut node = Node {
            dir,
            owner,
            ports,
            config,
            runtime: None,
            agent: None,
            statuses: BTreeMap::new(),
            generation: 0,
            allocs: BTreeMap::new(),
        };
        node.start();
        node
    }

    pub fn start(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let config = self.config.clone();
        // What an agent and its ledger block on is bounded; retry while the one that died lets go of its lock.
        let agent = until("the agent starts", || match runtime.block_on(Agent::start(config.clone(), test_env())) {
            Ok(agent) => Some(agent),
            Err(optimus_agent::agent::AgentError::InUse(_)) => None,
            Err(error) => panic!("{error:?}"),
        });
        self.agent = Some(agent);
        self.runtime = Some(runtime);
    }

    /// The agent is gone from one instant to the next; what it started is not told.
    pub fn die(&mut self) {
        let runtime = self.runtime.take().unwrap();
        runtime.shutdown_timeout(Duration::from_secs(5));
        self.agent = None;
    }

    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.as_ref().unwrap().block_on(async { tokio::time::timeout(DEADLINE, future).await.expect("in time") })
    }
    pub fn agent(&self) -> &Agent {
        self.agent.as_ref().unwrap()
    }
    pub fn workloads(&self) -> Arc<dyn Workloads> {
        self.agent.as_ref().unwrap().workloads()
    }

    /// Adds or replaces copies in the desired set and hands it over.
    pub fn want(&mut self, allocs: impl IntoIterator<Item = DesiredAlloc>) {
        self.allocs.extend(allocs.into_iter().map(|a| (a.id, a)));
        self.hand_over();
    }
    pub fn drop_all(&mut self) {
        self.allocs.clear();
        self.hand_over();
    }
    pub fn stop(&mut self, id: AllocId) {
        self.allocs.get_mut(&id).unwrap().run = false;
        self.hand_over();
    }
    fn hand_over(&mut self) {
        self.generation += 1;
        let set = Desired { generation: self.generation, allocs: self.allocs.values().cloned().collect() };
        self.block_on(async { self.workloads().accept(set).await }).unwrap();
    }

    /// Waits until the reported status of an allocation is as wished.
    pub fn until(&mut self, id: AllocId, what: &str, good: impl Fn(&AllocStatus) -> bool) -> AllocStatus {
        let deadline = Instant::now() + DEADLINE;
        let workloads = self.workloads();
        let mut report = workloads.full_report();
        let mut history = vec![];
        loop {
            for status in report.statuses.drain(..) {
                let status: AllocStatus = status.open().unwrap();
                if status.id == id {
                    history.push(format!("{:?} {:?}", status.phase, status.reason.as_ref().map(ToString::to_string)));
                }
                let older = self.statuses.insert(status.id, status.clone());
                assert!(older.is_none_or(|o| o.seq <= status.seq), "status numbers never go back");
            }
            if let Some(status) = self.statuses.get(&id).filter(|s| good(s)) {
                return status.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let next = workloads.next_report();
            report = self
                .runtime
                .as_ref()
                .unwrap()
                .block_on(async { tokio::time::timeout(left, next).await })
                .unwrap_or_else(|_| panic!("not {what}: {:#?}, after {history:#?}", self.statuses.get(&id)));
        }
    }
    pub fn ready(&mut self, id: AllocId) -> AllocStatus {
        self.until(id, "ready", |s| s.phase == Phase::Running && s.ready)
    }

    pub fn logs(&self, alloc: AllocId, tail: Option<u32>) -> Vec<String> {
        let (out, mut lines) = mpsc::channel::<LogChunk>(16);
        let workloads = self.workloads();
        self.block_on(async move {
            let request = LogRequest { alloc, since: None, tail, follow: false };
            let read = workloads.logs(request, out);
            let gather = async {
                let mut texts = vec![];
                while let Some(chunk) = lines.recv().await {
                    texts.extend(chunk.lines.into_iter().map(|l| l.text));
                }
                texts
            };
            let (read, texts) = tokio::join!(read, gather);
            read.unwrap();
            texts
        })
    }

    pub fn stop_all(&mut self) -> bool {
        let agent = self.agent.take().unwrap();
        self.block_on(agent.stop_all(Duration::from_secs(10)))
    }

    /// Every cgroup directory that is left of this node's owner.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        let mut found = vec![];
        let mut roots = vec![PathBuf::from("/sys/fs/cgroup")];
        roots.extend(fs::read_dir("/sys/fs/cgroup").into_iter().flatten().filter_map(Result::ok).map(|e| e.path()));
        for root in roots {
            walk(&root.join(&self.owner), &mut found);
        }
        found
    }

    /// Processes whose private tmp is in a run directory of this allocation: the workload and all its children.
    pub fn processes(&self, id: AllocId) -> Vec<i32> {
        let runs = self.config.data_dir.join("allocs").join(id.to_string());
        let all = procfs::process::all_processes().unwrap().filter_map(Result::ok);
        let ours = all.filter(|p| {
            let environ = p.environ().unwrap_or_default();
            environ.get(std::ffi::OsStr::new("TMPDIR")).is_some_and(|tmp| Path::new(tmp).starts_with(&runs))
        });
        ours.map(|p| p.pid()).collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Whatever the test left: stopped and removed, also after a panic.
        if self.runtime.is_none() && !std::thread::panicking() {
            self.start();
        }
        if let (Some(runtime), Some(agent)) = (&self.runtime, self.agent.take()) {
            runtime.block_on(agent.stop_all(Duration::from_secs(3)));
        }
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
        let left = self.cgroups();
        if !std::thread::panicking() {
            assert!(left.is_empty(), "cgroups left: {left:?}");
        }
    }
}

fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
    if !dir.is_dir() {
        return;
    }
    found.push(dir.to_owned());
    for entry in fs::read_dir(dir).into_iter().flatten().filter_map(Result::ok) {
        if entry.path().is_dir() {
            walk(&entry.path(), found);
        }
    }
}

/// Polls until there is an answer, with a deadline.
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A service of this shell line.
pub fn shell(line: &str) -> WorkloadSpec {
    WorkloadSpec { run: Run::Shell(line.into()), ..optimus_agent::testing::spec(&[]) }
}
