//! The agent with real processes, limits and checks. Needs root and cgroups (v1, v2 or hybrid).
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use optimus_agent::agent::AgentError;
use optimus_agent::testing::{desired, probe, spec, test_env};
use optimus_common::protocol::{DesiredAlloc, Phase};
use optimus_common::reason::Reason;
use optimus_common::spec::{Check, Port, WorkloadSpec};
use optimus_common::time::Span;
use optimus_common::units::Bytes;
use support::{Node, shell, until};

fn copy(n: u128, spec: &WorkloadSpec, port: Option<u16>) -> DesiredAlloc {
    let ports = port.map(|p| ("http".to_owned(), p)).into_iter().collect();
    DesiredAlloc { index: n as u32, ports, ..desired(n, spec) }
}

/// A tiny web server on `$PORT`, ready when it answers.
fn web() -> WorkloadSpec {
    let mut spec = shell("exec busybox httpd -f -p $PORT -h /");
    spec.ports = vec![Port { name: "http".parse().unwrap(), fixed: None }];
    spec.health.readiness = Some(probe(Check::Http { path: "/proc/version".into() }));
    spec
}

fn kill(pid: u32, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
}

#[test]
fn three_copies_become_ready_and_a_killed_one_is_back_at_once() {
    let mut node = Node::new();
    let copies: Vec<_> = (0..3).map(|n| copy(n + 1, &web(), Some(node.ports.0 + n as u16))).collect();
    let begun = Instant::now();
    node.want(copies.clone());
    for copy in &copies {
        node.ready(copy.id);
    }
    let to_ready = begun.elapsed();
    let victim = node.ready(copies[1].id);
    let killed = Instant::now();
    kill(victim.pid.unwrap(), rustix::process::Signal::KILL);
    let again = node.until(copies[1].id, "running again", |s| s.restarts == 1 && s.phase == Phase::Running);
    println!("3 copies ready in {to_ready:?}; a killed one ran again after {:?}", killed.elapsed());
    assert_ne!(again.pid, victim.pid);
    assert_eq!(again.last_exit.unwrap().signal, Some(9));
    assert_eq!(node.ready(copies[0].id).restarts, 0);
    node.ready(copies[1].id);
}

#[test]
fn a_hundred_copies_start_together_and_stop_together() {
    let mut node = Node::new();
    let copies: Vec<_> = (0..100).map(|n| copy(n + 1, &shell("exec sleep 1000"), None)).collect();
    let begun = Instant::now();
    node.want(copies.clone());
    for copy in &copies {
        node.ready(copy.id);
    }
    println!("100 processes run after {:?}", begun.elapsed());
    let start_file = node.config.data_dir.join("allocs").join(copies[0].id.to_string()).join("1/start");
    assert!(!start_file.exists(), "the environment does not stay on disk");
    let begun = Instant::now();
    assert!(node.stop_all());
    println!("and are gone after {:?}", begun.elapsed());
    assert!(copies.iter().all(|c| node.processes(c.id).is_empty()));
    node.die();
}

#[test]
fn the_death_of_the_agent_touches_no_workload_and_loses_no_exit_code() {
    let mut node = Node::new();
    let stays = copy(1, &web(), Some(node.ports.0));
    let leaves = copy(2, &shell("echo up; trap 'echo bye; exit 42' TERM; while :; do sleep 0.05; done"), None);
    node.want([stays.clone(), leaves.clone()]);
    let (before, leaver) = (node.ready(stays.id), node.ready(leaves.id));
    until("it is up", || node.logs(leaves.id, None).contains(&"up".to_owned()).then_some(()));
    node.die();
    kill(leaver.pid.unwrap(), rustix::process::Signal::TERM);
    until("it has left", || node.processes(leaves.id).is_empty().then_some(()));
    node.start();
    let after = node.ready(stays.id);
    assert_eq!((after.pid, after.restarts, after.started_at), (before.pid, 0, before.started_at));
    let missed = node.until(leaves.id, "running again", |s| s.phase == Phase::Running && s.restarts == 1);
    assert_eq!(missed.last_exit.unwrap().code, Some(42));
    assert!(node.logs(leaves.id, None).starts_with(&["up".into(), "bye".into()]));
    assert_eq!(node.workloads().generation(), 1, "from the ledger");
}

#[test]
fn many_deaths_of_the_agent_at_any_moment_leave_one_run_each() {
    let mut node = Node::new();
    let a = copy(1, &web(), Some(node.ports.0));
    node.want([a.clone()]);
    for round in 0..8 {
        // At once, and a little later each round: while starting, before and after the first check.
        std::thread::sleep(std::time::Duration::from_millis(round * 7));
        node.die();
        node.start();
    }
    let status = node.ready(a.id);
    assert_eq!(status.restarts, 0, "{status:?}");
    assert_eq!(node.processes(a.id).len(), 1);
}

