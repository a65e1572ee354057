//! A disk in memory that forgets what was not synced.
//!
//! It keeps two images, what a reader sees now and what would be left after a power cut, and between them the list of
//! writes that no sync has covered. [`MemDisk::crash`] decides how much of that list survives. It is deterministic: the
//! same calls and the same seed give the same bytes, and it never asks the operating system for anything.
//!
//! Every mutation is also kept in a journal on request ([`MemDisk::recording`]), so that a test can run a script once
//! and then visit the disk as it was after each single write ([`MemDisk::redo`]).

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Disk, DiskFile, check_name};

/// Unit in which an unfinished write reaches the platter.
const SECTOR: usize = 512;

/// One mutation, as kept in the journal. Files are told apart by a number, because a name may move.
#[derive(Clone, Debug)]
pub enum Change {
    /// A new empty file under a name.
    Create { name: String, file: u64 },
    /// A name taken away.
    Remove { name: String },
    /// A name moved.
    Rename { from: String, to: String },
    /// Bytes at an offset.
    Write { file: u64, offset: u64, data: Arc<[u8]> },
    /// A new length.
    SetLen { file: u64, len: u64 },
    /// `sync_data` of one file.
    SyncData { file: u64 },
    /// `sync_dir`.
    SyncDir,
}

/// What a power cut leaves of the writes that were not synced.
#[derive(Clone, Copy, Debug)]
pub enum Crash {
    /// Nothing.
    LoseAll,
    /// Everything: a killed process, whose writes sit in the page cache.
    KeepAll,
    /// The first `keep` in order; when `tear` is set, also the first half of the next one.
    Prefix { keep: usize, tear: bool },
    /// Any subset, chosen by the seed, each write possibly cut at a sector: what a disk with a volatile cache may do.
    /// Names still change in order, as a journalling file system does.
    Scattered { seed: u64 },
}

#[derive(Clone, Debug, Default)]
struct Image {
    names: BTreeMap<String, u64>,
    files: BTreeMap<u64, Arc<Vec<u8>>>,
}

impl Image {
    fn apply(&mut self, change: &Change) {
        match change {
            Change::Create { name, file } => {
                self.names.insert(name.clone(), *file);
                self.files.entry(*file).or_default();
            }
            Change::Remove { name } => {
                self.names.remove(name);
            }
            Change::Rename { from, to } => {
                if let Some(file) = self.names.remove(from) {
                    self.names.insert(to.clone(), file);
                }
            }
            Change::Write { file, offset, data } => {
                let content = Arc::make_mut(self.files.entry(*file).or_default());
                let (start, end) = (*offset as usize, *offset as usize + data.len());
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[start..end].copy_from_slice(data);
            }
            Change::SetLen { file, len } => Arc::make_mut(self.files.entry(*file).or_default()).resize(*len as usize, 0),
            Change::SyncData { .. } | Change::SyncDir => {}
        }
    }
}

#[derive(Debug, Default)]
struct State {
    now: Image,
    durable: Image,
    pending: Vec<Change>,
    journal: Option<Vec<Change>>,
    next_file: u64,
    /// Handles opened before a crash must not write into the disk of the next life.
    life: u64,
    changes: u64,
    syncs: u64,
    fail_sync: Option<u64>,
    power_off_at: Option<u64>,
    off: bool,
    capacity: Option<u64>,
}

impl State {
    fn used(&self) -> u64 {
        // A file without a name gives its space back, as if its last handle were closed at once.
        self.now.names.values().filter_map(|file| self.now.files.get(file)).map(|f| f.len() as u64).sum()
    }

    /// Counts a mutation and, when the power went off at this one, refuses it and all that follow.
    fn tick(&mut self) -> io::Result<()> {
        if self.off || self.power_off_at.is_some_and(|at| self.changes >= at) {
            self.off = true;
            return Err(io::Error::other("simulated power loss"));
        }
        self.changes += 1;
        Ok(())
    }

