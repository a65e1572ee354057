//! Opening a sled database that may be damaged.
//!
//! sled 0.34 answers damage with an error, a panic or, at worst, by never coming back. It keeps only what may be lost, so
//! all three end the same way: the database is moved aside for whoever wants to look, and an empty one takes its place.

use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// Longest time an open may take. One that hangs leaves its thread behind.
const OPEN_MAX: Duration = Duration::from_secs(10);
/// What a damaged database is renamed to, beside it. One is kept.
const ASIDE: &str = "damaged";

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    #[error("{0}")]
    Error(String),
    #[error("panic: {0}")]
    Panic(String),
    #[error("no answer for {OPEN_MAX:?}")]
    Hang,
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("failed to move a damaged database aside, to {}", .to.display())]
    Aside {
        to: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("failed to open an empty database at {}: {damage}", .path.display())]
    Fresh { path: PathBuf, damage: Damage },
}

/// Opens or makes the database at `path`. Blocking.
pub fn open(path: &Path, cache: u64) -> Result<sled::Db, OpenError> {
    match probe(path, cache) {
        Ok(db) => Ok(db),
        Err(damage) => {
            set_aside(path, &damage)?;
            probe(path, cache).map_err(|damage| OpenError::Fresh { path: path.to_owned(), damage })
        }
    }
}

/// Moves a database away that turned out to be damaged in use; it must not be open any more, or never be used again.
pub fn set_aside(path: &Path, damage: &Damage) -> Result<(), OpenError> {
    let aside = path.with_extension(ASIDE);
    tracing::warn!(path = %path.display(), aside = %aside.display(), %damage, "a database is damaged: starting an empty one");
    let moved = match fs::remove_dir_all(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => fs::rename(path, &aside),
    };
    moved.map_err(|source| OpenError::Aside { to: aside, source })
}

/// Runs a call into sled; a panic in it is damage too.
pub fn guarded<T>(call: impl FnOnce() -> sled::Result<T>) -> Result<T, Damage> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(Damage::Error(error.to_string())),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
            Err(Damage::Panic(text.unwrap_or("without a message").to_owned()))
        }
    }
}

fn probe(path: &Path, cache: u64) -> Result<sled::Db, Damage> {
    let config = sled::Config::new()
        .path(path)
        .mode(sled::Mode::LowSpace)
        .cache_capacity(cache)
        // What the last seconds held may be lost: flushing costs more than it is worth.
        .flush_every_ms(Some(10_000));
    let (done, answer) = mpsc::sync_channel(1);
    let opening = move || {
        let opened = guarded(|| {
            let db = config.open()?;
            // Damage of a page shows when it is read.
            for item in db.iter() {
                item?;
            }
            Ok(db)
        });
        let _ = done.send(opened); // nobody waits for an answer this late
    };
    let thread = thread::Builder::new().name("metrics-open".into()).spawn(opening);
    thread.map_err(|error| Damage::Error(error.to_string()))?;
    match answer.recv_timeout(OPEN_MAX) {
        Ok(opened) => opened,
        Err(mpsc::RecvTimeoutError::Timeout) => Err(Damage::Hang),
        Err(mpsc::RecvTimeoutError::Disconnected) => Err(Damage::Panic("its thread ended".into())),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Files of a database, the largest first.
    fn files(dir: &Path) -> Vec<PathBuf> {
        let mut files: Vec<(u64, PathBuf)> = Vec::new();
        let mut dirs = vec![dir.to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let entry = entry.unwrap();
                let meta = entry.metadata().unwrap();
                if meta.is_dir() { dirs.push(entry.path()) } else { files.push((meta.len(), entry.path())) }
            }
        }
        files.sort();
        files.into_iter().rev().map(|(_, path)| path).collect()
    }

    fn filled(path: &Path) {
        let db = open(path, 1 << 20).unwrap();
        for n in 0u32..500 {
            db.insert(n.to_be_bytes(), vec![n as u8; 3000]).unwrap();
        }
        db.flush().unwrap();
    }

    #[test]
    fn a_good_database_keeps_what_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        filled(&path);
        assert_eq!(open(&path, 1 << 20).unwrap().len(), 500);
        assert!(!path.with_extension(ASIDE).exists());
    }

    #[test]
    fn whatever_is_broken_the_database_opens() {
        let cut = |file: &Path| fs::OpenOptions::new().write(true).open(file).unwrap().set_len(1000).unwrap();
        let garbage = |file: &Path| {
            let mut bytes = fs::read(file).unwrap();
            for (n, byte) in bytes.iter_mut().enumerate().filter(|(n, _)| n % 97 < 40) {
                *byte = (n % 251) as u8;
            }
            fs::write(file, bytes).unwrap();
        };
        let zeros = |file: &Path| fs::write(file, vec![0; fs::metadata(file).unwrap().len() as usize]).unwrap();
        let breaks: [&dyn Fn(&Path); 3] = [&cut, &garbage, &zeros];
        let dir = tempfile::tempdir().unwrap();
        for (n, damage) in breaks.iter().enumerate() {
            let path = dir.path().join(format!("db{n}"));
            filled(&path);
            for file in files(&path) {
                damage(&file);
            }
            let db = open(&path, 1 << 20).unwrap();
            // Emptied, or cut back to what stands: usable in any case.
            db.insert("new", "1").unwrap();
            assert_eq!(db.get("new").unwrap().unwrap(), "1");
        }
    }

    #[test]
    fn a_file_in_its_place_is_moved_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        fs::write(&path, "not a directory").unwrap();
        assert_eq!(open(&path, 1 << 20).unwrap().len(), 0);
        assert_eq!(fs::read_to_string(path.with_extension(ASIDE)).unwrap(), "not a directory");
    }

    #[test]
    fn a_panic_is_damage() {
        let panics = || -> sled::Result<()> { panic!("segment 7 is odd") };
        assert_eq!(guarded(panics), Err(Damage::Panic("segment 7 is odd".into())));
    }
}
