//! Walks through the segments of an allocation in order: from the start, from a time, or from the last `n`
//! lines; then, if asked, follows what is written.
//!
//! Memory is bounded by one chunk whatever is asked: the start of the last `n` lines is found by counting
//! line ends backwards, then everything is streamed forward.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use optimus_common::env::Clock;
use optimus_common::protocol::{LAST_LINES_MAX, LogChunk, LogLine, TEXT_MAX};
use optimus_common::time::Timestamp;
use tokio::sync::mpsc;

use super::segments::{self, Segment};

/// Most text in one chunk.
pub const CHUNK_BYTES_MAX: usize = 64 << 10;
/// Most lines in one chunk.
pub const CHUNK_LINES_MAX: usize = 500;
/// Longest line handed on; the rest of a longer one is cut. Runners cut sooner.
pub const LINE_MAX: usize = 16 << 10;
/// Pause between two looks for new output while following.
const FOLLOW_PAUSE: Duration = Duration::from_millis(100);
const BLOCK: usize = 64 << 10;

/// Where a reader stands.
#[derive(Debug)]
struct Open {
    segment: Segment,
    file: BufReader<File>,
    /// The start of a line whose end was not written yet.
    partial: Vec<u8>,
}

/// Reads an allocation's output in order. Blocking: run it off the async threads.
#[derive(Debug)]
pub struct Reader {
    alloc_dir: PathBuf,
    since: Option<Timestamp>,
    open: Option<Open>,
    /// Segments up to this one are done.
    done: Option<Segment>,
}

impl Reader {
    /// At the first line, or at the last `tail` lines of what is there.
    pub fn new(alloc_dir: &Path, since: Option<Timestamp>, tail: Option<u32>) -> io::Result<Self> {
        let mut reader = Reader { alloc_dir: alloc_dir.to_owned(), since, open: None, done: None };
        let Some(tail) = tail else { return Ok(reader) };
        let mut wanted = u64::from(tail);
        for segment in segments::list(alloc_dir)?.into_iter().rev() {
            let Some(mut file) = open(&segment)? else { continue };
            let (offset, found) = seek_back(&file, wanted)?;
            wanted -= found;
            if wanted == 0 {
                file.seek(SeekFrom::Start(offset))?;
                reader.open = Some(Open { segment, file: BufReader::with_capacity(BLOCK, file), partial: Vec::new() });
                return Ok(reader);
            }
        }
        Ok(reader) // fewer lines than asked for: all of them
    }

    /// The next lines; empty when the end of what is written now is reached.
    pub fn next_chunk(&mut self) -> io::Result<Vec<LogLine>> {
        let mut lines = Vec::new();
        let mut bytes = 0;
        while lines.len() < CHUNK_LINES_MAX && bytes < CHUNK_BYTES_MAX - LINE_MAX {
            if self.open.is_none() && !self.open_next()? {
                break;
            }
            let Some(current) = &mut self.open else { break };
            match read_line(&mut current.file, &mut current.partial)? {
                Some(line) => {
                    if let Some(line) = parse(&line).filter(|l| self.since.is_none_or(|since| l.at >= since)) {
                        bytes += line.text.len();
                        lines.push(line);
                    }
                }
                // At its end: go on to the next one, if the runner has.
                None => {
                    let current_segment = current.segment.clone();
                    if self.following(Some(&current_segment))?.is_none() {
                        break;
                    }
                    let Some(current) = &mut self.open else { break };
                    // The runner finishes a segment before it makes the next: read what came in between.
                    if let Some(line) = read_line(&mut current.file, &mut current.partial)? {
                        lines.extend(parse(&line));
                        continue;
                    }
                    let rest = std::mem::take(&mut current.partial);
                    lines.extend(parse(&rest));
                    self.open = None;
                    self.done = Some(current_segment);
                }
            }
        }
        Ok(lines)
    }

    /// A last line that has no end, once no more is expected.
    pub fn rest(&mut self) -> Option<LogLine> {
        parse(&std::mem::take(&mut self.open.as_mut()?.partial))
    }

    fn open_next(&mut self) -> io::Result<bool> {
        loop {
            let Some(next) = self.following(self.done.clone().as_ref())? else { return Ok(false) };
            match open(&next)? {
                Some(file) => {
                    self.open = Some(Open { segment: next, file: BufReader::with_capacity(BLOCK, file), partial: Vec::new() });
                    return Ok(true);
                }
                None => self.done = Some(next), // rotated away in this moment
            }
        }
    }

    fn following(&self, segment: Option<&Segment>) -> io::Result<Option<Segment>> {
        let all = segments::list(&self.alloc_dir)?;
        Ok(all.into_iter().find(|s| segment.is_none_or(|done| s > done)))
    }
}

