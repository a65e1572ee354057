//! A container's output, from the engine's buffer into the log store that processes write to.
//!
//! The engine keeps what a container prints in files of its own (json-file, bounded by the workload's log budget), so
//! a workload is never held up by an agent that is away. This follows them and writes `log.N` as a runner does, the
//! time being the engine's. How far it got stands in a small file beside: the place in our segments, and for each
//! stream the time of the last line and how many lines had that very time. After a death of the agent what our segment
//! holds beyond that place is cut off and read again, so that no line is lost or doubled, wherever it was killed.
//!
//! Bounds of this: lines the engine rotated away while no agent was there are gone, and so may be lines around a
//! backward step of the host's clock while no agent was there.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bollard::container::LogOutput;
use optimus_common::units::Bytes;
use serde::{Deserialize, Serialize};

use crate::logs::{retention, segments};

/// Holds [`Position`].
pub const POSITION_FILE: &str = "container-output";
/// Room of the position's file: one write of one page, which a kill cannot tear.
const POSITION_BYTES: usize = 512;
/// Segments the output of one attempt is kept in.
const SEGMENTS: u64 = 4;
/// Longest piece of a line, with room for its head before readers cut.
const PIECE_MAX: usize = (16 << 10) - 64;
/// Lines of one stream may reach the engine's file so much later than those of the other with the same time.
const SKEW_SECS: u64 = 10;

/// The last line taken of one stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct At {
    /// The engine's time of it, nanoseconds since 1970.
    ns: u64,
    /// How many lines with that time were taken.
    count: u64,
}

/// How far output was taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Position {
    segment: u64,
    offset: u64,
    /// Standard output and standard error.
    streams: [At; 2],
}

/// What of a stream is known again from before.
#[derive(Debug, Clone, Copy, Default)]
struct CatchUp {
    active: bool,
    /// Lines met again with the time of the last one taken.
    met: u64,
}

/// The segments of one attempt, and how far they go.
#[derive(Debug)]
pub struct Store {
    run_dir: PathBuf,
    segment_bytes: u64,
    file: File,
    position_file: File,
    position: Position,
    catch_up: [CatchUp; 2],
    /// The last piece of a stream's line was cut where it was full.
    cut: [bool; 2],
    /// Position once `pending` is written.
    next: Position,
    pending: Vec<u8>,
}

