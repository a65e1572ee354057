//! The disk of this host behind `optimus_common::disk`, and redb on top of any such disk.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use optimus_common::disk::{Disk, DiskFile, check_name};
use rustix::fs::{FlockOperation, flock};

/// One directory on this host, held by one process.
///
/// The directory is created with mode 0700, files with 0600: they hold replicated state. The lock is on the open
/// directory, so it ends with the process and leaves no stale file behind.
#[derive(Debug)]
pub struct HostDisk {
    root: PathBuf,
    dir: File,
}

impl HostDisk {
    /// Opens `root`, creating it (and its parents) when absent.
    ///
    /// # Errors
    /// `WouldBlock` when another process holds the directory; otherwise what the system says, with the path named.
    pub fn open(root: impl AsRef<Path>) -> io::Result<Self> {
        let root = root.as_ref().to_path_buf();
        let named = |what: &str, e: io::Error| io::Error::new(e.kind(), format!("failed to {what} {}: {e}", root.display()));
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&root).map_err(|e| named("create", e))?;
        let dir = File::open(&root).map_err(|e| named("open", e))?;
        flock(dir.as_fd(), FlockOperation::NonBlockingLockExclusive).map_err(|e| match io::Error::from(e) {
            e if e.kind() == io::ErrorKind::WouldBlock => {
                io::Error::new(io::ErrorKind::WouldBlock, format!("{} is in use by another process", root.display()))
            }
            e => named("lock", e),
        })?;
        // The name of a directory made just now lives in its parent, which must be synced too.
        if let Some(parent) = root.parent().filter(|p| !p.as_os_str().is_empty()) {
            File::open(parent).and_then(|p| p.sync_all()).map_err(|e| named("sync the parent of", e))?;
        }
        Ok(Self { root, dir })
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn path(&self, name: &str) -> io::Result<PathBuf> {
        check_name(name)?;
        Ok(self.root.join(name))
    }
}

impl Disk for HostDisk {
    fn open(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        let path = self.path(name)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        // A link planted in the directory must not lead the store elsewhere.
        options.custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
        Ok(Box::new(HostFile(options.open(path)?)))
    }

    fn exists(&self, name: &str) -> io::Result<bool> {
        self.path(name)?.try_exists()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path(name)?)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path(from)?, self.path(to)?)
    }

    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.root)? {
            let entry = entry?;
            // Names we could not have made are not ours to touch (lost+found, an editor's backup).
            if let Ok(name) = entry.file_name().into_string()
                && check_name(&name).is_ok()
                && entry.file_type()?.is_file()
            {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.dir.sync_all()
    }
}

#[derive(Debug)]
struct HostFile(File);

impl DiskFile for HostFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(into, offset)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}

/// redb's storage on any [`DiskFile`], so that a database runs on the real and on the simulated disk alike.
#[derive(Debug)]
pub struct RedbFile(Box<dyn DiskFile>);

impl RedbFile {
    /// Wraps an open file. The caller keeps a second opener away ([`HostDisk`] does, for its directory).
    pub fn new(file: Box<dyn DiskFile>) -> Self {
        Self(file)
    }
}

impl redb::StorageBackend for RedbFile {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, data)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_of_the_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("deep/raft");
        let first = HostDisk::open(&root).unwrap();
        assert_eq!(HostDisk::open(&root).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(first);
        HostDisk::open(&root).unwrap();
    }

    #[test]
    fn files_are_read_back_renamed_listed_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let disk = HostDisk::open(dir.path()).unwrap();
        let file = disk.open("b.tmp").unwrap();
        file.write_at(2, b"xyz").unwrap();
        file.sync_data().unwrap();
        disk.rename("b.tmp", "b").unwrap();
        disk.sync_dir().unwrap();
        disk.open("a").unwrap();
        std::fs::create_dir(dir.path().join("not-a-file")).unwrap();
        assert_eq!(disk.list().unwrap(), ["a", "b"]);
        let mut five = [1u8; 5];
        file.read_at(0, &mut five).unwrap();
        assert_eq!(&five, b"\0\0xyz");
        assert_eq!(file.read_at(3, &mut five).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        disk.remove("a").unwrap();
        assert!(!disk.exists("a").unwrap() && disk.exists("b").unwrap());
        assert!(disk.open("../b").is_err());
    }

    #[test]
    fn a_link_in_the_directory_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let disk = HostDisk::open(dir.path().join("root")).unwrap();
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), dir.path().join("root/raft.redb")).unwrap();
        assert!(disk.open("raft.redb").is_err());
        assert!(!dir.path().join("elsewhere").exists());
    }
}
