//! Servers in one process that reach each other without a network: for tests and demonstrations.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use super::super::{Machine, RaftNode};
use super::{Peer, PeerError, PeerRpc, PeerTransport};

type Handler = Arc<dyn Fn(u64, PeerRpc, Bytes) -> BoxFuture<'static, Result<Bytes, PeerError>> + Send + Sync>;

#[derive(Default)]
struct Wires {
    nodes: BTreeMap<u64, Handler>,
    cut: BTreeSet<(u64, u64)>,
    frozen: BTreeSet<u64>,
}

/// The wires between all servers of one process; cheap to clone.
#[derive(Clone, Default)]
pub struct MemoryNetwork(Arc<Mutex<Wires>>);

impl fmt::Debug for MemoryNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MemoryNetwork({:?})", self.lock().nodes.keys())
    }
}

impl MemoryNetwork {
    /// Wires without servers.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Wires> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The transport of server `id`.
    pub fn transport(&self, id: u64) -> Arc<dyn PeerTransport> {
        Arc::new(End { from: id, network: self.clone() })
    }

    /// Lets the others reach `node`.
    pub fn connect<M: Machine>(&self, node: &RaftNode<M>) {
        let (id, node) = (node.id(), node.clone());
        let handler: Handler = Arc::new(move |from, kind, body| {
            let node = node.clone();
            Box::pin(async move { node.handle_peer_rpc(from, kind, body).await })
        });
        self.lock().nodes.insert(id, handler);
    }

    /// Takes server `id` away.
    pub fn disconnect(&self, id: u64) {
        self.lock().nodes.remove(&id);
    }

    /// Cuts the wire from `a` to `b`, in this direction only.
    pub fn cut(&self, a: u64, b: u64) {
        self.lock().cut.insert((a, b));
    }

    /// Server `id` takes requests and never answers, as a stopped process does; what it sends goes nowhere.
    pub fn freeze(&self, id: u64) {
        self.lock().frozen.insert(id);
    }

    /// Mends all cuts and thaws all servers; requests taken meanwhile stay unanswered.
    pub fn heal(&self) {
        let mut wires = self.lock();
        wires.cut.clear();
        wires.frozen.clear();
    }
}

#[derive(Debug)]
struct End {
    from: u64,
    network: MemoryNetwork,
}

impl PeerTransport for End {
    fn call(&self, to: Peer, kind: PeerRpc, body: Bytes, _ttl: Duration) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        let (from, network) = (self.from, self.network.clone());
        Box::pin(async move {
            let is_cut = |a, b| network.lock().cut.contains(&(a, b));
            let not_sent = |why: String| Err(PeerError::NotSent(why));
            if is_cut(from, to.id) {
                return not_sent(format!("the wire from {from} to {} is cut", to.id));
            }
            let Some(handler) = network.lock().nodes.get(&to.id).cloned() else {
                return not_sent(format!("server {} is down", to.id));
            };
            if [from, to.id].iter().any(|id| network.lock().frozen.contains(id)) {
                return std::future::pending().await;
            }
            let answer = handler(from, kind, body).await?;
            // The answer takes the wire back, which may be cut although the request arrived.
            if is_cut(to.id, from) {
                return Err(PeerError::Unreachable(format!("the wire from {} to {from} is cut", to.id)));
            }
            Ok(answer)
        })
    }
}
