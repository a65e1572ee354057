//! Runs the real `optimus` binary in directories, ports and cgroups of its own, and cleans up after it.

use std::fs;
use std::io::Read;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// Longest any condition is waited for. Generous: the machine may be busy; a passing test never waits it out.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Exit code of a verb that names something that is not there.
const NOT_FOUND: i32 = 3;

/// Polls until `condition` gives a value; panics with `what` when patience is at its end.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < end, "gave up waiting for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The directory of the built binaries, beside the test binary.
pub fn bin_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("a test knows its own path");
    let dir = exe.parent().and_then(Path::parent).expect("target/PROFILE/deps/test").to_owned();
    assert!(dir.join("optimus").exists(), "{} is missing: run `cargo build --bins` first", dir.join("optimus").display());
    assert!(dir.join("optimus-runner").exists(), "optimus-runner is missing: run `cargo build --bins` first");
    dir
}

pub fn repo_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ is in the workspace").to_owned()
}

/// A TCP port nobody listens on right now.
pub fn free_tcp_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a loopback port").port()
}

/// A UDP port nobody is bound to right now.
pub fn free_udp_port() -> u16 {
    UdpSocket::bind("127.0.0.1:0").and_then(|s| s.local_addr()).expect("a loopback port").port()
}

/// A place of its own for one test: data, configuration, ports. Everything started in it dies with it.
pub struct Sandbox {
    pub dir: tempfile::TempDir,
    pub api_port: u16,
    pub agent_port: u16,
    /// First of a hundred ports for workloads, away from other tests.
    pub workload_ports: u16,
    processes: Vec<Process>,
}

/// A running `optimus` role.
pub struct Process {
    pub child: Child,
    pub log: PathBuf,
}

