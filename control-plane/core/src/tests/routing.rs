//! Traffic and routers, copies that were cut off or are to move, and plans.

use super::deployments::{blue_green, canary, rolling, updated, v};
use super::*;
use optimus_common::spec::{Disconnect, Keep};

impl World {
    fn ack(&mut self, router: &str) {
        let generation = self.state.index;
        self.apply(Command::AckEndpoints { router: router.into(), generation });
    }

    /// Who gets requests, with the weight.
    fn routed(&self, name: &str) -> Vec<(AllocId, u32)> {
        crate::endpoints::set(&self.state, &key(name)).unwrap().endpoints.iter().map(|e| (e.alloc, e.weight)).collect()
    }

    fn generation(&self, name: &str) -> u64 {
        crate::endpoints::set(&self.state, &key(name)).unwrap().generation
    }
}

#[test]
fn a_copy_stops_only_when_routers_know_or_take_too_long() {
    let mut world = updated(2, &rolling(1));
    world.ack("edge-1");
    world.ack("edge-2");
    world.reconcile();
    world.agents();
    // The first new copy is ready: its predecessor gets no more requests, and runs on.
    let old = world.of("web", 1)[0];
    let before = world.generation("web");
    world.reconcile();
    assert!(world.generation("web") > before);
    assert!(world.routed("web").iter().all(|(id, _)| *id != old));
    assert!(world.state.allocs[&old].run);
    assert!(world.ready("web") >= 2);
    world.ack("edge-1");
    assert!(!world.reconcile() || world.state.allocs[&old].run, "the other router does not know yet");
    world.ack("edge-2");
    world.reconcile();
    assert!(!world.state.allocs[&old].run);
    world.agents();
    // The second router says nothing more: two seconds, no longer.
    world.reconcile();
    world.agents();
    world.reconcile();
    let old = world.of("web", 1)[0];
    assert!(world.state.allocs[&old].draining_since.is_some());
    world.now = world.now + Span(1999);
    world.ack("edge-1");
    world.reconcile();
    assert!(world.state.allocs[&old].run);
    world.now = world.now + Span(1);
    world.reconcile();
    assert!(!world.state.allocs[&old].run);
    world.run(3);
    assert_eq!(world.phase("web"), DeploymentPhase::Succeeded);
    // Silent for long, it is forgotten.
    world.now = world.now + Span::secs(400);
    world.ack("edge-1");
    assert_eq!(world.state.routers.keys().collect::<Vec<_>>(), ["edge-1"]);
}

#[test]
fn the_traffic_follows_the_steps() {
    let mut world = updated(4, &canary());
    let share = |world: &World| {
        let all: u32 = world.routed("web").iter().map(|(_, weight)| weight).sum();
        let new: u32 = world.routed("web").iter().filter(|(id, _)| world.state.allocs[id].release == 2).map(|(_, weight)| weight).sum();
        new * 100 / all
    };
    world.reconcile();
    world.agents();
    assert_eq!((world.routed("web").len(), share(&world)), (6, 0), "ready, and not asked yet");
    world.run(2);
    assert_eq!(share(&world), 10);
    world.run(6);
    assert_eq!(share(&world), 50);
    world.steer("web", Steering::Abort);
    assert_eq!(share(&world), 0, "at once");
    world.run(3);
    assert_eq!((world.routed("web").len(), share(&world)), (4, 0));
}

#[test]
fn a_switch_waits_for_every_router_and_copies_of_a_silent_node_get_nothing() {
    let mut world = updated(2, &blue_green());
    world.ack("edge");
    world.reconcile();
    world.agents();
    world.reconcile();
    assert_eq!(world.phase("web"), DeploymentPhase::Shifting);
    world.reconcile();
    assert_eq!(world.phase("web"), DeploymentPhase::Shifting, "the router has not said so");
    world.ack("edge");
    world.reconcile();
    assert_eq!(world.phase("web"), DeploymentPhase::Baking);
    let node = world.copies("web")[0].node;
    let before = world.generation("web");
    world.apply(Command::NodeDown { node });
    assert!(world.generation("web") > before);
    assert!(world.routed("web").iter().all(|(id, _)| world.state.allocs[id].node != node));
}

