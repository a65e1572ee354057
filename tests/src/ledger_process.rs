//! The program `optimus-test-ledger` as a process that tests freeze and kill, with what it acknowledged.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use optimus_host::failpoint;

use crate::harness::PATIENCE;
use crate::ledger::{Done, Ledger};

/// A writer at work. It is killed with this value.
pub struct Writer {
    child: Child,
    acknowledged: Arc<Mutex<Vec<Done>>>,
    reader: Option<JoinHandle<()>>,
}

impl Writer {
    /// Starts writing into `dir`; large writes when a failpoint waits for a compaction. `syncs`: how many syncs are real, all when none; `failpoints` as in [`failpoint`].
    pub fn start(program: &Path, dir: &Path, seed: u64, syncs: Option<u64>, failpoints: &str) -> Self {
        let mut command = Command::new(program);
        command.arg(if failpoints.contains("compact.") { "large" } else { "write" }).arg(dir).arg(seed.to_string());
        command.args(syncs.map(|n| n.to_string())).env(failpoint::VARIABLE, failpoints).env("RUST_BACKTRACE", "0");
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("the writer starts");
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        let acknowledged: Arc<Mutex<Vec<Done>>> = Arc::default();
        let list = acknowledged.clone();
        let reader = std::thread::spawn(move || {
            for line in output.lines() {
                let line = line.expect("lines of text");
                let mut numbers = line.split(' ').map(|n| n.parse().expect("numbers"));
                let mut next = || numbers.next().expect("index, client and sequence");
                let done = Done { index: next(), client: next(), sequence: next() };
                list.lock().unwrap_or_else(PoisonError::into_inner).push(done);
            }
        });
        Self { child, acknowledged, reader: Some(reader) }
    }

    /// Writes acknowledged so far, as far as they have been read.
    pub fn acknowledged(&self) -> usize {
        self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn poll(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !condition(self) {
            if let Some(status) = self.child.try_wait().expect("a child") {
                panic!("the writer ended ({status}) while waiting for {what}");
            }
            assert!(Instant::now() < end, "gave up waiting for {what}");
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    /// Waits for that many acknowledgements.
    pub fn wait_acknowledged(&mut self, n: usize) {
        self.poll("acknowledgements", |writer| writer.acknowledged() >= n);
    }

    /// Freezes the process.
    pub fn stop(&mut self) {
        // SAFETY: plain kill(2) on a child we have not reaped.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGSTOP) };
        self.wait_stopped();
    }

    /// Waits until it has frozen, by itself or by [`stop`](Self::stop): every thread of it.
    pub fn wait_stopped(&mut self) {
        self.poll("the writer to stop", |writer| {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", writer.child.id())).map(|tasks| tasks.flatten().collect::<Vec<_>>());
            tasks.is_ok_and(|tasks| !tasks.is_empty() && tasks.iter().all(|task| state(&task.path()) == Some('T')))
        });
    }

    /// Waits for its end.
    pub fn wait_ended(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(Instant::now() < end, "gave up waiting for the writer to end");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Kills it, and gives everything it ever acknowledged.
    pub fn kill(mut self) -> Vec<Done> {
        self.end();
        std::mem::take(&mut *self.acknowledged.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.end();
    }
}

/// The state letter in a `stat` file of procfs; it stands behind the name, which is in brackets.
fn state(dir: &Path) -> Option<char> {
    let text = std::fs::read_to_string(dir.join("stat")).ok()?;
    text.rsplit_once(')')?.1.trim_start().chars().next()
}

/// Opens what is in `dir`, lets it take writes, and gives what was found.
///
/// # Errors
/// What the program said: the store does not open, or does not work.
pub fn read(program: &Path, dir: &Path) -> Result<Ledger, String> {
    let output =
        Command::new(program).arg("read").arg(dir).env("RUST_BACKTRACE", "0").stdin(Stdio::null()).output().expect("the reader starts");
    if !output.status.success() {
        return Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    serde_json::from_slice(&output.stdout).map_err(|e| format!("not a ledger: {e}"))
}
