//! The container driver against a real engine of the test's own. Needs root; `scripts/setup test` installs the rest.
#![allow(clippy::unwrap_used)]

mod engine;
mod images;
#[path = "../support/mod.rs"]
mod support;
mod survival;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use engine::{Engine, IMAGE};
use optimus_agent::testing::{desired, probe};
use optimus_common::AllocId;
use optimus_common::protocol::{DesiredAlloc, Phase};
use optimus_common::reason::Reason;
use optimus_common::spec::{Check, Container, Driver, Mount, Network, Port, Run, Source, WorkloadSpec};
use optimus_common::time::Span;
use optimus_common::units::{Bytes, Millicores};
use support::{Node, shell, until};

/// A container of [`IMAGE`] with this shell line.
fn contained(line: &str) -> WorkloadSpec {
    with(line, |_| {})
}

fn with(line: &str, change: impl FnOnce(&mut Container)) -> WorkloadSpec {
    let mut container = Container::of(IMAGE);
    change(&mut container);
    WorkloadSpec { driver: Driver::Container(Box::new(container)), ..shell(line) }
}

fn copy(n: u128, spec: &WorkloadSpec, port: Option<u16>) -> DesiredAlloc {
    let ports = port.map(|p| ("http".to_owned(), p)).into_iter().collect();
    DesiredAlloc { index: n as u32, ports, ..desired(n, spec) }
}

/// An agent that uses this engine.
fn node(engine: &Engine) -> Node {
    let socket = engine.socket();
    Node::with(|config| config.container_engine = Some(socket))
}

fn name(id: AllocId, attempt: u32) -> String {
    format!("optimus-{id}-{attempt}")
}

/// A tiny web server on `$PORT`, ready when it answers.
fn web() -> WorkloadSpec {
    let mut spec = contained("exec httpd -f -p $PORT -h /");
    spec.ports = vec![Port { name: "http".parse().unwrap(), fixed: None }];
    spec.health.readiness = Some(probe(Check::Http { path: "/mark".into() }));
    spec
}

