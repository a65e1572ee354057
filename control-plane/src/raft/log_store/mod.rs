//! The durable Raft log and vote on redb, with a [journal] before it.
//!
//! ```text
//! RaftCore --save_vote/append--> queue --> writer: one record in the journal, one flush --> answers
//! RaftCore --truncate/purge----> queue --> writer: redb, with all that only the journal holds, one flush --> answers
//! replication, apply <--read-- the end of the log in memory, before it redb
//! ```
//! Guards of ours on top of openraft 0.9.25, each found necessary by simulation:
//! - **G1**: a server's own committed vote is read back as uncommitted at start, so that it stands for election instead
//!   of resuming as leader with a commit index it no longer knows.
//! - **G2**: [`purge`](LogStore::purge) waits for a durable snapshot that covers what is purged; a crash in between would
//!   leave neither the entries nor the state they led to.

mod compaction;
mod journal;
mod tables;
mod tail;
mod witness;
mod writer;

use std::fmt::Debug;
use std::ops::{Bound, RangeBounds};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use openraft::storage::{LogFlushed, LogState, RaftLogStorage};
use openraft::{AsyncRuntime, ErrorSubject, ErrorVerb, OptionalSend, RaftLogReader, StorageIOError};
use optimus_common::disk::Disk;
use optimus_common::planted::planted;
use rand_core_06::RngCore;
use redb::Database;
use tokio::sync::{mpsc, oneshot, watch};

use self::tail::Tail;
use self::writer::{Done, Op, Writer};
use super::IoMode;
use super::clock::Latency;
use super::error::{StoreError, chain, invalid};
use super::fatal::Fatal;
use super::network::Early;
use super::runtime::{Mark, Runtime, Stored, stored, watched};
use super::types::{Entry, LogId, StorageError, Types, Vote};

pub(crate) use self::tables::Offline;

/// Most bytes of entries read for one message to a peer; at least one entry is always read.
const READ_BYTES: usize = 2 << 20;

/// Index up to which snapshots are durable; [`LogStore::purge`] waits on it.
pub(crate) type SnapshotGate = watch::Receiver<Option<u64>>;

/// What readers see: always what is durable, never what is on its way.
#[derive(Debug, Default)]
pub(crate) struct View {
    pub vote: Option<Vote>,
    pub purged: Option<LogId>,
    pub last: Option<LogId>,
    pub tail: Tail,
}

pub(crate) struct Shared {
    /// Taken out at the end, so that redb closes the file cleanly.
    db: RwLock<Option<Database>>,
    view: Mutex<View>,
    /// Newest commit mark not written yet. It only saves work at the next start, and rides with the next flush.
    committed: Mutex<Option<LogId>>,
    fatal: Fatal,
    /// How long the flushes take; election timers follow it.
    flushes: Arc<Latency>,
    /// Whether an append must directly follow the last entry. Always, except in openraft's suite, whose cases append
    /// out of order.
    strict: AtomicBool,
    /// Operations openraft waits for.
    busy: AtomicUsize,
}

/// Counts one operation as long as it lives.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn committed(&self) -> MutexGuard<'_, Option<LogId>> {
        self.committed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        let db = self.db.write().unwrap_or_else(PoisonError::into_inner).take();
        // redb writes its allocator state when it closes, which spares the next start a repair. On a failing disk that
        // fails too, and the next start repairs.
        let closed = tables::without_panic(|| match db.map(Database::close) {
            Some(Err(e)) => Err(StoreError::redb("close", tables::FILE, e)),
            _ => Ok(()),
        });
        if let Err(e) = closed {
            tracing::warn!(error = %chain(&e), "failed to close the raft log cleanly");
        }
    }

    fn read(&self, range: impl RangeBounds<u64>, max_bytes: usize) -> Result<Vec<Entry>, StoreError> {
        let start = match range.start_bound() {
            Bound::Included(i) => *i,
            Bound::Excluded(i) => i.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(i) => i.saturating_add(1),
            Bound::Excluded(i) => *i,
            Bound::Unbounded => u64::MAX,
        };
        let (range, after) = {
            let view = self.view();
            let start = start.max(view.purged.map_or(0, |p| p.index + 1));
            let end = end.min(view.last.map_or(0, |l| l.index + 1));
            if start >= end {
                return Ok(Vec::new());
            }
            match view.tail.first() {
                Some(first) if first <= start => return Ok(view.tail.read(start..=end - 1, max_bytes)),
                // What redb does not hold is in the tail. A bounded read may end before it.
                Some(first) if first < end => {
                    let after = if max_bytes == usize::MAX { view.tail.read(first..=end - 1, max_bytes) } else { Vec::new() };
                    (start..=first - 1, after)
                }
                _ => (start..=end - 1, Vec::new()),
            }
        };
        let db = self.db.read().unwrap_or_else(PoisonError::into_inner);
        let db = db.as_ref().ok_or_else(|| StoreError::Stopped("the store is closed".to_owned()))?;
        let mut entries = tables::without_panic(|| tables::read(db, range, max_bytes)).inspect_err(|e| self.fatal.raise(chain(e)))?;
        entries.extend(after);
        Ok(entries)
    }
}

