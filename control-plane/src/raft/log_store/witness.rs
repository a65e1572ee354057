//! A small file beside the log that remembers how far the log was flushed.
//!
//! redb keeps the root of its newest commit and of the one before. When a page of the newest does not check, it takes the
//! one before, which is right after a torn write and wrong after decay: then the last vote or entries, acknowledged
//! long ago, are gone without a word, and this server may vote twice in a term or lead without a committed entry. The file
//! alone cannot tell the two apart. So every commit carries a number, and after its flush the number is written here too,
//! without a flush of its own: a log that is behind this file has lost what it had flushed. The file may itself be behind
//! after a power cut, or be lost; then it says nothing, and nothing is refused.

use std::io;

use optimus_common::disk::{Disk, DiskFile};

use crate::raft::record::Kind;
use crate::raft::stored::{GenerationV1, decode, encode};

/// The file below the data directory.
const FILE: &str = "raft.witness";
/// Two places take turns, so that a torn write leaves the one before.
const PLACE: u64 = 64;

/// The open file.
#[derive(Debug)]
pub(super) struct Witness {
    file: Box<dyn DiskFile>,
}

impl Witness {
    /// Opens or makes the file; all the space it will ever need is taken now.
    pub(super) fn open(disk: &dyn Disk) -> io::Result<Self> {
        let file = disk.open(FILE)?;
        if file.len()? < 2 * PLACE {
            file.write_at(0, &[0; 2 * PLACE as usize])?;
        }
        Ok(Self { file })
    }

    /// The highest number it knows of; 0 when it knows of none.
    pub(super) fn newest(&self) -> io::Result<u64> {
        let mut bytes = [0; 2 * PLACE as usize];
        self.file.read_at(0, &mut bytes)?;
        let number = |place: &[u8]| -> Option<u64> {
            let length = usize::from(*place.last()?);
            decode::<GenerationV1>(Kind::Generation, 0, place.get(..length)?).ok().map(|g| g.number)
        };
        Ok(bytes.chunks(PLACE as usize).filter_map(number).max().unwrap_or(0))
    }

    /// Remembers that the commit of this number was flushed.
    pub(super) fn note(&self, number: u64) -> io::Result<()> {
        let mut place = [0; PLACE as usize];
        let record = encode(Kind::Generation, 0, &GenerationV1 { number });
        place[..record.len()].copy_from_slice(&record);
        place[PLACE as usize - 1] = record.len() as u8;
        self.file.write_at(number % 2 * PLACE, &place)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use optimus_common::disk::sim::MemDisk;

    use super::*;

    #[test]
    fn the_highest_number_is_known_also_after_a_torn_write() {
        let disk = MemDisk::new();
        let witness = Witness::open(&disk).unwrap();
        assert_eq!(witness.newest().unwrap(), 0);
        for number in [1, 2, 3, u64::MAX - 1, u64::MAX] {
            witness.note(number).unwrap();
            assert_eq!(Witness::open(&disk).unwrap().newest().unwrap(), number);
        }
        witness.note(6).unwrap();
        for at in 0..PLACE {
            disk.corrupt(FILE, PLACE + at, 0x10).unwrap();
            let newest = witness.newest().unwrap();
            assert!(newest == 6 || newest == u64::MAX, "{newest}");
            disk.corrupt(FILE, PLACE + at, 0x10).unwrap();
        }
    }
}
