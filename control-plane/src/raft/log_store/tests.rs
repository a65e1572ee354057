#![allow(clippy::unwrap_used)]

mod compaction;
mod crash_points;
mod journaled;

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use openraft::storage::RaftLogStorageExt;
use openraft::{CommittedLeaderId, EntryPayload};
use optimus_common::disk::sim::{Change, Crash, MemDisk};
use redb::ReadableDatabase;

use super::*;
use crate::raft::network::{SnapshotKey, SnapshotPart};
use crate::raft::receiving::Receiver;
use crate::raft::snapshots::SnapshotStore;
use crate::raft::types::{Batch, Blob, SnapshotMeta};

const NODE: u64 = 7;

fn id(term: u64, index: u64) -> LogId {
    LogId::new(CommittedLeaderId::new(term, NODE), index)
}

fn entry(term: u64, index: u64, size: usize) -> Entry {
    let commands = vec![Blob(Bytes::from(vec![index as u8; size])), Blob(Bytes::from_static(b"x"))];
    Entry { log_id: id(term, index), payload: EntryPayload::Normal(Batch(Arc::new(commands))) }
}

struct Open {
    store: LogStore,
    handle: WriterHandle,
    gate: watch::Sender<Option<u64>>,
    fatal: Fatal,
}

async fn open_with(disk: &MemDisk, io: IoMode) -> Result<Open, StoreError> {
    open_on(Arc::new(disk.clone()), io, None).await
}

async fn open_on(disk: Arc<dyn Disk>, io: IoMode, compact_step: Option<usize>) -> Result<Open, StoreError> {
    let (gate, seen) = watch::channel(None);
    let fatal = Fatal::new();
    let (store, handle) = LogStore::open_with(disk, NODE, seen, fatal.clone(), io, compact_step).await?;
    Ok(Open { store, handle, gate, fatal })
}

async fn open(disk: &MemDisk) -> Open {
    open_with(disk, IoMode::Inline).await.unwrap()
}

async fn all(store: &mut LogStore) -> Vec<Entry> {
    store.try_get_log_entries(..).await.unwrap()
}

#[tokio::test]
async fn what_was_acknowledged_survives_the_loss_of_everything_else() {
    for io in [IoMode::Inline, IoMode::Threads] {
        let disk = MemDisk::new();
        let mut a = open_with(&disk, io).await.unwrap();
        a.store.save_vote(&Vote::new(3, NODE)).await.unwrap();
        a.store.blocking_append([entry(3, 0, 10), entry(3, 1, 9000), entry(3, 2, 300_000)]).await.unwrap();
        disk.crash(Crash::LoseAll);
        let mut b = open_with(&disk, io).await.unwrap();
        assert_eq!(b.store.read_vote().await.unwrap(), Some(Vote::new(3, NODE)));
        assert_eq!(all(&mut b.store).await, [entry(3, 0, 10), entry(3, 1, 9000), entry(3, 2, 300_000)]);
        b.handle.stop().await;
    }
}

#[tokio::test]
async fn a_clean_stop_keeps_what_was_queued_and_refuses_what_comes_later() {
    let disk = MemDisk::new();
    let mut a = open_with(&disk, IoMode::Threads).await.unwrap();
    a.store.blocking_append([entry(1, 0, 10)]).await.unwrap();
    a.handle.stop().await;
    assert!(a.store.blocking_append([entry(1, 1, 10)]).await.is_err());
    assert_eq!(all(&mut open(&disk).await.store).await, [entry(1, 0, 10)]);
}

/// Guard G1. Without it openraft resumes as leader without an election.
#[tokio::test]
async fn g1_an_own_committed_vote_is_read_back_as_uncommitted() {
    let disk = MemDisk::new();
    let mut a = open(&disk).await;
    a.store.save_vote(&Vote::new_committed(5, NODE)).await.unwrap();
    disk.crash(Crash::LoseAll);
    assert_eq!(open(&disk).await.store.read_vote().await.unwrap(), Some(Vote::new(5, NODE)));

    let mut a = open(&disk).await;
    a.store.save_vote(&Vote::new_committed(6, 8)).await.unwrap();
    disk.crash(Crash::LoseAll);
    assert_eq!(open(&disk).await.store.read_vote().await.unwrap(), Some(Vote::new_committed(6, 8)), "another's stays");
}

