//! What the driver keeps of an attempt in its run directory, so that the next agent knows without the engine.
//!
//! `container` is written before the engine is asked for anything: no file, no container. `container-end` is written
//! once the end is known and before the container is removed.

use std::fs;
use std::io;
use std::path::Path;

use optimus_common::AllocId;
use optimus_common::reason::Reason;
use optimus_common::time::Timestamp;
use optimus_common::units::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub const CONTAINER_FILE: &str = "container";
pub const END_FILE: &str = "container-end";
/// Longest file read back.
const FILE_MAX: u64 = 64 << 10;

/// An attempt that has, or may have, a container.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ContainerRecord {
    pub name: String,
    /// The engine said that it was started.
    pub started: bool,
    /// Zero: not known, or it ended at once.
    pub pid: u32,
    pub started_at: Timestamp,
    /// Told with an out-of-memory end.
    pub memory_limit: Bytes,
    /// Budget of its output.
    pub logs: Bytes,
    /// Limits that are not enforced.
    pub unenforced: Vec<String>,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct EndRecord {
    pub reason: Reason,
}

/// Name of the container of an attempt. Unique on every host: allocation ids are.
pub fn container_name(alloc: AllocId, attempt: u32) -> String {
    format!("optimus-{alloc}-{attempt}")
}

/// The value of a file; `None` if it is not there.
pub fn read<T: DeserializeOwned>(run_dir: &Path, file: &str) -> io::Result<Option<T>> {
    use std::io::Read;
    let opened = match fs::File::open(run_dir.join(file)) {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    opened.take(FILE_MAX).read_to_end(&mut bytes)?;
    serde_json::from_slice(&bytes).map(Some).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Writes beside, syncs and renames: a reader sees the whole of it or what was there before.
pub fn write<T: Serialize>(run_dir: &Path, file: &str, value: &T) -> io::Result<()> {
    use std::io::Write;
    let bytes = serde_json::to_vec(value).map_err(io::Error::other)?;
    let beside = run_dir.join(format!(".{file}.new"));
    let mut new = fs::File::create(&beside)?;
    new.write_all(&bytes)?;
    new.sync_data()?;
    fs::rename(beside, run_dir.join(file))
}
