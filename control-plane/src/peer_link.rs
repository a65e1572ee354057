//! The way to the other servers, which exists only once this server has an identity.

use std::sync::OnceLock;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;

use crate::identity::Members;
use crate::raft::{Peer, PeerError, PeerRpc, PeerTransport};

/// Given to Raft at its start; reaches nobody before [`PeerLink::connect`].
#[derive(Debug, Default)]
pub struct PeerLink(OnceLock<(std::sync::Arc<dyn PeerTransport>, Members)>);

impl PeerLink {
    /// Sets the transport and the address book. The first call counts.
    pub fn connect(&self, transport: std::sync::Arc<dyn PeerTransport>, members: Members) {
        let _ = self.0.set((transport, members)); // called once, at the server's start
    }
}

impl PeerTransport for PeerLink {
    fn call(&self, to: Peer, kind: PeerRpc, body: Bytes, ttl: Duration) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        let Some((transport, members)) = self.0.get() else {
            return Box::pin(async { Err(PeerError::NotSent("this server is still starting".to_owned())) });
        };
        // A server may have moved since it became a member; where it is, it says itself.
        let addr = members.address(to.id).unwrap_or(to.addr);
        transport.call(Peer { id: to.id, addr }, kind, body, ttl)
    }
}