impl Process {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
    pub fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
    pub fn signal(&self, signal: i32) {
        // SAFETY: plain kill(2) on a child we have not reaped.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
    /// Waits for the end and gives the exit code.
    pub fn wait(&mut self) -> Option<i32> {
        wait_for("a process to end", || self.child.try_wait().ok().flatten()).code()
    }
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

/// What a finished command said.
pub struct Said {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Said {
    pub(crate) fn of(output: Output) -> Self {
        Said {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
    /// Fails the test unless the command left with `code`.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "exit code\n-- stdout\n{}\n-- stderr\n{}", self.stdout, self.stderr);
        self
    }
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("not JSON ({e}): {}\n{}", self.stdout, self.stderr))
    }
    /// Both streams.
    pub fn all(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

impl Default for Sandbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Sandbox {
    pub fn new() -> Self {
        use std::sync::atomic::{AtomicU16, Ordering};
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        // Below the ephemeral range, and apart for tests of one process.
        let workload_ports = 10_000 + (std::process::id() as u16 % 50) * 400 + (n % 4) * 100;
        Sandbox {
            dir: tempfile::tempdir().expect("a temporary directory"),
            api_port: free_tcp_port(),
            agent_port: free_udp_port(),
            workload_ports,
            processes: Vec::new(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file below the sandbox and gives its directory.
    pub fn project(&self, name: &str, files: &[(&str, &str)]) -> PathBuf {
        let dir = self.path(name);
        fs::create_dir_all(&dir).expect("a directory");
        for (file, text) in files {
            fs::write(dir.join(file), text).expect("a file");
        }
        dir
    }

    /// `optimus ARGS` with this sandbox's configuration.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(bin_dir().join("optimus"));
        command
            .args(args)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.path("home"))
            .env("XDG_CONFIG_HOME", self.path("config"))
            .env("XDG_DATA_HOME", self.path("data"))
            .env("NO_COLOR", "1")
            .stdin(Stdio::null());
        command
    }

    /// Runs a client verb to its end.
    pub fn run(&self, args: &[&str]) -> Said {
        Said::of(self.command(args).output().expect("optimus runs"))
    }

    /// Starts a long-running role; its output goes to `NAME.log`.
    pub fn start(&mut self, name: &str, args: &[&str]) -> usize {
        let command = self.command(args);
        self.start_command(name, command)
    }

    /// Starts a prepared command as a role.
    pub fn start_command(&mut self, name: &str, mut command: Command) -> usize {
        let log = self.path(&format!("{name}-{}.log", self.processes.len()));
        let out = fs::File::create(&log).expect("a log file");
        let err = out.try_clone().expect("a second handle");
        let child = command.stdout(out).stderr(err).spawn().expect("optimus starts");
        self.processes.push(Process { child, log });
        self.processes.len() - 1
    }

    pub fn process(&mut self, index: usize) -> &mut Process {
        &mut self.processes[index]
    }

    fn ports(&self) -> String {
        format!("{}-{}", self.workload_ports, self.workload_ports + 99)
    }

    /// `optimus dev` with everything of its own, ready to answer.
    pub fn dev(&mut self, more: &[&str]) -> usize {
        let api = format!("127.0.0.1:{}", self.api_port);
        let agent = format!("127.0.0.1:{}", self.agent_port);
        let data = self.path("dev").display().to_string();
        let ports = self.ports();
        let mut args = vec!["dev", "--data-dir", &data, "--api-listen", &api, "--agent-listen", &agent, "--ports", &ports];
        args.extend_from_slice(more);
        let index = self.start("dev", &args);
        self.wait_ready(index);
        index
    }

    /// `optimus server` alone.
    pub fn server(&mut self) -> usize {
        let api = format!("127.0.0.1:{}", self.api_port);
        let agent = format!("127.0.0.1:{}", self.agent_port);
        let data = self.path("server").display().to_string();
        let index = self.start("server", &["server", "--data-dir", &data, "--api-listen", &api, "--agent-listen", &agent]);
        self.wait_ready(index);
        index
    }

    /// `optimus agent`, joining with a new token (or coming back when it has joined).
    pub fn agent(&mut self) -> usize {
        let ports = self.ports();
        let index = self.start_agent("agent", &ports, &[]);
        self.wait_up(index, 1);
        index
    }

    /// The agent that has joined, started again while no server may be there: nobody is asked whether it is up.
    pub fn agent_alone(&mut self) -> usize {
        let ports = self.ports();
        self.start_agent("agent", &ports, &[])
    }

    /// Another agent called `name` on this machine, as the `n`th node. `ports` are a range of its own.
    pub fn another_agent(&mut self, name: &str, n: usize, ports: &str) -> usize {
        let index = self.start_agent(name, ports, &["--name", name]);
        self.wait_up(index, n);
        index
    }

    fn start_agent(&mut self, name: &str, ports: &str, more: &[&str]) -> usize {
        let data = self.path(name).display().to_string();
        let mut args = vec!["agent", "--data-dir", &data, "--ports", ports, "--workload-user", "root"];
        args.extend_from_slice(more);
        let token;
        if !self.path(name).join("identity").exists() {
            token = self.join_token();
            args.extend_from_slice(&["--join", &token]);
        }
        self.start(name, &args)
    }

    /// Waits until `n` nodes are up, the agent's among them.
    fn wait_up(&mut self, index: usize, n: usize) {
        wait_for("the node to be up", || {
            assert!(self.processes[index].is_running(), "the agent ended:\n{}", self.processes[index].output());
            let nodes = self.run(&["nodes", "--json"]);
            let items = if nodes.code == 0 { nodes.json()["items"].as_array().cloned()? } else { return None };
            (items.len() == n && items.iter().all(|node| node["phase"] == "up")).then_some(())
        });
    }

    pub fn join_token(&self) -> String {
        self.run(&["nodes", "join-token", "--json"]).expect(0).json()["token"].as_str().expect("a token").to_owned()
    }

    fn wait_ready(&mut self, index: usize) {
        wait_for("the server to be ready", || {
            assert!(self.processes[index].is_running(), "the server ended:\n{}", self.processes[index].output());
            (self.run(&["status", "--json"]).code == 0).then_some(())
        });
    }

    /// `ps --json` of a workload: its copies that should run. None yet while it is not there.
    pub fn copies(&self, workload: &str) -> Vec<Value> {
        let said = self.run(&["ps", workload, "--json"]);
        if said.code == NOT_FOUND {
            return Vec::new();
        }
        said.expect(0).json()["items"].as_array().expect("a list").clone()
    }

    /// Waits until `n` copies of a workload are ready, and gives them.
    pub fn ready_copies(&self, workload: &str, n: usize) -> Vec<Value> {
        wait_for(&format!("{n} ready copies of {workload}"), || {
            let copies = self.copies(workload);
            (copies.len() == n && copies.iter().all(|c| c["ready"] == true)).then_some(copies)
        })
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for process in &self.processes {
                let output = process.output();
                let tail: Vec<&str> = output.lines().rev().take(40).collect();
                eprintln!("---- {} (last lines)", process.log.display());
                for line in tail.into_iter().rev() {
                    eprintln!("{line}");
                }
            }
        }
        // Asked first: `dev` takes its control groups with it.
        for process in &mut self.processes {
            if process.is_running() {
                process.signal(libc::SIGINT);
                let end = Instant::now() + Duration::from_secs(10);
                while process.is_running() && Instant::now() < end {
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
            process.kill();
        }
        // Copies outlive their agent by design; here they must not outlive the test.
        let root = self.dir.path().display().to_string();
        let left = pids_with(&root);
        for &pid in &left {
            // SAFETY: plain kill(2).
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        let end = Instant::now() + Duration::from_secs(5);
        while left.iter().any(|pid| Path::new(&format!("/proc/{pid}")).exists()) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        for owner in self.processes.iter().filter_map(|process| cgroup_owner(&process.output())) {
            remove_groups(&owner);
        }
    }
}

/// The directory of control groups of an agent, by what it said when it started.
fn cgroup_owner(output: &str) -> Option<String> {
    let said = output.lines().find(|line| line.starts_with("Optimus agent "))?;
    let node: optimus_common::NodeId = said.rsplit(", node ").next()?.trim().parse().ok()?;
    Some(format!("optimus-{}", node.short()))
}

/// Removes an agent's directory in every tree of control groups, with the empty groups in it.
fn remove_groups(owner: &str) {
    let trees = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten().map(|entry| entry.path().join(owner));
    for tree in trees.filter(|tree| tree.is_dir()) {
        for group in fs::read_dir(&tree).into_iter().flatten().flatten() {
            let _ = fs::remove_dir(group.path());
        }
        let _ = fs::remove_dir(&tree);
    }
}

/// Processes whose command line or environment names `text`.
pub fn pids_with(text: &str) -> Vec<i32> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir("/proc") else { return found };
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        if pid == std::process::id() as i32 {
            continue;
        }
        for file in ["cmdline", "environ"] {
            let mut bytes = Vec::new();
            let read = fs::File::open(entry.path().join(file)).and_then(|mut f| f.read_to_end(&mut bytes));
            if read.is_ok() && String::from_utf8_lossy(&bytes).contains(text) {
                found.push(pid);
                break;
            }
        }
    }
    found
}

/// `GET path` on a loopback port, over plain HTTP/1.0: status and body.
pub fn http_get(port: u16, path: &str) -> std::io::Result<(u16, String)> {
    use std::io::Write;
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let status = text.split_whitespace().nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    let body = text.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned());
    Ok((status, body))
}

/// Port of a copy by name of the port.
pub fn port_of(copy: &Value) -> u16 {
    let ports = copy["ports"].as_object().expect("ports");
    ports.values().next().and_then(Value::as_u64).expect("a port") as u16
}

pub fn pid_of(copy: &Value) -> i32 {
    copy["pid"].as_i64().expect("a pid") as i32
}
