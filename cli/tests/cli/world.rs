//! Running the binary in a place of its own, and objects of the API to answer with.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use optimus_common::api::v1::*;
use optimus_common::protocol::Phase;
use optimus_common::reason::Reason;
use optimus_common::{AllocId, DeploymentId, Name, NodeId, Timestamp, WorkloadKey};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::fake::{Fake, TOKEN};

/// No verb here takes longer, unless it hangs.
const RUN_MAX: Duration = Duration::from_secs(60);

/// A home and a folder to run in.
pub struct World {
    pub dir: tempfile::TempDir,
}

#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ran {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("not one JSON document ({error}): {self:?}"))
    }
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{self:#?}");
        self
    }
}

impl World {
    pub fn new() -> Self {
        World { dir: tempfile::tempdir().unwrap() }
    }

    /// With a context for `fake`.
    pub fn with(fake: &Fake) -> Self {
        let world = World::new();
        world.context("fake", &fake.url(), &fake.ca_pem, TOKEN);
        world
    }

    pub fn context(&self, name: &str, url: &str, ca_pem: &str, token: &str) {
        let text = json!({ "url": url, "ca_pem": ca_pem, "token": token }).to_string();
        let path = self.write(&format!("config/optimus/contexts/{name}.json"), &text);
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
    }

    pub fn write(&self, path: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let work = self.dir.path().join("work");
        std::fs::create_dir_all(&work).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_optimus"));
        command
            .args(args)
            .env_clear()
            .env("HOME", self.dir.path())
            .env("XDG_CONFIG_HOME", self.dir.path().join("config"))
            .env("TZ", "UTC")
            .current_dir(work)
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        finish(self.command(args))
    }

    /// With stdin, stdout and stderr on a terminal; `typed` is on its keyboard.
    pub fn run_on_a_terminal(&self, args: &[&str], typed: &str) -> Ran {
        let (mut near, far) = terminal();
        near.write_all(typed.as_bytes()).unwrap();
        let mut command = self.command(args);
        let stdio = || Stdio::from(far.try_clone().unwrap());
        command.env("TERM", "xterm").stdin(stdio()).stdout(stdio()).stderr(stdio());
        let mut child = command.spawn().unwrap();
        drop(command);
        drop(far);
        // Ends with an error once the last writer is gone.
        let reader = std::thread::spawn(move || {
            let (mut all, mut piece) = (Vec::new(), [0; 4096]);
            while let Ok(n @ 1..) = near.read(&mut piece) {
                all.extend_from_slice(&piece[..n]);
            }
            String::from_utf8_lossy(&all).into_owned()
        });
        let code = wait(&mut child);
        Ran { code, out: reader.join().unwrap(), err: String::new() }
    }
}

pub fn finish(mut command: Command) -> Ran {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    fn read(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
        std::thread::spawn(move || {
            let mut text = String::new();
            from.read_to_string(&mut text).unwrap();
            text
        })
    }
    let (out, err) = (read(child.stdout.take().unwrap()), read(child.stderr.take().unwrap()));
    let code = wait(&mut child);
    Ran { code, out: out.join().unwrap(), err: err.join().unwrap() }
}

pub fn wait(child: &mut std::process::Child) -> i32 {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code().unwrap_or(-1);
        }
        if started.elapsed() > RUN_MAX {
            child.kill().unwrap();
            panic!("still running after {RUN_MAX:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A pair of terminal ends: ours, and the one of the process.
fn terminal() -> (std::fs::File, OwnedFd) {
    let (mut near, mut far) = (0, 0);
    let size = libc::winsize { ws_row: 40, ws_col: 160, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: both pointers are to live integers, the size is copied, name and termios may be null.
    let opened = unsafe { libc::openpty(&mut near, &mut far, std::ptr::null_mut(), std::ptr::null(), &size) };
    assert_eq!(opened, 0, "openpty failed");
    // SAFETY: openpty gave us both, and nothing else owns them.
    let (near, far) = unsafe { (OwnedFd::from_raw_fd(near), OwnedFd::from_raw_fd(far)) };
    (std::fs::File::from(near), far)
}

pub fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

pub fn key(text: &str) -> WorkloadKey {
    let parts: Vec<&str> = text.split('/').collect();
    WorkloadKey { project: name(parts[0]), environment: name(parts[1]), workload: name(parts[2]) }
}

pub fn id(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

/// A spec as the server holds it.
pub fn spec_json() -> Value {
    json!({
        "kind": "service", "driver": "process", "run": {"argv": ["python3", "app.py"]}, "copies": 2, "ports": [{"name": "http"}],
        "resources": {"cpu": 0.5, "memory_request": 67108864, "memory_limit": 134217728, "pids": 512},
        "health": {}, "restart": {"delay": "1s", "delay_max": "1m", "reset_after": "10m"}, "stop": {"signal": "TERM", "grace": "10s"},
        "update": {"strategy": "rolling", "parallel": 1, "deadline": "5m", "min_ready": "0s"}, "logs": {"size": 10485760},
    })
}

pub fn workload(text: &str) -> Workload {
    Workload {
        key: key(text),
        release: 2,
        phase: WorkloadPhase::Ready,
        copies_wanted: 2,
        copies_ready: 2,
        copies_running: 2,
        restarts: 0,
        created_at: Timestamp(1_700_000_000_000),
        updated_at: Timestamp(1_700_000_000_000),
        revision: 7,
        spec: serde_json::from_value(spec_json()).unwrap(),
        deployment: None,
        reason: None,
        endpoints: vec!["http://127.0.0.1:20000".into(), "http://127.0.0.1:20001".into()],
    }
}

pub fn page<T: serde::Serialize>(items: Vec<T>) -> Value {
    json!({ "items": items, "index": 7 })
}

pub fn deployment(n: u128, of: &str, phase: DeploymentPhase, ready: u32) -> Deployment {
    Deployment {
        id: DeploymentId(id(n)),
        key: key(of),
        release: 2,
        from_release: None,
        phase,
        ready,
        wanted: 2,
        created_at: Timestamp(1_700_000_000_000),
        ended_at: phase.is_final().then_some(Timestamp(1_700_000_002_100)),
        deadline_at: None,
        reason: None,
        trigger: "deploy".into(),
        since: None,
        strategy: "rolling".into(),
        weight: None,
        steps: vec![],
        paused: false,
        promoted: true,
        release_step: None,
        traffic: None,
    }
}

pub fn copy(of: &str, index: u32, phase: Phase, ready: bool) -> Allocation {
    Allocation {
        id: AllocId(id(1000 + u128::from(index))),
        key: key(of),
        name: format!("{}-{index}", key(of).workload),
        index,
        release: 2,
        node: Some(NodeId(id(1))),
        node_name: Some("host-1".into()),
        desired_run: true,
        phase,
        ready,
        current: true,
        restarts: 0,
        pid: Some(99),
        ports: BTreeMap::from([("http".to_owned(), 20000)]),
        endpoint: Some(format!("127.0.0.1:2000{index}")),
        created_at: Timestamp(1_700_000_000_000),
        started_at: Some(Timestamp(1_700_000_001_000)),
        reason: None,
        last_exit: None,
        unenforced: vec![],
        last_lines: vec![],
        limits: None,
        devices: vec![],
        volumes: vec![],
    }
}

pub fn reason(reason: &Reason) -> Option<ReasonView> {
    Some(ReasonView::from(reason))
}
