//! Replays `fuzz/corpus` through the fuzz targets: what once broke something stays whole.
//!
//! `UPDATE_EXPECT=1` writes the seeds that are missing; others are put there by hand, with the fix of what they broke.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use optimus_common::protocol::{
    AllocStatus, Blob, Desired, DesiredAlloc, Hello, JoinAnswer, JoinRequest, LogChunk, LogLine, LogRequest, Message, NodeFacts, Phase,
    Ping, Pong, Refused, RenewAnswer, RenewRequest, Report, Welcome,
};
use optimus_common::reason::{Exit, Oom, Reason};
use optimus_common::spec::{self, Context};
use optimus_common::{AllocId, Bytes, ClusterId, Name, NodeId, Span, Timestamp, WorkloadKey, codec};
use optimus_tests::fuzz_targets::TARGETS;
use optimus_tests::harness::repo_root;

const SPEC: &str = r#"name = "web"
run = "python3 app.py --bind 0.0.0.0"
copies = 3
ports = { http = "auto", admin = 9000 }
health = { http = "/healthz", interval = "5s", port = "admin" }
liveness = "tcp"
cpu = 0.5
memory = "128M..256M"
env.LOG = "info"
env.N = 4
labels = { team = "shop" }
restart = { delay = "1s", delay_max = "1m" }
stop = { signal = "INT", grace = "30s" }
update = { strategy = "canary", parallel = 2, deadline = "5m" }
secrets = ["DATABASE_URL"]

[env.prod]
copies = 5
"#;

fn context() -> Context {
    Context { default_project: Name::new("shop").ok(), base_dir: "/srv/shop".into(), environment: None }
}

