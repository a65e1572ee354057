//! Many seeds: one process each, a few at a time.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::run::Outcome;

/// Longest a seed may take in real time; a run that does not end is a violation too.
const SEED_LIMIT: Duration = Duration::from_secs(120);
/// Pause between two looks at the running processes.
const LOOK: Duration = Duration::from_millis(3);

/// What to run and how.
#[derive(Clone, Debug)]
pub struct Runner {
    /// The `simulate` binary.
    pub binary: PathBuf,
    pub jobs: usize,
    /// No seed is begun after so long.
    pub time_limit: Option<Duration>,
    pub planted: Option<String>,
    /// Stop at the first seed with a violation.
    pub until_found: bool,
}

/// What many runs came to.
#[derive(Debug, Default)]
pub struct Sum {
    pub seeds: u64,
    pub events: u64,
    pub operations: u64,
    pub virtual_ms: u64,
    pub faults: BTreeMap<String, u64>,
    pub bad: Vec<Outcome>,
    pub took: Duration,
}

impl Sum {
    fn add(&mut self, outcome: Outcome) {
        self.seeds += 1;
        self.events += outcome.events;
        self.operations += outcome.operations as u64;
        self.virtual_ms += outcome.virtual_ms;
        for (kind, n) in &outcome.faults {
            *self.faults.entry(kind.clone()).or_default() += n;
        }
        if !outcome.violations.is_empty() {
            self.bad.push(outcome);
        }
    }
}

struct Running {
    seed: u64,
    child: Child,
    output: std::thread::JoinHandle<io::Result<String>>,
    since: Instant,
}

impl Runner {
    /// A runner of this very binary.
    pub fn new(binary: impl AsRef<Path>, jobs: usize) -> Self {
        Self { binary: binary.as_ref().to_owned(), jobs: jobs.max(1), time_limit: None, planted: None, until_found: false }
    }

    /// Runs one seed in a process of its own.
    ///
    /// # Errors
    /// When no process can be started.
    pub fn one(&self, seed: u64) -> io::Result<Outcome> {
        let running = self.spawn(seed)?;
        Ok(wait(running))
    }

    fn spawn(&self, seed: u64) -> io::Result<Running> {
        let mut command = Command::new(&self.binary);
        command.args(["seed", &seed.to_string(), "--json"]).stdin(Stdio::null()).stdout(Stdio::piped());
        if let Some(planted) = &self.planted {
            command.args(["--planted", planted]);
        }
        let mut child = command.spawn()?;
        let mut stdout = child.stdout.take().ok_or_else(|| io::Error::other("no output of the seed's process"))?;
        let output = std::thread::spawn(move || io::read_to_string(&mut stdout));
        Ok(Running { seed, child, output, since: Instant::now() })
    }

    /// Runs the seeds of `range`; `each` sees every outcome as it comes.
    ///
    /// # Errors
    /// When no process can be started.
    pub fn many(&self, range: std::ops::Range<u64>, mut each: impl FnMut(&Outcome)) -> io::Result<Sum> {
        let began = Instant::now();
        let mut sum = Sum::default();
        let mut next = range.start;
        let mut running: Vec<Running> = Vec::new();
        loop {
            let late = self.time_limit.is_some_and(|limit| began.elapsed() >= limit);
            let found = self.until_found && !sum.bad.is_empty();
            while running.len() < self.jobs && next < range.end && !late && !found {
                running.push(self.spawn(next)?);
                next += 1;
            }
            if running.is_empty() {
                break;
            }
            std::thread::sleep(LOOK);
            let mut at = 0;
            while at < running.len() {
                let over = running[at].since.elapsed() > SEED_LIMIT;
                if over || running[at].child.try_wait()?.is_some() {
                    let outcome = wait(running.swap_remove(at));
                    each(&outcome);
                    sum.add(outcome);
                } else {
                    at += 1;
                }
            }
        }
        sum.took = began.elapsed();
        sum.bad.sort_by_key(|o| o.seed);
        Ok(sum)
    }
}

/// Collects a process; one that does not end or tells nonsense is a violation of its own.
fn wait(mut running: Running) -> Outcome {
    let seed = running.seed;
    let failed = |what: String| Outcome { seed, violations: vec![what], ..Outcome::default() };
    while matches!(running.child.try_wait(), Ok(None)) {
        if running.since.elapsed() > SEED_LIMIT {
            let _ = running.child.kill();
            let _ = running.child.wait();
            return failed(format!("the run did not end within {SEED_LIMIT:?}"));
        }
        std::thread::sleep(LOOK);
    }
    let status = running.child.wait();
    let text = match running.output.join() {
        Ok(Ok(text)) => text,
        _ => return failed("the run's output could not be read".to_owned()),
    };
    let line = text.lines().last().unwrap_or_default();
    serde_json::from_str(line).unwrap_or_else(|e| failed(format!("the run ended with {status:?} and no outcome: {e}")))
}
