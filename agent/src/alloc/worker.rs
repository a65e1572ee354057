//! The task of one allocation: feeds events to the machine and performs the actions it answers with.
//!
//! Takes up what an earlier agent left, or starts; then waits for whichever comes first: an order to stop, the
//! answer of a start, the end of the run, a finding of a health check, a deadline. Dropping the task leaves the run
//! as it is; nothing in here ends a workload because the agent ends.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use optimus_common::AllocId;
use optimus_common::env::Env;
use optimus_common::protocol::{AllocStatus, DesiredAlloc, Phase};
use optimus_common::reason::Reason;
use optimus_common::spec::{Check, Kind, Probe, WorkloadSpec};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::machine::{Action, Event, Goal, Machine, Now, Policy, State};
use super::status;
use crate::driver::environment::missing_secret;
use crate::driver::{Boxed, Driver, Ended, Recovered, Run, StartError, StartRequest};
use crate::health::prober::{self, Finding, Question};
use crate::ledger::{AllocRecord, Writer};
use crate::logs;
use crate::manager::reports::Reports;
use crate::metrics::collector::Collector;
use crate::ports;

/// How often a running copy is looked at for what raises no event (lost output).
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Output counts as being lost until nothing was lost for so many looks.
const LOOKS_UNTIL_CALM: u32 = 6;
/// Findings of a health check that wait for the worker; a prober that is ahead waits.
const FINDINGS_MAX: usize = 4;

/// What all workers of an agent share.
pub struct Context {
    pub env: Env,
    pub reports: Arc<Reports>,
    pub ledger: Arc<Writer>,
    /// Holds `<alloc>/<attempt>/`.
    pub allocs_dir: PathBuf,
    /// The agent ends; runs stay.
    pub detach: CancellationToken,
    /// The agent ends and its runs with it; they are wanted again at its next start.
    pub leave: CancellationToken,
    /// Probes and workers; joined when the agent ends.
    pub tasks: TaskTracker,
    /// Told when a worker has ended.
    pub worker_ended: Notify,
    /// Unset: nothing is sampled.
    pub metrics: Option<Collector>,
}

impl Context {
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.env.spawn.spawn(name, Box::pin(self.tasks.track_future(task)));
    }
    fn now(&self) -> Now {
        Now { wall: self.env.clock.now(), mono: self.env.clock.monotonic() }
    }
}

/// The health checks of one run.
struct Probes {
    readiness: Option<mpsc::Receiver<Finding>>,
    liveness: Option<mpsc::Receiver<Finding>>,
    end: CancellationToken,
}

impl Drop for Probes {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

type Starting = Boxed<'static, Result<Arc<dyn Run>, StartError>>;

pub struct Worker {
    ctx: Arc<Context>,
    driver: Arc<dyn Driver>,
    alloc: Arc<DesiredAlloc>,
    spec: Arc<WorkloadSpec>,
    stop: CancellationToken,
    updates: watch::Receiver<Arc<DesiredAlloc>>,
    /// Why the limits that are wanted now are not in force.
    unfit: Option<Reason>,
    machine: Machine,
    status: AllocStatus,
    run: Option<Arc<dyn Run>>,
    starting: Option<Starting>,
    probes: Option<Probes>,
    /// Why a running copy is not as wished.
    running_reason: Option<Reason>,
    /// It failed since it was last ready: its last lines are kept when it is stopped, for they say why.
    troubled: bool,
    /// The last attempt that was started, and how many of the numbers up to it never ran anything because an agent died.
    attempt: u32,
    skipped: u32,
    dropped_lines: u64,
    calm_looks: u32,
    cleaning: FuturesUnordered<Boxed<'static, ()>>,
}

/// What the worker woke up for.
enum Woke {
    Detach,
    Stop,
    Started(Result<Arc<dyn Run>, StartError>),
    Ended(Ended),
    Readiness(Option<Finding>),
    Liveness(Option<Finding>),
    Deadline,
    Look,
    Cleaned,
    Update,
}

impl Worker {
    /// `stop` orders it to stop. `record`: how far an earlier agent got with it.
    pub fn new(
        ctx: Arc<Context>,
        driver: Arc<dyn Driver>,
        alloc: Arc<DesiredAlloc>,
        spec: WorkloadSpec,
        stop: CancellationToken,
        updates: watch::Receiver<Arc<DesiredAlloc>>,
        record: Option<AllocRecord>,
    ) -> Self {
        let policy = Policy::of(&spec);
        let (machine, status, attempt, skipped) = match record {
            // Told as it was; it stays ended.
            Some(AllocRecord { attempt, row, skipped, status }) if status.phase.is_terminal() => {
                let reason = status.reason.clone().unwrap_or(Reason::StopRequested);
                let state = if status.phase == Phase::Failed { State::Failed { reason } } else { State::Stopped { reason } };
                (Machine::ended(policy, state, row), status, attempt, skipped)
            }
            Some(AllocRecord { attempt, row, skipped, status }) => {
                // A restart that was counted and not yet done is counted again when its cause is read again.
                let row = if status.phase == Phase::Backoff { row.saturating_sub(1) } else { row };
                (Machine::new(policy, row), status, attempt, skipped)
            }
            None => (Machine::new(policy, 0), AllocStatus::unknown(alloc.id), 0, 0),
        };
        let cleaning = FuturesUnordered::new();
        let (run, starting, probes, running_reason) = (None, None, None, None);
        let (dropped_lines, calm_looks, spec) = (0, 0, Arc::new(spec));
        Worker {
            ctx,
            driver,
            alloc,
            spec,
            stop,
            updates,
            unfit: None,
            machine,
            status,
            run,
            starting,
            probes,
            running_reason,
            troubled: false,
            attempt,
            skipped,
            dropped_lines,
            calm_looks,
            cleaning,
        }
    }