#[test]
fn a_stop_ends_all_processes_also_those_that_ignore_it_and_removes_the_cgroups() {
    let mut node = Node::new();
    let mut spec = shell("trap '' TERM; setsid sleep 1000 & sleep 1000 & wait; sleep 1000");
    spec.stop.grace = Span::millis(300);
    let a = copy(1, &spec, None);
    node.want([a.clone()]);
    node.ready(a.id);
    until("its children are there", || (node.processes(a.id).len() >= 3).then_some(()));
    assert!(!node.cgroups().is_empty());
    node.stop(a.id);
    let stopped = node.until(a.id, "stopped", |s| s.phase == Phase::Stopped);
    assert_eq!(stopped.reason, Some(Reason::StopRequested));
    assert_eq!(node.processes(a.id), Vec::<i32>::new());
    let id = a.id.to_string();
    until("its cgroups are gone", || node.cgroups().iter().all(|c| !c.to_string_lossy().contains(&id)).then_some(()));
    node.drop_all();
    until("forgotten", || node.workloads().full_report().gone.contains(&a.id).then_some(()));
}

#[test]
fn stopping_the_whole_agent_stops_everything_and_its_next_start_runs_it_again() {
    let mut node = Node::new();
    let a = copy(1, &web(), Some(node.ports.0));
    node.want([a.clone()]);
    node.ready(a.id);
    assert!(node.stop_all());
    assert_eq!(node.processes(a.id), Vec::<i32>::new());
    assert_eq!(node.cgroups(), Vec::<std::path::PathBuf>::new());
    node.die();
    node.start();
    node.ready(a.id);
}

#[test]
fn what_cannot_start_says_why() {
    let mut node = Node::new();
    let plain = node.dir.path().join("not-executable");
    fs::write(&plain, "#!/bin/sh\n").unwrap();
    fs::set_permissions(&plain, fs::Permissions::from_mode(0o644)).unwrap();
    let plain = plain.to_str().unwrap();
    let with = |argv: &[&str], change: fn(&mut WorkloadSpec)| {
        let mut spec = spec(argv);
        change(&mut spec);
        spec
    };
    let cases = [
        (with(&["no-such-program"], |_| {}), Reason::CommandNotFound { command: "no-such-program".into() }),
        (with(&[plain], |_| {}), Reason::NotExecutable { command: plain.into() }),
        (with(&["true"], |s| s.dir = Some("/no/such/dir".into())), Reason::DirMissing { dir: "/no/such/dir".into() }),
        (with(&["true"], |s| s.user = Some("nobody-of-that-name".into())), Reason::UserUnknown { user: "nobody-of-that-name".into() }),
    ];
    for (n, (spec, reason)) in cases.into_iter().enumerate() {
        let a = copy(n as u128 + 1, &spec, None);
        node.want([a.clone()]);
        let told = node.until(a.id, "told", |s| s.reason.as_ref().is_some_and(|r| *r.root() == reason));
        assert_eq!(told.phase, Phase::Backoff, "it may be mended: {told:?}");
    }
}

#[test]
fn a_port_taken_by_a_stranger_is_named_with_its_holder() {
    let mut node = Node::new();
    let stranger = TcpListener::bind(("127.0.0.1", node.ports.0)).unwrap();
    let dynamic = copy(1, &web(), Some(node.ports.0));
    let mut spec = web();
    spec.ports[0].fixed = Some(node.ports.0);
    let fixed = copy(2, &spec, Some(node.ports.0));
    node.want([dynamic.clone(), fixed.clone()]);
    let failed = node.until(dynamic.id, "failed", |s| s.phase == Phase::Failed);
    let Some(Reason::PortTaken { port, holder: Some(holder) }) = failed.reason else { panic!("{failed:?}") };
    assert_eq!(port, node.ports.0);
    assert!(holder.ends_with(&format!("(pid {})", std::process::id())), "{holder}");
    node.until(fixed.id, "waiting for its port", |s| {
        s.phase == Phase::Backoff && matches!(s.reason.as_ref().map(Reason::root), Some(Reason::PortTaken { .. }))
    });
    drop(stranger);
    node.ready(fixed.id);
}

#[test]
fn a_copy_on_the_wrong_port_is_told_which_one_it_listens_on() {
    let mut node = Node::new();
    let (right, wrong) = (node.ports.0, node.ports.0 + 1);
    let mut spec = web();
    spec.run = shell(&format!("echo starting on the wrong port; exec busybox httpd -f -p {wrong} -h /")).run;
    let a = copy(1, &spec, Some(right));
    node.want([a.clone()]);
    let unready = node.until(a.id, "told", |s| matches!(&s.reason, Some(Reason::NotReady { listening, .. }) if !listening.is_empty()));
    let Some(Reason::NotReady { probe, last, listening, port }) = unready.reason else { panic!() };
    assert_eq!(probe, format!("GET http://127.0.0.1:{right}/proc/version"));
    assert_eq!((last.as_str(), listening, port), ("connection refused", vec![wrong], Some(right)));
    assert_eq!(unready.last_lines, ["starting on the wrong port"]);
    assert_eq!((unready.phase, unready.ready), (Phase::Running, false));
}

