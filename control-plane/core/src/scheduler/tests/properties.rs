//! The quick way places as the plain way does; victims are as few as they can be.

use proptest::prelude::*;
use proptest::strategy::Strategy;

use super::*;

/// A line of a spec, or none.
fn placement() -> impl Strategy<Value = String> {
    let constraint = prop_oneof![
        4 => Just(""),
        1 => Just("constraints = [\"label.zone in a, b\"]"),
        1 => Just("constraints = [\"label.n < 7\", \"arch = amd64\"]"),
        1 => Just("constraints = [\"node.name !~ host-[13]\"]"),
    ];
    let affinity = prop_oneof![
        3 => Just(""),
        1 => Just("affinity = [\"+60 label.zone = b\", \"-30 label.n > 4\"]"),
        1 => Just("affinity = [\"+100 hostname = host-2\"]"),
    ];
    let spread = prop_oneof![
        3 => Just(""),
        1 => Just("spread = [\"label.zone\"]"),
        1 => Just("spread = [\"label.zone a 60%, b 20%\", \"label.n\"]"),
        1 => Just("spread = [\"node.name\"]"),
    ];
    let more = prop_oneof![
        3 => Just(""),
        1 => Just("distinct_hosts = true"),
        1 => Just("anti_affinity = [\"other\"]"),
        1 => Just("devices = [\"gpu\"]"),
        1 => Just("pool = \"p\""),
        1 => Just("disk = \"40G\""),
    ];
    let port = prop_oneof![2 => Just(""), 1 => Just("port = 8080"), 1 => Just("port = \"auto\"")];
    (constraint, affinity, spread, more, port, 1u32..15)
        .prop_map(|(a, b, c, d, e, cpu)| format!("{a}\n{b}\n{c}\n{d}\n{e}\ncpu = 0.{cpu:02}\nmemory = \"64M\""))
}

#[derive(Debug, Clone)]
struct Made {
    /// Labels, pool, devices and load of each node.
    nodes: Vec<(u8, u8, bool, u8, u8, u16)>,
    /// Copies that are there: of the workload itself or another, on which node, ended or not.
    copies: Vec<(bool, u8, bool)>,
    pack: bool,
    quota: Option<u8>,
}

fn made() -> impl Strategy<Value = Made> {
    let node = (0u8..4, 0u8..10, any::<bool>(), 0u8..3, 1u8..5, prop_oneof![3 => Just(0u16), 1 => Just(500u16)]);
    (
        proptest::collection::vec(node, 1..12),
        proptest::collection::vec((any::<bool>(), 0u8..12, any::<bool>()), 0..10),
        any::<bool>(),
        proptest::option::weighted(0.3, 0u8..12),
    )
        .prop_map(|(nodes, copies, pack, quota)| Made { nodes, copies, pack, quota })
}

fn cluster(made: &Made, spec: &WorkloadSpec) -> Cluster {
    let mut cluster = Cluster::with(made.nodes.len(), |n, facts| {
        let (zone, number, pooled, gpus, cores, load) = made.nodes[n];
        if zone < 3 {
            facts.labels.insert("zone".into(), ["a", "b", "c"][usize::from(zone)].into());
        }
        facts.labels.insert("n".into(), number.to_string());
        facts.pool = pooled.then(|| name("p")).filter(|_| n % 2 == 0);
        let ids = (0..gpus).map(|id| id.to_string()).collect();
        facts.devices = vec![DeviceGroup { vendor: "v".into(), kind: "gpu".into(), name: "g".into(), ids, ..DeviceGroup::default() }];
        facts.cpu = Millicores(u32::from(cores) * 250);
        facts.load = load;
    });
    let other = super::spec("cpu = 0.05\nmemory = \"1M\"");
    for (own, at, ended) in &made.copies {
        let node = node_id(usize::from(*at) % made.nodes.len());
        let (workload, spec) = if *own { ("web", spec) } else { ("other", &other) };
        if *own && fits(&cluster.state, node, &key("web"), spec, None, NOW).is_err() {
            continue;
        }
        let id = cluster.put(workload, spec, node);
        if *ended {
            cluster.end(id);
        }
    }
    if made.pack {
        cluster.state.pools.insert(name("default"), Arc::new(Pool { name: name("default"), layout: Layout::BinPack }));
    }
    if let Some(copies) = made.quota {
        let quota = Quota { copies: Some(u32::from(copies)), ..Quota::default() };
        cluster.state.quotas.insert(QuotaKey { project: name("shop"), environment: None }, Arc::new(quota));
    }
    cluster
}

