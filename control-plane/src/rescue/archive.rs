//! Segments: what was committed between two exports, in files that name what they hold.
//!
//! ```text
//! DIR/server-<id>/base-<index>-<time>.age    an export, where a chain begins
//! DIR/server-<id>/segment-<from>-<to>.age    entries from..=to; holds the hash of the file before it
//! ```
//! Every server archives for itself, so that no hand-over can lose an entry; chains of several servers overlap, and
//! where they do they must say the same.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use optimus_common::codec;
use optimus_common::{ClusterId, Timestamp};
use serde::{Deserialize, Serialize};

use super::container::{self, ReadError, SEGMENT};
use super::crypt::{CryptError, Key, Lock};
use crate::raft::LogEntry;

const SUFFIX: &str = ".age";
/// Most files of one archive that are looked at.
const FILES_MAX: usize = 1_000_000;

/// What a segment says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentHead {
    pub cluster: ClusterId,
    /// The server that wrote it.
    pub server: u64,
    /// First index in it.
    pub from: u64,
    /// Last index in it.
    pub to: u64,
    /// Earliest and latest time of its commands; unset when it holds none.
    pub times: Option<(Timestamp, Timestamp)>,
    /// BLAKE3 of the file before it in its server's chain, as it is on disk.
    pub previous: [u8; 32],
}

#[derive(Serialize, Deserialize)]
struct StoredEntry {
    term: u64,
    index: u64,
    commands: Vec<Piece>,
}

/// Bytes that are stored as bytes.
#[derive(Serialize, Deserialize)]
struct Piece(#[serde(with = "bytes_as_bytes")] Vec<u8>);

mod bytes_as_bytes {
    use serde::{Deserializer, Serializer, de};

    pub fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(bytes)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Vec<u8>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E>(self, v: &[u8]) -> Result<Vec<u8>, E> {
                Ok(v.to_vec())
            }
            fn visit_byte_buf<E>(self, v: Vec<u8>) -> Result<Vec<u8>, E> {
                Ok(v)
            }
        }
        from.deserialize_byte_buf(Visitor)
    }
}

/// When a command was proposed; its other fields are not looked at.
#[derive(Deserialize)]
struct OnlyAt {
    at: Timestamp,
}

/// When a command was proposed; `None` when the bytes are no command.
pub(crate) fn time_of(command: &[u8]) -> Option<Timestamp> {
    rmp_serde::from_slice::<OnlyAt>(command).ok().map(|c| c.at)
}

/// Earliest and latest time of the commands of `entries`.
pub(crate) fn times_of(entries: &[LogEntry]) -> Option<(Timestamp, Timestamp)> {
    let mut times = entries.iter().flat_map(|e| &e.commands).filter_map(|c| time_of(c));
    let first = times.next()?;
    Some(times.fold((first, first), |(min, max), at| (min.min(at), max.max(at))))
}

/// A segment as bytes.
pub(crate) fn seal(lock: &Lock, head: &SegmentHead, entries: &[LogEntry]) -> Result<Vec<u8>, CryptError> {
    let stored =
        |e: &LogEntry| StoredEntry { term: e.term, index: e.index, commands: e.commands.iter().map(|c| Piece(c.to_vec())).collect() };
    let content = codec::to_msgpack(&entries.iter().map(stored).collect::<Vec<_>>());
    container::write(Vec::new(), lock, SEGMENT, head, &content)
}

/// Reads and checks a segment: its entries follow one another and are those its head names.
///
/// # Errors
/// [`ReadError`], for anything that is not exactly what was written.
pub fn read_segment(path: &Path, key: &Key) -> Result<(SegmentHead, Vec<LogEntry>), ReadError> {
    let file = fs::File::open(path).map_err(ReadError::Open)?;
    let (head, content): (SegmentHead, _) = container::read(BufReader::with_capacity(64 << 10, file), key, SEGMENT)?;
    let stored: Vec<StoredEntry> = codec::from_msgpack(&content).map_err(ReadError::Entries)?;
    let indexes = stored.iter().map(|e| e.index);
    if head.to < head.from || !indexes.eq(head.from..=head.to) {
        return Err(ReadError::Contradiction(format!("its head says entries {} to {}, it holds others", head.from, head.to)));
    }
    let entry =
        |e: StoredEntry| LogEntry { term: e.term, index: e.index, commands: e.commands.into_iter().map(|p| Bytes::from(p.0)).collect() };
    Ok((head, stored.into_iter().map(entry).collect()))
}