impl Store {
    /// Opens it where it was left. `size`: the workload's log budget. Blocking.
    pub fn open(run_dir: &Path, size: Bytes) -> io::Result<Self> {
        let position_path = run_dir.join(POSITION_FILE);
        let position_file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o640).open(position_path)?;
        let position = read_position(&position_file);
        for segment in segments::of_attempt_in(run_dir)? {
            // Beyond the place: read again. Without a place: everything is.
            if position.is_none_or(|p| segment.0 > p.segment) {
                fs::remove_file(segment.1)?;
            }
        }
        let position = position.unwrap_or_default();
        let file = open_segment(run_dir, position.segment)?;
        let mut position = position;
        // Shorter only after a power cut; the container did not survive it either.
        position.offset = position.offset.min(file.metadata()?.len());
        file.set_len(position.offset)?;
        let segment_bytes = (retention::attempt_budget(size).0 / SEGMENTS).max(4096);
        Ok(Store {
            run_dir: run_dir.to_owned(),
            segment_bytes,
            file,
            position_file,
            position,
            catch_up: Default::default(),
            cut: [false; 2],
            next: position,
            pending: Vec::new(),
        })
    }

    /// Before the engine is asked again: from which second of its time, and lines known from before will be passed over.
    pub fn resume(&mut self) -> i32 {
        self.next = self.position;
        self.pending.clear();
        self.catch_up = self.position.streams.map(|at| CatchUp { active: at.ns > 0, met: 0 });
        self.cut = [false; 2];
        let newest = self.position.streams.iter().map(|at| at.ns).max().unwrap_or(0);
        i32::try_from((newest / 1_000_000_000).saturating_sub(SKEW_SECS)).unwrap_or(0)
    }

    /// Takes a piece as the engine sends it: its time, a blank, a line with its end or a piece of one.
    pub fn take(&mut self, piece: &LogOutput) {
        let (stream, message) = match piece {
            LogOutput::StdErr { message } => (1, message),
            LogOutput::StdOut { message } | LogOutput::Console { message } | LogOutput::StdIn { message } => (0, message),
        };
        let head = message.iter().position(|b| *b == b' ');
        let time = head.and_then(|end| std::str::from_utf8(&message[..end]).ok()?.parse::<jiff::Timestamp>().ok());
        let time = time.and_then(|t| u64::try_from(t.as_nanosecond()).ok());
        // Without a time it is told all the same, as of the line before.
        let (ns, text) = match (time, head) {
            (Some(ns), Some(end)) => (ns, &message[end + 1..]),
            _ => (self.next.streams[stream].ns, &message[..]),
        };
        if self.is_known(stream, ns) {
            return;
        }
        let at = &mut self.next.streams[stream];
        *at = if at.ns == ns { At { ns, count: at.count + 1 } } else { At { ns, count: 1 } };
        let (text, whole) = match text.strip_suffix(b"\n") {
            Some(line) => (line, true),
            None => (text, false),
        };
        // The end of a line whose last piece was exactly full is not a line more.
        let only_the_end = self.cut[stream] && text.is_empty() && whole;
        self.cut[stream] = !whole;
        if only_the_end {
            return;
        }
        let letter = if stream == 1 { 'E' } else { 'O' };
        let mut pieces = text.chunks(PIECE_MAX);
        let first = pieces.next().unwrap_or_default(); // an empty line is one too
        for piece in std::iter::once(first).chain(pieces) {
            self.pending.extend_from_slice(format!("{} {letter} ", ns / 1_000_000).as_bytes());
            // One line of ours for each: what looks like an end inside would be read as another.
            self.pending.extend(piece.iter().map(|b| if *b == b'\n' { b' ' } else { *b }));
            self.pending.push(b'\n');
        }
    }

    fn is_known(&mut self, stream: usize, ns: u64) -> bool {
        let (catch_up, last) = (&mut self.catch_up[stream], self.position.streams[stream]);
        if !catch_up.active {
            return false;
        }
        if ns == last.ns {
            catch_up.met += 1;
        }
        if ns < last.ns || (ns == last.ns && catch_up.met <= last.count) {
            return true;
        }
        catch_up.active = false;
        false
    }

    /// Writes what was taken. After an error nothing of it is there, and it is tried again by the next call. Blocking.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            if self.next != self.position {
                self.note(Position { segment: self.position.segment, offset: self.position.offset, ..self.next })?;
            }
            return Ok(());
        }
        let Position { mut segment, mut offset, .. } = self.position;
        if offset > 0 && offset + self.pending.len() as u64 > self.segment_bytes {
            // Made before the position names it; if we die in between it is removed as beyond the place.
            segment += 1;
            offset = 0;
            self.file = open_segment(&self.run_dir, segment)?;
            self.file.set_len(0)?;
        }
        if let Err(error) = self.file.write_all_at(&self.pending, offset) {
            let _ = self.file.set_len(offset); // a part of it may be there
            if segment != self.position.segment {
                self.file = open_segment(&self.run_dir, self.position.segment)?;
            }
            return Err(error);
        }
        let place = Position { segment, offset: offset + self.pending.len() as u64, ..self.next };
        self.note(place)?;
        self.pending.clear();
        if offset == 0
            && let Some(oldest) = segment.checked_sub(SEGMENTS)
        {
            let _ = fs::remove_file(segment_path(&self.run_dir, oldest)); // retention deletes it later otherwise
        }
        Ok(())
    }

    fn note(&mut self, place: Position) -> io::Result<()> {
        let mut text = serde_json::to_vec(&place).map_err(io::Error::other)?;
        text.resize(POSITION_BYTES, b' ');
        self.position_file.write_all_at(&text, 0)?;
        self.position = place;
        self.next = place;
        Ok(())
    }

    /// Lines that wait to be written.
    pub fn pending_lines(&self) -> u64 {
        self.pending.iter().filter(|b| **b == b'\n').count() as u64
    }
}

fn read_position(file: &File) -> Option<Position> {
    let mut bytes = [0; POSITION_BYTES];
    file.read_exact_at(&mut bytes, 0).ok()?;
    serde_json::from_slice(bytes.trim_ascii()).ok()
}

fn segment_path(run_dir: &Path, number: u64) -> PathBuf {
    run_dir.join(format!("log.{number}"))
}

fn open_segment(run_dir: &Path, number: u64) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o640).open(segment_path(run_dir, number))
}

#[cfg(test)]
#[path = "output_tests.rs"]
mod tests;
