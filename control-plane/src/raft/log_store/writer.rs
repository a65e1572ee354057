//! The one writer of the Raft file.
//!
//! Votes, appends, truncations and purges go through one bounded queue and are never reordered: losing that order
//! loses committed data. The writer takes everything that waits, puts it into one record of the [journal](super::journal)
//! or into one transaction of redb, with one flush, and only then answers. A transaction always holds all that the journal
//! had before it, so that redb is a state the journal's records follow, or has them all. After any failure it answers nothing but the failure, and raises the fatal signal: a failed flush must
//! not be retried, because the kernel may have dropped the pages and report success the second time.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use optimus_common::disk::Disk;
use optimus_common::planted::planted;
use optimus_host::failpoint;
use redb::{Database, ReadableTable, Table, WriteTransaction};
use tokio::sync::{mpsc, oneshot};

use super::Shared;
use super::compaction::{Compactor, Stepped};
use super::journal::{JOURNAL, Journal};
use super::tables::{self, COMMITTED, FILE, GENERATION, LOG, META, PURGED, VOTE};
use super::witness::Witness;
use crate::raft::election::Now;
use crate::raft::error::{StoreError, chain};
use crate::raft::record::{Damage, Kind};
use crate::raft::runtime;
use crate::raft::stored::{EntryV1, GenerationV1, JournalEntryV1, JournalV1, LogIdV1, VoteV1, encode};
use crate::raft::types::{Blob, Entry, LogId, Vote};

/// Operations waiting for the writer; beyond it callers wait.
pub(crate) const QUEUE: usize = 1024;
/// Most operations in one transaction.
const GROUP: usize = 256;
/// Purged entries deleted by one transaction, so that a purge of thousands never delays an append by much.
const PURGE_SLICE: u64 = 512;

pub(crate) type Done = oneshot::Sender<Result<(), StoreError>>;

/// One operation.
#[derive(Debug)]
pub(crate) enum Op {
    Vote(Vote, Done),
    Append(Vec<Entry>, Done),
    Truncate(u64, Done),
    Purge(LogId, Done),
    Stop(Done),
}

impl Op {
    fn done(self) -> Done {
        match self {
            Op::Vote(_, done) | Op::Append(_, done) | Op::Truncate(_, done) | Op::Purge(_, done) | Op::Stop(done) => done,
        }
    }
}

pub(crate) struct Writer {
    shared: Arc<Shared>,
    disk: Arc<dyn Disk>,
    /// First index that is purged but still in the file.
    stale_from: Option<u64>,
    /// Size of all entries in the file.
    live: u64,
    /// Number of the last commit.
    generation: u64,
    /// Unset when it cannot be written: it is evidence, and nothing stands on it.
    witness: Option<Witness>,
    journal: Journal,
    /// What only the journal holds. Bounded by its size.
    gathered: JournalV1,
    compactor: Compactor,
    /// When the disk work of this group began; set by a simulated disk, whose delay comes before it.
    began: Option<Now>,
    /// Whether threads of our own may be started.
    threads: bool,
    closing: Option<std::thread::JoinHandle<()>>,
}

impl Writer {
    pub(crate) fn new(shared: Arc<Shared>, disk: Arc<dyn Disk>, opened: &tables::Opened, journal: Journal, forced: Option<usize>) -> Self {
        let stale_from = opened.oldest.filter(|o| opened.purged.is_some_and(|p| *o <= p.index));
        let witness = Witness::open(&*disk).map_err(|e| tracing::warn!(error = %e, "no witness beside the raft log")).ok();
        let (live, generation) = (opened.live, opened.generation);
        Self {
            shared,
            disk,
            stale_from,
            live,
            generation,
            witness,
            journal,
            gathered: JournalV1::default(),
            compactor: Compactor::new(forced),
            began: None,
            threads: false,
            closing: None,
        }
    }

    /// The loop of the writer thread.
    pub(crate) fn run_blocking(mut self, mut queue: mpsc::Receiver<Op>) {
        let mut group = Vec::with_capacity(GROUP);
        self.threads = true;
        loop {
            match queue.try_recv() {
                Ok(op) => group.push(op),
                Err(mpsc::error::TryRecvError::Disconnected) => break,
                Err(mpsc::error::TryRecvError::Empty) => {
                    if self.tidy() {
                        continue;
                    }
                    let Some(op) = queue.blocking_recv() else { break };
                    group.push(op);
                }
            }
            while group.len() < GROUP
                && let Ok(op) = queue.try_recv()
            {
                group.push(op);
            }
            if self.process(&mut group) {
                break;
            }
            self.compact();
        }
        self.join_closing();
        self.shared.close();
    }

