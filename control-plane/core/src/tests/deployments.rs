//! Deployments of each strategy, step by step.

use super::*;
use optimus_common::spec::{Amount, CanaryStep};

impl World {
    pub(super) fn steer(&mut self, name: &str, act: Steering) -> Applied {
        let deployment = DeploymentId(self.next_id());
        self.apply(Command::Steer { key: key(name), act, why: Some("because".into()), deployment })
    }

    /// Copies of a release that should run.
    pub(super) fn of(&self, name: &str, release: u64) -> Vec<AllocId> {
        self.copies(name).iter().filter(|a| a.release == release).map(|a| a.id).collect()
    }

    pub(super) fn ready_of(&self, name: &str, release: u64) -> usize {
        self.copies(name).iter().filter(|a| a.release == release && a.is_ready()).count()
    }

    pub(super) fn phase(&self, name: &str) -> DeploymentPhase {
        self.deployment(name).phase
    }

    /// A copy's agent says that it is gone for good.
    pub(super) fn kill(&mut self, id: AllocId) {
        let alloc = self.state.allocs[&id].clone();
        self.seq += 1;
        let reason = Some(Reason::StartFailed { step: "go on".into(), error: "killed".into() });
        let old = AllocStatus::clone(alloc.status.as_ref().unwrap());
        let status = AllocStatus { seq: self.seq, phase: Phase::Failed, ready: false, ready_since: None, reason, ..old };
        self.apply(Command::Report { node: alloc.node, statuses: vec![status], gone: vec![] });
    }
}

pub(super) fn v(n: u32, copies: u32, update: Update) -> WorkloadSpec {
    let mut spec = WorkloadSpec { copies: Some(copies), update: Update { deadline: Span::secs(30), ..update }, ..changed(n) };
    spec.resources.cpu = Millicores(50);
    spec
}

pub(super) fn canary() -> Update {
    let steps = vec![CanaryStep { weight: 10, bake: Span::secs(5) }, CanaryStep { weight: 50, bake: Span::secs(5) }];
    Update { strategy: Strategy::Canary, canary: Amount::Count(2), steps, auto_promote: false, parallel: 2, ..Update::default() }
}

pub(super) fn blue_green() -> Update {
    Update { strategy: Strategy::BlueGreen, hold: Span::secs(5), ..Update::default() }
}

pub(super) fn rolling(parallel: u32) -> Update {
    Update { parallel, ..Update::default() }
}

/// A world where release 1 runs with `copies`, and release 2 was just deployed.
pub(super) fn updated(copies: u32, update: &Update) -> World {
    let mut world = World::new(2);
    world.deploy("web", v(1, copies, update.clone()));
    world.run(3);
    assert_eq!(world.phase("web"), DeploymentPhase::Succeeded);
    world.deploy("web", v(2, copies, update.clone()));
    world
}

#[test]
fn canaries_run_beside_the_old_copies_and_take_over_once_promoted() {
    let mut world = updated(10, &canary());
    let old = world.of("web", 1);
    world.run(1);
    let canaries = world.of("web", 2);
    assert_eq!((world.of("web", 1), canaries.len()), (old.clone(), 2));
    assert_eq!(world.copies("web").iter().filter(|a| a.release == 2).map(|a| a.index).collect::<Vec<_>>(), [0, 1]);
    assert_eq!((world.phase("web"), world.deployment("web").weight), (DeploymentPhase::Baking, Some(10)));
    world.run(5);
    assert_eq!((world.phase("web"), world.deployment("web").weight), (DeploymentPhase::Baking, Some(50)));
    world.run(5);
    assert_eq!(world.phase("web"), DeploymentPhase::Promoting);
    // Nobody promotes: that is no failure, however long it takes.
    world.run(100);
    assert_eq!(world.phase("web"), DeploymentPhase::Promoting);
    let shown = view::deployment(&world.state, &world.deployment("web"));
    assert_eq!((shown.reason.unwrap().code.as_str(), shown.deadline_at), ("OPT-2511", None));
    assert_eq!(shown.steps.iter().map(|s| s.status.as_str()).collect::<Vec<_>>(), ["done", "current"]);

    assert!(matches!(world.steer("web", Steering::Promote), Applied::Done { .. }));
    world.reconcile();
    assert!(canaries.iter().all(|id| world.of("web", 2).contains(id)), "the canaries take over");
    let running = world.of("web", 1);
    assert_eq!(running.len(), 8, "the old copies beside them stop");
    assert_eq!(world.of("web", 2).len(), 4, "and the next two move");
    world.run(10);
    assert_eq!((world.phase("web"), world.of("web", 1).len(), world.ready_of("web", 2)), (DeploymentPhase::Succeeded, 0, 10));
    assert_eq!(world.state.workload(&key("web")).unwrap().stable, Some(2));
}

