#![allow(clippy::unwrap_used)]

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

// --- crash points ---

/// What must be on disk.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    vote: Option<Vote>,
    purged: Option<LogId>,
    log: BTreeMap<u64, Entry>,
    snapshot: Option<u64>,
}

fn reopened(disk: &MemDisk) -> Model {
    let (_, newest) = SnapshotStore::open(Arc::new(disk.clone())).unwrap();
    let (db, opened) = tables::open(disk, NODE).unwrap();
    let first = opened.purged.map_or(0, |p| p.index + 1);
    let entries = tables::read(&db, first..=u64::MAX, usize::MAX).unwrap();
    assert_eq!(entries.last().map(|e| e.log_id).or(opened.purged), opened.last);
    let snapshot = newest.map(|s| s.meta.last_log_id.unwrap().index);
    assert!(opened.purged.is_none_or(|p| snapshot >= Some(p.index)), "purged {:?} beyond snapshot {snapshot:?}", opened.purged);
    Model { vote: opened.vote, purged: opened.purged, log: entries.into_iter().map(|e| (e.log_id.index, e)).collect(), snapshot }
}

struct Script {
    random: u64,
    model: Model,
    /// A snapshot beyond the log was installed: what it covers is to be purged next, as openraft does.
    installed: Option<LogId>,
}

impl Script {
    fn roll(&mut self, below: u64) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % below
    }

    fn last(&self) -> Option<LogId> {
        self.model.log.last_key_value().map(|(_, e)| e.log_id).or(self.model.purged)
    }

    fn term(&self) -> u64 {
        self.model.vote.map_or(0, |v| v.leader_id.term)
    }

    /// One random step on the store and the model. The store has acknowledged it when this returns.
    async fn step(&mut self, o: &mut Open, snapshots: &SnapshotStore, receiver: &Receiver) {
        if let Some(covered) = self.installed.take() {
            o.store.purge(covered).await.unwrap();
            self.model.purged = Some(covered);
            self.model.log.clear();
            return;
        }
        match self.roll(12) {
            0 | 1 => {
                let vote = Vote::new(self.term() + 1, NODE);
                o.store.save_vote(&vote).await.unwrap();
                self.model.vote = Some(vote);
            }
            2..=6 => {
                let next = self.last().map_or(0, |l| l.index + 1);
                let (count, size) = (1 + self.roll(5), [20, 200, 3000, 20_000][self.roll(4) as usize]);
                let entries: Vec<Entry> = (next..next + count).map(|i| entry(self.term(), i, size)).collect();
                o.store.blocking_append(entries.clone()).await.unwrap();
                self.model.log.extend(entries.into_iter().map(|e| (e.log_id.index, e)));
            }
            7 if !self.model.log.is_empty() => {
                // What a snapshot covers is committed and never truncated.
                let first = self.model.log.first_key_value().unwrap().0.max(&self.model.snapshot.map_or(0, |s| s + 1)).to_owned();
                let last = *self.model.log.last_key_value().unwrap().0;
                if first <= last {
                    let from = last - self.roll((last - first + 1).min(4));
                    o.store.truncate(id(1, from)).await.unwrap();
                    self.model.log.split_off(&from);
                }
            }
            8 if self.last().is_some() => {
                let last = self.last().unwrap();
                let meta = SnapshotMeta { last_log_id: Some(last), last_membership: Default::default(), snapshot_id: "s".to_owned() };
                snapshots.save(&meta, &vec![last.index as u8; 2000]).unwrap();
                o.gate.send_replace(Some(last.index));
                self.model.snapshot = Some(last.index);
            }
            9 if self.model.snapshot.is_some() => {
                let upto = self.model.snapshot.unwrap().saturating_sub(self.roll(4));
                if let Some(e) = self.model.log.get(&upto).cloned() {
                    o.store.purge(e.log_id).await.unwrap();
                    self.model.purged = Some(e.log_id);
                    self.model.log = self.model.log.split_off(&(upto + 1));
                }
            }
            10 | 11 => {
                // A snapshot of the leader arrives in parts; now and then the leader goes away in the middle.
                let index = self.last().map_or(0, |l| l.index) + self.roll(3);
                let covered = self.last().filter(|l| l.index == index).unwrap_or_else(|| id(self.term(), index));
                let meta = SnapshotMeta { last_log_id: Some(covered), last_membership: Default::default(), snapshot_id: "r".to_owned() };
                let content = vec![index as u8; 3000];
                let parts = receive(receiver, &meta, &content, if self.roll(4) == 0 { 2 } else { usize::MAX });
                if parts {
                    snapshots.adopt(&meta).unwrap();
                    receiver.installed_for_test();
                    o.gate.send_replace(Some(index));
                    self.model.snapshot = Some(index);
                    if self.last().is_none_or(|l| l.index <= index) {
                        self.installed = Some(covered);
                    }
                }
            }
            _ => {}
        }
    }
}

