//! `optimus-runner DIR`: parent of one workload process. It starts it, keeps its output, and tells how it ended,
//! whether or not an agent is alive. See the library for the files and words.
//!
//! One thread, one `poll` loop, no runtime: hundreds of runners share a host with what they run.
//!
//! ```text
//!   start file ─► fork ─► child: cgroups, limits, user, directory, exec
//!                  └────► poll: output, requests, SIGCHLD, stop timer
//!                           └─ main process ended ─► kill its group ─► drain output ─► exit record ─► leave
//! ```

mod child;
mod group;
mod output;
mod serve;
mod sys;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use optimus_runner::{
    EXIT_FILE, End, ExitRecord, LOCK_FILE, RUN_FILE, RunRecord, START_FILE, StartFile, Step, boot_id, record, record::Reserved, start_time,
};

use group::Group;
use output::Output;
use serve::Server;

/// Longest time output is still read after the whole group has been killed.
const DRAIN_MAX: Duration = Duration::from_secs(1);

fn main() {
    let mut args = std::env::args_os().skip(1);
    let (Some(dir), None) = (args.next(), args.next()) else {
        eprintln!("usage: optimus-runner DIR\nStarted by the Optimus agent; see its library for the run directory.");
        std::process::exit(2);
    };
    match run(&PathBuf::from(dir)) {
        Ok(()) => {}
        Err(error) => {
            eprintln!("optimus-runner: {error}");
            std::process::exit(1);
        }
    }
}

fn run(dir: &Path) -> io::Result<()> {
    // Everything is named relative to the run directory: socket paths are short that way.
    std::env::set_current_dir(dir)?;
    let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(LOCK_FILE)?;
    lock.try_lock().map_err(|_| io::Error::new(io::ErrorKind::AlreadyExists, format!("another runner holds {}", dir.display())))?;
    if Path::new(EXIT_FILE).exists() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("the run in {} has ended already", dir.display())));
    }
    let bytes = record::read(Path::new(START_FILE))?.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no start file"))?;
    let start = StartFile::decode(&bytes)?;
    drop(bytes);

    sys::detach(lock.as_raw_fd())?;
    let signals = sys::ChildSignals::block()?;
    let server = Server::listen()?;
    let exit = ExitFile { room: Reserved::take(EXIT_FILE)?, attempt: start.attempt };
    let group = Group::of(&start);
    let ooms_before = group.oom_kills();
    let starter = sys::leave_stdio()?;

    let (child, output) = match child::start(&start) {
        Ok(started) => started,
        Err(failure) => {
            exit.write(failure_end(failure), 0)?;
            tell(starter, "failed\n");
            return Ok(());
        }
    };
    let started = Instant::now();
    if let Err(error) = write_run(start.attempt, child) {
        // Nobody could find it again: it must not stay.
        group.kill_all();
        sys::reap_others();
        exit.write(failure_end(child::Failure::prepare(error)), 0)?;
        tell(starter, "failed\n");
        return Ok(());
    }
    tell(starter, "started\n");

    let mut supervisor = Supervisor { start, child, group, signals, server, output, kill_at: None };
    let status = supervisor.watch();
    let ran_for = started.elapsed();
    supervisor.group.kill_all();
    supervisor.drain();
    let Supervisor { start, group, mut server, output, .. } = supervisor;
    let end = End::Exited {
        code: sys::exit_code(status),
        signal: sys::exit_signal(status),
        oom_kills: group.oom_kills().saturating_sub(ooms_before),
        peak: group.peak(),
        limit: start.memory_limit,
        ran_for_ms: ran_for.as_millis() as u64,
    };
    exit.write(end, output.dropped())?;
    server.say_exit();
    Ok(())
}

fn write_run(attempt: u32, child: u32) -> io::Result<()> {
    let own = std::process::id();
    let run = RunRecord {
        attempt,
        pid: child,
        start_time: start_time(child).map_or(0, |(ticks, _)| ticks),
        runner_pid: own,
        runner_start_time: start_time(own).map_or(0, |(ticks, _)| ticks),
        boot_id: boot_id(),
        started_at_ms: sys::unix_ms(),
    };
    // Not synced: after a power cut there is nothing to find again.
    fs::write(".run.new", run.encode())?;
    fs::rename(".run.new", RUN_FILE)
}

