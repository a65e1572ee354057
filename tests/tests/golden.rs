//! Bytes that releases left on disks and wires decode for ever.
//!
//! `UPDATE_EXPECT=1` writes files that are missing; it never rewrites one. A change that fails here changed the
//! meaning of bytes that exist: give it a new version instead.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use optimus_common::codec::{self, FRAME_HEAD};
use optimus_common::ids::RequestId;
use optimus_common::join_token::Role;
use optimus_common::protocol::*;
use optimus_common::reason::{Exit, NodeRefusal, Oom, Refusal};
use optimus_common::spec::{self, Context, WorkloadSpec};
use optimus_common::{
    AllocId, Bytes, ClusterId, DeploymentId, Millicores, Name, NodeId, Reason, RunId, Span, Timestamp, TokenId, WorkloadKey,
};
use optimus_core::deployments::analysis::Sample;
use optimus_core::state::command::*;
use optimus_core::state::{Due, Member, Proposal, RotationPhase, RunPhase, SkipReason, State};
use optimus_core::state::{Layout, Pool, Quota, QuotaKey, Rewrap, SecretKey, Vault, VaultKey, Volume, VolumeKey};
use optimus_tests::harness::repo_root;
use uuid::Uuid;

fn uuid(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

fn key() -> WorkloadKey {
    let name = |n: &str| Name::new(n).unwrap();
    WorkloadKey { project: name("shop"), environment: name("prod"), workload: name("web") }
}

fn spec_of(text: &str) -> WorkloadSpec {
    let context = Context { default_project: Name::new("shop").ok(), base_dir: "/srv/shop".into(), environment: None };
    spec::parse_toml("optimus.toml", text, &context).unwrap().spec.workloads.into_values().next().unwrap()
}

fn full_spec() -> WorkloadSpec {
    spec_of(
        "name = \"web\"\nrun = [\"python3\", \"app.py\"]\nuser = \"www\"\ncopies = 3\nports = { http = \"auto\", admin = 9000 }\ncpu = 0.5\nmemory = \"64M..128M\"\n\
         pids = 64\nsecrets = [\"TOKEN\"]\nenv = { A = \"1\" }\nlabels = { team = \"a\" }\nhealth = { http = \"/h\", port = \"admin\", healthy_after = 2 }\n\
         liveness = \"tcp\"\nrestart = { delay = \"2s\" }\nstop = { signal = \"INT\", grace = \"5s\" }\nupdate = { strategy = \"canary\", parallel = 2 }\nlogs = { size = \"1M\" }\n",
    )
}

fn exit() -> Exit {
    let oom = Some(Oom { limit: Bytes(64), peak: Bytes(63), kills: 2 });
    Exit { code: None, signal: Some(9), oom, at: Timestamp(5), ran_for: Span(7) }
}

fn status() -> AllocStatus {
    let last = Box::new(Reason::OutOfMemory { exit: exit(), oom: exit().oom.unwrap() });
    AllocStatus {
        id: AllocId(uuid(7)),
        seq: 9,
        phase: Phase::Backoff,
        ready: false,
        ready_since: Some(Timestamp(3)),
        reason: Some(Reason::CrashLoop { restarts: 3, next_start: Timestamp(9), last }),
        restarts: 3,
        pid: Some(11),
        started_at: Some(Timestamp(4)),
        last_exit: Some(exit()),
        unenforced: vec!["cpu: no right".into()],
        last_lines: vec!["boom".into()],
        limits: None,
    }
}

fn facts() -> NodeFacts {
    NodeFacts {
        name: "host-1".into(),
        version: "0.1.0".into(),
        cpu: Millicores(4000),
        memory: Bytes(1 << 33),
        arch: "x86_64".into(),
        kernel: "6.1".into(),
        cgroup: "v2".into(),
        unenforced: vec![],
        drivers: vec!["process".into()],
        ports: (20000, 29999),
        address: "10.0.0.5".into(),
        boot_id: "b".into(),
        labels: BTreeMap::from([("zone".into(), "a".into())]),
        ..NodeFacts::default()
    }
}

fn commands() -> Vec<(&'static str, Command)> {
    let (node, alloc, deployment) = (NodeId(uuid(1)), AllocId(uuid(7)), DeploymentId(uuid(3)));
    let nodes = vec![NodeRefusal { node: "host-1".into(), refusal: Refusal::Cpu { asked: Millicores(500), free: Millicores(0) } }];
    let plan = Plan {
        place: vec![Placement { alloc, key: key(), index: 1, release: 2, node, ports: vec![("http".into(), 20_001)] }],
        stop: vec![(alloc, Reason::Replaced { release: 2 })],
        forget: vec![alloc],
        deployments: vec![
            DeploymentStep::Progress { id: deployment, ready: 2 },
            DeploymentStep::Succeed { id: deployment },
            DeploymentStep::Fail { id: deployment, reason: Reason::NoNodeFits { nodes, counts: vec![] } },
            DeploymentStep::RolledBack { id: deployment },
        ],
        remove: vec![key()],
        ..Plan::default()
    };
    let item = DeployItem { key: key(), spec: Arc::new(full_spec()), source: Some("name = \"web\"".into()), deployment };
    let (key_fingerprint, certificate_expires_at) = (vec![1, 2], Timestamp(99));
    vec![
        ("create_cluster", Command::CreateCluster { id: ClusterId(uuid(2)), ca_certificate: vec![1], ca_key_sealed: vec![2, 3] }),
        (
            "create_token",
            Command::CreateToken { id: TokenId(uuid(4)), secret_hash: vec![9; 32], expires_at: Timestamp(100), uses: 2, role: Role::Agent },
        ),
        ("revoke_token", Command::RevokeToken { id: TokenId(uuid(4)) }),
        (
            "admit_node",
            Command::AdmitNode { token: TokenId(uuid(4)), node, name: "host-1".into(), key_fingerprint, certificate_expires_at },
        ),
        ("node_up", Command::NodeUp { node, facts: facts() }),
        ("node_down", Command::NodeDown { node }),
        ("node_certificate", Command::NodeCertificate { node, key_fingerprint: vec![1], expires_at: Timestamp(8) }),
        ("deploy", Command::Deploy { items: vec![item.clone()] }),
        ("restart", Command::Restart { key: key(), deployment }),
        ("scale", Command::Scale { key: key(), copies: 5, deployment }),
        ("stop_workload", Command::StopWorkload { key: key() }),
        ("remove_workload", Command::RemoveWorkload { key: key() }),
        ("plan", Command::Plan(plan)),
        ("report", Command::Report { node, statuses: vec![status()], gone: vec![alloc] }),
        ("admit_server", Command::AdmitServer { token: Some(TokenId(uuid(4))), server: server(), key_fingerprint: vec![1, 2] }),
        ("server_up", Command::ServerUp { id: 7, server: server() }),
        ("raise_version", Command::RaiseVersion { to: 2 }),
        ("remove_server", Command::RemoveServer { id: 7 }),
        ("forget_server", Command::ForgetServer { id: 7 }),
        ("remove_node", Command::RemoveNode { node }),
        ("rotate_ca", Command::RotateCa { number: 1, certificate: vec![1], key_sealed: vec![2], cross: vec![3], overlap: Span(4) }),
        ("abort_rotation", Command::AbortRotation { number: 1 }),
        ("rotation_waited", Command::RotationWaited { number: 1, phase: RotationPhase::Sign, waited: Span(60_000) }),
        ("force_rotation", Command::ForceRotation),
        ("step_rotation", Command::StepRotation { number: 1, from: RotationPhase::Announce }),
        ("member_ca", Command::MemberCa { member: Member::Node(node), trusted: 1, signer: 0 }),
        ("member_clock", Command::MemberClock { member: Member::Server(7), skew_ms: Some(-14_000) }),
        ("deploy_if", Command::DeployIf { items: vec![item.clone()], revision: 41 }),
        (
            "resize",
            Command::Resize {
                key: key(),
                limits: NewLimits { cpu: Some(Millicores(500)), ..NewLimits::default() },
                copies: Some(4),
                deployment,
            },
        ),
        (
            "rewrap",
            Command::Rewrap(Rewrap { steps: 3, root_key: vec![7; 16], ca_key_sealed: vec![8; 40], holders: vec![1, 2, 3], vaults: vec![] }),
        ),
        (
            "count_traffic",
            Command::CountTraffic {
                router: "edge-1".into(),
                generation: 300,
                counts: vec![(alloc, Sample { requests: 9, errors: 1, latency: vec![3, 5] })],
            },
        ),
        ("ack_endpoints", Command::AckEndpoints { router: "edge-1".into(), generation: 300 }),
        ("steer", Command::Steer { key: key(), act: Steering::RollBack { to: Some(1) }, why: Some("slow".into()), deployment }),
        ("plan_migrate", Command::Plan(Plan { migrate: vec![alloc], ..Plan::default() })),
        ("start_run", Command::StartRun(run_order())),
        ("cancel_run", Command::CancelRun { key: key(), number: 3 }),
        ("run_steps", Command::RunSteps(run_steps(alloc))),
        ("change_node", Command::ChangeNode { node, change: NodeChange::Labels(BTreeMap::from([("zone".into(), Some("b".into()))])) }),
        ("drain_node", Command::ChangeNode { node, change: NodeChange::Drain { deadline: Some(Timestamp(9)), keep_daemons: true } }),
        ("node_drained", Command::NodeDrained { node }),
        ("set_rebalance", Command::SetRebalance { automatic: true, moves: 3, every: Span::secs(600) }),
        ("rebalance", Command::Rebalance { moves: vec![alloc] }),
        (
            "set_quota",
            Command::SetQuota { key: quota_key(), quota: Quota { cpu: Some(Millicores(5)), copies: Some(7), ..Quota::default() } },
        ),
        ("remove_quota", Command::RemoveQuota { key: quota_key() }),
        ("set_pool", Command::SetPool { pool: Pool { name: Name::new("gpu").unwrap(), layout: Layout::BinPack } }),
        ("remove_pool", Command::RemovePool { name: Name::new("gpu").unwrap() }),
        ("set_volume", Command::SetVolume { volume: Volume { key: volume_key(), node } }),
        ("remove_volume", Command::RemoveVolume { key: volume_key() }),
        (
            "set_secret",
            Command::SetSecret { key: secret_key(), sealed: vec![3; 60], vault: Vault { id: vec![5; 16], key_sealed: vec![6; 73] } },
        ),
        ("remove_secret", Command::RemoveSecret { key: secret_key() }),
    ]
}

fn run_order() -> RunOrder {
    let params = BTreeMap::from([("CUSTOMER".to_owned(), "7".to_owned())]);
    RunOrder { key: key(), id: RunId(uuid(12)), params, payload: Some(Arc::new(vec![1, 2, 255])) }
}

fn run_steps(alloc: AllocId) -> Vec<RunStep> {
    let due = Due { at: Timestamp(60_000), local: "1970-01-01T01:01:00+01:00[Europe/Berlin]".into(), start_at: Timestamp(61_000) };
    let key = key();
    vec![
        RunStep::Arm { key: key.clone(), release: 2, decided: Timestamp(5), next: Some(due.clone()) },
        RunStep::Due { key: key.clone(), due: due.clone(), start: Ok(RunId(uuid(13))), next: None },
        RunStep::Due { key: key.clone(), due: due.clone(), start: Err(SkipReason::Overlap { run: 4 }), next: Some(due) },
        RunStep::Deploy { key: key.clone(), release: 2, id: RunId(uuid(14)) },
        RunStep::Begin { key: key.clone(), number: 3 },
        RunStep::Done { key: key.clone(), number: 3, alloc },
        RunStep::Tried { key: key.clone(), number: 3, alloc, retry_at: Some(Timestamp(8)) },
        RunStep::End { key, number: 3, phase: RunPhase::Failed, reason: Some(Reason::TimedOut { after: Span::secs(1) }) },
    ]
}

fn quota_key() -> QuotaKey {
    QuotaKey { project: key().project, environment: Some(key().environment) }
}

fn secret_key() -> SecretKey {
    let VolumeKey { project, environment, .. } = volume_key();
    SecretKey { vault: VaultKey { project, environment }, name: "DATABASE_URL".into() }
}

fn volume_key() -> VolumeKey {
    VolumeKey { project: key().project, environment: key().environment, name: Name::new("data").unwrap() }
}

fn server() -> ServerFacts {
    ServerFacts { name: "host-1".into(), address: "10.0.0.1:7444".into(), api: "10.0.0.1:7443".into(), version: "0.1.0".into(), level: 2 }
}

/// Fails to compile when a command is added that has no golden bytes.
fn name_of(command: &Command) -> &'static str {
    match command {
        Command::CreateCluster { .. } => "create_cluster",
        Command::CreateToken { .. } => "create_token",
        Command::RevokeToken { .. } => "revoke_token",
        Command::AdmitNode { .. } => "admit_node",
        Command::NodeUp { .. } => "node_up",
        Command::NodeDown { .. } => "node_down",
        Command::NodeCertificate { .. } => "node_certificate",
        Command::Deploy { .. } => "deploy",
        Command::Restart { .. } => "restart",
        Command::Scale { .. } => "scale",
        Command::StopWorkload { .. } => "stop_workload",
        Command::RemoveWorkload { .. } => "remove_workload",
        Command::Plan(plan) if !plan.migrate.is_empty() => "plan_migrate",
        Command::Plan(_) => "plan",
        Command::Report { .. } => "report",
        Command::AdmitServer { .. } => "admit_server",
        Command::ServerUp { .. } => "server_up",
        Command::RaiseVersion { .. } => "raise_version",
        Command::RemoveServer { .. } => "remove_server",
        Command::ForgetServer { .. } => "forget_server",
        Command::RemoveNode { .. } => "remove_node",
        Command::RotateCa { .. } => "rotate_ca",
        Command::RotationWaited { .. } => "rotation_waited",
        Command::AbortRotation { .. } => "abort_rotation",
        Command::ForceRotation => "force_rotation",
        Command::StepRotation { .. } => "step_rotation",
        Command::MemberCa { .. } => "member_ca",
        Command::MemberClock { .. } => "member_clock",
        Command::Steer { .. } => "steer",
        Command::Resize { .. } => "resize",
        Command::Rewrap(_) => "rewrap",
        Command::CountTraffic { .. } => "count_traffic",
        Command::AckEndpoints { .. } => "ack_endpoints",
        Command::DeployIf { .. } => "deploy_if",
        Command::StartRun(_) => "start_run",
        Command::CancelRun { .. } => "cancel_run",
        Command::RunSteps(_) => "run_steps",
        Command::ChangeNode { change: NodeChange::Drain { .. }, .. } => "drain_node",
        Command::ChangeNode { .. } => "change_node",
        Command::NodeDrained { .. } => "node_drained",
        Command::SetRebalance { .. } => "set_rebalance",
        Command::Rebalance { .. } => "rebalance",
        Command::SetQuota { .. } => "set_quota",
        Command::RemoveQuota { .. } => "remove_quota",
        Command::SetPool { .. } => "set_pool",
        Command::RemovePool { .. } => "remove_pool",
        Command::SetVolume { .. } => "set_volume",
        Command::RemoveVolume { .. } => "remove_volume",
        Command::SetSecret { .. } => "set_secret",
        Command::RemoveSecret { .. } => "remove_secret",
    }
}