/// Guard G2. Without it the entries are gone before the state they led to is durable.
#[tokio::test]
async fn g2_a_purge_waits_for_a_durable_snapshot() {
    let disk = MemDisk::new();
    let mut a = open(&disk).await;
    a.store.blocking_append((0..10).map(|i| entry(1, i, 10))).await.unwrap();
    a.gate.send_replace(Some(4));
    {
        let mut purge = std::pin::pin!(a.store.purge(id(1, 5)));
        // Polled until nothing else can run: still waiting, and nothing was purged.
        assert!(tokio::time::timeout(Duration::ZERO, &mut purge).await.is_err());
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(tokio::time::timeout(Duration::ZERO, &mut purge).await.is_err());
        a.gate.send_replace(Some(5));
        purge.await.unwrap();
    }
    assert_eq!(a.store.bounds(), (Some(id(1, 5)), Some(id(1, 9))));
    a.fatal.raise("the disk is gone");
    let refused = a.store.purge(id(1, 8)).await;
    assert!(refused.unwrap_err().to_string().contains("the disk is gone"), "a waiting purge ends with the node");
}

/// The last line of defence behind guard G3.
#[tokio::test]
async fn a_hole_is_never_written() {
    for bad in [3, 1, 0] {
        let disk = MemDisk::new();
        let mut a = open(&disk).await;
        a.store.blocking_append([entry(1, 0, 10), entry(1, 1, 10)]).await.unwrap();
        assert!(a.store.blocking_append([entry(1, bad, 10)]).await.is_err(), "entry {bad} after 1");
        assert!(a.fatal.get().unwrap().contains("refused to append"));
        disk.crash(Crash::KeepAll);
        assert_eq!(all(&mut open(&disk).await.store).await.len(), 2);
    }
}

#[tokio::test]
async fn a_failed_flush_stops_the_store_for_good() {
    for io in [IoMode::Inline, IoMode::Threads] {
        let disk = MemDisk::new();
        let mut a = open_with(&disk, io).await.unwrap();
        a.store.blocking_append([entry(1, 0, 10)]).await.unwrap();
        disk.fail_sync(1);
        assert!(a.store.blocking_append([entry(1, 1, 10)]).await.is_err());
        assert!(a.fatal.get().unwrap().contains("simulated sync failure"));
        let changes = disk.changes();
        assert!(a.store.blocking_append([entry(1, 1, 10)]).await.is_err(), "never retried");
        assert!(a.store.save_vote(&Vote::new(9, NODE)).await.is_err());
        assert_eq!(disk.changes(), changes, "nothing was written after the failure");
        a.handle.stop().await;
        disk.crash(Crash::LoseAll);
        assert_eq!(all(&mut open(&disk).await.store).await, [entry(1, 0, 10)]);
    }
}

#[tokio::test]
async fn a_full_disk_stops_the_store_and_loses_nothing() {
    let disk = MemDisk::new();
    let mut a = open(&disk).await;
    a.store.blocking_append([entry(1, 0, 10)]).await.unwrap();
    let used = disk.open(tables::FILE).unwrap().len().unwrap();
    disk.set_capacity(Some(used));
    let mut written = 1;
    while a.store.blocking_append([entry(1, written, 200_000)]).await.is_ok() {
        written += 1;
        assert!(written < 1000, "the disk never filled");
    }
    assert!(a.fatal.get().is_some());
    disk.crash(Crash::LoseAll);
    assert_eq!(all(&mut open(&disk).await.store).await.len() as u64, written);
}

#[tokio::test]
async fn truncated_and_purged_entries_are_gone_for_readers_at_once() {
    let disk = MemDisk::new();
    let mut a = open(&disk).await;
    a.gate.send_replace(Some(u64::MAX));
    a.store.blocking_append((0..3000).map(|i| entry(1, i, 10))).await.unwrap();
    a.store.truncate(id(1, 2990)).await.unwrap();
    a.store.blocking_append([entry(2, 2990, 20)]).await.unwrap();
    a.store.purge(id(1, 2500)).await.unwrap();
    let seen = all(&mut a.store).await;
    assert_eq!((seen.len(), seen[0].log_id, seen.last().unwrap().log_id), (490, id(1, 2501), id(2, 2990)));
    assert!(a.store.try_get_log_entries(..2501).await.unwrap().is_empty());

    // The entries are deleted slice by slice, in moments without requests.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    let oldest = || {
        let db = a.store.shared.db.read().unwrap();
        let read = db.as_ref().unwrap().begin_read().unwrap();
        redb::ReadableTable::first(&read.open_table(tables::LOG).unwrap()).unwrap().unwrap().0.value()
    };
    while oldest() != 2501 {
        assert!(tokio::time::Instant::now() < deadline, "oldest entry is still {}", oldest());
        tokio::task::yield_now().await;
    }
    disk.crash(Crash::LoseAll);
    let mut b = open(&disk).await;
    assert_eq!(all(&mut b.store).await, seen);
    assert_eq!(b.store.bounds(), (Some(id(1, 2500)), Some(id(2, 2990))));
}

