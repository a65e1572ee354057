//! The envelope around every record we store or send: magic, format, kind, version, length, checksum.
//!
//! ```text
//! 0      4        5      6         8        12                16
//! "OPTR" format   kind   version   length   crc32 of 4..12,   payload
//!        u8       u8     u16 LE    u32 LE   place, payload
//! ```
//! `place` is where the record belongs (the log index of an entry, 0 elsewhere). It is part of the checksum but not of
//! the bytes, so an intact record found at a wrong key is refused as well. Numbers of kinds are never reused.

/// Length of the envelope before the payload, in bytes.
pub(crate) const HEADER: usize = 16;
const MAGIC: &[u8; 4] = b"OPTR";
const FORMAT: u8 = 1;

/// What a record holds. The number is on disk and on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Entry = 1,
    Vote = 2,
    PurgeMark = 3,
    Committed = 4,
    Owner = 5,
    Snapshot = 6,
    Request = 7,
    Reply = 8,
    Generation = 9,
    Journal = 10,
    JournalHead = 11,
}

/// Why a record was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Damage {
    #[error("shorter than its header ({0} bytes)")]
    Short(usize),
    #[error("does not start with the magic bytes")]
    Magic,
    #[error("envelope format {0} is unknown to this version of optimus")]
    Format(u8),
    #[error("holds kind {found}, expected {expected}")]
    Kind { found: u8, expected: u8 },
    #[error("says it has {said} bytes of content, has {has}")]
    Length { said: usize, has: usize },
    #[error("checksum does not match")]
    Checksum,
    #[error("version {0} is unknown to this version of optimus")]
    Version(u16),
    #[error("content does not decode: {0}")]
    Content(String),
}

fn checksum(header: &[u8], place: u64, payload: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(header);
    crc.update(&place.to_le_bytes());
    crc.update(payload);
    crc.finalize()
}

/// Wraps a payload. Payloads are bounded far below 4 GiB by their makers.
pub(crate) fn seal(kind: Kind, version: u16, place: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + payload.len());
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&[FORMAT, kind as u8]);
    out.extend_from_slice(&version.to_le_bytes());
    out.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    let crc = checksum(&out[4..12], place, payload);
    out.extend_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(payload);
    out
}

/// Whether `bytes` begin like an envelope.
pub(crate) fn begins(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// How long the envelope at the start of `bytes` says it is, header included.
pub(crate) fn length(bytes: &[u8]) -> Option<usize> {
    let header = bytes.first_chunk::<HEADER>().filter(|h| begins(*h))?;
    (u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize).checked_add(HEADER)
}

/// Checks the envelope and gives the version and the payload.
///
/// # Errors
/// The [`Damage`]; never panics, whatever the bytes.
pub(crate) fn open(kind: Kind, place: u64, bytes: &[u8]) -> Result<(u16, &[u8]), Damage> {
    let Some((header, payload)) = bytes.split_at_checked(HEADER) else { return Err(Damage::Short(bytes.len())) };
    if &header[..4] != MAGIC {
        return Err(Damage::Magic);
    }
    let said = u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize;
    if said != payload.len() {
        return Err(Damage::Length { said, has: payload.len() });
    }
    let crc = u32::from_le_bytes([header[12], header[13], header[14], header[15]]);
    if crc != checksum(&header[4..12], place, payload) {
        return Err(Damage::Checksum);
    }
    // Only now: an intact record of another format or kind says something else than a damaged one.
    if header[4] != FORMAT {
        return Err(Damage::Format(header[4]));
    }
    if header[5] != kind as u8 {
        return Err(Damage::Kind { found: header[5], expected: kind as u8 });
    }
    Ok((u16::from_le_bytes([header[6], header[7]]), payload))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_was_sealed_opens(place: u64, version: u16, payload in proptest::collection::vec(any::<u8>(), 0..200)) {
            let sealed = seal(Kind::Entry, version, place, &payload);
            prop_assert_eq!(open(Kind::Entry, place, &sealed), Ok((version, payload.as_slice())));
            prop_assert!(open(Kind::Vote, place, &sealed).is_err());
            prop_assert_eq!(open(Kind::Entry, place.wrapping_add(1), &sealed), Err(Damage::Checksum));
        }

        #[test]
        fn any_single_changed_byte_is_refused(payload in proptest::collection::vec(any::<u8>(), 0..100), at: prop::sample::Index, mask in 1u8..) {
            let mut sealed = seal(Kind::Entry, 1, 7, &payload);
            let at = at.index(sealed.len());
            sealed[at] ^= mask;
            prop_assert!(open(Kind::Entry, 7, &sealed).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = open(Kind::Entry, 0, &bytes);
        }
    }

    #[test]
    fn the_format_is_frozen() {
        let sealed = seal(Kind::Vote, 1, 0, b"abc");
        assert_eq!(
            sealed,
            [b'O', b'P', b'T', b'R', 1, 2, 1, 0, 3, 0, 0, 0, sealed[12], sealed[13], sealed[14], sealed[15], b'a', b'b', b'c']
        );
        assert_eq!(u32::from_le_bytes([sealed[12], sealed[13], sealed[14], sealed[15]]), 1_417_681_758, "computed with zlib");
    }
}
