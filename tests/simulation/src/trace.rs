//! What happened in a run: a hash of every event, and the last ones as text.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Lines kept to be shown beside a violation.
const TAIL: usize = 60;

/// The record of one run.
#[derive(Debug)]
pub struct Trace {
    inner: Mutex<Inner>,
    print: bool,
}

#[derive(Debug)]
struct Inner {
    hash: u64,
    events: u64,
    tail: VecDeque<String>,
}

impl Trace {
    /// An empty record; `print`: every line goes to standard output as well.
    pub fn new(print: bool) -> Self {
        Self { inner: Mutex::new(Inner { hash: 0xcbf2_9ce4_8422_2325, events: 0, tail: VecDeque::new() }), print }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a line.
    pub fn line(&self, line: String) {
        if self.print {
            println!("{line}");
        }
        let mut inner = self.lock();
        for byte in line.bytes() {
            inner.hash = (inner.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        inner.events += 1;
        if inner.tail.len() == TAIL {
            inner.tail.pop_front();
        }
        inner.tail.push_back(line);
    }

    /// Hash and number of all lines so far.
    pub fn summary(&self) -> (u64, u64) {
        let inner = self.lock();
        (inner.hash, inner.events)
    }

    /// The last lines.
    pub fn tail(&self) -> Vec<String> {
        self.lock().tail.iter().cloned().collect()
    }
}
