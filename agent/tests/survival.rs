//! The agent as a process of its own: killed at any moment, and without rights.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead, BufReader, Lines};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;
use std::{env, fs};

use optimus_agent::agent::{Agent, AgentConfig};
use optimus_agent::testing::{desired, probe, test_env};
use optimus_common::protocol::{AllocStatus, Desired, DesiredAlloc, Phase};
use optimus_common::spec::Check;
use support::{runner, shell, until};

const ALLOC: u128 = 77;

/// Not a test but the agent process of the others: one copy wanted, its statuses on stdout, until it is killed or its
/// stdin is closed (then it stops everything).
#[test]
fn agent_process() {
    let Ok(dir) = env::var("OPTIMUS_TEST_DIR") else { return };
    let port: u16 = env::var("OPTIMUS_TEST_PORT").unwrap().parse().unwrap();
    let config = AgentConfig {
        data_dir: Path::new(&dir).join("agent"),
        runner: runner(),
        ports: (port, port),
        allow_unenforced: !rustix::process::geteuid().is_root(),
        workload_user: None,
        address: "127.0.0.1".into(),
        name: None,
        cgroup_owner: env::var("OPTIMUS_TEST_OWNER").unwrap(),
        labels: Default::default(),
        mock: false,
        container_engine: Some("/nonexistent/docker.sock".into()),
    };
    let mut spec = shell("echo up; exec busybox httpd -f -p $PORT -h /");
    spec.health.readiness = Some(probe(Check::Http { path: "/proc/version".into() }));
    let alloc = DesiredAlloc { ports: vec![("http".into(), port)], ..desired(ALLOC, &spec) };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let agent = Agent::start(config, test_env()).await.unwrap();
        let workloads = agent.workloads();
        workloads.accept(Desired { generation: 1, allocs: vec![alloc] }).await.unwrap();
        let closed = tokio::task::spawn_blocking(|| std::io::stdin().lines().count());
        let report = async {
            let mut report = workloads.full_report();
            loop {
                for status in &report.statuses {
                    println!("status {}", serde_json::to_string(&status.open::<AllocStatus>().unwrap()).unwrap());
                }
                report = workloads.next_report().await;
            }
        };
        tokio::select! {
            _ = closed => {}
            () = report => {}
        }
        assert!(agent.stop_all(Duration::from_secs(10)).await);
    });
}

struct Process {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Process {
    fn start(dir: &Path, owner: &str, port: u16, uid: Option<u32>) -> Self {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "agent_process", "--nocapture"]);
        command.env("OPTIMUS_TEST_DIR", dir).env("OPTIMUS_TEST_OWNER", owner).env("OPTIMUS_TEST_PORT", port.to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Some(uid) = uid {
            command.uid(uid).gid(uid);
        }
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Process { child, lines }
    }
    /// Reads statuses until one is ready. The test's harness kills what hangs.
    fn ready(&mut self) -> AllocStatus {
        for line in &mut self.lines {
            let Some(json) = line.unwrap().strip_prefix("status ").map(str::to_owned) else { continue };
            let status: AllocStatus = serde_json::from_str(&json).unwrap();
            if status.ready && status.phase == Phase::Running {
                return status;
            }
        }
        panic!("the agent ended: {:?}", self.child.wait());
    }
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
    /// Closes its stdin, upon which it stops everything.
    fn stop(mut self) {
        drop(self.child.stdin.take());
        for line in &mut self.lines {
            drop(line);
        }
        assert!(self.child.wait().unwrap().success());
    }
}

fn logs(dir: &Path) -> String {
    let alloc = dir.join("agent/allocs").join(desired(ALLOC, &shell("")).id.to_string());
    let segments = optimus_agent::logs::segments::list(&alloc).unwrap();
    segments.iter().map(|s| fs::read_to_string(&s.path).unwrap()).collect()
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Removes what is left when a test fails: the workload would outlive it, as it should.
struct CleanUp(String);

impl Drop for CleanUp {
    fn drop(&mut self) {
        if let Ok(root) = optimus_agent::isolation::CgroupRoot::open(&self.0) {
            root.sweep(&Default::default());
            root.remove().unwrap();
        }
    }
}

#[test]
fn an_agent_killed_at_any_moment_starts_nothing_twice_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let owner = format!("optimus-test-{}-kill", std::process::id());
    let _clean_up = CleanUp(owner.clone());
    let port = free_port();
    // Killed ever later: before the ledger is there, while the copy is prepared, started, checked, and running.
    for round in 0..30u64 {
        let process = Process::start(dir.path(), &owner, port, None);
        std::thread::sleep(Duration::from_millis(round * 3 / 2));
        process.kill();
    }
    let mut last = Process::start(dir.path(), &owner, port, None);
    let status = last.ready();
    let ups = logs(dir.path()).lines().filter(|l| l.ends_with(" up")).count();
    assert_eq!(ups, 1, "started more than once: {status:?}");
    last.kill();
    let mut again = Process::start(dir.path(), &owner, port, None);
    assert_eq!(again.ready().pid, status.pid);
    again.stop();
    let pid = status.pid.unwrap();
    until("the workload is gone", || optimus_runner::start_time(pid).is_none_or(|(_, state)| state == 'Z').then_some(()));
}

#[test]
fn an_agent_without_rights_runs_workloads_and_says_what_is_not_enforced() {
    const NOBODY: u32 = 65534;
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let owner = format!("optimus-test-{}-user", std::process::id());
    let mut process = Process::start(dir.path(), &owner, free_port(), Some(NOBODY));
    let status = process.ready();
    for limit in ["cpu", "memory", "pids"] {
        assert!(status.unenforced.iter().any(|u| u.starts_with(limit)), "{limit}: {:?}", status.unenforced);
    }
    let workload = procfs::process::Process::new(status.pid.unwrap() as i32).unwrap();
    assert_eq!(workload.uid().unwrap(), NOBODY);
    process.stop();
    let pid = status.pid.unwrap();
    until("the workload is gone", || optimus_runner::start_time(pid).is_none_or(|(_, state)| state == 'Z').then_some(()));
}
