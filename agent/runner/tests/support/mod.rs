//! A runner in a directory of its own, and what it can be given to run: this very binary, told by an environment
//! variable what to be.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use optimus_runner::{End, ExitRecord, LOG_PREFIX, Request, RunRecord, SOCKET, StartFile, start_time};

/// Nothing here takes near so long; the machine may be busy.
pub const DEADLINE: Duration = Duration::from_secs(60);
pub const VARIABLE: &str = "OPTIMUS_TEST_PROGRAM";

pub struct Run {
    /// Removed at the end.
    pub dir: PathBuf,
    _temporary: tempfile::TempDir,
    pub runner: Child,
    said: BufReader<ChildStdout>,
}

/// A start file for a program of ours.
pub fn program(what: &str) -> StartFile {
    let me = std::env::current_exe().unwrap().to_str().unwrap().to_owned();
    StartFile { env: vec![(VARIABLE.into(), what.into())], ..command(&[&me]) }
}

pub fn command(argv: &[&str]) -> StartFile {
    StartFile {
        attempt: 1,
        argv: argv.iter().map(|&a| a.to_owned()).collect(),
        env: vec![("PATH".into(), "/usr/bin:/bin".into())],
        cwd: "/".into(),
        log_segment: 1 << 20,
        log_segments: 4,
        umask: 0o22,
        ..StartFile::default()
    }
}

pub fn shell(line: &str) -> StartFile {
    command(&["/bin/sh", "-c", line])
}

pub fn runner_command(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_optimus-runner"));
    command.arg(dir).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

impl Run {
    /// Starts a runner that is expected to start the program.
    pub fn start(start: &StartFile) -> Run {
        let mut run = Run::spawn(start);
        assert_eq!(run.word(), "started", "{:?}", ExitRecord::read(&run.dir));
        run
    }
    pub fn spawn(start: &StartFile) -> Run {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("run");
        fs::create_dir(&dir).unwrap();
        Run::spawn_in(start, temporary, dir, |_| {})
    }
    pub fn spawn_in(start: &StartFile, temporary: tempfile::TempDir, dir: PathBuf, change: impl FnOnce(&mut Command)) -> Run {
        start.write(&dir).unwrap();
        let mut command = runner_command(&dir);
        change(&mut command);
        let mut runner = command.spawn().unwrap();
        let said = BufReader::new(runner.stdout.take().unwrap());
        Run { dir, _temporary: temporary, runner, said }
    }
    /// What it tells its starter; empty if it leaves without a word.
    pub fn word(&mut self) -> String {
        let mut line = String::new();
        self.said.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
    pub fn record(&self) -> RunRecord {
        RunRecord::read(&self.dir).unwrap().unwrap()
    }
    pub fn pid(&self) -> u32 {
        self.record().pid
    }
    pub fn exit(&self) -> ExitRecord {
        until("the exit record", || ExitRecord::read(&self.dir).unwrap())
    }
    /// The exit record, and the runner has left.
    pub fn ended(&mut self) -> ExitRecord {
        let exit = self.exit();
        assert!(self.runner.wait().unwrap().success());
        exit
    }
    pub fn connect(&self) -> Client {
        Client::new(UnixStream::connect(self.dir.join(SOCKET)).unwrap())
    }
    pub fn ask(&self, request: Request) -> String {
        let mut client = self.connect();
        client.send(request.encode().as_bytes());
        client.line()
    }
    pub fn stop(&self, grace: Duration) {
        assert_eq!(self.ask(Request::Stop { signal: libc::SIGTERM, grace_ms: grace.as_millis() as u64 }), "ok");
    }
    pub fn kill_runner(&mut self) {
        self.runner.kill().unwrap();
        self.runner.wait().unwrap();
    }
    /// Segments by number.
    pub fn segments(&self) -> Vec<(u64, Vec<u8>)> {
        let entries = fs::read_dir(&self.dir).unwrap().map(Result::unwrap);
        let mut found: Vec<(u64, Vec<u8>)> = entries
            .filter_map(|e| {
                let number = e.file_name().to_str()?.strip_prefix(LOG_PREFIX)?.parse().ok()?;
                Some((number, fs::read(e.path()).ok()?))
            })
            .collect();
        found.sort();
        found
    }
    /// Letter and text of every line. Each has its time, and none is cut.
    pub fn lines(&self) -> Vec<(char, String)> {
        let mut lines = Vec::new();
        for (number, bytes) in self.segments() {
            assert!(bytes.ends_with(b"\n"), "segment {number} ends within a line");
            for line in String::from_utf8_lossy(&bytes).trim_end_matches('\n').split('\n') {
                let (time, rest) = line.split_once(' ').unwrap_or_else(|| panic!("{line:?}"));
                assert!(time.parse::<u64>().is_ok_and(|ms| ms > 1_600_000_000_000), "{line:?}");
                let (letter, text) = rest.split_once(' ').unwrap_or_else(|| panic!("{line:?}"));
                lines.push((letter.parse().unwrap(), text.to_owned()));
            }
        }
        lines
    }
    pub fn says(&self, text: &str) {
        until(text, || self.segments().iter().any(|(_, b)| String::from_utf8_lossy(b).contains(text)).then_some(()));
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if self.runner.try_wait().unwrap().is_none() {
            // Asked first: without cgroups only it can find what its program has started.
            if let Ok(mut stream) = UnixStream::connect(self.dir.join(SOCKET)) {
                let _ = stream.write_all(Request::Kill.encode().as_bytes());
                let deadline = Instant::now() + Duration::from_secs(5);
                while self.runner.try_wait().unwrap().is_none() && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
        let _ = self.runner.kill();
        let _ = self.runner.wait();
    }
}

pub struct Client(BufReader<UnixStream>);

impl Client {
    fn new(stream: UnixStream) -> Client {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        Client(BufReader::new(stream))
    }
    pub fn send(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).unwrap();
    }
    pub fn try_send(&mut self, bytes: &[u8]) -> bool {
        self.0.get_mut().write_all(bytes).is_ok()
    }
    /// The next line; empty at the end.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(_) => {}
            Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset, "{e}"),
        }
        line.trim_end().to_owned()
    }
}

pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn gone(pid: u32) -> bool {
    start_time(pid).is_none_or(|(_, state)| state == 'Z' || state == 'X')
}

/// Everything below a process, itself left out.
pub fn descendants(pid: u32) -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    let mut queue = vec![pid];
    while let Some(pid) = queue.pop() {
        let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        for child in text.split_ascii_whitespace().map(|w| w.parse().unwrap()) {
            found.insert(child);
            queue.push(child);
        }
    }
    found
}

/// A number from a `Name: NUMBER` line of a file in `/proc/PID`.
pub fn proc_number(pid: u32, file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':')).unwrap_or_else(|| panic!("no {name} in {text}"));
    line.split_ascii_whitespace().next().unwrap().parse().unwrap()
}

pub fn signal_of(exit: &ExitRecord) -> Option<i32> {
    match &exit.end {
        End::Exited { signal, .. } => *signal,
        End::NotStarted { .. } => panic!("{exit:?}"),
    }
}

pub fn code_of(exit: &ExitRecord) -> Option<i32> {
    match &exit.end {
        End::Exited { code, .. } => *code,
        End::NotStarted { .. } => panic!("{exit:?}"),
    }
}

/// Before `main` and its threads: a fork is a fork of one thread, and std has changed no signal yet.
#[used]
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = before_main;

extern "C" fn before_main() {
    let Ok(text) = std::env::var(VARIABLE) else { return };
    let (what, number) = text.split_once(' ').unwrap_or((&text, "0"));
    let number: u64 = number.parse().unwrap();
    match what {
        "look" => look(),
        "sleep" => sleep(),
        "stubborn" => {
            // SAFETY: plain signal(2).
            unsafe { libc::signal(libc::SIGTERM, libc::SIG_IGN) };
            escape(number);
        }
        "escape" => escape(number),
        "headless" => {
            std::thread::spawn(|| {
                println!("headless");
                sleep()
            });
            loop {
                // SAFETY: ends this thread only.
                unsafe { libc::syscall(libc::SYS_exit, 0) };
            }
        }
        "orphans" => orphans(number),
        "flood" => flood(number),
        other => panic!("no program `{other}`"),
    }
    std::process::exit(0);
}

