//! The files and words that an agent and its runners share.
//!
//! One run of a copy has a **run directory**. The agent writes [`StartFile`] (`start`) there and starts
//! `optimus-runner DIR`. The runner starts the process and writes [`RunRecord`] (`run`); when the process has ended
//! and its group is dead it writes [`ExitRecord`] (`exit`) and leaves. Output goes to `log.N` in the same directory.
//! While it lives, the runner holds a lock on `lock` and listens on `sock` for [`Request`]s.
//!
//! All files have one shape: `KIND VERSION`, then `key NUL value NUL` pairs. None of what is stored can hold a NUL.
//! Readers ignore keys they do not know, so an agent and its runners may be some releases apart.
//!
//! Only std and libc: a runner must stay small.

pub mod record;

use std::io;
use std::path::{Path, PathBuf};

use record::{Reader, Writer};

pub const START_FILE: &str = "start";
pub const RUN_FILE: &str = "run";
pub const EXIT_FILE: &str = "exit";
pub const LOCK_FILE: &str = "lock";
pub const SOCKET: &str = "sock";
/// Output segments are `log.0`, `log.1`, ...; each line `UNIX_MS O|E TEXT`.
pub const LOG_PREFIX: &str = "log.";
/// Longest piece of a line; a longer line becomes several.
pub const LINE_MAX: usize = 16 << 10;

/// Everything a runner needs to know.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StartFile {
    /// Allocation id, for people who look at processes.
    pub alloc: String,
    pub attempt: u32,
    /// Found through the `PATH` of `env`. Never empty.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<(String, String)>,
    pub cwd: String,
    /// User to become; unset: stay.
    pub user: Option<User>,
    /// `cgroup.procs` files the process enters before it becomes the program (several on v1).
    pub cgroup_procs: Vec<PathBuf>,
    /// v2: writing `1` here kills the group.
    pub cgroup_kill: Option<PathBuf>,
    /// v1: `freezer.state` of the group, so that a fork bomb stands still while it is killed.
    pub cgroup_freezer: Option<PathBuf>,
    /// File with an `oom_kill N` line: v1 `memory.oom_control`, v2 `memory.events`.
    pub oom_file: Option<PathBuf>,
    /// v1 `memory.max_usage_in_bytes`, v2 `memory.peak`.
    pub peak_file: Option<PathBuf>,
    /// Memory limit in bytes, to be told with an out-of-memory end.
    pub memory_limit: Option<u64>,
    /// Bytes of one log segment, and how many are kept.
    pub log_segment: u64,
    pub log_segments: u32,
    /// Soft and hard limit of open files; unset: inherited.
    pub nofile: Option<u64>,
    pub umask: u32,
    /// Directories the process sees at other places too: where they are, and where they are seen. Mounted for it alone.
    pub binds: Vec<(PathBuf, PathBuf)>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
}

/// A process that was started. Found again by all of it together: pids are used again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunRecord {
    pub attempt: u32,
    pub pid: u32,
    /// Start time of the process in clock ticks since boot (field 22 of `/proc/PID/stat`).
    pub start_time: u64,
    pub runner_pid: u32,
    pub runner_start_time: u64,
    pub boot_id: String,
    pub started_at_ms: u64,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExitRecord {
    pub attempt: u32,
    pub ended_at_ms: u64,
    pub end: End,
    /// Log lines that found no disk.
    pub dropped_lines: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The process ended.
    Exited {
        code: Option<i32>,
        signal: Option<i32>,
        /// How many processes of the group the kernel killed for want of memory in this run; see [`oom_kills`].
        oom_kills: u64,
        peak: Option<u64>,
        limit: Option<u64>,
        ran_for_ms: u64,
    },
    /// It never became the program.
    NotStarted { step: Step, errno: i32, detail: String },
}

/// What a runner was doing when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    Prepare,
    Cgroup,
    Limits,
    User,
    Directory,
    Exec,
    Mount,
}

const STEPS: [(Step, &str); 7] = [
    (Step::Prepare, "prepare"),
    (Step::Cgroup, "cgroup"),
    (Step::Limits, "limits"),
    (Step::User, "user"),
    (Step::Directory, "directory"),
    (Step::Exec, "exec"),
    (Step::Mount, "mount"),
];

impl Step {
    pub fn name(self) -> &'static str {
        STEPS[self as usize].1
    }
    fn from_name(name: &str) -> Option<Self> {
        STEPS.iter().find(|(_, n)| *n == name).map(|(step, _)| *step)
    }
    /// For the pipe between the forked child and its parent.
    pub fn from_number(n: u8) -> Option<Self> {
        STEPS.get(usize::from(n)).map(|(step, _)| *step)
    }
}

