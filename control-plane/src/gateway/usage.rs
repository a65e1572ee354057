//! What the nodes connected here use, as their agents last told.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use optimus_common::figures::Change;
use optimus_common::protocol::{ALLOCS_PER_NODE_MAX, Message, VERSION_USAGE};
use optimus_common::usage::{AllocUsage, USAGE_EVERY, USAGE_WATCHED, Usage};
use optimus_common::{AllocId, Figures, Millicores, NodeId, Span, Timestamp};
use optimus_host::transport::{FrameError, FrameReader};
use quinn::Connection;

use super::Shared;

/// Longest frame: all figures of the most copies a node may have.
const FRAME_MAX: usize = 2 << 20;

/// Newest figures of one node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeUsage {
    /// The agent's clock as it measured.
    pub at: Timestamp,
    /// Our monotonic clock as it came.
    pub came: Duration,
    pub host: Measured,
    pub allocs: BTreeMap<AllocId, Measured>,
}

/// Newest figures of one subject.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Measured {
    pub figures: Figures,
    /// CPU between these figures and those before.
    pub cpu: Option<Millicores>,
}

impl Measured {
    fn take(&mut self, changes: &[Change], over: Span) {
        let before = self.figures.cpu_usec;
        self.figures.take(changes);
        self.cpu = before.zip(self.figures.cpu_usec).and_then(|(before, now)| {
            // Microseconds in a millisecond are thousandths of a core.
            let used = now.checked_sub(before)?.checked_div(over.0)?;
            u32::try_from(used).ok().map(Millicores)
        });
    }
}

impl NodeUsage {
    /// False: more copies than a node may have.
    fn take(&mut self, usage: Usage, came: Duration) -> bool {
        let Usage { at, host, allocs, gone } = usage;
        let over = at.since(self.at);
        (self.at, self.came) = (at, came);
        self.host.take(&host, over);
        for alloc in gone {
            self.allocs.remove(&alloc);
        }
        for AllocUsage { alloc, changes } in allocs {
            self.allocs.entry(alloc).or_default().take(&changes, over);
        }
        self.allocs.len() <= 2 * ALLOCS_PER_NODE_MAX
    }
}

/// Of every node with a session here.
#[derive(Default)]
pub struct Usages {
    nodes: Mutex<BTreeMap<NodeId, NodeUsage>>,
    /// Milliseconds of our monotonic clock until which somebody watches.
    watched: AtomicU64,
}

/// Whoever looks is taken to watch for so long.
const WATCHING: Duration = Duration::from_secs(15);

impl Usages {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, NodeUsage>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody looks: agents tell more often for a while.
    pub fn watch(&self, now: Duration) {
        self.watched.fetch_max(u64::try_from((now + WATCHING).as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// How often agents should tell.
    pub fn pace(&self, now: Duration) -> Span {
        if now.as_millis() < u128::from(self.watched.load(Ordering::Relaxed)) { USAGE_WATCHED } else { USAGE_EVERY }
    }

    pub fn all(&self) -> Vec<(NodeId, NodeUsage)> {
        self.lock().iter().map(|(node, usage)| (*node, usage.clone())).collect()
    }

    pub fn forget(&self, node: NodeId) {
        self.lock().remove(&node);
    }
}

/// Reads what an agent tells until its session ends; one of an older version tells nothing.
pub(super) async fn read(shared: &Shared, connection: &Connection, node: NodeId, version: u16) -> Result<(), FrameError> {
    if version < VERSION_USAGE {
        return std::future::pending().await;
    }
    loop {
        let stream = connection.accept_uni().await.map_err(quinn::ReadError::ConnectionLost)?;
        let mut reader = FrameReader::new(stream, FRAME_MAX);
        let mut known = NodeUsage::default(); // a new stream begins with everything
        while let Some(message) = reader.next().await? {
            let Message::Usage(usage) = message else {
                return Err(optimus_common::codec::DecodeError::Payload("another message than usage on its stream".into()).into());
            };
            if !known.take(usage, shared.store.env.clock.monotonic()) {
                return Err(FrameError::TooLong { length: known.allocs.len(), limit: 2 * ALLOCS_PER_NODE_MAX });
            }
            shared.usages.lock().insert(node, known.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn figures_follow_the_changes() {
        let alloc = AllocId(Uuid::from_u128(1));
        let change = |value| vec![Change { figure: 1, value: Some(value) }];
        let told = |value| Usage {
            at: Timestamp(value * 1000),
            host: change(value),
            allocs: vec![AllocUsage { alloc, changes: change(value) }],
            gone: vec![],
        };
        let mut usage = NodeUsage::default();
        assert!(usage.take(told(2_000_000), Duration::from_secs(1)));
        assert_eq!(usage.host.cpu, None, "nothing is known of before");
        let second = Usage { at: Timestamp(2_000_001_000), host: vec![], ..told(2_500_000) };
        assert!(usage.take(second, Duration::from_secs(2)));
        assert_eq!((usage.host.figures.cpu_usec, usage.allocs[&alloc].figures.cpu_usec), (Some(2_000_000), Some(2_500_000)));
        assert_eq!((usage.host.cpu, usage.allocs[&alloc].cpu), (Some(Millicores(0)), Some(Millicores(500))));
        assert!(usage.take(Usage { at: Timestamp(9), host: vec![], allocs: vec![], gone: vec![alloc] }, Duration::from_secs(3)));
        assert_eq!((usage.at, usage.came, usage.allocs.len()), (Timestamp(9), Duration::from_secs(3), 0));
    }

    #[test]
    fn whoever_looks_makes_agents_tell_more_often_for_a_while() {
        let usages = Usages::default();
        let at = Duration::from_secs;
        assert_eq!(usages.pace(at(100)), USAGE_EVERY);
        usages.watch(at(100));
        assert_eq!((usages.pace(at(101)), usages.pace(at(115))), (USAGE_WATCHED, USAGE_EVERY));
    }
}
