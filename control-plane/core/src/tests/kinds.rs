//! Daemons and the runs of jobs.

use super::fleet::*;
use super::*;

#[test]
fn a_daemon_runs_once_on_every_node_and_follows_those_that_join() {
    let mut fleet = Fleet::new(10);
    fleet.deploy("logger", daemon());
    fleet.pass(3);
    assert!((0..10).all(|n| fleet.running("logger", n) == 1));
    let before = fleet.state.allocs.len();
    fleet.join(10);
    fleet.pass(1);
    assert_eq!((fleet.state.allocs.len() - before, fleet.running("logger", 10)), (1, 1)); // exactly one placement, on it
    fleet.apply(Command::RemoveNode { node: node(3) });
    fleet.pass(1);
    assert_eq!(fleet.ready("logger"), 10);
    fleet.join(11);
    fleet.pass(1);
    let index = |fleet: &Fleet, n| fleet.state.allocs_on(node(n)).next().unwrap().index;
    assert_eq!(index(&fleet, 11), 3); // the lowest that is free
    let five = index(&fleet, 5);
    fleet.deploy("logger", again(daemon(), 2));
    fleet.pass(60);
    assert_eq!(index(&fleet, 5), five); // a node keeps its slot
    assert_eq!(fleet.state.deployments_of(&key("logger")).last().unwrap().phase, DeploymentPhase::Succeeded);
    fleet.replays();
}

#[test]
fn a_daemon_moves_a_share_of_its_matching_nodes_rounded_up() {
    let mut fleet = Fleet::new(10);
    for n in 7..10 {
        let mut facts = facts(&format!("host-{n}"));
        facts.drivers.clear();
        fleet.apply(Command::NodeUp { node: node(n), facts });
    }
    fleet.deploy("logger", daemon());
    fleet.pass(10);
    assert_eq!(fleet.ready("logger"), 7);
    let mut next = again(daemon(), 2);
    next.update.percent = Some(20);
    fleet.work("logger", Work { ready_after: Some(Span::secs(5)), ..Work::default() });
    fleet.deploy("logger", next);
    let mut least = 7;
    for _ in 0..60 {
        fleet.pass(1);
        least = least.min(fleet.ready("logger"));
        assert!((0..10).all(|n| fleet.running("logger", n) <= 1), "two copies on one node");
    }
    assert_eq!((least, fleet.ready("logger")), (5, 7)); // 20% of 7, rounded up: 2
}

#[test]
fn a_daemon_that_never_gets_ready_goes_back() {
    let mut fleet = Fleet::new(3);
    fleet.deploy("logger", daemon());
    fleet.pass(2);
    fleet.work("logger", Work { ready_after: None, ..Work::default() });
    fleet.deploy("logger", again(daemon(), 2));
    fleet.pass(61);
    assert_eq!(fleet.state.workload(&key("logger")).unwrap().release, 1);
    fleet.work("logger", Work::default());
    fleet.pass(5);
    assert_eq!(fleet.state.deployments_of(&key("logger")).last().unwrap().phase, DeploymentPhase::RolledBack);
    assert!(fleet.state.allocs_of(&key("logger")).filter(|a| a.run).all(|a| a.release == 1));
}

#[test]
fn a_full_node_does_not_hold_up_a_daemon() {
    let mut fleet = Fleet::new(3);
    let full = Resources { cpu: Millicores(4000), ..spec().resources };
    fleet.deploy("big", WorkloadSpec { copies: Some(1), resources: full, ..spec() });
    fleet.pass(1);
    fleet.deploy("logger", daemon());
    fleet.pass(3);
    assert_eq!(fleet.ready("logger"), 2);
    assert_eq!(fleet.state.deployments_of(&key("logger")).last().unwrap().phase, DeploymentPhase::Succeeded);
    let missing = reconciler::unplaced_slots(&fleet.state, fleet.state.workload(&key("logger")).unwrap(), fleet.now, 9);
    assert!(matches!(missing.as_slice(), [(_, Reason::NotForNode { .. })]), "{missing:?}");
}