#[test]
fn a_broken_release_goes_back_by_itself_and_touches_no_old_copy() {
    for update in [canary(), blue_green()] {
        for behaviour in [Behaviour::NeverReady, Behaviour::Crashes, Behaviour::PortTaken] {
            let mut world = World::new(2);
            world.deploy("web", v(1, 4, update.clone()));
            world.run(3);
            let old = world.of("web", 1);
            world.behaviour.insert(2, behaviour);
            world.deploy("web", v(2, 4, update.clone()));
            world.run(120);
            let deployment = world.deployment("web");
            assert_eq!(deployment.phase, DeploymentPhase::RolledBack, "{:?} {behaviour:?}: {deployment:?}", update.strategy);
            assert_eq!(world.copies("web").iter().map(|a| a.id).collect::<Vec<_>>(), old);
            assert!(deployment.reason.is_some_and(|r| !r.is_calm()));
            assert_eq!(world.state.workload(&key("web")).unwrap().newest, 2, "going back is no release");
        }
    }
}

#[test]
fn a_canary_that_crashes_while_it_bakes_brings_the_old_release_back() {
    let mut world = updated(4, &canary());
    let old = world.of("web", 1);
    world.run(2);
    assert_eq!(world.phase("web"), DeploymentPhase::Baking);
    world.behaviour.insert(2, Behaviour::Crashes);
    world.run(3);
    assert_eq!((world.phase("web"), world.of("web", 1)), (DeploymentPhase::RolledBack, old));
    assert!(world.of("web", 2).is_empty());
}

#[test]
fn an_old_copy_that_dies_in_the_middle_of_a_canary_is_replaced_by_the_old_release() {
    for update in [canary(), blue_green()] {
        let mut world = updated(4, &update);
        world.run(2);
        assert_eq!(world.phase("web"), DeploymentPhase::Baking);
        for slot in [0, 3] {
            let dead = world.copies("web").iter().find(|a| a.release == 1 && a.index == slot).unwrap().id;
            world.kill(dead);
            world.run(1);
            let successor = world.copies("web").iter().find(|a| a.release == 1 && a.index == slot).unwrap().clone();
            assert!(successor.id != dead && successor.is_ready());
        }
        assert_eq!(world.of("web", 1).len(), 4);
    }
}

#[test]
fn blue_green_switches_at_once_and_keeps_the_old_set_for_a_while() {
    let mut world = updated(4, &blue_green());
    let old = world.of("web", 1);
    world.reconcile();
    assert_eq!((world.of("web", 1), world.of("web", 2).len()), (old.clone(), 4), "a whole second set at once");
    assert_eq!(world.deployment("web").weight, Some(0));
    world.run(4);
    assert_eq!((world.phase("web"), world.deployment("web").weight), (DeploymentPhase::Baking, Some(100)));
    assert_eq!(world.of("web", 1), old);
    // Going back within the hold is one command: no copy has to start.
    let mut back = World { state: world.state.clone(), log: vec![], behaviour: BTreeMap::new(), ..world };
    assert!(matches!(back.steer("web", Steering::RollBack { to: None }), Applied::Done { .. }));
    assert_eq!((back.deployment("web").weight, back.ready_of("web", 1)), (Some(0), 4));
    back.run(2);
    assert_eq!((back.phase("web"), back.of("web", 1)), (DeploymentPhase::RolledBack, old.clone()));

    let mut world = updated(4, &blue_green());
    world.run(9);
    assert_eq!((world.phase("web"), world.of("web", 1).len(), world.ready_of("web", 2)), (DeploymentPhase::Succeeded, 0, 4));
}

