//! Whether another server still answers, asked without belonging to the cluster.

use std::future::Future;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::pin::Pin;
use std::time::Duration;

use crate::raft::Peer;

/// Asks whether a server can be reached.
pub trait Reach: Send + Sync {
    /// True when anything at the server's address answers. Bounded in time by itself.
    fn reaches(&self, peer: &Peer) -> Pin<Box<dyn Future<Output = bool> + Send + '_>>;
}

/// Knocks with a QUIC packet of a version nobody speaks: every QUIC server answers that with the versions it knows,
/// before any certificate or key comes into it.
#[derive(Debug, Clone, Copy)]
pub struct QuicKnock {
    /// Tries; a datagram may be lost.
    pub tries: u32,
    /// How long each try waits.
    pub wait: Duration,
}

impl Default for QuicKnock {
    fn default() -> Self {
        Self { tries: 4, wait: Duration::from_millis(500) }
    }
}

/// A datagram below this size is not answered (RFC 9000, 14.1).
const INITIAL_MIN: usize = 1200;
/// A version reserved to provoke a negotiation (RFC 9000, 15).
const NO_VERSION: [u8; 4] = [0x1a, 0x2a, 0x3a, 0x4a];
const CONNECTION_ID: [u8; 8] = *b"optimus?";

impl Reach for QuicKnock {
    fn reaches(&self, peer: &Peer) -> Pin<Box<dyn Future<Output = bool> + Send + '_>> {
        let (knock, addr) = (*self, peer.addr.clone());
        Box::pin(async move {
            let resolved = tokio::task::spawn_blocking(move || addr.to_socket_addrs().map(Iterator::collect::<Vec<_>>)).await;
            let Ok(Ok(addresses)) = resolved else { return false };
            for address in addresses {
                for _ in 0..knock.tries {
                    if knock.once(address).await.unwrap_or(false) {
                        return true;
                    }
                }
            }
            false
        })
    }
}

impl QuicKnock {
    async fn once(&self, to: SocketAddr) -> std::io::Result<bool> {
        let any: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { (std::net::Ipv6Addr::UNSPECIFIED, 0).into() };
        let socket = tokio::net::UdpSocket::bind(any).await?;
        socket.connect(to).await?;
        socket.send(&packet()).await?;
        let mut answer = [0; 2048];
        match tokio::time::timeout(self.wait, socket.recv(&mut answer)).await {
            Ok(Ok(n)) => Ok(is_negotiation(&answer[..n])),
            // Refused by the host (nobody listens), or silence.
            Ok(Err(_)) | Err(_) => Ok(false),
        }
    }
}

fn packet() -> Vec<u8> {
    let mut packet = vec![0xc0];
    packet.extend_from_slice(&NO_VERSION);
    for id in [CONNECTION_ID, CONNECTION_ID] {
        packet.push(id.len() as u8);
        packet.extend_from_slice(&id);
    }
    packet.resize(INITIAL_MIN, 0);
    packet
}

/// Version negotiation (version 0) that carries our connection id back.
fn is_negotiation(answer: &[u8]) -> bool {
    answer.len() > 14 && answer[0] & 0x80 != 0 && answer[1..5] == [0; 4] && answer[5] as usize == 8 && answer[6..14] == CONNECTION_ID
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn peer(addr: String) -> Peer {
        Peer { id: 2, addr }
    }

    #[tokio::test]
    async fn a_quic_server_answers_and_silence_does_not() {
        let certificate = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
        let key = rustls_pki_types::PrivateKeyDer::Pkcs8(certificate.signing_key.serialize_der().into());
        let tls = rustls::ServerConfig::builder_with_provider(optimus_host::tls::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.cert.der().clone()], key)
            .unwrap();
        let tls = quinn::crypto::rustls::QuicServerConfig::try_from(tls).unwrap();
        let config = quinn::ServerConfig::with_crypto(std::sync::Arc::new(tls));
        let endpoint = quinn::Endpoint::server(config, "127.0.0.1:0".parse().unwrap()).unwrap();
        let addr = endpoint.local_addr().unwrap();
        let knock = QuicKnock { tries: 3, wait: Duration::from_millis(500) };
        assert!(knock.reaches(&peer(addr.to_string())).await);
        assert!(knock.reaches(&peer(format!("localhost:{}", addr.port()))).await);
        endpoint.close(0u32.into(), b"");
        drop(endpoint);

        // A socket that swallows everything, and one that echoes: neither is a server.
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let hasty = QuicKnock { tries: 1, wait: Duration::from_millis(200) };
        assert!(!hasty.reaches(&peer(silent.local_addr().unwrap().to_string())).await);
        let echo = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let to = echo.local_addr().unwrap().to_string();
        let echoing = tokio::spawn(async move {
            let mut bytes = [0; 2048];
            let (n, from) = echo.recv_from(&mut bytes).await.unwrap();
            echo.send_to(&bytes[..n], from).await.unwrap();
        });
        assert!(!hasty.reaches(&peer(to)).await);
        echoing.await.unwrap();
        assert!(!hasty.reaches(&peer("no.such.host.invalid:1".into())).await);
    }
}
