//! What this node promised, on its own disk: the desired set and how far each allocation got.
//!
//! With it an agent that starts without any server goes on where it was. One redb file in the data
//! directory; every value is sealed ([`seal`]) with a key beside it, so a copied file says nothing. One thread
//! writes, many changes to a commit ([`writer`]). A damaged file is moved aside and told loudly: what runs is then
//! found again through the run directories.
//!
//! Tables: `desired` and `record` by allocation id, `meta` with the generation and the epoch. The epoch grows at each
//! start of an agent and is the high part of status numbers.

pub mod seal;
mod writer;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use optimus_common::AllocId;
use optimus_common::env::Env;
use optimus_common::protocol::{AllocStatus, DesiredAlloc};
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub use seal::{SealError, Sealer};
pub use writer::Writer;

const DESIRED: TableDefinition<'static, [u8; 16], &'static [u8]> = TableDefinition::new("desired");
const RECORD: TableDefinition<'static, [u8; 16], &'static [u8]> = TableDefinition::new("record");
const META: TableDefinition<'static, &'static str, u64> = TableDefinition::new("meta");

const GENERATION: &str = "generation";
const EPOCH: &str = "epoch";

/// Kinds of sealed values. Numbers are never reused.
pub(crate) const KIND_DESIRED: u16 = 0x0101;
pub(crate) const KIND_RECORD: u16 = 0x0102;

/// Damaged files that are kept for a look; the oldest go first.
const DAMAGED_KEPT_MAX: usize = 3;

/// How far an allocation got, as last written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AllocRecord {
    /// The attempt that runs or ran last.
    pub attempt: u32,
    /// Restarts in a row.
    pub row: u32,
    /// Attempts that an agent's death cut off before anything ran: they are no restarts.
    #[serde(default)]
    pub skipped: u32,
    pub status: AllocStatus,
}

/// Everything a ledger holds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Held {
    pub generation: u64,
    /// Larger than in any start before.
    pub epoch: u64,
    pub desired: BTreeMap<AllocId, DesiredAlloc>,
    pub records: BTreeMap<AllocId, AllocRecord>,
    /// The ledger was damaged and has been started afresh: what runs must be found by other means.
    pub rebuilt: bool,
}

/// Why a ledger cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    #[error("failed to {step} {}", path.display())]
    File {
        step: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("failed to {step} the ledger")]
    Store {
        step: &'static str,
        #[source]
        source: Box<redb::Error>,
    },
    #[error("ledger row is damaged")]
    Row(#[source] SealError),
    #[error("ledger reader failed: {0}")]
    Panicked(String),
}

pub(crate) fn store(step: &'static str) -> impl Fn(redb::Error) -> LedgerError {
    move |source| LedgerError::Store { step, source: Box::new(source) }
}

/// Opens the ledger of a data directory, or makes one, and starts its writer.
///
/// A damaged one is moved aside. Fails only when the disk cannot be used at all.
pub fn open(data_dir: &Path, sealer: &Sealer, env: &Env) -> Result<(Writer, Held), LedgerError> {
    let path = data_dir.join("ledger.redb");
    let existed = fs::metadata(&path).is_ok_and(|m| m.len() > 0);
    let (database, mut held) = match guarded(&path, sealer) {
        // Every ledger of ours has an epoch; redb takes a file with a blank head for a new one.
        Ok((database, held)) if existed && held.epoch == 0 => {
            tracing::error!(path = %path.display(), "the ledger was blank: running copies are found through their run directories");
            (database, Held { rebuilt: true, ..Held::default() })
        }
        Ok(opened) => opened,
        Err(error) if path.exists() && !matches!(error, LedgerError::File { .. }) => {
            let aside = data_dir.join(format!("ledger.redb.damaged-{}", env.clock.now().0));
            tracing::error!(error = %chain(&error), moved_to = %aside.display(), "the ledger is damaged: starting a new one, running copies are found through their run directories");
            fs::rename(&path, &aside).map_err(|source| LedgerError::File { step: "move aside", path: path.clone(), source })?;
            drop_old_damaged(data_dir);
            let (database, held) = guarded(&path, sealer)?;
            (database, Held { rebuilt: true, ..held })
        }
        Err(error) => return Err(error),
    };
    // A lost ledger must not make status numbers go back: then the wall clock is the best there is.
    held.epoch = (held.epoch + 1).max(env.clock.now().0);
    set_epoch(&database, held.epoch)?;
    Ok((Writer::start(database, sealer.clone()), held))
}

