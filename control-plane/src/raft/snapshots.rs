//! Snapshots as files of their own.
//!
//! ```text
//! snapshot-<index>-<number>.snap :  record(head: id, last log id, membership, length, BLAKE3) | content
//! ```
//! Written beside under `.tmp`, synced, renamed, directory synced; so a file under its final name is whole, and what a
//! crash leaves half done is removed at the next start. The newest [`KEEP`] stay. A snapshot travels as the bytes of its
//! file; [`receiving`](super::receiving) gathers them under [`RECEIVING`], and [`SnapshotStore::adopt`] renames that file.
//!
//! What openraft passes around is a [`SnapshotFile`], a handle. The content is in memory only while it is written or
//! restored.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use optimus_common::disk::{Disk, DiskFile};
use optimus_common::planted::planted;
use optimus_host::failpoint;
use tokio::sync::watch;

use super::error::StoreError;
use super::log_store::SnapshotGate;
use super::record::{self, Damage, Kind};
use super::stored::{SnapshotHeadV1, decode, encode};
use super::types::SnapshotMeta;

/// Snapshots kept; the older one lets a backup in progress finish reading.
pub(crate) const KEEP: usize = 2;
/// The one snapshot that is being received, until it is whole.
pub(crate) const RECEIVING: &str = "receiving.part";
/// Largest head (its membership is bounded by a handful of servers); a damaged length must not ask for gigabytes.
const HEAD_MAX: u64 = 1 << 20;
/// Bytes read or written at once.
const PIECE: usize = 1 << 20;
/// Bytes written between two flushes. One flush of a gigabyte would make every flush of the log on the same disk wait
/// for all of it.
const FLUSH_EVERY: u64 = 8 << 20;
const SUFFIX: &str = ".snap";
const TEMPORARY: &str = ".tmp";

/// A snapshot in memory, checked.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    pub meta: SnapshotMeta,
    pub content: Bytes,
}

/// A handle on a snapshot; none only before it is filled.
#[derive(Clone, Debug, Default)]
pub struct SnapshotFile(pub(crate) Option<Arc<Held>>);

/// An open snapshot file whose head was checked. It stays readable when the file is pruned meanwhile.
#[derive(Debug)]
pub(crate) struct Held {
    name: String,
    file: Box<dyn DiskFile>,
    head: SnapshotHeadV1,
    /// Where the content begins.
    start: u64,
    /// Whether the content was compared with its hash.
    checked: AtomicBool,
}