/// Sends a snapshot in parts of a thousand bytes, `most` of them. Returns whether it is whole.
fn receive(receiver: &Receiver, meta: &SnapshotMeta, content: &[u8], most: usize) -> bool {
    let mut bytes = crate::raft::snapshots::seal_head(meta, content);
    bytes.extend_from_slice(content);
    let (total, hash) = (bytes.len() as u64, *blake3::hash(content).as_bytes());
    let key = SnapshotKey { id: meta.snapshot_id.clone(), last: meta.last_log_id, hash, total };
    let vote = Vote::new_committed(meta.last_log_id.unwrap().leader_id.term, NODE);
    bytes.chunks(1000).enumerate().take(most).any(|(n, chunk)| {
        let part = SnapshotPart { key: key.clone(), offset: n as u64 * 1000, bytes: Bytes::copy_from_slice(chunk) };
        receiver.accepts_for_test(vote, &part)
    })
}

/// Runs a script once, then visits the disk after each single write and sync, cuts the power there in several ways,
/// reopens and compares with the model: every acknowledged step is there, the step under way is there whole or not at all.
async fn every_crash_point(seed: u64, steps: usize) -> usize {
    let disk = MemDisk::recording();
    let (snapshots, _) = SnapshotStore::open(Arc::new(disk.clone())).unwrap();
    let receiver = Receiver::new(Arc::new(disk.clone()), Fatal::new(), IoMode::Inline);
    let mut o = open_on(Arc::new(disk.clone()), IoMode::Inline, Some(20_000)).await.unwrap();
    let mut script = Script { random: seed, model: Model::default(), installed: None };
    // Length of the journal when the model was acknowledged.
    let mut acknowledged = vec![(disk.journal().len(), script.model.clone())];
    for _ in 0..steps {
        script.step(&mut o, &snapshots, &receiver).await;
        acknowledged.push((disk.changes() as usize, script.model.clone()));
    }
    assert!(script.model.purged.is_some() && script.model.snapshot.is_some(), "seed {seed} never purged");
    let journal = disk.journal();
    assert_eq!(journal.len() as u64, disk.changes());
    let renamed = |name: &str| journal.iter().filter(|c| matches!(c, Change::Rename { from, .. } if from == name)).count();
    let (compacted, received) = (renamed(tables::COMPACTING), renamed(crate::raft::snapshots::RECEIVING));
    assert!(compacted > 2 && received > 2, "seed {seed}: {compacted} compactions, {received} snapshots received");

    let again = MemDisk::new();
    let mut points = 0;
    for (at, change) in journal.iter().enumerate() {
        again.redo(change);
        let done = at + 1;
        let newest = acknowledged.iter().rposition(|(upto, _)| *upto <= done);
        let allowed: Vec<&Model> = match newest {
            None => vec![&acknowledged[0].1],
            Some(n) => acknowledged[n..(n + 2).min(acknowledged.len())].iter().map(|(_, m)| m).collect(),
        };
        let pending = again.pending();
        let seed = seed ^ (at as u64) << 8;
        for how in [
            Crash::LoseAll,
            Crash::Prefix { keep: pending / 2, tear: true },
            Crash::Scattered { seed },
            Crash::Scattered { seed: seed + 1 },
        ] {
            let crashed = again.fork();
            crashed.crash(how);
            let found = reopened(&crashed);
            assert!(allowed.contains(&&found), "seed {seed}, change {at} ({change:?}), {how:?}: found {found:?}, allowed {allowed:?}");
            points += 1;
        }
    }
    points
}

/// `OPTIMUS_CRASH_SEEDS=<n>` visits more scripts.
#[tokio::test]
async fn every_crash_point_of_a_script_keeps_what_was_acknowledged() {
    let seeds: u64 = std::env::var("OPTIMUS_CRASH_SEEDS").map_or(3, |n| n.parse().unwrap());
    let mut points = 0;
    for seed in 1..=seeds {
        points += every_crash_point(seed, 100).await;
    }
    println!("{points} crash points");
    assert!(points > 1000 * seeds as usize, "only {points} crash points");
}

/// The harness itself is checked: a store that acknowledges before its flush must be caught.
#[tokio::test]
async fn the_crash_points_would_catch_an_early_acknowledgement() {
    let disk = MemDisk::recording();
    let mut o = open(&disk).await;
    o.store.blocking_append([entry(1, 0, 10)]).await.unwrap();
    let journal = disk.journal();
    // The disk as it was before the last flush of the append: an acknowledgement there would be a lie.
    let flush = journal.iter().rposition(|c| matches!(c, Change::SyncData { .. })).unwrap();
    let early = MemDisk::new();
    journal[..flush].iter().for_each(|c| early.redo(c));
    early.crash(Crash::LoseAll);
    assert!(reopened(&early).log.is_empty());
}

