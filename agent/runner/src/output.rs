//! What the workload prints: lines with a time, in segments of bounded size and number.
//!
//! The workload is never blocked by its output for long: what finds no disk is dropped and counted.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use optimus_runner::{LINE_MAX, LOG_PREFIX};

use crate::sys::{self, PollSet};

/// Bytes read from a pipe at a time.
const READ: usize = 16 << 10;
/// While the disk is full, a write is tried this often at most.
const RETRY: Duration = Duration::from_millis(200);

/// One pipe of the workload.
struct Stream {
    fd: Option<OwnedFd>,
    letter: u8,
    /// A line whose end has not come yet.
    partial: Vec<u8>,
    /// The last line ended because it was full.
    cut: bool,
    place: usize,
}

pub struct Output {
    streams: [Stream; 2],
    log: Log,
    buffer: Box<[u8]>,
}

impl Output {
    pub fn new(out: OwnedFd, err: OwnedFd, segment: u64, segments: u32) -> Self {
        let stream = |fd, letter| Stream { fd: Some(fd), letter, partial: Vec::new(), cut: false, place: usize::MAX };
        Output {
            streams: [stream(out, b'O'), stream(err, b'E')],
            log: Log {
                file: None,
                number: 0,
                size: 0,
                segment: segment.max(4096),
                segments: segments.max(1),
                dropped: 0,
                untold: 0,
                full_since: None,
            },
            buffer: vec![0; READ].into_boxed_slice(),
        }
    }

    pub fn register(&mut self, set: &mut PollSet) {
        for stream in &mut self.streams {
            stream.place = set.add(stream.fd.as_ref().map(AsRawFd::as_raw_fd));
        }
    }

    /// Takes one piece from each pipe that has some.
    pub fn pump(&mut self, set: &PollSet) {
        for stream in &mut self.streams {
            if !set.ready(stream.place) {
                continue;
            }
            let Some(fd) = &stream.fd else { continue };
            match sys::read(fd.as_raw_fd(), &mut self.buffer) {
                Ok(0) => {
                    stream.flush(&mut self.log);
                    stream.fd = None;
                }
                Ok(n) => stream.take(&self.buffer[..n], &mut self.log),
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(_) => stream.fd = None,
            }
        }
        self.log.tell();
    }

    pub fn is_open(&self) -> bool {
        self.streams.iter().any(|s| s.fd.is_some())
    }

    /// Writes what is left of unfinished lines.
    pub fn finish(&mut self) {
        for stream in &mut self.streams {
            stream.flush(&mut self.log);
            stream.fd = None;
        }
        self.log.full_since = None;
        self.log.tell();
        // Closed, so that a segment which must make room does.
        self.log.file = None;
    }

    pub fn dropped(&self) -> u64 {
        self.log.dropped
    }

    /// When to look again whether there is room to tell of dropped lines.
    pub fn retry_in(&self) -> Option<Duration> {
        (self.log.untold > 0).then_some(RETRY)
    }
}

impl Stream {
    fn take(&mut self, mut bytes: &[u8], log: &mut Log) {
        let mut lines = Lines { now: sys::unix_ms(), letter: self.letter, out: Vec::with_capacity(bytes.len() + 256), count: 0 };
        while !bytes.is_empty() {
            let room = LINE_MAX - self.partial.len();
            let (piece, rest) = match newline(&bytes[..bytes.len().min(room)]) {
                Some(at) => (&bytes[..at], &bytes[at + 1..]),
                None if bytes.len() < room => {
                    self.partial.extend_from_slice(bytes);
                    break;
                }
                None => bytes.split_at(room),
            };
            // The end of a line whose last piece was exactly full is not a line more.
            let only_the_end = self.cut && self.partial.is_empty() && piece.is_empty();
            self.cut = piece.len() == room;
            if !only_the_end {
                lines.add(&self.partial, piece, log);
                self.partial.clear();
            }
            bytes = rest;
        }
        lines.write(log);
    }

    fn flush(&mut self, log: &mut Log) {
        if !self.partial.is_empty() {
            let mut lines = Lines { now: sys::unix_ms(), letter: self.letter, out: Vec::new(), count: 0 };
            lines.add(&self.partial, b"", log);
            self.partial = Vec::new();
            lines.write(log);
        }
    }
}