/// A file of an archive, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Named {
    /// An export that holds everything up to `index`, taken at a time.
    Base { index: u64, at: Timestamp },
    /// Entries `from..=to`.
    Segment { from: u64, to: u64 },
}

impl Named {
    pub fn parse(name: &str) -> Option<Self> {
        let digits = |text: &str| (text.len() == 20).then(|| text.parse().ok()).flatten();
        let stem = name.strip_suffix(SUFFIX)?;
        if let Some(base) = stem.strip_prefix("base-") {
            let (index, at) = base.split_once('-')?;
            return Some(Self::Base { index: digits(index)?, at: Timestamp(digits(at)?) });
        }
        let (from, to) = stem.strip_prefix("segment-")?.split_once('-')?;
        Some(Self::Segment { from: digits(from)?, to: digits(to)? })
    }

    pub fn name(self) -> String {
        match self {
            Self::Base { index, at } => format!("base-{index:020}-{:020}{SUFFIX}", at.0),
            Self::Segment { from, to } => format!("segment-{from:020}-{to:020}{SUFFIX}"),
        }
    }

    /// Last index it covers.
    pub fn end(self) -> u64 {
        match self {
            Self::Base { index, .. } => index,
            Self::Segment { to, .. } => to,
        }
    }
}

/// Why an archive cannot bring a state further.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("failed to list the archive {}", path.display())]
    List {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the archive {} holds no segment", path.display())]
    Empty { path: PathBuf },
    #[error("the archive {} holds more than {FILES_MAX} files", path.display())]
    TooMany { path: PathBuf },
    #[error("failed to read {}", path.display())]
    Segment {
        path: PathBuf,
        #[source]
        source: ReadError,
    },
    #[error("{} says it holds entries {from} to {to} of server {server}, which is not its name", path.display())]
    Name { path: PathBuf, from: u64, to: u64, server: u64 },
    #[error("{} is of cluster {found}, not of {expected}", path.display())]
    Cluster { path: PathBuf, found: ClusterId, expected: ClusterId },
    #[error("the archive has a gap: entries {from} to {to} are missing; without them index {} is the newest that can be restored", from - 1)]
    Gap { from: u64, to: u64 },
    #[error("a file before {} is missing or was replaced: it is not the one the segment was written after", path.display())]
    Chain { path: PathBuf },
    #[error("{} holds another entry {index} than the file of another server; one of the two is not of this history", path.display())]
    Differs { path: PathBuf, index: u64 },
}

/// The order of one server's files, as they were written: a base at the index where a segment ends came after it.
pub(crate) fn in_order(named: &Named) -> (u64, bool) {
    (named.end(), matches!(named, Named::Base { .. }))
}

/// A segment file and the file it was written after.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Listed {
    server: u64,
    from: u64,
    to: u64,
    path: PathBuf,
    before: Option<PathBuf>,
}

/// The segments below some directories, by their names.
#[derive(Debug)]
pub struct Archive {
    segments: Vec<Listed>,
    cluster: ClusterId,
}

/// What reading an archive found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Walk {
    /// Last index that was given to the caller.
    pub reached: u64,
    /// The caller wanted no more.
    pub stopped: bool,
}

impl Archive {
    /// Lists the archives below `dirs`: each is what `--archive-dir` named, or one server's directory in it.
    ///
    /// # Errors
    /// A directory that cannot be read, or holds no segment.
    pub fn open(dirs: &[PathBuf], cluster: ClusterId) -> Result<Self, ArchiveError> {
        let mut segments = Vec::new();
        for dir in dirs {
            let before = segments.len();
            match server_of(dir) {
                Some(server) => list(dir, server, &mut segments)?,
                None => {
                    for entry in entries(dir)? {
                        if let Some(server) = server_of(&entry) {
                            list(&entry, server, &mut segments)?;
                        }
                    }
                }
            }
            if segments.len() == before {
                return Err(ArchiveError::Empty { path: dir.clone() });
            }
        }
        // Longer segments first, so that a shorter one of another server is compared rather than a hole.
        segments.sort_by(|a, b| (a.from, std::cmp::Reverse(a.to), &a.path).cmp(&(b.from, std::cmp::Reverse(b.to), &b.path)));
        Ok(Self { segments, cluster })
    }