// --- compaction ---

fn size(disk: &dyn Disk) -> u64 {
    disk.open(tables::FILE).unwrap().len().unwrap()
}

fn setting(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |n| n.parse().unwrap())
}

/// Space of purged entries is given back while writes go on, on a real disk.
/// `OPTIMUS_COMPACTION_ENTRIES=200000 OPTIMUS_COMPACTION_SIZE=256` measures a large log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_purge_gives_disk_space_back_while_writes_go_on() {
    let (count, length) = (setting("OPTIMUS_COMPACTION_ENTRIES", 400), setting("OPTIMUS_COMPACTION_SIZE", 100_000) as usize);
    let dir = tempfile::tempdir().unwrap();
    let disk: Arc<dyn Disk> = Arc::new(optimus_host::disk::HostDisk::open(dir.path()).unwrap());
    let mut o = open_on(disk.clone(), IoMode::Threads, None).await.unwrap();
    for first in (0..count).step_by(200) {
        o.store.blocking_append((first..(first + 200).min(count)).map(|i| entry(1, i, length))).await.unwrap();
    }
    let mut times = Vec::new();
    let mut next = count;
    let mut write = async |o: &mut Open| {
        let asked = std::time::Instant::now();
        o.store.blocking_append([entry(1, next, length)]).await.unwrap();
        next += 1;
        asked.elapsed()
    };
    for _ in 0..50 {
        times.push(write(&mut o).await);
    }
    let (before, quiet) = (size(&*disk), *times.iter().max().unwrap());
    o.gate.send_replace(Some(count));
    let kept = count / 10;
    let purging = std::time::Instant::now();
    o.store.purge(id(1, count - kept)).await.unwrap();
    let purge = purging.elapsed();
    times.clear();
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while size(&*disk) > before / 2 {
        assert!(std::time::Instant::now() < deadline, "{} bytes of {before} after {} writes", size(&*disk), times.len());
        times.push(write(&mut o).await);
    }
    times.sort();
    let (after, took) = (size(&*disk), purging.elapsed());
    println!(
        "{count} entries of {length} bytes: {before} bytes, {after} after {took:?} and {} writes; purge {purge:?}, slowest write {:?}, \
         median {:?}, slowest before {quiet:?}",
        times.len(),
        times.last().unwrap(),
        times[times.len() / 2]
    );
    assert!(after < before / 2);
    let expected = all(&mut o.store).await;
    o.handle.stop().await;
    drop(o.store);
    let mut o = open_on(disk, IoMode::Threads, None).await.unwrap();
    let held = all(&mut o.store).await;
    assert_eq!((held.len(), held.first().map(|e| e.log_id.index)), (expected.len(), Some(count - kept + 1)));
    assert_eq!(held, expected);
    o.handle.stop().await;
}

#[tokio::test]
async fn without_space_a_compaction_is_given_up_and_the_log_goes_on() {
    let disk = MemDisk::new();
    let mut o = open_on(Arc::new(disk.clone()), IoMode::Inline, Some(50_000)).await.unwrap();
    o.store.blocking_append((0..100).map(|i| entry(1, i, 20_000))).await.unwrap();
    o.gate.send_replace(Some(80));
    disk.set_capacity(Some(size(&disk) + 1_000_000));
    o.store.purge(id(1, 20)).await.unwrap();
    for i in 100..110 {
        o.store.blocking_append([entry(1, i, 100)]).await.unwrap();
    }
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    assert_eq!(o.fatal.get(), None);
    assert_eq!(disk.list().unwrap(), [tables::FILE], "the unfinished copy is gone");
    disk.set_capacity(None);
    o.store.purge(id(1, 80)).await.unwrap();
    let before = size(&disk);
    let mut turns = 0;
    while size(&disk) == before {
        turns += 1;
        assert!(turns < 10_000, "it is not tried again");
        tokio::task::yield_now().await;
    }
    disk.crash(Crash::LoseAll);
    let mut o = open(&disk).await;
    assert_eq!(all(&mut o.store).await.len(), 29);
}

