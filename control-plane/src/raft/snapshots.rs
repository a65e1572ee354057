//! Snapshots as files of their own.
//!
//! ```text
//! snapshot-<index>-<number>.snap :  record(head: id, last log id, membership, length, BLAKE3) | content
//! ```
//! Written beside under `.tmp`, synced, renamed, directory synced; so a file under its final name is whole, and what a
//! crash leaves half done is removed at the next start. The newest [`KEEP`] stay.

use std::sync::Arc;

use bytes::Bytes;
use optimus_common::disk::Disk;
use optimus_host::failpoint;
use tokio::sync::watch;

use super::error::StoreError;
use super::log_store::SnapshotGate;
use super::record::{self, Damage, Kind};
use super::stored::{SnapshotHeadV1, decode, encode};
use super::types::SnapshotMeta;

/// Snapshots kept; the older one lets a backup in progress finish reading.
pub(crate) const KEEP: usize = 2;
/// Largest head (its membership is bounded by a handful of servers); a damaged length must not ask for gigabytes.
const HEAD_MAX: u64 = 1 << 20;
const SUFFIX: &str = ".snap";
const TEMPORARY: &str = ".tmp";

/// A snapshot in memory, checked.
#[derive(Clone, Debug)]
pub(crate) struct Loaded {
    pub meta: SnapshotMeta,
    pub content: Bytes,
}

/// The snapshots of one server.
pub(crate) struct SnapshotStore {
    disk: Arc<dyn Disk>,
    /// Index of the newest durable snapshot.
    durable: watch::Sender<Option<u64>>,
}

/// `snapshot-<20 digits>-<6 digits>`; sorts by index, then by number.
fn parse(name: &str) -> Option<(u64, u64)> {
    let (index, number) = name.strip_suffix(SUFFIX)?.strip_prefix("snapshot-")?.split_once('-')?;
    Some((index.parse().ok()?, number.parse().ok()?))
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
        let store = Self { disk, durable: watch::Sender::new(None) };
        let names = store.disk.list().map_err(|e| StoreError::io("list", "snapshots", e))?;
        for name in names.iter().filter(|n| n.starts_with("snapshot-") && n.ends_with(TEMPORARY)) {
            store.disk.remove(name).map_err(|e| StoreError::io("remove", name, e))?;
        }
        let newest = store.load_newest()?;
        store.durable.send_replace(newest.as_ref().and_then(|s| s.meta.last_log_id).map(|id| id.index));
        store.prune()?;
        Ok((store, newest))
    }

    /// Index up to which snapshots are durable.
    pub(crate) fn gate(&self) -> SnapshotGate {
        self.durable.subscribe()
    }

    /// Names of finished snapshots, oldest first.
    fn names(&self) -> Result<Vec<String>, StoreError> {
        let mut names = self.disk.list().map_err(|e| StoreError::io("list", "snapshots", e))?;
        names.retain(|n| parse(n).is_some());
        names.sort_by_key(|n| parse(n));
        Ok(names)
    }

    /// The newest snapshot, read and checked.
    pub(crate) fn load_newest(&self) -> Result<Option<Loaded>, StoreError> {
        self.names()?.pop().map(|name| self.load(&name)).transpose()
    }

    fn load(&self, name: &str) -> Result<Loaded, StoreError> {
        let io = |e| StoreError::io("read", name, e);
        let damaged = |d| StoreError::damaged(name, "(snapshot)", parse(name).map_or(0, |p| p.0), d);
        let file = self.disk.open(name).map_err(io)?;
        let length = file.len().map_err(io)?;
        let mut start = vec![0; length.min(HEAD_MAX) as usize];
        file.read_at(0, &mut start).map_err(io)?;
        let (head, head_len) = split_head(&start).map_err(damaged)?;
        if length != head_len.saturating_add(head.length) {
            let said = usize::try_from(head.length).unwrap_or(usize::MAX);
            return Err(damaged(Damage::Length { said, has: length.saturating_sub(head_len) as usize }));
        }
        let mut content = vec![0; head.length as usize];
        file.read_at(head_len, &mut content).map_err(io)?;
        checked(head, content.into()).map_err(damaged)
    }

    /// Writes a snapshot durably and opens the gate for purging what it covers.
    pub(crate) fn save(&self, meta: &SnapshotMeta, content: &[u8]) -> Result<(), StoreError> {
        let index = meta.last_log_id.map_or(0, |id| id.index);
        let number = self.names()?.iter().filter_map(|n| parse(n)).filter(|p| p.0 == index).map(|p| p.1 + 1).max().unwrap_or(0);
        let name = format!("snapshot-{index:020}-{number:06}{SUFFIX}");
        let temporary = format!("snapshot-{index:020}-{number:06}{TEMPORARY}");
        let io = |operation| {
            let name = name.clone();
            move |e: std::io::Error| StoreError::io(operation, &name, e)
        };
        let file = self.disk.open(&temporary).map_err(io("create"))?;
        file.set_len(0).map_err(io("empty"))?;
        let head = seal_head(meta, content);
        file.write_at(0, &head).map_err(io("write"))?;
        file.write_at(head.len() as u64, content).map_err(io("write"))?;
        failpoint::fails("snapshot.before_sync").map_err(io("flush"))?;
        file.sync_data().map_err(io("flush"))?;
        failpoint::hit("snapshot.before_rename");
        self.disk.rename(&temporary, &name).map_err(io("rename"))?;
        failpoint::hit("snapshot.after_rename");
        self.disk.sync_dir().map_err(io("flush the directory of"))?;
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

fn seal_head(meta: &SnapshotMeta, content: &[u8]) -> Vec<u8> {
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

fn checked(head: SnapshotHeadV1, content: Bytes) -> Result<Loaded, Damage> {
    if content.len() as u64 != head.length {
        return Err(Damage::Length { said: usize::try_from(head.length).unwrap_or(usize::MAX), has: content.len() });
    }
    if blake3::hash(&content).as_bytes() != &head.hash {
        return Err(Damage::Checksum);
    }
    let meta = SnapshotMeta { last_log_id: head.last.map(Into::into), last_membership: head.membership.into(), snapshot_id: head.id };
    Ok(Loaded { meta, content })
}

/// The same bytes as a snapshot file, for sending.
pub(crate) fn pack(meta: &SnapshotMeta, content: &[u8]) -> Vec<u8> {
    let mut out = seal_head(meta, content);
    out.extend_from_slice(content);
    out
}

/// Reverses [`pack`], with every check.
pub(crate) fn unpack(bytes: &Bytes) -> Result<Loaded, Damage> {
    let (head, length) = split_head(bytes)?;
    checked(head, bytes.slice(length as usize..))
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

    #[test]
    fn a_packed_snapshot_unpacks_and_damage_is_refused() {
        let packed = Bytes::from(pack(&meta(3), b"content"));
        let loaded = unpack(&packed).unwrap();
        assert_eq!((loaded.meta, &loaded.content[..]), (meta(3), &b"content"[..]));
        for at in 0..packed.len() {
            let mut bad = packed.to_vec();
            bad[at] ^= 1;
            assert!(unpack(&bad.into()).is_err(), "byte {at}");
            assert!(unpack(&packed.slice(..at)).is_err(), "cut at {at}");
        }
    }
}
