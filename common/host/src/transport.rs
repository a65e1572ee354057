//! QUIC as agents and servers speak it: the tuning, the limits, and the one place that reads and writes frames.
//!
//! Windows are a quarter of quinn's defaults' memory at rest and enough for a desired set; no buffer is
//! held while a stream is idle, since a server has thousands of them.

mod drivers;
mod reset;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use optimus_common::codec::{self, DecodeError, FRAME_HEAD, FRAME_MAX};
use optimus_common::protocol::{Message, Refused};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClosedStream, ConnectionError, ReadError, RecvStream, SendStream, TransportConfig, VarInt, WriteError};

pub use self::reset::server_endpoint;

/// Each side proves it is there this often.
pub const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// A connection on which nothing was heard for so long is dead.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time from the first packet to the end of the handshake, and again to the first frame.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest frame before the other side has shown who it is, and its greeting.
pub const GREETING_MAX: usize = 256 << 10;
/// Streams an agent may have open to a server.
pub const STREAMS_TO_SERVER: u32 = 4;
/// Streams a server may have open to one agent: requests for logs. Further ones wait.
pub const STREAMS_TO_AGENT: u32 = 32;
/// Handshakes quinn holds for us before it drops packets of new ones.
pub const INCOMING_MAX: usize = 1024;

const STREAM_WINDOW: u32 = 256 << 10;
/// Room for every stream's window: logs that nobody reads fill theirs, and must not stop the control
/// stream. Costs memory only while data waits.
const CONNECTION_WINDOW: u32 = (STREAMS_TO_AGENT + STREAMS_TO_SERVER + 1) * STREAM_WINDOW;
const SEND_WINDOW: u64 = 1 << 20;
/// First guess of an agent's round trip: a lost first packet is sent again after three of them, so an
/// agent that knocks while its server starts is let in soon after.
const INITIAL_RTT: Duration = Duration::from_millis(100);
/// Payload read at once; also what a frame's buffer starts with, however long the frame claims to be.
const READ_STEP: usize = 64 << 10;

/// How servers prove to each other that they are there.
pub const PEER_KEEP_ALIVE: Duration = Duration::from_secs(1);
/// A server not heard by another for so long is gone; callers that wait for answers notice sooner.
pub const PEER_IDLE_TIMEOUT: Duration = Duration::from_secs(3);
/// Requests to agents one server may have under way through another. Further ones wait.
pub const RELAY_STREAMS: u32 = 64;
/// Calls one server may have open at another. Further ones wait.
pub const PEER_STREAMS: u32 = 128;
/// Servers are near each other: a lost first packet is sent again after three of these.
const PEER_INITIAL_RTT: Duration = Duration::from_millis(20);
/// A batch of entries leaves within two round trips on a fresh connection too. More overflows the socket at the other end.
const PEER_INITIAL_WINDOW: u64 = 64 << 10;
/// What waits to be sent to one server. All bodies of the calls that can be under way belong in here: a snapshot that
/// filled the window would hold up heartbeats behind it. Costs memory only while data waits.
const PEER_SEND_WINDOW: u64 = 256 << 20;

/// Codes with which we close a connection; the text beside them is for people.
pub mod close {
    /// Done.
    pub const DONE: u32 = 0;
    /// The peer is not let in; the text is `CODE message`.
    pub const REFUSED: u32 = 1;
    /// The peer broke the protocol.
    pub const PROTOCOL: u32 = 2;
    /// A newer session of the same node has taken over.
    pub const REPLACED: u32 = 3;
    /// This side is stopping, or not the one to talk to at the moment.
    pub const GOING_AWAY: u32 = 4;
    /// Not heard for longer than the lease.
    pub const SILENT: u32 = 5;
}

/// Which end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Server,
    Agent,
}

/// An agent's stream of what it uses, and the one that takes its place.
const UNI_STREAMS_TO_SERVER: u32 = 2;

/// Why QUIC cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    #[error("TLS settings do not fit QUIC")]
    Tls(#[source] quinn::crypto::rustls::NoInitialCipherSuite),
    #[error("failed to open UDP {address}")]
    Bind {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
}

/// The tuned transport of one side.
pub fn transport(side: Side) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
        .send_window(SEND_WINDOW)
        .max_concurrent_bidi_streams(VarInt::from_u32(match side {
            Side::Server => STREAMS_TO_SERVER,
            Side::Agent => STREAMS_TO_AGENT,
        }))
        .max_concurrent_uni_streams(VarInt::from_u32(match side {
            Side::Server => UNI_STREAMS_TO_SERVER,
            Side::Agent => 0,
        }))
        .datagram_receive_buffer_size(None)
        .initial_rtt(INITIAL_RTT)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(Some(IDLE_TIMEOUT.try_into().expect("ten seconds fit a QUIC timeout")));
    Arc::new(config)
}