    fn change(&mut self, change: Change) {
        if let Some(journal) = &mut self.journal {
            journal.push(change.clone());
        }
        if let Change::Create { file, .. } = &change {
            self.next_file = self.next_file.max(file + 1); // also when the change comes from another disk's journal
        }
        match &change {
            Change::SyncData { file } => {
                self.settle(|c| matches!(c, Change::Write { file: f, .. } | Change::SetLen { file: f, .. } if f == file))
            }
            Change::SyncDir => self.settle(|c| matches!(c, Change::Create { .. } | Change::Remove { .. } | Change::Rename { .. })),
            _ => {
                self.now.apply(&change);
                self.pending.push(change);
            }
        }
    }

    fn settle(&mut self, covered: impl Fn(&Change) -> bool) {
        let (durable, left): (Vec<_>, Vec<_>) = std::mem::take(&mut self.pending).into_iter().partition(covered);
        self.pending = left;
        for change in durable {
            self.durable.apply(&change);
        }
    }
}

/// A simulated disk. Cloning gives another handle on the same disk; [`MemDisk::fork`] gives a copy.
#[derive(Clone, Debug, Default)]
pub struct MemDisk {
    state: Arc<Mutex<State>>,
}

impl MemDisk {
    /// An empty disk without a capacity limit or faults.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty disk that keeps a journal of every change.
    pub fn recording() -> Self {
        let disk = Self::default();
        disk.lock().journal = Some(Vec::new());
        disk
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All changes since [`MemDisk::recording`]; empty on a disk that does not record.
    pub fn journal(&self) -> Vec<Change> {
        self.lock().journal.clone().unwrap_or_default()
    }

    /// Number of changes (writes, syncs, names) since the disk was made.
    pub fn changes(&self) -> u64 {
        self.lock().changes
    }

    /// Repeats one change of another disk's journal.
    pub fn redo(&self, change: &Change) {
        self.lock().change(change.clone());
    }

    /// An independent copy of this disk, with the same durable image and pending writes, without faults or journal.
    pub fn fork(&self) -> Self {
        let s = self.lock();
        let copy = State {
            now: s.now.clone(),
            durable: s.durable.clone(),
            pending: s.pending.clone(),
            next_file: s.next_file,
            ..State::default()
        };
        Self { state: Arc::new(Mutex::new(copy)) }
    }

    /// Number of writes that no sync has covered yet.
    pub fn pending(&self) -> usize {
        self.lock().pending.len()
    }

    /// Cuts the power and restores it: handles opened before are dead, faults and a full disk are forgotten, and of
    /// the writes that were not synced only what `how` says is left.
    pub fn crash(&self, how: Crash) {
        let mut s = self.lock();
        let pending = std::mem::take(&mut s.pending);
        match how {
            Crash::LoseAll => {}
            Crash::KeepAll => pending.iter().for_each(|c| s.durable.apply(c)),
            Crash::Prefix { keep, tear } => {
                pending.iter().take(keep).for_each(|c| s.durable.apply(c));
                if tear && let Some(Change::Write { file, offset, data }) = pending.get(keep) {
                    s.durable.apply(&Change::Write { file: *file, offset: *offset, data: data[..data.len() / 2].into() });
                }
            }
            Crash::Scattered { seed } => scatter(&mut s.durable, &pending, seed),
        }
        let reachable: Vec<u64> = s.durable.names.values().copied().collect();
        s.durable.files.retain(|file, _| reachable.contains(file));
        s.now = s.durable.clone();
        s.life += 1;
        (s.off, s.fail_sync, s.power_off_at, s.capacity) = (false, None, None, None);
    }

    /// Cuts the power when `changes` more changes have been made: the next one and all that follow fail, until
    /// [`MemDisk::crash`].
    pub fn power_off_after(&self, changes: u64) {
        let mut s = self.lock();
        s.power_off_at = Some(s.changes + changes);
    }

    /// Lets the `nth` sync from now (1 is the next) fail. What it should have covered stays pending.
    pub fn fail_sync(&self, nth: u64) {
        let mut s = self.lock();
        s.fail_sync = Some(s.syncs + nth);
    }

    /// Refuses writes that would take all files together above `bytes`; `None` lifts the limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.lock().capacity = bytes;
    }

