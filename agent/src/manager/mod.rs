//! Holds the allocations of this node: takes desired sets, owns a worker for each allocation, answers for them.
//!
//! `accept` writes the set to the ledger, then reconciles; a worker that ends wakes the reconcile loop. Nothing
//! here waits for a server: after a start the ledger's set is worked on as if it had just come.

pub mod reconcile;
pub mod reports;
mod restore;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use optimus_common::AllocId;
use optimus_common::protocol::{AllocStatus, Desired, DesiredAlloc, LogChunk, LogRequest, NodeFacts, Phase, Report};
use optimus_common::reason::Reason;
use optimus_common::spec;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use self::reconcile::{HeldState, Step};
use crate::alloc::worker::{Context, Worker, alloc_dir};
use crate::driver::{Driver, Run};
use crate::ledger::{AllocRecord, Held, Sealer};
use crate::logs::{self, retention};
use crate::metrics::collector::{Answer, Collector, Unavailable};
use crate::metrics::history::{Query, Subject};
use crate::metrics::rates::Reading;
use crate::workloads::{Boxed, LogError, OlderGeneration, Workloads};

/// Name of the sealed copy of a desired allocation in its directory; with it a lost ledger can be rebuilt.
pub(crate) const ALLOC_FILE: &str = "alloc";
/// The reconcile loop also runs without a signal this often: a lost one costs only time.
const RECONCILE_EVERY: Duration = Duration::from_secs(30);

/// An allocation this node holds.
struct Handle {
    alloc: Arc<DesiredAlloc>,
    /// What is wanted of it now.
    update: watch::Sender<Arc<DesiredAlloc>>,
    stop: CancellationToken,
    ended: Arc<AtomicBool>,
}

#[derive(Default)]
struct Wanted {
    generation: u64,
    allocs: BTreeMap<AllocId, Arc<DesiredAlloc>>,
}

#[derive(Default)]
struct Inner {
    wanted: Wanted,
    held: BTreeMap<AllocId, Handle>,
    /// Runs found at the start of which nothing else is known; judged when the first set comes.
    orphans: BTreeMap<AllocId, Arc<dyn Run>>,
    /// Records of an earlier agent, taken by the worker of each.
    records: BTreeMap<AllocId, AllocRecord>,
}

/// Runs the workloads of this node. One for each data directory.
pub struct Manager {
    ctx: Arc<Context>,
    /// By the name specs use.
    drivers: BTreeMap<&'static str, Arc<dyn Driver>>,
    sealer: Sealer,
    facts: watch::Sender<NodeFacts>,
    /// What was last told of them.
    facts_told: Mutex<Option<NodeFacts>>,
    inner: Mutex<Inner>,
    /// Sets are taken one after the other, in the order they came.
    accepting: tokio::sync::Mutex<()>,
}

impl Manager {
    /// Takes up what the ledger and the run directories say, and starts to work.
    pub async fn start(
        ctx: Arc<Context>,
        drivers: BTreeMap<&'static str, Arc<dyn Driver>>,
        sealer: Sealer,
        facts: NodeFacts,
        held: Held,
    ) -> Arc<Self> {
        let Held { generation, epoch: _, desired, records, rebuilt } = held;
        let allocs = desired.into_iter().map(|(id, alloc)| (id, Arc::new(alloc))).collect();
        let inner = Inner { wanted: Wanted { generation, allocs }, records, ..Inner::default() };
        ctx.reports.set_generation(generation);
        let manager = Arc::new(Manager {
            ctx,
            drivers,
            sealer,
            facts: watch::Sender::new(facts),
            facts_told: Mutex::default(),
            inner: Mutex::new(inner),
            accepting: tokio::sync::Mutex::default(),
        });
        manager.restore(rebuilt).await;
        let keep = {
            let inner = manager.lock();
            inner.wanted.allocs.keys().chain(inner.held.keys()).chain(inner.orphans.keys()).copied().collect::<BTreeSet<_>>()
        };
        // Before anything is started, so that nothing new is taken for a leak.
        for driver in manager.drivers.values() {
            driver.sweep(keep.clone()).await;
        }
        manager.reconcile();
        let looping = Arc::clone(&manager);
        manager.ctx.spawn("reconcile", async move { looping.reconcile_loop().await });
        manager
    }

