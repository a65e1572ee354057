//! What no deployment may do, whatever users and the world do meanwhile.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::properties::{Act, act, let_go, perform};
use super::{World, changed, key};
use crate::state::*;
use optimus_common::spec::{Amount, CanaryStep, Strategy as Way, Update};
use optimus_common::{Millicores, Span, WorkloadKey};

/// Copies of a workload that should run, on nodes that answer.
fn running(state: &State, key: &WorkloadKey) -> u32 {
    state.allocs_of(key).filter(|a| a.run && !a.is_release_step() && state.nodes.get(&a.node).is_some_and(|n| n.up)).count() as u32
}

/// Slots of a workload somebody serves in.
fn serving(state: &State, key: &WorkloadKey, copies: u32) -> u32 {
    let serves = |a: &&std::sync::Arc<Alloc>| {
        a.run && a.index < copies && a.is_ready() && a.draining_since.is_none() && state.nodes.get(&a.node).is_some_and(|n| n.up)
    };
    state.allocs_of(key).filter(serves).map(|a| a.index).collect::<BTreeSet<_>>().len() as u32
}

/// Slots whose copies are all on nodes that do not answer.
fn lost(state: &State, key: &WorkloadKey, copies: u32) -> u32 {
    let up = |a: &std::sync::Arc<Alloc>| state.nodes.get(&a.node).is_some_and(|n| n.up);
    let held = |index: &u32| state.allocs_in(key, *index).any(|a| a.run) && !state.allocs_in(key, *index).any(|a| a.run && up(a));
    (0..copies).filter(held).count() as u32
}

/// Most copies there may be, and least that must serve, by the deployment under way. Where no number was set for those
/// that may be missing, one of those that serve may go even when fewer do.
fn bounds(state: &State, workload: &Workload) -> (u32, u32) {
    let newest = workload.deployment.map(|id| state.deployments[&id].clone());
    let deployment = newest.filter(|d| !d.phase.is_final());
    let update = |n: u64| state.release(&workload.key, n).map_or_else(Update::default, |r| r.spec.update.clone());
    let own = update(workload.release);
    let copies = workload.copies;
    let from = deployment.as_ref().and_then(|d| d.from_copies).unwrap_or(copies).max(copies);
    let surge = own.max_surge.map_or(own.parallel, |a| a.of(copies));
    let extra = match &deployment {
        Some(d) if d.phase.is_forward() && d.keeps_old() => {
            let beside = match d.strategy {
                Way::BlueGreen => copies,
                _ => own.canary.of(copies),
            };
            // Both sets are moved off a node that is drained as copies are at any other time.
            let moves = state.allocs_of(&workload.key).any(|a| a.run && a.migrate);
            beside + if moves { surge } else { 0 }
        }
        _ => surge,
    };
    let missing = own.max_unavailable.map_or(own.parallel, |a| a.at_most(copies));
    let least = copies.saturating_sub(missing + lost(state, &workload.key, copies));
    let one_less = serving(state, &workload.key, copies).saturating_sub(1);
    (from + extra, if own.max_unavailable.is_none() { least.min(one_less) } else { least })
}

/// One look, of which everything that must hold is checked. `calm`: no node came or went.
fn careful_look(world: &mut World, calm: bool) -> bool {
    let before = world.state.clone();
    let decided = world.reconcile();
    for (key, workload) in before.workloads.iter().filter(|(_, w)| !w.stopped) {
        let (most, least) = bounds(&before, workload);
        let (was, is) = (running(&before, key), running(&world.state, key));
        assert!(!calm || is <= most || is <= was, "{key}: {is} copies of {most}; there were {was}");
        let (was, is) = (serving(&before, key, workload.copies), serving(&world.state, key, workload.copies));
        assert!(is >= was.min(least), "{key}: {is} of {} serve, {least} must; {was} did", workload.copies);
    }
    decided
}

proptest! {
    #[test]
    fn property_never_too_many_and_never_too_few(acts in proptest::collection::vec(act(), 1..20)) {
        let (mut world, mut calm) = (World::new(3), true);
        for act in &acts {
            calm &= !matches!(act, Act::NodeDown(_) | Act::NodeUp(_));
            match act {
                // As `run`, with every look looked at.
                Act::Pass(seconds) => for _ in 0..*seconds {
                    for _ in 0..50 {
                        let decided = careful_look(&mut world, calm);
                        if !(world.agents() | decided) {
                            break;
                        }
                    }
                    world.now = world.now + Span::secs(1);
                },
                act => perform(&mut world, act),
            }
            careful_look(&mut world, calm);
        }
    }

    /// Deadlines are 8 s; at most 5 copies, 2 steps, 3 relapses, and the way back.
    #[test]
    fn property_every_deployment_ends_within_its_deadlines(acts in proptest::collection::vec(act(), 1..15)) {
        let mut world = World::new(3);
        for act in &acts {
            perform(&mut world, act);
        }
        // Nobody helps: what is broken stays broken, and what is down stays down.
        let_go(&mut world);
        world.run(8 * (5 + 2 + 3 + 5));
        let_go(&mut world);
        for deployment in world.state.deployments.values() {
            let waits_for_a_person = deployment.keeps_old() && deployment.phase == optimus_common::api::v1::DeploymentPhase::Promoting;
            prop_assert!(deployment.phase.is_final() || waits_for_a_person, "{deployment:?} never ended");
        }
        prop_assert!(!world.reconcile() || !world.behaviour.is_empty(), "it still has something to do");
    }

    #[test]
    fn property_each_strategy_converges_in_two_looks_a_copy(copies in 1u32..12, parallel in 1u32..5, way in 0u8..3, nodes in 1usize..4) {
        let mut world = World::new(nodes);
        let spec = |version| {
            let mut spec = changed(version);
            spec.copies = Some(copies);
            spec.resources.cpu = Millicores(100);
            spec.update = Update {
                strategy: [Way::Rolling, Way::Canary, Way::BlueGreen][usize::from(way)],
                parallel,
                canary: Amount::Percent(30),
                steps: vec![CanaryStep { weight: 10, bake: Span(0) }, CanaryStep { weight: 50, bake: Span(0) }],
                hold: Span(0),
                deadline: Span::secs(30),
                ..Update::default()
            };
            spec
        };
        world.deploy("web", spec(1));
        world.run(1);
        world.deploy("web", spec(2));
        let mut looks = 0;
        loop {
            let decided = careful_look(&mut world, true);
            prop_assert_eq!(serving(&world.state, &key("web"), copies), copies, "with room for both, nothing is ever missing");
            looks += u32::from(decided);
            if !(world.agents() | decided) {
                break;
            }
        }
        prop_assert!(world.copies("web").len() as u32 == copies && world.copies("web").iter().all(|a| a.release == 2));
        // And a few for the steps of the traffic.
        prop_assert!(looks <= 2 * copies + 10, "{looks} looks for {copies} copies");
    }
}