/// A server's QUIC settings around its TLS settings.
pub fn server_config(tls: rustls::ServerConfig) -> Result<quinn::ServerConfig, SetupError> {
    let crypto = QuicServerConfig::try_from(tls).map_err(SetupError::Tls)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config
        .transport_config(transport(Side::Server))
        .max_incoming(INCOMING_MAX)
        .incoming_buffer_size(64 << 10) // a client hello with room; the rest of a handshake comes after we accept
        .incoming_buffer_size_total(16 << 20);
    Ok(config)
}

/// An agent's QUIC settings around its TLS settings.
pub fn client_config(tls: rustls::ClientConfig) -> Result<quinn::ClientConfig, SetupError> {
    let crypto = QuicClientConfig::try_from(tls).map_err(SetupError::Tls)?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(transport(Side::Agent));
    Ok(config)
}

/// QUIC settings of a server that dials another one, around its TLS settings.
pub fn peer_config(tls: rustls::ClientConfig) -> Result<quinn::ClientConfig, SetupError> {
    between_servers(tls, 4 * STREAM_WINDOW, 64 * STREAM_WINDOW)
}

/// The same for requests that are passed on: an answer nobody reads fills its own window and holds up no other.
pub fn relay_config(tls: rustls::ClientConfig) -> Result<quinn::ClientConfig, SetupError> {
    between_servers(tls, STREAM_WINDOW, RELAY_STREAMS * STREAM_WINDOW)
}

fn between_servers(tls: rustls::ClientConfig, stream_window: u32, window: u32) -> Result<quinn::ClientConfig, SetupError> {
    let crypto = QuicClientConfig::try_from(tls).map_err(SetupError::Tls)?;
    let mut congestion = quinn::congestion::CubicConfig::default();
    congestion.initial_window(PEER_INITIAL_WINDOW);
    let mut transport = TransportConfig::default();
    transport
        .congestion_controller_factory(Arc::new(congestion))
        .stream_receive_window(VarInt::from_u32(stream_window))
        .receive_window(VarInt::from_u32(window))
        .send_window(PEER_SEND_WINDOW)
        .max_concurrent_bidi_streams(VarInt::from_u32(0)) // calls go one way
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .initial_rtt(PEER_INITIAL_RTT)
        .keep_alive_interval(Some(PEER_KEEP_ALIVE))
        .max_idle_timeout(Some(PEER_IDLE_TIMEOUT.try_into().expect("three seconds fit a QUIC timeout")));
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport));
    Ok(config)
}

/// A UDP socket to dial from: IPv6 and IPv4 where the host has both.
pub fn client_endpoint() -> Result<quinn::Endpoint, SetupError> {
    let v6 = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0);
    quinn::Endpoint::client(v6).or_else(|_| {
        let v4 = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
        quinn::Endpoint::client(v4).map_err(|source| SetupError::Bind { address: v4, source })
    })
}

