//! The shape of every file of ours that leaves a server.
//!
//! ```text
//! age( magic, 16 bytes | length of the head, u32 LE | head, an envelope of common::codec | content )
//! ```
//! The head says how long the content is and its BLAKE3 hash. age already notices any change of a file; the hash also
//! notices a fault of ours between taking the content and writing it.

use std::io::{self, BufRead, Read, Write};
use std::sync::Arc;

use optimus_common::codec::{self, DecodeError};
use optimus_common::disk::{Disk, DiskFile};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::crypt::{CryptError, Key, Lock};

/// Length of the magic bytes.
const MAGIC: usize = 16;
/// Longest head, in bytes.
const HEAD_MAX: usize = 64 << 10;
/// Longest content, in bytes: a state in its envelope.
pub(crate) const CONTENT_MAX: u64 = (codec::ENVELOPE_MAX + 4096) as u64;
/// Content goes through the cipher in pieces of this size.
const PIECE: usize = 64 << 10;

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kind {
    pub magic: &'static [u8; MAGIC],
    /// Of the head's envelope.
    pub number: u16,
    pub version: u16,
    pub name: &'static str,
}

/// Numbers of envelopes are never reused.
pub(crate) const EXPORT: Kind = Kind { magic: b"optimus export \n", number: 501, version: 1, name: "an export" };
pub(crate) const SEGMENT: Kind = Kind { magic: b"optimus segment\n", number: 502, version: 1, name: "an archive segment" };

