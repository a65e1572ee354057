//! From an export, and the archive behind it, to a new store on any machine.
//!
//! Everything is read, decrypted, checked and replayed in memory before the first byte is written.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use optimus_common::Timestamp;
use optimus_common::env::Env;
use optimus_core::state::{Proposal, State};
use optimus_host::disk::HostDisk;
use optimus_host::files::{self, DataDirLock, LockError};

use super::archive::{Archive, ArchiveError};
use super::export::{self, ExportHead};
use super::lineage::{self, Beginning, NoRoom};
use super::{Key, ReadError};
use crate::identity::root_key::{RootKey, RootKeyError};
use crate::raft::{self, LogEntry, Seed, StoreError};

/// The directory of the raft store below a server's data directory.
pub const RAFT_DIR: &str = "raft";

/// How far to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// All there is.
    End,
    /// The state as it was after this log index.
    Index(u64),
    /// The state as it was at this time, by the clocks of the servers that proposed.
    Time(Timestamp),
}

/// What to restore from.
#[derive(Debug)]
pub struct Source<'a> {
    pub export: &'a Path,
    /// Directories of archives; none: the export alone.
    pub archives: &'a [PathBuf],
    pub until: Until,
    pub key: &'a Key,
}

/// Why nothing was restored. Nothing was written, unless it says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("failed to read {}", path.display())]
    Export {
        path: PathBuf,
        #[source]
        source: ReadError,
    },
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error("command {n} of archived entry {index} does not decode: {reason}; use the version of optimus the servers ran")]
    Command { index: u64, n: usize, reason: String },
    #[error("the export holds index {has}, which is later than index {asked}: take an earlier export")]
    LaterIndex { has: u64, asked: u64 },
    #[error("the export was taken at {has}, which is later than {asked}: take an earlier export")]
    LaterTime { has: Timestamp, asked: Timestamp },
    #[error("without an archive only the export itself can be restored: index {has}, taken at {at}")]
    NoArchive { has: u64, at: Timestamp },
    #[error("the archive ends at index {end}, before index {asked}")]
    TooShort { end: u64, asked: u64 },
    #[error("the root key does not fit")]
    RootKey(#[from] RootKeyError),
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    #[error("the data directory {} is not empty: it holds {found}", dir.display())]
    NotEmpty { dir: PathBuf, found: String },
    #[error("failed to prepare the data directory {}", dir.display())]
    DataDir {
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error("failed to write the new store; what is there refuses to start: remove the directory and restore again")]
    Store(#[from] StoreError),
}

/// What a restore will bring back. Holds the checked state.
#[derive(Debug, Clone)]
pub struct Restored {
    pub export: ExportHead,
    pub state: State,
    /// Last log index that was replayed; that of the export without an archive.
    pub reached: u64,
    /// Time of the newest command in the state, where an archive tells it.
    pub reached_at: Option<Timestamp>,
    /// Entries of the archive that were applied.
    pub replayed: u64,
    /// Entries of the archive behind the chosen point.
    pub left_out: u64,
    /// Highest index and term of which anything is known.
    known: (u64, u64),
}

impl Restored {
    /// Whether this key opens what the state holds sealed.
    ///
    /// # Errors
    /// When it does not.
    pub fn check_root_key(&self, key: &RootKey) -> Result<(), RootKeyError> {
        check_root_key(&self.state, key)
    }
}

/// Whether `key` opens the CA key in `state`.
///
/// # Errors
/// When it does not.
pub fn check_root_key(state: &State, key: &RootKey) -> Result<(), RootKeyError> {
    match &state.cluster {
        Some(cluster) => crate::identity::check_root_key(cluster, key),
        None => Ok(()),
    }
}

/// Reads, checks and replays. Writes nothing.
///
/// # Errors
/// Anything that is missing, damaged or does not fit together.
pub fn read(source: &Source<'_>) -> Result<Restored, RestoreError> {
    let failed = |e| RestoreError::Export { path: source.export.to_owned(), source: e };
    let export::Export { head, state } = export::read_file(source.export, source.key).map_err(failed)?;
    match source.until {
        Until::Index(asked) if asked < head.index => return Err(RestoreError::LaterIndex { has: head.index, asked }),
        Until::Time(asked) if asked < head.taken_at => return Err(RestoreError::LaterTime { has: head.taken_at, asked }),
        Until::Index(asked) if source.archives.is_empty() && asked > head.covers => {
            return Err(RestoreError::NoArchive { has: head.covers, at: head.taken_at });
        }
        Until::Time(_) if source.archives.is_empty() => return Err(RestoreError::NoArchive { has: head.covers, at: head.taken_at }),
        _ => {}
    }
    let known = (head.covers, head.term);
    let (reached, export) = (head.covers, head);
    let mut restored = Restored { export, state, reached, reached_at: None, replayed: 0, left_out: 0, known };
    if !source.archives.is_empty() {
        replay(source, &mut restored)?;
    }
    Ok(restored)
}

fn replay(source: &Source<'_>, restored: &mut Restored) -> Result<(), RestoreError> {
    let archive = Archive::open(source.archives, restored.export.cluster)?;
    let upto = if let Until::Index(last) = source.until { last } else { u64::MAX };
    let walk = archive.walk(restored.reached, upto, source.key, |entry: LogEntry| -> Result<bool, RestoreError> {
        let commands = decode(&entry)?;
        restored.known.1 = restored.known.1.max(entry.term);
        let beyond = match source.until {
            Until::End | Until::Index(_) => false,
            // The commands of one entry were committed together and stay together.
            Until::Time(last) => commands.iter().any(|c| c.at > last),
        };
        if beyond {
            return Ok(false);
        }
        restored.reached_at = commands.iter().map(|c| c.at).max().max(restored.reached_at);
        for command in commands {
            restored.state.apply(entry.index, command);
        }
        restored.replayed += 1;
        Ok(true)
    })?;
    restored.reached = walk.reached;
    let end = archive.end().max(walk.reached);
    restored.left_out = end - walk.reached;
    restored.known.0 = restored.known.0.max(end);
    match source.until {
        Until::Index(asked) if walk.reached < asked => Err(RestoreError::TooShort { end: walk.reached, asked }),
        _ => Ok(()),
    }
}

fn decode(entry: &LogEntry) -> Result<Vec<Proposal>, RestoreError> {
    let one = |(n, bytes): (usize, &bytes::Bytes)| {
        rmp_serde::from_slice(bytes).map_err(|e| RestoreError::Command { index: entry.index, n, reason: e.to_string() })
    };
    entry.commands.iter().enumerate().map(one).collect()
}

/// Writes what was read as the data directory of a new single server: the raft store first, the root key last, so that a
/// directory left half made does not start. `addr` is the new server's address for other servers.
///
/// # Errors
/// A root key that does not fit, a directory that is not empty, a disk that refuses.
pub fn write(restored: Restored, root_key: &RootKey, data_dir: &Path, addr: &str, env: &Env) -> Result<Beginning, RestoreError> {
    restored.check_root_key(root_key)?;
    let Restored { mut state, known: (index, term), .. } = restored;
    let beginning = lineage::begin(index, term, env)?;
    lineage::enter(&mut state, beginning);

    let io = |source| RestoreError::DataDir { dir: data_dir.to_owned(), source };
    refuse_occupied(data_dir)?;
    files::create_private_dir(data_dir).map_err(io)?;
    let _lock = DataDirLock::acquire(data_dir)?;
    let disk = HostDisk::open(data_dir.join(RAFT_DIR)).map_err(io)?;
    let Beginning { server: node_id, index, term } = beginning;
    raft::seed(Arc::new(disk), &Seed { node_id, addr: addr.to_owned(), term, index, content: state.to_bytes() })?;
    root_key.store(data_dir)?;
    Ok(beginning)
}

/// Refuses a directory that holds anything but the lock a failed try left.
fn refuse_occupied(dir: &Path) -> Result<(), RestoreError> {
    let io = |source| RestoreError::DataDir { dir: dir.to_owned(), source };
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(io(e)),
    };
    for entry in entries {
        let name = entry.map_err(io)?.file_name();
        if name != "lock" {
            return Err(RestoreError::NotEmpty { dir: dir.to_owned(), found: name.to_string_lossy().into_owned() });
        }
    }
    Ok(())
}
