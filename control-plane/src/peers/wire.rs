//! One call on one stream.
//!
//! ```text
//! request:  kind   u8 | length u32 LE | body | end of stream
//! answer:   status u8 | length u32 LE | body | end of stream      (body of a refusal: the reason as text)
//! ```
//! The length stands before the body so that the reader need not wait for the end of the stream, and can tell a body
//! that was cut off. A caller that gives up resets the stream.

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use quinn::{Connection, ConnectionError, ReadError, RecvStream, SendStream, VarInt, WriteError};

use crate::raft::{PeerError, PeerRpc};

/// Longest body of a request or an answer.
pub const BODY_MAX: usize = 64 << 20;
/// Longest body of a part of a snapshot: 4 MiB and its envelope.
pub const PART_MAX: usize = (4 << 20) + (64 << 10);
/// Longest reason in a refusal.
const REASON_MAX: usize = 1 << 10;
const HEAD: usize = 5;
/// Room made for a body before any of it has come; beyond it the room grows with what arrives.
const ROOM: usize = PART_MAX;

/// Longest body of a request of `kind`.
pub(super) fn body_max(kind: PeerRpc) -> usize {
    match kind {
        PeerRpc::Snapshot => PART_MAX,
        PeerRpc::Append | PeerRpc::Vote | PeerRpc::Propose | PeerRpc::ReadIndex | PeerRpc::Transfer | PeerRpc::Leases | PeerRpc::Admin => {
            BODY_MAX
        }
    }
}

/// Streams of a higher number go first where the network is the limit. Zero is quinn's default and costs no call, so it
/// is what the frequent kinds have.
fn priority(kind: PeerRpc) -> i32 {
    match kind {
        PeerRpc::Vote | PeerRpc::Transfer => 1,
        PeerRpc::Append | PeerRpc::ReadIndex => 0,
        PeerRpc::Propose | PeerRpc::Leases | PeerRpc::Admin => -1,
        PeerRpc::Snapshot => -2,
    }
}

/// Why a call came to no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    /// The connection is gone; whether the request arrived is not known.
    #[error("the connection broke")]
    Lost(#[from] ConnectionError),
    /// The other side gave up on this stream.
    #[error("the other side gave up")]
    GivenUp,
    /// What came breaks the protocol.
    #[error("{0}")]
    Violation(String),
}

impl From<ReadError> for Fault {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::ConnectionLost(e) => Fault::Lost(e),
            ReadError::Reset(_) | ReadError::ClosedStream | ReadError::ZeroRttRejected => Fault::GivenUp,
            ReadError::IllegalOrderedRead => Fault::Violation(error.to_string()),
        }
    }
}

impl From<WriteError> for Fault {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::ConnectionLost(e) => Fault::Lost(e),
            WriteError::Stopped(_) | WriteError::ClosedStream | WriteError::ZeroRttRejected => Fault::GivenUp,
        }
    }
}

/// Sends one request and reads its answer. Dropping the future takes the request back, as far as it was not read yet.
pub(super) async fn exchange(connection: &Connection, kind: PeerRpc, body: Bytes) -> Result<Result<Bytes, PeerError>, Fault> {
    let (send, mut receive) = connection.open_bi().await?;
    write(send, kind, kind as u8, body).await?;
    let (status, length, rest) = read_head(&mut receive).await?;
    if length > BODY_MAX {
        return Err(Fault::Violation(format!("an answer of {length} bytes is longer than {BODY_MAX}")));
    }
    let body = read_body(&mut receive, length, rest).await?;
    end(&mut receive)?;
    let reason = || String::from_utf8_lossy(&body).chars().filter(|c| !c.is_control()).take(REASON_MAX).collect::<String>();
    Ok(match status {
        0 => Ok(body),
        1 => Err(PeerError::Refused(reason())),
        2 => Err(PeerError::Stopped(reason())),
        3 => Err(PeerError::Unreachable(reason())),
        4 => Err(PeerError::Timeout),
        other => return Err(Fault::Violation(format!("unknown status {other} of an answer"))),
    })
}