    /// Something about the node is otherwise than before.
    pub fn set_facts(&self, facts: NodeFacts) {
        self.facts.send_if_modified(|now| {
            let changed = *now != facts;
            *now = facts;
            changed
        });
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn reconcile_loop(&self) {
        loop {
            tokio::select! {
                () = self.ctx.worker_ended.notified() => {}
                () = self.ctx.env.clock.sleep(RECONCILE_EVERY) => {}
                () = self.ctx.detach.cancelled() => return,
                () = self.ctx.leave.cancelled() => return,
            }
            self.reconcile();
        }
    }

    /// One pass from whole states. Quick: everything that takes time is a worker's.
    fn reconcile(&self) {
        if self.ctx.detach.is_cancelled() || self.ctx.leave.is_cancelled() {
            return; // the agent ends: nothing new is begun
        }
        let mut inner = self.lock();
        let desired = inner.wanted.allocs.iter().map(|(&id, a)| (id, a.run)).collect();
        let held =
            inner.held.iter().map(|(&id, h)| (id, HeldState { stopping: h.stop.is_cancelled(), ended: h.ended.load(Ordering::Acquire) }));
        let held = held.collect();
        let mut forgotten = false;
        for step in reconcile::diff(&desired, &held) {
            match step {
                Step::Take { alloc, run } => {
                    let Some(alloc) = inner.wanted.allocs.get(&alloc).cloned() else { continue };
                    self.take(&mut inner, alloc, run);
                }
                Step::Stop(id) => {
                    if let Some(handle) = inner.held.get(&id) {
                        tracing::info!(alloc = %id, workload = %handle.alloc.key, "stopping it");
                        handle.stop.cancel();
                    }
                }
                Step::Forget(id) => {
                    inner.held.remove(&id);
                    self.ctx.ledger.record(id, None);
                    if let Err(error) = fs::remove_file(alloc_dir(&self.ctx.allocs_dir, id).join(ALLOC_FILE)) {
                        tracing::debug!(alloc = %id, %error, "it had no file of its own");
                    }
                    self.ctx.reports.forget(id);
                    forgotten = true;
                }
            }
        }
        let keep: BTreeSet<AllocId> = inner.held.keys().copied().collect();
        drop(inner);
        if forgotten {
            let dir = self.ctx.allocs_dir.clone();
            self.ctx.spawn("retention", async move {
                let swept = tokio::task::spawn_blocking(move || retention::sweep_ended(&dir, &keep)).await;
                if let Ok(Err(error)) = swept {
                    tracing::warn!(%error, "failed to delete the output of ended allocations");
                }
            });
        }
    }

    /// Begins to hold an allocation.
    fn take(&self, inner: &mut Inner, alloc: Arc<DesiredAlloc>, run: bool) {
        let (stop, ended) = (CancellationToken::new(), Arc::new(AtomicBool::new(false)));
        if !run {
            stop.cancel();
        }
        let (update, updates) = watch::channel(Arc::clone(&alloc));
        let handle = Handle { alloc: Arc::clone(&alloc), update, stop: stop.clone(), ended: Arc::clone(&ended) };
        inner.held.insert(alloc.id, handle);
        inner.orphans.remove(&alloc.id); // its worker finds the run itself
        let record = inner.records.remove(&alloc.id);
        let refusal = match alloc.spec() {
            Ok(spec) => match self.drivers.get(driver_name(&spec.driver)) {
                Some(driver) => {
                    self.keep_copy(&alloc, false);
                    let worker = Worker::new(Arc::clone(&self.ctx), Arc::clone(driver), alloc, spec, stop, updates, record);
                    let ctx = Arc::clone(&self.ctx);
                    return self.ctx.spawn("alloc", async move {
                        worker.run().await;
                        ended.store(!ctx.detach.is_cancelled(), Ordering::Release);
                        ctx.worker_ended.notify_one();
                    });
                }
                None => Reason::StartFailed {
                    step: "find a driver".into(),
                    error: format!("this node has no {} driver", driver_name(&spec.driver)),
                },
            },
            Err(error) => Reason::StartFailed { step: "read the spec".into(), error: error.to_string() },
        };
        tracing::error!(alloc = %alloc.id, workload = %alloc.key, reason = %refusal, "cannot hold it");
        ended.store(true, Ordering::Release);
        let phase = if run { Phase::Failed } else { Phase::Stopped };
        let mut status = AllocStatus::unknown(alloc.id);
        (status.phase, status.reason) = (phase, Some(refusal));
        self.ctx.reports.publish(&mut status);
    }

    /// Writes the sealed copy a lost ledger is rebuilt from. Not flushed: it is a second line.
    fn keep_copy(&self, alloc: &DesiredAlloc, anew: bool) {
        let dir = alloc_dir(&self.ctx.allocs_dir, alloc.id);
        let path = dir.join(ALLOC_FILE);
        if !anew && path.exists() {
            return;
        }
        let bytes = self.sealer.seal(crate::ledger::KIND_DESIRED, alloc.id, alloc);
        let written = make_dir(&dir).and_then(|()| fs::write(&path, bytes));
        if let Err(error) = written {
            tracing::warn!(alloc = %alloc.id, path = %path.display(), %error, "failed to keep a copy of it");
        }
    }

    /// Runs nobody wants, once a set says so.
    fn judge_orphans(&self, orphans: BTreeMap<AllocId, Arc<dyn Run>>) {
        for (id, run) in orphans {
            tracing::warn!(alloc = %id, pid = run.pid(), "killing a run that no set names");
            self.ctx.spawn("orphan", async move {
                if let Err(error) = run.kill().await {
                    tracing::error!(alloc = %id, error = %crate::ledger::chain(&error), "failed to kill it");
                }
            });
        }
    }

    async fn take_set(&self, set: Desired) -> Result<(), OlderGeneration> {
        let _one_at_a_time = self.accepting.lock().await;
        let Desired { generation, allocs } = set;
        let (put, remove, allocs) = {
            let inner = self.lock();
            let held = inner.wanted.generation;
            if generation < held {
                return Err(OlderGeneration { offered: generation, held });
            }
            let mut next = BTreeMap::new();
            let mut put = Vec::new();
            for alloc in allocs {
                let before = inner.wanted.allocs.get(&alloc.id);
                if before.is_none_or(|b| **b != alloc) {
                    if before.is_some_and(|b| b.ports != alloc.ports) {
                        tracing::error!(alloc = %alloc.id, workload = %alloc.key, "its ports changed under the same id: what runs is kept as it was started");
                    }
                    put.push(alloc.clone());
                }
                next.insert(alloc.id, Arc::new(alloc));
            }
            let remove: Vec<AllocId> = inner.wanted.allocs.keys().filter(|id| !next.contains_key(id)).copied().collect();
            (put, remove, next)
        };
        // If the disk refuses, that has been logged; the workloads are run all the same.
        self.ctx.ledger.accept(generation, put, remove).await;
        let orphans = {
            let mut inner = self.lock();
            let mut orphans = std::mem::take(&mut inner.orphans);
            orphans.retain(|id, _| !allocs.contains_key(id));
            for (id, wanted) in &allocs {
                if let Some(held) = inner.held.get_mut(id).filter(|h| h.alloc.spec != wanted.spec || h.alloc.release != wanted.release) {
                    held.alloc = Arc::clone(wanted);
                    held.update.send_replace(Arc::clone(wanted));
                    self.keep_copy(wanted, true);
                }
            }
            inner.wanted = Wanted { generation, allocs };
            orphans
        };
        self.ctx.reports.set_generation(generation);
        self.judge_orphans(orphans);
        self.reconcile();
        Ok(())
    }

    async fn read_logs(&self, request: LogRequest, out: mpsc::Sender<LogChunk>) -> Result<(), LogError> {
        let LogRequest { alloc, since, tail, follow } = request;
        let dir = alloc_dir(&self.ctx.allocs_dir, alloc);
        if !self.lock().held.contains_key(&alloc) && !dir.is_dir() {
            return Err(LogError::NoSuchAlloc(alloc));
        }
        let clock = Arc::clone(&self.ctx.env.clock);
        tokio::select! {
            read = logs::stream(dir, since, tail, follow, &*clock, out) => read.map_err(LogError::Read),
            () = self.ctx.detach.cancelled() => Ok(()),
        }
    }
}

impl Workloads for Manager {
    fn facts(&self) -> NodeFacts {
        let facts = self.facts.borrow().clone();
        *self.facts_told.lock().unwrap_or_else(PoisonError::into_inner) = Some(facts.clone());
        facts
    }
    fn facts_changed(&self) -> Boxed<'_, ()> {
        let mut facts = self.facts.subscribe();
        let told = || self.facts_told.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Box::pin(async move {
            // An error cannot be: the sender is in `self`.
            let _ = facts.wait_for(|now| told().is_none_or(|told| told != *now)).await;
        })
    }
    fn generation(&self) -> u64 {
        self.lock().wanted.generation
    }
    fn accept(&self, desired: Desired) -> Boxed<'_, Result<(), OlderGeneration>> {
        Box::pin(self.take_set(desired))
    }
    fn full_report(&self) -> Report {
        self.ctx.reports.full()
    }
    fn next_report(&self) -> Boxed<'_, Report> {
        Box::pin(self.ctx.reports.next())
    }
    fn readings(&self) -> Vec<(Subject, Reading)> {
        self.ctx.metrics.as_ref().map(Collector::latest).unwrap_or_default()
    }
    fn history(&self, query: Query) -> Boxed<'_, Result<Answer, Unavailable>> {
        Box::pin(async move { self.ctx.metrics.as_ref().ok_or(Unavailable)?.query(query).await })
    }
    fn logs(&self, request: LogRequest, out: mpsc::Sender<LogChunk>) -> Boxed<'_, Result<(), LogError>> {
        Box::pin(self.read_logs(request, out))
    }
}

fn driver_name(driver: &spec::Driver) -> &'static str {
    match driver {
        spec::Driver::Process => "process",
        spec::Driver::Container { .. } => "container",
    }
}

/// A directory a workload's user may pass through but not list.
pub(crate) fn make_dir(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    match fs::DirBuilder::new().mode(0o711).create(path) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

#[cfg(test)]
#[path = "manager_tests.rs"]
mod tests;