    /// The same loop as a task, for the simulator, where a thread would run outside its clock.
    pub(crate) async fn run_inline(mut self, mut queue: mpsc::Receiver<Op>) {
        let mut group = Vec::with_capacity(GROUP);
        loop {
            if queue.is_empty() && self.tidy() {
                tokio::task::yield_now().await;
                continue;
            }
            if queue.recv_many(&mut group, GROUP).await == 0 {
                break;
            }
            self.began = Some(Now::now());
            runtime::disk_delay().await;
            if self.process(&mut group) {
                break;
            }
            // As with a thread of its own, an answer arrives before what is done next.
            tokio::task::yield_now().await;
            self.compact();
        }
        self.shared.close();
    }

    /// Work for a moment without requests: deletes a slice of purged entries, or compacts a little. Returns whether it
    /// did anything.
    fn tidy(&mut self) -> bool {
        if self.stale_from.is_none() || self.shared.fatal.get().is_some() {
            return self.compact();
        }
        let mut nothing = Vec::new();
        self.process(&mut nothing);
        true
    }

    /// A step of a compaction, if there is anything to compact. Returns whether there was.
    fn compact(&mut self) -> bool {
        // What waits to be deleted goes first: it need not be copied.
        if self.stale_from.is_some() || self.shared.fatal.get().is_some() || !self.shared.strict.load(Ordering::Relaxed) {
            return false;
        }
        let stepped = tables::without_panic(|| {
            let shared = self.shared.clone();
            let purged = shared.view().purged.map(|p| p.index);
            let stepped = {
                let db = shared.db.read().unwrap_or_else(PoisonError::into_inner);
                let Some(db) = db.as_ref() else { return Ok(false) };
                self.compactor.step(&*self.disk, db, self.live, purged)?
            };
            match stepped {
                Stepped::Idle => Ok(false),
                Stepped::More => Ok(true),
                Stepped::Replaced(db) => {
                    let old = shared.db.write().unwrap_or_else(PoisonError::into_inner).replace(db);
                    self.let_go(old)?;
                    Ok(true)
                }
            }
        });
        stepped.unwrap_or_else(|e| {
            self.shared.fatal.raise(chain(&e));
            false
        })
    }

    /// Closes the file that was replaced. redb tidies it up although it has no name any more, and the file system frees
    /// its blocks; with a large file no write should wait for that.
    fn let_go(&mut self, old: Option<Database>) -> Result<(), StoreError> {
        self.join_closing();
        if !self.threads {
            drop(old);
            return Ok(());
        }
        let closing = std::thread::Builder::new().name("raft-log-close".to_owned()).spawn(move || drop(old));
        self.closing = Some(closing.map_err(|e| StoreError::io("start the thread that closes", FILE, e))?);
        Ok(())
    }

    fn join_closing(&mut self) {
        if let Some(Err(_)) = self.closing.take().map(std::thread::JoinHandle::join) {
            tracing::warn!("closing the replaced raft log panicked; it is gone all the same");
        }
    }

    /// Performs a group with one flush and answers it. Returns whether to stop.
    fn process(&mut self, group: &mut Vec<Op>) -> bool {
        let stop = group.iter().any(|op| matches!(op, Op::Stop(_)));
        let result = match self.shared.fatal.get() {
            Some(reason) => Err(StoreError::Stopped(reason)),
            None => tables::without_panic(|| self.commit(group)),
        };
        let result = if planted("failed-flush-ignored") { Ok(()) } else { result };
        if let Err(e) = &result
            && !matches!(e, StoreError::Stopped(_))
        {
            self.shared.fatal.raise(chain(e));
        }
        for done in group.drain(..).map(Op::done) {
            // A caller that went away does not need the answer.
            let _ = done.send(result.clone());
        }
        stop
    }