#[test]
fn a_job_that_is_done_runs_again_only_for_a_new_release_or_on_request() {
    let mut fleet = Fleet::new(2);
    let ten = WorkloadSpec { copies: Some(10), resources: Resources { cpu: Millicores(100), ..spec().resources }, ..job() };
    fleet.deploy("batch", ten.clone());
    fleet.pass(15);
    assert_eq!(fleet.phases("batch"), [RunPhase::Succeeded]);
    let placed = |fleet: &Fleet| fleet.runs("batch").iter().map(|r| r.attempts).sum::<u32>();
    assert_eq!(placed(&fleet), 10);
    assert!(matches!(fleet.deploy("batch", ten.clone()), Applied::Deployed { deployments, .. } if deployments.is_empty()));
    fleet.drain(0, None);
    fleet.pass(15);
    assert_eq!(placed(&fleet), 10);
    assert!(fleet.state.nodes[&node(0)].drain.as_ref().unwrap().done_at.is_some());
    fleet.change(0, NodeChange::Uncordon);
    fleet.deploy("batch", again(ten, 2));
    fleet.pass(15);
    assert_eq!((placed(&fleet), fleet.runs("batch").len()), (20, 2)); // all ten run again
    fleet.run_job("batch");
    fleet.pass(15);
    assert_eq!(fleet.runs("batch").len(), 3);
    fleet.replays();
}

#[test]
fn a_run_is_retried_with_growing_pauses_and_then_fails() {
    let mut fleet = Fleet::new(2);
    fleet.work("flaky", Work { takes: Span::secs(1), exits: vec![3, 3, 0], ..Work::default() });
    let mut spec = job();
    spec.runs.as_mut().unwrap().retries = 2;
    fleet.deploy("flaky", spec.clone());
    fleet.pass(20);
    let run = fleet.runs("flaky").pop().unwrap();
    assert_eq!((run.phase, run.failures, run.attempts, run.exit), (RunPhase::Succeeded, 2, 3, Some(0)));
    fleet.work("broken", Work { takes: Span::secs(1), exits: vec![7], ..Work::default() });
    let began = fleet.now;
    fleet.deploy("broken", spec);
    fleet.pass(20);
    let run = fleet.runs("broken").pop().unwrap();
    assert_eq!((run.phase, run.failures, run.attempts, run.exit), (RunPhase::Failed, 3, 3, Some(7)));
    assert_eq!(run.ended_at.unwrap().since(began), Span::secs(1 + 1 + 1 + 2 + 1)); // three tries, pauses of 1 s and 2 s
    assert!(matches!(run.reason, Some(Reason::Exited { .. })));
    fleet.pass(60);
    assert_eq!(fleet.runs("broken").len(), 1); // a run that has failed has failed
}

#[test]
fn runs_beyond_those_active_wait_and_beyond_those_waiting_are_refused() {
    let mut fleet = Fleet::new(2);
    let mut spec = job();
    *spec.runs.as_mut().unwrap() = Runs { active: 1, waiting: 2, on: RunOn::Request, ..Runs::of(None) };
    fleet.deploy("encode", spec);
    fleet.pass(1);
    for _ in 0..3 {
        assert!(matches!(fleet.run_job("encode"), Applied::Done { .. }));
        fleet.pass(1);
    }
    assert!(matches!(fleet.run_job("encode"), Applied::Refused(Refusal::RunsFull { waiting: 2, .. })));
    assert_eq!(fleet.phases("encode"), [RunPhase::Active, RunPhase::Waiting, RunPhase::Waiting]);
    fleet.apply(Command::CancelRun { key: key("encode"), number: 1 });
    fleet.pass(40);
    assert_eq!(fleet.phases("encode"), [RunPhase::Cancelled, RunPhase::Succeeded, RunPhase::Succeeded]);
}

/// Seeds 1190, 1285 and 1837 of the simulator: its room was taken for ever.
#[test]
fn a_copy_that_ended_as_its_run_was_cancelled_keeps_no_room() {
    let mut fleet = Fleet::new(1);
    fleet.deploy("encode", job());
    while fleet.state.allocs_of(&key("encode")).next().is_none() {
        assert!(fleet.look());
    }
    let copy = fleet.state.allocs_of(&key("encode")).next().unwrap().clone();
    let exit = Exit { code: Some(0), signal: None, oom: None, at: fleet.now, ran_for: Span(5) };
    let status = AllocStatus { seq: 1, phase: Phase::Stopped, reason: Some(Reason::Exited { exit }), ..AllocStatus::unknown(copy.id) };
    fleet.apply(Command::Report { node: copy.node, statuses: vec![status], gone: vec![] });
    fleet.apply(Command::CancelRun { key: key("encode"), number: 1 });
    fleet.settle();
    assert_eq!(fleet.phases("encode"), [RunPhase::Cancelled]);
    assert!(fleet.state.allocs_of(&key("encode")).all(|a| a.has_ended()));
}

