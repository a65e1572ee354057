//! The end of the log in memory: what was just appended is about to be sent to peers and applied, and need not be
//! read and decoded again for that.

use std::collections::VecDeque;
use std::ops::RangeInclusive;

use super::writer::TailChange;
use crate::raft::types::Entry;

/// Most entries kept.
const MAX_ENTRIES: usize = 1024;
/// Most encoded bytes kept; at least the newest entry stays.
const MAX_BYTES: usize = 8 << 20;

/// Consecutive durable entries up to the last one, with their encoded size.
#[derive(Debug, Default)]
pub(crate) struct Tail {
    entries: VecDeque<(Entry, usize)>,
    bytes: usize,
}

impl Tail {
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
                while self.entries.len() > MAX_ENTRIES || (self.bytes > MAX_BYTES && self.entries.len() > 1) {
                    self.drop_first();
                }
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

    /// The entries of `range` up to about `max_bytes` (at least one), when the whole range is held here.
    pub(crate) fn read(&self, range: RangeInclusive<u64>, max_bytes: usize) -> Option<Vec<Entry>> {
        let first = self.entries.front()?.0.log_id.index;
        let last = self.entries.back()?.0.log_id.index;
        if *range.start() < first || *range.end() > last {
            return None;
        }
        let mut bytes = 0usize;
        let mut out = Vec::new();
        for (entry, size) in self.entries.range((range.start() - first) as usize..=(range.end() - first) as usize) {
            bytes = bytes.saturating_add(*size);
            if bytes > max_bytes && !out.is_empty() {
                break;
            }
            out.push(entry.clone());
        }
        Some(out)
    }
}