    /// Gives every entry after `after` up to `upto`, in order and once, until `wants` says no. Each file that is used is decrypted and
    /// checked whole, its chain too, and entries that several servers archived are compared.
    ///
    /// # Errors
    /// [`ArchiveError`]; a gap only when an entry behind it exists and is wanted.
    pub fn walk<E: From<ArchiveError>>(
        &self,
        after: u64,
        upto: u64,
        key: &Key,
        mut wants: impl FnMut(LogEntry) -> Result<bool, E>,
    ) -> Result<Walk, E> {
        let mut reached = after;
        // Of entries that a later file may hold again.
        let mut hashes: BTreeMap<u64, [u8; 32]> = BTreeMap::new();
        for listed in self.segments.iter().filter(|s| s.to > after) {
            if reached >= upto {
                return Ok(Walk { reached, stopped: true });
            }
            if listed.from > reached + 1 {
                return Err(ArchiveError::Gap { from: reached + 1, to: listed.from - 1 }.into());
            }
            hashes = hashes.split_off(&listed.from);
            for entry in self.load(listed, key)? {
                if entry.index <= after {
                    continue;
                }
                let hash = hash_of(&entry);
                if entry.index <= reached {
                    if hashes.get(&entry.index).is_some_and(|known| *known != hash) {
                        return Err(ArchiveError::Differs { path: listed.path.clone(), index: entry.index }.into());
                    }
                    continue;
                }
                let index = entry.index;
                if index > upto || !wants(entry)? {
                    return Ok(Walk { reached, stopped: true });
                }
                hashes.insert(index, hash);
                reached = index;
            }
        }
        Ok(Walk { reached, stopped: false })
    }

    fn load(&self, listed: &Listed, key: &Key) -> Result<Vec<LogEntry>, ArchiveError> {
        let path = || listed.path.clone();
        let (head, entries) = read_segment(&listed.path, key).map_err(|source| ArchiveError::Segment { path: path(), source })?;
        if (head.server, head.from, head.to) != (listed.server, listed.from, listed.to) {
            return Err(ArchiveError::Name { path: path(), from: head.from, to: head.to, server: head.server });
        }
        if head.cluster != self.cluster {
            return Err(ArchiveError::Cluster { path: path(), found: head.cluster, expected: self.cluster });
        }
        // The first file of a directory has nothing before it once older ones were cleared away.
        if let Some(before) = &listed.before {
            let hash = hash_file(before).map_err(|source| ArchiveError::List { path: before.clone(), source })?;
            if hash != head.previous {
                return Err(ArchiveError::Chain { path: path() });
            }
        }
        Ok(entries)
    }

    /// Index of the last entry that any file names.
    pub fn end(&self) -> u64 {
        self.segments.iter().map(|s| s.to).max().unwrap_or(0)
    }

    /// Number of segments.
    pub fn len(&self) -> usize {
        self.segments.len()
    }

    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// First index of the first segment.
    pub fn start(&self) -> u64 {
        self.segments.first().map_or(0, |s| s.from)
    }
}

fn hash_of(entry: &LogEntry) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&entry.term.to_le_bytes());
    for command in &entry.commands {
        hasher.update(&(command.len() as u64).to_le_bytes());
        hasher.update(command);
    }
    *hasher.finalize().as_bytes()
}

pub(crate) fn hash_file(path: &Path) -> io::Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    io::copy(&mut fs::File::open(path)?, &mut hasher)?;
    Ok(*hasher.finalize().as_bytes())
}

/// The directory of one server's files.
pub fn server_dir(dir: &Path, server: u64) -> PathBuf {
    dir.join(format!("server-{server}"))
}

fn server_of(dir: &Path) -> Option<u64> {
    dir.file_name()?.to_str()?.strip_prefix("server-")?.parse().ok()
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, ArchiveError> {
    let failed = |source| ArchiveError::List { path: dir.to_owned(), source };
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        all.push(entry.map_err(failed)?.path());
        if all.len() > FILES_MAX {
            return Err(ArchiveError::TooMany { path: dir.to_owned() });
        }
    }
    Ok(all)
}

fn list(dir: &Path, server: u64, into: &mut Vec<Listed>) -> Result<(), ArchiveError> {
    let named = |path: PathBuf| Named::parse(path.file_name()?.to_str()?).map(|named| (named, path));
    let mut files: Vec<(Named, PathBuf)> = entries(dir)?.into_iter().filter_map(named).collect();
    files.sort_by_key(|(named, _)| in_order(named));
    let mut before: Option<(u64, PathBuf)> = None;
    for (named, path) in files {
        if let Named::Segment { from, to } = named {
            // Where indexes are missing, the gap is what is told, unless another server has them.
            let written_after = before.take().filter(|(end, _)| end + 1 == from).map(|(_, path)| path);
            into.push(Listed { server, from, to, path: path.clone(), before: written_after });
        }
        before = Some((named.end(), path));
    }
    Ok(())
}