#[test]
fn running_out_of_memory_is_named_with_limit_and_peak() {
    let mut node = Node::new();
    let mut spec = spec(&["/usr/bin/python3", "-c", "x = bytearray(200 << 20)"]);
    spec.resources.memory_limit = Bytes::mib(32);
    let a = copy(1, &spec, None);
    node.want([a.clone()]);
    let told = node.until(a.id, "out of memory", |s| s.last_exit.as_ref().is_some_and(|e| e.oom.is_some()));
    let oom = told.last_exit.unwrap().oom.unwrap();
    assert_eq!(oom.limit, Bytes::mib(32));
    assert!(oom.kills >= 1 && oom.peak.0 > 24 << 20, "{oom:?}");
    node.until(a.id, "told why", |s| matches!(s.reason.as_ref().map(Reason::root), Some(Reason::OutOfMemory { .. })));
}

#[test]
fn a_crash_loop_is_visible_with_its_last_lines() {
    let mut node = Node::new();
    let mut spec = shell("echo cannot find the database >&2; exit 7");
    spec.restart.delay = Span::millis(100);
    let a = copy(1, &spec, None);
    node.want([a.clone()]);
    let looping = node.until(a.id, "in a crash loop", |s| matches!(s.reason, Some(Reason::CrashLoop { .. })));
    let Some(Reason::CrashLoop { restarts, last, .. }) = &looping.reason else { panic!() };
    assert!(*restarts >= 3 && matches!(**last, Reason::Exited { .. }));
    assert_eq!(looping.last_exit.unwrap().code, Some(7));
    assert_eq!(looping.last_lines, ["cannot find the database"]);
    assert_eq!(looping.phase, Phase::Backoff);
}

#[test]
fn a_stuck_copy_is_restarted() {
    let mut node = Node::new();
    let mut spec = web();
    spec.health.liveness = Some(probe(Check::Http { path: "/proc/version".into() }));
    let a = copy(1, &spec, Some(node.ports.0));
    node.want([a.clone()]);
    let pid = node.ready(a.id).pid.unwrap();
    kill(pid, rustix::process::Signal::STOP);
    let told = node.until(a.id, "found stuck", |s| matches!(s.reason, Some(Reason::LivenessFailed { .. })) || s.restarts == 1);
    assert!(told.restarts <= 1);
    let again = node.until(a.id, "ready again", |s| s.ready && s.restarts == 1);
    assert_ne!(again.pid, Some(pid));
}

#[test]
fn the_environment_is_clean_and_the_tmp_private() {
    let mut node = Node::with(|c| c.workload_user = Some("nobody".into()));
    fs::set_permissions(node.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut spec = shell(
        "id -un; pwd; echo $PORT $PORT_HTTP $OPTIMUS_WORKLOAD $OPTIMUS_NODE $MINE; touch $TMPDIR/x && echo tmp; env | grep -c CARGO; sleep 1000",
    );
    spec.env.insert("MINE".into(), "mine".into());
    spec.dir = Some("/usr".into());
    let port = node.ports.0;
    let a = copy(1, &spec, Some(port));
    node.want([a.clone()]);
    node.ready(a.id);
    let lines = until("it has spoken", || Some(node.logs(a.id, None)).filter(|l| l.len() == 5));
    assert_eq!(lines, ["nobody".to_owned(), "/usr".into(), format!("{port} {port} web test-node mine"), "tmp".into(), "0".into()]);
    assert_eq!(node.logs(a.id, Some(1)), ["0"]);
}

#[test]
fn a_lost_supervisor_takes_its_workload_with_it_and_it_is_started_again() {
    let mut node = Node::new();
    let a = copy(1, &shell("sleep 1000 & sleep 1000 & wait"), None);
    node.want([a.clone()]);
    let before = node.ready(a.id);
    let parent = procfs::process::Process::new(before.pid.unwrap() as i32).unwrap().stat().unwrap().ppid;
    kill(parent as u32, rustix::process::Signal::KILL);
    let again = node.until(a.id, "running again", |s| s.restarts == 1 && s.phase == Phase::Running);
    assert_ne!(again.pid, before.pid);
    until("only the new one is left", || (node.processes(a.id).len() == 3).then_some(()));
    assert!(
        procfs::process::Process::new(before.pid.unwrap() as i32).and_then(|p| p.stat()).is_ok_and(|s| s.state == 'Z')
            || !std::path::Path::new(&format!("/proc/{}", before.pid.unwrap())).exists()
    );
}

#[test]
fn a_second_agent_on_one_data_directory_is_refused() {
    let node = Node::new();
    let second = node.block_on(optimus_agent::agent::Agent::start(node.config.clone(), test_env()));
    assert!(matches!(second, Err(AgentError::InUse(_))));
}
