//! The one writer of the Raft file.
//!
//! Votes, appends, truncations and purges go through one bounded queue and are never reordered: losing that order
//! loses committed data. The writer takes everything that waits, puts it into one transaction with one flush, and only
//! then answers. After any failure it answers nothing but the failure, and raises the fatal signal: a failed flush must
//! not be retried, because the kernel may have dropped the pages and report success the second time.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use optimus_host::failpoint;
use redb::{Database, ReadableTable, Table, WriteTransaction};
use tokio::sync::{mpsc, oneshot};

use super::Shared;
use super::tables::{self, COMMITTED, FILE, LOG, META, PURGED, VOTE};
use crate::raft::error::{StoreError, chain};
use crate::raft::record::{Damage, Kind};
use crate::raft::stored::{EntryV1, LogIdV1, VoteV1, encode};
use crate::raft::types::{Entry, LogId, Vote};

/// Operations waiting for the writer; beyond it callers wait.
pub(crate) const QUEUE: usize = 1024;
/// Most operations in one transaction.
const GROUP: usize = 256;
/// Purged entries deleted by one transaction, so that a purge of thousands never delays an append by much.
const PURGE_SLICE: u64 = 512;

pub(crate) type Done = oneshot::Sender<Result<(), StoreError>>;

/// One operation. `Committed` has no answer: it only saves work at the next start, and rides with the next flush.
#[derive(Debug)]
pub(crate) enum Op {
    Vote(Vote, Done),
    Append(Vec<Entry>, Done),
    Truncate(u64, Done),
    Purge(LogId, Done),
    Committed(LogId),
    Stop(Done),
}

impl Op {
    fn done(self) -> Option<Done> {
        match self {
            Op::Vote(_, done) | Op::Append(_, done) | Op::Truncate(_, done) | Op::Purge(_, done) | Op::Stop(done) => Some(done),
            Op::Committed(_) => None,
        }
    }
}

pub(crate) struct Writer {
    shared: Arc<Shared>,
    /// First index that is purged but still in the file.
    stale_from: Option<u64>,
    /// Newest commit mark not written yet.
    committed: Option<LogId>,
}

impl Writer {
    pub(crate) fn new(shared: Arc<Shared>, oldest: Option<u64>) -> Self {
        let purged = shared.view().purged;
        let stale_from = oldest.filter(|o| purged.is_some_and(|p| *o <= p.index));
        Self { shared, stale_from, committed: None }
    }