#[test]
fn a_switch_that_is_not_to_be_automatic_waits_before_it() {
    let mut world = updated(2, &Update { auto_promote: false, ..blue_green() });
    world.run(50);
    assert_eq!((world.phase("web"), world.deployment("web").weight), (DeploymentPhase::Promoting, Some(0)));
    assert!(matches!(world.steer("web", Steering::Promote), Applied::Done { .. }));
    world.run(2);
    assert_eq!((world.phase("web"), world.deployment("web").weight), (DeploymentPhase::Baking, Some(100)));
    world.run(10);
    assert_eq!(world.phase("web"), DeploymentPhase::Succeeded);
}

#[test]
fn calling_it_off_leaves_the_old_release_whole_in_each_phase() {
    for update in [rolling(1), rolling(3), canary(), blue_green()] {
        for looks in 0..12 {
            let mut world = updated(4, &update);
            for _ in 0..looks {
                world.reconcile();
                world.agents();
                world.now = world.now + Span::secs(1);
            }
            if world.phase("web").is_final() {
                break;
            }
            assert!(matches!(world.steer("web", Steering::Abort), Applied::Done { .. }), "{update:?} after {looks}");
            world.run(40);
            assert_eq!(world.phase("web"), DeploymentPhase::Cancelled, "{update:?} after {looks} looks");
            assert_eq!((world.ready_of("web", 1), world.copies("web").len()), (4, 4), "{update:?} after {looks} looks");
            assert!(matches!(world.deployment("web").reason, Some(Reason::CalledOff { .. })));
        }
    }
}

#[test]
fn no_more_than_parallel_copies_are_unproven_at_once() {
    for healthy in 0..=4usize {
        let mut world = updated(10, &rolling(4));
        world.reconcile();
        assert_eq!((world.of("web", 1).len(), world.of("web", 2).len()), (10, 4));
        // So many of the four become ready; the others say nothing.
        let new: Vec<Arc<Alloc>> = world.copies("web").into_iter().filter(|a| a.release == 2).take(healthy).collect();
        for alloc in new {
            let status = world.obey(&alloc).unwrap();
            world.apply(Command::Report { node: alloc.node, statuses: vec![status], gone: vec![] });
        }
        while world.reconcile() {}
        assert_eq!(world.of("web", 2).len(), 4 + healthy, "exactly as many more as proved themselves");
        assert_eq!(world.of("web", 2).len() - world.ready_of("web", 2), 4);
    }
}

#[test]
fn nothing_more_moves_while_a_new_copy_is_unwell() {
    let mut world = updated(6, &rolling(2));
    world.reconcile();
    let new: Vec<Arc<Alloc>> = world.copies("web").into_iter().filter(|a| a.release == 2).collect();
    let well = world.obey(&new[0]).unwrap();
    world.behaviour.insert(2, Behaviour::Crashes);
    let unwell = world.obey(&new[1]).unwrap();
    for (alloc, status) in new.iter().zip([well, unwell]) {
        world.apply(Command::Report { node: alloc.node, statuses: vec![status], gone: vec![] });
    }
    while world.reconcile() {}
    assert_eq!(world.of("web", 2).len(), 2);
}

#[test]
fn a_pause_moves_nothing_and_is_no_failure() {
    let mut world = updated(4, &rolling(1));
    world.reconcile();
    world.agents();
    assert!(matches!(world.steer("web", Steering::Pause), Applied::Done { .. }));
    assert!(matches!(world.steer("web", Steering::Pause), Applied::Unchanged { .. }));
    let before: Vec<AllocId> = world.copies("web").iter().map(|a| a.id).collect();
    world.run(100);
    assert_eq!(world.copies("web").iter().map(|a| a.id).collect::<Vec<_>>(), before);
    assert_eq!(
        view::deployment(&world.state, &world.deployment("web")).reason.unwrap().message,
        "paused since 1970-01-01T00:16:43.000Z: because"
    );
    // What dies meanwhile is replaced, by its own.
    let dead = world.copies("web").iter().find(|a| a.release == 1 && a.index == 3).unwrap().id;
    world.kill(dead);
    world.run(2);
    assert_eq!((world.of("web", 1).len(), world.ready_of("web", 1)), (4, 4));
    assert!(matches!(world.steer("web", Steering::Resume), Applied::Done { .. }));
    world.run(10);
    assert_eq!((world.phase("web"), world.ready_of("web", 2)), (DeploymentPhase::Succeeded, 4));
}