    /// Works until the allocation has ended or the agent detaches.
    pub async fn run(mut self) {
        if !self.machine.is_final() {
            self.take_up().await;
        }
        self.publish();
        let mut stop_seen = false;
        while !self.machine.is_final() {
            match self.wake(stop_seen).await {
                Woke::Detach => return self.detached().await,
                Woke::Stop => {
                    stop_seen = true;
                    self.feed(Event::StopRequested).await;
                }
                Woke::Started(result) => self.started(result).await,
                Woke::Ended(ended) => self.ended(ended).await,
                Woke::Readiness(finding) => self.readiness(finding).await,
                Woke::Liveness(finding) => self.liveness(finding).await,
                Woke::Deadline => self.feed(Event::Tick).await,
                Woke::Look => self.look().await,
                Woke::Update => self.update().await,
                Woke::Cleaned => continue,
            }
            self.publish();
        }
        while self.cleaning.next().await.is_some() {}
        self.publish();
    }

    /// Waits for the next thing that matters. Cancel-safe in all its parts.
    async fn wake(&mut self, stop_seen: bool) -> Woke {
        let run = self.run.clone();
        let running = matches!(self.machine.state(), State::Running { .. });
        let (mut readiness, mut liveness) = match &mut self.probes {
            Some(Probes { readiness, liveness, .. }) => (readiness.as_mut(), liveness.as_mut()),
            None => (None, None),
        };
        let clock = &self.ctx.env.clock;
        let pause = self.machine.deadline().map(|at| at.saturating_sub(clock.monotonic()));
        tokio::select! {
            biased;
            ended = async { run.as_ref().expect("guarded").wait().await }, if run.is_some() => Woke::Ended(ended),
            result = async { self.starting.as_mut().expect("guarded").await }, if self.starting.is_some() => Woke::Started(result),
            () = self.stop.cancelled(), if !stop_seen => Woke::Stop,
            () = self.ctx.leave.cancelled(), if !stop_seen => Woke::Stop,
            () = self.ctx.detach.cancelled(), if self.starting.is_none() => Woke::Detach,
            finding = async { readiness.as_mut().expect("guarded").recv().await }, if readiness.is_some() && running => Woke::Readiness(finding),
            finding = async { liveness.as_mut().expect("guarded").recv().await }, if liveness.is_some() && running => Woke::Liveness(finding),
            () = clock.sleep(pause.unwrap_or_default()), if pause.is_some() => Woke::Deadline,
            Some(()) = self.cleaning.next(), if !self.cleaning.is_empty() => Woke::Cleaned,
            Ok(()) = self.updates.changed() => Woke::Update,
            () = clock.sleep(LOOK_EVERY), if running => Woke::Look,
        }
    }

