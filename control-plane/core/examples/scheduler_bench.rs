//! Measures the scheduler on one core: `scheduler_bench [NODES...]`, by default 100, 1,000 and 10,000 nodes.
//!
//! Prints one JSON object a line: `bench`, `metric`, `unit`, `ours`. See `scripts/bench scheduler`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use optimus_common::join_token::Role;
use optimus_common::protocol::{AllocStatus, NodeFacts, Phase};
use optimus_common::spec::{Context, WorkloadSpec, parse_toml};
use optimus_common::{AllocId, Bytes, ClusterId, DeploymentId, Millicores, Name, NodeId, Timestamp, TokenId, WorkloadKey};
use optimus_core::reconciler;
use optimus_core::scheduler::{Ask, View};
use optimus_core::state::{Command, DeployItem, Placement, Plan, Proposal, State};
use uuid::Uuid;

const NOW: Timestamp = Timestamp(1_000_000);

/// Each figure is the best of so many rounds: other load on the machine only ever slows.
const ROUNDS: usize = 5;

fn key(workload: &str) -> WorkloadKey {
    let name = |text: &str| Name::new(text).expect("a good name");
    WorkloadKey { project: name("bench"), environment: name("dev"), workload: name(workload) }
}

fn spec(lines: &str) -> WorkloadSpec {
    let context = Context { default_project: Name::new("bench").ok(), base_dir: "/".into(), environment: None };
    let text = format!("name = \"web\"\nrun = \"x\"\ncpu = 0.01\nmemory = \"4M\"\n{lines}\n");
    let parsed = parse_toml("bench.toml", &text, &context).unwrap_or_else(|errors| panic!("{errors}"));
    parsed.spec.workloads.into_values().next().expect("one workload")
}

/// What a production cluster has: zones, racks, disks, kernels, some cordoned, some of another architecture.
fn facts(n: usize) -> NodeFacts {
    let label = |key: &str, value: String| (key.to_owned(), value);
    NodeFacts {
        name: format!("host-{n}"),
        cpu: Millicores(64_000),
        memory: Bytes(256 << 30),
        disk: Bytes(1 << 40),
        arch: if n % 10 == 9 { "aarch64" } else { "x86_64" }.into(),
        kernel: format!("6.{}.0", n % 4),
        drivers: vec!["process".into()],
        ports: (20_000, 29_999),
        labels: BTreeMap::from([
            label("zone", ["a", "b", "c"][n % 3].into()),
            label("rack", format!("r{}", n % 20)),
            label("disk", if n.is_multiple_of(2) { "ssd" } else { "hdd" }.into()),
        ]),
        ..NodeFacts::default()
    }
}

struct Bench {
    state: State,
    ids: u128,
}

impl Bench {
    fn new(nodes: usize) -> Self {
        let mut bench = Bench { state: State::default(), ids: 1 << 64 };
        bench.apply(Command::CreateCluster { id: ClusterId(Uuid::from_u128(1)), ca_certificate: vec![], ca_key_sealed: vec![] });
        bench.apply(Command::RaiseVersion { to: optimus_core::state::LEVEL });
        let (token, expires_at) = (TokenId(Uuid::from_u128(2)), Timestamp(u64::MAX / 2));
        bench.apply(Command::CreateToken { id: token, secret_hash: vec![], expires_at, uses: nodes as u32, role: Role::Agent });
        for n in 0..nodes {
            let node = NodeId(Uuid::from_u128(100 + n as u128));
            let (name, key_fingerprint) = (format!("host-{n}"), vec![n as u8, (n >> 8) as u8]);
            bench.apply(Command::AdmitNode { token, node, name, key_fingerprint, certificate_expires_at: expires_at });
            bench.apply(Command::NodeUp { node, facts: facts(n) });
        }
        assert_eq!(bench.state.nodes.len(), nodes, "every node was admitted");
        bench
    }

    fn apply(&mut self, command: Command) {
        let index = self.state.index + 1;
        self.state.apply(index, Proposal { at: NOW, request: None, command });
    }

    fn id(&mut self) -> Uuid {
        self.ids += 1;
        // Random in its tail, as real ones are: ports start there.
        Uuid::from_u128((self.ids << 32) | (self.ids.wrapping_mul(0x9E37_79B9) & 0xFFFF_FFFF))
    }

    /// Placements a second of evaluations of `copies` equal copies each, all in one view.
    fn decide(&mut self, spec: &WorkloadSpec, evaluations: usize, copies: usize) -> f64 {
        let mut best = 0f64;
        for _ in 0..ROUNDS {
            let keys: Vec<WorkloadKey> = (0..evaluations).map(|n| key(&format!("e{n}"))).collect();
            let ids: Vec<AllocId> = (0..evaluations * copies).map(|_| AllocId(self.id())).collect();
            let begun = Instant::now();
            let mut view = View::of(&self.state, NOW);
            let mut ids = ids.into_iter();
            let mut placed = 0;
            for key in &keys {
                for alloc in ids.by_ref().take(copies) {
                    placed += usize::from(view.place(Ask { key, spec, alloc, troubled: &[] }).is_some());
                }
            }
            let seconds = begun.elapsed().as_secs_f64();
            assert_eq!(placed, evaluations * copies, "every copy found a node");
            best = best.max(placed as f64 / seconds);
        }
        best
    }