#[test]
fn what_needs_no_restart_changes_in_place() {
    let mut world = updated(3, &canary());
    world.steer("web", Steering::Abort);
    world.run(3);
    let before: Vec<AllocId> = world.copies("web").iter().map(|a| a.id).collect();
    let mut relabelled = v(1, 2, canary());
    relabelled.labels.insert("team".into(), "shop".into());
    world.deploy("web", relabelled);
    world.run(1);
    assert_eq!(world.copies("web").iter().map(|a| (a.id, a.release)).collect::<Vec<_>>(), [(before[0], 3), (before[1], 3)]);
    assert_eq!(world.phase("web"), DeploymentPhase::Succeeded);
}

#[test]
fn a_restart_starts_copies_anew_and_has_nothing_to_go_back_to() {
    let mut world = World::new(1);
    world.deploy("web", v(1, 3, rolling(1)));
    world.run(2);
    let before = world.of("web", 1);
    world.behaviour.insert(2, Behaviour::NeverReady);
    let deployment = DeploymentId(world.next_id());
    world.apply(Command::Restart { key: key("web"), deployment });
    world.run(60);
    let deployment = world.deployment("web");
    assert_eq!(deployment.phase, DeploymentPhase::Failed);
    assert!(deployment.reason.unwrap().to_string().contains("release 1 before it has the same spec, so there is nothing to go back to"));
    assert_eq!((world.of("web", 1), world.copies("web").len()), (before, 3), "what had not moved stays");
}

#[test]
fn without_automatic_rollback_everything_stays_and_what_dies_is_replaced_by_the_old_release() {
    let update = Update { auto_rollback: false, ..rolling(1) };
    let mut world = updated(3, &update);
    world.reconcile();
    world.agents();
    world.reconcile();
    world.behaviour.insert(2, Behaviour::NeverReady);
    world.run(60);
    assert_eq!(world.phase("web"), DeploymentPhase::Failed);
    let old = world.of("web", 1);
    assert_eq!((old.len(), world.of("web", 2).len()), (2, 1));
    world.kill(old[0]);
    world.run(3);
    assert_eq!((world.ready_of("web", 1), world.of("web", 2).len()), (2, 1));
    // By hand, later.
    assert!(matches!(world.steer("web", Steering::RollBack { to: None }), Applied::Done { .. }));
    world.run(5);
    assert_eq!((world.ready_of("web", 1), world.phase("web")), (3, DeploymentPhase::Succeeded));
    assert_eq!(world.state.workload(&key("web")).unwrap().newest, 2);
}

#[test]
fn going_back_by_hand_is_a_deployment_of_the_old_release_without_a_canary() {
    let mut world = updated(3, &Update { auto_promote: true, ..canary() });
    world.run(20);
    assert_eq!(world.phase("web"), DeploymentPhase::Succeeded);
    assert!(matches!(world.steer("web", Steering::RollBack { to: Some(9) }), Applied::Refused(Refusal::NoSuchRelease { .. })));
    assert!(matches!(world.steer("web", Steering::RollBack { to: Some(2) }), Applied::Refused(Refusal::CannotSteer { .. })));
    assert!(matches!(world.steer("web", Steering::RollBack { to: None }), Applied::Done { .. }));
    world.run(5);
    let deployment = world.deployment("web");
    assert_eq!(
        (deployment.trigger.as_str(), deployment.strategy, deployment.phase),
        ("rollback", Strategy::Rolling, DeploymentPhase::Succeeded)
    );
    assert_eq!((world.ready_of("web", 1), world.state.workload(&key("web")).unwrap().newest), (3, 2));
}

#[test]
fn a_failed_release_can_be_tried_again() {
    let mut world = World::new(1);
    world.deploy("web", v(1, 2, rolling(1)));
    world.run(2);
    world.behaviour.insert(2, Behaviour::NeverReady);
    world.deploy("web", v(2, 2, rolling(1)));
    world.run(60);
    assert_eq!(world.phase("web"), DeploymentPhase::RolledBack);
    world.behaviour.clear();
    assert!(matches!(world.steer("web", Steering::Retry), Applied::Done { .. }));
    world.run(5);
    assert_eq!((world.phase("web"), world.ready_of("web", 2)), (DeploymentPhase::Succeeded, 2));
    assert!(matches!(world.steer("web", Steering::Retry), Applied::Refused(Refusal::CannotSteer { .. })));
}