    /// Finds what an earlier agent left of it, else starts.
    async fn take_up(&mut self) {
        let now_ready = self.status.phase == Phase::Running && self.status.ready;
        match self.driver.recover(self.alloc.id).await {
            Some(Recovered::Alive(run)) => {
                let (attempt, up) = (run.attempt(), run.up());
                let ready = now_ready && attempt == self.attempt;
                tracing::info!(alloc = %self.alloc.id, workload = %self.alloc.key, attempt, pid = run.pid(), "found its run alive");
                self.feed(Event::Recovered { attempt, up }).await;
                self.take_run(run, ready);
                self.fit().await;
            }
            Some(Recovered::Ended { attempt, newest, ended }) => {
                self.attempt = newest;
                self.skipped += newest.saturating_sub(attempt);
                if self.stop.is_cancelled() {
                    self.note_end(attempt, &ended).await;
                    self.clean_up(attempt);
                    self.feed(Event::StopRequested).await;
                } else {
                    self.end_of(attempt, newest, ended).await;
                }
            }
            None if self.stop.is_cancelled() => self.feed(Event::StopRequested).await,
            // The host has restarted under it, say. Whether a job runs again is not for the agent to decide.
            None if self.spec.kind == Kind::Job && matches!(self.status.phase, Phase::Running | Phase::Stopping) => {
                let reason = Reason::ExitUnknown { what: "nothing of its run is left".to_owned() };
                self.feed(Event::Ended { attempt: self.attempt, reason, jitter: 0.0 }).await;
            }
            None => {
                let kept = logs::segments::attempts(&self.alloc_dir()).unwrap_or_default();
                let attempt = kept.last().copied().unwrap_or(0).max(self.attempt) + 1;
                // Starts that failed are counted; one that was cut off is only done again.
                let restarts = match self.status.phase {
                    Phase::Backoff => self.status.restarts + 1,
                    _ => self.status.restarts,
                };
                self.skipped = (attempt - 1).saturating_sub(restarts);
                self.feed(Event::Launch { attempt }).await;
            }
        }
    }

    /// Gives events to the machine and performs what it says, until both are at rest.
    async fn feed(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let actions = match self.machine.on(event, self.ctx.now()) {
                Ok(actions) => actions,
                Err(illegal) => {
                    tracing::warn!(alloc = %self.alloc.id, %illegal, "ignored an event");
                    continue;
                }
            };
            for action in actions {
                self.perform(action, &mut events).await;
            }
        }
        if let State::Backoff { reason, .. } = self.machine.state() {
            tracing::info!(alloc = %self.alloc.id, workload = %self.alloc.key, %reason, "waits for its next start");
        }
    }

    async fn perform(&mut self, action: Action, events: &mut VecDeque<Event>) {
        match action {
            Action::Start { attempt } => {
                self.attempt = attempt;
                self.running_reason = None;
                (self.status.limits, self.unfit) = (Some(self.spec.resources), None);
                let request = StartRequest { alloc: Arc::clone(&self.alloc), spec: Arc::clone(&self.spec), attempt };
                self.starting = Some(match missing_secret(&self.spec) {
                    Some(missing) => Box::pin(std::future::ready(Err(missing))),
                    None => self.driver.start(request),
                });
            }
            Action::Stop { attempt } => {
                let Some(run) = self.run.clone().filter(|r| r.attempt() == attempt) else { return };
                self.probes = None;
                if let Err(error) = run.stop(signal_number(&self.spec.stop.signal), self.spec.stop.grace).await {
                    // The machine's deadline follows with a kill.
                    tracing::warn!(alloc = %self.alloc.id, error = %crate::ledger::chain(&error), "failed to ask a run to stop");
                    if let Err(error) = run.kill().await {
                        tracing::warn!(alloc = %self.alloc.id, error = %crate::ledger::chain(&error), "failed to kill a run");
                    }
                }
            }
            Action::Kill { attempt } => match self.run.clone().filter(|r| r.attempt() == attempt) {
                Some(run) => {
                    tracing::warn!(alloc = %self.alloc.id, attempt, "a run does not end: killing all of it");
                    if let Err(error) = run.kill().await {
                        tracing::warn!(alloc = %self.alloc.id, error = %crate::ledger::chain(&error), "failed to kill a run");
                    }
                }
                None => {
                    self.starting = None;
                    self.driver.reap(self.alloc.id, attempt).await;
                    let reason = Reason::ExitUnknown { what: "its start was given up".to_owned() };
                    events.push_back(Event::Ended { attempt, reason, jitter: self.ctx.env.fraction() });
                }
            },
        }
    }

