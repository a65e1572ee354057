//! The redb file: opening, checking, reading.
//!
//! Two tables: `log` (index to entry) and `meta` (vote, purge mark, committed, owner). Entries are not split into
//! pieces: redb gives a value of more than a page its own run of pages, rounded up to a power of two, so the waste is
//! below half, and the log holds some ten thousand entries at most. Splitting at 3.9 KiB would save that at the price of
//! thirty tree inserts for one batch, on the path every write waits for.

use std::ops::RangeInclusive;

use optimus_common::disk::Disk;
use optimus_host::disk::RedbFile;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};

use super::journal::{self, JOURNAL, Journal};
use super::witness::Witness;
use crate::raft::error::StoreError;
use crate::raft::record::{self, Damage, Kind};
use crate::raft::snapshots;
use crate::raft::stored::{GenerationV1, LogIdV1, OwnerV1, VoteV1, decode, decode_entry, encode};
use crate::raft::types::{Entry, LogId, Vote};

/// The file below the data directory.
pub(crate) const FILE: &str = "raft.redb";
/// Its name while it is being made.
const NEW: &str = "raft.redb.tmp";
/// Its successor while it is being compacted.
pub(crate) const COMPACTING: &str = "raft.redb.compact";
pub(crate) const LOG: TableDefinition<'static, u64, &[u8]> = TableDefinition::new("log");
pub(crate) const META: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("meta");
pub(crate) const VOTE: &str = "vote";
pub(crate) const PURGED: &str = "purged";
pub(crate) const COMMITTED: &str = "committed";
pub(crate) const OWNER: &str = "owner";
pub(crate) const GENERATION: &str = "generation";

/// redb's page cache. Its default of 1 GiB is more than the whole server may use.
const CACHE_BYTES: usize = 16 << 20;

/// What the file held when it was opened.
#[derive(Debug, Default)]
pub(crate) struct Opened {
    pub vote: Option<Vote>,
    pub purged: Option<LogId>,
    pub committed: Option<LogId>,
    pub last: Option<LogId>,
    /// First index still in the file, purged or not.
    pub oldest: Option<u64>,
    /// Size of all entries in the file, purged ones that wait to be deleted included.
    pub live: u64,
    /// Number of the last commit.
    pub generation: u64,
}

/// Opens or creates the file and its journal (of `bytes`, with `salt`), takes over what only the journal has, checks every
/// page and every record, and claims both for `node`.
///
/// A damaged file gives an error; redb says it may panic on one, so a panic is turned into an error too.
pub(crate) fn open(disk: &dyn Disk, node: u64, bytes: u64, salt: u64) -> Result<(Database, Opened, Journal), StoreError> {
    without_panic(|| {
        if !disk.exists(FILE).map_err(|e| StoreError::io("look for", FILE, e))? {
            create(disk, node)?;
        }
        remove_if_there(disk, COMPACTING)?;
        // redb would make an empty database of an empty file, without the vote this server gave.
        if disk.open(FILE).and_then(|f| f.len()).map_err(|e| StoreError::io("measure", FILE, e))? == 0 {
            return Err(StoreError::damaged(FILE, "(pages)", "(all)", Damage::Short(0)));
        }
        let db = database(disk, FILE)?;
        belongs_to(&db, node)?;
        journal::fold(disk, &db, node)?;
        let opened = check(&db)?;
        witnessed(disk, opened.generation)?;
        let journal = Journal::open(disk, node, bytes, salt)?;
        Ok((db, opened, journal))
    })
}

/// Refuses a file that has lost commits which were flushed: redb takes the commit before when a page of the last is damaged.
fn witnessed(disk: &dyn Disk, generation: u64) -> Result<(), StoreError> {
    // Without a witness there is nothing to compare with; the file itself was checked.
    let known = Witness::open(disk).and_then(|w| w.newest()).unwrap_or(0);
    if generation < known {
        let lost = Damage::Content(format!(
            "its newest commit is {generation}, but commit {known} was flushed: the last vote or entries are lost"
        ));
        return Err(StoreError::damaged(FILE, "(pages)", "(newest commit)", lost));
    }
    Ok(())
}