#[tokio::test]
async fn a_full_disk_says_what_to_do_and_opens_again_with_all_that_was_acknowledged() {
    let disk = MemDisk::new();
    let mut o = open(&disk).await;
    o.store.blocking_append([entry(1, 0, 10)]).await.unwrap();
    disk.set_capacity(Some(size(&disk)));
    let mut written = 1;
    let refused = loop {
        match o.store.blocking_append([entry(1, written, 200_000)]).await {
            Ok(()) => written += 1,
            Err(e) => break e.to_string(),
        }
    };
    for part in ["no space left on the disk", tables::FILE, "free at least 256 MiB", "start this server again"] {
        assert!(refused.contains(part) && o.fatal.get().unwrap().contains(part), "{part:?} is not in {refused:?}");
    }
    // The process ends, and is started again before and after there is space.
    drop(o);
    for how in [Crash::KeepAll, Crash::LoseAll] {
        let again = disk.fork();
        again.crash(how);
        let mut o = open(&again).await;
        assert_eq!(all(&mut o.store).await.len() as u64, written);
        o.store.blocking_append([entry(1, written, 200_000)]).await.unwrap();
    }
}

#[tokio::test]
async fn a_file_that_lost_its_content_is_not_taken_for_a_new_one() {
    let disk = filled().await;
    let length = size(&disk);
    for left in [0, 100, 4096, length / 2, length - 4096] {
        let copy = disk.fork();
        copy.open(tables::FILE).unwrap().set_len(left).unwrap();
        let Err(e) = open_with(&copy, IoMode::Inline).await else { panic!("{left} bytes were accepted") };
        assert!(e.to_string().contains("raft.redb"), "{e}");
    }
    // A valid database with nothing of ours in it.
    let empty = MemDisk::new();
    redb::Builder::new()
        .create_with_backend(optimus_host::disk::RedbFile::new(empty.open(tables::FILE).unwrap()))
        .unwrap()
        .close()
        .unwrap();
    let e = open_with(&empty, IoMode::Inline).await.err().unwrap();
    assert!(e.to_string().contains("raft.redb") && e.to_string().contains("replace this server"), "{e}");
}

/// Whatever changes behind the copy, at whatever moment, the new file ends up the same as the old one would.
#[tokio::test]
async fn a_log_that_is_cut_purged_and_written_during_a_compaction_stays_the_same() {
    let mut underway = 0;
    for turns in 0..60 {
        for change in 0..4 {
            let disk = MemDisk::new();
            let mut o = open_on(Arc::new(disk.clone()), IoMode::Inline, Some(3000)).await.unwrap();
            o.gate.send_replace(Some(u64::MAX));
            o.store.save_vote(&Vote::new(1, NODE)).await.unwrap();
            o.store.blocking_append((0..100).map(|i| entry(1, i, 1000))).await.unwrap();
            o.store.purge(id(1, 5)).await.unwrap();
            for _ in 0..turns {
                tokio::task::yield_now().await;
            }
            underway += usize::from(disk.exists(tables::COMPACTING).unwrap());
            match change {
                0 => {
                    o.store.truncate(id(1, 20)).await.unwrap();
                    o.store.blocking_append((20..40).map(|i| entry(2, i, 100))).await.unwrap();
                }
                1 => o.store.purge(id(1, 60)).await.unwrap(),
                // Both in one group, so that the log is longer than what was copied when the copy goes on.
                3 => {
                    let ((cut, cut_done), (append, append_done)) = (oneshot::channel(), oneshot::channel());
                    o.store.queue.send(Op::Truncate(20, cut)).await.unwrap();
                    o.store.queue.send(Op::Append((20..120).map(|i| entry(2, i, 100)).collect(), append)).await.unwrap();
                    cut_done.await.unwrap().unwrap();
                    append_done.await.unwrap().unwrap();
                }
                _ => {
                    o.store.purge(id(3, 150)).await.unwrap();
                    o.store.blocking_append([entry(3, 151, 10)]).await.unwrap();
                }
            }
            o.store.save_vote(&Vote::new(5, NODE)).await.unwrap();
            let mut left = 10_000;
            while disk.exists(tables::COMPACTING).unwrap() || left > 9_900 {
                left -= 1;
                assert!(left > 0, "the compaction does not end");
                tokio::task::yield_now().await;
            }
            let expected: Vec<Entry> = match change {
                0 => (6..20).map(|i| entry(1, i, 1000)).chain((20..40).map(|i| entry(2, i, 100))).collect(),
                1 => (61..100).map(|i| entry(1, i, 1000)).collect(),
                3 => (6..20).map(|i| entry(1, i, 1000)).chain((20..120).map(|i| entry(2, i, 100))).collect(),
                _ => vec![entry(3, 151, 10)],
            };
            let bounds = o.store.bounds();
            assert_eq!(all(&mut o.store).await, expected, "{turns} turns, change {change}, running");
            disk.crash(Crash::LoseAll);
            let mut o = open(&disk).await;
            assert_eq!(all(&mut o.store).await, expected, "{turns} turns, change {change}, reopened");
            assert_eq!((o.store.bounds(), o.store.read_vote().await.unwrap()), (bounds, Some(Vote::new(5, NODE))));
        }
    }
    assert!(underway > 30, "only {underway} changes met a compaction");
}
