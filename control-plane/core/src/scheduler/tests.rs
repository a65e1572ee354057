//! Placement over nodes and copies made up directly, without a control plane around them.
#![allow(clippy::unwrap_used)]

mod properties;

use std::collections::BTreeMap;
use std::sync::Arc;

use optimus_common::protocol::{AllocStatus, DeviceGroup, HostReserve, NodeFacts, Phase};
use optimus_common::reason::Refusal;
use optimus_common::spec::*;
use optimus_common::{AllocId, Bytes, Millicores, Name, NodeId, Reason, Timestamp, WorkloadKey};
use uuid::Uuid;

use super::*;
use crate::state::*;

const NOW: Timestamp = Timestamp(1_000_000);

pub(super) fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

pub(super) fn key(workload: &str) -> WorkloadKey {
    WorkloadKey { project: name("shop"), environment: name("dev"), workload: name(workload) }
}

pub(super) fn node_id(n: usize) -> NodeId {
    NodeId(Uuid::from_u128(100 + n as u128))
}

/// A spec of few lines.
pub(super) fn spec(lines: &str) -> WorkloadSpec {
    let context = Context { default_project: Some(name("shop")), base_dir: "/".into(), environment: None };
    let text = format!("name = \"web\"\nrun = \"x\"\n{lines}\n");
    parse_toml("optimus.toml", &text, &context).unwrap_or_else(|e| panic!("{e}")).spec.workloads.into_values().next().unwrap()
}

pub(super) fn facts(n: usize) -> NodeFacts {
    NodeFacts {
        name: format!("host-{n}"),
        cpu: Millicores(4000),
        memory: Bytes(8 << 30),
        disk: Bytes(100 << 30),
        arch: "x86_64".into(),
        kernel: "6.1.0-13-amd64".into(),
        drivers: vec!["process".into()],
        ports: (20_000, 20_099),
        ..NodeFacts::default()
    }
}

pub(super) struct Cluster {
    pub state: State,
    ids: u128,
}

impl Cluster {
    pub fn new(nodes: usize) -> Self {
        Self::with(nodes, |_, _| {})
    }

    pub fn with(nodes: usize, change: impl Fn(usize, &mut NodeFacts)) -> Self {
        let mut state = State::default();
        for n in 0..nodes {
            let mut facts = facts(n);
            change(n, &mut facts);
            state.insert_node(Node {
                id: node_id(n),
                facts,
                joined_at: NOW,
                up: true,
                changed_at: NOW,
                certificate_expires_at: NOW,
                key_fingerprint: vec![],
                cordoned: false,
                blocked_ports: Default::default(),
                ca_trusted: 0,
                ca_signer: 0,
                clock_skew_ms: None,
                labels: Default::default(),
                pool: None,
                drain: None,
            });
        }
        Cluster { state, ids: 1000 }
    }

    pub fn release(&mut self, workload: &str, spec: &WorkloadSpec) {
        let release = Release {
            key: key(workload),
            number: 1,
            spec: Arc::new(spec.clone()),
            source: None,
            created_at: NOW,
            fresh: false,
            secrets: Default::default(),
        };
        self.state.releases.insert((key(workload), 1), Arc::new(release));
    }

    pub fn next_id(&mut self) -> AllocId {
        self.ids += 1;
        AllocId(Uuid::from_u128(self.ids))
    }

    /// Puts a copy on a node, whether it fits or not.
    pub fn put(&mut self, workload: &str, spec: &WorkloadSpec, node: NodeId) -> AllocId {
        self.release(workload, spec);
        let id = self.next_id();
        let row = &self.state.nodes[&node];
        let ports = fit::choose_ports(row, &taken(&self.state, node), spec, id, NOW).unwrap();
        let devices = allot_devices(&self.state, node, spec);
        self.insert(workload, id, node, ports, devices);
        id
    }

    pub fn insert(&mut self, workload: &str, id: AllocId, node: NodeId, ports: Vec<(String, u16)>, devices: Vec<Device>) {
        let index = self.state.allocs_of(&key(workload)).count() as u32;
        self.state.insert_alloc(Alloc {
            id,
            key: key(workload),
            index,
            release: 1,
            node,
            ports,
            devices,
            run: true,
            stop_reason: None,
            created_at: NOW,
            status: None,
            migrate: false,
            draining_since: None,
            unrouted_at: None,
        });
    }

