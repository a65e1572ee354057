//! Emptying nodes and evening them out.

use proptest::prelude::*;

use super::fleet::*;
use super::*;
use crate::drain;

/// Ten copies on one node, and others without any.
fn crowded(copies: u32, parallel: u32) -> Fleet {
    let mut fleet = Fleet::new(1);
    fleet.deploy("web", with_parallel(copies, parallel));
    fleet.pass(2);
    fleet.join(1);
    fleet.join(2);
    fleet.pass(1);
    assert_eq!(fleet.running("web", 0), copies as usize);
    fleet
}

fn with_parallel(copies: u32, parallel: u32) -> WorkloadSpec {
    let update = Update { parallel, ..service(copies).update };
    WorkloadSpec { update, ..service(copies) }
}

fn flagged(fleet: &Fleet, name: &str) -> usize {
    fleet.state.allocs_of(&key(name)).filter(|a| a.migrate && a.run).count()
}

fn drained(fleet: &Fleet, n: usize) -> bool {
    fleet.state.nodes[&node(n)].drain.as_ref().is_some_and(|d| d.done_at.is_some())
}

#[test]
fn one_copy_moves_at_a_time_and_the_next_only_when_its_replacement_is_ready() {
    let mut fleet = crowded(10, 1);
    fleet.work("web", Work { ready_after: Some(Span::secs(5)), ..Work::default() });
    fleet.pass(6);
    let started = fleet.now;
    fleet.drain(0, None);
    let mut seen = 0;
    while !drained(&fleet, 0) {
        fleet.pass(1);
        assert!(flagged(&fleet, "web") <= 1 && fleet.ready("web") >= 10, "{} ready", fleet.ready("web"));
        seen = seen.max(flagged(&fleet, "web"));
        assert!(fleet.now.since(started) < Span::secs(120), "the drain does not end");
    }
    assert_eq!((seen, fleet.running("web", 0), fleet.ready("web")), (1, 0, 10));
    assert!(fleet.now.since(started) >= Span::secs(50)); // one after the other
    let failures = &fleet.state.failures;
    assert!(failures.is_empty(), "a moved copy is no failure: {failures:?}");
    fleet.replays();
}

#[test]
fn replacements_that_never_get_ready_stop_the_drain_where_it_is() {
    let mut fleet = crowded(6, 2);
    fleet.work("web", Work { ready_after: None, ..Work::default() });
    // What runs stays ready: the agents of the model ask anew, so the old copies keep their state by not being asked.
    let ready: Vec<AllocId> = fleet.state.allocs_of(&key("web")).map(|a| a.id).collect();
    fleet.hold(&ready);
    fleet.drain(0, None);
    fleet.pass(100);
    assert_eq!((flagged(&fleet, "web"), fleet.running("web", 0)), (2, 6)); // judged is not ready
    assert!(!drained(&fleet, 0));
    let why = drain::waiting(&fleet.state, node(0));
    assert_eq!(why.len(), 6);
    assert!(why.iter().any(|(_, why)| why.contains("until its replacement is ready")), "{why:?}");
}

#[test]
fn two_services_move_in_waves_of_three_three_and_two() {
    let mut fleet = Fleet::new(1);
    for name in ["a", "b"] {
        fleet.deploy(name, with_parallel(8, 3));
    }
    fleet.pass(2);
    fleet.join(1);
    fleet.join(2);
    for name in ["a", "b"] {
        fleet.work(name, Work { ready_after: Some(Span::secs(10)), ..Work::default() });
    }
    fleet.pass(12);
    fleet.drain(0, None);
    let mut waves = vec![];
    while !drained(&fleet, 0) && waves.len() < 20 {
        fleet.settle();
        let wave = (flagged(&fleet, "a"), flagged(&fleet, "b"));
        if wave != (0, 0) {
            waves.push(wave);
        }
        fleet.pass_by(10, 10);
    }
    assert_eq!(waves, [(3, 3), (3, 3), (2, 2)]);
}

#[test]
fn a_run_is_left_to_finish_unless_the_deadline_comes() {
    for deadline in [None, Some(Span::secs(30))] {
        let mut fleet = Fleet::new(1);
        fleet.work("batch", Work { takes: Span::secs(100), ..Work::default() });
        fleet.deploy("batch", job());
        fleet.pass(2);
        fleet.join(1);
        fleet.drain(0, deadline);
        fleet.pass(60);
        match deadline {
            None => assert_eq!((fleet.running("batch", 0), drained(&fleet, 0)), (1, false)),
            Some(_) => assert_eq!((fleet.running("batch", 1), drained(&fleet, 0)), (1, true)),
        }
        fleet.pass(100);
        assert!(drained(&fleet, 0));
        let run = fleet.runs("batch").pop().unwrap();
        assert_eq!((run.phase, run.failures), (RunPhase::Succeeded, 0)); // a move is no failed try
    }
}