fn get(port: u16, path: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn ten_copies_start_together_serve_their_ports_and_leave_nothing() {
    let engine = Engine::new();
    engine.docker(&["run", "--detach", "--name", "stranger", "--label", "optimus.alloc=not-ours", IMAGE, "sleep", "1000"]);
    let mut node = node(&engine);
    assert!(node.workloads().facts().drivers.contains(&"container".to_owned()), "{:?}", node.workloads().facts());
    let (plain, mut inner) = (web(), web());
    if let Driver::Container(container) = &mut inner.driver {
        container.ports.insert("http".into(), 8080);
    }
    let copies: Vec<_> = (0..10).map(|n| copy(n + 1, if n == 0 { &inner } else { &plain }, Some(node.ports.0 + n as u16))).collect();
    let begun = Instant::now();
    node.want(copies.clone());
    let statuses: Vec<_> = copies.iter().map(|c| node.ready(c.id)).collect();
    println!("10 containers ready after {:?}", begun.elapsed());
    let begun = Instant::now();
    for n in 0..10 {
        engine.docker(&["run", "--detach", "--name", &format!("peer-{n}"), IMAGE, "sleep", "1000"]);
    }
    println!("10 times `docker run --detach` took {:?}", begun.elapsed());
    for copy in &copies {
        assert!(get(copy.ports[0].1, "/mark").contains(" 200 "));
    }
    // Its process is in a group of ours, beside its limits.
    let status = &statuses[3];
    let cgroup = std::fs::read_to_string(format!("/proc/{}/cgroup", status.pid.unwrap())).unwrap();
    assert!(cgroup.contains(&format!("/{}-containers/{}.1/", node.owner, status.id)), "{cgroup}");
    let label = engine.docker(&["inspect", "--format", "{{index .Config.Labels \"optimus.workload\"}}", &name(status.id, 1)]);
    assert_eq!(label, "web");
    node.drop_all();
    until("only strangers are left", || (engine.containers().len() == 11).then_some(()));
    assert!(engine.containers().contains(&"stranger".to_owned()));
    assert_eq!(engine.docker(&["inspect", "--format", "{{.State.Running}}", "stranger"]), "true");
    assert!(node.stop_all());
    assert!(groups(&node.owner).is_empty(), "{:?}", groups(&node.owner));
}

/// Directories left of a node's containers in any hierarchy.
fn groups(owner: &str) -> Vec<std::path::PathBuf> {
    let mut roots = vec![std::path::PathBuf::from("/sys/fs/cgroup")];
    roots.extend(std::fs::read_dir("/sys/fs/cgroup").unwrap().map(|e| e.unwrap().path()));
    roots.into_iter().map(|root| root.join(format!("{owner}-containers"))).filter(|dir| dir.exists()).collect()
}

#[test]
fn ends_are_told_exactly_and_the_neighbour_does_not_notice() {
    let engine = Engine::new();
    let mut node = node(&engine);
    let neighbour = copy(1, &web(), Some(node.ports.0));
    node.want([neighbour.clone()]);
    let before = node.ready(neighbour.id);

    let mut hog = contained("echo eating; exec dd if=/dev/zero of=/dev/null bs=300M count=1");
    hog.resources.memory_limit = Bytes::mib(64);
    hog.resources.memory_request = Bytes::mib(64);
    let (hog, liar, quick) = (copy(2, &hog, None), copy(3, &contained("exit 137"), None), copy(4, &contained("echo done; exit 3"), None));
    node.want([hog.clone(), liar.clone(), quick.clone()]);
    let ended = |status: &optimus_common::protocol::AllocStatus| status.last_exit.is_some();
    let status = node.until(hog.id, "out of memory", ended);
    let oom = status.last_exit.as_ref().and_then(|exit| exit.oom);
    assert!(oom.is_some_and(|oom| oom.limit == Bytes::mib(64) && oom.peak > Bytes::mib(48) && oom.kills > 0), "{status:?}");
    assert_eq!(status.last_lines, ["eating"]);
    let exit = node.until(liar.id, "ended", ended).last_exit.unwrap();
    assert_eq!((exit.code, exit.oom), (Some(137), None), "137 by itself is no want of memory");
    let status = node.until(quick.id, "ended", ended);
    assert_eq!((status.last_exit.unwrap().code, status.last_lines), (Some(3), vec!["done".to_owned()]));

    let mut child = contained("dd if=/dev/zero of=/dev/null bs=300M count=1; echo child ended with $?; exit 0");
    child.resources.memory_limit = Bytes::mib(64);
    child.resources.memory_request = Bytes::mib(64);
    let child = copy(5, &child, None);
    node.want([child.clone()]);
    let exit = node.until(child.id, "ended", ended).last_exit.unwrap();
    assert_eq!(exit.code, Some(0));
    assert!(exit.oom.is_some(), "the kill of a child is told: {exit:?}");

    let after = node.ready(neighbour.id);
    assert_eq!((after.pid, after.restarts), (before.pid, 0));
}

#[test]
fn cpu_and_process_limits_hold_and_are_read_without_the_engine() {
    let engine = Engine::new();
    let mut node = node(&engine);
    let mut burner = contained("for i in 1 2 3 4; do (while :; do :; done) & done; wait");
    burner.resources.cpu = Millicores(200);
    burner.resources.pids = 32; // runc itself needs a dozen threads to start a container
    let burner = copy(1, &burner, None);
    node.want([burner.clone()]);
    let pid = node.until(burner.id, "running", |s| s.phase == Phase::Running && s.pid.is_some()).pid.unwrap();
    let group = optimus_agent::isolation::group_of(pid).unwrap();
    until("all children burn", || (group.pids().len() == 5).then_some(()));
    assert_eq!(group.read_back().pids, Some(32));
    let (from, begun) = (group.usage().unwrap().cpu_usec, Instant::now());
    until("it was throttled for a while", || (begun.elapsed() > Duration::from_secs(2)).then_some(()));
    let used = (group.usage().unwrap().cpu_usec - from) as f64 / begun.elapsed().as_micros() as f64;
    assert!(used < 0.3, "{used} of a core, 0.2 allowed");
    assert!(used > 0.02, "{used} of a core: it does not run at all");
}

#[test]
fn commands_check_health_inside_and_late_ones_are_ended() {
    let engine = Engine::new();
    let mut node = node(&engine);
    let mut spec = contained("sleep 1; touch /tmp/ready; exec sleep 1000");
    let argv = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
    spec.health.readiness = Some(probe(Check::Command { argv: argv(&["test", "-e", "/tmp/ready"]) }));
    let good = copy(1, &spec, None);
    spec.health.readiness = Some(probe(Check::Command { argv: argv(&["sh", "-c", "echo no database; exit 7"]) }));
    let bad = copy(2, &spec, None);
    let mut stuck = probe(Check::Command { argv: argv(&["sleep", "777"]) });
    stuck.timeout = Span::millis(300);
    spec.health.readiness = Some(stuck);
    let late = copy(3, &spec, None);
    node.want([good.clone(), bad.clone(), late.clone()]);
    node.ready(good.id);
    let says = |status: &optimus_common::protocol::AllocStatus, what: &str| matches!(&status.reason, Some(Reason::NotReady { last, .. }) if last.contains(what));
    node.until(bad.id, "not ready with its reason", |s| says(s, "exit status 7: no database"));
    let status = node.until(late.id, "not ready for being late", |s| says(s, "no answer within 300ms"));
    let group = optimus_agent::isolation::group_of(status.pid.unwrap()).unwrap();
    // Two at most: the one that is asked and the one being killed.
    until("late commands do not pile up", || (group.pids().len() <= 3).then_some(()));
}

#[test]
fn mounts_users_networks_and_commands_are_as_asked() {
    let engine = Engine::new();
    let mut node = node(&engine);
    let data = tempfile::tempdir().unwrap();
    std::fs::write(data.path().join("given"), "from the host\n").unwrap();
    let mount = |source, target: &str, read_only| Mount { source, target: target.into(), read_only };
    let path = Source::Path(data.path().display().to_string());
    let line = "cat /data/given; echo x > /data/new || echo read-only; id; echo kept > /cache/kept; ls /sys/class/net; pwd; sleep 1000";
    let mut spec = with(line, |c| {
        c.mounts = vec![mount(path, "/data", true), mount(Source::Volume("cache".into()), "/cache", false)];
        c.network = Network::None;
    });
    spec.user = None;
    spec.dir = Some("/tmp".into());
    let a = copy(1, &spec, None);
    let mut words = with("", |c| c.entrypoint = Some(vec!["/bin/echo".into(), "entry".into()]));
    words.run = Run::Argv(vec!["and".into(), "$HOME".into()]);
    words.user = Some("1234:5678".into());
    let b = copy(2, &words, None);
    node.want([a.clone(), b.clone()]);
    let lines = until("it printed", || Some(node.logs(a.id, None)).filter(|l| l.iter().any(|l| l == "/tmp")));
    assert!(lines.contains(&"from the host".to_owned()) && lines.contains(&"read-only".to_owned()), "{lines:?}");
    assert!(lines.contains(&"lo".to_owned()) && !lines.contains(&"eth0".to_owned()), "{lines:?}");
    until("the words are given as they are", || node.logs(b.id, None).contains(&"entry and $HOME".to_owned()).then_some(()));
    // The volume is the project's, and outlives the copy.
    assert!(engine.docker(&["volume", "ls", "--quiet"]).contains("optimus.p.dev.cache"));
    node.drop_all();
    until("containers are gone", || engine.containers().is_empty().then_some(()));
    assert!(engine.docker(&["volume", "ls", "--quiet"]).contains("optimus.p.dev.cache"));
    engine.docker(&["volume", "rm", "optimus.p.dev.cache"]);

    // What holds the agent's secrets or the engine is refused.
    let agents = node.config.data_dir.display().to_string();
    let sock = engine.socket().display().to_string();
    for (n, source) in [agents, sock, "/".to_owned(), "/nonexistent".to_owned()].into_iter().enumerate() {
        let spec = with("sleep 1000", |c| c.mounts = vec![mount(Source::Path(source), "/data", false)]);
        let copy = copy(10 + n as u128, &spec, None);
        node.want([copy.clone()]);
        let status = node.until(copy.id, "refused", |s| s.phase == Phase::Backoff);
        assert!(matches!(status.reason.unwrap().root(), Reason::StartFailed { step, .. } if step.starts_with("mount ")));
    }
}

#[test]
fn a_stop_is_asked_for_and_then_enforced() {
    let engine = Engine::new();
    let mut node = node(&engine);
    let polite = copy(1, &contained("trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.05; done"), None);
    let mut deaf = contained("trap '' TERM; echo up; while :; do sleep 0.05; done");
    deaf.stop.grace = Span::millis(500);
    let deaf = copy(2, &deaf, None);
    node.want([polite.clone(), deaf.clone()]);
    for copy in [&polite, &deaf] {
        until("it is up", || node.logs(copy.id, None).contains(&"up".to_owned()).then_some(()));
        node.stop(copy.id);
    }
    let status = node.until(polite.id, "stopped", |s| s.phase == Phase::Stopped);
    assert_eq!(status.last_exit.unwrap().code, Some(0));
    assert_eq!(node.logs(polite.id, None).last().unwrap(), "bye");
    let status = node.until(deaf.id, "stopped", |s| s.phase == Phase::Stopped);
    assert_eq!(status.last_exit.unwrap().code, Some(137));
    until("both are removed", || engine.containers().is_empty().then_some(()));
}

#[test]
fn what_cannot_start_says_why_and_leaves_nothing() {
    let engine = Engine::new();
    let mut node = node(&engine);
    let holder = std::net::TcpListener::bind(("0.0.0.0", node.ports.0)).unwrap();
    let mut missing = contained("");
    missing.run = Run::Argv(vec!["no-such-program".into()]);
    let mut never = with("true", |c| c.pull = optimus_common::spec::Pull::Never);
    if let Driver::Container(container) = &mut never.driver {
        container.image = "no-such-image:1".into();
    }
    let (taken, missing, never) = (copy(1, &web(), Some(node.ports.0)), copy(2, &missing, None), copy(3, &never, None));
    let network = copy(4, &with("sleep 1", |c| c.network = Network::Named("no-such-network".into())), None);
    node.want([taken.clone(), missing.clone(), never.clone(), network.clone()]);
    let status = node.until(taken.id, "moved on", |s| s.phase == Phase::Failed);
    assert!(matches!(status.reason, Some(Reason::PortTaken { port, .. }) if port == node.ports.0), "{status:?}");
    let status = node.until(missing.id, "refused", |s| s.phase == Phase::Backoff);
    assert!(matches!(status.reason.unwrap().root(), Reason::CommandNotFound { command } if command == "no-such-program"));
    let status = node.until(never.id, "refused", |s| s.phase == Phase::Backoff);
    let text = status.reason.unwrap().root().to_string();
    assert!(text.contains("no-such-image:1") && text.contains("never"), "{text}");
    let status = node.until(network.id, "refused", |s| s.phase == Phase::Backoff);
    assert!(status.reason.unwrap().root().to_string().contains("no-such-network"));
    drop(holder);
    node.drop_all();
    until("nothing is left", || engine.containers().is_empty().then_some(()));
}