    pub fn end(&mut self, id: AllocId) {
        let mut status = AllocStatus::unknown(id);
        status.phase = Phase::Stopped;
        self.state.change_alloc(id, |a| {
            a.run = false;
            a.status = Some(Arc::new(status));
        });
    }

    pub fn ask<'a>(&mut self, key: &'a WorkloadKey, spec: &'a WorkloadSpec) -> Ask<'a> {
        Ask { key, spec, alloc: self.next_id(), troubled: &[] }
    }

    /// Places copies one after another in one view; the nodes, by number.
    pub fn place(&mut self, workload: &str, spec: &WorkloadSpec, copies: usize) -> Vec<usize> {
        let key = key(workload);
        let ids: Vec<AllocId> = (0..copies).map(|_| self.next_id()).collect();
        let mut view = View::of(&self.state, NOW);
        let placed = ids.into_iter().map_while(|alloc| view.place(Ask { key: &key, spec, alloc, troubled: &[] }));
        placed.map(|(node, _)| (node.0.as_u128() - 100) as usize).collect()
    }

    fn refusal(&self, spec: &WorkloadSpec, node: usize) -> String {
        fits(&self.state, node_id(node), &key("web"), spec, None, NOW).unwrap_err().to_string()
    }
}

fn by_node(placed: &[usize]) -> BTreeMap<usize, usize> {
    let mut counts = BTreeMap::new();
    placed.iter().for_each(|n| *counts.entry(*n).or_default() += 1);
    counts
}

fn zones(n: usize, facts: &mut NodeFacts) {
    facts.labels.insert("zone".into(), ["a", "b", "c"][n % 3].into());
}

#[test]
fn each_refusal_says_what_is_missing_and_by_how_much() {
    let gpu = |ids: &[&str]| DeviceGroup {
        vendor: "nvidia".into(),
        kind: "gpu".into(),
        name: "a100".into(),
        ids: ids.iter().map(|id| (*id).to_owned()).collect(),
        attributes: BTreeMap::from([("memory".into(), "80G".into())]),
        ..DeviceGroup::default()
    };
    let mut cluster = Cluster::with(3, |n, facts| {
        zones(n, facts);
        facts.devices = vec![gpu(&["0", "1"])];
        facts.reserved = HostReserve { cpu: Millicores(500), memory: Bytes::mib(1024), disk: Bytes(0) };
        facts.pool = (n == 2).then(|| name("batch"));
    });
    cluster.put("db", &spec("cpu = 3\nmemory = \"6G\"\ndisk = \"95G\"\ndevices = [\"gpu\"]\nport = 5432"), node_id(0));
    cluster.state.volumes.insert(
        VolumeKey { project: name("shop"), environment: name("dev"), name: name("data") },
        Arc::new(Volume { key: VolumeKey { project: name("shop"), environment: name("dev"), name: name("data") }, node: node_id(1) }),
    );
    for (lines, refusal) in [
        ("cpu = 1", "cpu: asks for 1 cores, 0.5 free"),
        ("memory = \"2G\"", "memory: asks for 2 GiB, 1 GiB free"),
        ("disk = \"10G\"", "disk: asks for 10 GiB, 5 GiB free"),
        ("devices = [\"2 nvidia/gpu\"]", "devices: asks for 2 nvidia/gpu, 1 free"),
        ("devices = [\"gpu where memory > 80G\"]", "devices: asks for 1 gpu, 0 free"),
        ("port = 5432", "port 5432 is reserved by another copy"),
        ("arch = \"arm64\"", "built for arm64; the node is amd64"),
        ("pool = \"batch\"", "wants pool batch; the node is in default"),
        ("constraints = [\"label.zone in b, c\"]", "wants label.zone in b, c; it is a"),
        ("constraints = [\"label.rack exists\"]", "wants label.rack exists; the node does not have it"),
        ("constraints = [\"kernel.version >= 6.2\"]", "wants kernel.version >= 6.2; it is 6.1.0-13-amd64"),
        ("volumes = [\"data\"]", "volume data is on host-1"),
        ("volumes = [\"lost\"]", "there is no volume lost"),
        ("image = \"x\"", "node has no container driver"),
    ] {
        assert_eq!(cluster.refusal(&spec(lines), 0), refusal, "{lines}");
    }
    assert_eq!(
        fits(&cluster.state, node_id(1), &key("web"), &spec("cpu = 3.5\nvolumes = [\"data\"]\narch = \"x86_64\""), None, NOW),
        Ok(())
    );
    let distinct = spec("distinct_hosts = true");
    let id = cluster.put("web", &distinct, node_id(1));
    assert_eq!(cluster.refusal(&distinct, 1), "a copy of the workload is there, and it asks for distinct hosts");
    cluster.end(id);
    assert_eq!(fits(&cluster.state, node_id(1), &key("web"), &distinct, None, NOW), Ok(()));
}