    /// Deploys workloads and commits their copies, placed by the scheduler; gives seconds of deciding and of committing.
    fn fill(&mut self, workloads: usize, copies: u32, ready: bool) -> (f64, f64) {
        let spec = Arc::new(WorkloadSpec { copies: Some(copies), ..spec("port = \"auto\"") });
        let (mut deciding, mut committing) = (0.0, 0.0);
        for n in 0..workloads {
            let key = key(&format!("w{n}"));
            let deployment = DeploymentId(self.id());
            self.apply(Command::Deploy { items: vec![DeployItem { key: key.clone(), spec: spec.clone(), source: None, deployment }] });
            let ids: Vec<AllocId> = (0..copies).map(|_| AllocId(self.id())).collect();
            let begun = Instant::now();
            let mut view = View::of(&self.state, NOW);
            let place: Vec<Placement> = ids
                .iter()
                .enumerate()
                .filter_map(|(index, alloc)| {
                    let (node, ports) = view.place(Ask { key: &key, spec: &spec, alloc: *alloc, troubled: &[] })?;
                    Some(Placement { alloc: *alloc, key: key.clone(), index: index as u32, release: 1, node, ports })
                })
                .collect();
            drop(view);
            deciding += begun.elapsed().as_secs_f64();
            assert_eq!(place.len(), copies as usize, "every copy found a node");
            let begun = Instant::now();
            self.apply(Command::Plan(Plan { place, ..Plan::default() }));
            committing += begun.elapsed().as_secs_f64();
            if ready {
                for id in ids {
                    let node = self.state.allocs[&id].node;
                    let status = AllocStatus { phase: Phase::Running, ready: true, seq: 1, ..AllocStatus::unknown(id) };
                    self.apply(Command::Report { node, statuses: vec![status], gone: vec![] });
                }
                self.apply(Command::Plan(Plan {
                    deployments: vec![optimus_core::state::DeploymentStep::Succeed { id: deployment }],
                    ..Plan::default()
                }));
            }
        }
        (deciding, committing)
    }
}

fn report(metric: &str, unit: &str, ours: f64) {
    println!("{{\"bench\":\"scheduler\",\"metric\":\"{metric}\",\"unit\":\"{unit}\",\"ours\":{ours:.3}}}");
}

fn resident_mb() -> f64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<f64>().ok()).unwrap_or(0.0) * 4096.0 / 1_048_576.0
}

fn main() {
    let asked: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let sizes = if asked.is_empty() { vec![100, 1000, 10_000] } else { asked };
    let rules = "constraints = [\"arch = amd64\", \"label.zone in a, b, c\", \"kernel.version >= 6.1\"]\nport = \"auto\"";
    let plain = spec("port = \"auto\"");
    let ruled = spec(&format!("{rules}\nspread = [\"label.zone\"]\naffinity = [\"+50 label.disk = ssd\"]"));
    let racks = spec(&format!("{rules}\nspread = [\"label.zone\", \"label.rack\"]"));
    for &nodes in &sizes {
        let mut bench = Bench::new(nodes);
        let metric = |what: &str| format!("{what}, {nodes} nodes");
        let rate = bench.decide(&ruled, 50, 100);
        report(&metric("100 equal copies with constraints, affinity and spread"), "placements/s", rate);
        report(
            &metric("100 equal copies with constraints and spread over 3 zones and 20 racks"),
            "placements/s",
            bench.decide(&racks, 20, 100),
        );
        report(&metric("100 equal copies"), "placements/s", bench.decide(&plain, 50, 100));
        report(&metric("1 copy with constraints, affinity and spread"), "placements/s", bench.decide(&ruled, 200, 1));
        report(&metric("1 copy"), "placements/s", bench.decide(&plain, 200, 1));
        let begun = Instant::now();
        let view = View::of(&bench.state, NOW);
        report(&metric("view of all nodes"), "ms", begun.elapsed().as_secs_f64() * 1000.0);
        drop(view);
    }
    let most = sizes.iter().copied().max().unwrap_or(100);
    if most >= 10_000 {
        let mut bench = Bench::new(most);
        let before = resident_mb();
        let (deciding, committing) = bench.fill(10_000, 100, false);
        let held = bench.state.allocs.len();
        assert_eq!(held, 1_000_000, "a million copies are held");
        report(&format!("{held} copies placed, a view for each 100, {most} nodes"), "placements/s", held as f64 / deciding);
        report(&format!("{held} copies committed, {most} nodes"), "placements/s", held as f64 / committing);
        report(&format!("memory of {held} copies, {most} nodes"), "MB", resident_mb() - before);
        drop(bench);
    }
    let mut bench = Bench::new(most.min(1000));
    bench.fill(10_000, 2, true);
    let mut ids = 0;
    let mut pass = || {
        reconciler::reconcile(&bench.state, NOW, &mut || {
            ids += 1;
            AllocId(Uuid::from_u128(ids))
        })
    };
    let outcome = pass();
    assert!(outcome.plan.is_empty(), "nothing is to do");
    let mut least = f64::MAX;
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        pass();
        least = least.min(begun.elapsed().as_secs_f64() * 1000.0);
    }
    report("reconcile 10000 unchanged workloads of 2 copies", "ms", least);
}
