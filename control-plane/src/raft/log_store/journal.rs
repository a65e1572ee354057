//! Votes and new entries go here first: one small write into space that was written before, and one flush.
//!
//! A durable commit of redb writes nine pages in as many places, often into parts of the file that are new to the file
//! system. Here a group costs one record in place, and redb takes over what has gathered, in one commit, when the file is full:
//!
//! ```text
//! votes, appends --> record number g, flush --> kept in memory --> answered
//! truncation, purge, or no room left --> redb: all that has gathered and the group, flush --> the next record is the first
//! start --> records above redb's number go into redb, flush --> the next record is the first
//!
//! file:    head (a page: owner, salt) | record g+1 | record g+2 | ... | older records, zeroes
//! record:  number XOR salt (8 bytes LE) | envelope of kind Journal, its place being those 8 bytes
//! ```
//! Every commit has a number, one above the one before, whether it goes to redb or here. The records from the start on
//! have consecutive numbers; what follows the last of them is older, torn or empty. Each record is written only when the
//! one before is flushed, so one that is readable behind one that is not, or that does not follow what redb holds, means
//! that something acknowledged is lost, and the start is refused. The last record of all can decay unseen here; the
//! [witness](super::witness) tells. The salt keeps what clients store from looking like a record.

use optimus_common::disk::{Disk, DiskFile};
use redb::{Database, ReadableDatabase, ReadableTable};

use super::tables::{self, COMMITTED, FILE, GENERATION, LOG, META, PURGED, VOTE};
use crate::raft::error::StoreError;
use crate::raft::record::{self, Damage, Kind};
use crate::raft::stored::{GenerationV1, JournalHeadV1, JournalV1, LogIdV1, decode, encode};
use crate::raft::types::LogId;

/// The file below the data directory.
pub(crate) const JOURNAL: &str = "raft.journal";
/// Its name while it is being made.
const NEW: &str = "raft.journal.tmp";
/// Its size on a server: some ten thousand single writes between two commits of redb.
pub(super) const BYTES: u64 = 4 << 20;
/// Its size in the simulator and in tests, which are to see it full.
pub(super) const BYTES_INLINE: u64 = 64 << 10;
/// Longest file that is read at start; ours are no longer than [`BYTES`].
const BYTES_MAX: u64 = 64 << 20;
/// Where the first record begins. A page of its own, which no record's write touches.
const START: usize = 4096;
/// The salted number before the envelope.
const NUMBER: usize = 8;

/// The open file.
#[derive(Debug)]
pub(super) struct Journal {
    file: Box<dyn DiskFile>,
    salt: u64,
    size: u64,
    at: u64,
}

impl Journal {
    /// Opens the file of server `node`, or makes one of `size` bytes. All its space is written now: a flush into new
    /// blocks costs the file system a commit of its own.
    pub(super) fn open(disk: &dyn Disk, node: u64, size: u64, salt: u64) -> Result<Self, StoreError> {
        let fail = |e| StoreError::io("prepare", JOURNAL, e);
        if !disk.exists(JOURNAL).map_err(fail)? {
            make(disk, node, size, salt)?;
        }
        let file = disk.open(JOURNAL).map_err(fail)?;
        let size = file.len().map_err(fail)?;
        let salt = head(&*file, size, node)?;
        Ok(Self { file, salt, size, at: START as u64 })
    }

    /// The bytes of a record, if there is room for it.
    pub(super) fn record(&self, number: u64, content: &JournalV1) -> Option<Vec<u8>> {
        let mark = number ^ self.salt;
        let mut bytes = mark.to_le_bytes().to_vec();
        bytes.extend_from_slice(&encode(Kind::Journal, mark, content));
        (self.at + bytes.len() as u64 <= self.size).then_some(bytes)
    }

    /// Writes a record without a flush.
    pub(super) fn write(&mut self, record: &[u8]) -> std::io::Result<()> {
        self.file.write_at(self.at, record)?;
        self.at += record.len() as u64;
        Ok(())
    }

    pub(super) fn sync(&self) -> std::io::Result<()> {
        self.file.sync_data()
    }

    /// Everything is durable in redb: the next record is the first.
    pub(super) fn restart(&mut self) {
        self.at = START as u64;
    }
}