#[test]
fn a_run_is_given_what_its_job_asks_for() {
    let mut fleet = Fleet::new(1);
    let mut spec = job();
    *spec.runs.as_mut().unwrap() =
        Runs { on: RunOn::Request, params: vec!["CUSTOMER".into()], payload: PayloadRule::Required, ..Runs::of(None) };
    fleet.deploy("import", spec);
    fleet.pass(1);
    let order = |params: &[(&str, &str)], payload: Option<usize>| {
        let params = params.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let payload = payload.map(|n| Arc::new(vec![b'x'; n]));
        Command::StartRun(RunOrder { key: key("import"), id: optimus_common::RunId(id(77)), params, payload })
    };
    let refused = |answer: Applied| matches!(answer, Applied::Refused(Refusal::RunInput(_)));
    assert!(refused(fleet.apply(order(&[], Some(1)))));
    assert!(refused(fleet.apply(order(&[("CUSTOMER", "7"), ("X", "1")], Some(1)))));
    assert!(refused(fleet.apply(order(&[("CUSTOMER", "7")], None))));
    assert!(refused(fleet.apply(order(&[("CUSTOMER", "7")], Some(optimus_common::spec::job::PAYLOAD_MAX + 1)))));
    assert!(matches!(fleet.apply(order(&[("CUSTOMER", "7")], Some(3))), Applied::Done { .. }));
    assert!(matches!(fleet.apply(order(&[("CUSTOMER", "7")], Some(3))), Applied::Unchanged { .. })); // proposed twice
    fleet.pass(1);
    let desired = reconciler::desired_for(&fleet.state, node(0), &|_, _| None).unwrap();
    let spec: WorkloadSpec = desired[0].spec.open().unwrap();
    let input = spec.runs.unwrap().input.unwrap();
    assert_eq!((input.number, input.params["CUSTOMER"].as_str(), input.payload.as_deref()), (1, "7", Some(&b"xxx"[..])));
    fleet.pass(15);
    assert!(fleet.runs("import")[0].payload.is_none()); // not kept for ever
}

#[test]
fn a_copy_on_a_lost_node_is_replaced_and_two_do_not_go_on() {
    let mut fleet = Fleet::new(2);
    fleet.work("long", Work { takes: Span::secs(100), ..Work::default() });
    fleet.deploy("long", job());
    fleet.pass(2);
    let on = if fleet.running("long", 0) == 1 { 0 } else { 1 };
    fleet.apply(Command::NodeDown { node: node(on) });
    fleet.pass(2);
    assert_eq!(fleet.running("long", 1 - on), 1);
    let facts = facts(&format!("host-{on}"));
    fleet.apply(Command::NodeUp { node: node(on), facts });
    fleet.pass(2);
    assert_eq!((fleet.running("long", on), fleet.running("long", 1 - on)), (1, 0)); // the one that is further goes on
    fleet.pass(110);
    assert_eq!(fleet.phases("long"), [RunPhase::Succeeded]);
}

#[test]
fn a_run_without_room_fails_in_the_end_and_says_why() {
    let mut fleet = Fleet::new(1);
    let mut spec = job();
    spec.resources.cpu = Millicores(64_000);
    spec.runs.as_mut().unwrap().start_within = Span::secs(30);
    fleet.deploy("huge", spec);
    fleet.pass(29);
    assert_eq!(fleet.phases("huge"), [RunPhase::Active]);
    fleet.pass(3);
    let run = fleet.runs("huge").pop().unwrap();
    assert!(run.phase == RunPhase::Failed && matches!(run.reason, Some(Reason::NoNodeFits { .. })), "{run:?}");
}

#[test]
fn a_removed_job_leaves_nothing() {
    let mut fleet = Fleet::new(1);
    fleet.deploy("batch", cron("* * * * *"));
    fleet.pass_by(200, 10);
    assert!(fleet.runs("batch").len() >= 3);
    fleet.apply(Command::RemoveWorkload { key: key("batch") });
    fleet.pass(3);
    let State { jobs, runs, workloads, allocs, .. } = &fleet.state;
    assert!(jobs.is_empty() && runs.is_empty() && workloads.is_empty() && allocs.is_empty());
    fleet.replays();
}