/// A copy on a node that goes away, and its replacement: (original, replacement).
fn cut_off(disconnect: Option<Disconnect>) -> (World, NodeId, AllocId, AllocId) {
    let mut world = World::new(2);
    world.deploy("web", WorkloadSpec { disconnect, ..v(1, 1, rolling(1)) });
    world.run(2);
    let original = world.copies("web")[0].clone();
    world.apply(Command::NodeDown { node: original.node });
    world.run(2);
    let replacement = world.copies("web").iter().find(|a| a.id != original.id).unwrap().id;
    let unknown = disconnect.is_some_and(|d| d.keep == Keep::Original);
    assert_eq!(world.state.allocs[&original.id].run, unknown, "it is unknown, not lost");
    (world, original.node, original.id, replacement)
}

fn back(world: &mut World, node: NodeId) {
    let facts = world.state.nodes[&node].facts.clone();
    world.apply(Command::NodeUp { node, facts });
}

#[test]
fn a_copy_that_was_cut_off_takes_up_its_place_again_if_that_is_wanted() {
    let lost_after = Span::secs(60);
    for (disconnect, original_stays) in [
        (Some(Disconnect { lost_after, keep: Keep::Original }), true),
        (Some(Disconnect { lost_after, keep: Keep::Newest }), false),
        (None, false),
    ] {
        let (mut world, node, original, replacement) = cut_off(disconnect);
        back(&mut world, node);
        world.run(6);
        let stays = if original_stays { original } else { replacement };
        assert_eq!(world.copies("web").iter().map(|a| a.id).collect::<Vec<_>>(), [stays], "{disconnect:?}");
    }
}

#[test]
fn a_copy_that_failed_while_it_was_cut_off_gives_way() {
    let (mut world, node, original, replacement) = cut_off(Some(Disconnect { lost_after: Span::secs(60), keep: Keep::Original }));
    back(&mut world, node);
    world.kill(original);
    world.run(6);
    assert_eq!(world.copies("web").iter().map(|a| a.id).collect::<Vec<_>>(), [replacement]);
}

#[test]
fn a_copy_that_is_away_for_too_long_is_lost() {
    let (mut world, node, original, replacement) = cut_off(Some(Disconnect { lost_after: Span::secs(60), keep: Keep::Original }));
    world.run(61);
    assert!(!world.state.allocs[&original].run);
    back(&mut world, node);
    world.run(6);
    assert_eq!(world.copies("web").iter().map(|a| a.id).collect::<Vec<_>>(), [replacement]);
}

#[test]
fn a_copy_that_had_never_started_is_lost_at_once() {
    let mut world = World::new(2);
    let disconnect = Some(Disconnect { lost_after: Span::secs(60), keep: Keep::Original });
    world.deploy("web", WorkloadSpec { disconnect, ..v(1, 1, rolling(1)) });
    world.reconcile();
    let original = world.copies("web")[0].clone();
    world.apply(Command::NodeDown { node: original.node });
    world.reconcile();
    world.reconcile();
    assert!(!world.state.allocs[&original.id].run);
}

#[test]
fn an_original_of_an_older_release_gives_way_to_a_newer_one() {
    let (mut world, node, original, _) = cut_off(Some(Disconnect { lost_after: Span::secs(600), keep: Keep::Original }));
    world.deploy("web", v(2, 1, rolling(1)));
    world.run(5);
    back(&mut world, node);
    world.run(6);
    assert_eq!(world.copies("web").iter().map(|a| (a.release, a.id != original)).collect::<Vec<_>>(), [(2, true)]);
}

#[test]
fn a_flagged_copy_moves_after_its_replacement_is_ready() {
    let mut world = World::new(2);
    world.deploy("web", v(1, 2, rolling(1)));
    world.run(2);
    let moved = world.copies("web")[0].clone();
    world.apply(Command::Plan(Plan { migrate: vec![moved.id], ..Plan::default() }));
    world.reconcile();
    assert_eq!((world.copies("web").len(), world.ready("web")), (3, 2), "first the new one");
    world.run(3);
    let copies = world.copies("web");
    assert_eq!((copies.len(), world.ready("web")), (2, 2));
    assert!(copies.iter().all(|a| a.id != moved.id) && copies[0].node != moved.node);
    assert!(world.state.failures.is_empty(), "it is no failure");
}

