//! Which log files an allocation has, in the order they were written.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Segments of one allocation that are looked at; the newest win. Far above what any budget allows.
const SEGMENTS_MAX: usize = 10_000;

/// One file of output. Ordered as written: by attempt, then by number.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Segment {
    pub attempt: u32,
    pub number: u64,
    pub path: PathBuf,
}

/// Attempts with a directory, in order. A missing allocation has none.
pub fn attempts(alloc_dir: &Path) -> io::Result<Vec<u32>> {
    let mut attempts = numbers(alloc_dir, |name| name.parse().ok())?;
    attempts.sort_unstable();
    Ok(attempts)
}

/// Every segment of an allocation, oldest first.
pub fn list(alloc_dir: &Path) -> io::Result<Vec<Segment>> {
    let mut found = Vec::new();
    for attempt in attempts(alloc_dir)? {
        found.extend(of_attempt(alloc_dir, attempt)?);
    }
    found.sort_unstable();
    let surplus = found.len().saturating_sub(SEGMENTS_MAX);
    found.drain(..surplus);
    Ok(found)
}

/// The segments of one attempt, oldest first.
pub fn of_attempt(alloc_dir: &Path, attempt: u32) -> io::Result<Vec<Segment>> {
    let found = of_attempt_in(&alloc_dir.join(attempt.to_string()))?;
    Ok(found.into_iter().map(|(number, path)| Segment { attempt, number, path }).collect())
}

/// Number and path of the segments in the directory of an attempt, oldest first.
pub fn of_attempt_in(dir: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut numbers: Vec<u64> = numbers(dir, |name| name.strip_prefix("log.")?.parse().ok())?;
    numbers.sort_unstable();
    Ok(numbers.into_iter().map(|number| (number, dir.join(format!("log.{number}")))).collect())
}

fn numbers<T>(dir: &Path, parse: impl Fn(&str) -> Option<T>) -> io::Result<Vec<T>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    Ok(entries.filter_map(Result::ok).filter_map(|e| parse(e.file_name().to_str()?)).collect())
}