    fn commit(&mut self, group: &[Op]) -> Result<(), StoreError> {
        if group.is_empty() {
            return self.transact(group); // deletes what was purged
        }
        // At the end all goes to redb: an older version of optimus knows of no journal.
        let nothing = self.gathered == JournalV1::default() && self.shared.committed().is_none();
        if nothing && matches!(group, [Op::Stop(_)]) {
            return Ok(());
        }
        match self.record(group)? {
            Some((record, step)) => self.journal(group, &record, step),
            None => self.transact(group),
        }
    }

    /// The journal's record of a group, if it is a matter for the journal and has room there.
    fn record(&self, group: &[Op]) -> Result<Option<(Vec<u8>, Step)>, StoreError> {
        let mut step = Step::new(&self.shared, self.live);
        step.committed = *self.shared.committed();
        let mut content = JournalV1 { committed: step.committed.map(LogIdV1::from), ..JournalV1::default() };
        for op in group {
            match op {
                Op::Vote(vote, _) => {
                    content.vote = Some(VoteV1::from(*vote));
                    step.vote = Some(*vote);
                }
                Op::Append(entries, _) if follows(entries, &step) => {
                    let mut kept = Vec::with_capacity(entries.len());
                    for entry in entries {
                        let record = encode(Kind::Entry, entry.log_id.index, &EntryV1::from(entry));
                        kept.push((entry.clone(), record.len()));
                        content.entries.push(JournalEntryV1 { index: entry.log_id.index, record: Blob(record.into()) });
                        step.last = Some(entry.log_id);
                    }
                    step.tail.push(TailChange::Append(kept));
                }
                // An append that does not follow is refused, or what a test asks for.
                Op::Append(..) | Op::Truncate(..) | Op::Purge(..) | Op::Stop(_) => return Ok(None),
            }
        }
        let record = self.journal.record(self.generation + 1, &content);
        step.gathered = content;
        Ok(record.map(|record| (record, step)))
    }

    /// Makes a group durable in the journal.
    fn journal(&mut self, group: &[Op], record: &[u8], mut step: Step) -> Result<(), StoreError> {
        let fail = |e| StoreError::io("write and flush", JOURNAL, e);
        let started = self.began.take().unwrap_or_else(Now::now);
        let votes = group.iter().any(|op| matches!(op, Op::Vote(..)));
        self.journal.write(record).map_err(fail)?;
        before_flush(votes, false)?;
        let skipped = (planted("ack-before-fsync") && group.iter().all(|op| matches!(op, Op::Append(..))))
            || (planted("vote-without-fsync") && group.iter().all(|op| matches!(op, Op::Vote(..))));
        if !skipped {
            self.journal.sync().map_err(fail)?;
        }
        after_flush(votes, false);
        self.shared.flushes.record(Now::now() - started);
        let content = std::mem::take(&mut step.gathered);
        self.gathered.vote = content.vote.or(self.gathered.vote);
        self.gathered.committed = content.committed.or(self.gathered.committed);
        self.gathered.entries.extend(content.entries);
        step.stale_from = self.stale_from;
        self.done(step);
        Ok(())
    }

    /// Makes all that was gathered and a group durable in redb.
    fn transact(&mut self, group: &[Op]) -> Result<(), StoreError> {
        let shared = self.shared.clone();
        let db = shared.db.read().unwrap_or_else(PoisonError::into_inner);
        let db: &Database = db.as_ref().ok_or_else(|| StoreError::Stopped("the store is closed".to_owned()))?;
        let write = db.begin_write().map_err(|e| StoreError::redb("write", FILE, e))?;
        let mut step = Step::new(&shared, self.live);
        self.fill(&write, group, &mut step)?;
        let purges = step.stale_from != self.stale_from || step.purged != shared.view().purged;
        let votes = group.iter().any(|op| matches!(op, Op::Vote(..)));
        before_flush(votes, purges)?;
        let started = self.began.take().unwrap_or_else(Now::now);
        write.commit().map_err(|e| StoreError::redb("flush", FILE, e))?;
        shared.flushes.record(Now::now() - started);
        after_flush(votes, purges);
        if self.stale_from.is_some() && step.stale_from.is_none() || step.purged != shared.view().purged {
            self.compactor.deleted();
        }
        // In this order: what was gathered was in the file before the group.
        let bytes = self.gathered.entries.iter().map(|e| e.record.0.len()).sum();
        self.compactor.appended(bytes);
        for change in &step.tail {
            match change {
                TailChange::Append(new) => self.compactor.appended(new.iter().map(|(_, bytes)| bytes).sum()),
                TailChange::Truncate(from) => self.compactor.truncated(*from),
                TailChange::Purge(_) => {}
            }
        }
        self.journal.restart();
        self.gathered = JournalV1::default();
        self.done(step);
        Ok(())
    }

