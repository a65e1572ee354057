//! One simulated host: takes desired sets and plays the script of every copy, without a process.
//!
//! It stands where a real agent has its manager, behind the link. No task and no timer of its own: what is due is looked
//! at whenever the link asks for the next report. A copy costs about a hundred bytes.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use optimus_agent::driver::script::Script;
use optimus_agent::workloads::{Boxed, LogError, OlderGeneration, Workloads};
use optimus_common::env::Env;
use optimus_common::protocol::{
    ALLOCS_PER_NODE_MAX, AllocStatus, Blob, Desired, DesiredAlloc, LogChunk, LogRequest, NodeFacts, Phase, Report,
};
use optimus_common::reason::{Exit, Reason};
use optimus_common::{AllocId, Span, Timestamp, WorkloadKey};
use tokio::sync::{Notify, mpsc};

/// Pause before the second start; doubles each time.
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// A copy that does not end by itself is killed after this.
const GRACE: Duration = Duration::from_secs(10);
/// Releases whose script is remembered; all are forgotten when there are more.
const KNOWN_MAX: usize = 20_000;
/// Forgotten copies told again in a full report.
const GONE_MAX: usize = ALLOCS_PER_NODE_MAX;

/// A release, shared by all its copies on all hosts.
#[derive(Debug)]
struct Known {
    key: WorkloadKey,
    script: Script,
}

/// What all hosts of a process share, and what they did in all.
#[derive(Default)]
pub struct Shared {
    known: Mutex<HashMap<(WorkloadKey, u64), Arc<Known>>>,
    pub starts: AtomicU64,
    pub sets: AtomicU64,
    pub set_copies: AtomicU64,
}

impl Shared {
    fn known(&self, alloc: &DesiredAlloc) -> Arc<Known> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let id = (alloc.key.clone(), alloc.release);
        if let Some(found) = known.get(&id) {
            return Arc::clone(found);
        }
        if known.len() >= KNOWN_MAX {
            known.clear();
        }
        let script = alloc.spec().map_err(|e| e.to_string()).and_then(|spec| Script::of(&spec).map_err(|e| e.to_string()));
        let script = script.unwrap_or_else(|error| {
            tracing::warn!(workload = %alloc.key, error, "this script cannot be played: its copies fail");
            Script { fail: true, ..Script::default() }
        });
        let fresh = Arc::new(Known { key: alloc.key.clone(), script });
        known.insert(id, Arc::clone(&fresh));
        fresh
    }
}

/// One copy.
struct Copy {
    known: Arc<Known>,
    index: u32,
    run: bool,
    ready: bool,
    phase: Phase,
    /// The first is 0.
    attempt: u32,
    seq: u64,
    started_at: Option<Timestamp>,
    exit: Option<Box<Exit>>,
}

/// What happens to a copy when its time has come. It counts only for the attempt it was planned for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Up,
    Ready,
    Crash,
    Again,
    Ended,
}

#[derive(Default)]
struct Inner {
    generation: u64,
    copies: BTreeMap<AllocId, Copy>,
    due: BinaryHeap<Reverse<(Duration, AllocId, u32, Event)>>,
    changed: BTreeSet<AllocId>,
    gone: Vec<AllocId>,
    gone_untold: Vec<AllocId>,
}

/// The host. Clones of the `Arc` go to the link and to whoever watches.
pub struct Host {
    facts: NodeFacts,
    env: Env,
    shared: Arc<Shared>,
    /// Status numbers of this life of the agent begin here.
    epoch: u64,
    inner: Mutex<Inner>,
    wake: Notify,
    /// Nothing happens, as in a process that is stopped.
    frozen: AtomicBool,
}

/// A copy as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub id: AllocId,
    pub key: WorkloadKey,
    pub index: u32,
    pub running: bool,
    pub ready: bool,
    pub started_at: Option<Timestamp>,
}

/// How many copies a host has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    pub held: usize,
    pub running: usize,
    pub ready: usize,
}

