//! The journal on its own: what a start takes from it, and what it refuses.

use super::*;
use crate::raft::log_store::journal::{BYTES_INLINE, JOURNAL};

/// A store that was killed with `count` small entries and a vote in its journal alone, and where in the file each
/// record ends.
async fn killed(count: u64) -> (MemDisk, Vec<u64>) {
    let disk = MemDisk::recording();
    let mut o = open(&disk).await;
    o.store.save_vote(&Vote::new(1, NODE)).await.unwrap();
    for index in 0..count {
        o.store.blocking_append([entry(1, index, 100)]).await.unwrap();
    }
    let changes = disk.journal();
    let file = changes.iter().find_map(|c| match c {
        Change::Create { name, file } if name == "raft.journal.tmp" => Some(*file),
        _ => None,
    });
    let ends = changes.iter().filter_map(|c| match c {
        Change::Write { file: f, offset, data } if Some(*f) == file && data.len() < 1000 => Some(offset + data.len() as u64),
        _ => None,
    });
    let ends: Vec<u64> = ends.collect();
    assert_eq!(ends.len() as u64, count + 1, "one write for each");
    (disk.fork(), ends)
}

async fn refusal(disk: &MemDisk) -> String {
    match open_with(disk, IoMode::Inline).await {
        Err(e) => e.to_string(),
        Ok(mut o) => panic!("accepted with {} entries", all(&mut o.store).await.len()),
    }
}

#[tokio::test]
async fn an_append_costs_one_write_and_one_flush_besides_the_witness() {
    let disk = MemDisk::recording();
    let mut o = open(&disk).await;
    o.store.blocking_append([entry(1, 0, 10)]).await.unwrap();
    let before = disk.journal().len();
    o.store.blocking_append([entry(1, 1, 300)]).await.unwrap();
    let changes = disk.journal().split_off(before);
    assert!(matches!(changes[..], [Change::Write { .. }, Change::SyncData { .. }, Change::Write { .. }]), "{changes:?}");
}

#[tokio::test]
async fn damage_in_the_middle_is_refused_by_file_and_record() {
    let (disk, ends) = killed(20).await;
    for record in [0, 1, 10, 19] {
        let begin = if record == 0 { 4096 } else { ends[record - 1] };
        for at in [begin, begin + 9, ends[record] - 1] {
            let copy = disk.fork();
            copy.corrupt(JOURNAL, at, 0x40).unwrap();
            let said = refusal(&copy).await;
            for part in [JOURNAL, "table records", "the one after", "replace this server"] {
                assert!(said.contains(part), "{part:?} is not in {said:?}");
            }
        }
    }
}

/// The last record can be damaged without a later one to tell; the witness does.
#[tokio::test]
async fn damage_of_the_last_record_is_refused_and_its_tear_is_not() {
    let (disk, ends) = killed(5).await;
    let copy = disk.fork();
    copy.corrupt(JOURNAL, ends[5] - 1, 1).unwrap();
    let said = refusal(&copy).await;
    assert!(said.contains("was flushed: the last vote or entries are lost"), "{said}");

    // A write that the power cut tore was never acknowledged: the witness does not know of it.
    let disk = MemDisk::new();
    let mut o = open(&disk).await;
    for index in 0..5 {
        o.store.blocking_append([entry(1, index, 100)]).await.unwrap();
    }
    disk.power_off_after(1);
    assert!(o.store.blocking_append([entry(1, 5, 3000)]).await.is_err());
    disk.crash(Crash::Prefix { keep: disk.pending() - 1, tear: true });
    let mut o = open(&disk).await;
    assert_eq!(all(&mut o.store).await.len(), 5);
    o.store.blocking_append([entry(2, 5, 10)]).await.unwrap();
    disk.crash(Crash::LoseAll);
    assert_eq!(all(&mut open(&disk).await.store).await.last(), Some(&entry(2, 5, 10)));
}

#[tokio::test]
async fn a_journal_that_is_gone_or_cut_or_anothers_is_refused() {
    let (disk, _) = killed(5).await;
    let copy = disk.fork();
    copy.remove(JOURNAL).unwrap();
    assert!(refusal(&copy).await.contains("the last vote or entries are lost"));

    for (length, word) in [(0, "0 bytes long"), (4096, "are lost"), (4700, "are lost")] {
        let copy = disk.fork();
        copy.open(JOURNAL).unwrap().set_len(length).unwrap();
        let said = refusal(&copy).await;
        assert!(said.contains(word), "{length}: {said}");
    }
    let copy = disk.fork();
    copy.corrupt(JOURNAL, 20, 1).unwrap();
    let said = refusal(&copy).await;
    assert!(said.contains("raft.journal, table head"), "{said}");

    let copy = disk.fork();
    copy.remove(tables::FILE).unwrap();
    assert!(refusal(&copy).await.contains("raft.redb is missing"));
}