/// What may be asked of a runner on its socket, a line each. It answers each with one line: `ok`, `error TEXT`,
/// or for `status` a [`Status`]. When the process has ended and the exit record is written, it sends `exit` and closes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// `stop SIGNAL GRACE_MS`: signals the process group, and kills the whole group after the grace. A later stop may
    /// only bring the end nearer.
    Stop { signal: i32, grace_ms: u64 },
    /// `signal SIGNAL`: to the process.
    Signal { signal: i32 },
    /// `kill`: the whole group, now.
    Kill,
    /// `status`
    Status,
}

/// Answer to `status`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Status {
    pub pid: u32,
    pub attempt: u32,
    pub dropped_lines: u64,
}

impl Request {
    pub fn encode(&self) -> String {
        match self {
            Request::Stop { signal, grace_ms } => format!("stop {signal} {grace_ms}\n"),
            Request::Signal { signal } => format!("signal {signal}\n"),
            Request::Kill => "kill\n".into(),
            Request::Status => "status\n".into(),
        }
    }
    pub fn decode(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let signal = |word: Option<&str>| word.and_then(|w| w.parse().ok()).filter(|s| (1..=64).contains(s));
        let request = match words.next()? {
            "stop" => Request::Stop { signal: signal(words.next())?, grace_ms: words.next()?.parse().ok()? },
            "signal" => Request::Signal { signal: signal(words.next())? },
            "kill" => Request::Kill,
            "status" => Request::Status,
            _ => return None,
        };
        words.next().is_none().then_some(request)
    }
}

impl Status {
    pub fn encode(&self) -> String {
        format!("status pid={} attempt={} dropped={}\n", self.pid, self.attempt, self.dropped_lines)
    }
    pub fn decode(line: &str) -> Option<Self> {
        let mut status = Status::default();
        for pair in line.trim_end().strip_prefix("status ")?.split(' ') {
            match pair.split_once('=')? {
                ("pid", v) => status.pid = v.parse().ok()?,
                ("attempt", v) => status.attempt = v.parse().ok()?,
                ("dropped", v) => status.dropped_lines = v.parse().ok()?,
                _ => {}
            }
        }
        Some(status)
    }
}

impl StartFile {
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new("start 1");
        w.put("alloc", &self.alloc);
        w.put("attempt", self.attempt);
        for arg in &self.argv {
            w.put("arg", arg);
        }
        for (key, value) in &self.env {
            w.put("env", format_args!("{key}={value}"));
        }
        w.put("cwd", &self.cwd);
        if let Some(user) = &self.user {
            w.put("uid", user.uid);
            w.put("gid", user.gid);
            for group in &user.groups {
                w.put("group", group);
            }
        }
        for path in &self.cgroup_procs {
            w.put("cgroup_procs", path.display());
        }
        for (key, path) in [
            ("cgroup_kill", &self.cgroup_kill),
            ("cgroup_freezer", &self.cgroup_freezer),
            ("oom_file", &self.oom_file),
            ("peak_file", &self.peak_file),
        ] {
            if let Some(path) = path {
                w.put(key, path.display());
            }
        }
        if let Some(limit) = self.memory_limit {
            w.put("memory_limit", limit);
        }
        w.put("log_segment", self.log_segment);
        w.put("log_segments", self.log_segments);
        if let Some(nofile) = self.nofile {
            w.put("nofile", nofile);
        }
        w.put("umask", self.umask);
        for (from, to) in &self.binds {
            w.put("bind_from", from.display());
            w.put("bind_to", to.display());
        }
        w.finish()
    }

    pub fn decode(bytes: &[u8]) -> io::Result<Self> {
        let mut start = StartFile { log_segment: 1 << 20, log_segments: 4, umask: 0o22, ..StartFile::default() };
        let (mut uid, mut gid, mut groups) = (None, None, Vec::new());
        let mut reader = Reader::new(bytes, "start 1")?;
        while let Some((key, value)) = reader.next()? {
            match key {
                "alloc" => start.alloc = value.into(),
                "attempt" => start.attempt = record::number(key, value)?,
                "arg" => start.argv.push(value.into()),
                "env" => {
                    start.env.push(value.split_once('=').map(|(k, v)| (k.into(), v.into())).ok_or_else(|| record::bad("env without ="))?)
                }
                "cwd" => start.cwd = value.into(),
                "uid" => uid = Some(record::number(key, value)?),
                "gid" => gid = Some(record::number(key, value)?),
                "group" => groups.push(record::number(key, value)?),
                "cgroup_procs" => start.cgroup_procs.push(value.into()),
                "cgroup_kill" => start.cgroup_kill = Some(value.into()),
                "cgroup_freezer" => start.cgroup_freezer = Some(value.into()),
                "oom_file" => start.oom_file = Some(value.into()),
                "peak_file" => start.peak_file = Some(value.into()),
                "memory_limit" => start.memory_limit = Some(record::number(key, value)?),
                "log_segment" => start.log_segment = record::number(key, value)?,
                "log_segments" => start.log_segments = record::number(key, value)?,
                "nofile" => start.nofile = Some(record::number(key, value)?),
                "umask" => start.umask = record::number(key, value)?,
                "bind_from" => start.binds.push((value.into(), PathBuf::new())),
                "bind_to" => start.binds.last_mut().ok_or_else(|| record::bad("bind_to without bind_from"))?.1 = value.into(),
                _ => {}
            }
        }
        if let (Some(uid), Some(gid)) = (uid, gid) {
            start.user = Some(User { uid, gid, groups });
        }
        if start.argv.is_empty() {
            return Err(record::bad("no command"));
        }
        Ok(start)
    }

    /// Writes `start` into a run directory.
    pub fn write(&self, dir: &Path) -> io::Result<()> {
        record::write_for_now(dir, START_FILE, &self.encode())
    }
}