fn messages() -> Vec<(&'static str, Message)> {
    let alloc = DesiredAlloc {
        id: AllocId(uuid(7)),
        key: key(),
        index: 1,
        release: 2,
        run: true,
        ports: vec![("http".into(), 20_001)],
        spec: Blob::of(&full_spec()),
    };
    vec![
        ("hello", Hello { versions: (1, 1), node: NodeId(uuid(1)), generation: 5, facts: Blob::of(&facts()) }.into()),
        ("welcome", Welcome { version: 1, cluster: ClusterId(uuid(2)), heartbeat: Span::secs(1) }.into()),
        ("refused", Refused { code: "OPT-1201".into(), message: "used up".into() }.into()),
        ("desired", Desired { generation: 300, allocs: vec![alloc] }.into()),
        ("report", Report { generation: 300, statuses: vec![Blob::of(&status())], gone: vec![AllocId(uuid(8))] }.into()),
        ("ping", Ping { n: 300 }.into()),
        ("pong", Pong { n: 70_000 }.into()),
        (
            "join_request",
            JoinRequest { versions: (1, 1), token_id: "t".into(), secret: "s".into(), csr: vec![1], name: "host-1".into() }.into(),
        ),
        ("join_answer", JoinAnswer { cluster: ClusterId(uuid(2)), node: NodeId(uuid(1)), certificate: vec![1], ca: vec![2] }.into()),
        ("log_request", LogRequest { alloc: AllocId(uuid(7)), since: Some(Timestamp(5)), tail: Some(10), follow: true }.into()),
        ("log_chunk", LogChunk { lines: vec![LogLine { at: Timestamp(5), stderr: true, text: "boom".into() }] }.into()),
        ("renew_request", RenewRequest { csr: vec![1] }.into()),
        ("servers", Servers { addresses: vec!["10.0.0.1:7443".into(), "b.example:7443".into()] }.into()),
        ("trust", Trust { progress: 5, roots: vec![vec![1], vec![2, 3]] }.into()),
        ("trusting", Trusting { roots: vec![[1; 32]], signer: [1; 32] }.into()),
        ("clock_pong", ClockPong { n: 300, at: Timestamp(70_000) }.into()),
        ("renew_answer", RenewAnswer { certificate: vec![1], ca: vec![2] }.into()),
        (
            "server_join_request",
            ServerJoinRequest { versions: (1, 1), token_id: "t".into(), secret: "s".into(), csr: vec![1], server: Blob::of(&server()) }
                .into(),
        ),
        (
            "server_join_answer",
            ServerJoinAnswer {
                server: 7,
                cluster: Blob::of(&1),
                root_key: vec![1, 2],
                admin_token: "a".into(),
                servers: Blob::of(&Vec::<u8>::new()),
            }
            .into(),
        ),
    ]
}

