//! Giving disk space back: redb reuses the pages of purged entries, but its file never shrinks.
//!
//! ```text
//! raft.redb --entries, some at a time, between two groups of writes--> raft.redb.compact
//!     last step: the rest, vote and marks, flush --> rename over raft.redb --> the old file is gone
//! ```
//! Until the rename every write goes to the old file alone and is acknowledged by it, so a crash at any moment leaves a
//! whole log: the old one, or after the rename the new one, which holds the same. redb's own `compact` moves everything in
//! one go, and every write would wait for it.

use optimus_common::disk::Disk;
use optimus_host::failpoint;
use redb::{Database, ReadableDatabase, ReadableTable};

use super::tables::{self, COMPACTING, FILE, LOG, META};
use crate::raft::error::StoreError;
use crate::raft::record::{self, Damage, Kind};

/// A file below this size is left alone.
pub(crate) const ABOVE: u64 = 32 << 20;
/// A file this many times larger than its entries is rewritten. redb rounds large values up to twice their size, so
/// anything near 2 could never be satisfied.
const RATIO: u64 = 3;
/// Bytes copied in one step; a write waits for one step at most.
const STEP: usize = 512 << 10;

/// When to compact, and the compaction under way.
#[derive(Debug, Default)]
pub(crate) struct Compactor {
    running: Option<Running>,
    /// Whether entries were deleted since it was last asked.
    consider: bool,
    /// Not before the file has reached this size: an earlier try ran out of space, or gave little.
    not_below: u64,
    /// Most bytes to copy on top of [`STEP`], so that it gains on a log that grows meanwhile.
    grown: usize,
    /// Tests compact whatever the size, in steps of this many bytes.
    forced: Option<usize>,
}

/// The new file, so far.
#[derive(Debug)]
struct Running {
    db: Database,
    /// Entries from `first` up to `next` are copied.
    first: u64,
    next: u64,
    /// Entries from here on were truncated after they had been copied.
    cut: Option<u64>,
}

/// What a step led to.
pub(crate) enum Stepped {
    /// There is nothing to do.
    Idle,
    More,
    /// The new file has replaced the old one and is to be used from now on.
    Replaced(Database),
}

impl Compactor {
    pub(crate) fn new(forced: Option<usize>) -> Self {
        Self { consider: true, forced, ..Self::default() }
    }

    /// Purged entries were deleted.
    pub(crate) fn deleted(&mut self) {
        self.consider = true;
    }

    /// Entries of `bytes` were written.
    pub(crate) fn appended(&mut self, bytes: usize) {
        self.grown = self.grown.saturating_add(bytes.saturating_mul(2));
    }

    /// Entries from `from` on were removed.
    pub(crate) fn truncated(&mut self, from: u64) {
        if let Some(running) = self.running.as_mut().filter(|r| from < r.next) {
            running.next = from;
            running.cut = Some(running.cut.map_or(from, |c| c.min(from)));
        }
    }

    /// Begins, or copies some more. `live` is the size of all entries in the file, `purged` the last one that is gone.
    ///
    /// # Errors
    /// What the disk says; only for want of space it was given up, and the old file is as good as before.
    pub(crate) fn step(&mut self, disk: &dyn Disk, old: &Database, live: u64, purged: Option<u64>) -> Result<Stepped, StoreError> {
        if self.running.is_none() && !std::mem::take(&mut self.consider) {
            return Ok(Stepped::Idle);
        }
        let stepped = self.copy(disk, old, live, purged);
        match stepped {
            Err(StoreError::Full { .. }) => {
                tracing::warn!(file = FILE, "no space left to compact the log, it stays as large as it is");
                self.not_below = size(disk)?.saturating_mul(5) / 4;
                self.running = None;
                // The new file may hold the space someone else needs.
                tables::remove_if_there(disk, COMPACTING)?;
                Ok(Stepped::Idle)
            }
            stepped => stepped,
        }
    }