    /// Inverts the bits of `mask` in one byte of a file, as decay does: at once, in what readers see and in what is durable.
    ///
    /// # Errors
    /// `NotFound` when there is no such file, `InvalidInput` when it is shorter.
    pub fn corrupt(&self, name: &str, offset: u64, mask: u8) -> io::Result<()> {
        let mut s = self.lock();
        let file = *s.now.names.get(name).ok_or_else(|| not_found(name))?;
        let State { now, durable, .. } = &mut *s;
        for image in [now, durable] {
            let Some(content) = image.files.get_mut(&file) else { continue };
            let byte = Arc::make_mut(content).get_mut(offset as usize);
            *byte.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is shorter than {offset}")))? ^= mask;
        }
        Ok(())
    }
}

fn scatter(durable: &mut Image, pending: &[Change], seed: u64) {
    let mut random = seed;
    let mut names_kept = true;
    for change in pending {
        let roll = splitmix(&mut random);
        match change {
            Change::Write { file, offset, data } => match roll % 4 {
                0 => {}
                1 if data.len() > SECTOR => {
                    let sectors = splitmix(&mut random) as usize % (data.len() / SECTOR);
                    durable.apply(&Change::Write { file: *file, offset: *offset, data: data[..sectors * SECTOR].into() });
                }
                _ => durable.apply(change),
            },
            Change::SetLen { .. } if roll.is_multiple_of(4) => {}
            Change::SetLen { .. } => durable.apply(change),
            _ => {
                names_kept &= !roll.is_multiple_of(4);
                if names_kept {
                    durable.apply(change);
                }
            }
        }
    }
}

/// A small generator (SplitMix64), so that a crash is chosen by its seed and by nothing else.
fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn not_found(name: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("no file {name}"))
}

impl Disk for MemDisk {
    fn open(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        check_name(name)?;
        let mut s = self.lock();
        let file = match s.now.names.get(name) {
            Some(&file) => file,
            None => {
                s.tick()?;
                let file = s.next_file;
                s.change(Change::Create { name: name.to_owned(), file });
                file
            }
        };
        Ok(Box::new(MemFile { state: self.state.clone(), file, life: s.life }))
    }

    fn exists(&self, name: &str) -> io::Result<bool> {
        Ok(self.lock().now.names.contains_key(name))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut s = self.lock();
        if !s.now.names.contains_key(name) {
            return Err(not_found(name));
        }
        s.tick()?;
        s.change(Change::Remove { name: name.to_owned() });
        Ok(())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        check_name(to)?;
        let mut s = self.lock();
        if !s.now.names.contains_key(from) {
            return Err(not_found(from));
        }
        s.tick()?;
        s.change(Change::Rename { from: from.to_owned(), to: to.to_owned() });
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.lock().now.names.keys().cloned().collect())
    }

    fn sync_dir(&self) -> io::Result<()> {
        sync(&mut self.lock(), Change::SyncDir)
    }
}

fn sync(s: &mut State, change: Change) -> io::Result<()> {
    s.tick()?;
    s.syncs += 1;
    if s.fail_sync.is_some_and(|at| s.syncs == at) {
        return Err(io::Error::other("simulated sync failure"));
    }
    s.change(change);
    Ok(())
}

#[derive(Debug)]
struct MemFile {
    state: Arc<Mutex<State>>,
    file: u64,
    life: u64,
}

impl MemFile {
    fn lock(&self) -> io::Result<MutexGuard<'_, State>> {
        let s = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if s.life != self.life {
            return Err(io::Error::other("file was opened before the simulated crash"));
        }
        Ok(s)
    }
}