/// One good input for each way through each target.
fn seeds() -> Vec<(&'static str, String, Vec<u8>)> {
    let project = spec::parse_toml("optimus.toml", SPEC, &context()).unwrap().spec;
    let workload = project.workloads.values().next().unwrap();
    let id = |n: u128| uuid::Uuid::from_u128(n);
    let exit = Exit {
        code: None,
        signal: Some(9),
        oom: Some(Oom { limit: Bytes::mib(64), peak: Bytes::mib(64), kills: 1 }),
        at: Timestamp(1_700_000_000_000),
        ran_for: Span::secs(3),
    };
    let reason = Reason::CrashLoop {
        restarts: 3,
        next_start: Timestamp(1_700_000_009_000),
        last: Box::new(Reason::OutOfMemory { oom: exit.oom.unwrap(), exit: exit.clone() }),
    };
    let status = AllocStatus {
        id: AllocId(id(1)),
        seq: 4,
        phase: Phase::Backoff,
        ready: false,
        ready_since: None,
        reason: Some(reason.clone()),
        restarts: 3,
        pid: Some(4321),
        started_at: Some(Timestamp(1_700_000_000_000)),
        last_exit: Some(exit),
        unenforced: vec!["memory".into()],
        last_lines: vec!["boom".into()],
        limits: None,
    };
    let key =
        WorkloadKey { project: project.project.clone(), environment: project.environment.clone(), workload: Name::new("web").unwrap() };
    let alloc = DesiredAlloc {
        id: AllocId(id(1)),
        key,
        index: 0,
        release: 7,
        run: true,
        ports: vec![("http".into(), 20_000), ("admin".into(), 9000)],
        spec: Blob::of(workload),
    };
    let facts = NodeFacts { name: "node-1".into(), ports: (20_000, 32_000), ..NodeFacts::default() };
    let messages: Vec<Message> = vec![
        Hello { versions: (1, 1), node: NodeId(id(2)), generation: 5, facts: Blob::of(&facts) }.into(),
        Welcome { version: 1, cluster: ClusterId(id(3)), heartbeat: Span::secs(1) }.into(),
        Refused { code: "OPT-1201".into(), message: "expired".into() }.into(),
        Desired { generation: 5, allocs: vec![alloc] }.into(),
        Report { generation: 5, statuses: vec![Blob::of(&status)], gone: vec![AllocId(id(4))] }.into(),
        Ping { n: 1 }.into(),
        Pong { n: 300 }.into(),
        JoinRequest { versions: (1, 1), token_id: "a".into(), secret: "b".into(), csr: vec![48, 0], name: "node-1".into() }.into(),
        JoinAnswer { cluster: ClusterId(id(3)), node: NodeId(id(2)), certificate: vec![48, 0], ca: vec![48, 0] }.into(),
        LogRequest { alloc: AllocId(id(1)), since: Some(Timestamp(5)), tail: Some(10), follow: true }.into(),
        LogChunk { lines: vec![LogLine { at: Timestamp(5), stderr: true, text: "boom".into() }] }.into(),
        RenewRequest { csr: vec![48, 0] }.into(),
        RenewAnswer { certificate: vec![48, 0], ca: vec![48, 0] }.into(),
    ];
    let mut seeds: Vec<(&str, String, Vec<u8>)> = Vec::new();
    for message in &messages {
        let name = format!("{message:?}").split(['(', ' ']).next().unwrap().to_lowercase();
        seeds.push(("frame", name, message.encode()));
    }
    seeds.push(("envelope", "project".into(), codec::envelope(1, 1, &project)));
    seeds.push(("envelope", "payload".into(), codec::to_msgpack(&project)));
    seeds.push(("msgpack", "workload".into(), codec::to_msgpack(workload)));
    seeds.push(("msgpack", "project".into(), codec::to_msgpack(&project)));
    seeds.push(("msgpack", "status".into(), codec::to_msgpack(&status)));
    seeds.push(("msgpack", "reason".into(), codec::to_msgpack(&reason)));
    seeds.push(("msgpack", "facts".into(), codec::to_msgpack(&facts)));
    seeds.push(("spec_toml", "flat".into(), SPEC.into()));
    let sections = "project = \"shop\"\n[service.web]\nrun = [\"a\", \"b\"]\nport = 80\n[job.nightly]\nrun = \"x | y\"\nschedule = \"0 3 * * *\"\ntimeout = \"1h\"\n[daemon.d]\nimage = \"i\"\n[env.prod.service.web]\ncpu = 2\nenv = { A = \"1\" }\n";
    seeds.push(("spec_toml", "sections".into(), sections.into()));
    seeds.push(("spec_json", "flat".into(), br#"{"name":"web","run":["a","b c"],"port":"auto","health":{"http":"/","interval":"2s"},"cpu":0.5,"memory":134217728,"env":{"A":1.5,"prod":{"copies":2}}}"#.to_vec()));
    seeds.push(("spec_json", "typed".into(), serde_json::to_vec(&project).unwrap()));
    for (name, text) in
        [("size", "1.5G"), ("span", "1m30s"), ("cores", "0.5"), ("name", "web-2"), ("command", "FOO=1 a 'b c' | \"d $E\" # f")]
    {
        seeds.push(("quantities", name.into(), text.into()));
    }
    seeds
}

#[test]
fn the_corpus_breaks_no_target() {
    let corpus = repo_root().join("fuzz/corpus");
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        for (target, name, bytes) in seeds() {
            let path = corpus.join(target).join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            if !path.exists() {
                fs::write(path, bytes).unwrap();
            }
        }
    }
    for (target, body) in TARGETS {
        let files = files(&corpus.join(target));
        assert!(!files.is_empty(), "no corpus for {target}");
        for (name, bytes) in files {
            if std::panic::catch_unwind(|| body(&bytes)).is_err() {
                panic!("fuzz/corpus/{target}/{name} breaks its target; see above");
            }
        }
    }
}

#[test]
fn what_we_write_today_breaks_no_target() {
    for (target, name, bytes) in seeds() {
        let (_, body) = TARGETS.iter().find(|(t, _)| *t == target).unwrap();
        if std::panic::catch_unwind(|| body(&bytes)).is_err() {
            panic!("the seed {target}/{name} breaks its target; see above");
        }
    }
}

#[test]
fn each_target_can_be_fuzzed() {
    let manifest = fs::read_to_string(repo_root().join("fuzz/Cargo.toml")).unwrap();
    let mut binaries: Vec<String> =
        files(&repo_root().join("fuzz/fuzz_targets")).into_iter().map(|(name, _)| name.trim_end_matches(".rs").to_owned()).collect();
    binaries.sort();
    let mut targets: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
    targets.sort();
    assert_eq!(binaries, targets);
    for target in targets {
        assert!(manifest.contains(&format!("name = \"{target}\"")), "{target} is no binary of fuzz/Cargo.toml");
    }
}

fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut found: Vec<(String, Vec<u8>)> = entries
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
        })
        .collect();
    found.sort();
    found
}
