//! Compaction under load, a full disk, and files that lost their content.

use super::*;

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
    assert_eq!(disk.list().unwrap(), [journal::JOURNAL, tables::FILE, "raft.witness"], "the unfinished copy is gone");
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