fn open(segment: &Segment) -> io::Result<Option<File>> {
    match File::open(&segment.path) {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Offset at which the last `wanted` lines begin, and how many lines follow it.
fn seek_back(file: &File, wanted: u64) -> io::Result<(u64, u64)> {
    let length = file.metadata()?.len();
    if wanted == 0 {
        return Ok((length, 0));
    }
    let mut block = vec![0; BLOCK];
    let (mut end, mut found) = (length, 0);
    while end > 0 {
        let start = end.saturating_sub(BLOCK as u64);
        let part = &mut block[..(end - start) as usize];
        file.read_exact_at(part, start)?;
        for at in (0..part.len()).rev() {
            let offset = start + at as u64 + 1;
            if part[at] == b'\n' && offset < length {
                found += 1;
                if found == wanted {
                    return Ok((offset, found));
                }
            }
        }
        end = start;
    }
    Ok((0, found + u64::from(length > 0)))
}

/// One whole line without its end, or nothing yet; what there is of it stays in `partial`, cut at [`LINE_MAX`].
fn read_line(file: &mut BufReader<File>, partial: &mut Vec<u8>) -> io::Result<Option<Vec<u8>>> {
    loop {
        let buffer = file.fill_buf()?;
        if buffer.is_empty() {
            return Ok(None);
        }
        let (part, used, whole) = match buffer.iter().position(|b| *b == b'\n') {
            Some(end) => (&buffer[..end], end + 1, true),
            None => (buffer, buffer.len(), false),
        };
        let room = LINE_MAX.saturating_sub(partial.len());
        partial.extend_from_slice(&part[..part.len().min(room)]);
        file.consume(used);
        if whole {
            return Ok(Some(std::mem::take(partial)));
        }
    }
}

/// A line as runners write it. One that is not (a torn write, a foreign file) is handed on as it is, at time
/// zero; an empty one is dropped.
fn parse(line: &[u8]) -> Option<LogLine> {
    if line.is_empty() {
        return None;
    }
    let text = String::from_utf8_lossy(line);
    let mut parts = text.splitn(3, ' ');
    let head = (parts.next().and_then(|ms| ms.parse().ok()), parts.next());
    Some(match head {
        (Some(ms), Some(stream @ ("O" | "E"))) => {
            LogLine { at: Timestamp(ms), stderr: stream == "E", text: parts.next().unwrap_or_default().to_owned() }
        }
        _ => LogLine { at: Timestamp(0), stderr: true, text: text.into_owned() },
    })
}

/// Streams into `out` to the end of what is there, or until `out` closes when following.
pub async fn stream(
    alloc_dir: PathBuf,
    since: Option<Timestamp>,
    tail: Option<u32>,
    follow: bool,
    clock: &dyn Clock,
    out: mpsc::Sender<LogChunk>,
) -> io::Result<()> {
    let mut reader = off_thread(move || Reader::new(&alloc_dir, since, tail)).await?;
    loop {
        let (lines, back) = off_thread(move || {
            let lines = reader.next_chunk()?;
            Ok((lines, reader))
        })
        .await?;
        reader = back;
        if !lines.is_empty() {
            if out.send(LogChunk { lines }).await.is_err() {
                return Ok(());
            }
        } else if follow {
            tokio::select! {
                () = clock.sleep(FOLLOW_PAUSE) => {}
                () = out.closed() => return Ok(()),
            }
        } else {
            if let Some(line) = reader.rest() {
                let _ = out.send(LogChunk { lines: vec![line] }).await; // the asker has gone
            }
            return Ok(());
        }
    }
}

async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// The last lines of one attempt, for a status: at most [`LAST_LINES_MAX`], each at most [`TEXT_MAX`] bytes.
pub fn last_lines(alloc_dir: &Path, attempt: u32) -> io::Result<Vec<String>> {
    let mut lines = Vec::new();
    for segment in segments::of_attempt(alloc_dir, attempt)?.into_iter().rev() {
        let Some(mut file) = open(&segment)? else { continue };
        let (offset, _) = seek_back(&file, (LAST_LINES_MAX - lines.len()) as u64)?;
        file.seek(SeekFrom::Start(offset))?;
        let mut text = Vec::new();
        file.take((LAST_LINES_MAX * LINE_MAX) as u64).read_to_end(&mut text)?;
        let here = text.split(|b| *b == b'\n').filter_map(parse).map(|line| cut(line.text));
        lines.splice(..0, here);
        if lines.len() >= LAST_LINES_MAX {
            break;
        }
    }
    lines.drain(..lines.len().saturating_sub(LAST_LINES_MAX));
    Ok(lines)
}

/// At most [`TEXT_MAX`] bytes of a text.
fn cut(mut text: String) -> String {
    if text.len() > TEXT_MAX {
        text.truncate(text.floor_char_boundary(TEXT_MAX));
    }
    text
}

#[cfg(test)]
#[path = "reader_tests.rs"]
mod tests;