/// The file while no server runs on it: for restore and recover.
pub(crate) struct Offline {
    db: Database,
    pub opened: Opened,
    /// The server it belongs to.
    pub owner: u64,
}

impl Offline {
    /// Whether there is a file.
    pub(crate) fn exists(disk: &dyn Disk) -> Result<bool, StoreError> {
        disk.exists(FILE).map_err(|e| StoreError::io("look for", FILE, e))
    }

    /// Opens an existing file and checks every page and record.
    pub(crate) fn open(disk: &dyn Disk) -> Result<Self, StoreError> {
        if !Self::exists(disk)? {
            return Err(StoreError::Missing { file: FILE.to_owned() });
        }
        without_panic(|| {
            let db = database(disk, FILE)?;
            let owner = {
                let read = db.begin_read().map_err(|e| StoreError::redb("read", FILE, e))?;
                let meta = read.open_table(META).map_err(|e| StoreError::redb("read", FILE, e))?;
                let nobody = || StoreError::damaged(FILE, "meta", OWNER, Damage::Content("the record is missing".to_owned()));
                read_meta::<OwnerV1>(&meta, Kind::Owner, OWNER)?.ok_or_else(nobody)?.node
            };
            journal::fold(disk, &db, owner)?;
            let opened = check(&db)?;
            Ok(Self { db, opened, owner })
        })
    }

    /// Entries of `range` in order, about `max_bytes` of them and at least one.
    pub(crate) fn read(&self, range: RangeInclusive<u64>, max_bytes: usize) -> Result<Vec<Entry>, StoreError> {
        without_panic(|| read(&self.db, range, max_bytes))
    }

    /// Makes the file of server `node` whose log was purged up to `at`, in one step.
    pub(crate) fn create(disk: &dyn Disk, node: u64, vote: Vote, at: LogId) -> Result<(), StoreError> {
        without_panic(|| {
            build(disk, node, |db| {
                let fail = |e: redb::Error| StoreError::redb("initialise", NEW, e);
                let write = db.begin_write().map_err(|e| fail(e.into()))?;
                {
                    let mut meta = write.open_table(META).map_err(|e| fail(e.into()))?;
                    let (vote, at) = (VoteV1::from(vote), LogIdV1::from(at));
                    meta.insert(VOTE, encode(Kind::Vote, 0, &vote).as_slice()).map_err(|e| fail(e.into()))?;
                    meta.insert(PURGED, encode(Kind::PurgeMark, 0, &at).as_slice()).map_err(|e| fail(e.into()))?;
                    meta.insert(COMMITTED, encode(Kind::Committed, 0, &at).as_slice()).map_err(|e| fail(e.into()))?;
                }
                write.commit().map_err(|e| fail(e.into()))
            })
        })
    }
}

pub(crate) fn database(disk: &dyn Disk, name: &str) -> Result<Database, StoreError> {
    let file = disk.open(name).map_err(|e| StoreError::io("open", name, e))?;
    let mut builder = redb::Builder::new();
    builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
    builder.create_with_backend(RedbFile::new(file)).map_err(|e| StoreError::redb("open", name, e))
}

/// Makes the file beside its place and moves it there: a crash in between leaves nothing, where a half-made database
/// would be refused for ever.
fn create(disk: &dyn Disk, node: u64) -> Result<(), StoreError> {
    let names = disk.list().map_err(|e| StoreError::io("list the directory of", FILE, e))?;
    if names.iter().any(|n| snapshots::is_finished(n) || n == JOURNAL) {
        return Err(StoreError::Missing { file: FILE.to_owned() });
    }
    build(disk, node, |_| Ok(()))
}