    async fn started(&mut self, result: Result<Arc<dyn Run>, StartError>) {
        self.starting = None;
        match result {
            Ok(run) => {
                let attempt = run.attempt();
                tracing::info!(alloc = %self.alloc.id, workload = %self.alloc.key, attempt, pid = run.pid(), "started");
                self.take_run(run, false);
                self.feed(Event::Started { attempt }).await;
                self.fit().await; // wanted otherwise while it started
            }
            Err(StartError { reason, elsewhere }) => {
                tracing::warn!(alloc = %self.alloc.id, workload = %self.alloc.key, %reason, elsewhere, "failed to start");
                let (attempt, jitter) = (self.attempt, self.ctx.env.fraction());
                self.troubled = true;
                self.status.last_lines = self.last_lines(attempt).await;
                self.feed(Event::StartFailed { attempt, reason, elsewhere, jitter }).await;
            }
        }
    }

    /// Takes charge of a live run: its facts, its health checks.
    fn take_run(&mut self, run: Arc<dyn Run>, ready: bool) {
        self.attempt = run.attempt();
        self.status.pid = Some(run.pid());
        self.status.started_at = Some(run.started_at());
        self.status.unenforced = run.unenforced();
        self.dropped_lines = 0;
        let spec = Arc::clone(&self.spec);
        let health = &spec.health;
        let ready = ready || health.readiness.is_none();
        self.running_reason = (!ready).then_some(Reason::Starting);
        self.set_ready(ready);
        let (end, started) = (CancellationToken::new(), self.ctx.env.clock.monotonic().saturating_sub(run.up()));
        let readiness = health.readiness.as_ref().and_then(|p| self.probe(&run, p, started, true, ready, &end));
        let liveness = health.liveness.as_ref().and_then(|p| self.probe(&run, p, started, false, false, &end));
        self.probes = Some(Probes { readiness, liveness, end });
        if let (Some(metrics), Some(files)) = (&self.ctx.metrics, run.group_files()) {
            metrics.watch(self.alloc.id, files);
        }
        self.run = Some(run);
    }

    fn probe(
        &self,
        run: &Arc<dyn Run>,
        probe: &Probe,
        started: Duration,
        eager: bool,
        resumed_good: bool,
        end: &CancellationToken,
    ) -> Option<mpsc::Receiver<Finding>> {
        let port = match (&probe.check, &probe.port) {
            (Check::Command { .. }, _) => Some(0),
            (_, Some(name)) => self.alloc.ports.iter().find(|(n, _)| n == name.as_str()).map(|p| p.1),
            (_, None) => self.alloc.ports.first().map(|p| p.1),
        };
        let Some(port) = port else {
            tracing::error!(alloc = %self.alloc.id, workload = %self.alloc.key, port = ?probe.port, "a health check asks a port the workload does not have");
            return None;
        };
        let (out, findings) = mpsc::channel(FINDINGS_MAX);
        let question = Question { probe: probe.clone(), port, run: Arc::clone(run), started, eager, resumed_good };
        let (end, detach, clock) = (end.clone(), self.ctx.detach.clone(), Arc::clone(&self.ctx.env.clock));
        self.ctx.spawn("probe", async move {
            tokio::select! {
                () = prober::run(question, clock, out) => {}
                () = end.cancelled() => {}
                () = detach.cancelled() => {}
            }
        });
        Some(findings)
    }

    async fn readiness(&mut self, finding: Option<Finding>) {
        match finding {
            Some(Finding::Good) => {
                self.running_reason = None;
                self.troubled = false;
                self.status.last_lines = vec![];
                self.set_ready(true);
            }
            Some(Finding::Failing { probe, last } | Finding::Bad { probe, last }) => {
                let Some(run) = self.run.clone() else { return };
                let readiness = self.spec.health.readiness.as_ref();
                let port = match &readiness.and_then(|p| p.port.clone()) {
                    _ if readiness.is_some_and(|p| matches!(p.check, Check::Command { .. })) => None,
                    Some(name) => self.alloc.ports.iter().find(|(n, _)| n == name.as_str()).map(|p| p.1),
                    None => self.alloc.ports.first().map(|p| p.1),
                };
                let listening = off_thread(move || ports::listening(&run.pids())).await.unwrap_or_default();
                self.running_reason = Some(Reason::NotReady { probe, last, listening, port });
                self.troubled = true;
                self.status.last_lines = self.last_lines(self.attempt).await;
                self.set_ready(false);
            }
            None => self.probes.as_mut().into_iter().for_each(|p| p.readiness = None),
        }
    }

