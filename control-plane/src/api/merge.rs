//! Several streams of log lines, each in order, made into one in order.
//!
//! Exact while every stream either has a line waiting or has ended. A stream that is silent but open
//! holds the others back for [`Merge::patience`] only; its late lines then come late.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use optimus_common::Timestamp;
use optimus_common::protocol::{LogChunk, LogLine};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// One stream of lines.
pub(crate) struct Source<K> {
    pub key: K,
    receiver: Option<mpsc::Receiver<LogChunk>>,
    waiting: VecDeque<LogLine>,
    /// Newest line handed on, and how many of that very time: where to go on after a broken stream.
    pub position: Option<(Timestamp, u32)>,
    /// Lines to leave out at the start, seen before the stream broke.
    skip: Option<(Timestamp, u32)>,
}

/// What comes next.
pub(crate) enum Next<K> {
    Lines(Vec<(K, LogLine)>),
    /// A stream has ended; it is out of the merge.
    Ended(Source<K>),
    /// No stream is left.
    Empty,
}

/// Lines handed on at once.
const BATCH: usize = 256;

pub(crate) struct Merge<K> {
    sources: Vec<Source<K>>,
    /// How long a silent stream may hold the others back.
    patience: Duration,
    /// Since when lines wait for a silent stream.
    held_since: Option<Instant>,
}

impl<K: Copy> Merge<K> {
    pub fn new(patience: Duration) -> Self {
        Merge { sources: Vec::new(), patience, held_since: None }
    }

