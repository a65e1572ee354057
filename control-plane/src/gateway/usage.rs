//! What the nodes connected here use, as their agents last told.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use optimus_common::protocol::{ALLOCS_PER_NODE_MAX, Message, VERSION_USAGE};
use optimus_common::usage::{AllocUsage, Usage};
use optimus_common::{AllocId, Figures, NodeId, Timestamp};
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
    pub host: Figures,
    pub allocs: BTreeMap<AllocId, Figures>,
}

impl NodeUsage {
    /// False: more copies than a node may have.
    fn take(&mut self, usage: Usage, came: Duration) -> bool {
        let Usage { at, host, allocs, gone } = usage;
        (self.at, self.came) = (at, came);
        self.host.take(&host);
        for alloc in gone {
            self.allocs.remove(&alloc);
        }
        for AllocUsage { alloc, changes } in allocs {
            self.allocs.entry(alloc).or_default().take(&changes);
        }
        self.allocs.len() <= 2 * ALLOCS_PER_NODE_MAX
    }
}

/// Of every node with a session here.
#[derive(Default)]
pub struct Usages(Mutex<BTreeMap<NodeId, NodeUsage>>);

impl Usages {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, NodeUsage>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn of(&self, node: NodeId) -> Option<NodeUsage> {
        self.lock().get(&node).cloned()
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
    use optimus_common::figures::Change;
    use uuid::Uuid;

    use super::*;

    #[test]
    fn figures_follow_the_changes() {
        let alloc = AllocId(Uuid::from_u128(1));
        let change = |value| vec![Change { figure: 1, value: Some(value) }];
        let told = |value| Usage {
            at: Timestamp(5),
            host: change(value),
            allocs: vec![AllocUsage { alloc, changes: change(value) }],
            gone: vec![],
        };
        let mut usage = NodeUsage::default();
        assert!(usage.take(told(3), Duration::from_secs(1)));
        assert!(usage.take(Usage { host: vec![], ..told(4) }, Duration::from_secs(2)));
        assert_eq!((usage.host.cpu_usec, usage.allocs[&alloc].cpu_usec), (Some(3), Some(4)));
        assert!(usage.take(Usage { at: Timestamp(9), host: vec![], allocs: vec![], gone: vec![alloc] }, Duration::from_secs(3)));
        assert_eq!((usage.at, usage.came, usage.allocs.len()), (Timestamp(9), Duration::from_secs(3), 0));
    }
}
