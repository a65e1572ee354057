//! Farewells of a server that cannot remember whom it talked to.
//!
//! A server that was killed and started again gets packets of connections it knows nothing of. QUIC lets it answer them
//! with a reset, if it can show the token it once gave for that connection. With a key that outlives the process, agents
//! and other servers dial anew at their next packet instead of after their idle timeout.

use std::net::SocketAddr;
use std::sync::Arc;

use quinn::crypto::{CryptoError, HmacKey};
use quinn::{Endpoint, EndpointConfig};
use quinn_proto::HashedConnectionIdGenerator;

use super::drivers::OpenedOn;

/// Opens `address` for those who dial. All its connections are driven on the caller's runtime. `secret`: the same at every start of this server, and no other server's; whoever
/// knows it can end connections.
pub fn server_endpoint(config: quinn::ServerConfig, address: SocketAddr, secret: &[u8; 32]) -> std::io::Result<Endpoint> {
    let key = blake3::derive_key("optimus QUIC stateless reset 1", secret);
    // Connection ids carry a check value, so that junk gets no answer. It must outlive the process as well.
    let ids = blake3::derive_key("optimus QUIC connection id 1", secret);
    let ids = u64::from_le_bytes(*ids.first_chunk().expect("32 bytes hold 8"));
    let mut endpoint = EndpointConfig::new(Arc::new(ResetKey(key)));
    endpoint.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids)));
    let socket = std::net::UdpSocket::bind(address)?;
    receive_buffer(&socket);
    Endpoint::new(endpoint, Some(config), socket, OpenedOn::current()?)
}

/// Room for packets that came while this process did something else. A small packet takes about 1 KiB of it, so the
/// kernel's own 208 KiB lose packets of a thousand agents that answer at once, and a busy server takes them for lost. Many
/// times more was seen to fill with snapshots of other servers, and heartbeats waited in it.
const RECEIVE_BUFFER: usize = 1 << 20;

/// Asks for [`RECEIVE_BUFFER`]; without privileges the kernel gives what the host allows.
fn receive_buffer(socket: &std::net::UdpSocket) {
    use rustix::net::sockopt::{set_socket_recv_buffer_size, set_socket_recv_buffer_size_force};
    let set = set_socket_recv_buffer_size_force(socket, RECEIVE_BUFFER).or_else(|_| set_socket_recv_buffer_size(socket, RECEIVE_BUFFER));
    if let Err(error) = set {
        tracing::warn!(%error, "the receive buffer stays as small as it is: with many agents packets are lost");
    }
}

struct ResetKey([u8; 32]);

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        blake3::Hasher::new_keyed(&self.0).update(data).finalize_xof().fill(signature_out);
    }
    fn signature_len(&self) -> usize {
        blake3::OUT_LEN
    }
    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        let signature: [u8; blake3::OUT_LEN] = signature.try_into().map_err(|_| CryptoError)?;
        // The comparison of blake3's hashes takes constant time.
        if blake3::keyed_hash(&self.0, data) == blake3::Hash::from_bytes(signature) { Ok(()) } else { Err(CryptoError) }
    }
}