    pub fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }

    pub fn len(&self) -> usize {
        self.sources.len()
    }

    /// Adds a stream; `position`, of a stream of the same kind before, leaves out what was seen then.
    pub fn add(&mut self, key: K, receiver: mpsc::Receiver<LogChunk>, position: Option<(Timestamp, u32)>) {
        self.sources.push(Source { key, receiver: Some(receiver), waiting: VecDeque::new(), position, skip: position });
    }

    /// The next lines in order. Cancel-safe: lines stay in the merge until they are handed on.
    pub async fn next(&mut self) -> Next<K> {
        loop {
            self.fill_ready();
            if let Some(ended) = self.sources.iter().position(|source| source.receiver.is_none() && source.waiting.is_empty()) {
                return Next::Ended(self.sources.swap_remove(ended));
            }
            if self.sources.is_empty() {
                return Next::Empty;
            }
            let silent = self.sources.iter().any(|source| source.waiting.is_empty());
            let holding = self.sources.iter().any(|source| !source.waiting.is_empty());
            if !silent {
                self.held_since = None;
                return Next::Lines(self.take(false));
            }
            if !holding {
                self.held_since = None;
                self.receive().await;
                continue;
            }
            let until = *self.held_since.get_or_insert_with(Instant::now) + self.patience;
            if tokio::time::timeout_at(until, self.receive()).await.is_err() {
                self.held_since = None;
                return Next::Lines(self.take(true));
            }
        }
    }

    /// Lines in order, as long as the order is sure; with `late`, as many as there are.
    fn take(&mut self, late: bool) -> Vec<(K, LogLine)> {
        let mut lines = Vec::new();
        while lines.len() < BATCH {
            let heads = self.sources.iter_mut().filter(|source| !source.waiting.is_empty());
            // The first of equals: streams stay in a stable order within a moment.
            let Some(source) = heads.min_by_key(|source| source.waiting.front().map(|line| line.at)) else { break };
            let Some(line) = source.waiting.pop_front() else { break };
            source.position = Some(match source.position {
                Some((at, count)) if at == line.at => (at, count.saturating_add(1)),
                _ => (line.at, 1),
            });
            lines.push((source.key, line));
            if source.waiting.is_empty() && !late && source.receiver.is_some() {
                break; // its next line may come before those of the others
            }
        }
        lines
    }

    fn fill_ready(&mut self) {
        for source in &mut self.sources {
            while source.waiting.is_empty() {
                let Some(receiver) = &mut source.receiver else { break };
                match receiver.try_recv() {
                    Ok(chunk) => source.put(chunk),
                    Err(mpsc::error::TryRecvError::Empty) => break,
                    Err(mpsc::error::TryRecvError::Disconnected) => source.receiver = None,
                }
            }
        }
    }

    /// Waits until a silent stream has said something or ended.
    async fn receive(&mut self) {
        poll_fn(|cx| {
            let mut progress = false;
            for source in self.sources.iter_mut().filter(|source| source.waiting.is_empty()) {
                let Some(receiver) = &mut source.receiver else { continue };
                match receiver.poll_recv(cx) {
                    Poll::Ready(Some(chunk)) => source.put(chunk),
                    Poll::Ready(None) => source.receiver = None,
                    Poll::Pending => continue,
                }
                progress = true;
            }
            if progress { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

impl<K> Source<K> {
    fn put(&mut self, chunk: LogChunk) {
        for line in chunk.lines {
            if let Some((at, count)) = &mut self.skip {
                if line.at < *at {
                    continue;
                }
                if line.at == *at && *count > 0 {
                    *count -= 1;
                    continue;
                }
                self.skip = None;
            }
            self.waiting.push_back(line);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn line(at: u64, text: &str) -> LogLine {
        LogLine { at: Timestamp(at), stderr: false, text: text.into() }
    }

    async fn send(to: &mpsc::Sender<LogChunk>, times: &[u64]) {
        to.send(LogChunk { lines: times.iter().map(|at| line(*at, &at.to_string())).collect() }).await.unwrap();
    }

    async fn all(merge: &mut Merge<u8>) -> Vec<(u8, u64)> {
        let mut seen = Vec::new();
        loop {
            match merge.next().await {
                Next::Lines(lines) => seen.extend(lines.iter().map(|(key, line)| (*key, line.at.0))),
                Next::Ended(_) => {}
                Next::Empty => return seen,
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn ended_streams_merge_in_exact_order() {
        let mut merge = Merge::new(Duration::from_secs(5));
        let (a, ra) = mpsc::channel(8);
        let (b, rb) = mpsc::channel(8);
        merge.add(0, ra, None);
        merge.add(1, rb, None);
        send(&a, &[1, 4]).await;
        send(&a, &[9]).await;
        send(&b, &[2, 3, 5, 10]).await;
        drop((a, b));
        assert_eq!(all(&mut merge).await, [(0, 1), (1, 2), (1, 3), (0, 4), (1, 5), (0, 9), (1, 10)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_stream_holds_the_others_back_for_a_while_only() {
        let mut merge = Merge::new(Duration::from_millis(250));
        let (a, ra) = mpsc::channel(8);
        let (_silent, rb) = mpsc::channel(8);
        merge.add(0, ra, None);
        merge.add(1, rb, None);
        send(&a, &[1, 2]).await;
        let began = Instant::now();
        assert!(matches!(merge.next().await, Next::Lines(lines) if lines.len() == 2));
        assert!(began.elapsed() >= Duration::from_millis(250) && began.elapsed() < Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_broke_goes_on_without_gap_or_repeat() {
        let mut merge = Merge::new(Duration::from_millis(250));
        let (a, ra) = mpsc::channel(8);
        merge.add(0, ra, None);
        send(&a, &[1, 5, 5]).await;
        drop(a);
        let mut seen = 0;
        let position = loop {
            match merge.next().await {
                Next::Lines(lines) => seen += lines.len(),
                Next::Ended(source) => break source.position,
                Next::Empty => unreachable!(),
            }
        };
        assert_eq!((seen, position), (3, Some((Timestamp(5), 2))));
        let (a, ra) = mpsc::channel(8);
        merge.add(0, ra, position);
        send(&a, &[5, 5, 5, 6]).await;
        drop(a);
        assert_eq!(all(&mut merge).await, [(0, 5), (0, 6)]);
    }
}