    fn copy(&mut self, disk: &dyn Disk, old: &Database, live: u64, purged: Option<u64>) -> Result<Stepped, StoreError> {
        let running = match &mut self.running {
            Some(running) => running,
            none => {
                let size = size(disk)?;
                if self.forced.is_none() && (size < ABOVE.max(self.not_below) || size / RATIO < live) {
                    return Ok(Stepped::Idle);
                }
                tracing::info!(file = FILE, size, live, "compacting the log");
                tables::remove_if_there(disk, COMPACTING)?;
                self.grown = 0;
                none.insert(Running { db: tables::database(disk, COMPACTING)?, first: 0, next: 0, cut: None })
            }
        };
        let budget = self.forced.unwrap_or(STEP).saturating_add(std::mem::take(&mut self.grown));
        if !running.copy(old, purged, budget)? {
            return Ok(Stepped::More);
        }
        failpoint::hit("compact.before_rename");
        disk.rename(COMPACTING, FILE).map_err(|e| StoreError::io("rename", COMPACTING, e))?;
        failpoint::hit("compact.after_rename");
        disk.sync_dir().map_err(|e| StoreError::io("flush the directory of", FILE, e))?;
        failpoint::hit("compact.durable");
        let size = size(disk)?;
        tracing::info!(file = FILE, size, live, "the log is compacted");
        self.not_below = size.saturating_mul(2);
        Ok(self.running.take().map_or(Stepped::Idle, |r| Stepped::Replaced(r.db)))
    }
}

fn size(disk: &dyn Disk) -> Result<u64, StoreError> {
    disk.open(FILE).and_then(|f| f.len()).map_err(|e| StoreError::io("measure", FILE, e))
}

impl Running {
    /// Copies entries of about `budget` bytes durably. Returns whether the new file now holds all the old one does.
    fn copy(&mut self, old: &Database, purged: Option<u64>, budget: usize) -> Result<bool, StoreError> {
        let from = |e: redb::Error| StoreError::redb("read", FILE, e);
        let to = |e: redb::Error| StoreError::redb("write", COMPACTING, e);
        let read = old.begin_read().map_err(|e| from(e.into()))?;
        let (log, meta) = (read.open_table(LOG).map_err(|e| from(e.into()))?, read.open_table(META).map_err(|e| from(e.into()))?);
        let write = self.db.begin_write().map_err(|e| to(e.into()))?;
        let mut next = self.next.max(purged.map_or(0, |p| p + 1));
        let mut whole = true;
        {
            let mut copy = write.open_table(LOG).map_err(|e| to(e.into()))?;
            if let Some(cut) = self.cut {
                copy.retain_in(cut.., |_, _| false).map_err(|e| to(e.into()))?;
            }
            // Purged after it had been copied.
            if let Some(purged) = purged.filter(|p| *p >= self.first) {
                copy.retain_in(..=purged, |_, _| false).map_err(|e| to(e.into()))?;
            }
            let mut bytes = 0;
            for item in log.range(next..).map_err(|e| from(e.into()))? {
                if bytes >= budget {
                    whole = false;
                    break;
                }
                let (key, value) = item.map_err(|e| from(e.into()))?;
                let (index, value) = (key.value(), value.value());
                record::open(Kind::Entry, index, value).map_err(|d| StoreError::damaged(FILE, "log", index, d))?;
                if next > 0 && index != next && copy.last().map_err(|e| to(e.into()))?.is_some() {
                    let hole = Damage::Content(format!("the log has a hole, expected entry {next}"));
                    return Err(StoreError::damaged(FILE, "log", index, hole));
                }
                copy.insert(index, value).map_err(|e| to(e.into()))?;
                bytes += value.len();
                next = index + 1;
            }
            let mut marks = write.open_table(META).map_err(|e| to(e.into()))?;
            if whole {
                for item in meta.iter().map_err(|e| from(e.into()))? {
                    let (key, value) = item.map_err(|e| from(e.into()))?;
                    marks.insert(key.value(), value.value()).map_err(|e| to(e.into()))?;
                }
            }
        }
        write.commit().map_err(|e| StoreError::redb("flush", COMPACTING, e))?;
        (self.first, self.next, self.cut) = (self.first.max(purged.map_or(0, |p| p + 1)), next, None);
        Ok(whole)
    }
}
