//! Starting runners, finding those of an earlier agent, and talking to them.
//!
//! A runner is known by its run directory. That one is alive is proven by the lock it holds there, and that a pid is
//! still its own by boot, start time and a pidfd: a number that is used again is never taken for it. All blocking, and
//! bounded in time.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use optimus_common::reason::Reason;
use optimus_common::time::{Span, Timestamp};
use optimus_runner::{End, ExitRecord, LOCK_FILE, Request, RunRecord, SOCKET, START_FILE, StartFile, Status, Step, boot_id, start_time};
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};

use crate::driver::StartError;

/// Longest time from starting a runner to its word that the program runs.
const WORD_MAX: Duration = Duration::from_secs(20);
/// Longest wait for the answer to a request.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// Longest wait for a runner that was found starting.
const SETTLE_MAX: Duration = Duration::from_secs(5);
const SETTLE_STEP: Duration = Duration::from_millis(5);
/// What a broken runner says of itself is read up to here.
const COMPLAINT_MAX: u64 = 400;

/// A runner that lives.
#[derive(Debug)]
pub struct Supervised {
    /// Readable once the runner has exited.
    pub pidfd: OwnedFd,
    /// The workload's main process.
    pub pid: u32,
    pub started_at: Timestamp,
    /// How long it has been up.
    pub up: Duration,
}

/// What is in a run directory.
#[derive(Debug)]
pub enum Found {
    Alive(Supervised),
    Ended(ExitRecord),
    /// There was a run; its runner is gone without an exit record.
    Lost(String),
    /// Nothing runs in it, and nothing will: a runner that was about to start has been prevented.
    Nothing,
}

/// Starts a runner and waits until the program has been executed or refused. On an error no runner is left.
pub fn launch(runner: &Path, run_dir: &Path, start: &StartFile) -> Result<Supervised, StartError> {
    start.write(run_dir).map_err(|e| StartError::step("write the start file", e))?;
    let mut command = Command::new(runner);
    command.arg(run_dir).env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| StartError::step(&format!("start {}", runner.display()), e))?;
    let word = read_word(&mut child);
    match word.as_deref() {
        Ok("started") => {
            // It has been read, and holds the workload's environment with what may be secret in it.
            if let Err(error) = fs::remove_file(run_dir.join(START_FILE)) {
                tracing::warn!(run_dir = %run_dir.display(), %error, "failed to delete the start file");
            }
            let failed = |e| StartError::step("find the started process", e);
            let run = RunRecord::read(run_dir).map_err(failed)?.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
            match supervised(&run) {
                Some(supervised) => Ok(supervised),
                // It ended at once and its runner with it: our child still, so its pid is its own.
                None => {
                    let pid = Pid::from_child(&child);
                    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|e| failed(e.into()))?;
                    Ok(Supervised { pidfd, pid: run.pid, started_at: Timestamp(run.started_at_ms), up: Duration::ZERO })
                }
            }
        }
        Ok("failed") => {
            let _ = child.wait();
            Err(match ExitRecord::read(run_dir) {
                Ok(Some(ExitRecord { end: End::NotStarted { step, errno, detail }, .. })) => {
                    StartError::here(refusal(start, step, errno, detail))
                }
                Ok(_) => StartError::step("start the process", "the runner failed and left no record"),
                Err(error) => StartError::step("read the runner's record", error),
            })
        }
        broken => {
            let _ = child.kill();
            let _ = child.wait();
            let complaint = match broken {
                Ok(other) => format!("the runner said {other:?}"),
                Err(error) => error.to_string(),
            };
            Err(StartError::step("run the runner", complaint))
        }
    }
}

/// The word on its stdout; its stderr as an error if it leaves without one.
fn read_word(child: &mut Child) -> io::Result<String> {
    let (Some(mut out), Some(err)) = (child.stdout.take(), child.stderr.take()) else { return Err(io::ErrorKind::BrokenPipe.into()) };
    let deadline = Instant::now() + WORD_MAX;
    let mut word = Vec::new();
    while !word.ends_with(b"\n") {
        if !readable(out.as_fd(), deadline)? {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("no word within {WORD_MAX:?}")));
        }
        let mut buffer = [0; 32];
        match out.read(&mut buffer)? {
            0 => {
                let mut complaint = String::new();
                if readable(err.as_fd(), deadline)? {
                    err.take(COMPLAINT_MAX).read_to_string(&mut complaint)?;
                }
                let complaint = complaint.trim().trim_start_matches("optimus-runner: ");
                return Err(io::Error::other(if complaint.is_empty() { "it left without a word" } else { complaint }.to_owned()));
            }
            n => word.extend_from_slice(&buffer[..n]),
        }
    }
    Ok(String::from_utf8_lossy(&word).trim_end().to_owned())
}