/// Sends the answer to a request of `kind`.
pub(super) async fn reply(send: SendStream, kind: PeerRpc, answer: Result<Bytes, PeerError>) -> Result<(), Fault> {
    let (status, body) = match answer {
        Ok(body) if body.len() > BODY_MAX => {
            (1, Bytes::from(format!("the answer of {} bytes is longer than the {BODY_MAX} that can be sent", body.len())))
        }
        Ok(body) => (0, body),
        Err(PeerError::Refused(reason)) => (1, short(reason)),
        Err(PeerError::Stopped(reason)) => (2, short(reason)),
        Err(PeerError::Unreachable(reason) | PeerError::NotSent(reason)) => (3, short(reason)),
        Err(PeerError::Timeout) => (4, Bytes::new()),
    };
    write(send, kind, status, body).await
}

fn short(reason: String) -> Bytes {
    let mut reason = reason.into_bytes();
    reason.truncate(REASON_MAX); // a character cut in half is replaced by the reader
    reason.into()
}

/// A stream that is reset unless it was written to its end: a plain drop would end it as if it were complete.
struct Sending(Option<SendStream>);

impl Drop for Sending {
    fn drop(&mut self) {
        if let Some(stream) = &mut self.0 {
            let _ = stream.reset(VarInt::from_u32(0)); // ended otherwise: nothing to take back
        }
    }
}

async fn write(send: SendStream, kind: PeerRpc, first: u8, body: Bytes) -> Result<(), Fault> {
    let mut sending = Sending(Some(send));
    let Some(stream) = &mut sending.0 else { return Err(Fault::GivenUp) };
    let priority = priority(kind);
    if priority != 0 {
        stream.set_priority(priority).map_err(|_| Fault::GivenUp)?;
    }
    let length = u32::try_from(body.len()).map_err(|_| Fault::Violation(format!("a body of {} bytes cannot be sent", body.len())))?;
    let mut head = [0u8; HEAD];
    head[0] = first;
    head[1..].copy_from_slice(&length.to_le_bytes());
    let head = Bytes::copy_from_slice(&head);
    // Both at once, and neither copied: they leave in one packet.
    if body.is_empty() {
        stream.write_chunk(head).await?;
    } else {
        stream.write_all_chunks(&mut [head, body]).await?;
    }
    stream.finish().map_err(|_| Fault::GivenUp)?;
    sending.0 = None;
    Ok(())
}

fn cut_off() -> Fault {
    Fault::Violation("the stream ended inside a message".to_owned())
}

/// The first byte, the length, and what came of the body with them.
pub(super) async fn read_head(receive: &mut RecvStream) -> Result<(u8, usize, Bytes), Fault> {
    let mut chunk = receive.read_chunk(usize::MAX, true).await?.ok_or_else(cut_off)?.bytes;
    if chunk.len() < HEAD {
        let mut head = BytesMut::with_capacity(HEAD);
        head.extend_from_slice(&chunk);
        while head.len() < HEAD {
            let more = receive.read_chunk(HEAD - head.len(), true).await?.ok_or_else(cut_off)?;
            head.extend_from_slice(&more.bytes);
        }
        chunk = head.freeze();
    }
    let length = u32::from_le_bytes([chunk[1], chunk[2], chunk[3], chunk[4]]) as usize;
    Ok((chunk[0], length, chunk.slice(HEAD..)))
}

/// The body. One that came in one piece is not copied.
pub(super) async fn read_body(receive: &mut RecvStream, length: usize, rest: Bytes) -> Result<Bytes, Fault> {
    let too_much = || Fault::Violation(format!("more came than the {length} bytes announced"));
    if rest.len() > length {
        return Err(too_much());
    }
    if rest.len() == length {
        return Ok(rest);
    }
    let mut body = BytesMut::with_capacity(length.min(ROOM));
    body.extend_from_slice(&rest);
    drop(rest);
    while body.len() < length {
        let chunk = receive.read_chunk(length - body.len(), true).await?.ok_or_else(cut_off)?;
        body.extend_from_slice(&chunk.bytes);
    }
    Ok(body.freeze())
}

/// After the body nothing may come but the end. It usually is there already; if not, nobody waits for it.
pub(super) fn end(receive: &mut RecvStream) -> Result<(), Fault> {
    match receive.read_chunk(1, true).now_or_never() {
        Some(Ok(Some(_))) => Err(Fault::Violation("more came than was announced".to_owned())),
        Some(Ok(None) | Err(_)) | None => Ok(()),
    }
}
