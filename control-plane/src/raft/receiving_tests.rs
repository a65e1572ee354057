#![allow(clippy::unwrap_used)]

use optimus_common::disk::sim::{Crash, MemDisk};

use super::*;
use crate::raft::snapshots::{SnapshotStore, seal_head};
use crate::raft::types::SnapshotMeta;

fn meta(index: u64) -> SnapshotMeta {
    let last = LogId::new(openraft::CommittedLeaderId::new(1, 1), index);
    SnapshotMeta { last_log_id: Some(last), last_membership: Default::default(), snapshot_id: format!("s{index}") }
}

/// A snapshot file of some megabytes, and its key.
fn file(index: u64, length: usize) -> (SnapshotKey, Bytes) {
    let content: Vec<u8> = (0..length).map(|n| (n as u64 * (index + 3) / 7) as u8).collect();
    let mut bytes = seal_head(&meta(index), &content);
    bytes.extend_from_slice(&content);
    let key = SnapshotKey {
        id: meta(index).snapshot_id,
        last: meta(index).last_log_id,
        hash: *blake3::hash(&content).as_bytes(),
        total: bytes.len() as u64,
    };
    (key, bytes.into())
}

fn part(key: &SnapshotKey, bytes: &Bytes, offset: u64) -> SnapshotPart {
    let end = (offset as usize + PART).min(bytes.len());
    SnapshotPart { key: key.clone(), offset, bytes: bytes.slice(offset as usize..end) }
}

fn receiver(disk: &MemDisk) -> Receiver {
    Receiver::new(Arc::new(disk.clone()), Fatal::new(), IoMode::Inline)
}

const VOTE: Vote = Vote { leader_id: openraft::LeaderId { term: 3, node_id: 1 }, committed: true };

fn wants(r: &Receiver, part: &SnapshotPart) -> u64 {
    match r.accept(VOTE, part).unwrap() {
        Outcome::Wants(at) => at,
        other => panic!("{other:?}"),
    }
}

#[test]
fn parts_in_any_order_twice_and_with_gaps_give_the_file() {
    let (key, bytes) = file(5, 5 * PART / 2);
    let mut random = 7u64;
    for _ in 0..50 {
        let disk = MemDisk::new();
        let r = receiver(&disk);
        let mut at = wants(&r, &part(&key, &bytes, 0));
        let held = loop {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            // The byte it wants, or some other one: an older part again, or a later one too early.
            let offset = if random >> 63 == 0 { at } else { (random >> 33) % (key.total + 1) };
            match r.accept(VOTE, &part(&key, &bytes, offset)).unwrap() {
                Outcome::Wants(next) => {
                    assert!(next == at || (offset == at && next == (at + PART as u64).min(key.total)), "{offset}: {at} to {next}");
                    at = next;
                }
                Outcome::Whole(held) => break held,
                Outcome::Done => panic!("nobody has installed it"),
            }
        };
        assert_eq!(held.meta(), meta(5));
        assert_eq!(held.load().unwrap().content, bytes.slice(held.start() as usize..));
        assert_eq!(wants(&r, &part(&key, &bytes, 0)), key.total, "it is being installed");
        r.reset(State::Done(key.clone())).unwrap();
        assert!(matches!(r.accept(VOTE, &part(&key, &bytes, 0)), Ok(Outcome::Done)), "a late part of it");
        assert!(disk.list().unwrap().is_empty());
    }
}

#[test]
fn a_transfer_goes_on_where_it_was_interrupted_and_begins_anew_after_a_restart() {
    let disk = MemDisk::new();
    let (key, bytes) = file(5, 3 * PART);
    let r = receiver(&disk);
    let at = wants(&r, &part(&key, &bytes, 0));
    assert_eq!(wants(&r, &part(&key, &bytes, at)), 2 * PART as u64);
    // The sender begins again, under a later vote.
    let head = SnapshotPart { key: key.clone(), offset: 0, bytes: bytes.slice(..100) };
    let later = Vote::new_committed(4, 1);
    assert!(matches!(r.accept(later, &head), Ok(Outcome::Wants(at)) if at == 2 * PART as u64));

    disk.crash(Crash::KeepAll);
    assert!(disk.exists(RECEIVING).unwrap());
    SnapshotStore::open(Arc::new(disk.clone())).unwrap();
    assert!(!disk.exists(RECEIVING).unwrap(), "removed at the start");
    let r = receiver(&disk);
    assert_eq!(wants(&r, &part(&key, &bytes, 2 * PART as u64)), 0, "nothing is known of it");
}

