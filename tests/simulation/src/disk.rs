//! A server's disk: [`MemDisk`], and word to the world at the moment its power fails.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use optimus_common::disk::sim::MemDisk;
use optimus_common::disk::{Disk, DiskFile};

/// Called when an operation met the power cut that was armed with [`MemDisk::power_off_after`].
pub type OnPowerLoss = Arc<dyn Fn() + Send + Sync>;

/// The disk a server writes to.
#[derive(Clone)]
pub struct SimDisk {
    disk: MemDisk,
    /// Set when the life of the server that holds this handle is over.
    dead: Arc<AtomicBool>,
    on_power_loss: OnPowerLoss,
}

impl SimDisk {
    pub fn new(disk: MemDisk, dead: Arc<AtomicBool>, on_power_loss: OnPowerLoss) -> Self {
        Self { disk, dead, on_power_loss }
    }

    /// A dying task may still be in the middle of a call; it must not reach into the disk of the next life.
    fn alive(&self) -> io::Result<()> {
        if self.dead.load(Ordering::Relaxed) { Err(io::Error::other("the server is down")) } else { Ok(()) }
    }

    /// The machine goes dark in the middle of what it was doing: the world ends its tasks, and what this call answers
    /// reaches nobody.
    fn notice<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if let Err(e) = &result
            && e.to_string() == "simulated power loss"
        {
            (self.on_power_loss)();
        }
        result
    }
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimDisk")
    }
}

impl Disk for SimDisk {
    fn open(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        self.alive()?;
        let file = self.notice(self.disk.open(name))?;
        Ok(Box::new(SimFile { file, disk: self.clone() }))
    }
    fn exists(&self, name: &str) -> io::Result<bool> {
        self.alive()?;
        self.disk.exists(name)
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.alive()?;
        self.notice(self.disk.remove(name))
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.alive()?;
        self.notice(self.disk.rename(from, to))
    }
    fn list(&self) -> io::Result<Vec<String>> {
        self.alive()?;
        self.disk.list()
    }
    fn sync_dir(&self) -> io::Result<()> {
        self.alive()?;
        self.notice(self.disk.sync_dir())
    }
}

#[derive(Debug)]
struct SimFile {
    file: Box<dyn DiskFile>,
    disk: SimDisk,
}

impl DiskFile for SimFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_at(offset, into)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.disk.notice(self.file.write_at(offset, data))
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.notice(self.file.set_len(len))
    }
    fn sync_data(&self) -> io::Result<()> {
        self.disk.notice(self.file.sync_data())
    }
}
