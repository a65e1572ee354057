//! The thread that samples: every second it reads the host and every watched copy, and keeps the history.
//!
//! Reading some files of `/proc` and of cgroups takes microseconds and never waits for a disk, but the history does; on
//! a thread of its own nothing else notices. Everything is asked of it by message; it answers queries between samples.

use std::collections::BTreeMap;
use std::io;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use optimus_common::env::Clock;
use optimus_common::usage::Point;
use optimus_common::{AllocId, Figures};
use tokio::sync::oneshot;

use super::group::{GroupFiles, GroupSampler};
use super::history::{History, HistoryConfig, Query, QueryError, Subject};
use super::host::HostSampler;
use super::rates::{self, Reading};

/// Time between samples unless the operator says otherwise.
pub const SAMPLE_EVERY: Duration = Duration::from_secs(1);
/// Samples between two saves of the history.
const SAVE_EVERY: u64 = 60;
/// Samples between two counts of open files, which cost a call a process.
const FDS_EVERY: u64 = 10;
/// Orders that wait; beyond, whoever asks is told that the collector is behind.
const ORDERS_MAX: usize = 1024;

/// Answer of a query: for each metric asked for, a point a step.
pub type Answer = Result<Vec<Vec<Option<Point>>>, QueryError>;

enum Order {
    Watch(AllocId, Box<GroupFiles>),
    Forget(AllocId),
    Query(Query, oneshot::Sender<Answer>),
    End,
}

/// The collector is gone or behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("metrics are not to be had now: the collector is behind or has ended")]
pub struct Unavailable;

/// The newest reading of each subject.
type Latest = BTreeMap<Subject, Reading>;

/// Handle of the thread. Dropping it ends the thread after its current sample.
pub struct Collector {
    orders: SyncSender<Order>,
    latest: Arc<Mutex<Latest>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Collector {
    /// Starts sampling. The directory of the history's parent counts as the host's disk.
    pub fn start(config: HistoryConfig, every: Duration, clock: Arc<dyn Clock>) -> io::Result<Collector> {
        let (orders, inbox) = mpsc::sync_channel(ORDERS_MAX);
        let latest = Arc::new(Mutex::new(Latest::new()));
        let host = HostSampler::open(config.dir.parent().unwrap_or(&config.dir));
        let history = History::open(config, clock.now())?;
        let state = State {
            every,
            clock,
            host,
            history,
            copies: BTreeMap::new(),
            before: None,
            latest: Arc::clone(&latest),
            buffer: Vec::new(),
            samples: 0,
        };
        let thread = thread::Builder::new().name("metrics".into()).spawn(move || state.run(&inbox))?;
        Ok(Collector { orders, latest, thread: Mutex::new(Some(thread)) })
    }

    /// From now on the copy is sampled, from the group of its newest run.
    pub fn watch(&self, alloc: AllocId, files: GroupFiles) {
        self.order(Order::Watch(alloc, Box::new(files)));
    }

    /// It has ended. A copy whose group is gone is forgotten without being told.
    pub fn forget(&self, alloc: AllocId) {
        self.order(Order::Forget(alloc));
    }

    /// Newest readings of all subjects.
    pub fn latest(&self) -> Vec<(Subject, Reading)> {
        lock(&self.latest).iter().map(|(subject, reading)| (*subject, *reading)).collect()
    }

    pub async fn query(&self, query: Query) -> Result<Answer, Unavailable> {
        let (answer, asked) = oneshot::channel();
        if !self.order(Order::Query(query, answer)) {
            return Err(Unavailable);
        }
        asked.await.map_err(|_| Unavailable)
    }

    fn order(&self, order: Order) -> bool {
        match self.orders.try_send(order) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => {
                tracing::warn!("the metrics collector is behind: an order to it is dropped");
                false
            }
            Err(TrySendError::Disconnected(_)) => false,
        }
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        let _ = self.orders.send(Order::End); // its thread may have ended by itself
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|t| t.join().is_err()) {
            tracing::error!("the metrics collector panicked");
        }
    }
}

struct State {
    every: Duration,
    clock: Arc<dyn Clock>,
    host: HostSampler,
    history: History,
    copies: BTreeMap<AllocId, Copy>,
    /// The host's reading before this one.
    before: Option<Reading>,
    latest: Arc<Mutex<Latest>>,
    buffer: Vec<u8>,
    samples: u64,
}

struct Copy {
    sampler: GroupSampler,
    before: Option<Reading>,
}