/// Reads the log; cheap to clone.
#[derive(Clone)]
pub(crate) struct LogReader(Arc<Shared>);

impl LogReader {
    /// Entries of `from..=upto` that are still there, in order, about `max_bytes` of them and at least one.
    pub(crate) fn read(&self, from: u64, upto: u64, max_bytes: usize) -> Result<Vec<Entry>, StoreError> {
        self.0.read(from..=upto, max_bytes)
    }

    /// The last durable entry, purged or not.
    pub(crate) fn last(&self) -> Option<LogId> {
        self.0.view().last
    }
}

/// openraft's log store. There is one per node; the readers are clones of [`LogReader`].
pub(crate) struct LogStore {
    shared: Arc<Shared>,
    queue: mpsc::Sender<Op>,
    gate: SnapshotGate,
    committed: Option<LogId>,
    node: u64,
    /// Told of new entries the moment they are being written.
    early: Option<Arc<Early>>,
}

/// Ends the writer.
pub(crate) struct WriterHandle {
    queue: mpsc::Sender<Op>,
    thread: Option<std::thread::JoinHandle<()>>,
    task: Option<tokio::task::JoinHandle<()>>,
}

impl WriterHandle {
    /// Lets the writer finish what is queued, close the file and end; waits for it.
    pub(crate) async fn stop(mut self) {
        let (done, answer) = oneshot::channel();
        if self.queue.send(Op::Stop(done)).await.is_ok() {
            // An error means the writer ended on its own, after the fatal signal.
            let _ = answer.await;
        }
        if let Some(thread) = self.thread.take() {
            let joined = tokio::task::spawn_blocking(move || thread.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                tracing::error!("the raft log writer panicked");
            }
        }
        if let Some(task) = self.task.take() {
            let _ = task.await;
        }
    }
}

impl LogStore {
    /// Opens the store of `node`, checks it, and starts its writer.
    ///
    /// # Errors
    /// Damage anywhere in the file, a disk that refuses, or a store that belongs to another server.
    pub(crate) async fn open(
        disk: Arc<dyn Disk>,
        node: u64,
        gate: SnapshotGate,
        fatal: Fatal,
        io: IoMode,
    ) -> Result<(Self, WriterHandle), StoreError> {
        Self::open_with(disk, node, gate, fatal, io, None).await
    }