#[test]
fn a_deployment_waits_for_what_it_comes_after() {
    let mut world = World::new(1);
    world.behaviour.insert(1, Behaviour::NeverReady);
    world.deploy("db", v(1, 1, rolling(1)));
    world.deploy("web", v(1, 1, Update { after: vec![Name::new("db").unwrap()], ..rolling(1) }));
    world.run(5);
    assert_eq!((world.phase("web"), world.copies("web").len()), (DeploymentPhase::Preparing, 0));
    let shown = view::deployment(&world.state, &world.deployment("web"));
    assert_eq!(shown.reason.unwrap().message, "waiting for db to be ready");
    world.behaviour.clear();
    world.run(5);
    assert_eq!((world.phase("web"), world.ready("web")), (DeploymentPhase::Succeeded, 1));
}

#[test]
fn an_update_that_could_never_fit_touches_nothing() {
    let mut world = World::new(1);
    world.deploy("web", v(1, 2, rolling(1)));
    world.run(2);
    let before = world.of("web", 1);
    let mut huge = v(2, 2, rolling(1));
    huge.resources.memory_request = Bytes(1 << 50);
    world.deploy("web", huge);
    world.run(40);
    let deployment = world.deployment("web");
    assert_eq!((deployment.phase, world.of("web", 1)), (DeploymentPhase::RolledBack, before));
    assert!(deployment.reason.unwrap().to_string().contains("no node can take it"));
    assert_eq!(world.state.events.values().filter(|e| e.kind == EventKind::CopyPlaced).count(), 2);
}

#[test]
fn surge_and_missing_copies_keep_within_what_is_said() {
    let cases = [
        (Some(Amount::Count(0)), Some(Amount::Count(2)), 10, 8),
        (Some(Amount::Count(1)), Some(Amount::Count(0)), 11, 10),
        (Some(Amount::Percent(20)), Some(Amount::Percent(10)), 12, 9),
    ];
    for (max_surge, max_unavailable, most, least) in cases {
        let mut world = updated(10, &Update { max_surge, max_unavailable, ..rolling(5) });
        for _ in 0..200 {
            let decided = world.reconcile();
            let copies = world.copies("web");
            assert!(copies.len() <= most, "{} copies", copies.len());
            assert!(world.ready("web") >= least, "{} ready", world.ready("web"));
            if !(world.agents() | decided) {
                break;
            }
        }
        assert_eq!((world.phase("web"), world.ready_of("web", 2)), (DeploymentPhase::Succeeded, 10));
    }
}

#[test]
fn an_automatic_promotion_needs_every_canary() {
    let mut world = updated(4, &Update { auto_promote: true, ..canary() });
    world.run(4);
    // One of them is no longer ready: back to health, and no promotion.
    let one = world.of("web", 2)[0];
    let alloc = world.state.allocs[&one].clone();
    let old = AllocStatus::clone(alloc.status.as_ref().unwrap());
    world.seq += 1;
    let status = AllocStatus { seq: world.seq, ready: false, reason: Some(Reason::Starting), ..old };
    world.apply(Command::Report { node: alloc.node, statuses: vec![status], gone: vec![] });
    world.reconcile();
    assert_eq!((world.phase("web"), world.deployment("web").relapses), (DeploymentPhase::Health, 1));
    assert!(matches!(world.steer("web", Steering::Promote), Applied::Refused(Refusal::CannotSteer { .. })));
    world.run(30);
    assert_eq!(world.phase("web"), DeploymentPhase::Succeeded);
}

#[test]
fn a_scale_in_the_middle_of_a_canary_is_of_the_old_release_and_growth_by_a_deploy_waits() {
    let mut world = World::new(2);
    world.deploy("web", v(1, 4, canary()));
    world.run(3);
    world.deploy("web", v(2, 6, canary()));
    world.run(2);
    assert_eq!((world.of("web", 1).len(), world.of("web", 2).len()), (4, 2));
    let deployment = DeploymentId(world.next_id());
    world.apply(Command::Scale { key: key("web"), copies: 5, deployment });
    world.run(2);
    assert_eq!((world.of("web", 1).len(), world.of("web", 2).len()), (5, 2));
    world.run(20);
    world.steer("web", Steering::Promote);
    world.run(20);
    assert_eq!((world.phase("web"), world.ready_of("web", 2)), (DeploymentPhase::Succeeded, 5));
}

