//! `KIND VERSION` and `key NUL value NUL` pairs; written atomically.

use std::fmt::{Display, Write as _};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Longest file read back.
const FILE_MAX: u64 = 4 << 20;

/// Builds a file.
pub struct Writer(String);

impl Writer {
    pub fn new(head: &str) -> Self {
        Writer(format!("optimus-runner {head}\0"))
    }
    /// A NUL in a value is dropped: no argument, path or name can hold one.
    pub fn put(&mut self, key: &str, value: impl Display) {
        let at = self.0.len();
        let _ = write!(self.0, "{value}");
        if self.0[at..].contains('\0') {
            let clean = self.0[at..].replace('\0', "");
            self.0.truncate(at);
            self.0.push_str(&clean);
        }
        self.0.insert_str(at, &format!("{key}\0"));
        self.0.push('\0');
    }
    pub fn finish(self) -> Vec<u8> {
        self.0.into_bytes()
    }
}

/// Walks the pairs of a file.
pub struct Reader<'a>(&'a str);

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8], head: &str) -> io::Result<Self> {
        let text = std::str::from_utf8(bytes).map_err(|_| bad("not UTF-8"))?;
        let (found, rest) = text.split_once('\0').ok_or_else(|| bad("no head"))?;
        if found.strip_prefix("optimus-runner ") != Some(head) {
            return Err(bad("another kind or version of file"));
        }
        if !rest.is_empty() && !rest.ends_with('\0') {
            return Err(bad("cut off"));
        }
        Ok(Reader(rest))
    }
    #[allow(clippy::should_implement_trait)] // fallible
    pub fn next(&mut self) -> io::Result<Option<(&'a str, &'a str)>> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let (key, rest) = self.0.split_once('\0').ok_or_else(|| bad("cut off"))?;
        let (value, rest) = rest.split_once('\0').ok_or_else(|| bad("cut off"))?;
        self.0 = rest;
        Ok(Some((key, value)))
    }
}

pub fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

pub fn number<T: std::str::FromStr>(key: &str, value: &str) -> io::Result<T> {
    value.parse().map_err(|_| bad(&format!("`{key}` is not a number in range: {value:?}")))
}

/// The bytes of a file; `None` if it is not there.
pub fn read(path: &Path) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut bytes = Vec::new();
    file.take(FILE_MAX).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

/// Room taken beforehand for a file that must be written even when the disk is full.
#[derive(Debug)]
pub struct Reserved {
    name: &'static str,
    file: File,
}

impl Reserved {
    /// Most bytes that surely find room.
    pub const BYTES: usize = 4096;

    /// Takes the room, in the current directory.
    pub fn take(name: &'static str) -> io::Result<Self> {
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(temporary(name))?;
        file.write_all(&[0; Self::BYTES])?; // not synced: a file system that says there is room keeps it
        Ok(Reserved { name, file })
    }

    /// Writes the file in its place: a reader sees the whole of it or none.
    pub fn write(&self, bytes: &[u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::write_all_at(&self.file, bytes, 0)?;
        self.file.set_len(bytes.len() as u64)?;
        self.file.sync_all()?;
        fs::rename(temporary(self.name), self.name)?;
        File::open(".")?.sync_all()
    }
}

fn temporary(name: &str) -> String {
    format!(".{name}.new")
}

/// Writes beside, syncs, renames, syncs the directory: a reader sees the whole file or none, also after a power cut.
pub fn write_atomic(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    write_beside(dir, name, bytes)?.sync_all()?;
    fs::rename(dir.join(temporary(name)), dir.join(name))?;
    File::open(dir)?.sync_all()
}

/// Writes beside and renames: a reader sees the whole file or none while the host is up. For what means nothing
/// after a power cut; a sync would cost more than the start of the process.
pub fn write_for_now(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    write_beside(dir, name, bytes)?;
    fs::rename(dir.join(temporary(name)), dir.join(name))
}

fn write_beside(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<File> {
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(dir.join(temporary(name)))?;
    file.write_all(bytes)?;
    Ok(file)
}