fn build(disk: &dyn Disk, node: u64, fill: impl FnOnce(&Database) -> Result<(), StoreError>) -> Result<(), StoreError> {
    remove_if_there(disk, NEW)?;
    let db = database(disk, NEW)?;
    claim(&db, node)?;
    fill(&db)?;
    db.close().map_err(|e| StoreError::redb("close", NEW, e))?;
    disk.open(NEW).and_then(|f| f.sync_data()).map_err(|e| StoreError::io("flush", NEW, e))?;
    disk.rename(NEW, FILE).map_err(|e| StoreError::io("rename", NEW, e))?;
    disk.sync_dir().map_err(|e| StoreError::io("flush the directory of", FILE, e))
}

/// Runs `work`, turning a panic inside redb (which a damaged page can cause) into an error.
pub(crate) fn without_panic<T>(work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        let reason = format!("the storage engine panicked: {}", said.unwrap_or("no message"));
        Err(StoreError::Damaged { file: FILE.to_owned(), table: "(pages)", key: "(unknown)".to_owned(), reason })
    })
}

pub(crate) fn remove_if_there(disk: &dyn Disk, name: &str) -> Result<(), StoreError> {
    let removed = disk.exists(name).and_then(|there| if there { disk.remove(name) } else { Ok(()) });
    removed.map_err(|e| StoreError::io("remove", name, e))
}

/// Writes into a new file whose it is.
fn claim(db: &Database, node: u64) -> Result<(), StoreError> {
    let fail = |e: redb::Error| StoreError::redb("initialise", NEW, e);
    let write = db.begin_write().map_err(|e| fail(e.into()))?;
    {
        write.open_table(LOG).map_err(|e| fail(e.into()))?;
        let mut meta = write.open_table(META).map_err(|e| fail(e.into()))?;
        let owner = encode(Kind::Owner, 0, &OwnerV1 { node });
        meta.insert(OWNER, owner.as_slice()).map_err(|e| fail(e.into()))?;
    }
    write.commit().map_err(|e| fail(e.into()))
}

/// Refuses a file of another server, and one that has lost its tables or its owner: it was whole when it got its name.
fn belongs_to(db: &Database, node: u64) -> Result<(), StoreError> {
    let fail = |e: redb::TableError| match e {
        redb::TableError::Storage(e) => StoreError::redb("read", FILE, e),
        e => StoreError::damaged(FILE, "(tables)", "(all)", Damage::Content(e.to_string())),
    };
    let read = db.begin_read().map_err(|e| StoreError::redb("read", FILE, e))?;
    read.open_table(LOG).map_err(fail)?;
    let meta = read.open_table(META).map_err(fail)?;
    match read_meta::<OwnerV1>(&meta, Kind::Owner, OWNER)? {
        Some(owner) if owner.node == node => Ok(()),
        Some(owner) => Err(StoreError::WrongOwner { file: FILE.to_owned(), owner: owner.node, asked: node }),
        None => Err(StoreError::damaged(FILE, "meta", OWNER, Damage::Content("it is missing".to_owned()))),
    }
}