#[test]
fn a_quota_holds_for_the_environment_and_for_the_project() {
    let mut cluster = Cluster::new(2);
    let web = spec("cpu = 1\nmemory = \"1G\"");
    let scope = |environment: Option<&str>| QuotaKey { project: name("shop"), environment: environment.map(name) };
    cluster.state.quotas.insert(scope(None), Arc::new(Quota { cpu: Some(Millicores(3500)), ..Quota::default() }));
    assert_eq!(cluster.place("web", &web, 8).len(), 3, "also within one plan");
    cluster.put("web", &web, node_id(0));
    cluster.put("web", &web, node_id(1));
    assert_eq!(cluster.place("web", &web, 8).len(), 1);
    cluster.state.quotas.insert(scope(Some("dev")), Arc::new(Quota { copies: Some(2), memory: Some(Bytes(5 << 30)), ..Quota::default() }));
    assert_eq!(cluster.refusal(&web, 0), "quota of shop/dev: asks for 1 copies, 0 left");
    let why = why_nowhere(&cluster.state, &key("web"), &web, NOW).unwrap();
    assert_eq!(why.to_string(), "quota of shop/dev: asks for 1 copies, 0 left");
    // Another environment is under the project's quota only.
    let prod = WorkloadKey { environment: name("prod"), ..key("web") };
    assert_eq!(fits(&cluster.state, node_id(0), &prod, &web, None, NOW), Ok(()));
    let three = spec("cpu = 3");
    let refusal = fits(&cluster.state, node_id(0), &prod, &three, None, NOW).unwrap_err();
    assert_eq!(refusal.to_string(), "quota of shop: asks for 3 cores cpu, 1.5 cores left");
}

#[test]
fn copies_spread_evenly_or_by_the_shares_asked_for() {
    let mut cluster = Cluster::with(9, zones);
    let placed = |cluster: &mut Cluster, lines: &str, copies| {
        let nodes = cluster.place("web", &spec(lines), copies);
        let mut zones = [0; 3];
        nodes.iter().for_each(|n| zones[n % 3] += 1);
        zones
    };
    assert_eq!(placed(&mut cluster, "cpu = 0.1\nspread = [\"label.zone\"]", 9), [3, 3, 3]);
    assert_eq!(placed(&mut cluster, "cpu = 0.1\nspread = [\"label.zone a 70%, b 30%\"]", 10), [7, 3, 0]);
    assert_eq!(placed(&mut cluster, "cpu = 0.1\nspread = [\"label.zone a 50%\"]", 8), [4, 2, 2]);
    // A zone that cannot take more is no reason to wait.
    assert_eq!(placed(&mut cluster, "cpu = 0.1\nspread = [\"label.zone\"]\nconstraints = [\"label.zone != c\"]", 6), [3, 3, 0]);
    // Two datacentres with room in both.
    let mut two = Cluster::with(4, |n, facts| {
        facts.labels.insert("dc".into(), ["x", "y"][usize::from(n > 0)].into());
    });
    let nodes = two.place("web", &spec("cpu = 0.1\nspread = [\"label.dc\"]"), 10);
    assert_eq!(nodes.iter().filter(|n| **n == 0).count(), 5);
}