    /// The loop of the writer thread.
    pub(crate) fn run_blocking(mut self, mut queue: mpsc::Receiver<Op>) {
        let mut group = Vec::with_capacity(GROUP);
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
        }
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
            if queue.recv_many(&mut group, GROUP).await == 0 || self.process(&mut group) {
                break;
            }
        }
        self.shared.close();
    }

    /// Work for a moment without requests: deletes a slice of purged entries. Returns whether it did anything.
    fn tidy(&mut self) -> bool {
        if self.stale_from.is_none() || self.shared.fatal.get().is_some() {
            return false;
        }
        let mut nothing = Vec::new();
        self.process(&mut nothing);
        true
    }

    /// Performs a group with one flush and answers it. Returns whether to stop.
    fn process(&mut self, group: &mut Vec<Op>) -> bool {
        let stop = group.iter().any(|op| matches!(op, Op::Stop(_)));
        let result = match self.shared.fatal.get() {
            Some(reason) => Err(StoreError::Stopped(reason)),
            None => tables::without_panic(|| self.commit(group)),
        };
        if let Err(e) = &result
            && !matches!(e, StoreError::Stopped(_))
        {
            self.shared.fatal.raise(chain(e));
        }
        for done in group.drain(..).filter_map(Op::done) {
            // A caller that went away does not need the answer.
            let _ = done.send(result.clone());
        }
        stop
    }

    fn commit(&mut self, group: &[Op]) -> Result<(), StoreError> {
        for op in group {
            if let Op::Committed(id) = op {
                self.committed = Some(*id);
            }
        }
        let only_marks = group.iter().all(|op| matches!(op, Op::Committed(_)));
        if only_marks && (!group.is_empty() || self.stale_from.is_none()) {
            return Ok(());
        }
        let shared = self.shared.clone();
        let db = shared.db.read().unwrap_or_else(PoisonError::into_inner);
        let db: &Database = db.as_ref().ok_or_else(|| StoreError::Stopped("the store is closed".to_owned()))?;
        let write = db.begin_write().map_err(|e| StoreError::redb("write", FILE, e))?;
        let mut step = Step::new(&shared);
        let before = step.purged;
        self.fill(&write, group, &mut step)?;
        let (votes, purges) =
            (group.iter().any(|op| matches!(op, Op::Vote(..))), step.purged != before || step.stale_from != self.stale_from);
        for (here, point) in [(true, "log.before_sync"), (votes, "vote.before_sync"), (purges, "purge.before_sync")] {
            if here {
                failpoint::fails(point).map_err(|e| StoreError::io("flush", FILE, e))?;
            }
        }
        write.commit().map_err(|e| StoreError::redb("flush", FILE, e))?;
        for (here, point) in [(true, "log.after_sync"), (votes, "vote.after_sync"), (purges, "purge.after_sync")] {
            if here {
                failpoint::hit(point);
            }
        }
        self.stale_from = step.stale_from;
        self.committed = None;
        let mut view = shared.view();
        view.vote = step.vote;
        view.purged = step.purged;
        view.last = step.last;
        for change in step.tail {
            view.tail.apply(change);
        }
        Ok(())
    }

    fn fill(&self, write: &WriteTransaction, group: &[Op], step: &mut Step) -> Result<(), StoreError> {
        let fail = |e: redb::Error| StoreError::redb("write", FILE, e);
        let mut log = write.open_table(LOG).map_err(|e| fail(e.into()))?;
        let mut meta = write.open_table(META).map_err(|e| fail(e.into()))?;
        step.stale_from = self.stale_from;
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
                Op::Purge(..) | Op::Committed(_) | Op::Stop(_) => {}
            }
        }
        if let Some(committed) = self.committed {
            let bytes = encode(Kind::Committed, 0, &LogIdV1::from(committed));
            meta.insert(COMMITTED, bytes.as_slice()).map_err(|e| fail(e.into()))?;
        }
        delete_stale(&mut log, step)
    }
}

/// What a transaction changes, taken over only once it is durable.
struct Step {
    vote: Option<Vote>,
    purged: Option<LogId>,
    last: Option<LogId>,
    stale_from: Option<u64>,
    tail: Vec<TailChange>,
    strict: bool,
}

/// A change to the cached end of the log.
pub(crate) enum TailChange {
    Append(Vec<(Entry, usize)>),
    Truncate(u64),
    Purge(u64),
}

impl Step {
    fn new(shared: &Shared) -> Self {
        let strict = shared.strict.load(Ordering::Relaxed);
        let view = shared.view();
        Self { vote: view.vote, purged: view.purged, last: view.last, stale_from: None, tail: Vec::new(), strict }
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
        log.insert(index, bytes.as_slice()).map_err(|e| StoreError::redb("append to", FILE, e))?;
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
    log.retain_in(from.., |_, _| false).map_err(|e| fail(e.into()))?;
    step.tail.push(TailChange::Truncate(from));
    let held = log.last().map_err(|e| fail(e.into()))?;
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

fn delete_stale(log: &mut Table<'_, u64, &'static [u8]>, step: &mut Step) -> Result<(), StoreError> {
    let (Some(from), Some(purged)) = (step.stale_from, step.purged) else { return Ok(()) };
    let upto = purged.index.min(from.saturating_add(PURGE_SLICE - 1));
    log.retain_in(from..=upto, |_, _| false).map_err(|e| StoreError::redb("purge", FILE, e))?;
    step.stale_from = (upto < purged.index).then_some(upto + 1);
    Ok(())
}
