//! A driver without processes: each run plays the script of its spec ([`super::script`]), and a hand may play along.
//! For tests and demos. Its runs are in memory: they do not outlive the agent.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use optimus_common::AllocId;
use optimus_common::env::Env;
use optimus_common::reason::{Exit, Reason};
use optimus_common::spec::Resources;
use optimus_common::time::{Span, Timestamp};
use tokio::sync::watch;

use super::script;
use super::{Boxed, Driver, Ended, Fingerprint, Recovered, Run, RunError, StartError, StartRequest, Stats};

#[derive(Default)]
struct Stage {
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
    stage: Arc<Mutex<Stage>>,
}

impl Mock {
    pub fn new(env: Env) -> Self {
        Mock { env, stage: Arc::default() }
    }
    fn lock(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
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
    me: Weak<MockRun>,
    env: Env,
    attempt: u32,
    pid: u32,
    started_at: Timestamp,
    started: Duration,
    stubborn: bool,
    /// How long it takes to end when told to. Unset: it does not.
    stop: Option<Duration>,
    ended: watch::Sender<Option<Ended>>,
}

impl MockRun {
    /// Ends the run in a while, unless it is dropped before.
    fn later(&self, after: Duration, code: Option<i32>, signal: Option<i32>) {
        let (run, sleep) = (Weak::clone(&self.me), self.env.clock.sleep(after));
        let task = async move {
            sleep.await;
            if let Some(run) = run.upgrade() {
                run.end(code, signal);
            }
        };
        self.env.spawn.spawn("mock run", Box::pin(task));
    }

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
            let script = script::Script::of(&request.spec).map_err(|e| StartError::step("read the script", e))?;
            if !script.start.is_zero() {
                this.env.clock.sleep(script.start).await;
            }
            if script.fail {
                return Err(StartError { elsewhere: true, ..StartError::step("play the script", "it says so") });
            }
            let lasts = script.lasts(request.attempt.saturating_sub(1));
            let mut stage = this.lock();
            stage.starts += 1;
            if !stage.failures.is_empty() {
                return Err(stage.failures.remove(0));
            }
            let run = Arc::new_cyclic(|me| MockRun {
                me: Weak::clone(me),
                attempt: request.attempt,
                pid: 1_000_000 + stage.starts,
                started_at: this.env.clock.now(),
                started: this.env.clock.monotonic(),
                stubborn: stage.stubborn,
                stop: script.stop,
                ended: watch::Sender::new(None),
                env: this.env.clone(),
            });
            let before = stage.runs.insert(request.alloc.id, Arc::clone(&run));
            assert!(before.is_none_or(|b| b.ended.borrow().is_some()), "two live runs of {}", request.alloc.id);
            drop(stage);
            if let Some(lasts) = lasts {
                run.later(lasts, Some(script.code), None);
            }
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
    fn resize(&self, _alloc: AllocId, _attempt: u32, _resources: Resources) -> Boxed<'static, Result<(), Reason>> {
        Box::pin(async { Ok(()) })
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
    fn stop(&self, signal: i32, grace: Span) -> Boxed<'_, Result<(), RunError>> {
        if self.stubborn {
            return Box::pin(async { Ok(()) });
        }
        let grace = grace.as_duration();
        match self.stop.filter(|stop| *stop < grace) {
            Some(Duration::ZERO) => {
                self.end(None, Some(signal));
            }
            Some(after) => self.later(after, None, Some(signal)),
            None => self.later(grace, None, Some(libc::SIGKILL)),
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::testing;

    fn request(script: &str, attempt: u32) -> StartRequest {
        let mut spec = testing::spec(&["app"]);
        spec.env = BTreeMap::from([(script::VARIABLE.to_owned(), script.to_owned())]);
        let alloc = testing::desired(1, &spec);
        StartRequest { alloc: Arc::new(alloc), spec: Arc::new(spec), attempt }
    }

    #[tokio::test]
    async fn a_run_does_what_its_script_says() {
        let mock = Mock::new(testing::test_env());
        let run = mock.start(request("crash=20ms code=3 crashes=1", 1)).await.unwrap();
        assert_eq!(run.wait().await.exit().unwrap().code, Some(3));
        let run = mock.start(request("crash=20ms code=3 crashes=1 stop=20ms", 2)).await.unwrap();
        run.stop(libc::SIGTERM, Span::secs(10)).await.unwrap();
        assert_eq!(run.wait().await.exit().unwrap().signal, Some(libc::SIGTERM), "the second does not crash");
        let run = mock.start(request("stop=never", 3)).await.unwrap();
        run.stop(libc::SIGTERM, Span(20)).await.unwrap();
        assert_eq!(run.wait().await.exit().unwrap().signal, Some(libc::SIGKILL), "killed after its grace");
        let Err(refused) = mock.start(request("fail", 4)).await else { panic!("it started") };
        assert!(refused.elsewhere);
        let Err(refused) = mock.start(request("dance", 4)).await else { panic!("it started") };
        assert!(refused.reason.to_string().contains("`dance` is no word"), "{}", refused.reason);
        assert_eq!(mock.alive(), 0);
    }
}