#[test]
fn with_no_other_node_copies_stop_at_the_deadline_and_wait_for_room() {
    let mut fleet = Fleet::new(1);
    fleet.deploy("web", service(3));
    fleet.pass(2);
    fleet.drain(0, Some(Span::secs(20)));
    fleet.pass(19);
    assert_eq!((fleet.ready("web"), drained(&fleet, 0)), (3, false));
    fleet.pass(3);
    assert_eq!((fleet.ready("web"), drained(&fleet, 0)), (0, true));
    fleet.join(1);
    fleet.pass(3);
    assert_eq!(fleet.running("web", 1), 3);
}

#[test]
fn daemons_go_last_or_stay() {
    for keep_daemons in [false, true] {
        let mut fleet = crowded(3, 1);
        fleet.deploy("logger", daemon());
        fleet.work("web", Work { ready_after: Some(Span::secs(3)), ..Work::default() });
        fleet.pass(5);
        fleet.change(0, NodeChange::Drain { deadline: None, keep_daemons });
        for _ in 0..60 {
            fleet.pass(1);
            let left = fleet.state.allocs_on(node(0)).filter(|a| a.key == key("web") && !a.has_ended()).count();
            assert!(left == 0 || fleet.running("logger", 0) == 1);
        }
        assert!(drained(&fleet, 0));
        assert_eq!((fleet.running("logger", 0), fleet.running("logger", 1)), (usize::from(keep_daemons), 1));
        fleet.change(0, NodeChange::Uncordon);
        fleet.pass(3);
        assert_eq!(fleet.running("logger", 0), 1); // it follows the node back
    }
}

#[test]
fn a_cancelled_drain_leaves_what_still_runs_and_the_node_as_it_was() {
    for cordoned in [false, true] {
        let mut fleet = crowded(4, 1);
        fleet.work("web", Work { ready_after: Some(Span::secs(10)), ..Work::default() });
        fleet.pass(12);
        if cordoned {
            fleet.change(0, NodeChange::Cordon);
        }
        fleet.drain(0, None);
        fleet.pass(5);
        fleet.change(0, NodeChange::CancelDrain);
        fleet.pass(40);
        assert_eq!((flagged(&fleet, "web"), fleet.ready("web")), (0, 4));
        assert_eq!(fleet.state.nodes[&node(0)].cordoned, cordoned);
        fleet.replays();
    }
}

#[test]
fn a_preview_says_where_each_copy_goes_and_what_waits() {
    let mut fleet = crowded(3, 2);
    fleet.deploy("logger", daemon());
    let fits_nowhere = Resources { cpu: Millicores(3500), ..spec().resources };
    fleet.pass(2);
    fleet.change(1, NodeChange::Cordon);
    fleet.change(2, NodeChange::Cordon);
    fleet.deploy("big", WorkloadSpec { copies: Some(1), resources: Resources { cpu: Millicores(3000), ..fits_nowhere }, ..spec() });
    fleet.work("batch", Work { takes: Span::secs(1000), ..Work::default() });
    fleet.deploy("batch", WorkloadSpec { resources: Resources { cpu: Millicores(100), ..fits_nowhere }, ..job() });
    fleet.pass(3);
    fleet.change(1, NodeChange::Uncordon);
    fleet.deploy("other", WorkloadSpec { copies: Some(1), resources: Resources { cpu: Millicores(1500), ..fits_nowhere }, ..spec() });
    fleet.pass(3);
    let before = fleet.state.clone();
    let preview = drain::preview(&fleet.state, node(0), false, fleet.now);
    assert_eq!(fleet.state, before);
    let fate = |name: &str| preview.copies.iter().filter(|f| f.key == key(name)).map(|f| &f.fate).collect::<Vec<_>>();
    assert!(fate("web").iter().all(|f| matches!(f, drain::Fate::Moves { to, .. } if *to == node(1))) && fate("web").len() == 3);
    assert!(matches!(fate("big")[..], [drain::Fate::Waits { why: Reason::NoNodeFits { .. } }]));
    assert_eq!((fate("batch"), fate("logger")), (vec![&drain::Fate::Finishes], vec![&drain::Fate::StopsLast]));
    assert_eq!(preview.waves, 2); // three copies, two at a time
}

#[test]
fn rebalancing_moves_no_more_than_its_budget_and_comes_to_rest() {
    let mut fleet = crowded(9, 1);
    let moves = drain::rebalance(&fleet.state, fleet.now, 100);
    assert_eq!(moves.len(), 6, "{moves:#?}"); // three on each node
    fleet.pass(50);
    assert_eq!(fleet.running("web", 0), 9); // an opt-in
    fleet.apply(Command::SetRebalance { automatic: true, moves: 2, every: Span::secs(60) });
    fleet.pass(1);
    let mut before = fleet.running("web", 0);
    assert_eq!(before, 7);
    for _ in 0..6 {
        fleet.pass(60);
        let now = fleet.running("web", 0);
        assert!(before - now <= 2 && fleet.ready("web") >= 9);
        before = now;
    }
    assert_eq!([0, 1, 2].map(|n| fleet.running("web", n)), [3, 3, 3]);
    assert!(drain::rebalance(&fleet.state, fleet.now, 100).is_empty());
    let placed = fleet.state.allocs.len();
    fleet.pass(300);
    assert_eq!(fleet.state.allocs.len(), placed);
    fleet.replays();
}

