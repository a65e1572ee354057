//! The whole replicated state in one file.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use optimus_common::{ClusterId, Timestamp};
use optimus_core::state::State;
use serde::{Deserialize, Serialize};

use super::container::{self, EXPORT, ReadError};
use super::crypt::{CryptError, Key, Lock};
use crate::store::Store;

/// What an export says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportHead {
    pub cluster: ClusterId,
    /// Log index of the last command the state holds.
    pub index: u64,
    /// Log index the state reaches: the entries behind `index` up to here are Raft's own and change nothing.
    pub covers: u64,
    /// Raft term the exporting server was in.
    pub term: u64,
    /// Its wall clock.
    pub taken_at: Timestamp,
    /// Its version of optimus.
    pub version: String,
}

/// An export that was read and checked.
#[derive(Debug, Clone)]
pub struct Export {
    pub head: ExportHead,
    pub state: State,
}

impl ExportHead {
    /// The head for `state`; `None` while there is no cluster. `applied` is an index the state is known to have reached.
    pub fn of(state: &State, applied: u64, term: u64, taken_at: Timestamp) -> Option<Self> {
        let cluster = state.cluster.as_ref()?.id;
        let (index, covers) = (state.index, state.index.max(applied));
        Some(Self { cluster, index, covers, term, taken_at, version: env!("CARGO_PKG_VERSION").to_owned() })
    }

    /// The state of this server now, and the head for it; `None` while there is no cluster.
    pub fn now(store: &Store) -> Option<(Self, State)> {
        // In this order: the state read second has reached at least the index read first.
        let applied = *store.applied().borrow();
        let state = store.state();
        let head = Self::of(&state, applied, store.status().term, store.env.clock.now())?;
        Some((head, state))
    }
}

/// Writes an export; the last byte is out when this returns. Takes a few milliseconds a megabyte, and a fraction of a
/// second more with a passphrase: not for an async thread.
///
/// # Errors
/// When `out` refuses.
pub fn write<W: Write>(out: W, lock: &Lock, head: &ExportHead, state: &State) -> Result<W, CryptError> {
    container::write(out, lock, EXPORT, head, &state.to_bytes())
}

/// Reads and checks an export: all of it.
///
/// # Errors
/// [`ReadError`], for anything that is not exactly what was written.
pub fn read(input: impl BufRead, key: &Key) -> Result<Export, ReadError> {
    let (head, content): (ExportHead, _) = container::read(input, key, EXPORT)?;
    let state = State::from_bytes(&content).map_err(ReadError::State)?;
    let cluster = state.cluster.as_ref().map(|c| c.id);
    if cluster != Some(head.cluster) || state.index != head.index || head.covers < head.index {
        let found = cluster.map_or("no cluster".to_owned(), |c| format!("cluster {c}"));
        return Err(ReadError::Contradiction(format!(
            "its head says cluster {} at index {}, its state is of {found} at index {}",
            head.cluster, head.index, state.index
        )));
    }
    Ok(Export { head, state })
}

/// [`read`] from a file.
///
/// # Errors
/// As [`read`].
pub fn read_file(path: &Path, key: &Key) -> Result<Export, ReadError> {
    let file = File::open(path).map_err(ReadError::Open)?;
    read(BufReader::with_capacity(64 << 10, file), key)
}