#[test]
fn distinct_hosts_leaves_the_rest_waiting() {
    let mut cluster = Cluster::new(2);
    let mut nodes = cluster.place("web", &spec("distinct_hosts = true"), 3);
    nodes.sort_unstable();
    assert_eq!(nodes, [0, 1]);
}

#[test]
fn wishes_move_copies_and_company_moves_them_back() {
    let mut cluster = Cluster::with(3, zones);
    assert_eq!(cluster.place("web", &spec("affinity = [\"+100 label.zone = b\"]"), 1), [1]);
    assert_eq!(cluster.place("web", &spec("affinity = [\"-100 label.zone = a\"]"), 1), [1]);
    let counts = by_node(&cluster.place("web", &spec("cpu = 0.1\naffinity = [\"+100 label.zone = b\"]"), 8));
    assert!(counts[&1] > counts[&0] && counts.len() == 3, "{counts:?}");
    cluster.put("batch", &spec("cpu = 0.01\nmemory = \"1M\""), node_id(0));
    assert_eq!(cluster.place("web", &spec("anti_affinity = [\"batch\"]\nconstraints = [\"label.zone in a, b\"]"), 1), [1]);
}

#[test]
fn a_pool_is_packed_or_spread() {
    let mut cluster = Cluster::new(3);
    let small = spec("cpu = 1");
    cluster.put("other", &small, node_id(1));
    assert_eq!(cluster.place("web", &small, 1), [0]);
    cluster.state.pools.insert(name("default"), Arc::new(Pool { name: name("default"), layout: Layout::BinPack }));
    assert_eq!(cluster.place("web", &small, 1), [1]);
}

#[test]
fn a_busy_node_and_one_that_failed_come_last() {
    let mut cluster = Cluster::with(2, |n, facts| facts.load = if n == 0 { 750 } else { 0 });
    assert_eq!(cluster.place("web", &spec(""), 1), [1]);
    let (web, key) = (spec(""), key("web"));
    let troubled = [node_id(1)];
    let mut view = View::of(&cluster.state, NOW);
    let (node, _) = view.place(Ask { key: &key, spec: &web, alloc: AllocId(Uuid::from_u128(5)), troubled: &troubled }).unwrap();
    assert_eq!(node, node_id(0));
}

#[test]
fn devices_are_given_to_one_copy_alone_and_come_back() {
    let mut cluster = Cluster::with(1, |_, facts| {
        let group = DeviceGroup {
            vendor: "acme".into(),
            kind: "fpga".into(),
            name: "x1".into(),
            ids: vec!["a".into(), "b".into()],
            ..DeviceGroup::default()
        };
        facts.devices = vec![group];
    });
    let one = spec("devices = [\"fpga\"]");
    let first = cluster.put("web", &one, node_id(0));
    let second = cluster.put("web", &one, node_id(0));
    let given = |id: AllocId, cluster: &Cluster| cluster.state.allocs[&id].devices.clone();
    assert_eq!(given(first, &cluster), [("acme/fpga/x1".to_owned(), "a".to_owned())]);
    assert_eq!(given(second, &cluster), [("acme/fpga/x1".to_owned(), "b".to_owned())]);
    assert_eq!(cluster.refusal(&one, 0), "devices: asks for 1 fpga, 0 free");
    cluster.end(first);
    assert_eq!(allot_devices(&cluster.state, node_id(0), &one), [("acme/fpga/x1".to_owned(), "a".to_owned())]);
}