#[test]
fn a_newer_snapshot_replaces_an_older_one_and_not_the_other_way() {
    let disk = MemDisk::new();
    let r = receiver(&disk);
    let ((old, old_bytes), (new, new_bytes)) = (file(5, 2 * PART), file(9, 3 * PART));
    assert_eq!(wants(&r, &part(&old, &old_bytes, 0)), PART as u64);
    assert_eq!(wants(&r, &part(&new, &new_bytes, PART as u64)), 0, "a part from its middle begins nothing");
    assert_eq!(wants(&r, &part(&new, &new_bytes, 0)), PART as u64);
    for offset in [0, PART as u64] {
        assert!(matches!(r.accept(VOTE, &part(&old, &old_bytes, offset)), Err(Failure::Refused(_))), "a late part of the old one");
    }
    // A newer leader may have less, and is right.
    assert!(matches!(r.accept(Vote::new_committed(4, 2), &part(&old, &old_bytes, 0)), Ok(Outcome::Wants(at)) if at == PART as u64));
    assert!(matches!(r.accept(VOTE, &part(&new, &new_bytes, 0)), Err(Failure::Refused(_))));
    assert_eq!(disk.list().unwrap(), [RECEIVING]);
}

#[test]
fn what_is_damaged_too_long_or_something_else_is_refused_and_leaves_nothing() {
    let disk = MemDisk::new();
    let r = receiver(&disk);
    let (key, bytes) = file(5, 1000);
    for at in [0, 20, 60, bytes.len() - 1] {
        let mut bad = bytes.to_vec();
        bad[at] ^= 1;
        let refused = r.accept(VOTE, &part(&key, &bad.into(), 0));
        assert!(matches!(&refused, Err(Failure::Refused(why)) if why.contains("arrived")), "{refused:?}");
        assert!(disk.list().unwrap().is_empty());
    }
    let other = SnapshotKey { last: meta(6).last_log_id, ..key.clone() };
    assert!(matches!(r.accept(VOTE, &part(&other, &bytes, 0)), Err(Failure::Refused(why)) if why.contains("s5 arrived")));
    for total in [0, 16, MAX_TOTAL + 1, u64::MAX] {
        let key = SnapshotKey { total, ..key.clone() };
        assert!(matches!(r.accept(VOTE, &part(&key, &bytes, 0)), Err(Failure::Refused(_))), "{total} bytes");
    }
    let short = SnapshotKey { total: 500, ..key.clone() };
    assert!(matches!(r.accept(VOTE, &part(&short, &bytes, 0)), Err(Failure::Refused(_))), "more bytes than announced");
    let far = SnapshotPart { key, offset: u64::MAX, bytes };
    assert_eq!(wants(&r, &far), 0);
    assert!(disk.list().unwrap().is_empty());
}

#[test]
fn a_full_disk_refuses_the_snapshot_and_a_failed_flush_ends_the_server() {
    let disk = MemDisk::new();
    let r = receiver(&disk);
    let (key, bytes) = file(5, 2 * PART);
    disk.set_capacity(Some(PART as u64 + 10));
    assert_eq!(wants(&r, &part(&key, &bytes, 0)), PART as u64);
    let refused = r.accept(VOTE, &part(&key, &bytes, PART as u64));
    assert!(matches!(&refused, Err(Failure::Refused(why)) if why.contains("no space left")), "{refused:?}");
    assert!(disk.list().unwrap().is_empty());
    disk.set_capacity(None);
    assert_eq!(wants(&r, &part(&key, &bytes, 0)), PART as u64);
    assert_eq!(wants(&r, &part(&key, &bytes, PART as u64)), 2 * PART as u64);
    disk.fail_sync(1);
    let failed = r.accept(VOTE, &part(&key, &bytes, 2 * PART as u64));
    assert!(matches!(&failed, Err(Failure::Disk(e)) if e.chain().contains("simulated sync failure")), "{failed:?}");
}

#[tokio::test]
async fn an_abandoned_transfer_is_given_up() {
    let disk = MemDisk::new();
    let r = Arc::new(receiver(&disk));
    let (key, bytes) = file(5, 2 * PART);
    wants(&r, &part(&key, &bytes, 0));
    for _ in 1..QUIET {
        r.tick().await;
    }
    assert_eq!(wants(&r, &part(&key, &bytes, 0)), PART as u64, "still known");
    for _ in 1..QUIET {
        r.tick().await;
    }
    assert!(disk.exists(RECEIVING).unwrap());
    r.tick().await;
    assert!(disk.list().unwrap().is_empty());
    assert_eq!(wants(&r, &part(&key, &bytes, PART as u64)), 0);
}