impl RunRecord {
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new("run 1");
        w.put("attempt", self.attempt);
        w.put("pid", self.pid);
        w.put("start_time", self.start_time);
        w.put("runner_pid", self.runner_pid);
        w.put("runner_start_time", self.runner_start_time);
        w.put("boot_id", &self.boot_id);
        w.put("started_at", self.started_at_ms);
        w.finish()
    }

    pub fn decode(bytes: &[u8]) -> io::Result<Self> {
        let mut run = RunRecord::default();
        let mut reader = Reader::new(bytes, "run 1")?;
        while let Some((key, value)) = reader.next()? {
            match key {
                "attempt" => run.attempt = record::number(key, value)?,
                "pid" => run.pid = record::number(key, value)?,
                "start_time" => run.start_time = record::number(key, value)?,
                "runner_pid" => run.runner_pid = record::number(key, value)?,
                "runner_start_time" => run.runner_start_time = record::number(key, value)?,
                "boot_id" => run.boot_id = value.into(),
                "started_at" => run.started_at_ms = record::number(key, value)?,
                _ => {}
            }
        }
        Ok(run)
    }

    /// Reads `run` of a run directory; none yet: `None`.
    pub fn read(dir: &Path) -> io::Result<Option<Self>> {
        record::read(&dir.join(RUN_FILE))?.map(|bytes| Self::decode(&bytes)).transpose()
    }
}

impl ExitRecord {
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new("exit 1");
        w.put("attempt", self.attempt);
        w.put("ended_at", self.ended_at_ms);
        w.put("dropped", self.dropped_lines);
        match &self.end {
            End::Exited { code, signal, oom_kills, peak, limit, ran_for_ms } => {
                for (key, value) in [("code", code), ("signal", signal)] {
                    if let Some(value) = value {
                        w.put(key, value);
                    }
                }
                w.put("oom_kills", oom_kills);
                for (key, value) in [("peak", peak), ("limit", limit)] {
                    if let Some(value) = value {
                        w.put(key, value);
                    }
                }
                w.put("ran_for", ran_for_ms);
            }
            End::NotStarted { step, errno, detail } => {
                w.put("failed_step", step.name());
                w.put("errno", errno);
                w.put("detail", detail);
            }
        }
        w.finish()
    }

    pub fn decode(bytes: &[u8]) -> io::Result<Self> {
        let (mut attempt, mut ended_at_ms, mut dropped_lines) = (0, 0, 0);
        let (mut code, mut signal, mut oom_kills, mut peak, mut limit, mut ran_for_ms) = (None, None, 0, None, None, 0);
        let (mut failed, mut errno, mut detail) = (None, 0, String::new());
        let mut reader = Reader::new(bytes, "exit 1")?;
        while let Some((key, value)) = reader.next()? {
            match key {
                "attempt" => attempt = record::number(key, value)?,
                "ended_at" => ended_at_ms = record::number(key, value)?,
                "dropped" => dropped_lines = record::number(key, value)?,
                "code" => code = Some(record::number(key, value)?),
                "signal" => signal = Some(record::number(key, value)?),
                "oom_kills" => oom_kills = record::number(key, value)?,
                "peak" => peak = Some(record::number(key, value)?),
                "limit" => limit = Some(record::number(key, value)?),
                "ran_for" => ran_for_ms = record::number(key, value)?,
                "failed_step" => failed = Some(Step::from_name(value).ok_or_else(|| record::bad("unknown step"))?),
                "errno" => errno = record::number(key, value)?,
                "detail" => detail = value.into(),
                _ => {}
            }
        }
        let end = match failed {
            Some(step) => End::NotStarted { step, errno, detail },
            None => End::Exited { code, signal, oom_kills, peak, limit, ran_for_ms },
        };
        Ok(ExitRecord { attempt, ended_at_ms, end, dropped_lines })
    }

    /// Reads `exit` of a run directory; none yet: `None`.
    pub fn read(dir: &Path) -> io::Result<Option<Self>> {
        record::read(&dir.join(EXIT_FILE))?.map(|bytes| Self::decode(&bytes)).transpose()
    }
}