/// The last record of a lap is followed by an older one; a truncation begins a new lap. Neither brings anything back.
#[tokio::test]
async fn older_records_never_return() {
    for how in [Crash::LoseAll, Crash::KeepAll] {
        let disk = MemDisk::new();
        let mut o = open(&disk).await;
        for index in 0..30 {
            o.store.blocking_append([entry(1, index, 200)]).await.unwrap();
        }
        o.store.truncate(id(1, 10)).await.unwrap();
        let copy = disk.fork();
        copy.crash(how);
        assert_eq!(all(&mut open(&copy).await.store).await.len(), 10, "nothing was written since");
        for index in 10..13 {
            o.store.blocking_append([entry(2, index, 190)]).await.unwrap();
        }
        disk.crash(how);
        let mut o = open(&disk).await;
        let held = all(&mut o.store).await;
        assert_eq!((held.len(), &held[9], &held[12]), (13, &entry(1, 9, 200), &entry(2, 12, 190)));
    }
}

/// Many laps, with entries of all sizes, larger than the journal too; every read on the way is right.
#[tokio::test]
async fn laps_lose_nothing() {
    for io in [IoMode::Inline, IoMode::Threads] {
        let disk = MemDisk::new();
        let mut o = open_with(&disk, io).await.unwrap();
        let mut written = Vec::new();
        for index in 0..600 {
            let size = [10, 3000, 700, 100_000][(index % 61 / 20) as usize];
            let new = entry(1 + index / 100, index, size);
            o.store.blocking_append([new.clone()]).await.unwrap();
            written.push(new);
            if index % 50 == 0 {
                assert_eq!(all(&mut o.store).await, written);
                assert_eq!(o.store.try_get_log_entries(index / 2..).await.unwrap(), written[index as usize / 2..]);
                assert!(!o.store.limited_get_log_entries(0, index + 1).await.unwrap().is_empty());
            }
        }
        disk.crash(Crash::LoseAll);
        let mut o = open_with(&disk, io).await.unwrap();
        assert_eq!(all(&mut o.store).await, written);
        o.handle.stop().await;
    }
}

/// An older version of optimus knows of no journal, so a clean stop leaves nothing in it alone.
#[tokio::test]
async fn after_a_clean_stop_the_database_has_everything() {
    let (disk, ends) = killed(5).await;
    open(&disk).await.handle.stop().await;
    let copy = disk.fork();
    for at in (4096..*ends.last().unwrap()).step_by(7) {
        copy.corrupt(JOURNAL, at, 0xff).unwrap();
    }
    let mut o = open(&copy).await;
    assert_eq!(all(&mut o.store).await.len(), 5);
    assert_eq!(o.store.read_vote().await.unwrap(), Some(Vote::new(1, NODE)));
}

/// A client can store what looks like a record, but not with the right salt.
#[tokio::test]
async fn a_record_inside_an_entry_is_not_taken_for_one() {
    let (other, ends) = killed(3).await;
    let mut forged = vec![0; (ends[3] - 4096) as usize];
    other.open(JOURNAL).unwrap().read_at(4096, &mut forged).unwrap();
    let disk = MemDisk::new();
    let mut o = open(&disk).await;
    let content = EntryPayload::Normal(Batch(Arc::new(vec![Blob(Bytes::from(forged))])));
    o.store.blocking_append([Entry { log_id: id(1, 0), payload: content }]).await.unwrap();
    o.store.truncate(id(1, 0)).await.unwrap();
    disk.crash(Crash::LoseAll);
    assert!(all(&mut open(&disk).await.store).await.is_empty());
}

#[tokio::test]
async fn a_changed_byte_anywhere_in_the_journal_is_refused_or_harmless() {
    let (disk, ends) = killed(12).await;
    let mut refused = 0;
    for at in (0..*ends.last().unwrap()).step_by(3).chain((4096..BYTES_INLINE).step_by(509)) {
        let copy = disk.fork();
        copy.corrupt(JOURNAL, at, 0x55).unwrap();
        match open_with(&copy, IoMode::Inline).await {
            Err(_) => refused += 1,
            Ok(mut o) => {
                assert_eq!(all(&mut o.store).await.len(), 12, "byte {at}");
                assert_eq!(o.store.read_vote().await.unwrap(), Some(Vote::new(1, NODE)), "byte {at}");
            }
        }
    }
    assert!(refused as u64 > (ends.last().unwrap() - 4096) / 3 - 10, "only {refused} refused");
}