impl Host {
    pub fn new(facts: NodeFacts, env: Env, shared: Arc<Shared>) -> Self {
        let epoch = env.clock.now().0 << 12;
        Host { facts, env, shared, epoch, inner: Mutex::default(), wake: Notify::new(), frozen: AtomicBool::new(false) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn freeze(&self, frozen: bool) {
        self.frozen.store(frozen, Ordering::Relaxed);
        self.wake.notify_one();
    }

    pub fn count(&self) -> Count {
        let inner = self.lock();
        let running = inner.copies.values().filter(|c| c.run && c.phase == Phase::Running);
        Count { held: inner.copies.len(), running: running.clone().count(), ready: running.filter(|c| c.ready).count() }
    }

    pub fn copies(&self) -> Vec<Seen> {
        let seen = |(id, c): (&AllocId, &Copy)| Seen {
            id: *id,
            key: c.known.key.clone(),
            index: c.index,
            running: c.run && c.phase == Phase::Running,
            ready: c.ready,
            started_at: c.started_at,
        };
        self.lock().copies.iter().map(seen).collect()
    }

    /// Ends a running copy with an exit code, as if it had crashed. False if there is none.
    pub fn crash(&self, alloc: AllocId) -> bool {
        let mut inner = self.lock();
        let Some(attempt) = inner.copies.get(&alloc).filter(|c| c.phase == Phase::Running).map(|c| c.attempt) else { return false };
        inner.due.push(Reverse((self.env.clock.monotonic(), alloc, attempt, Event::Crash)));
        drop(inner);
        self.wake.notify_one();
        true
    }

    /// Plays everything that is due. Gives when the next thing is.
    fn play(&self, inner: &mut Inner) -> Option<Duration> {
        let now = self.env.clock.monotonic();
        while let Some(&Reverse((at, id, attempt, event))) = inner.due.peek() {
            if at > now {
                return Some(at);
            }
            inner.due.pop();
            if inner.copies.get(&id).is_some_and(|c| c.attempt == attempt) {
                self.happen(inner, id, event, at);
            }
        }
        None
    }

    fn happen(&self, inner: &mut Inner, id: AllocId, event: Event, at: Duration) {
        let Some(copy) = inner.copies.get_mut(&id) else { return };
        let script = &copy.known.script;
        let mut plan = |after: Duration, attempt: u32, event: Event| inner.due.push(Reverse((at + after, id, attempt, event)));
        match (event, copy.phase, copy.run) {
            (Event::Up, Phase::Starting, true) => {
                copy.phase = Phase::Running;
                copy.started_at = Some(self.env.clock.now());
                self.shared.starts.fetch_add(1, Ordering::Relaxed);
                match script.ready {
                    Some(Duration::ZERO) => copy.ready = true,
                    Some(after) => plan(after, copy.attempt, Event::Ready),
                    None => {}
                }
                if let Some(after) = script.lasts(copy.attempt) {
                    plan(after, copy.attempt, Event::Crash);
                }
            }
            (Event::Ready, Phase::Running, true) => copy.ready = true,
            (Event::Crash, Phase::Running, true) => {
                let ran_for = script.lasts(copy.attempt).unwrap_or_default();
                let exit =
                    Exit { code: Some(script.code), signal: None, oom: None, at: self.env.clock.now(), ran_for: Span::from(ran_for) };
                (copy.phase, copy.ready, copy.exit) = (Phase::Backoff, false, Some(Box::new(exit)));
                let pause = BACKOFF_FIRST.saturating_mul(1 << copy.attempt.min(10)).min(BACKOFF_MAX);
                copy.attempt += 1;
                plan(pause, copy.attempt, Event::Again);
            }
            (Event::Again, Phase::Backoff, true) => {
                copy.phase = Phase::Starting;
                plan(script.start, copy.attempt, Event::Up);
            }
            (Event::Ended, Phase::Stopping, false) => copy.phase = Phase::Stopped,
            _ => return, // overtaken
        }
        copy.seq += 1;
        inner.changed.insert(id);
    }

    /// Makes what is held into what is wanted.
    fn take(&self, inner: &mut Inner, wanted: Vec<DesiredAlloc>) {
        let now = self.env.clock.monotonic();
        let ids: BTreeSet<AllocId> = wanted.iter().map(|a| a.id).collect();
        let dropped: Vec<AllocId> = inner.copies.keys().filter(|id| !ids.contains(id)).copied().collect();
        for id in dropped {
            inner.copies.remove(&id);
            inner.changed.remove(&id);
            inner.gone.push(id);
            inner.gone_untold.push(id);
        }
        for gone in [&mut inner.gone, &mut inner.gone_untold] {
            let surplus = gone.len().saturating_sub(GONE_MAX);
            gone.drain(..surplus);
        }
        for alloc in wanted {
            let copy = inner.copies.entry(alloc.id).or_insert_with(|| {
                let known = self.shared.known(&alloc);
                let (phase, seq) = (Phase::Pending, self.epoch);
                Copy { known, index: alloc.index, run: alloc.run, ready: false, phase, attempt: 0, seq, started_at: None, exit: None }
            });
            let is_new = copy.phase == Phase::Pending;
            if !is_new && copy.run == alloc.run {
                continue;
            }
            copy.run = alloc.run;
            copy.seq += 1;
            inner.changed.insert(alloc.id);
            let script = &copy.known.script;
            match (is_new, alloc.run) {
                (true, false) => copy.phase = Phase::Stopped, // never started here
                (true, true) if script.fail => copy.phase = Phase::Failed,
                (true, true) => {
                    copy.phase = Phase::Starting;
                    inner.due.push(Reverse((now + script.start, alloc.id, 0, Event::Up)));
                }
                (false, _) if copy.phase.is_terminal() => {}
                (false, true) => {} // a copy told to stop is never told to run again
                (false, false) => {
                    (copy.phase, copy.ready) = (Phase::Stopping, false);
                    inner.due.push(Reverse((now + script.stop.unwrap_or(GRACE), alloc.id, copy.attempt, Event::Ended)));
                }
            }
        }
        self.play(inner);
    }

    fn status(&self, id: AllocId, copy: &Copy) -> Blob {
        let reason = match copy.phase {
            Phase::Failed => Some(Reason::StartFailed { step: "play the script".into(), error: "it says so".into() }),
            Phase::Backoff => copy.exit.as_ref().map(|exit| Reason::Exited { exit: (**exit).clone() }),
            Phase::Running if !copy.ready => {
                let last = "the script says not yet".into();
                Some(Reason::NotReady { probe: "script".into(), last, listening: vec![], port: None })
            }
            _ => None,
        };
        let mut status = AllocStatus::unknown(id);
        status.seq = copy.seq;
        status.phase = copy.phase;
        status.ready = copy.ready;
        status.ready_since = if copy.ready { copy.started_at } else { None };
        status.reason = reason;
        status.restarts = copy.attempt;
        status.started_at = copy.started_at;
        status.last_exit = copy.exit.as_deref().cloned();
        Blob::of(&status)
    }

    fn changes(&self, inner: &mut Inner) -> Option<Report> {
        if inner.changed.is_empty() && inner.gone_untold.is_empty() {
            return None;
        }
        let changed = std::mem::take(&mut inner.changed);
        let statuses = changed.into_iter().filter_map(|id| inner.copies.get(&id).map(|copy| self.status(id, copy))).collect();
        Some(Report { generation: inner.generation, statuses, gone: std::mem::take(&mut inner.gone_untold) })
    }
}

impl Workloads for Host {
    fn facts(&self) -> NodeFacts {
        self.facts.clone()
    }
    fn generation(&self) -> u64 {
        self.lock().generation
    }
    fn accept(&self, desired: Desired) -> Boxed<'_, Result<(), OlderGeneration>> {
        let mut inner = self.lock();
        let Desired { generation, allocs } = desired;
        let result = if generation < inner.generation {
            Err(OlderGeneration { offered: generation, held: inner.generation })
        } else {
            inner.generation = generation;
            self.shared.sets.fetch_add(1, Ordering::Relaxed);
            self.shared.set_copies.fetch_add(allocs.len() as u64, Ordering::Relaxed);
            self.take(&mut inner, allocs);
            Ok(())
        };
        drop(inner);
        self.wake.notify_one();
        Box::pin(std::future::ready(result))
    }
    fn full_report(&self) -> Report {
        let mut inner = self.lock();
        self.play(&mut inner);
        inner.changed.clear();
        inner.gone_untold.clear();
        let statuses = inner.copies.iter().map(|(id, copy)| self.status(*id, copy)).collect();
        Report { generation: inner.generation, statuses, gone: inner.gone.clone() }
    }
    fn next_report(&self) -> Boxed<'_, Report> {
        Box::pin(async move {
            loop {
                let woken = self.wake.notified();
                if self.frozen.load(Ordering::Relaxed) {
                    woken.await;
                    continue;
                }
                let next = {
                    let mut inner = self.lock();
                    let next = self.play(&mut inner);
                    if let Some(report) = self.changes(&mut inner) {
                        return report;
                    }
                    next
                };
                match next {
                    None => woken.await,
                    Some(at) => {
                        let wait = at.saturating_sub(self.env.clock.monotonic());
                        tokio::select! {
                            () = woken => {}
                            () = self.env.clock.sleep(wait) => {}
                        }
                    }
                }
            }
        })
    }
    fn logs(&self, request: LogRequest, _out: mpsc::Sender<LogChunk>) -> Boxed<'_, Result<(), LogError>> {
        Box::pin(std::future::ready(Err(LogError::NoSuchAlloc(request.alloc))))
    }
}