#[test]
fn a_plan_tells_what_a_deploy_then_does() {
    use crate::deployments::{Action, What, plan_deploy};
    for update in [rolling(1), rolling(3), canary(), blue_green(), Update { auto_promote: true, ..canary() }] {
        let mut world = World::new(2);
        world.deploy("web", v(1, 4, update.clone()));
        world.run(3);
        let item = |spec| DeployItem { key: key("web"), spec: Arc::new(spec), source: None, deployment: DeploymentId(id(5)) };
        let before = world.state.clone();
        let plan = plan_deploy(&world.state, vec![item(v(2, 4, update.clone()))], world.now).unwrap();
        assert_eq!(before, world.state, "nothing happened");
        let planned = &plan.workloads[0];
        assert_eq!((plan.cut_short, planned.action, planned.release), (false, Action::Update, 2));
        world.deploy("web", v(2, 4, update.clone()));
        world.run(30);
        let placed: Vec<(u32, NodeId)> =
            planned.moves.iter().filter(|m| m.what == What::Place && m.release == 2).map(|m| (m.slot, m.node)).collect();
        let mut found: Vec<(u32, NodeId)> = world.copies("web").iter().filter(|a| a.release == 2).map(|a| (a.index, a.node)).collect();
        found.sort();
        let mut expected = placed;
        expected.sort();
        assert_eq!(found, expected, "{update:?}");
        // The same again is nothing, and a label needs no new copy.
        let item = |spec| DeployItem { key: key("web"), spec: Arc::new(spec), source: None, deployment: DeploymentId(id(6)) };
        world.steer("web", Steering::Promote);
        world.run(30);
        let plan = plan_deploy(&world.state, vec![item(v(2, 4, update.clone()))], world.now).unwrap();
        assert_eq!((plan.workloads[0].action, plan.workloads[0].moves.len()), (Action::Unchanged, 0));
        let mut labelled = v(2, 4, update.clone());
        labelled.labels.insert("a".into(), "b".into());
        let plan = plan_deploy(&world.state, vec![item(labelled)], world.now).unwrap();
        assert_eq!((plan.workloads[0].action, plan.workloads[0].moves.len()), (Action::InPlace, 4));
    }
}

#[test]
fn a_deploy_bound_to_a_revision_refuses_when_the_workload_moved_on() {
    let mut world = World::new(1);
    world.deploy("web", v(1, 1, rolling(1)));
    world.run(3);
    let revision = world.state.workload(&key("web")).unwrap().revision;
    let bound = |world: &mut World, n, revision| {
        let deployment = DeploymentId(world.next_id());
        let items = vec![DeployItem { key: key("web"), spec: Arc::new(v(n, 1, rolling(1))), source: None, deployment }];
        world.apply(Command::DeployIf { items, revision })
    };
    assert!(matches!(bound(&mut world, 2, revision - 1), Applied::Refused(Refusal::ChangedSince { .. })));
    assert!(matches!(bound(&mut world, 2, revision), Applied::Deployed { .. }));
    assert!(matches!(bound(&mut world, 3, revision), Applied::Refused(Refusal::ChangedSince { .. })));
}

#[test]
fn what_routers_count_while_a_step_bakes_decides_and_nothing_before_counts() {
    use crate::deployments::analysis::Sample;
    let step = |weight| optimus_common::spec::CanaryStep { weight, bake: Span::secs(60) };
    let update = Update { strategy: Strategy::Canary, steps: vec![step(10), step(50)], ..Update::default() };
    let mut world = World::new(2);
    world.deploy("web", WorkloadSpec { update: update.clone(), ..changed(1) });
    world.run(2);
    world.deploy("web", WorkloadSpec { update, ..changed(2) });
    let count = |world: &mut World, errors: u64| {
        let sample = |release: u64| Sample { requests: 1000, errors: if release == 2 { errors } else { 0 }, latency: vec![1000] };
        let counts = world.copies("web").iter().map(|a| (a.id, sample(a.release))).collect();
        let generation = world.state.index;
        world.apply(Command::CountTraffic { router: "edge".into(), generation, counts })
    };
    count(&mut world, 1000);
    assert_eq!(world.deployment("web").traffic.new.requests, 0, "nothing is compared yet");
    world.run(5);
    assert_eq!(world.deployment("web").phase, DeploymentPhase::Baking);
    count(&mut world, 0);
    let traffic = world.deployment("web").traffic;
    assert_eq!((traffic.new.requests, traffic.old.requests), (1000, 3000));
    world.run(65);
    let deployment = world.deployment("web");
    assert_eq!((deployment.step, deployment.traffic.new.requests), (1, 0), "each step is counted by itself");
    count(&mut world, 200);
    world.run(3);
    let deployment = world.deployment("web");
    assert_eq!(deployment.phase, DeploymentPhase::RolledBack);
    assert!(deployment.reason.unwrap().to_string().starts_with("20.0 % of 1000 requests to the new copies failed"));
}
