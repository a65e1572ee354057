//! What a look of the leader costs when nothing is to be done: `idle_pass [WORKLOADS] [COPIES]`, on one core.
//!
//! Prints the median of 20 full passes over workloads that rest (10,000 of 3 copies unless told otherwise).
#![allow(clippy::unwrap_used, clippy::disallowed_methods)] // a measurement reads the clock

use std::sync::Arc;
use std::time::Instant;

use optimus_common::join_token::Role;
use optimus_common::protocol::{AllocStatus, NodeFacts, Phase};
use optimus_common::spec::{Context, parse_toml};
use optimus_common::{AllocId, Bytes, ClusterId, DeploymentId, Millicores, Name, NodeId, Span, Timestamp, TokenId, WorkloadKey};
use optimus_core::reconciler::{desired_allocs, reconcile};
use optimus_core::state::{Command, DeployItem, LEVEL, Proposal, ServerFacts, State};
use uuid::Uuid;

const NODES: u128 = 500;
const PASSES: usize = 20;

fn main() {
    let mut args = std::env::args().skip(1).map(|a| a.parse::<u32>().unwrap());
    let (workloads, copies) = (args.next().unwrap_or(10_000), args.next().unwrap_or(3));
    let mut now = Timestamp(1_800_000_000_000);
    let mut state = State::default();
    let mut index = 0;
    let mut apply = |state: &mut State, now: Timestamp, command| {
        index += 1;
        state.apply(index, Proposal { at: now, request: None, command })
    };
    apply(&mut state, now, Command::CreateCluster { id: ClusterId(Uuid::from_u128(1)), ca_certificate: vec![], ca_key_sealed: vec![] });
    let server = ServerFacts { name: "s".into(), address: "h:1".into(), api: "h:2".into(), version: "1".into(), level: LEVEL };
    apply(&mut state, now, Command::AdmitServer { token: None, server, key_fingerprint: vec![1] });
    apply(&mut state, now, Command::RaiseVersion { to: LEVEL });
    let token = TokenId(Uuid::from_u128(2));
    let expires_at = now + Span::secs(60);
    apply(&mut state, now, Command::CreateToken { id: token, secret_hash: vec![], expires_at, uses: NODES as u32, role: Role::Agent });
    for n in 0..NODES {
        let node = NodeId(Uuid::from_u128(100 + n));
        let name = format!("host-{n}");
        let admit = Command::AdmitNode { token, node, name: name.clone(), key_fingerprint: vec![], certificate_expires_at: expires_at };
        apply(&mut state, now, admit);
        let facts = NodeFacts {
            name,
            cpu: Millicores(1_000_000),
            memory: Bytes(1 << 45),
            drivers: vec!["process".into()],
            ports: (20_000, 40_000),
            ..NodeFacts::default()
        };
        apply(&mut state, now, Command::NodeUp { node, facts });
    }
    let context = Context { default_project: Name::new("shop").ok(), base_dir: "/srv".into(), environment: None };
    let text = format!("name = \"web\"\nrun = \"x\"\nport = \"auto\"\ncopies = {copies}\n");
    let spec = Arc::new(parse_toml("optimus.toml", &text, &context).unwrap().spec.workloads.into_values().next().unwrap());
    let name = |n: &str| Name::new(n).unwrap();
    for n in 0..workloads {
        let key = WorkloadKey { project: name("shop"), environment: name("prod"), workload: name(&format!("w{n}")) };
        let deployment = DeploymentId(Uuid::from_u128(1_000_000 + u128::from(n)));
        apply(&mut state, now, Command::Deploy { items: vec![DeployItem { key, spec: spec.clone(), source: None, deployment }] });
    }
    let mut ids = 1u128 << 64;
    let mut seq = 0;
    loop {
        let outcome = reconcile(&state, now, &mut || {
            ids += 1;
            AllocId(Uuid::from_u128(ids))
        });
        let rests = outcome.plan.is_empty();
        apply(&mut state, now, Command::Plan(outcome.plan));
        let nodes: Vec<NodeId> = state.nodes.keys().copied().collect();
        let mut news = false;
        for node in nodes {
            seq += 1;
            let fresh = desired_allocs(&state, node).filter(|a| a.status.is_none());
            let statuses: Vec<AllocStatus> = fresh
                .map(|a| AllocStatus { seq, phase: Phase::Running, ready: true, ready_since: Some(now), ..AllocStatus::unknown(a.id) })
                .collect();
            news |= !statuses.is_empty();
            apply(&mut state, now, Command::Report { node, statuses, gone: vec![] });
        }
        now = now + Span::secs(2);
        if rests && !news {
            break;
        }
    }
    let mut took: Vec<_> = (0..PASSES)
        .map(|_| {
            let began = Instant::now();
            let outcome = reconcile(&state, now, &mut || AllocId(Uuid::nil()));
            assert!(outcome.plan.is_empty());
            began.elapsed()
        })
        .collect();
    took.sort();
    println!("{workloads} workloads of {copies} copies at rest: {:.2} ms a pass", took[PASSES / 2].as_secs_f64() * 1000.0);
}