#[test]
fn a_failed_update_takes_its_number_of_copies_back_too() {
    let mut world = World::new(1);
    world.deploy("web", v(1, 3, rolling(1)));
    world.run(2);
    world.behaviour.insert(2, Behaviour::Crashes);
    world.deploy("web", v(2, 5, rolling(1)));
    world.run(40);
    assert_eq!((world.phase("web"), world.copies("web").len(), world.ready_of("web", 1)), (DeploymentPhase::RolledBack, 3, 3));
}

#[test]
fn servers_that_do_not_know_the_phases_yet_are_sent_none() {
    let mut world = World::new(1);
    world.state.cluster.as_mut().unwrap().version = 2;
    world.deploy("web", v(1, 2, rolling(1)));
    world.run(3);
    world.deploy("web", v(2, 2, rolling(1)));
    world.run(5);
    assert_eq!((world.phase("web"), world.ready_of("web", 2)), (DeploymentPhase::Succeeded, 2));
    assert!(world.log.iter().all(|(_, p)| p.command.level() <= 2 || matches!(p.command, Command::RaiseVersion { .. })));
}

/// What agents say of the limits of the copies they hold.
fn say_limits(world: &mut World, say: impl Fn(&Alloc) -> (Resources, Option<Reason>)) {
    for alloc in world.copies("web") {
        let (limits, reason) = say(&alloc);
        world.seq += 1;
        let status = AllocStatus { seq: world.seq, limits: Some(limits), reason, ..AllocStatus::clone(alloc.status.as_ref().unwrap()) };
        world.apply(Command::Report { node: alloc.node, statuses: vec![status], gone: vec![] });
    }
}

#[test]
fn other_limits_are_taken_on_without_a_restart_once_agents_say_so() {
    let mut world = World::new(2);
    world.deploy("web", spec());
    world.run(2);
    let before = world.copies("web");
    let old = spec().resources;
    say_limits(&mut world, |_| (old, None));
    let resize = |world: &mut World, limits: NewLimits| {
        let deployment = DeploymentId(world.next_id());
        world.apply(Command::Resize { key: key("web"), limits, copies: None, deployment })
    };
    let more = NewLimits { cpu: Some(Millicores(700)), memory_limit: Some(Bytes::mib(256)), ..NewLimits::default() };
    assert!(matches!(resize(&mut world, more), Applied::Done { .. }));
    assert!(matches!(resize(&mut world, NewLimits { cpu: Some(Millicores(1)), ..more }), Applied::Refused(Refusal::CannotSteer { .. })));
    world.run(2);
    assert_eq!(world.phase("web"), DeploymentPhase::Health, "no agent has said that it is so");
    let ids = |world: &World| world.copies("web").iter().map(|a| (a.id, a.release)).collect::<Vec<_>>();
    let new = more.of(old);
    for _ in 0..3 {
        say_limits(&mut world, |a| (if a.release == 2 { new } else { old }, None));
        world.run(1);
    }
    assert_eq!(world.phase("web"), DeploymentPhase::Succeeded);
    assert_eq!(ids(&world), before.iter().map(|a| (a.id, 2)).collect::<Vec<_>>());
    assert!(matches!(resize(&mut world, more), Applied::Unchanged { .. }));

    // Less than a copy uses: its agent refuses, and the old limits are wanted again.
    resize(&mut world, NewLimits { memory_limit: Some(Bytes::mib(8)), ..NewLimits::default() });
    world.run(1);
    let refused = Reason::LimitNotEnforceable { what: "memory".into(), why: "64 MiB are in use".into() };
    say_limits(&mut world, |a| (new, (a.release == 3).then(|| refused.clone())));
    world.run(3);
    let deployment = world.deployment("web");
    assert_eq!(deployment.phase, DeploymentPhase::RolledBack);
    assert!(deployment.reason.unwrap().to_string().contains("64 MiB are in use"));
    assert_eq!(ids(&world), before.iter().map(|a| (a.id, 2)).collect::<Vec<_>>());
}