#[tokio::test]
async fn a_purge_beyond_the_end_moves_the_end() {
    let disk = MemDisk::new();
    let mut a = open(&disk).await;
    a.gate.send_replace(Some(50));
    a.store.blocking_append([entry(1, 0, 10), entry(1, 1, 10)]).await.unwrap();
    a.store.purge(id(4, 50)).await.unwrap();
    assert_eq!(a.store.bounds(), (Some(id(4, 50)), Some(id(4, 50))));
    a.store.blocking_append([entry(4, 51, 10)]).await.unwrap();
    disk.crash(Crash::LoseAll);
    assert_eq!(all(&mut open(&disk).await.store).await, [entry(4, 51, 10)]);
}

#[tokio::test]
async fn reads_for_a_peer_are_bounded_and_cached_reads_equal_stored_ones() {
    let disk = MemDisk::new();
    let mut a = open(&disk).await;
    let written: Vec<Entry> = (0..40).map(|i| entry(1, i, 500_000)).collect();
    for e in &written {
        a.store.blocking_append([e.clone()]).await.unwrap();
    }
    for start in [0, 20, 38] {
        let got = a.store.limited_get_log_entries(start, 40).await.unwrap();
        assert!(!got.is_empty() && got.len() <= 4, "{} entries of half a megabyte", got.len());
        assert_eq!(got, written[start as usize..start as usize + got.len()]);
    }
    assert_eq!(all(&mut a.store).await, written);
    assert_eq!(a.store.try_get_log_entries(39..).await.unwrap(), written[39..]);
}

#[tokio::test]
async fn a_store_of_another_server_is_refused() {
    let disk = MemDisk::new();
    open(&disk).await.handle.stop().await;
    let (_gate, seen) = watch::channel(None);
    let e = LogStore::open(Arc::new(disk.clone()), 8, seen, Fatal::new(), IoMode::Inline).await.err().unwrap();
    assert!(e.to_string().contains("belongs to server 7, this is server 8"), "{e}");
}

#[tokio::test]
async fn a_missing_log_beside_snapshots_is_refused() {
    let disk = MemDisk::new();
    disk.open("snapshot-00000000000000000010-000000.snap").unwrap();
    let e = open_with(&disk, IoMode::Inline).await.err().unwrap();
    assert!(e.to_string().contains("raft.redb is missing"), "{e}");
}

/// Damages the payload of one record inside an intact database, as a bug or a stray write would.
fn damage(disk: &MemDisk, meta: Option<&'static str>, index: u64, how: impl Fn(&mut Vec<u8>)) {
    let db = redb::Builder::new().create_with_backend(optimus_host::disk::RedbFile::new(disk.open(tables::FILE).unwrap())).unwrap();
    let write = db.begin_write().unwrap();
    {
        let mut log = write.open_table(tables::LOG).unwrap();
        let mut table = write.open_table(tables::META).unwrap();
        let mut bytes = match meta {
            Some(key) => redb::ReadableTable::get(&table, key).unwrap().unwrap().value().to_vec(),
            None => redb::ReadableTable::get(&log, index).unwrap().unwrap().value().to_vec(),
        };
        how(&mut bytes);
        match meta {
            Some(key) => drop(table.insert(key, bytes.as_slice()).unwrap()),
            None => drop(log.insert(index, bytes.as_slice()).unwrap()),
        }
    }
    write.commit().unwrap();
    db.close().unwrap();
}

async fn filled() -> MemDisk {
    let disk = MemDisk::new();
    let mut a = open(&disk).await;
    a.gate.send_replace(Some(u64::MAX));
    a.store.save_vote(&Vote::new(3, NODE)).await.unwrap();
    a.store.blocking_append((0..20).map(|i| entry(1, i, 100))).await.unwrap();
    a.store.save_committed(Some(id(1, 15))).await.unwrap();
    a.store.purge(id(1, 4)).await.unwrap();
    a.handle.stop().await;
    disk
}