    async fn liveness(&mut self, finding: Option<Finding>) {
        match finding {
            Some(Finding::Bad { probe, last }) => {
                let reason = Reason::LivenessFailed { probe, last };
                tracing::warn!(alloc = %self.alloc.id, workload = %self.alloc.key, %reason, "restarting it");
                self.status.last_lines = self.last_lines(self.attempt).await;
                self.feed(Event::LivenessFailed { attempt: self.attempt, reason }).await;
            }
            Some(Finding::Good | Finding::Failing { .. }) => {}
            None => self.probes.as_mut().into_iter().for_each(|p| p.liveness = None),
        }
    }

    fn set_ready(&mut self, ready: bool) {
        if ready && !self.status.ready {
            self.status.ready_since = Some(self.ctx.env.clock.now());
        }
        self.status.ready = ready;
    }

    async fn ended(&mut self, ended: Ended) {
        let attempt = self.attempt;
        let ended = ended.with_limit(self.status.limits.map(|limits| limits.memory_limit));
        self.run = None;
        self.probes = None;
        if let Some(metrics) = &self.ctx.metrics {
            metrics.forget(self.alloc.id);
        }
        self.end_of(attempt, attempt, ended).await;
    }

    /// Notes how a run ended and lets the machine decide what follows; it goes on after `newest`.
    async fn end_of(&mut self, attempt: u32, newest: u32, ended: Ended) {
        tracing::info!(alloc = %self.alloc.id, workload = %self.alloc.key, attempt, reason = %ended.reason, "ended");
        self.note_end(attempt, &ended).await;
        self.troubled |= !matches!(self.machine.state(), State::Ending { goal: Goal::Stop, .. });
        let jitter = self.ctx.env.fraction();
        self.feed(Event::Ended { attempt: newest, reason: ended.reason, jitter }).await;
        self.clean_up(attempt);
    }

    async fn note_end(&mut self, attempt: u32, ended: &Ended) {
        self.status.last_exit = ended.exit().cloned();
        self.status.last_lines = self.last_lines(attempt).await;
    }

    fn clean_up(&mut self, attempt: u32) {
        self.cleaning.push(self.driver.clean_up(self.alloc.id, attempt));
    }

    /// Borrows nothing while it reads: what the worker polls is `Send` but not `Sync`.
    fn last_lines(&self, attempt: u32) -> impl Future<Output = Vec<String>> + Send + use<> {
        let (dir, alloc) = (self.alloc_dir(), self.alloc.id);
        async move {
            match off_thread(move || logs::last_lines(&dir, attempt)).await {
                Some(Ok(lines)) => lines,
                Some(Err(error)) => {
                    tracing::warn!(%alloc, %error, "failed to read its last lines");
                    vec![]
                }
                None => vec![],
            }
        }
    }

    /// It is to go on under another release: what needs no restart is changed as it runs.
    async fn update(&mut self) {
        let next = self.updates.borrow_and_update().clone();
        match next.spec() {
            Ok(spec) if self.spec.must_restart_for(&spec) => {
                tracing::error!(alloc = %self.alloc.id, workload = %self.alloc.key, "its spec changed under the same id: what runs is kept as it was started");
            }
            Ok(spec) => {
                (self.alloc, self.spec) = (next, Arc::new(spec));
                self.fit().await;
            }
            Err(error) => tracing::error!(alloc = %self.alloc.id, workload = %self.alloc.key, %error, "cannot read its new spec"),
        }
    }