    /// [`open`](Self::open), compacting after every purge in steps of `forced` bytes, whatever the size: for tests.
    async fn open_with(
        disk: Arc<dyn Disk>,
        node: u64,
        gate: SnapshotGate,
        fatal: Fatal,
        io: IoMode,
        forced: Option<usize>,
    ) -> Result<(Self, WriterHandle), StoreError> {
        let opening = disk.clone();
        let (bytes, salt) = match io {
            IoMode::Threads => (journal::BYTES, Runtime::thread_rng().next_u64()),
            IoMode::Inline => (journal::BYTES_INLINE, Runtime::thread_rng().next_u64()),
        };
        let (db, opened, journal) = io.run(move || tables::open(&*opening, node, bytes, salt)).await?;
        let view = View { vote: opened.vote, purged: opened.purged, last: opened.last, tail: Tail::default() };
        let shared = Arc::new(Shared {
            db: RwLock::new(Some(db)),
            view: Mutex::new(view),
            committed: Mutex::default(),
            fatal,
            flushes: Arc::default(),
            strict: AtomicBool::new(true),
            busy: AtomicUsize::new(0),
        });
        let (queue, waiting) = mpsc::channel(writer::QUEUE);
        let writer = Writer::new(shared.clone(), disk, &opened, journal, forced);
        let mut handle = WriterHandle { queue: queue.clone(), thread: None, task: None };
        match io {
            IoMode::Threads => {
                let thread = std::thread::Builder::new().name("raft-log".to_owned()).spawn(move || writer.run_blocking(waiting));
                handle.thread = Some(thread.map_err(|e| StoreError::io("start the writer thread of", tables::FILE, e))?);
            }
            IoMode::Inline => handle.task = Some(Runtime::spawn(writer.run_inline(waiting))),
        }
        Ok((Self { shared, queue, gate, committed: opened.committed, node, early: None }, handle))
    }

    #[cfg(test)]
    pub(crate) fn accept_any_order(&self) {
        self.shared.strict.store(false, Ordering::Relaxed);
    }

    /// Tells whether openraft waits for this store at the moment.
    pub(crate) fn busy(&self) -> impl Fn() -> bool + Send + Sync + 'static {
        let shared = Arc::downgrade(&self.shared);
        move || shared.upgrade().is_some_and(|s| s.busy.load(Ordering::Relaxed) > 0)
    }

    /// How long its flushes take.
    pub(crate) fn flushes(&self) -> Arc<Latency> {
        self.shared.flushes.clone()
    }

    /// Tells whoever watches what the file held.
    pub(crate) fn tell_opened(&self, snapshot: Option<Mark>) {
        if watched() {
            let (vote, purged) = {
                let view = self.shared.view();
                (view.vote, view.purged)
            };
            // A failure here raises the fatal signal, and the start fails of itself.
            let entries = self.shared.read(.., usize::MAX).unwrap_or_default();
            stored(|| Stored::Opened {
                vote: vote.map(|v| (v.leader_id.term, v.leader_id.node_id, v.committed)),
                purged: purged.map(Mark::from),
                entries: entries.iter().map(Mark::from).collect(),
                committed: self.committed.map(Mark::from),
                snapshot,
            });
        }
    }

    /// Last purged log id and last log id.
    pub(crate) fn bounds(&self) -> (Option<LogId>, Option<LogId>) {
        let view = self.shared.view();
        (view.purged, view.last)
    }

    /// A reader that outlives the store's move into openraft.
    pub(crate) fn reader(&self) -> LogReader {
        LogReader(self.shared.clone())
    }

    /// Has new entries of this server, when it leads, sent while they are written.
    pub(crate) fn send_early(&mut self, early: Arc<Early>) {
        self.early = Some(early);
    }

    async fn perform(&self, op: impl FnOnce(Done) -> Op) -> Result<(), StoreError> {
        self.perform_and(op, || ()).await
    }

    /// Queues the operation, does `meanwhile`, and waits for the operation.
    async fn perform_and(&self, op: impl FnOnce(Done) -> Op, meanwhile: impl FnOnce()) -> Result<(), StoreError> {
        let _busy = Counted::new(&self.shared.busy);
        let (done, answer) = oneshot::channel();
        let stopped = || StoreError::Stopped(self.shared.fatal.get().unwrap_or_else(|| "the writer has ended".to_owned()));
        self.queue.send(op(done)).await.map_err(|_| stopped())?;
        meanwhile();
        answer.await.map_err(|_| stopped())?
    }

    /// G2: waits until a snapshot that covers `index` is durable.
    async fn snapshot_covers(&self, index: u64) -> Result<(), StoreError> {
        if planted("no-g2") {
            return Ok(());
        }
        let _busy = Counted::new(&self.shared.busy);
        let mut gate = self.gate.clone();
        tokio::select! {
            covered = gate.wait_for(|durable| durable.is_some_and(|d| d >= index)) => {
                covered.map(drop).map_err(|_| StoreError::Stopped("the snapshot store has ended".to_owned()))
            }
            reason = self.shared.fatal.wait() => Err(StoreError::Stopped(reason)),
        }
    }
}