/// Why a file is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("failed to open the file")]
    Open(#[source] io::Error),
    #[error(transparent)]
    Crypt(#[from] CryptError),
    #[error("the file is damaged or cut short: what it holds from byte {at} of its content on is not what was written")]
    Damaged {
        at: u64,
        #[source]
        source: io::Error,
    },
    #[error("the file is not {0} of optimus")]
    Magic(&'static str),
    #[error("the head of the file does not decode")]
    Head(#[source] DecodeError),
    #[error("the file was written by a newer version of optimus ({kind} version {version})")]
    Version { kind: &'static str, version: u16 },
    #[error("the head says {said} bytes of content, more than the {CONTENT_MAX} we accept")]
    TooLong { said: u64 },
    #[error("the content is not what the head says it is (BLAKE3)")]
    Hash,
    #[error("there are bytes after the end of the content")]
    Trailing,
    #[error("the state in it does not decode")]
    State(#[source] DecodeError),
    #[error("the entries in it do not decode")]
    Entries(#[source] DecodeError),
    #[error("the file contradicts itself: {0}")]
    Contradiction(String),
}

#[derive(Serialize, Deserialize)]
struct Head<H> {
    length: u64,
    hash: [u8; 32],
    about: H,
}

/// Writes a file of `kind` to `out`; the last byte is out when this returns.
pub(crate) fn write<W: Write, H: Serialize>(out: W, lock: &Lock, kind: Kind, about: H, content: &[u8]) -> Result<W, CryptError> {
    let failed = CryptError::write;
    let head = Head { length: content.len() as u64, hash: *blake3::hash(content).as_bytes(), about };
    let head = codec::envelope(kind.number, kind.version, &head);
    let mut sealed = lock.wrap(out)?;
    let mut put = |bytes: &[u8]| sealed.write_all(bytes).map_err(failed);
    put(kind.magic)?;
    put(&(head.len() as u32).to_le_bytes())?;
    put(&head)?;
    content.chunks(PIECE).try_for_each(put)?;
    sealed.finish().map_err(failed)
}

/// Reads and checks a file of `kind`: all of it, to its end.
pub(crate) fn read<R: BufRead, H: DeserializeOwned>(input: R, key: &Key, kind: Kind) -> Result<(H, Vec<u8>), ReadError> {
    let mut plain = Counted { inner: key.open(input)?, at: 0 };
    let mut start = [0; MAGIC + 4];
    plain.fill(&mut start)?;
    if &start[..MAGIC] != kind.magic {
        return Err(ReadError::Magic(kind.name));
    }
    let length = u32::from_le_bytes([start[MAGIC], start[MAGIC + 1], start[MAGIC + 2], start[MAGIC + 3]]) as usize;
    if length > HEAD_MAX {
        return Err(ReadError::TooLong { said: length as u64 });
    }
    let mut head = vec![0; length];
    plain.fill(&mut head)?;
    let (number, version, payload) = codec::open_envelope(&head).map_err(ReadError::Head)?;
    if (number, version) != (kind.number, kind.version) {
        return Err(if number == kind.number { ReadError::Version { kind: kind.name, version } } else { ReadError::Magic(kind.name) });
    }
    let Head { length, hash, about } = codec::from_msgpack::<Head<H>>(payload).map_err(ReadError::Head)?;
    if length > CONTENT_MAX {
        return Err(ReadError::TooLong { said: length });
    }
    // Grows with what is really there: a head that lies costs no memory.
    let mut content = Vec::new();
    let before = plain.at;
    (&mut plain).take(length).read_to_end(&mut content).map_err(|source| ReadError::Damaged { at: before, source })?;
    if (content.len() as u64) < length {
        return Err(ReadError::Damaged { at: plain.at, source: io::ErrorKind::UnexpectedEof.into() });
    }
    let at = plain.at;
    // Only a read to the end proves that the file was not cut.
    match plain.read(&mut [0]) {
        Ok(0) => {}
        Ok(_) => return Err(ReadError::Trailing),
        Err(source) => return Err(ReadError::Damaged { at, source }),
    }
    if blake3::hash(&content).as_bytes() != &hash {
        return Err(ReadError::Hash);
    }
    Ok((about, content))
}

/// Makes the file `name` on `disk` of what `fill` writes: beside it first, then in its place in one step.
pub(crate) fn put<T>(disk: &dyn Disk, name: &str, fill: impl FnOnce(DiskWriter) -> Result<T, CryptError>) -> Result<T, PutError> {
    let temporary = format!("{name}{TEMPORARY}");
    let io = |e| PutError::Io { name: name.to_owned(), source: e };
    let file: Arc<dyn DiskFile> = disk.open(&temporary).map_err(io)?.into();
    file.set_len(0).map_err(io)?;
    let filled = fill(DiskWriter { file: file.clone(), at: 0 });
    let filled = filled.map_err(|source| PutError::Encrypt { name: name.to_owned(), source }).and_then(|filled| {
        file.sync_data().map_err(io)?;
        disk.rename(&temporary, name).map_err(io)?;
        disk.sync_dir().map_err(io)?;
        Ok(filled)
    });
    if filled.is_err() {
        let _ = disk.remove(&temporary); // the first error is the one that matters; what is left goes at the next start
    }
    filled
}

/// Removes what a crash left half written.
pub(crate) fn sweep(disk: &dyn Disk) -> io::Result<()> {
    disk.list()?.iter().filter(|name| name.ends_with(TEMPORARY)).try_for_each(|name| disk.remove(name))
}

const TEMPORARY: &str = ".tmp";

/// Why a file was not written.
#[derive(Debug, thiserror::Error)]
pub enum PutError {
    #[error("failed to write {name}")]
    Io {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("failed to write {name}")]
    Encrypt {
        name: String,
        #[source]
        source: CryptError,
    },
}

/// Writes a file of a disk from its beginning.
pub(crate) struct DiskWriter {
    file: Arc<dyn DiskFile>,
    at: u64,
}

impl Write for DiskWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_at(self.at, bytes)?;
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Counted<R> {
    inner: R,
    at: u64,
}

impl<R: Read> Counted<R> {
    fn fill(&mut self, into: &mut [u8]) -> Result<(), ReadError> {
        let at = self.at;
        self.read_exact(into).map_err(|source| ReadError::Damaged { at, source })
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(into)?;
        self.at += n as u64;
        Ok(n)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::crypt::tests::pair;
    use super::*;

    #[test]
    fn what_was_written_is_read_and_any_change_is_refused() {
        let (lock, key, _) = pair();
        let file = write(Vec::new(), &lock, EXPORT, "about".to_owned(), b"some content").unwrap();
        let (about, content) = read::<_, String>(&file[..], &key, EXPORT).unwrap();
        assert_eq!((about.as_str(), &content[..]), ("about", &b"some content"[..]));
        assert!(matches!(read::<_, String>(&file[..], &key, SEGMENT), Err(ReadError::Magic(_))));
        for at in 0..file.len() {
            let mut bad = file.clone();
            bad[at] ^= 0x20;
            assert!(read::<_, String>(&bad[..], &key, EXPORT).is_err(), "byte {at}");
            assert!(read::<_, String>(&file[..at], &key, EXPORT).is_err(), "cut at {at}");
        }
        let mut longer = file.clone();
        longer.push(0);
        assert!(read::<_, String>(&longer[..], &key, EXPORT).is_err(), "lengthened");
    }

    #[test]
    fn content_over_several_pieces_is_whole_or_refused() {
        let (lock, key, _) = pair();
        let content: Vec<u8> = (0..300_000u32).map(|n| n as u8).collect();
        let file = write(Vec::new(), &lock, SEGMENT, 7u64, &content).unwrap();
        assert_eq!(read::<_, u64>(&file[..], &key, SEGMENT).unwrap(), (7, content));
        // Cut at the border of a piece of age, where nothing inside is broken.
        for cut in [file.len() - 1, 65_536 + 300, 131_072 + 300] {
            let error = read::<_, u64>(&file[..cut], &key, SEGMENT).unwrap_err().to_string();
            assert!(error.contains("damaged or cut short"), "{error}");
        }
    }

    #[test]
    fn a_file_of_a_newer_version_says_so() {
        let (lock, key, _) = pair();
        let newer = Kind { version: 2, ..EXPORT };
        let file = write(Vec::new(), &lock, newer, 1u8, b"").unwrap();
        assert!(matches!(read::<_, u8>(&file[..], &key, EXPORT), Err(ReadError::Version { version: 2, .. })));
    }
}
