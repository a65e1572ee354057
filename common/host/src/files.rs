//! Files that survive a crash and are nobody else's to read; and one optimus per data directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

/// Replaces the file at `path` by one holding `bytes`: after a crash it is the old or the new one,
/// whole. Durable when this returns.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path names no file"))?;
    let mut beside = name.to_os_string();
    // Our own id keeps two processes apart; what a crash left under it is overwritten.
    beside.push(format!(".tmp.{}", std::process::id()));
    let beside = dir.join(beside);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&beside)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?; // the umask may have taken bits; an old file had others
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        File::open(dir)?.sync_all()
    })();
    if written.is_err() {
        let _ = fs::remove_file(&beside); // the error above is the one that matters
    }
    written
}

/// [`write_atomic`] with 0600, for keys and tokens.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_atomic(path, bytes, 0o600)
}

/// Reads a file of at most `max` bytes.
pub fn read_bounded(path: &Path, max: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(max as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("the file is longer than {max} bytes")));
    }
    Ok(bytes)
}

/// Makes a directory (and those above) with 0700; one that is there is left as it is.
pub fn create_private_dir(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// Refuses a secret file that others may read or write.
pub fn check_private(path: &Path) -> io::Result<()> {
    let mode = fs::metadata(path)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("its mode is {mode:03o}; others than its owner may use it: chmod 600 it"),
        ));
    }
    Ok(())
}

/// Why a data directory cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("another optimus already runs on {}, pid {pid}", dir.display())]
    Taken { dir: PathBuf, pid: String },
    #[error("failed to lock {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Holds a data directory for this process; released when dropped, also by `kill -9`.
#[derive(Debug)]
pub struct DataDirLock {
    _file: File,
}

impl DataDirLock {
    /// Makes the directory (0700) if needed and locks it, without waiting.
    pub fn acquire(dir: &Path) -> Result<Self, LockError> {
        let path = dir.join("lock");
        let io = |source| LockError::Io { path: path.clone(), source };
        create_private_dir(dir).map_err(io)?;
        // Close-on-exec (std's default) keeps the lock from living on in a child.
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(io)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                let _ = (&mut file).take(32).read_to_string(&mut pid); // only for the message
                let pid = pid.trim();
                let pid = if !pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit()) { pid } else { "unknown" };
                return Err(LockError::Taken { dir: dir.to_owned(), pid: pid.to_owned() });
            }
            Err(errno) => return Err(io(errno.into())),
        }
        file.set_len(0).map_err(io)?;
        writeln!(file, "{}", std::process::id()).map_err(io)?;
        Ok(DataDirLock { _file: file })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_private_file_is_replaced_whole_and_stays_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(check_private(&path).is_err());
        write_private(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        check_private(&path).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
        assert!(read_bounded(&path, 2).is_err());
        assert_eq!(read_bounded(&path, 3).unwrap(), b"new");
    }

    #[test]
    fn a_second_optimus_on_the_same_directory_is_told_who_runs() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let held = DataDirLock::acquire(&data).unwrap();
        let error = DataDirLock::acquire(&data).unwrap_err().to_string();
        assert_eq!(error, format!("another optimus already runs on {}, pid {}", data.display(), std::process::id()));
        drop(held);
        DataDirLock::acquire(&data).unwrap();
    }
}