/// redb may panic on damage it does not foresee; a file must not take the agent down.
fn guarded(path: &Path, sealer: &Sealer) -> Result<(Database, Held), LedgerError> {
    catch_unwind(AssertUnwindSafe(|| load(path, sealer))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
        Err(LedgerError::Panicked(text.unwrap_or_default()))
    })
}

fn load(path: &Path, sealer: &Sealer) -> Result<(Database, Held), LedgerError> {
    let opening = store("open");
    let database = Database::create(path).map_err(|e| match e {
        redb::DatabaseError::Storage(redb::StorageError::Io(source)) if is_of_the_disk(&source) => {
            LedgerError::File { step: "open", path: path.to_owned(), source }
        }
        redb::DatabaseError::DatabaseAlreadyOpen => {
            LedgerError::File { step: "open", path: path.to_owned(), source: io::ErrorKind::ResourceBusy.into() }
        }
        other => opening(other.into()),
    })?;
    let write = database.begin_write().map_err(|e| opening(e.into()))?;
    for table in [DESIRED, RECORD] {
        write.open_table(table).map_err(|e| opening(e.into()))?;
    }
    write.open_table(META).map_err(|e| opening(e.into()))?;
    write.commit().map_err(|e| opening(e.into()))?;

    let reading = store("read");
    let read = database.begin_read().map_err(|e| reading(e.into()))?;
    let meta = read.open_table(META).map_err(|e| reading(e.into()))?;
    let number = |key| Ok::<u64, LedgerError>(meta.get(key).map_err(|e| reading(e.into()))?.map_or(0, |v| v.value()));
    let held = Held {
        generation: number(GENERATION)?,
        epoch: number(EPOCH)?,
        desired: rows(&read, DESIRED, KIND_DESIRED, sealer)?,
        records: rows(&read, RECORD, KIND_RECORD, sealer)?,
        rebuilt: false,
    };
    Ok((database, held))
}

/// Errors that say nothing of the file's content: moving it aside would lose it for nothing.
fn is_of_the_disk(error: &io::Error) -> bool {
    use io::ErrorKind::{NotFound, PermissionDenied, ReadOnlyFilesystem, ResourceBusy, StorageFull};
    matches!(error.kind(), NotFound | PermissionDenied | ReadOnlyFilesystem | ResourceBusy | StorageFull)
}

fn rows<T: DeserializeOwned>(
    read: &redb::ReadTransaction,
    table: TableDefinition<'static, [u8; 16], &'static [u8]>,
    kind: u16,
    sealer: &Sealer,
) -> Result<BTreeMap<AllocId, T>, LedgerError> {
    let reading = store("read");
    let table = read.open_table(table).map_err(|e| reading(e.into()))?;
    let mut found = BTreeMap::new();
    for row in table.iter().map_err(|e| reading(e.into()))? {
        let (key, value) = row.map_err(|e| reading(e.into()))?;
        let id = AllocId(uuid::Uuid::from_bytes(key.value()));
        found.insert(id, sealer.open(kind, id, value.value()).map_err(LedgerError::Row)?);
    }
    Ok(found)
}

fn set_epoch(database: &Database, epoch: u64) -> Result<(), LedgerError> {
    let writing = store("write");
    let write = database.begin_write().map_err(|e| writing(e.into()))?;
    write.open_table(META).map_err(|e| writing(e.into()))?.insert(EPOCH, epoch).map_err(|e| writing(e.into()))?;
    write.commit().map_err(|e| writing(e.into()))
}

fn drop_old_damaged(data_dir: &Path) {
    let Ok(entries) = fs::read_dir(data_dir) else { return };
    let names = entries.filter_map(Result::ok).map(|e| e.path());
    let damaged = |p: &PathBuf| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("ledger.redb.damaged-"));
    let mut damaged: Vec<PathBuf> = names.filter(damaged).collect();
    damaged.sort_unstable();
    for path in damaged.iter().rev().skip(DAMAGED_KEPT_MAX) {
        if let Err(error) = fs::remove_file(path) {
            tracing::warn!(path = %path.display(), %error, "failed to delete an old damaged ledger");
        }
    }
}

/// An error and its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