/// The bytes of a file, made now if there are none and they may be.
fn golden(dir: &Path, name: &str, fresh: &[u8]) -> Vec<u8> {
    let path = dir.join(format!("{name}.bin"));
    if !path.exists() && std::env::var_os("UPDATE_EXPECT").is_some() {
        fs::create_dir_all(dir).unwrap();
        fs::write(&path, fresh).unwrap();
    }
    fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}; UPDATE_EXPECT=1 makes it", path.display()))
}

#[test]
fn every_command_of_v1_still_decodes() {
    let dir = repo_root().join("tests/golden/commands-v1");
    for (name, command) in commands() {
        assert_eq!(name_of(&command), name);
        let proposal = Proposal { at: Timestamp(1_000), request: Some((RequestId(uuid(6)), vec![1, 2, 3])), command };
        let bytes = golden(&dir, name, &codec::to_msgpack(&proposal));
        assert_eq!(codec::from_msgpack::<Proposal>(&bytes).unwrap(), proposal, "{name}");
    }
}

#[test]
fn every_frame_of_v1_still_decodes() {
    let dir = repo_root().join("tests/golden/frames-v1");
    for (name, message) in messages() {
        let bytes = golden(&dir, name, &message.encode());
        let (kind, version, length) = codec::frame_head(bytes[..FRAME_HEAD].try_into().unwrap()).unwrap();
        assert_eq!(length, bytes.len() - FRAME_HEAD, "{name}");
        assert_eq!(Message::decode(kind, version, &bytes[FRAME_HEAD..]).unwrap(), message, "{name}");
    }
}

#[test]
fn a_snapshot_of_v1_still_opens() {
    let mut state = State::default();
    let kept = commands().into_iter().filter(|(name, _)| !["revoke_token", "node_down", "stop_workload", "remove_workload"].contains(name));
    for (n, (_, command)) in kept.enumerate() {
        state.apply(n as u64 + 1, Proposal { at: Timestamp(n as u64), request: None, command });
    }
    let bytes = golden(&repo_root().join("tests/golden/snapshots-v1"), "state", &state.to_bytes());
    let opened = State::from_bytes(&bytes).unwrap();
    assert_eq!((opened.nodes.len(), opened.workloads.len(), opened.allocs.len(), opened.deployments.len()), (1, 1, 1, 1));
    assert!(opened.cluster.is_some() && !opened.events.is_empty());
}