fn sleep() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(1000));
    }
}

/// Says what it was started with.
fn look() {
    for file in ["cmdline", "environ"] {
        let mut bytes = Vec::new();
        fs::File::open(format!("/proc/self/{file}")).unwrap().read_to_end(&mut bytes).unwrap();
        println!("{file} {}", String::from_utf8_lossy(&bytes).replace('\0', "|"));
    }
    // The directory that is read has a descriptor too: asked without one.
    let open: Vec<i32> = (0..1024).filter(|&fd| unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0).collect();
    println!("fds {open:?}");
    println!("stdin {}", fs::read_link("/proc/self/fd/0").unwrap().display());
    for name in ["SigBlk", "SigIgn", "NoNewPrivs", "Umask", "Uid", "Gid", "Groups"] {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with(name)).unwrap();
        println!("{}", line.split_ascii_whitespace().collect::<Vec<_>>().join(" "));
    }
    println!("oom_score_adj {}", fs::read_to_string("/proc/self/oom_score_adj").unwrap().trim());
    let mut death = 0;
    // SAFETY: plain calls on our variables.
    unsafe {
        libc::prctl(libc::PR_GET_PDEATHSIG, &mut death);
        println!("death signal {death}");
        println!("leads its session {}", libc::getsid(0) == libc::getpid());
    }
    let limits = fs::read_to_string("/proc/self/limits").unwrap();
    for name in ["Max core file size", "Max open files"] {
        let line = limits.lines().find(|l| l.starts_with(name)).unwrap();
        println!("{}", line.split_ascii_whitespace().collect::<Vec<_>>().join(" "));
    }
    println!("cwd {}", std::env::current_dir().unwrap().display());
}

/// Grandchildren in sessions of their own whose parents are gone, and a child that stays.
fn escape(children: u64) -> ! {
    for _ in 0..children {
        // SAFETY: one thread, each time.
        unsafe {
            if libc::fork() == 0 {
                libc::setsid();
                if libc::fork() == 0 {
                    libc::setsid();
                    sleep();
                }
                libc::_exit(0);
            }
        }
    }
    // SAFETY: one thread.
    if unsafe { libc::fork() } == 0 {
        sleep();
    }
    println!("escaped");
    sleep()
}

/// Leaves so many dead to whoever adopts them.
fn orphans(count: u64) -> ! {
    for _ in 0..count {
        // SAFETY: one thread, each time; the middle one is waited for.
        unsafe {
            let middle = libc::fork();
            if middle == 0 {
                if libc::fork() == 0 {
                    libc::_exit(0);
                }
                libc::_exit(0);
            }
            libc::waitpid(middle, std::ptr::null_mut(), 0);
        }
    }
    println!("all orphaned");
    sleep()
}

/// So many MiB of numbered lines of 64 bytes, as fast as they are taken.
fn flood(mib: u64) {
    let mut out = std::io::stdout().lock();
    let lines = (mib << 20) / 64;
    let mut block = Vec::with_capacity(64 << 10);
    for n in 0..lines {
        let _ = writeln!(block, "{n:063}");
        if block.len() == 64 << 10 || n == lines - 1 {
            out.write_all(&block).unwrap();
            block.clear();
        }
    }
}

/// Leaves descriptors open over an exec, as somebody careless would.
pub fn leak_descriptors(command: &mut Command, low: i32, high: i32) {
    // SAFETY: dup2 in the child only; the descriptors live until exec and beyond, that is the point.
    unsafe {
        command.pre_exec(move || {
            for fd in low..=high {
                libc::dup2(2, fd);
            }
            Ok(())
        });
    }
}
