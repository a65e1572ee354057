//! What durable code needs of a disk, and nothing more.
//!
//! A [`Disk`] is one flat directory of named files opened for random access. Everything that must survive power
//! loss (the Raft log, snapshots, the agent's ledger) is written through these two traits, so the same code runs
//! on a real directory (`optimus_host::disk::HostDisk`) and on [`sim::MemDisk`], which forgets what was not synced.
//!
//! The contract is the one of POSIX, not a friendlier one: file content is durable after [`DiskFile::sync_data`],
//! names (creation, removal, rename) are durable after [`Disk::sync_dir`], and after a failed sync nothing that was
//! written may be trusted: the caller must stop, never retry.

use std::fmt::Debug;
use std::io;

pub mod sim;

/// Longest file name accepted by [`check_name`], in bytes.
pub const NAME_MAX: usize = 128;

/// One flat directory of named files.
pub trait Disk: Send + Sync + Debug + 'static {
    /// Opens `name` for reading and writing; creates an empty file when there is none.
    fn open(&self, name: &str) -> io::Result<Box<dyn DiskFile>>;
    /// Whether a file of that name exists.
    fn exists(&self, name: &str) -> io::Result<bool>;
    /// Removes a file; `NotFound` when there is none. Open handles stay usable.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Renames `from` to `to` in one step, replacing `to`.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// The names of all files, sorted.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Makes every creation, removal and rename so far durable.
    fn sync_dir(&self) -> io::Result<()>;
}

/// One open file. All methods take `&self`: callers serialise writers themselves.
// A file on disk is not a collection: "is it empty" is never asked, and the answer can fail.
#[allow(clippy::len_without_is_empty)]
pub trait DiskFile: Send + Sync + Debug + 'static {
    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Fills `into` from `offset`, or fails with `UnexpectedEof`.
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
    /// Writes all of `data` at `offset`, extending the file with zeroes where needed.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Cuts or extends (with zeroes) the file.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes the content and length of this file durable. After an error nothing may be assumed; stop.
    fn sync_data(&self) -> io::Result<()>;
}

/// Refuses names that could leave the directory or surprise a shell.
///
/// # Errors
/// `InvalidInput` unless the name is 1 to [`NAME_MAX`] bytes of `A-Z a-z 0-9 . _ -` and does not start with a dot.
pub fn check_name(name: &str) -> io::Result<()> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    if name.is_empty() || name.len() > NAME_MAX || name.starts_with('.') || !name.bytes().all(plain) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("invalid file name {name:?}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::check_name;

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for bad in ["", ".", "..", "../x", "a/b", ".hidden", "a b", "a\0b"] {
            assert!(check_name(bad).is_err(), "{bad:?} was accepted");
        }
        assert!(check_name(&"x".repeat(129)).is_err());
        for good in ["raft.redb", "snapshot-00000000000000000010-000001.snap", "x.tmp"] {
            check_name(good).expect(good);
        }
    }
}
