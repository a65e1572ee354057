//! What output is kept: a budget per allocation, and a number and a size for those that are gone.
//!
//! A runner keeps the attempt it runs within its own budget; this bounds the attempts before it and
//! allocations nobody holds any more.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use optimus_common::AllocId;
use optimus_common::units::Bytes;

use super::segments;

/// Most attempts of one allocation that keep their directory, whatever their size.
pub const ATTEMPTS_KEPT_MAX: usize = 10;
/// Most ended allocations whose output is kept after the server dropped them.
pub const ENDED_KEPT_MAX: usize = 10;
/// Most output of all of them together.
pub const ENDED_BYTES_MAX: Bytes = Bytes::mib(256);

/// The budget of the attempt that runs; the other half is for those before it.
pub fn attempt_budget(size: Bytes) -> Bytes {
    Bytes(size.0 / 2)
}

/// Makes room before `next` starts: deletes the oldest attempts until the others fit half of `size`. Blocking.
pub fn trim_attempts(alloc_dir: &Path, next: u32, size: Bytes) -> io::Result<()> {
    let room = attempt_budget(size).0;
    let mut used = 0;
    let earlier: Vec<u32> = segments::attempts(alloc_dir)?.into_iter().filter(|a| *a < next).collect();
    for (age, attempt) in earlier.into_iter().rev().enumerate() {
        let dir = alloc_dir.join(attempt.to_string());
        used += size_of(&dir);
        // The attempt right before is kept even when too large: its last lines say why it ended.
        if age > 0 && (used > room || age >= ATTEMPTS_KEPT_MAX) {
            fs::remove_dir_all(&dir)?;
        }
    }
    Ok(())
}

/// Deletes the output of allocations not in `held` beyond the newest [`ENDED_KEPT_MAX`] or [`ENDED_BYTES_MAX`]. Blocking.
pub fn sweep_ended(allocs_dir: &Path, held: &BTreeSet<AllocId>) -> io::Result<()> {
    let mut ended: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(allocs_dir)? {
        let entry = entry?;
        let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<AllocId>().ok()) else { continue };
        if !held.contains(&id) {
            ended.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    ended.sort_unstable();
    let mut used = 0;
    for (age, (_, dir)) in ended.iter().rev().enumerate() {
        used += size_of(dir);
        if age >= ENDED_KEPT_MAX || used > ENDED_BYTES_MAX.0 {
            fs::remove_dir_all(dir)?;
        }
    }
    Ok(())
}

/// Bytes of the files in a directory and one level below; unreadable ones count nothing.
fn size_of(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let sizes = entries.filter_map(Result::ok).map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => {
            let inner = fs::read_dir(entry.path()).into_iter().flatten().filter_map(Result::ok);
            inner.filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum()
        }
        Ok(meta) => meta.len(),
        Err(_) => 0,
    });
    sizes.sum()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn file(path: PathBuf, bytes: usize) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, vec![b'x'; bytes]).unwrap();
    }

    #[test]
    fn old_attempts_make_room_but_the_last_one_stays() {
        let dir = tempfile::tempdir().unwrap();
        for attempt in 1..=5 {
            file(dir.path().join(format!("{attempt}/log.1")), 100);
        }
        trim_attempts(dir.path(), 6, Bytes(500)).unwrap();
        assert_eq!(segments::attempts(dir.path()).unwrap(), [4, 5]);
        trim_attempts(dir.path(), 6, Bytes(10)).unwrap();
        assert_eq!(segments::attempts(dir.path()).unwrap(), [5]);
        trim_attempts(dir.path(), 5, Bytes(10)).unwrap();
        assert_eq!(segments::attempts(dir.path()).unwrap(), [5], "the one to be started is not touched");
    }

    #[test]
    fn only_the_newest_ended_allocations_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let ids: Vec<AllocId> = (1..=14).map(|n| AllocId(uuid::Uuid::from_u128(n))).collect();
        for (n, id) in ids.iter().enumerate() {
            file(dir.path().join(format!("{id}/1/log.1")), 10);
            let at = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(n as u64);
            fs::File::open(dir.path().join(id.to_string())).unwrap().set_modified(at).unwrap();
        }
        fs::create_dir(dir.path().join("not an id")).unwrap();
        sweep_ended(dir.path(), &BTreeSet::from([ids[0]])).unwrap();
        let left: Vec<bool> = ids.iter().map(|id| dir.path().join(id.to_string()).exists()).collect();
        assert_eq!(left.iter().filter(|l| **l).count(), 11);
        assert!(left[0] && !left[1] && !left[3] && left[4] && dir.path().join("not an id").exists());
    }
}
