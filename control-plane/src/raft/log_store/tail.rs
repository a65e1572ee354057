//! The end of the log in memory: what was just appended is about to be sent to peers and applied, and need not be
//! read and decoded again for that. Entries that only the journal holds on disk are always here, for nobody reads them
//! from there.

use std::collections::VecDeque;
use std::ops::RangeInclusive;

use super::writer::TailChange;
use crate::raft::types::Entry;

/// Most entries kept, beyond those that only the journal holds (bounded by its size).
const MAX_ENTRIES: usize = 1024;
/// Most encoded bytes kept beyond those; at least the newest entry stays.
const MAX_BYTES: usize = 8 << 20;

/// Consecutive durable entries up to the last one, with their encoded size.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    entries: VecDeque<(Entry, usize)>,
    bytes: usize,
    /// The first entry the database does not hold.
    pinned: Option<u64>,
}

impl Tail {
    /// Keeps every entry from `first` on, however many.
    pub(crate) fn pin(&mut self, first: Option<u64>) {
        self.pinned = first;
        self.shrink();
    }

    fn shrink(&mut self) {
        let full = |tail: &Self| tail.entries.len() > MAX_ENTRIES || (tail.bytes > MAX_BYTES && tail.entries.len() > 1);
        let free = |tail: &Self| tail.entries.front().is_some_and(|(e, _)| tail.pinned.is_none_or(|p| e.log_id.index < p));
        while full(self) && free(self) {
            self.drop_first();
        }
    }

    /// Index of the first entry held here.
    pub(crate) fn first(&self) -> Option<u64> {
        self.entries.front().map(|(e, _)| e.log_id.index)
    }

    pub(crate) fn apply(&mut self, change: TailChange) {
        match change {
            TailChange::Append(new) => {
                for (entry, bytes) in new {
                    if self.entries.back().is_some_and(|(last, _)| last.log_id.index + 1 != entry.log_id.index) {
                        self.entries.clear();
                        self.bytes = 0;
                    }
                    self.bytes += bytes;
                    self.entries.push_back((entry, bytes));
                }
                self.shrink();
            }
            TailChange::Truncate(from) => {
                while self.entries.back().is_some_and(|(e, _)| e.log_id.index >= from) {
                    if let Some((_, bytes)) = self.entries.pop_back() {
                        self.bytes -= bytes;
                    }
                }
            }
            TailChange::Purge(upto) => {
                while self.entries.front().is_some_and(|(e, _)| e.log_id.index <= upto) {
                    self.drop_first();
                }
            }
        }
    }

    fn drop_first(&mut self) {
        if let Some((_, bytes)) = self.entries.pop_front() {
            self.bytes -= bytes;
        }
    }

    /// The entries of `range` that are held here, about `max_bytes` of them and at least one.
    pub(crate) fn read(&self, range: RangeInclusive<u64>, max_bytes: usize) -> Vec<Entry> {
        let Some(first) = self.first() else { return Vec::new() };
        let skip = range.start().saturating_sub(first) as usize;
        let held = self.entries.iter().skip(skip).take_while(|(e, _)| e.log_id.index <= *range.end());
        let mut bytes = 0usize;
        let mut out = Vec::new();
        for (entry, size) in held {
            bytes = bytes.saturating_add(*size);
            if bytes > max_bytes && !out.is_empty() {
                break;
            }
            out.push(entry.clone());
        }
        out
    }
}