    /// Gives the run the limits that are wanted now, if it has others.
    async fn fit(&mut self) {
        let wanted = self.spec.resources;
        if self.status.limits.is_none_or(|limits| limits == wanted) {
            (self.status.limits, self.unfit) = (Some(wanted), None);
            return;
        }
        let Some(run) = self.run.clone() else { return }; // its next start takes them
        match self.driver.resize(self.alloc.id, run.attempt(), wanted).await {
            Ok(()) => {
                tracing::info!(alloc = %self.alloc.id, workload = %self.alloc.key, limits = ?wanted, "resized as it runs");
                (self.status.limits, self.unfit) = (Some(wanted), None);
            }
            Err(reason) => {
                tracing::warn!(alloc = %self.alloc.id, workload = %self.alloc.key, %reason, "keeps the limits it has");
                self.unfit = Some(reason);
            }
        }
    }

    /// Is output being lost, or something else the driver can tell? Can it be given its limits by now?
    async fn look(&mut self) {
        if self.unfit.is_some() {
            self.fit().await;
        }
        let Some(run) = self.run.clone() else { return };
        match run.trouble() {
            Some(trouble) => self.running_reason = Some(trouble),
            // What readiness says is told again by its next finding.
            None if matches!(self.running_reason, Some(Reason::EngineDown { .. })) => {
                self.running_reason = (!self.status.ready).then_some(Reason::Starting);
            }
            None => {}
        }
        let Some(dropped_lines) = off_thread(move || run.dropped_lines()).await else { return };
        if dropped_lines > self.dropped_lines {
            self.dropped_lines = dropped_lines;
            self.calm_looks = 0;
            if self.running_reason.is_none() || matches!(self.running_reason, Some(Reason::LogDiskFull { .. })) {
                let path = self.ctx.allocs_dir.display().to_string();
                self.running_reason = Some(Reason::LogDiskFull { path, dropped_lines });
            }
        } else if matches!(self.running_reason, Some(Reason::LogDiskFull { .. })) {
            self.calm_looks += 1;
            if self.calm_looks >= LOOKS_UNTIL_CALM {
                self.running_reason = None;
            }
        }
    }

    /// Tells the control plane and the ledger what changed, if anything did.
    fn publish(&mut self) {
        let leaving = self.ctx.leave.is_cancelled() && !self.stop.is_cancelled();
        if leaving && self.machine.is_final() {
            // Not wished to be stopped: the next agent finds the ended run and starts it again.
            return self.ctx.ledger.record(self.alloc.id, None);
        }
        let (phase, reason) = status::describe(self.machine.state(), self.running_reason.clone().or_else(|| self.unfit.clone()));
        self.status.phase = phase;
        self.status.reason = reason;
        self.status.restarts = self.attempt.saturating_sub(1 + self.skipped);
        if phase != Phase::Running {
            self.status.ready = false;
            self.status.ready_since = None;
        }
        if self.run.is_none() {
            self.status.pid = None;
            self.status.started_at = None;
        }
        if !self.troubled && matches!(self.machine.state(), State::Ending { goal: Goal::Stop, .. } | State::Stopped { .. }) {
            self.status.last_lines = vec![];
        }
        if self.ctx.reports.publish(&mut self.status) {
            let record = AllocRecord { attempt: self.attempt, row: self.machine.row(), skipped: self.skipped, status: self.status.clone() };
            self.ctx.ledger.record(self.alloc.id, Some(record));
        }
    }

    /// The agent goes and the run stays. A start under way has been waited for, so that the next agent finds all of it.
    async fn detached(&mut self) {
        self.probes = None;
        while self.cleaning.next().await.is_some() {}
    }

    fn alloc_dir(&self) -> PathBuf {
        alloc_dir(&self.ctx.allocs_dir, self.alloc.id)
    }
}

/// Where the attempts of an allocation are kept.
pub fn alloc_dir(allocs_dir: &std::path::Path, alloc: AllocId) -> PathBuf {
    allocs_dir.join(alloc.to_string())
}

async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(work).await.ok() // it panicked: logged by the runtime, and nothing hangs on it
}

/// Number of a signal the spec may name; the spec's reader refuses others.
fn signal_number(name: &str) -> i32 {
    match name.strip_prefix("SIG").unwrap_or(name) {
        "INT" => libc::SIGINT,
        "QUIT" => libc::SIGQUIT,
        "HUP" => libc::SIGHUP,
        "USR1" => libc::SIGUSR1,
        "USR2" => libc::SIGUSR2,
        _ => libc::SIGTERM,
    }
}
