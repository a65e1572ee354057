//! A driver without processes: runs start at once and end when the script says so. For tests and demos.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use optimus_common::AllocId;
use optimus_common::env::Env;
use optimus_common::reason::{Exit, Reason};
use optimus_common::time::{Span, Timestamp};
use tokio::sync::watch;

use super::{Boxed, Driver, Ended, Fingerprint, Recovered, Run, RunError, StartError, StartRequest, Stats};

#[derive(Default)]
struct Script {
    runs: BTreeMap<AllocId, Arc<MockRun>>,
    /// Answers for the next starts of any allocation, first to last; then starts succeed.
    failures: Vec<StartError>,
    starts: u32,
    /// Runs ignore the stop signal and end only when killed.
    stubborn: bool,
}

/// The driver and the hand that plays it. Clones share the runs, as an agent that starts again would find them.
#[derive(Clone)]
pub struct Mock {
    env: Env,
    script: Arc<Mutex<Script>>,
}

impl Mock {
    pub fn new(env: Env) -> Self {
        Mock { env, script: Arc::default() }
    }
    fn lock(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }
    /// The next start fails like this.
    pub fn fail_next(&self, error: StartError) {
        self.lock().failures.push(error);
    }
    pub fn stubborn(&self, stubborn: bool) {
        self.lock().stubborn = stubborn;
    }
    /// How many starts there were.
    pub fn starts(&self) -> u32 {
        self.lock().starts
    }
    /// Ends the run of an allocation with an exit code; false if it has none.
    pub fn exit(&self, alloc: AllocId, code: i32) -> bool {
        self.lock().runs.get(&alloc).is_some_and(|run| run.end(Some(code), None))
    }
    /// How many runs are alive.
    pub fn alive(&self) -> usize {
        self.lock().runs.values().filter(|r| r.ended.borrow().is_none()).count()
    }
}

struct MockRun {
    env: Env,
    attempt: u32,
    pid: u32,
    started_at: Timestamp,
    started: Duration,
    stubborn: bool,
    ended: watch::Sender<Option<Ended>>,
}

impl MockRun {
    fn end(&self, code: Option<i32>, signal: Option<i32>) -> bool {
        let exit = Exit { code, signal, oom: None, at: self.env.clock.now(), ran_for: self.up().into() };
        self.ended.send_if_modified(|ended| ended.is_none() && ended.replace(Ended { reason: Reason::Exited { exit } }).is_none())
    }
}

impl Driver for Mock {
    fn name(&self) -> &'static str {
        "mock"
    }
    fn fingerprint(&self) -> Fingerprint {
        Fingerprint { name: "mock", usable: true, unenforced: vec![] }
    }
    fn start(&self, request: StartRequest) -> Boxed<'static, Result<Arc<dyn Run>, StartError>> {
        let this = self.clone();
        Box::pin(async move {
            let mut script = this.lock();
            script.starts += 1;
            if !script.failures.is_empty() {
                return Err(script.failures.remove(0));
            }
            let run = Arc::new(MockRun {
                attempt: request.attempt,
                pid: 1_000_000 + script.starts,
                started_at: this.env.clock.now(),
                started: this.env.clock.monotonic(),
                stubborn: script.stubborn,
                ended: watch::Sender::new(None),
                env: this.env.clone(),
            });
            let before = script.runs.insert(request.alloc.id, Arc::clone(&run));
            assert!(before.is_none_or(|b| b.ended.borrow().is_some()), "two live runs of {}", request.alloc.id);
            Ok(run as Arc<dyn Run>)
        })
    }
    fn recover(&self, alloc: AllocId) -> Boxed<'static, Option<Recovered>> {
        let found = self.lock().runs.get(&alloc).map(|run| match run.ended.borrow().clone() {
            Some(ended) => Recovered::Ended { attempt: run.attempt, newest: run.attempt, ended },
            None => Recovered::Alive(Arc::clone(run) as Arc<dyn Run>),
        });
        Box::pin(async { found })
    }
    fn reap(&self, alloc: AllocId, attempt: u32) -> Boxed<'static, ()> {
        if let Some(run) = self.lock().runs.get(&alloc).filter(|r| r.attempt == attempt) {
            run.end(None, Some(libc::SIGKILL));
        }
        Box::pin(async {})
    }
    fn sweep(&self, _keep: BTreeSet<AllocId>) -> Boxed<'static, ()> {
        Box::pin(async {})
    }
    fn clean_up(&self, _alloc: AllocId, _attempt: u32) -> Boxed<'static, ()> {
        Box::pin(async {})
    }
}

impl Run for MockRun {
    fn attempt(&self) -> u32 {
        self.attempt
    }
    fn pid(&self) -> u32 {
        self.pid
    }
    fn started_at(&self) -> Timestamp {
        self.started_at
    }
    fn up(&self) -> Duration {
        self.env.clock.monotonic().saturating_sub(self.started)
    }
    fn unenforced(&self) -> Vec<String> {
        vec![]
    }
    fn wait(&self) -> Boxed<'_, Ended> {
        let mut ended = self.ended.subscribe();
        Box::pin(async move {
            match ended.wait_for(Option::is_some).await.map(|e| e.clone()) {
                Ok(Some(ended)) => ended,
                _ => unreachable!("the sender is in the run that is borrowed, and the value was waited for"),
            }
        })
    }
    fn stop(&self, signal: i32, _grace: Span) -> Boxed<'_, Result<(), RunError>> {
        if !self.stubborn {
            self.end(None, Some(signal));
        }
        Box::pin(async { Ok(()) })
    }
    fn kill(&self) -> Boxed<'_, Result<(), RunError>> {
        self.end(None, Some(libc::SIGKILL));
        Box::pin(async { Ok(()) })
    }
    fn pids(&self) -> Vec<u32> {
        vec![]
    }
    fn stats(&self) -> Result<Stats, RunError> {
        Ok(Stats { processes: 1, ..Stats::default() })
    }
    fn dropped_lines(&self) -> u64 {
        0
    }
}
