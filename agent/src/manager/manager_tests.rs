//! The manager with scripted runs: what it does with sets, ends and restarts of the agent.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use optimus_common::protocol::AllocStatus;
use optimus_common::spec::Check;
use optimus_common::time::Span;
use tokio_util::task::TaskTracker;

use super::reports::Reports;
use super::*;
use crate::driver::StartError;
use crate::driver::mock::Mock;
use crate::ledger;
use crate::testing::{desired, probe, spec, test_env};

const DEADLINE: Duration = Duration::from_secs(10);

/// An agent without an operating system below it; `restart` is the death of one and the birth of another.
struct Node {
    dir: tempfile::TempDir,
    mock: Mock,
    manager: Option<Arc<Manager>>,
}

impl Node {
    async fn new() -> Self {
        let mut node = Node { dir: tempfile::tempdir().unwrap(), mock: Mock::new(test_env()), manager: None };
        node.start().await;
        node
    }
    fn allocs_dir(&self) -> PathBuf {
        self.dir.path().join("allocs")
    }
    async fn start(&mut self) {
        let env = test_env();
        fs::create_dir_all(self.allocs_dir()).unwrap();
        let sealer = Sealer::from_file(&self.dir.path().join("ledger.key"), Arc::clone(&env.entropy)).unwrap();
        let (writer, held) = ledger::open(self.dir.path(), &sealer, &env).unwrap();
        let ctx = Context {
            env,
            reports: Arc::new(Reports::new(held.epoch)),
            ledger: Arc::new(writer),
            allocs_dir: self.allocs_dir(),
            detach: CancellationToken::new(),
            leave: CancellationToken::new(),
            tasks: TaskTracker::new(),
            worker_ended: tokio::sync::Notify::new(),
            metrics: None,
        };
        let drivers = BTreeMap::from([("process", Arc::new(self.mock.clone()) as Arc<dyn Driver>)]);
        let facts = NodeFacts::default();
        self.manager = Some(Manager::start(Arc::new(ctx), drivers, sealer, facts, held).await);
    }
    /// Ends the agent and leaves the runs.
    async fn detach(&mut self) {
        let manager = self.manager.take().unwrap();
        manager.ctx.detach.cancel();
        manager.ctx.tasks.close();
        tokio::time::timeout(DEADLINE, manager.ctx.tasks.wait()).await.unwrap();
        assert_eq!(Arc::strong_count(&manager.ctx), 1, "a task still holds the agent");
    }
    async fn restart(&mut self) {
        self.detach().await;
        self.start().await;
    }
    fn manager(&self) -> &Arc<Manager> {
        self.manager.as_ref().unwrap()
    }
    async fn accept(&self, generation: u64, allocs: Vec<DesiredAlloc>) {
        self.manager().accept(Desired { generation, allocs }).await.unwrap();
    }
    fn status(&self, id: AllocId) -> Option<AllocStatus> {
        self.manager().ctx.reports.status(id)
    }
    async fn until(&self, id: AllocId, what: &str, good: impl Fn(&AllocStatus) -> bool) -> AllocStatus {
        let waited = tokio::time::timeout(DEADLINE, async {
            loop {
                if let Some(status) = self.status(id).filter(&good) {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        });
        waited.await.unwrap_or_else(|_| panic!("not {what}: {:?}", self.status(id)))
    }
    async fn running(&self, id: AllocId) -> AllocStatus {
        self.until(id, "running", |s| s.phase == Phase::Running).await
    }
}

#[tokio::test]
async fn a_set_is_started_changed_and_dropped() {
    let node = Node::new().await;
    let (a, b) = (desired(1, &spec(&["a"])), desired(2, &spec(&["b"])));
    node.accept(1, vec![a.clone(), b.clone()]).await;
    assert!(node.running(a.id).await.ready, "no readiness check: ready while running");
    node.running(b.id).await;
    node.accept(2, vec![a.clone(), DesiredAlloc { run: false, ..b.clone() }]).await;
    let stopped = node.until(b.id, "stopped", |s| s.phase == Phase::Stopped).await;
    assert_eq!((stopped.reason, stopped.ready), (Some(Reason::StopRequested), false));
    node.accept(3, vec![a.clone()]).await;
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while node.status(b.id).is_some() {
        assert!(tokio::time::Instant::now() < deadline, "not forgotten");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let full = node.manager().full_report();
    assert_eq!((full.generation, full.statuses.len(), full.gone), (3, 1, vec![b.id]));
    let older = node.manager().accept(Desired { generation: 2, allocs: vec![] }).await;
    assert_eq!(older, Err(OlderGeneration { offered: 2, held: 3 }));
    assert_eq!(node.mock.starts(), 2);
}

#[tokio::test]
async fn an_agent_that_starts_again_restarts_nothing_and_reports_what_it_missed() {
    let mut node = Node::new().await;
    let (a, b) = (desired(1, &spec(&["a"])), desired(2, &spec(&["b"])));
    node.accept(7, vec![a.clone(), b.clone()]).await;
    let before = node.running(a.id).await;
    node.running(b.id).await;
    node.detach().await;
    assert_eq!(node.mock.alive(), 2, "a detached agent leaves its runs");
    node.mock.exit(b.id, 42);
    node.start().await;
    assert_eq!(node.manager().generation(), 7, "no server was needed");
    let after = node.until(a.id, "found", |s| s.phase == Phase::Running).await;
    assert_eq!((after.pid, after.restarts, after.ready), (before.pid, 0, true));
    assert!(after.seq > before.seq, "an older number would be ignored by the server");
    let missed = node.until(b.id, "running again", |s| s.phase == Phase::Running && s.restarts == 1).await;
    assert_eq!(missed.last_exit.unwrap().code, Some(42));
    assert_eq!(node.mock.starts(), 3);
}

#[tokio::test]
async fn a_lost_ledger_is_rebuilt_from_what_runs() {
    let mut node = Node::new().await;
    let (a, b) = (desired(1, &spec(&["a"])), desired(2, &spec(&["b"])));
    node.accept(7, vec![a.clone(), b.clone()]).await;
    let pid = node.running(a.id).await.pid;
    node.running(b.id).await;
    node.detach().await;
    fs::write(node.dir.path().join("ledger.redb"), vec![0xA5; 10_000]).unwrap();
    // And nothing at all is known of the other one.
    fs::remove_file(node.allocs_dir().join(b.id.to_string()).join(ALLOC_FILE)).unwrap();
    node.start().await;
    assert_eq!(node.running(a.id).await.pid, pid);
    assert_eq!(node.status(b.id), None);
    assert_eq!(node.mock.alive(), 2);
    node.accept(8, vec![a.clone()]).await;
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while node.mock.alive() != 1 {
        assert!(tokio::time::Instant::now() < deadline, "the one nobody wants still runs");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!((node.running(a.id).await.pid, node.mock.starts()), (pid, 2));
}

#[tokio::test]
async fn a_stop_the_agent_did_not_get_to_is_done_after_its_restart() {
    let mut node = Node::new().await;
    let a = desired(1, &spec(&["a"]));
    node.accept(1, vec![a.clone()]).await;
    node.running(a.id).await;
    node.detach().await;
    // The set without it became durable, and the agent died before it acted.
    let env = test_env();
    let sealer = Sealer::from_file(&node.dir.path().join("ledger.key"), Arc::clone(&env.entropy)).unwrap();
    let (writer, _) = ledger::open(node.dir.path(), &sealer, &env).unwrap();
    assert!(writer.accept(2, vec![], vec![a.id]).await);
    drop(writer);
    node.start().await;
    let deadline = tokio::time::Instant::now() + DEADLINE;
    while node.mock.alive() != 0 || !node.manager().full_report().gone.contains(&a.id) {
        assert!(tokio::time::Instant::now() < deadline, "still there");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_crash_loop_is_named_and_a_failed_start_told() {
    let node = Node::new().await;
    let mut looping = spec(&["a"]);
    looping.restart.delay = Span(0); // the smallest pauses there are
    let a = desired(1, &looping);
    node.accept(1, vec![a.clone()]).await;
    for restarts in 0..4 {
        node.until(a.id, "running", |s| s.phase == Phase::Running && s.restarts == restarts).await;
        assert!(node.mock.exit(a.id, 3));
    }
    let status = node.until(a.id, "in a crash loop", |s| matches!(s.reason, Some(Reason::CrashLoop { .. }))).await;
    assert_eq!((status.phase, status.last_exit.unwrap().code), (Phase::Backoff, Some(3)));

    let b = desired(2, &spec(&["b"]));
    let taken = Reason::PortTaken { port: 20_000, holder: None };
    node.mock.fail_next(StartError { reason: taken.clone(), elsewhere: true });
    node.accept(2, vec![b.clone()]).await;
    let failed = node.until(b.id, "failed", |s| s.phase == Phase::Failed).await;
    assert_eq!(failed.reason, Some(taken));
}

#[tokio::test]
async fn a_copy_is_ready_when_its_check_passes_and_restarted_when_it_is_stuck() {
    let node = Node::new().await;
    let mut checked = spec(&["a"]);
    checked.health.readiness = Some(probe(Check::Tcp));
    checked.health.liveness = Some(probe(Check::Tcp));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let a = DesiredAlloc { ports: vec![("http".into(), listener.local_addr().unwrap().port())], ..desired(1, &checked) };
    node.accept(1, vec![a.clone()]).await;
    let ready = node.until(a.id, "ready", |s| s.ready).await;
    assert!(ready.ready_since.is_some() && ready.reason.is_none());
    drop(listener);
    let restarted = node.until(a.id, "restarted", |s| s.restarts >= 1).await;
    assert_eq!(restarted.last_exit.unwrap().signal, Some(libc::SIGTERM));
    let unready =
        node.until(a.id, "not ready", |s| matches!(s.reason, Some(Reason::NotReady { .. } | Reason::LivenessFailed { .. }))).await;
    assert!(!unready.ready);
}

#[tokio::test]
async fn a_spec_this_node_cannot_run_fails_with_its_reason() {
    let node = Node::new().await;
    let mut container = spec(&["a"]);
    container.driver = spec::Driver::Container(Box::new(spec::Container::of("x")));
    let a = desired(1, &container);
    let b = DesiredAlloc { spec: optimus_common::protocol::Blob(vec![0xC1]), ..desired(2, &container) };
    node.accept(1, vec![a.clone(), b.clone()]).await;
    for id in [a.id, b.id] {
        let failed = node.until(id, "failed", |s| s.phase == Phase::Failed).await;
        assert!(matches!(failed.reason, Some(Reason::StartFailed { .. })));
    }
}

#[tokio::test]
async fn logs_of_a_stranger_are_refused() {
    let node = Node::new().await;
    let (out, _lines) = mpsc::channel(1);
    let request = LogRequest { alloc: AllocId(uuid::Uuid::from_u128(9)), since: None, tail: None, follow: false };
    assert!(matches!(node.manager().logs(request, out).await, Err(LogError::NoSuchAlloc(_))));
}

#[tokio::test]
async fn an_ended_copy_stays_ended_over_a_restart_of_the_agent() {
    let mut node = Node::new().await;
    let a = desired(1, &spec(&["a"]));
    node.accept(1, vec![a.clone()]).await;
    node.running(a.id).await;
    node.accept(2, vec![DesiredAlloc { run: false, ..a.clone() }]).await;
    node.until(a.id, "stopped", |s| s.phase == Phase::Stopped).await;
    node.restart().await;
    node.until(a.id, "stopped", |s| s.phase == Phase::Stopped).await;
    assert_eq!(node.mock.starts(), 1);
}