/// Start time of a process in clock ticks since boot, and its state letter; none if there is no such process.
pub fn start_time(pid: u32) -> Option<(u64, char)> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; the fields start behind the last one.
    let at = stat.iter().rposition(|&b| b == b')')?;
    let rest = std::str::from_utf8(&stat[at + 1..]).ok()?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((fields.nth(18)?.parse().ok()?, state))
}

/// Processes killed for want of memory, from v1 `memory.oom_control` or v2 `memory.events`.
///
/// When v2 kills a group as a whole, the process that was chosen first is counted again with the others: one less for
/// each time that was done, yet never none of some.
pub fn oom_kills(text: &str) -> u64 {
    let field = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')?.trim().parse::<u64>().ok()).unwrap_or(0);
    let (kills, groups) = (field("oom_kill"), field("oom_group_kill"));
    kills.saturating_sub(groups).max(kills.min(1))
}

/// Identifies this boot of the host.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|s| s.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn files_survive_the_round_trip_and_cuts_are_refused_or_harmless() {
        let start = StartFile {
            alloc: "a".into(),
            attempt: 3,
            argv: vec!["sh".into(), "-c".into(), "echo \"a\nb\" = \u{e9}".into(), String::new()],
            env: vec![("A".into(), "x=y\n".into())],
            cwd: "/tmp".into(),
            user: Some(User { uid: 1, gid: 2, groups: vec![3, 4] }),
            cgroup_procs: vec!["/a/cgroup.procs".into(), "/b/cgroup.procs".into()],
            cgroup_kill: None,
            cgroup_freezer: Some("/f".into()),
            oom_file: Some("/o".into()),
            peak_file: None,
            memory_limit: Some(7),
            log_segment: 1,
            log_segments: 2,
            nofile: Some(9),
            umask: 0o27,
            binds: vec![("/srv/volumes/a b".into(), "/data".into()), ("/x".into(), "/y".into())],
        };
        let bytes = start.encode();
        assert_eq!(StartFile::decode(&bytes).unwrap(), start);
        for cut in 0..bytes.len() {
            let _ = StartFile::decode(&bytes[..cut]); // no panic
        }
        let run =
            RunRecord { attempt: 1, pid: 2, start_time: 3, runner_pid: 4, runner_start_time: 5, boot_id: "b".into(), started_at_ms: 6 };
        assert_eq!(RunRecord::decode(&run.encode()).unwrap(), run);
        for end in [
            End::Exited { code: Some(3), signal: None, oom_kills: 0, peak: Some(1), limit: None, ran_for_ms: 9 },
            End::Exited { code: None, signal: Some(9), oom_kills: 2, peak: None, limit: Some(5), ran_for_ms: 0 },
            End::NotStarted { step: Step::Exec, errno: 2, detail: "no-such".into() },
        ] {
            let exit = ExitRecord { attempt: 1, ended_at_ms: 2, end, dropped_lines: 3 };
            assert_eq!(ExitRecord::decode(&exit.encode()).unwrap(), exit);
        }
    }

    #[test]
    fn requests_are_read_strictly() {
        for request in [Request::Stop { signal: 15, grace_ms: 10_000 }, Request::Signal { signal: 1 }, Request::Kill, Request::Status] {
            assert_eq!(Request::decode(request.encode().trim_end()), Some(request));
        }
        for bad in ["", "stop", "stop 15", "stop 0 1", "stop 99 1", "stop 15 -1", "kill now", "dance"] {
            assert_eq!(Request::decode(bad), None, "{bad}");
        }
        let status = Status { pid: 1, attempt: 2, dropped_lines: 3 };
        assert_eq!(Status::decode(&status.encode()), Some(status));
    }

    #[test]
    fn one_that_was_killed_with_its_group_is_one() {
        assert_eq!(oom_kills("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"), 3);
        assert_eq!(oom_kills("low 0\nmax 9\noom 1\noom_kill 2\noom_group_kill 1\n"), 1);
        assert_eq!(oom_kills("oom_kill 1\noom_group_kill 1\n"), 1, "the first was gone before the others were counted");
        assert_eq!(oom_kills("oom_kill 0\noom_group_kill 0\n"), 0);
        assert_eq!(oom_kills("oom_kill many\n"), 0);
    }

    #[test]
    fn own_start_time_is_known() {
        assert!(start_time(std::process::id()).is_some_and(|(ticks, state)| ticks > 0 && state == 'R' || state == 'S'));
        assert_eq!(start_time(0), None);
    }
}