impl State {
    fn run(mut self, inbox: &Receiver<Order>) {
        let mut due = self.clock.monotonic();
        loop {
            let now = self.clock.monotonic();
            match inbox.recv_timeout(due.saturating_sub(now)) {
                Ok(Order::Watch(alloc, files)) => {
                    self.copies.insert(alloc, Copy { sampler: GroupSampler::open(&files), before: None });
                }
                Ok(Order::Forget(alloc)) => self.forget(alloc),
                Ok(Order::Query(query, answer)) => {
                    let _ = answer.send(self.history.query(&query)); // whoever asked may have gone
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.sample();
                    // A sample that came late (the host slept) is not made up for.
                    due = (due + self.every).max(self.clock.monotonic());
                }
                Ok(Order::End) | Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        self.history.save(self.clock.now());
    }

    fn sample(&mut self) {
        let (at, mono) = (self.clock.now(), self.clock.monotonic());
        let count_files = self.samples.is_multiple_of(FDS_EVERY);
        let reading = Reading { at, mono, figures: self.host.read(&mut self.buffer) };
        self.history.append(Subject::Host, rates::row(self.before.as_ref(), &reading));
        self.before = Some(reading);
        let mut newest = vec![(Subject::Host, reading)];
        let mut gone = Vec::new();
        for (id, copy) in &mut self.copies {
            let read = match copy.sampler.read(&mut self.buffer) {
                Ok(read) => read,
                Err(_) => {
                    gone.push(*id); // its group has been removed
                    continue;
                }
            };
            let fds = if count_files { copy.sampler.fds(&mut self.buffer) } else { copy.before.and_then(|b| b.figures.fds) };
            let reading = Reading { at, mono, figures: Figures { fds, ..read } };
            self.history.append(Subject::Alloc(*id), rates::row(copy.before.as_ref(), &reading));
            copy.before = Some(reading);
            newest.push((Subject::Alloc(*id), reading));
        }
        lock(&self.latest).extend(newest);
        for id in gone {
            self.forget(id);
        }
        self.samples += 1;
        if self.samples.is_multiple_of(SAVE_EVERY) {
            self.history.save(at);
        }
    }

    fn forget(&mut self, alloc: AllocId) {
        self.copies.remove(&alloc);
        lock(&self.latest).remove(&Subject::Alloc(alloc));
        self.history.close(Subject::Alloc(alloc));
    }
}

fn lock(latest: &Mutex<Latest>) -> MutexGuard<'_, Latest> {
    latest.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use optimus_common::{Bytes, Span};

    use super::super::Metric;
    use super::*;

    fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let begun = std::time::Instant::now();
        loop {
            if let Some(found) = look() {
                return found;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "{what} did not come");
            thread::sleep(Duration::from_millis(20));
        }
    }

    #[tokio::test]
    async fn a_copy_is_sampled_until_its_group_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let cpu = dir.path().join("cpuacct.usage");
        std::fs::write(&cpu, "1000000\n").unwrap();
        let config = HistoryConfig { dir: dir.path().join("metrics"), keep: Span::secs(3600), bytes_max: Bytes::mib(16) };
        let (clock, every) = (crate::testing::test_env().clock, Duration::from_millis(60));
        let from = clock.now();
        let collector = Collector::start(config, every, clock).unwrap();
        let alloc = AllocId(uuid::Uuid::from_u128(9));
        collector.watch(alloc, GroupFiles { cpuacct: Some(cpu.clone()), ..GroupFiles::default() });
        let has = |subject| move |c: &Collector| c.latest().into_iter().find(|(s, _)| *s == subject).map(|(_, r)| r);
        let first = wait_for("a reading", || has(Subject::Alloc(alloc))(&collector));
        assert_eq!(first.figures.cpu_usec, Some(1000));
        std::fs::write(&cpu, "2000000\n").unwrap();
        wait_for("the next", || has(Subject::Alloc(alloc))(&collector).filter(|r| r.figures.cpu_usec == Some(2000)));
        assert!(has(Subject::Host)(&collector).is_some());
        std::fs::write(&cpu, "no number").unwrap();
        wait_for("its end", || has(Subject::Alloc(alloc))(&collector).is_none().then_some(()));
        let query =
            Query { subject: Subject::Alloc(alloc), metrics: vec![Metric::Cpu], from, to: from + Span::secs(600), step: Span::secs(60) };
        let answer = collector.query(query).await.unwrap().unwrap();
        assert!(answer[0].iter().any(Option::is_some), "what it used is still known");
    }
}
