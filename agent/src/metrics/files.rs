//! Files of the kernel, opened once and read again and again: opening is most of the price of a short read.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Longest file read; `memory.stat` of a recent kernel has some 2 KB, `/proc/stat` of a host with many cores more.
const BYTES_MAX: usize = 256 << 10;

#[derive(Debug)]
pub struct Kept(File);

impl Kept {
    /// Unset when this host has no such file.
    pub fn open(path: &Path) -> Option<Kept> {
        File::open(path).ok().map(Kept)
    }

    /// What it says now. `buffer` is scratch space that keeps its size from read to read.
    pub fn read<'b>(&self, buffer: &'b mut Vec<u8>) -> io::Result<&'b str> {
        if buffer.len() < 4096 {
            buffer.resize(4096, 0);
        }
        let mut filled = 0;
        loop {
            match self.0.read_at(&mut buffer[filled..], filled as u64) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            // The kernel gives a short file whole: a read that left room was the last.
            if filled < buffer.len() {
                break;
            }
            if filled >= BYTES_MAX {
                return Err(io::Error::other(format!("longer than {BYTES_MAX} bytes")));
            }
            buffer.resize(buffer.len() * 2, 0);
        }
        std::str::from_utf8(&buffer[..filled]).map_err(io::Error::other)
    }

    pub fn number(&self, buffer: &mut Vec<u8>) -> io::Result<u64> {
        let text = self.read(buffer)?.trim();
        text.parse().map_err(|_| io::Error::other(format!("`{text}` is not a number")))
    }
}

/// The number behind a name in lines of `name number`.
pub fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// Total time some process was held up: of a `*.pressure` file.
pub fn some_total(text: &str) -> Option<u64> {
    let some = text.lines().find(|line| line.starts_with("some "))?;
    some.split(' ').find_map(|word| word.strip_prefix("total=")?.parse().ok())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_lines_of_the_kernel_are_understood() {
        assert_eq!(field("total_cache 5\ncache 7\n", "cache"), Some(7));
        assert_eq!(field("cache x\n", "cache"), None);
        let pressure = "some avg10=0.00 avg60=0.00 avg300=0.00 total=1234\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=99\n";
        assert_eq!(some_total(pressure), Some(1234));
        assert_eq!(some_total(""), None);
    }

    #[test]
    fn a_file_is_read_anew_and_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "1\n").unwrap();
        let kept = Kept::open(&path).unwrap();
        let mut buffer = Vec::new();
        assert_eq!(kept.number(&mut buffer).unwrap(), 1);
        let long = "x".repeat(10_000);
        std::fs::write(&path, &long).unwrap();
        assert_eq!(kept.read(&mut buffer).unwrap(), long);
        assert!(kept.number(&mut buffer).is_err());
        assert!(Kept::open(&dir.path().join("none")).is_none());
    }
}