/// Makes the file beside its place and moves it there, so that a head that does not check is damage and nothing else.
fn make(disk: &dyn Disk, node: u64, size: u64, salt: u64) -> Result<(), StoreError> {
    tables::remove_if_there(disk, NEW)?;
    let made = || {
        let file = disk.open(NEW)?;
        let mut page = encode(Kind::JournalHead, 0, &JournalHeadV1 { node, salt });
        page.resize(START, 0);
        file.write_at(0, &page)?;
        let zeroes = vec![0; 256 << 10];
        let mut at = START as u64;
        while at < size {
            let some = (size - at).min(zeroes.len() as u64);
            file.write_at(at, &zeroes[..some as usize])?;
            at += some;
        }
        file.sync_data()?;
        disk.rename(NEW, JOURNAL)?;
        disk.sync_dir()
    };
    made().map_err(|e| StoreError::io("create", JOURNAL, e))
}

/// Checks the head and gives the salt.
fn head(file: &dyn DiskFile, size: u64, node: u64) -> Result<u64, StoreError> {
    let refuse = |d: Damage| StoreError::damaged(JOURNAL, "head", 0, d);
    if !(START as u64..=BYTES_MAX).contains(&size) {
        return Err(refuse(Damage::Content(format!("it is {size} bytes long, {START} to {BYTES_MAX} were expected"))));
    }
    let mut page = vec![0; START];
    file.read_at(0, &mut page).map_err(|e| StoreError::io("read", JOURNAL, e))?;
    let length = record::length(&page).ok_or(Damage::Magic).map_err(refuse)?;
    let bytes = page.get(..length).ok_or(Damage::Short(START)).map_err(refuse)?;
    let head: JournalHeadV1 = decode(Kind::JournalHead, 0, bytes).map_err(refuse)?;
    if head.node != node {
        return Err(StoreError::WrongOwner { file: JOURNAL.to_owned(), owner: head.node, asked: node });
    }
    Ok(head.salt)
}

/// Puts what only the journal of server `node` has into redb, durably.
///
/// # Errors
/// A record that is lost, or one that checks but does not fit what redb holds.
pub(super) fn fold(disk: &dyn Disk, db: &Database, node: u64) -> Result<(), StoreError> {
    let fail = |e| StoreError::io("read", JOURNAL, e);
    if !disk.exists(JOURNAL).map_err(fail)? {
        return Ok(());
    }
    let file = disk.open(JOURNAL).map_err(fail)?;
    let size = file.len().map_err(fail)?;
    let salt = head(&*file, size, node)?;
    let mut bytes = vec![0; size as usize - START];
    file.read_at(START as u64, &mut bytes).map_err(fail)?;

    let (held, next) = held(db)?;
    let records: Vec<_> = consecutive(&bytes, salt, held)?.into_iter().filter(|(number, _)| *number > held).collect();
    let Some((newest, _)) = records.last() else { return Ok(()) };
    follows(&records, next)?;
    let to = |e: redb::Error| StoreError::redb("write", FILE, e);
    let write = db.begin_write().map_err(|e| to(e.into()))?;
    {
        let mut log = write.open_table(LOG).map_err(|e| to(e.into()))?;
        let mut meta = write.open_table(META).map_err(|e| to(e.into()))?;
        for (_, content) in &records {
            for entry in &content.entries {
                log.insert(entry.index, &*entry.record.0).map_err(|e| to(e.into()))?;
            }
            if let Some(vote) = &content.vote {
                meta.insert(VOTE, encode(Kind::Vote, 0, vote).as_slice()).map_err(|e| to(e.into()))?;
            }
            if let Some(committed) = &content.committed {
                meta.insert(COMMITTED, encode(Kind::Committed, 0, committed).as_slice()).map_err(|e| to(e.into()))?;
            }
        }
        let mark = encode(Kind::Generation, 0, &GenerationV1 { number: *newest });
        meta.insert(GENERATION, mark.as_slice()).map_err(|e| to(e.into()))?;
    }
    write.commit().map_err(|e| StoreError::redb("flush", FILE, e))
}