    /// A group is durable: readers may see it.
    fn done(&mut self, step: Step) {
        self.generation += 1;
        if let Some(Err(e)) = self.witness.as_ref().map(|w| w.note(self.generation)) {
            tracing::warn!(error = %e, "failed to write the witness of the raft log; going on without");
            self.witness = None;
        }
        self.stale_from = step.stale_from;
        self.live = step.live;
        {
            let mut committed = self.shared.committed();
            *committed = committed.filter(|c| step.committed != Some(*c));
        }
        let mut view = self.shared.view();
        view.vote = step.vote;
        view.purged = step.purged;
        view.last = step.last;
        view.tail.pin(self.gathered.entries.first().map(|e| e.index));
        for change in step.tail {
            view.tail.apply(change);
        }
    }

    fn fill(&self, write: &WriteTransaction, group: &[Op], step: &mut Step) -> Result<(), StoreError> {
        let fail = |e: redb::Error| StoreError::redb("write", FILE, e);
        let mut log = write.open_table(LOG).map_err(|e| fail(e.into()))?;
        let mut meta = write.open_table(META).map_err(|e| fail(e.into()))?;
        step.stale_from = self.stale_from;
        for entry in &self.gathered.entries {
            let replaced = log.insert(entry.index, &*entry.record.0).map_err(|e| fail(e.into()))?;
            step.live = (step.live + entry.record.0.len() as u64).saturating_sub(replaced.map_or(0, |old| old.value().len() as u64));
        }
        if let Some(vote) = &self.gathered.vote {
            meta.insert(VOTE, encode(Kind::Vote, 0, vote).as_slice()).map_err(|e| fail(e.into()))?;
        }
        for op in group {
            match op {
                Op::Vote(vote, _) => {
                    let bytes = encode(Kind::Vote, 0, &VoteV1::from(*vote));
                    meta.insert(VOTE, bytes.as_slice()).map_err(|e| fail(e.into()))?;
                    step.vote = Some(*vote);
                }
                Op::Append(entries, _) => append(&mut log, entries, step)?,
                Op::Truncate(from, _) => truncate(&mut log, *from, step)?,
                Op::Purge(upto, _) if step.purged.is_none_or(|p| p.index < upto.index) => {
                    let bytes = encode(Kind::PurgeMark, 0, &LogIdV1::from(*upto));
                    meta.insert(PURGED, bytes.as_slice()).map_err(|e| fail(e.into()))?;
                    step.purged = Some(*upto);
                    if step.last.is_none_or(|last| last.index <= upto.index) {
                        step.last = Some(*upto);
                    }
                    step.tail.push(TailChange::Purge(upto.index));
                    let first = log.first().map_err(|e| fail(e.into()))?.map(|(k, _)| k.value());
                    step.stale_from = first.filter(|f| *f <= upto.index);
                }
                Op::Purge(..) | Op::Stop(_) => {}
            }
        }
        step.committed = *self.shared.committed();
        if let Some(committed) = step.committed.map(LogIdV1::from).or(self.gathered.committed) {
            let bytes = encode(Kind::Committed, 0, &committed);
            meta.insert(COMMITTED, bytes.as_slice()).map_err(|e| fail(e.into()))?;
        }
        let generation = encode(Kind::Generation, 0, &GenerationV1 { number: self.generation + 1 });
        meta.insert(GENERATION, generation.as_slice()).map_err(|e| fail(e.into()))?;
        delete_stale(&mut log, step)
    }
}

/// Failpoints before a flush, which are to look like one that failed.
fn before_flush(votes: bool, purges: bool) -> Result<(), StoreError> {
    for (here, point) in [(true, "log.before_sync"), (votes, "vote.before_sync"), (purges, "purge.before_sync")] {
        if here {
            failpoint::fails(point).map_err(|e| StoreError::io("flush", FILE, e))?;
        }
    }
    Ok(())
}

