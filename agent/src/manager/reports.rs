//! What is still to be told to the control plane.
//!
//! Workers publish the status of their allocation; only the latest of each waits, so what waits is bounded by the
//! number of allocations however long no server is there.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use optimus_common::AllocId;
use optimus_common::protocol::{ALLOCS_PER_NODE_MAX, AllocStatus, Blob, Report};
use tokio::sync::Notify;

/// Forgotten allocations that are told again in a full report; the oldest are dropped.
const GONE_MAX: usize = ALLOCS_PER_NODE_MAX;

#[derive(Default)]
struct Inner {
    generation: u64,
    statuses: BTreeMap<AllocId, AllocStatus>,
    changed: BTreeSet<AllocId>,
    gone: VecDeque<AllocId>,
    gone_untold: Vec<AllocId>,
}

/// The latest status of every allocation, and which of them the server has not been told.
#[derive(Default)]
pub struct Reports {
    inner: Mutex<Inner>,
    wake: Notify,
    /// High part of the next status number.
    epoch: u64,
}

impl Reports {
    /// `epoch` is larger than that of every agent before on this node.
    pub fn new(epoch: u64) -> Self {
        Reports { epoch, ..Reports::default() }
    }
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes a status if it differs from the last one, and gives it its number. True if it did.
    pub fn publish(&self, status: &mut AllocStatus) -> bool {
        let mut inner = self.lock();
        let before = inner.statuses.get(&status.id);
        if before.is_some_and(|b| AllocStatus { seq: status.seq, ..b.clone() } == *status) {
            return false;
        }
        // Numbers of this agent start above all of the last one's: epochs are milliseconds, and none sees 4096 changes
        // of one status in each. They stay below 2^53, what a JSON reader can hold, until 2039.
        let floor = self.epoch << 12;
        status.seq = before.map_or(floor, |b| b.seq + 1).max(floor);
        inner.changed.insert(status.id);
        inner.statuses.insert(status.id, status.clone());
        drop(inner);
        self.wake.notify_one();
        true
    }

    pub fn status(&self, alloc: AllocId) -> Option<AllocStatus> {
        self.lock().statuses.get(&alloc).cloned()
    }

    /// The allocation is stopped, cleaned up and no longer wanted.
    pub fn forget(&self, alloc: AllocId) {
        let mut inner = self.lock();
        inner.statuses.remove(&alloc);
        inner.changed.remove(&alloc);
        inner.gone_untold.push(alloc);
        inner.gone.push_back(alloc);
        if inner.gone.len() > GONE_MAX {
            inner.gone.pop_front();
        }
        let surplus = inner.gone_untold.len().saturating_sub(GONE_MAX);
        inner.gone_untold.drain(..surplus);
        drop(inner);
        self.wake.notify_one();
    }

    /// The generation all work is for; a change of it is worth a report.
    pub fn set_generation(&self, generation: u64) {
        self.lock().generation = generation;
    }

    pub fn full(&self) -> Report {
        let mut inner = self.lock();
        inner.changed.clear();
        inner.gone_untold.clear();
        Report {
            generation: inner.generation,
            statuses: inner.statuses.values().map(Blob::of).collect(),
            gone: inner.gone.iter().copied().collect(),
        }
    }

    /// Waits for a change. Cancel-safe: nothing is taken before it is returned.
    pub async fn next(&self) -> Report {
        loop {
            let woken = self.wake.notified();
            if let Some(report) = self.take() {
                return report;
            }
            woken.await;
        }
    }

    fn take(&self) -> Option<Report> {
        let mut inner = self.lock();
        let Inner { generation, statuses, changed, gone_untold, gone: _ } = &mut *inner;
        if changed.is_empty() && gone_untold.is_empty() {
            return None;
        }
        let statuses = std::mem::take(changed).iter().filter_map(|id| statuses.get(id)).map(Blob::of).collect();
        Some(Report { generation: *generation, statuses, gone: std::mem::take(gone_untold) })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use optimus_common::protocol::Phase;

    use super::*;

    fn status(n: u128, phase: Phase) -> AllocStatus {
        AllocStatus { phase, ..AllocStatus::unknown(AllocId(uuid::Uuid::from_u128(n))) }
    }

    #[tokio::test]
    async fn only_the_latest_change_of_each_waits_and_numbers_grow() {
        let reports = Reports::new(3);
        assert!(reports.publish(&mut status(1, Phase::Starting)));
        assert!(reports.publish(&mut status(2, Phase::Starting)));
        assert!(reports.publish(&mut status(1, Phase::Running)));
        assert!(!reports.publish(&mut status(1, Phase::Running)), "nothing changed");
        let report = reports.next().await;
        let got: Vec<AllocStatus> = report.statuses.iter().map(|b| b.open().unwrap()).collect();
        assert_eq!(got.iter().map(|s| s.phase).collect::<Vec<_>>(), [Phase::Running, Phase::Starting]);
        assert_eq!(got[0].seq, (3 << 12) + 1);
        assert!(reports.take().is_none());
        reports.forget(got[1].id);
        assert_eq!(reports.next().await.gone, [got[1].id]);
        let full = reports.full();
        assert_eq!((full.statuses.len(), full.gone.len()), (1, 1));
    }

    #[tokio::test]
    async fn a_cancelled_wait_loses_nothing() {
        let reports = Reports::new(1);
        let waited = tokio::time::timeout(std::time::Duration::from_millis(5), reports.next()).await;
        assert!(waited.is_err());
        reports.publish(&mut status(1, Phase::Running));
        assert_eq!(reports.next().await.statuses.len(), 1);
    }
}
