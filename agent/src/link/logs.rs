//! Answers the server's requests for output.
//!
//! The first frame is always either a refusal or a chunk (an empty one if there is no line for a
//! while), so the asker never waits for output to learn that it will come.

use std::sync::Arc;
use std::time::Duration;

use optimus_common::protocol::{LogChunk, LogLine};
use optimus_common::reason::code;
use optimus_host::telemetry::Chain;
use optimus_host::transport::{FrameError, FrameWriter};
use tokio::sync::mpsc;

use super::calls::refuse;
use crate::workloads::{LogError, Workloads};

/// Most text in one chunk, and in one line of it.
pub const CHUNK_TEXT_MAX: usize = 64 << 10;
/// Lines in one chunk: empty lines cost too.
const CHUNK_LINES_MAX: usize = 4096;
/// Chunks waiting for the stream; then the reader of the log waits.
const CHUNKS_WAITING: usize = 2;
/// Without a line for so long the answer begins with an empty chunk.
const FIRST_WORD: Duration = Duration::from_millis(250);

pub(super) async fn answer(
    workloads: &Arc<dyn Workloads>,
    request: optimus_common::protocol::LogRequest,
    writer: &mut FrameWriter,
) -> Result<(), FrameError> {
    let (give, mut take) = mpsc::channel(CHUNKS_WAITING);
    let mut reading = workloads.logs(request, give);
    let mut outcome: Option<Result<(), LogError>> = None;
    let mut begun = false;
    let first_word = tokio::time::sleep(FIRST_WORD);
    tokio::pin!(first_word);
    loop {
        tokio::select! {
            biased;
            () = writer.stopped() => return Ok(()),
            result = &mut reading, if outcome.is_none() => outcome = Some(result),
            chunk = take.recv() => match chunk {
                Some(chunk) => {
                    for part in split(chunk) {
                        writer.send(part).await?;
                        begun = true;
                    }
                }
                None => break,
            },
            () = &mut first_word, if !begun => {
                writer.send(LogChunk { lines: vec![] }).await?;
                begun = true;
            }
        }
    }
    // The sender is gone, so the reading has ended or is about to.
    let outcome = match outcome {
        Some(outcome) => outcome,
        None => reading.await,
    };
    match outcome {
        Ok(()) if begun => writer.finish(),
        Ok(()) => {
            writer.send(LogChunk { lines: vec![] }).await?;
            writer.finish()
        }
        Err(error @ LogError::NoSuchAlloc(_)) => refuse(writer, code::NOT_FOUND.code, error.to_string()).await,
        Err(error) => {
            let text = Chain(&error).to_string();
            tracing::warn!(error = text, "failed to read a log");
            refuse(writer, code::INTERNAL.code, text).await
        }
    }
}

/// Chunks of at most [`CHUNK_TEXT_MAX`] of text; a longer line becomes several.
fn split(chunk: LogChunk) -> Vec<LogChunk> {
    let mut parts = Vec::new();
    let (mut lines, mut size) = (Vec::new(), 0);
    for line in chunk.lines {
        for line in cut(line) {
            if !lines.is_empty() && (size + line.text.len() > CHUNK_TEXT_MAX || lines.len() >= CHUNK_LINES_MAX) {
                parts.push(LogChunk { lines: std::mem::take(&mut lines) });
                size = 0;
            }
            size += line.text.len();
            lines.push(line);
        }
    }
    if !lines.is_empty() {
        parts.push(LogChunk { lines });
    }
    parts
}

fn cut(line: LogLine) -> Vec<LogLine> {
    if line.text.len() <= CHUNK_TEXT_MAX {
        return vec![line];
    }
    let mut pieces = Vec::new();
    let mut rest = line.text.as_str();
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rest.floor_char_boundary(CHUNK_TEXT_MAX));
        pieces.push(LogLine { at: line.at, stderr: line.stderr, text: piece.to_owned() });
        rest = after;
    }
    pieces
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use optimus_common::Timestamp;

    #[test]
    fn chunks_are_bounded_and_keep_every_byte() {
        let line = |text: String| LogLine { at: Timestamp(1), stderr: false, text };
        let texts = [String::new(), "é".repeat(CHUNK_TEXT_MAX), "b".repeat(40_000), "c".repeat(40_000), "d".into()];
        let whole: String = texts.concat();
        let parts = split(LogChunk { lines: texts.map(line).to_vec() });
        for part in &parts {
            assert!(part.lines.iter().map(|l| l.text.len()).sum::<usize>() <= CHUNK_TEXT_MAX);
        }
        let joined: String = parts.iter().flat_map(|p| &p.lines).map(|l| l.text.as_str()).collect();
        assert_eq!(joined, whole);
        assert!(split(LogChunk { lines: vec![line(String::new()); 10_000] }).iter().all(|p| p.lines.len() <= CHUNK_LINES_MAX));
        assert!(split(LogChunk { lines: vec![] }).is_empty());
    }
}