/// Why a frame was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("the stream ended inside a frame")]
    CutOff,
    #[error("frame of {length} bytes is longer than the {limit} taken here")]
    TooLong { length: usize, limit: usize },
    #[error("the other side sent what is no frame")]
    Decode(#[from] DecodeError),
    #[error("the stream broke")]
    Read(#[from] ReadError),
    #[error("the stream broke")]
    Write(#[from] WriteError),
    #[error("the stream was closed")]
    Closed(#[from] ClosedStream),
}

impl FrameError {
    /// True when the other side broke the protocol, as opposed to the connection having gone.
    pub fn is_violation(&self) -> bool {
        match self {
            FrameError::CutOff | FrameError::TooLong { .. } | FrameError::Decode(_) => true,
            FrameError::Read(_) | FrameError::Write(_) | FrameError::Closed(_) => false,
        }
    }

    /// Why the connection is gone, if that is the cause.
    pub fn connection(&self) -> Option<&ConnectionError> {
        match self {
            FrameError::Read(ReadError::ConnectionLost(e)) | FrameError::Write(WriteError::ConnectionLost(e)) => Some(e),
            _ => None,
        }
    }
}

/// Reads frames from a stream.
#[derive(Debug)]
pub struct FrameReader {
    stream: RecvStream,
    limit: usize,
}

impl FrameReader {
    /// `limit`: longest payload taken.
    pub fn new(stream: RecvStream, limit: usize) -> Self {
        FrameReader { stream, limit: limit.min(FRAME_MAX) }
    }

    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit.min(FRAME_MAX);
    }

    /// The next message; `None` at the end of the stream. Not cancel-safe: a frame may be half read.
    pub async fn next(&mut self) -> Result<Option<Message>, FrameError> {
        let mut head = [0u8; FRAME_HEAD];
        let mut have = 0;
        while have < FRAME_HEAD {
            match self.stream.read(&mut head[have..]).await? {
                Some(n) => have += n,
                None if have == 0 => return Ok(None),
                None => return Err(FrameError::CutOff),
            }
        }
        let (kind, version, length) = codec::frame_head(head)?;
        if length > self.limit {
            return Err(FrameError::TooLong { length, limit: self.limit });
        }
        // Grows with what arrives: a claim of 8 MiB costs its sender 8 MiB.
        let mut payload = Vec::with_capacity(length.min(READ_STEP));
        while payload.len() < length {
            match self.stream.read_chunk((length - payload.len()).min(READ_STEP), true).await? {
                Some(chunk) => payload.extend_from_slice(&chunk.bytes),
                None => return Err(FrameError::CutOff),
            }
        }
        Ok(Some(Message::decode(kind, version, &payload)?))
    }

    /// Tells the sender that no more is wanted.
    pub fn stop(&mut self) {
        let _ = self.stream.stop(VarInt::from_u32(close::DONE)); // already ended: nothing to stop
    }
}

/// Writes frames to a stream.
#[derive(Debug)]
pub struct FrameWriter {
    stream: SendStream,
}

impl FrameWriter {
    pub fn new(stream: SendStream) -> Self {
        FrameWriter { stream }
    }

    /// Waits while the other side reads too slowly. Not cancel-safe.
    pub async fn send(&mut self, message: impl Into<Message>) -> Result<(), FrameError> {
        self.send_encoded(&message.into().encode()).await
    }

    /// Sends a frame that was encoded before.
    pub async fn send_encoded(&mut self, frame: &[u8]) -> Result<(), FrameError> {
        let length = frame.len().saturating_sub(4);
        if length > FRAME_MAX {
            return Err(FrameError::TooLong { length, limit: FRAME_MAX });
        }
        self.stream.write_all(frame).await?;
        Ok(())
    }

    /// Ends the stream; what was written is still delivered.
    pub fn finish(&mut self) -> Result<(), FrameError> {
        Ok(self.stream.finish()?)
    }

    /// Resolves when the other side wants no more or has everything of a finished stream.
    pub async fn stopped(&self) {
        let _ = self.stream.stopped().await; // a lost connection ends the wait too
    }
}

/// Sends a refusal, gives it a moment to arrive and closes the connection with the same words.
pub async fn refuse(connection: &quinn::Connection, writer: Option<&mut FrameWriter>, refused: Refused) {
    const ARRIVAL: Duration = Duration::from_secs(1);
    let text = format!("{} {}", refused.code, refused.message);
    if let Some(writer) = writer {
        let sent = async {
            writer.send(refused).await?;
            writer.finish()?;
            writer.stopped().await;
            Ok::<_, FrameError>(())
        };
        let _ = tokio::time::timeout(ARRIVAL, sent).await; // the close below says the same
    }
    connection.close(VarInt::from_u32(close::REFUSED), text.as_bytes());
}

/// Says in a sentence why a connection ended or never came to be.
pub fn explain(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ApplicationClosed(frame) => {
            let text: String = String::from_utf8_lossy(&frame.reason).chars().filter(|c| !c.is_control()).take(512).collect();
            if text.is_empty() { format!("closed by the other side, code {}", frame.error_code) } else { text }
        }
        ConnectionError::ConnectionClosed(frame) => match alert(u64::from(frame.error_code)) {
            Some(text) => format!("the other side refused the handshake: {text}"),
            None => format!("refused by the other side: {frame}"),
        },
        ConnectionError::TransportError(e) => e.reason.clone(),
        ConnectionError::TimedOut => "nothing heard for too long".to_owned(),
        other => other.to_string(),
    }
}

/// Words for a TLS alert inside a QUIC error code (RFC 9001, section 4.8).
fn alert(code: u64) -> Option<&'static str> {
    Some(match code.checked_sub(0x100)? {
        42 => "bad certificate",
        43 => "unsupported certificate",
        44 => "certificate revoked",
        45 => "certificate expired or not yet valid (check both clocks)",
        46 => "certificate not acceptable",
        48 => "certificate of another cluster (its CA is not known here)",
        51 => "certificate with a wrong signature (of another cluster)",
        112 => "server name not known",
        116 => "certificate required",
        120 => "no common protocol (is it an Optimus server of this version?)",
        _ => return None,
    })
}