fn newline(bytes: &[u8]) -> Option<usize> {
    // SAFETY: the slice is valid for its length.
    let found = unsafe { libc::memchr(bytes.as_ptr().cast(), i32::from(b'\n'), bytes.len()) };
    (!found.is_null()).then(|| found as usize - bytes.as_ptr() as usize)
}

/// Lines that go to the log together.
struct Lines {
    now: u64,
    letter: u8,
    out: Vec<u8>,
    count: u64,
}

impl Lines {
    fn add(&mut self, first: &[u8], second: &[u8], log: &mut Log) {
        let before = self.out.len();
        line(&mut self.out, self.now, self.letter, first, second);
        self.count += 1;
        // Empty lines grow twentyfold by their times: a segment is not outgrown, nor our memory.
        if self.out.len() as u64 > log.room() && before > 0 {
            let last = self.out.split_off(before);
            self.count -= 1;
            self.write(log);
            self.out = last;
            self.count = 1;
        }
    }

    fn write(&mut self, log: &mut Log) {
        if self.count > 0 {
            log.write(&self.out, self.count);
            self.out.clear();
            self.count = 0;
        }
    }
}

fn line(out: &mut Vec<u8>, at: u64, letter: u8, first: &[u8], second: &[u8]) {
    let _ = write!(out, "{at} {} ", letter as char);
    out.extend_from_slice(first);
    out.extend_from_slice(second);
    out.push(b'\n');
}

/// The segments on disk.
struct Log {
    file: Option<File>,
    number: u64,
    size: u64,
    segment: u64,
    segments: u32,
    /// Lines that found no disk.
    dropped: u64,
    /// Those of them that the log does not tell of yet.
    untold: u64,
    full_since: Option<Instant>,
}

impl Log {
    /// Writes whole lines or none of them.
    fn write(&mut self, lines: &[u8], count: u64) {
        // What is missing is told before what comes after it. While the disk is full, most output is dropped without
        // asking the disk again.
        self.tell();
        if self.untold == 0 && self.try_write(lines).is_ok() {
            return;
        }
        if self.full_since.is_none() {
            self.full_since = Some(Instant::now());
        }
        self.dropped += count;
        self.untold += count;
    }

    /// Bytes that still fit in this segment.
    fn room(&self) -> u64 {
        // A segment that is not open yet may hold something of before; a new one is begun then.
        self.segment.saturating_sub(self.size)
    }

    fn try_write(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.file.is_some() && self.size + lines.len() as u64 > self.segment && self.size > 0 {
            self.file = None;
            self.number += 1;
            if let Some(old) = self.number.checked_sub(u64::from(self.segments)) {
                let _ = fs::remove_file(segment_name(old));
            }
        }
        let file = match &mut self.file {
            Some(file) => file,
            None => {
                let file = OpenOptions::new().append(true).create(true).mode(0o640).open(segment_name(self.number))?;
                self.size = file.metadata()?.len();
                self.file.insert(file)
            }
        };
        match file.write_all(lines) {
            Ok(()) => {
                self.size += lines.len() as u64;
                Ok(())
            }
            Err(error) => {
                // A part of it may be there: no line is kept in half.
                let _ = file.set_len(self.size);
                Err(error)
            }
        }
    }

    /// Says in the log how many lines are missing at this place, once there is room.
    fn tell(&mut self) {
        if self.untold == 0 || self.full_since.is_some_and(|since| since.elapsed() < RETRY) {
            return;
        }
        let text = format!("{} E [optimus: {} lines dropped, the disk was full]\n", sys::unix_ms(), self.untold);
        if self.try_write(text.as_bytes()).is_ok() {
            self.untold = 0;
            self.full_since = None;
        } else {
            self.full_since = Some(Instant::now());
        }
    }
}

fn segment_name(number: u64) -> String {
    format!("{LOG_PREFIX}{number}")
}

/// Gives up the oldest segment, for something that matters more.
pub fn drop_oldest_segment(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    let oldest = entries.flatten().filter_map(|e| e.file_name().to_str()?.strip_prefix(LOG_PREFIX)?.parse::<u64>().ok()).min();
    if let Some(number) = oldest {
        let _ = fs::remove_file(dir.join(segment_name(number)));
    }
}