/// Number of redb's last commit, and the index its log goes on with; none for an empty log.
fn held(db: &Database) -> Result<(u64, Option<u64>), StoreError> {
    let from = |e: redb::Error| StoreError::redb("read", FILE, e);
    let read = db.begin_read().map_err(|e| from(e.into()))?;
    let meta = read.open_table(META).map_err(|e| from(e.into()))?;
    let log = read.open_table(LOG).map_err(|e| from(e.into()))?;
    let number = tables::read_meta::<GenerationV1>(&meta, Kind::Generation, GENERATION)?.map_or(0, |g| g.number);
    let purged = tables::read_meta::<LogIdV1>(&meta, Kind::PurgeMark, PURGED)?.map(|id| LogId::from(id).index);
    let last = log.last().map_err(|e| from(e.into()))?.map(|(key, _)| key.value());
    Ok((number, last.max(purged).and_then(|l| l.checked_add(1))))
}

/// Checks each entry, and that they go on where redb ends: found now, before anything is written.
fn follows(records: &[(u64, JournalV1)], mut next: Option<u64>) -> Result<(), StoreError> {
    for entry in records.iter().flat_map(|(_, content)| &content.entries) {
        record::open(Kind::Entry, entry.index, &entry.record.0).map_err(|d| StoreError::damaged(JOURNAL, "entries", entry.index, d))?;
        if let Some(next) = next.filter(|n| *n != entry.index) {
            let hole = Damage::Content(format!("the log has a hole, expected entry {next}"));
            return Err(StoreError::damaged(JOURNAL, "entries", entry.index, hole));
        }
        next = entry.index.checked_add(1);
    }
    Ok(())
}

fn lost(number: u64, what: String) -> StoreError {
    StoreError::damaged(JOURNAL, "records", number, Damage::Content(what))
}

/// The records from the start on, each with its number, when redb holds all up to number `held`.
fn consecutive(bytes: &[u8], salt: u64, held: u64) -> Result<Vec<(u64, JournalV1)>, StoreError> {
    let mut found: Vec<(u64, JournalV1)> = Vec::new();
    let mut at = 0;
    while let Some((number, length)) = intact(&bytes[at..], salt) {
        if found.last().is_some_and(|(last, _)| last.checked_add(1) != Some(number)) {
            break;
        }
        let envelope = &bytes[at + NUMBER..at + length];
        let content = decode(Kind::Journal, number ^ salt, envelope).map_err(|d| StoreError::damaged(JOURNAL, "records", number, d))?;
        found.push((number, content));
        at += length;
    }
    if let Some((first, _)) = found.first().filter(|(first, _)| first - 1 > held) {
        return Err(lost(*first - 1, format!("{FILE} ends with commit {held}, and the journal begins with {first}")));
    }
    let newest = found.last().map_or(held, |(last, _)| (*last).max(held));
    // What lies behind is older, or was never finished.
    let rest = &bytes[at..];
    let ahead = newest.saturating_add(1)..newest.saturating_add(bytes.len() as u64);
    let stray = envelopes(rest)
        .filter_map(|envelope| rest.get(envelope.checked_sub(NUMBER)?..))
        .filter(|record| number(record, salt).is_some_and(|n| ahead.contains(&n)))
        .find_map(|record| intact(record, salt));
    match stray {
        Some((stray, _)) => Err(lost(newest + 1, format!("record {stray} is there, and the one after {newest} is not"))),
        None => Ok(found),
    }
}

/// Where envelopes seem to begin. Space never written to is passed over quickly.
fn envelopes(bytes: &[u8]) -> impl Iterator<Item = usize> {
    const PAGE: usize = 4096;
    let pages = bytes.chunks(PAGE).enumerate().filter(|(_, page)| **page != [0; PAGE][..page.len()]);
    pages.flat_map(move |(n, page)| (n * PAGE..n * PAGE + page.len()).filter(|at| record::begins(&bytes[*at..])))
}

/// The number a record at the start of `bytes` would have; zero is none.
fn number(bytes: &[u8], salt: u64) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.first_chunk()?) ^ salt).filter(|n| *n > 0)
}

/// Number and length of the record at the start of `bytes`, if there is one whose checksum holds.
fn intact(bytes: &[u8], salt: u64) -> Option<(u64, usize)> {
    let number = number(bytes, salt)?;
    let length = NUMBER.checked_add(record::length(bytes.get(NUMBER..)?)?)?;
    let envelope = bytes.get(NUMBER..length)?;
    match record::open(Kind::Journal, number ^ salt, envelope) {
        // An intact one of another format is found and then refused by name.
        Ok(_) | Err(Damage::Format(_)) => Some((number, length)),
        Err(_) => None,
    }
}