/// Reads the state and visits every entry: damage is found now, not in the middle of an election.
fn check(db: &Database) -> Result<Opened, StoreError> {
    let read = db.begin_read().map_err(|e| StoreError::redb("read", FILE, e))?;
    let meta = read.open_table(META).map_err(|e| StoreError::redb("read", FILE, e))?;
    let log = read.open_table(LOG).map_err(|e| StoreError::redb("read", FILE, e))?;
    let id = |v: LogIdV1| -> LogId { v.into() };
    let purged = read_meta(&meta, Kind::PurgeMark, PURGED)?.map(id);
    let mut opened = Opened {
        vote: read_meta::<VoteV1>(&meta, Kind::Vote, VOTE)?.map(Vote::from),
        committed: read_meta(&meta, Kind::Committed, COMMITTED)?.map(id),
        last: purged,
        live: 0,
        generation: read_meta::<GenerationV1>(&meta, Kind::Generation, GENERATION)?.map_or(0, |g| g.number),
        oldest: log.first().map_err(|e| StoreError::redb("read", FILE, e))?.map(|(k, _)| k.value()),
        purged,
    };
    let mut expected: Option<u64> = purged.map(|p| p.index + 1);
    for item in log.iter().map_err(|e| StoreError::redb("read", FILE, e))? {
        let (key, value) = item.map_err(|e| StoreError::redb("read", FILE, e))?;
        let index = key.value();
        opened.live += value.value().len() as u64;
        if purged.is_some_and(|p| index <= p.index) {
            continue; // logically gone, waiting to be deleted
        }
        record::open(Kind::Entry, index, value.value()).map_err(|d| StoreError::damaged(FILE, "log", index, d))?;
        if let Some(expected) = expected.filter(|e| *e != index) {
            let hole = Damage::Content(format!("the log has a hole, expected entry {expected}"));
            return Err(StoreError::damaged(FILE, "log", index, hole));
        }
        expected = Some(index + 1);
    }
    if let Some((key, value)) = log.last().map_err(|e| StoreError::redb("read", FILE, e))? {
        let index = key.value();
        if purged.is_none_or(|p| index > p.index) {
            let entry = decode_entry(index, value.value()).map_err(|d| StoreError::damaged(FILE, "log", index, d))?;
            opened.last = Some(entry.log_id);
        }
    }
    opened.committed = believable_commit(&log, &opened)?;
    Ok(opened)
}

/// The stored commit mark, if the log still has that entry.
///
/// openraft applies up to the mark at start and fails on a missing entry. The mark only saves time, and it may be ahead
/// of the log when a snapshot was being installed at the moment of a crash; then it is forgotten.
fn believable_commit(log: &impl ReadableTable<u64, &'static [u8]>, opened: &Opened) -> Result<Option<LogId>, StoreError> {
    let Some(committed) = opened.committed else { return Ok(None) };
    if opened.purged.is_some_and(|p| committed.index <= p.index) {
        return Ok((opened.purged == Some(committed)).then_some(committed));
    }
    let Some(held) = log.get(committed.index).map_err(|e| StoreError::redb("read", FILE, e))? else { return Ok(None) };
    let entry = decode_entry(committed.index, held.value()).map_err(|d| StoreError::damaged(FILE, "log", committed.index, d))?;
    Ok((entry.log_id == committed).then_some(committed))
}

pub(super) fn read_meta<T: serde::de::DeserializeOwned>(
    meta: &impl ReadableTable<&'static str, &'static [u8]>,
    kind: Kind,
    key: &'static str,
) -> Result<Option<T>, StoreError> {
    let Some(held) = meta.get(key).map_err(|e| StoreError::redb("read", FILE, e))? else { return Ok(None) };
    decode(kind, 0, held.value()).map(Some).map_err(|d| StoreError::damaged(FILE, "meta", key, d))
}

/// Reads entries of `range` in order, stopping after about `max_bytes` (at least one entry).
pub(crate) fn read(db: &Database, range: RangeInclusive<u64>, max_bytes: usize) -> Result<Vec<Entry>, StoreError> {
    let read = db.begin_read().map_err(|e| StoreError::redb("read", FILE, e))?;
    let log = read.open_table(LOG).map_err(|e| StoreError::redb("read", FILE, e))?;
    let mut entries = Vec::new();
    let mut bytes = 0usize;
    for item in log.range(range).map_err(|e| StoreError::redb("read", FILE, e))? {
        let (key, value) = item.map_err(|e| StoreError::redb("read", FILE, e))?;
        bytes = bytes.saturating_add(value.value().len());
        if bytes > max_bytes && !entries.is_empty() {
            break;
        }
        let index = key.value();
        entries.push(decode_entry(index, value.value()).map_err(|d| StoreError::damaged(FILE, "log", index, d))?);
    }
    Ok(entries)
}