#[test]
fn the_fewest_and_lowest_give_way_and_never_one_close_in_priority() {
    let displaced = |cluster: &mut Cluster, lines: &str| {
        let (spec, key) = (spec(lines), key("vip"));
        let ask = cluster.ask(&key, &spec);
        View::of(&cluster.state, NOW).make_room(ask)
    };
    let mut cluster = Cluster::new(2);
    let low = cluster.put("low", &spec("cpu = 2\npriority = 20"), node_id(0));
    cluster.put("mid", &spec("cpu = 2\npriority = 45"), node_id(0));
    cluster.put("close", &spec("cpu = 4\npriority = 85"), node_id(1));
    assert_eq!(displaced(&mut cluster, "cpu = 2\npriority = 90"), Room::Displace(vec![low]), "the lowest of those that would do");
    let Room::Displace(both) = displaced(&mut cluster, "cpu = 4\npriority = 90") else { panic!("two give enough") };
    assert_eq!(both.len(), 2);
    assert_eq!(displaced(&mut cluster, "cpu = 4\npriority = 54"), Room::None, "45 is within ten points of 54");
    assert_eq!(displaced(&mut cluster, "cpu = 2\npriority = 29"), Room::None, "nobody is ten points below");
    // One larger copy rather than two small ones.
    let mut cluster = Cluster::new(1);
    cluster.put("s1", &spec("cpu = 1\npriority = 10"), node_id(0));
    cluster.put("s2", &spec("cpu = 1\npriority = 10"), node_id(0));
    let large = cluster.put("large", &spec("cpu = 2\npriority = 30"), node_id(0));
    assert_eq!(displaced(&mut cluster, "cpu = 2\npriority = 90"), Room::Displace(vec![large]));
    // What is on its way out is waited for.
    cluster.state.change_alloc(large, |a| a.run = false);
    assert_eq!(displaced(&mut cluster, "cpu = 2\npriority = 90"), Room::Coming);
    assert_eq!(displaced(&mut cluster, "cpu = 8\npriority = 90"), Room::None, "more than the node has");
}

#[test]
fn a_fixed_port_held_by_a_higher_one_makes_a_node_impossible() {
    let mut cluster = Cluster::new(1);
    cluster.put("high", &spec("cpu = 1\nport = 80\npriority = 90"), node_id(0));
    cluster.put("low", &spec("cpu = 1\npriority = 10"), node_id(0));
    let (vip, vip_key) = (spec("cpu = 1\nport = 80\npriority = 90"), key("vip"));
    let ask = cluster.ask(&vip_key, &vip);
    assert_eq!(View::of(&cluster.state, NOW).make_room(ask), Room::None);
    let mut cluster = Cluster::new(1);
    let holder = cluster.put("low", &spec("cpu = 1\nport = 80\npriority = 10"), node_id(0));
    let ask = cluster.ask(&vip_key, &vip);
    assert_eq!(View::of(&cluster.state, NOW).make_room(ask), Room::Displace(vec![holder]));
}

#[test]
fn many_nodes_are_counted_by_reason_with_the_nearest() {
    let mut cluster = Cluster::with(40, |n, facts| {
        zones(n, facts);
        facts.cpu = Millicores(1000 + n as u32);
    });
    let why = |cluster: &Cluster, lines: &str| why_nowhere(&cluster.state, &key("web"), &spec(lines), NOW).map(|r| r.to_string());
    assert_eq!(
        why(&cluster, "cpu = 2\nconstraints = [\"label.zone = a\"]").unwrap(),
        "no node can take it: 26 nodes: wants label.zone = a; it is b (the nearest, host-1); 14 nodes: cpu: asks for 2 cores, 1.039 free (the nearest, host-39)"
    );
    assert_eq!(why(&cluster, "cpu = 1"), None);
    cluster.state = State::default();
    assert_eq!(why(&cluster, "").unwrap(), Reason::NoNodes.to_string());
}

#[test]
fn the_same_rule_under_another_name_of_the_architecture() {
    let cluster = Cluster::new(1);
    for rule in ["arch = x86_64", "node.arch = amd64", "arch in amd64, arm64"] {
        let spec = spec(&format!("constraints = [\"{rule}\"]"));
        assert_eq!(fits(&cluster.state, node_id(0), &key("web"), &spec, None, NOW), Ok(()), "{rule}");
    }
    let arm = spec("constraints = [\"arch = aarch64\"]");
    let refused = Refusal::Constraint { rule: "arch = aarch64".into(), found: Some("amd64".into()) };
    assert_eq!(fits(&cluster.state, node_id(0), &key("web"), &arm, None, NOW), Err(refused));
}