#[test]
fn an_order_beyond_the_budget_moves_only_what_is_left_of_it() {
    let mut fleet = crowded(9, 9);
    fleet.apply(Command::SetRebalance { automatic: false, moves: 2, every: Span::secs(600) });
    let moves = |fleet: &Fleet| drain::rebalance(&fleet.state, fleet.now, 100).into_iter().map(|m| m.alloc).collect::<Vec<_>>();
    let order = moves(&fleet);
    fleet.apply(Command::Rebalance { moves: order });
    fleet.pass(10);
    assert_eq!(fleet.running("web", 0), 7);
    let order = moves(&fleet);
    assert!(matches!(fleet.apply(Command::Rebalance { moves: order }), Applied::Unchanged { .. }));
}

#[test]
fn labels_and_pools_of_operators_stand_over_those_of_the_agent() {
    let mut fleet = Fleet::new(1);
    let mut own = facts("host-0");
    own.labels = BTreeMap::from([("zone".into(), "a".into()), ("disk".into(), "ssd".into())]);
    fleet.apply(Command::NodeUp { node: node(0), facts: own });
    let set = BTreeMap::from([("zone".to_owned(), Some("b".to_owned()))]);
    fleet.change(0, NodeChange::Labels(set.clone()));
    fleet.change(0, NodeChange::Pool(Some(Name::new("batch").unwrap())));
    let row = fleet.state.nodes[&node(0)].clone();
    assert_eq!((row.labels()["zone"].as_str(), row.labels()["disk"].as_str(), row.pool()), ("b", "ssd", "batch"));
    assert!(matches!(fleet.change(0, NodeChange::Labels(set)), Applied::Unchanged { .. }));
    fleet.change(0, NodeChange::Labels(BTreeMap::from([("zone".to_owned(), None)])));
    assert_eq!(fleet.state.nodes[&node(0)].labels()["zone"], "a");
    let many = (0..=NODE_LABELS_MAX).map(|n| (format!("l{n}"), Some(String::new()))).collect();
    assert!(matches!(fleet.change(0, NodeChange::Labels(many)), Applied::Refused(Refusal::TooMany { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 8, ..ProptestConfig::default() })]

    /// Whatever is drained, cancelled and opened again in whatever order, as long as nothing is forced: copies that are
    /// ready are never fewer than those wanted less those that may be missing, no move counts as a failure, and in the
    /// end all is at rest.
    #[test]
    fn drains_never_take_more_than_may_be_missing(
        copies in 1u32..6, parallel in 1u32..4, takes in 0u64..6,
        acts in prop::collection::vec((0usize..3, 0u8..4, 0u64..12), 1..20),
    ) {
        let mut fleet = Fleet::new(3);
        fleet.work("web", Work { ready_after: Some(Span::secs(takes)), ..Work::default() });
        fleet.work("batch", Work { takes: Span::secs(20), ..Work::default() });
        fleet.deploy("web", with_parallel(copies, parallel));
        fleet.deploy("logger", WorkloadSpec { resources: Resources { cpu: Millicores(100), ..spec().resources }, ..daemon() });
        fleet.deploy("batch", job());
        fleet.pass(takes + 10);
        let least = copies.saturating_sub(parallel) as usize;
        for (n, act, pass) in acts {
            match act {
                0 | 1 => fleet.drain(n, None),
                2 => drop(fleet.change(n, NodeChange::CancelDrain)),
                _ => drop(fleet.change(n, NodeChange::Uncordon)),
            }
            for _ in 0..pass {
                fleet.pass(1);
                prop_assert!(fleet.ready("web") >= least, "{} of {copies} ready", fleet.ready("web"));
                prop_assert!((0..3).all(|n| fleet.running("logger", n) <= 1));
            }
        }
        for n in 0..3 {
            fleet.change(n, NodeChange::Uncordon);
        }
        fleet.pass(60);
        prop_assert_eq!((fleet.ready("web"), flagged(&fleet, "web"), fleet.ready("logger")), (copies as usize, 0, 3));
        prop_assert!(fleet.state.failures.is_empty());
        prop_assert!(fleet.phases("batch").iter().all(|p| *p == RunPhase::Succeeded));
        prop_assert!(!fleet.look(), "the leader still has something to do");
        fleet.replays();
    }
}
