//! The power goes off after every single write of a script.

use super::*;

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
    let (db, opened, _) = tables::open(disk, NODE, journal::BYTES_INLINE, 1).unwrap();
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
            // What a start has made of it stays, also when the power goes off again.
            crashed.crash(Crash::LoseAll);
            assert_eq!(reopened(&crashed), found, "seed {seed}, change {at} ({change:?}), {how:?}: the second start");
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
