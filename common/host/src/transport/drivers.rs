//! Where the tasks that drive QUIC run.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime};
use tokio::runtime::Handle;

/// Everything on the runtime an endpoint was opened on, wherever its connections are made and used.
#[derive(Debug)]
pub(super) struct OpenedOn(Handle);

impl OpenedOn {
    /// The runtime of the caller.
    pub(super) fn current() -> io::Result<Arc<Self>> {
        Handle::try_current().map(|handle| Arc::new(Self(handle))).map_err(io::Error::other)
    }
}

impl Runtime for OpenedOn {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        let _home = self.0.enter();
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        self.0.spawn(future);
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let _home = self.0.enter();
        TokioRuntime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}
