//! The keys on record, for handshakes: those of the other servers, and those of the nodes in the replicated state.

use std::fmt;
use std::sync::Arc;

use optimus_common::NodeId;
use optimus_host::tls::PinnedKeys;

use crate::store::Store;

/// Asked in every handshake. A node without a row (removed, or never joined) has no key here.
pub struct KnownKeys {
    servers: Arc<dyn PinnedKeys>,
    store: Store,
}

impl KnownKeys {
    pub fn new(servers: Arc<dyn PinnedKeys>, store: Store) -> Arc<Self> {
        Arc::new(KnownKeys { servers, store })
    }
}

impl fmt::Debug for KnownKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KnownKeys")
    }
}

impl PinnedKeys for KnownKeys {
    fn key_of(&self, server: u64) -> Option<[u8; 32]> {
        self.servers.key_of(server)
    }

    fn key_of_node(&self, node: NodeId) -> Option<[u8; 32]> {
        self.store.state().nodes.get(&node)?.key_fingerprint.as_slice().try_into().ok()
    }
}
