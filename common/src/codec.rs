//! Bytes on the wire and on disk: the only place that knows bincode.
//!
//! **Wire** ([`frame`]): `length u32 LE | kind u16 LE | version u16 LE | payload`, payload in bincode 2
//! (standard configuration). The length counts what follows it. Trailing bytes are refused. A kind and
//! version never change their meaning: a changed struct gets a new version, released versions leave
//! golden bytes in `tests/golden/`.
//!
//! **Disk** ([`envelope`]): `magic "OPT1" | kind u16 | version u16 | length u32 | payload | crc32`, payload
//! in MessagePack with field names, so that fields may be added with a default.

use bincode::config;
use serde::{Serialize, de::DeserializeOwned};

/// Longest frame either side accepts. A desired set of 1,000 allocations is well below it.
pub const FRAME_MAX: usize = 8 << 20;
/// Bytes before the payload of a frame.
pub const FRAME_HEAD: usize = 8;
/// Longest payload of a stored record.
pub const ENVELOPE_MAX: usize = 256 << 20;

const MAGIC: &[u8; 4] = b"OPT1";
const ENVELOPE_HEAD: usize = 12;

/// Why bytes are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("frame of {length} bytes is longer than the limit of {FRAME_MAX}")]
    TooLong { length: usize },
    #[error("unknown message: kind {kind} version {version}")]
    Unknown { kind: u16, version: u16 },
    #[error("malformed payload: {0}")]
    Payload(String),
    #[error("{0} bytes after the end of the payload")]
    Trailing(usize),
    #[error("record is {found} bytes long, {needed} needed")]
    Truncated { found: usize, needed: usize },
    #[error("record does not start with the magic bytes")]
    Magic,
    #[error("checksum mismatch: stored {stored:08x}, computed {computed:08x}")]
    Checksum { stored: u32, computed: u32 },
}

/// Encodes the bincode payload of a wire message.
pub fn to_wire<T: Serialize>(value: &T) -> Vec<u8> {
    bincode::serde::encode_to_vec(value, config::standard()).expect("wire types hold no map without a length and no untagged value")
}

/// Decodes the bincode payload of a wire message; bytes left over are an error.
pub fn from_wire<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    // The limit bounds what a hostile length prefix can make us allocate.
    let limited = config::standard().with_limit::<FRAME_MAX>();
    let (value, used) = bincode::serde::decode_from_slice(bytes, limited).map_err(|e| DecodeError::Payload(e.to_string()))?;
    if used != bytes.len() {
        return Err(DecodeError::Trailing(bytes.len() - used));
    }
    Ok(value)
}

/// A whole frame: head and payload.
pub fn frame<T: Serialize>(kind: u16, version: u16, value: &T) -> Vec<u8> {
    let payload = to_wire(value);
    let mut out = Vec::with_capacity(FRAME_HEAD + payload.len());
    out.extend_from_slice(&(payload.len() as u32 + 4).to_le_bytes());
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&version.to_le_bytes());
    out.extend_from_slice(&payload);
    out
}

/// Reads a frame's head: kind, version and the number of payload bytes that follow.
pub fn frame_head(head: [u8; FRAME_HEAD]) -> Result<(u16, u16, usize), DecodeError> {
    let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    if length < 4 {
        return Err(DecodeError::Truncated { found: length, needed: 4 });
    }
    if length > FRAME_MAX {
        return Err(DecodeError::TooLong { length });
    }
    Ok((u16::from_le_bytes([head[4], head[5]]), u16::from_le_bytes([head[6], head[7]]), length - 4))
}

/// Deepest nesting accepted in MessagePack.
const MSGPACK_DEPTH_MAX: usize = 64;

/// MessagePack with field names.
pub fn to_msgpack<T: Serialize>(value: &T) -> Vec<u8> {
    rmp_serde::to_vec_named(value).expect("stored types serialise")
}

/// Reads MessagePack; bytes left over are an error.
pub fn from_msgpack<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    let mut rest = bytes;
    let mut reader = rmp_serde::Deserializer::new(&mut rest);
    reader.set_max_depth(MSGPACK_DEPTH_MAX); // a reason may nest; a hostile one must not exhaust the stack
    let value = T::deserialize(&mut reader).map_err(|e| DecodeError::Payload(e.to_string()))?;
    let left = rest.len();
    if left != 0 {
        return Err(DecodeError::Trailing(left));
    }
    Ok(value)
}

/// Wraps a MessagePack value for disk.
pub fn envelope<T: Serialize>(kind: u16, version: u16, value: &T) -> Vec<u8> {
    envelope_bytes(kind, version, &to_msgpack(value))
}

/// Wraps bytes for disk.
pub fn envelope_bytes(kind: u16, version: u16, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(ENVELOPE_HEAD + payload.len() + 4);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&version.to_le_bytes());
    out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    out.extend_from_slice(payload);
    let sum = crc32fast::hash(&out);
    out.extend_from_slice(&sum.to_le_bytes());
    out
}

/// Checks an envelope and gives kind, version and payload.
pub fn open_envelope(bytes: &[u8]) -> Result<(u16, u16, &[u8]), DecodeError> {
    if bytes.len() < ENVELOPE_HEAD + 4 {
        return Err(DecodeError::Truncated { found: bytes.len(), needed: ENVELOPE_HEAD + 4 });
    }
    if &bytes[..4] != MAGIC {
        return Err(DecodeError::Magic);
    }
    let kind = u16::from_le_bytes([bytes[4], bytes[5]]);
    let version = u16::from_le_bytes([bytes[6], bytes[7]]);
    let length = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]) as usize;
    if length > ENVELOPE_MAX {
        return Err(DecodeError::TooLong { length });
    }
    let end = ENVELOPE_HEAD + length;
    if bytes.len() < end + 4 {
        return Err(DecodeError::Truncated { found: bytes.len(), needed: end + 4 });
    }
    if bytes.len() > end + 4 {
        return Err(DecodeError::Trailing(bytes.len() - end - 4));
    }
    let stored = u32::from_le_bytes([bytes[end], bytes[end + 1], bytes[end + 2], bytes[end + 3]]);
    let computed = crc32fast::hash(&bytes[..end]);
    if stored != computed {
        return Err(DecodeError::Checksum { stored, computed });
    }
    Ok((kind, version, &bytes[ENVELOPE_HEAD..end]))
}

/// Opens an envelope that must hold this kind and version.
pub fn from_envelope<T: DeserializeOwned>(kind: u16, version: u16, bytes: &[u8]) -> Result<T, DecodeError> {
    match open_envelope(bytes)? {
        (k, v, payload) if k == kind && v == version => from_msgpack(payload),
        (kind, version, _) => Err(DecodeError::Unknown { kind, version }),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_envelope_survives_the_round_trip_and_no_damage() {
        let bytes = envelope(3, 1, &("hello", 7u64));
        assert_eq!(from_envelope::<(String, u64)>(3, 1, &bytes).unwrap(), ("hello".into(), 7));
        for i in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[i] ^= 0x40;
            assert!(from_envelope::<(String, u64)>(3, 1, &bad).is_err(), "byte {i}");
            assert!(from_envelope::<(String, u64)>(3, 1, &bytes[..i]).is_err(), "cut at {i}");
        }
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let mut bytes = to_wire(&5u64);
        bytes.push(0);
        assert_eq!(from_wire::<u64>(&bytes), Err(DecodeError::Trailing(1)));
    }
}