impl Held {
    /// Opens a file that exists and checks its head and length, not its content.
    pub(crate) fn open(disk: &dyn Disk, name: &str) -> Result<Self, StoreError> {
        let io = |e| StoreError::io("read", name, e);
        let damaged = |d| StoreError::damaged(name, "(snapshot)", place(name), d);
        let file = disk.open(name).map_err(io)?;
        let length = file.len().map_err(io)?;
        let mut beginning = vec![0; length.min(HEAD_MAX) as usize];
        file.read_at(0, &mut beginning).map_err(io)?;
        let (head, start) = split_head(&beginning).map_err(damaged)?;
        if length != start.saturating_add(head.length) {
            let said = usize::try_from(head.length).unwrap_or(usize::MAX);
            return Err(damaged(Damage::Length { said, has: length.saturating_sub(start) as usize }));
        }
        Ok(Self { name: name.to_owned(), file, head, start, checked: AtomicBool::new(false) })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn head(&self) -> &SnapshotHeadV1 {
        &self.head
    }

    pub(crate) fn meta(&self) -> SnapshotMeta {
        let head = self.head.clone();
        SnapshotMeta { last_log_id: head.last.map(Into::into), last_membership: head.membership.into(), snapshot_id: head.id }
    }

    /// Length of the head, in bytes.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// Length of the file, in bytes.
    pub(crate) fn total(&self) -> u64 {
        self.start + self.head.length
    }

    /// Bytes of the file from `offset`, at most `length`.
    pub(crate) fn read(&self, offset: u64, length: usize) -> Result<Bytes, StoreError> {
        let mut bytes = vec![0; length.min(self.total().saturating_sub(offset) as usize)];
        self.file.read_at(offset, &mut bytes).map_err(|e| StoreError::io("read", &self.name, e))?;
        Ok(bytes.into())
    }

    /// Compares the content with its hash, once for this handle.
    pub(crate) fn verify(&self) -> Result<(), StoreError> {
        if !self.checked.load(Ordering::Relaxed) {
            self.walk(|_| ())?;
        }
        Ok(())
    }

    /// The whole content, checked.
    pub(crate) fn load(&self) -> Result<Loaded, StoreError> {
        let mut content = Vec::with_capacity(self.head.length as usize);
        self.walk(|piece| content.extend_from_slice(piece))?;
        Ok(Loaded { meta: self.meta(), content: content.into() })
    }

    fn walk(&self, mut see: impl FnMut(&[u8])) -> Result<(), StoreError> {
        let mut hash = blake3::Hasher::new();
        let mut at = self.start;
        while at < self.total() {
            let piece = self.read(at, PIECE)?;
            hash.update(&piece);
            see(&piece);
            at += piece.len() as u64;
        }
        if hash.finalize().as_bytes() != &self.head.hash {
            return Err(StoreError::damaged(&self.name, "(snapshot)", place(&self.name), Damage::Checksum));
        }
        self.checked.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// The snapshots of one server.
pub(crate) struct SnapshotStore {
    disk: Arc<dyn Disk>,
    /// Index of the newest durable snapshot.
    durable: watch::Sender<Option<u64>>,
    /// The newest snapshot, opened once for all who send it.
    newest: Mutex<Option<Arc<Held>>>,
    /// One snapshot gets its name at a time: one may be built while another is received.
    naming: Mutex<()>,
}

/// `snapshot-<20 digits>-<6 digits>`; sorts by index, then by number.
fn parse(name: &str) -> Option<(u64, u64)> {
    let (index, number) = name.strip_suffix(SUFFIX)?.strip_prefix("snapshot-")?.split_once('-')?;
    Some((index.parse().ok()?, number.parse().ok()?))
}

fn place(name: &str) -> u64 {
    parse(name).map_or(0, |p| p.0)
}

/// Whether a file of that name is a finished snapshot.
pub(crate) fn is_finished(name: &str) -> bool {
    parse(name).is_some()
}

impl SnapshotStore {
    /// Cleans up after a crash and loads the newest snapshot.
    ///
    /// # Errors
    /// When the newest snapshot is damaged: the log before it is gone, so an older one does not help.
    pub(crate) fn open(disk: Arc<dyn Disk>) -> Result<(Self, Option<Loaded>), StoreError> {
        let store = Self { disk, durable: watch::Sender::new(None), newest: Mutex::new(None), naming: Mutex::new(()) };
        let names = store.disk.list().map_err(|e| StoreError::io("list", "snapshots", e))?;
        let unfinished = |n: &str| (n.starts_with("snapshot-") && n.ends_with(TEMPORARY)) || n == RECEIVING;
        for name in names.iter().filter(|n| unfinished(n)) {
            store.disk.remove(name).map_err(|e| StoreError::io("remove", name, e))?;
        }
        let newest = store.newest()?.map(|held| held.load()).transpose()?;
        store.durable.send_replace(newest.as_ref().and_then(|s| s.meta.last_log_id).map(|id| id.index));
        store.prune()?;
        Ok((store, newest))
    }

    /// Index up to which snapshots are durable.
    pub(crate) fn gate(&self) -> SnapshotGate {
        self.durable.subscribe()
    }

    pub(crate) fn disk(&self) -> Arc<dyn Disk> {
        self.disk.clone()
    }

    /// Names of finished snapshots, oldest first.
    fn names(&self) -> Result<Vec<String>, StoreError> {
        let mut names = self.disk.list().map_err(|e| StoreError::io("list", "snapshots", e))?;
        names.retain(|n| parse(n).is_some());
        names.sort_by_key(|n| parse(n));
        Ok(names)
    }

    /// A handle on the newest snapshot. Reads its head at most, so that it may be called where commands are applied.
    pub(crate) fn newest(&self) -> Result<Option<Arc<Held>>, StoreError> {
        let Some(name) = self.names()?.pop() else { return Ok(None) };
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        match &*newest {
            Some(held) if held.name == name => Ok(Some(held.clone())),
            _ => Ok(Some(newest.insert(Arc::new(Held::open(&*self.disk, &name)?)).clone())),
        }
    }

    /// Writes a snapshot durably and opens the gate for purging what it covers.
    pub(crate) fn save(&self, meta: &SnapshotMeta, content: &[u8]) -> Result<(), StoreError> {
        let temporary = format!("snapshot-{:020}{TEMPORARY}", meta.last_log_id.map_or(0, |id| id.index));
        let fail = |operation, e| StoreError::io(operation, &temporary, e);
        let file = self.disk.open(&temporary).map_err(|e| fail("create", e))?;
        file.set_len(0).map_err(|e| fail("empty", e))?;
        let head = seal_head(meta, content);
        file.write_at(0, &head).map_err(|e| fail("write", e))?;
        let (mut at, mut unflushed) = (head.len() as u64, 0);
        for piece in content.chunks(PIECE) {
            file.write_at(at, piece).map_err(|e| fail("write", e))?;
            at += piece.len() as u64;
            unflushed += piece.len() as u64;
            if unflushed >= FLUSH_EVERY {
                file.sync_data().map_err(|e| fail("flush", e))?;
                unflushed = 0;
            }
        }
        failpoint::fails("snapshot.before_sync").map_err(|e| fail("flush", e))?;
        if !planted("rename-before-fsync") {
            file.sync_data().map_err(|e| fail("flush", e))?;
        }
        self.publish(&temporary, meta)
    }

    /// Makes the received snapshot, whole and flushed under [`RECEIVING`], the newest one. The gate for purging opens.
    pub(crate) fn adopt(&self, meta: &SnapshotMeta) -> Result<(), StoreError> {
        self.publish(RECEIVING, meta)
    }

    fn publish(&self, from: &str, meta: &SnapshotMeta) -> Result<(), StoreError> {
        let _one = self.naming.lock().unwrap_or_else(PoisonError::into_inner);
        let index = meta.last_log_id.map_or(0, |id| id.index);
        let same = self.names()?.iter().filter_map(|n| parse(n)).filter(|p| p.0 == index).map(|p| p.1 + 1).max();
        let name = format!("snapshot-{index:020}-{:06}{SUFFIX}", same.unwrap_or(0));
        failpoint::hit("snapshot.before_rename");
        self.disk.rename(from, &name).map_err(|e| StoreError::io("rename", from, e))?;
        failpoint::hit("snapshot.after_rename");
        self.disk.sync_dir().map_err(|e| StoreError::io("flush the directory of", &name, e))?;
        failpoint::hit("snapshot.durable");
        self.durable.send_modify(|held| *held = (*held).max(meta.last_log_id.map(|id| id.index)));
        self.prune()
    }

    fn prune(&self) -> Result<(), StoreError> {
        let names = self.names()?;
        let surplus = names.len().saturating_sub(KEEP);
        for name in &names[..surplus] {
            self.disk.remove(name).map_err(|e| StoreError::io("remove", name, e))?;
        }
        if surplus > 0 {
            self.disk.sync_dir().map_err(|e| StoreError::io("flush the directory of", "snapshots", e))?;
        }
        Ok(())
    }
}

/// The head of a snapshot file as a record; the content follows it.
pub(crate) fn seal_head(meta: &SnapshotMeta, content: &[u8]) -> Vec<u8> {
    let head = SnapshotHeadV1 {
        id: meta.snapshot_id.clone(),
        last: meta.last_log_id.map(Into::into),
        membership: (&meta.last_membership).into(),
        length: content.len() as u64,
        hash: *blake3::hash(content).as_bytes(),
    };
    encode(Kind::Snapshot, 0, &head)
}

/// The head at the start of `bytes` and its length.
fn split_head(bytes: &[u8]) -> Result<(SnapshotHeadV1, u64), Damage> {
    let length = bytes.get(8..12).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes).ok_or(Damage::Short(bytes.len()))?;
    let end = record::HEADER.saturating_add(length as usize);
    let record = bytes.get(..end).ok_or(Damage::Length { said: length as usize, has: bytes.len() })?;
    Ok((decode(Kind::Snapshot, 0, record)?, end as u64))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use optimus_common::disk::sim::{Crash, MemDisk};

    use super::*;
    use crate::raft::types::LogId;

    fn meta(index: u64) -> SnapshotMeta {
        let last = LogId::new(openraft::CommittedLeaderId::new(1, 1), index);
        SnapshotMeta { last_log_id: Some(last), last_membership: Default::default(), snapshot_id: format!("s{index}") }
    }

    fn open(disk: &MemDisk) -> (SnapshotStore, Option<Loaded>) {
        SnapshotStore::open(Arc::new(disk.clone())).unwrap()
    }

    #[test]
    fn the_newest_two_are_kept_and_the_newest_is_loaded() {
        let disk = MemDisk::new();
        let (store, none) = open(&disk);
        assert!(none.is_none() && store.gate().borrow().is_none());
        for index in [5, 9, 9, 12] {
            store.save(&meta(index), format!("state {index}").as_bytes()).unwrap();
            assert_eq!(*store.gate().borrow(), Some(index));
        }
        assert_eq!(disk.list().unwrap().len(), KEEP);
        let (store, newest) = open(&disk);
        let newest = newest.unwrap();
        assert_eq!((newest.meta, &newest.content[..]), (meta(12), &b"state 12"[..]));
        assert_eq!(*store.gate().borrow(), Some(12));
    }

    #[test]
    fn a_crash_at_any_change_leaves_the_old_or_the_new_snapshot() {
        let first = MemDisk::new();
        open(&first).0.save(&meta(5), b"old").unwrap();
        let steps = {
            let disk = first.fork();
            let before = disk.changes();
            open(&disk).0.save(&meta(9), &[7; 5000]).unwrap();
            disk.changes() - before
        };
        assert!(steps >= 6, "create, empty, two writes, two syncs and a rename");
        for step in 0..=steps {
            for seed in 0..8 {
                let disk = first.fork();
                disk.power_off_after(step);
                let saved = SnapshotStore::open(Arc::new(disk.clone())).and_then(|(s, _)| s.save(&meta(9), &[7; 5000]));
                disk.crash(if seed == 0 { Crash::LoseAll } else { Crash::Scattered { seed } });
                let (_, newest) = open(&disk);
                let index = newest.unwrap().meta.last_log_id.unwrap().index;
                assert!(index == 9 || (index == 5 && saved.is_err()), "step {step} seed {seed}: {index} after {saved:?}");
                assert!(disk.list().unwrap().iter().all(|n| n.ends_with(SUFFIX)));
            }
        }
    }

    #[test]
    fn every_damaged_byte_is_refused_by_name() {
        let disk = MemDisk::new();
        open(&disk).0.save(&meta(5), b"some state").unwrap();
        let name = disk.list().unwrap().remove(0);
        let length = disk.open(&name).unwrap().len().unwrap();
        for at in 0..length {
            let copy = disk.fork();
            copy.corrupt(&name, at, 0x41).unwrap();
            let Err(e) = SnapshotStore::open(Arc::new(copy)) else { panic!("byte {at} was accepted") };
            let text = e.to_string();
            assert!(text.contains(&name) && text.contains("replace this server"), "{text}");
        }
        let cut = disk.fork();
        cut.open(&name).unwrap().set_len(length - 1).unwrap();
        assert!(SnapshotStore::open(Arc::new(cut)).is_err());
    }
}