/// How the run ended, with room taken at its begin: a full disk must not lose it.
struct ExitFile {
    room: Reserved,
    attempt: u32,
}

impl ExitFile {
    fn write(self, end: End, dropped_lines: u64) -> io::Result<()> {
        let bytes = ExitRecord { attempt: self.attempt, ended_at_ms: sys::unix_ms(), end, dropped_lines }.encode();
        if bytes.len() <= Reserved::BYTES && self.room.write(&bytes).is_ok() {
            return Ok(());
        }
        drop(self.room);
        let here = Path::new(".");
        let mut tries = 0;
        loop {
            match record::write_atomic(here, EXIT_FILE, &bytes) {
                Ok(()) => return Ok(()),
                Err(error) if tries >= 5 => return Err(error),
                Err(_) => {
                    // The oldest output makes room for what matters more.
                    output::drop_oldest_segment(here);
                    tries += 1;
                    sys::pause(Duration::from_millis(50));
                }
            }
        }
    }
}

fn failure_end(failure: child::Failure) -> End {
    let child::Failure { step, errno, detail } = failure;
    End::NotStarted { step, errno, detail }
}

/// Tells the agent that waits on the other end of our former stdout.
fn tell(starter: OwnedFd, word: &str) {
    // Nobody waits when the agent died meanwhile; that changes nothing.
    let _ = File::from(starter).write_all(word.as_bytes());
}

struct Supervisor {
    start: StartFile,
    child: u32,
    group: Group,
    signals: sys::ChildSignals,
    server: Server,
    output: Output,
    /// When the grace of a stop is over.
    kill_at: Option<Instant>,
}

impl Supervisor {
    /// Runs until the main process has ended; gives its wait status.
    fn watch(&mut self) -> i32 {
        loop {
            let mut wait = self.kill_at.map(|at| at.saturating_duration_since(Instant::now()));
            if let Some(retry) = self.output.retry_in() {
                wait = Some(wait.map_or(retry, |w| w.min(retry)));
            }
            let mut set = sys::PollSet::new();
            set.add(Some(self.signals.fd()));
            self.output.register(&mut set);
            self.server.register(&mut set);
            set.wait(wait);

            if set.ready(0) {
                self.signals.clear();
            }
            self.output.pump(&set);
            if let Some(status) = sys::reap(self.child) {
                return status;
            }
            let status = optimus_runner::Status { pid: self.child, attempt: self.start.attempt, dropped_lines: self.output.dropped() };
            for request in self.server.requests(&set, &status) {
                self.obey(request);
            }
            if self.kill_at.is_some_and(|at| at <= Instant::now()) {
                self.kill_at = None;
                self.group.kill_all();
            }
        }
    }

    fn obey(&mut self, request: optimus_runner::Request) {
        use optimus_runner::Request::*;
        match request {
            Status => {}
            Signal { signal } => sys::kill(self.child as i32, signal),
            Kill => self.group.kill_all(),
            Stop { signal, grace_ms } => {
                // The session's group: what the program started and did not detach is asked too.
                sys::kill(-(self.child as i32), signal);
                let at = Instant::now() + Duration::from_millis(grace_ms);
                self.kill_at = Some(self.kill_at.map_or(at, |before| before.min(at)));
            }
        }
    }

    /// Reads what is left in the pipes. A process that escaped the group could hold them open for ever.
    fn drain(&mut self) {
        let end = Instant::now() + DRAIN_MAX;
        while self.output.is_open() && Instant::now() < end {
            let mut set = sys::PollSet::new();
            self.output.register(&mut set);
            set.wait(Some(end.saturating_duration_since(Instant::now())));
            self.output.pump(&set);
            sys::reap_others();
        }
        self.output.finish();
    }
}

/// The step a number from the child's pipe stands for.
pub(crate) fn step_of(number: u8) -> Step {
    Step::from_number(number).unwrap_or(Step::Prepare)
}