fn readable(fd: BorrowedFd<'_>, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = rustix::event::Timespec::try_from(left).map_err(io::Error::other)?;
        match rustix::event::poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&timeout)) {
            Ok(n) => return Ok(n > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The same sentence for the same mistake, whether we or the runner met it first.
fn refusal(start: &StartFile, step: Step, errno: i32, detail: String) -> Reason {
    let command = || start.argv.first().cloned().unwrap_or_default();
    match (step, errno) {
        (Step::Exec, libc::ENOENT | libc::ENOTDIR) => Reason::CommandNotFound { command: command() },
        (Step::Exec, libc::EACCES | libc::ENOEXEC) => Reason::NotExecutable { command: command() },
        (Step::Directory, _) => Reason::DirMissing { dir: start.cwd.clone() },
        (step, errno) => {
            let step = match step {
                Step::Prepare => "prepare the process",
                Step::Cgroup => "enter the cgroup",
                Step::Limits => "set resource limits",
                Step::User => "become the workload's user",
                Step::Mount => "mount its volumes",
                Step::Directory | Step::Exec => "execute the command",
            };
            let cause = if errno == 0 { String::new() } else { io::Error::from_raw_os_error(errno).to_string() };
            let error = [detail, cause].into_iter().filter(|t| !t.is_empty()).collect::<Vec<_>>().join(": ");
            Reason::StartFailed { step: step.to_owned(), error }
        }
    }
}

/// The runner of a record, if it is alive and really it.
fn supervised(run: &RunRecord) -> Option<Supervised> {
    if run.boot_id != boot_id() {
        return None;
    }
    let pid = Pid::from_raw(i32::try_from(run.runner_pid).ok()?)?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
    // Looked at after the pidfd was opened: if it is the one now, the pidfd is its.
    let (ticks, _) = start_time(run.runner_pid)?;
    if ticks != run.runner_start_time {
        return None;
    }
    Some(Supervised { pidfd, pid: run.pid, started_at: Timestamp(run.started_at_ms), up: up(run.runner_start_time) })
}

/// Time since a start in clock ticks since boot.
fn up(start_ticks: u64) -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let now = Duration::new(now.tv_sec.max(0) as u64, now.tv_nsec.max(0) as u32);
    let started = Duration::from_secs_f64(start_ticks as f64 / procfs::ticks_per_second() as f64);
    now.saturating_sub(started)
}

/// Looks into a run directory. What is found starting is waited for.
pub fn find(run_dir: &Path) -> Found {
    let deadline = Instant::now() + SETTLE_MAX;
    loop {
        match look(run_dir) {
            Ok(Some(found)) => return found,
            Ok(None) if Instant::now() < deadline => std::thread::sleep(SETTLE_STEP),
            Ok(None) => return Found::Lost(format!("its runner did not come up within {SETTLE_MAX:?}")),
            Err(error) => return Found::Lost(format!("its run directory cannot be read: {error}")),
        }
    }
}

/// Unset: a runner is there but has not said yet what it runs, or is just leaving.
fn look(run_dir: &Path) -> io::Result<Option<Found>> {
    if let Some(exit) = ExitRecord::read(run_dir)? {
        return Ok(Some(Found::Ended(exit)));
    }
    if !run_dir.join(START_FILE).exists() && !run_dir.join(LOCK_FILE).exists() {
        return Ok(Some(Found::Nothing));
    }
    let lock = OpenOptions::new().write(true).create(true).truncate(false).open(run_dir.join(LOCK_FILE))?;
    match lock.try_lock() {
        Err(TryLockError::WouldBlock) => Ok(RunRecord::read(run_dir)?.and_then(|run| supervised(&run)).map(Found::Alive)),
        Err(TryLockError::Error(error)) => Err(error),
        // No runner is alive. While we hold the lock none can begin; without its start file none will.
        Ok(()) => {
            match fs::remove_file(run_dir.join(START_FILE)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            if let Some(exit) = ExitRecord::read(run_dir)? {
                return Ok(Some(Found::Ended(exit))); // it left between our two looks
            }
            Ok(Some(match RunRecord::read(run_dir)? {
                Some(run) if run.boot_id != boot_id() => Found::Lost("the host was restarted".to_owned()),
                Some(_) => Found::Lost("its supervisor was killed".to_owned()),
                None => Found::Nothing,
            }))
        }
    }
}

/// Asks a runner for something. One that has ended meanwhile needs no asking.
pub fn ask(run_dir: &Path, request: Request) -> io::Result<()> {
    match answer(run_dir, request) {
        Ok(_) => Ok(()),
        Err(e) if has_left(&e) => Ok(()),
        Err(e) => Err(e),
    }
}

/// Lines of output a live runner has had to drop; unset if it does not say.
pub fn dropped_lines(run_dir: &Path) -> Option<u64> {
    answer(run_dir, Request::Status).ok().and_then(|line| Status::decode(&line)).map(|status| status.dropped_lines)
}

fn has_left(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof};
    matches!(error.kind(), NotFound | ConnectionRefused | ConnectionReset | BrokenPipe | UnexpectedEof)
}

fn answer(run_dir: &Path, request: Request) -> io::Result<String> {
    // Through the descriptor: the path of a socket may have 107 bytes only.
    let dir = File::open(run_dir)?;
    let mut stream = UnixStream::connect(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()))?;
    stream.set_read_timeout(Some(ANSWER_MAX))?;
    stream.set_write_timeout(Some(ANSWER_MAX))?;
    stream.write_all(request.encode().as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream.take(256)).read_line(&mut line)?;
    match line.trim_end() {
        "" => Err(io::ErrorKind::UnexpectedEof.into()),
        refused if refused.starts_with("error ") => Err(io::Error::other(refused.to_owned())),
        _ => Ok(line),
    }
}