impl DiskFile for MemFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.lock()?.now.files.get(&self.file).map_or(0, |f| f.len() as u64))
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let s = self.lock()?;
        let content: &[u8] = s.now.files.get(&self.file).map_or(&[], |f| f.as_slice());
        let from = usize::try_from(offset).ok().and_then(|start| content.get(start..start.checked_add(into.len())?));
        into.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut s = self.lock()?;
        let len = s.now.files.get(&self.file).map_or(0, |f| f.len() as u64);
        let grows = (offset + data.len() as u64).saturating_sub(len);
        if s.capacity.is_some_and(|limit| grows > 0 && s.used() + grows > limit) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        s.tick()?;
        s.change(Change::Write { file: self.file, offset, data: data.into() });
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut s = self.lock()?;
        let grows = len.saturating_sub(s.now.files.get(&self.file).map_or(0, |f| f.len() as u64));
        if s.capacity.is_some_and(|limit| grows > 0 && s.used() + grows > limit) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        s.tick()?;
        s.change(Change::SetLen { file: self.file, len });
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut s = self.lock()?;
        sync(&mut s, Change::SyncData { file: self.file })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn content(disk: &MemDisk, name: &str) -> Vec<u8> {
        let file = disk.open(name).unwrap();
        let mut bytes = vec![0; file.len().unwrap() as usize];
        file.read_at(0, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn only_synced_content_under_a_synced_name_survives() {
        let disk = MemDisk::new();
        let a = disk.open("a").unwrap();
        a.write_at(0, b"one").unwrap();
        a.sync_data().unwrap();
        disk.crash(Crash::LoseAll);
        assert_eq!(disk.list().unwrap(), Vec::<String>::new(), "the name was never synced");
        assert!(a.write_at(0, b"x").is_err(), "a handle of the former life");

        let a = disk.open("a").unwrap();
        a.write_at(0, b"one").unwrap();
        a.sync_data().unwrap();
        disk.sync_dir().unwrap();
        a.write_at(0, b"two").unwrap();
        disk.rename("a", "b").unwrap();
        disk.crash(Crash::LoseAll);
        assert_eq!(disk.list().unwrap(), ["a"]);
        assert_eq!(content(&disk, "a"), b"one");
    }

    #[test]
    fn a_prefix_crash_keeps_writes_in_order_and_may_tear_the_next() {
        let disk = MemDisk::new();
        let a = disk.open("a").unwrap();
        disk.sync_dir().unwrap();
        a.write_at(0, b"aaaa").unwrap();
        a.write_at(0, b"bbbb").unwrap();
        let torn = disk.fork();
        torn.crash(Crash::Prefix { keep: 1, tear: true });
        assert_eq!(content(&torn, "a"), b"bbaa");
        disk.crash(Crash::Prefix { keep: 1, tear: false });
        assert_eq!(content(&disk, "a"), b"aaaa");
    }

    #[test]
    fn faults_are_injected_where_asked() {
        let disk = MemDisk::new();
        let a = disk.open("a").unwrap();
        disk.fail_sync(2);
        a.sync_data().unwrap();
        assert!(a.sync_data().is_err());
        disk.set_capacity(Some(4));
        a.write_at(0, b"1234").unwrap();
        assert_eq!(a.write_at(4, b"5").unwrap_err().kind(), io::ErrorKind::StorageFull);
        disk.set_capacity(None);
        disk.power_off_after(1);
        a.write_at(4, b"5").unwrap();
        assert!(a.write_at(5, b"6").is_err());
        assert!(a.sync_data().is_err());
    }

    #[test]
    fn a_journal_rebuilds_the_same_disk() {
        let disk = MemDisk::recording();
        let a = disk.open("a").unwrap();
        a.write_at(3, b"xyz").unwrap();
        a.sync_data().unwrap();
        disk.sync_dir().unwrap();
        a.set_len(4).unwrap();
        let again = MemDisk::new();
        disk.journal().iter().for_each(|c| again.redo(c));
        assert_eq!(again.pending(), disk.pending());
        assert_eq!(content(&again, "a"), content(&disk, "a"));
        again.open("b").unwrap().write_at(0, b"b").unwrap();
        assert_eq!(content(&again, "a"), content(&disk, "a"), "a new file is another file");
        again.remove("b").unwrap();
        let again = MemDisk::new();
        disk.journal().iter().for_each(|c| again.redo(c));
        for seed in 0..20 {
            let (one, two) = (disk.fork(), again.fork());
            one.crash(Crash::Scattered { seed });
            two.crash(Crash::Scattered { seed });
            assert_eq!(content(&one, "a"), content(&two, "a"));
        }
    }
}
