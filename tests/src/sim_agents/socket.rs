//! A UDP socket that can be cut off: what is sent is lost, what comes is thrown away, and nobody is told.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Endpoint, EndpointConfig, Runtime as _, TokioRuntime, UdpPoller};

/// Whether a host's network is cut. Shared by all sockets of the host.
pub type Cut = Arc<AtomicBool>;

/// An endpoint to dial from, over such a socket.
pub fn endpoint(cut: &Cut) -> io::Result<Endpoint> {
    let inner = TokioRuntime.wrap_udp_socket(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?)?;
    let socket = Arc::new(Severable { inner, cut: Arc::clone(cut) });
    Endpoint::new_with_abstract_socket(EndpointConfig::default(), None, socket, Arc::new(TokioRuntime))
}

struct Severable {
    inner: Arc<dyn AsyncUdpSocket>,
    cut: Cut,
}

impl fmt::Debug for Severable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Severable").field("cut", &self.cut).finish_non_exhaustive()
    }
}

impl AsyncUdpSocket for Severable {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }
    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if self.cut.load(Ordering::Relaxed) { Ok(()) } else { self.inner.try_send(transmit) }
    }
    fn poll_recv(&self, cx: &mut Context<'_>, bufs: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> Poll<io::Result<usize>> {
        loop {
            let received = self.inner.poll_recv(cx, bufs, meta);
            if received.is_ready() && self.cut.load(Ordering::Relaxed) {
                continue; // thrown away; until there is no more
            }
            return received;
        }
    }
    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }
    // One datagram at a time: quinn keeps a buffer for the most that may come at once, and there are thousands of us.
    fn max_transmit_segments(&self) -> usize {
        1
    }
    fn max_receive_segments(&self) -> usize {
        1
    }
    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}