fn storage(subject: ErrorSubject<u64>, verb: ErrorVerb, e: &StoreError) -> StorageError {
    StorageIOError::new(subject, verb, openraft::AnyError::error(e.chain())).into()
}

impl RaftLogReader<Types> for LogReader {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, StorageError> {
        self.0.read(range, usize::MAX).map_err(|e| storage(ErrorSubject::Logs, ErrorVerb::Read, &e))
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, StorageError> {
        self.0.read(start..end, READ_BYTES).map_err(|e| storage(ErrorSubject::Logs, ErrorVerb::Read, &e))
    }
}

impl RaftLogReader<Types> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, StorageError> {
        LogReader(self.shared.clone()).try_get_log_entries(range).await
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, StorageError> {
        LogReader(self.shared.clone()).limited_get_log_entries(start, end).await
    }
}

impl RaftLogStorage<Types> for LogStore {
    type LogReader = LogReader;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, StorageError> {
        let (last_purged_log_id, last_log_id) = self.bounds();
        Ok(LogState { last_purged_log_id, last_log_id })
    }

    async fn get_log_reader(&mut self) -> LogReader {
        LogReader(self.shared.clone())
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), StorageError> {
        let vote = *vote;
        let saved = self.perform(|done| Op::Vote(vote, done)).await;
        if saved.is_ok() {
            stored(|| Stored::Vote(vote.leader_id.term, vote.leader_id.node_id, vote.committed));
        }
        saved.map_err(|e| storage(ErrorSubject::Vote, ErrorVerb::Write, &e))
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, StorageError> {
        let mut vote = self.shared.view().vote;
        // G1. openraft reads the vote once, at start. Resuming as leader without an election would serve reads from a
        // commit index that was never made durable.
        if let Some(own) = vote.as_mut().filter(|v| v.leader_id.node_id == self.node && !planted("no-g1")) {
            own.committed = false;
        }
        Ok(vote)
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), StorageError> {
        // Not worth a flush of its own, nor a turn of the writer.
        if let Some(id) = committed {
            stored(|| Stored::Committed(id.into()));
            *self.shared.committed() = Some(id);
            self.committed = Some(id);
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, StorageError> {
        Ok(self.committed)
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<Types>) -> Result<(), StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        // openraft 0.9 waits for the callback before it goes on, so waiting here costs nothing and makes "readable when
        // append returns" the same moment as "durable".
        let marks: Option<Vec<Mark>> = watched().then(|| entries.iter().map(Mark::from).collect());
        let (vote, prev) = {
            let view = self.shared.view();
            (view.vote, view.last)
        };
        let copy = self.early.as_ref().filter(|early| early.wanted(vote, prev, &entries)).map(|early| (early, entries.clone()));
        let send = || {
            if let (Some((early, entries)), Some(vote)) = (copy, vote) {
                early.send(vote, prev, self.committed, entries);
            }
        };
        match self.perform_and(|done| Op::Append(entries, done), send).await {
            Ok(()) => {
                stored(|| Stored::Appended(marks.unwrap_or_default()));
                callback.log_io_completed(Ok(()));
                Ok(())
            }
            Err(e) => {
                callback.log_io_completed(Err(invalid(e.chain())));
                Err(storage(ErrorSubject::Logs, ErrorVerb::Write, &e))
            }
        }
    }

    async fn truncate(&mut self, log_id: LogId) -> Result<(), StorageError> {
        stored(|| Stored::Truncating(log_id.index));
        let cut = self.perform(|done| Op::Truncate(log_id.index, done)).await;
        cut.map_err(|e| storage(ErrorSubject::Logs, ErrorVerb::Delete, &e))
    }

    async fn purge(&mut self, mut log_id: LogId) -> Result<(), StorageError> {
        log_id.index += u64::from(planted("purge-too-far"));
        let purged = match self.snapshot_covers(log_id.index).await {
            Ok(()) => {
                stored(|| Stored::Purging(log_id.into()));
                self.perform(|done| Op::Purge(log_id, done)).await
            }
            Err(e) => Err(e),
        };
        purged.map_err(|e| storage(ErrorSubject::Logs, ErrorVerb::Delete, &e))
    }
}

#[cfg(test)]
mod tests;