#[tokio::test]
async fn each_kind_of_damaged_record_is_refused_by_name() {
    let records = [
        (Some(tables::VOTE), 0),
        (Some(tables::PURGED), 0),
        (Some(tables::COMMITTED), 0),
        (Some(tables::OWNER), 0),
        (None, 5),
        (None, 12),
        (None, 19),
    ];
    for (meta, index) in records {
        for how in [
            |b: &mut Vec<u8>| *b.last_mut().unwrap() ^= 1,
            |b: &mut Vec<u8>| b.truncate(3),
            |b: &mut Vec<u8>| b[4] = 9,
            |b: &mut Vec<u8>| b.clear(),
        ] {
            let disk = filled().await;
            damage(&disk, meta, index, how);
            let Err(e) = open_with(&disk, IoMode::Inline).await else { panic!("{meta:?} {index} was accepted") };
            let text = e.to_string();
            let key = meta.map_or(index.to_string(), str::to_owned);
            for part in
                ["raft.redb", if meta.is_some() { "table meta" } else { "table log" }, &format!("key {key}:"), "replace this server"]
            {
                assert!(text.contains(part), "{part:?} is not in {text:?}");
            }
        }
    }
}

#[tokio::test]
async fn a_stored_commit_mark_the_log_does_not_have_is_forgotten() {
    let disk = filled().await;
    assert_eq!(open(&disk).await.store.read_committed().await.unwrap(), Some(id(1, 15)));
    for ahead in [id(1, 99), id(2, 15)] {
        let disk = filled().await;
        damage(&disk, Some(tables::COMMITTED), 0, |b| {
            *b = crate::raft::stored::encode(crate::raft::record::Kind::Committed, 0, &crate::raft::stored::LogIdV1::from(ahead))
        });
        assert_eq!(open(&disk).await.store.read_committed().await.unwrap(), None, "{ahead}");
    }
}

/// redb falls back to the commit before when a page of the newest does not check. After a kill, which closes nothing, that
/// would take back a flushed vote or entry.
#[tokio::test]
async fn decay_never_takes_back_what_was_flushed_before_a_kill() {
    std::panic::set_hook(Box::new(|_| {}));
    let disk = MemDisk::new();
    let mut a = open(&disk).await;
    a.store.save_vote(&Vote::new(3, NODE)).await.unwrap();
    for index in 0..12 {
        a.store.blocking_append([entry(1, index, 100)]).await.unwrap();
    }
    let killed = disk.fork();
    a.handle.stop().await;
    let length = killed.open(tables::FILE).unwrap().len().unwrap();
    let mut refused = 0;
    for at in (0..512).chain((512..length).step_by(97)) {
        let copy = killed.fork();
        copy.corrupt(tables::FILE, at, 0x55).unwrap();
        match open_with(&copy, IoMode::Inline).await {
            Err(_) => refused += 1,
            Ok(mut o) => {
                assert_eq!(all(&mut o.store).await.len(), 12, "byte {at}");
                assert_eq!(o.store.read_vote().await.unwrap(), Some(Vote::new(3, NODE)), "byte {at}");
            }
        }
    }
    let _ = std::panic::take_hook();
    assert!(refused > 50, "only {refused} refused");
}

/// Decay anywhere in the file gives the same content (the byte was unused) or an error, never a panic or other content.
#[tokio::test]
async fn a_changed_byte_anywhere_is_refused_or_harmless() {
    std::panic::set_hook(Box::new(|_| {})); // a caught panic of the engine need not fill the output
    let disk = filled().await;
    let expected = all(&mut open(&disk.fork()).await.store).await;
    let length = disk.open(tables::FILE).unwrap().len().unwrap();
    let (mut refused, mut harmless) = (0, 0);
    // Every byte of the header, then a walk over the rest with a step that is prime to the page size.
    for at in (0..512).chain((512..length).step_by(997)) {
        let copy = disk.fork();
        copy.corrupt(tables::FILE, at, 0x55).unwrap();
        match open_with(&copy, IoMode::Inline).await {
            Err(_) => refused += 1,
            Ok(mut o) => {
                harmless += 1;
                assert_eq!(all(&mut o.store).await, expected, "byte {at}");
                assert_eq!(o.store.read_vote().await.unwrap(), Some(Vote::new(3, NODE)), "byte {at}");
            }
        }
    }
    let _ = std::panic::take_hook();
    assert!(refused > 50, "only {refused} refused, {harmless} harmless");
}