fn after_flush(votes: bool, purges: bool) {
    for (here, point) in [(true, "log.after_sync"), (votes, "vote.after_sync"), (purges, "purge.after_sync")] {
        if here {
            failpoint::hit(point);
        }
    }
}

/// Whether `entries` go on, without a hole, where the log will end.
fn follows(entries: &[Entry], step: &Step) -> bool {
    let mut last = step.last.map(|l| l.index);
    entries.iter().all(|e| last.replace(e.log_id.index).is_none_or(|l| l.checked_add(1) == Some(e.log_id.index)))
}

/// What a group changes, taken over only once it is durable.
struct Step {
    vote: Option<Vote>,
    purged: Option<LogId>,
    last: Option<LogId>,
    stale_from: Option<u64>,
    live: u64,
    tail: Vec<TailChange>,
    committed: Option<LogId>,
    /// What it puts into the journal.
    gathered: JournalV1,
    strict: bool,
}

/// A change to the cached end of the log.
pub(crate) enum TailChange {
    Append(Vec<(Entry, usize)>),
    Truncate(u64),
    Purge(u64),
}

impl Step {
    fn new(shared: &Shared, live: u64) -> Self {
        let strict = shared.strict.load(Ordering::Relaxed);
        let view = shared.view();
        let (vote, purged, last) = (view.vote, view.purged, view.last);
        Self { vote, purged, last, stale_from: None, live, tail: Vec::new(), committed: None, gathered: JournalV1::default(), strict }
    }
}

fn append(log: &mut Table<'_, u64, &'static [u8]>, entries: &[Entry], step: &mut Step) -> Result<(), StoreError> {
    let mut kept = Vec::with_capacity(entries.len());
    for entry in entries {
        let index = entry.log_id.index;
        // The last line of defence behind guard G3: a hole on disk is found only at the next start, when it is too late.
        if let Some(last) = step.last
            && index != last.index + 1
            && step.strict
        {
            let hole = Damage::Content(format!("refused to append entry {index} after {}", last.index));
            return Err(StoreError::damaged(FILE, "log", index, hole));
        }
        let bytes = encode(Kind::Entry, index, &EntryV1::from(entry));
        let replaced = log.insert(index, bytes.as_slice()).map_err(|e| StoreError::redb("append to", FILE, e))?;
        step.live = (step.live + bytes.len() as u64).saturating_sub(replaced.map_or(0, |old| old.value().len() as u64));
        if step.last.is_none_or(|last| last.index < index) {
            step.last = Some(entry.log_id);
        }
        kept.push((entry.clone(), bytes.len()));
    }
    step.tail.push(TailChange::Append(kept));
    Ok(())
}

fn truncate(log: &mut Table<'_, u64, &'static [u8]>, from: u64, step: &mut Step) -> Result<(), StoreError> {
    let fail = |e: redb::Error| StoreError::redb("truncate", FILE, e);
    let from = from.max(step.purged.map_or(0, |p| p.index + 1));
    let live = &mut step.live;
    log.retain_in(from.., |_, value| forget(live, value)).map_err(|e| fail(e.into()))?;
    step.tail.push(TailChange::Truncate(from));
    let held = log.range(..from).map_err(|e| fail(e.into()))?.next_back().transpose().map_err(|e| fail(e.into()))?;
    step.last = match held {
        Some((key, value)) if step.purged.is_none_or(|p| key.value() > p.index) => {
            let index = key.value();
            let entry = crate::raft::stored::decode_entry(index, value.value());
            Some(entry.map_err(|d| StoreError::damaged(FILE, "log", index, d))?.log_id)
        }
        _ => step.purged,
    };
    Ok(())
}

/// Takes a deleted value off the account; `false` says to delete it.
fn forget(live: &mut u64, value: &[u8]) -> bool {
    *live = live.saturating_sub(value.len() as u64);
    false
}

fn delete_stale(log: &mut Table<'_, u64, &'static [u8]>, step: &mut Step) -> Result<(), StoreError> {
    let (Some(from), Some(purged)) = (step.stale_from, step.purged) else { return Ok(()) };
    let upto = purged.index.min(from.saturating_add(PURGE_SLICE - 1));
    let live = &mut step.live;
    log.retain_in(from..=upto, |_, value| forget(live, value)).map_err(|e| StoreError::redb("purge", FILE, e))?;
    step.stale_from = (upto < purged.index).then_some(upto + 1);
    Ok(())
}