proptest! {
    // A long run meets many nodes with room, where nobody has to give way.
    #![proptest_config(ProptestConfig { max_global_rejects: 1 << 20, ..ProptestConfig::default() })]

    /// Each copy of a plan goes where it would go if all nodes were looked at afresh, after the copies before it had
    /// been committed; and whether it may is what `fits` says then.
    #[test]
    fn property_the_quick_way_places_as_the_plain_way(made in made(), lines in placement(), copies in 1usize..25, trouble in proptest::collection::vec(0usize..12, 0..3)) {
        let spec = super::spec(&lines);
        let mut cluster = cluster(&made, &spec);
        cluster.release("web", &spec);
        let key = key("web");
        let start = cluster.state.clone();
        let mut view = View::of(&start, NOW);
        for n in 0..copies {
            let alloc = cluster.next_id();
            let troubled: Vec<NodeId> = if n == 3 { trouble.iter().map(|n| node_id(*n)).collect() } else { vec![] };
            let ask = Ask { key: &key, spec: &spec, alloc, troubled: &troubled };
            let plain = judge_plainly(&cluster.state, ask);
            let quick = view.place(ask);
            prop_assert_eq!(quick.as_ref().map(|(node, _)| *node), plain, "copy {}", n);
            let Some((node, ports)) = quick else { break };
            prop_assert_eq!(fits(&cluster.state, node, &key, &spec, Some(&ports), NOW), Ok(()));
            let devices = allot_devices(&cluster.state, node, &spec);
            cluster.insert("web", alloc, node, ports, devices);
        }
        // What is kept with the state is what a fresh count gives.
        let mut recounted = cluster.state.clone();
        recounted.reindex();
        prop_assert_eq!(recounted, cluster.state.clone());
        if let Some(quota) = made.quota {
            let own = cluster.state.allocs.values().filter(|a| !a.has_ended()).count();
            prop_assert!(own <= usize::from(quota).max(start.allocs.values().filter(|a| !a.has_ended()).count()), "above the quota");
        }
    }

    /// Without the victims there is room, with any one of them left there is not, and no single copy would have done
    /// where two or more are named.
    #[test]
    fn property_no_victim_could_have_stayed(
        copies in proptest::collection::vec((1u32..20, 1u32..20, 0u8..100, any::<bool>()), 1..14),
        cpu in 1u32..40, memory in 1u32..40, priority in 20u8..=100, fixed: bool,
    ) {
        let mut cluster = Cluster::new(1);
        let text = |cpu: u32, memory: u32, priority: u8, port: bool| {
            super::spec(&format!("cpu = {}\nmemory = \"{}M\"\npriority = {priority}\n{}", f64::from(cpu) / 10.0, memory * 200, if port { "port = 80" } else { "" }))
        };
        for (n, (cpu, memory, priority, port)) in copies.iter().enumerate() {
            let spec = text(*cpu, *memory, *priority, *port);
            let workload = format!("w{n}");
            if fits(&cluster.state, node_id(0), &key(&workload), &spec, None, NOW).is_ok() {
                cluster.put(&workload, &spec, node_id(0));
            }
        }
        let (vip, vip_key) = (text(cpu, memory, priority, fixed), key("vip"));
        let ask = cluster.ask(&vip_key, &vip);
        let fits_without = |gone: &[AllocId]| {
            let mut rest = Cluster { state: cluster.state.clone(), ids: 0 };
            gone.iter().for_each(|id| rest.end(*id));
            fits(&rest.state, node_id(0), &vip_key, &vip, None, NOW).is_ok()
        };
        let priority_of = |id: &AllocId| cluster.state.release(&cluster.state.allocs[id].key, 1).unwrap().spec.placement.priority;
        let allowed: Vec<AllocId> = cluster.state.allocs.keys().copied().filter(|id| priority_of(id) + PREEMPTION_DISTANCE <= priority).collect();
        let mut view = View::of(&cluster.state, NOW);
        prop_assume!(view.place(ask).is_none());
        match view.make_room(ask) {
            Room::Displace(victims) => {
                prop_assert!(victims.iter().all(|v| allowed.contains(v)), "one is too close in priority");
                prop_assert!(fits_without(&victims));
                for one in &victims {
                    let others: Vec<AllocId> = victims.iter().copied().filter(|v| v != one).collect();
                    prop_assert!(!fits_without(&others), "one could have stayed");
                }
                let singles: Vec<&AllocId> = allowed.iter().filter(|id| fits_without(&[**id])).collect();
                if let Some(lowest) = singles.iter().map(|id| priority_of(id)).min() {
                    prop_assert_eq!(victims.len(), 1);
                    prop_assert_eq!(priority_of(&victims[0]), lowest);
                } else if victims.len() > 2 {
                    let pair = allowed.iter().any(|a| allowed.iter().any(|b| a < b && fits_without(&[*a, *b])));
                    prop_assert!(!pair, "two would have done");
                }
            }
            Room::None => prop_assert!(!fits_without(&allowed), "there was somebody to displace"),
            Room::Coming => prop_assert!(false, "nothing is on its way out"),
        }
    }
}

/// Looks at every node with nothing kept from before: the best that `fits`, the lowest id among equals.
fn judge_plainly(state: &State, ask: Ask<'_>) -> Option<NodeId> {
    let mut best: Option<(u64, NodeId)> = None;
    let mut verdicts = View::of(state, NOW).judge(ask);
    verdicts.sort_by_key(|j| j.node);
    for judged in verdicts {
        let fits = fits(state, judged.node, ask.key, ask.spec, None, NOW);
        assert_eq!(judged.verdict.as_ref().err(), fits.as_ref().err(), "the explanation and the judge disagree");
        if let Ok(score) = judged.verdict
            && best.is_none_or(|(most, _)| score.total() > most)
        {
            best = Some((score.total(), judged.node));
        }
    }
    best.map(|(_, node)| node)
}