/// Kills a runner that does not obey; the workload's main process dies with it.
pub fn kill_runner(pidfd: BorrowedFd<'_>) {
    if let Err(error) = rustix::process::pidfd_send_signal(pidfd, Signal::KILL) {
        tracing::debug!(%error, "the runner had gone");
    }
}

/// Takes the exit of a runner that is our child, so that it is no zombie. One of an earlier agent is somebody else's.
pub fn reap(pidfd: BorrowedFd<'_>) {
    let _ = rustix::process::waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
}

/// How long a run was up and how it ended, as people are told.
pub fn reason(record: ExitRecord) -> Reason {
    use optimus_common::reason::{Exit, Oom};
    use optimus_common::units::Bytes;
    let ExitRecord { attempt: _, ended_at_ms, end, dropped_lines: _ } = record;
    match end {
        End::Exited { code, signal, oom_kills, peak, limit, ran_for_ms } => {
            let limit = Bytes(limit.unwrap_or(0));
            let oom = (oom_kills > 0).then_some(Oom { limit, peak: peak.map_or(limit, Bytes), kills: oom_kills });
            let exit = Exit { code, signal, oom, at: Timestamp(ended_at_ms), ran_for: Span(ran_for_ms) };
            match oom {
                // A child was killed and the main process left content: its own verdict counts.
                Some(oom) if code != Some(0) => Reason::OutOfMemory { exit, oom },
                _ => Reason::Exited { exit },
            }
        }
        End::NotStarted { step, errno, detail } => refusal(&StartFile::default(), step, errno, detail),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_that_is_used_again_is_not_taken_for_a_runner() {
        let (ticks, _) = start_time(std::process::id()).unwrap();
        let own = std::process::id();
        let mut run = RunRecord { runner_pid: own, runner_start_time: ticks, boot_id: boot_id(), ..RunRecord::default() };
        let found = supervised(&run).unwrap();
        assert!(found.up < Duration::from_secs(3600));
        run.runner_start_time -= 1;
        assert!(supervised(&run).is_none(), "another process of that number");
        run.runner_start_time += 1;
        run.boot_id = "an earlier boot".into();
        assert!(supervised(&run).is_none());
    }

    #[test]
    fn a_start_that_was_interrupted_is_prevented_for_good() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(find(dir.path()), Found::Nothing));
        StartFile { argv: vec!["true".into()], ..StartFile::default() }.write(dir.path()).unwrap();
        assert!(matches!(find(dir.path()), Found::Nothing));
        assert!(!dir.path().join(START_FILE).exists());
    }

    #[test]
    fn a_run_without_its_runner_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        StartFile { argv: vec!["true".into()], ..StartFile::default() }.write(dir.path()).unwrap();
        let run = RunRecord { runner_pid: 1, runner_start_time: 5, boot_id: boot_id(), ..RunRecord::default() };
        fs::write(dir.path().join(optimus_runner::RUN_FILE), run.encode()).unwrap();
        assert!(matches!(find(dir.path()), Found::Lost(why) if why.contains("killed")));
        let run = RunRecord { boot_id: "before".into(), ..run };
        fs::write(dir.path().join(optimus_runner::RUN_FILE), run.encode()).unwrap();
        assert!(matches!(find(dir.path()), Found::Lost(why) if why.contains("restarted")));
        fs::write(dir.path().join(optimus_runner::RUN_FILE), "garbage").unwrap();
        assert!(matches!(find(dir.path()), Found::Lost(_)));
        assert!(ask(dir.path(), Request::Kill).is_ok(), "one that has gone needs no asking");
    }
}
