//! What must hold whatever users and the world do, in any order.

use proptest::prelude::{Strategy as Generates, *};

use super::{Behaviour, World, changed, facts, id, key};
use crate::state::*;
use crate::{reconciler, scheduler};
use optimus_common::spec::{Amount, CanaryStep, Disconnect, Keep, ReleaseStep, Run, Strategy, Update};
use optimus_common::{AllocId, DeploymentId, Millicores, NodeId, Span};

/// What users and the world may do.
#[derive(Debug, Clone)]
pub(super) enum Act {
    Deploy {
        workload: u8,
        copies: u8,
        cpu: u16,
        version: u8,
        fixed: bool,
        way: u8,
    },
    Scale {
        workload: u8,
        copies: u8,
    },
    Restart(u8),
    Stop(u8),
    Remove(u8),
    Steer {
        workload: u8,
        how: u8,
    },
    NodeDown(u8),
    /// A router has taken on all but the last so many generations.
    Ack(u8),
    NodeUp(u8),
    Behave {
        release: u8,
        how: u8,
    },
    Pass(u8),
    /// 0: release commands end well from now on, 1: badly, 2: not at all.
    CommandsEnd(u8),
    /// 0: cordon, 1: uncordon, 2: drain.
    Tend {
        node: u8,
        how: u8,
    },
    Resize {
        workload: u8,
        cpu: u16,
    },
}

pub(super) fn act() -> impl Generates<Value = Act> {
    let w = 0u8..3;
    prop_oneof![
        (w.clone(), 0u8..5, 10u16..2500, 0u8..3, any::<bool>(), 0u8..16)
            .prop_map(|(workload, copies, cpu, version, fixed, way)| { Act::Deploy { workload, copies, cpu, version, fixed, way } }),
        (w.clone(), 0u8..7).prop_map(|(workload, how)| Act::Steer { workload, how }),
        (w.clone(), 0u8..6).prop_map(|(workload, copies)| Act::Scale { workload, copies }),
        w.clone().prop_map(Act::Restart),
        w.clone().prop_map(Act::Stop),
        w.prop_map(Act::Remove),
        (0u8..3).prop_map(Act::NodeDown),
        (0u8..40).prop_map(Act::Ack),
        (0u8..3).prop_map(Act::NodeUp),
        (1u8..5, 0u8..4).prop_map(|(release, how)| Act::Behave { release, how }),
        (0u8..20).prop_map(Act::Pass),
        (0u8..3).prop_map(Act::CommandsEnd),
        (0u8..3, 0u8..3).prop_map(|(node, how)| Act::Tend { node, how }),
        (0u8..3, 10u16..2500).prop_map(|(workload, cpu)| Act::Resize { workload, cpu }),
    ]
}

pub(super) fn perform(world: &mut World, act: &Act) {
    let name = |n: &u8| format!("w{n}");
    match act {
        Act::Deploy { workload, copies, cpu, version, fixed, way } => {
            let mut spec = changed(u32::from(*version));
            spec.copies = Some(u32::from(*copies));
            spec.resources.cpu = Millicores(u32::from(*cpu));
            spec.update.deadline = Span::secs(8);
            spec.update.parallel = 1 + u32::from(*version);
            if *fixed {
                spec.ports[0].fixed = Some(80);
            }
            set_way(&mut spec.update, *way);
            let keep = if *way % 2 == 0 { Keep::Original } else { Keep::Newest };
            let step = ReleaseStep { run: Run::Argv(vec!["migrate".into()]), timeout: Span::secs(4) };
            spec.update.release = (*way > 12).then_some(step);
            spec.disconnect = (*way > 7).then_some(Disconnect { lost_after: Span::secs(10), keep });
            world.deploy(&name(workload), spec);
        }
        Act::Steer { workload, how } => {
            let deployment = DeploymentId(world.next_id());
            let act = match how {
                0 => Steering::Promote,
                1 => Steering::Pause,
                2 => Steering::Resume,
                3 => Steering::Abort,
                4 => Steering::Retry,
                5 => Steering::RollBack { to: None },
                _ => Steering::RollBack { to: Some(1) },
            };
            world.apply(Command::Steer { key: key(&name(workload)), act, why: None, deployment });
        }
        Act::Scale { workload, copies } => {
            let deployment = DeploymentId(world.next_id());
            world.apply(Command::Scale { key: key(&name(workload)), copies: u32::from(*copies), deployment });
        }
        Act::Restart(workload) => {
            let deployment = DeploymentId(world.next_id());
            world.apply(Command::Restart { key: key(&name(workload)), deployment });
        }
        Act::Stop(workload) => drop(world.apply(Command::StopWorkload { key: key(&name(workload)) })),
        Act::Remove(workload) => drop(world.apply(Command::RemoveWorkload { key: key(&name(workload)) })),
        Act::NodeDown(n) => drop(world.apply(Command::NodeDown { node: NodeId(id(100 + u128::from(*n))) })),
        Act::Ack(behind) => {
            let generation = world.state.index.saturating_sub(u64::from(*behind));
            world.apply(Command::AckEndpoints { router: "edge".into(), generation });
        }
        Act::NodeUp(n) => {
            let facts = facts(&format!("host-{n}"));
            world.apply(Command::NodeUp { node: NodeId(id(100 + u128::from(*n))), facts });
        }
        Act::Behave { release, how } => {
            let how = [Behaviour::Ready, Behaviour::NeverReady, Behaviour::Crashes, Behaviour::PortTaken][usize::from(*how)];
            world.behaviour.insert(u64::from(*release), how);
        }
        Act::Pass(seconds) => world.run(u64::from(*seconds)),
        Act::CommandsEnd(how) => world.command_ends = [Some(0), Some(1), None][usize::from(*how)],
        Act::Tend { node, how } => {
            let drain = NodeChange::Drain { deadline: None, keep_daemons: false };
            let change = [NodeChange::Cordon, NodeChange::Uncordon, drain][usize::from(*how)].clone();
            world.apply(Command::ChangeNode { node: NodeId(id(100 + u128::from(*node))), change });
        }
        Act::Resize { workload, cpu } => {
            let deployment = DeploymentId(world.next_id());
            let limits = NewLimits { cpu: Some(Millicores(u32::from(*cpu))), ..NewLimits::default() };
            world.apply(Command::Resize { key: key(&name(workload)), limits, copies: None, deployment });
        }
    }
}

/// One of the ways a release may take over.
fn set_way(update: &mut Update, way: u8) {
    update.strategy = [Strategy::Rolling, Strategy::Canary, Strategy::BlueGreen][usize::from(way % 3)];
    update.canary = if way < 6 { Amount::Count(1) } else { Amount::Percent(50) };
    update.steps = vec![CanaryStep { weight: 10, bake: Span::secs(2) }, CanaryStep { weight: 50, bake: Span::secs(1) }];
    update.hold = Span::secs(2);
    (update.max_surge, update.max_unavailable) = match way % 4 {
        0 => (None, None),
        1 => (Some(Amount::Count(0)), Some(Amount::Count(1))),
        2 => (Some(Amount::Percent(50)), Some(Amount::Count(0))),
        _ => (Some(Amount::Count(1)), Some(Amount::Percent(50))),
    };
    update.auto_promote = way != 4;
    update.auto_rollback = way != 6;
}

/// Lets go what waits for a person.
pub(super) fn let_go(world: &mut World) {
    for _ in 0..4 {
        let keys: Vec<_> = world.state.workloads.keys().cloned().collect();
        for key in keys {
            for act in [Steering::Resume, Steering::Promote] {
                let deployment = DeploymentId(world.next_id());
                world.apply(Command::Steer { key: key.clone(), act, why: None, deployment });
            }
        }
        world.run(20);
    }
}

/// No node holds more than it has, and no port twice.
fn check_room(state: &State) {
    for (id, node) in &state.nodes {
        let taken = scheduler::taken(state, *id);
        assert!(taken.cpu <= u64::from(node.facts.cpu.0) && taken.memory <= node.facts.memory.0, "{} is overcommitted", node.facts.name);
        let ports: Vec<u16> = state.allocs_on(*id).filter(|a| !a.has_ended()).flat_map(|a| a.ports.iter().map(|p| p.1)).collect();
        assert_eq!(ports.len(), taken.ports.len(), "a port of {} is there twice", node.facts.name);
    }
}

proptest! {
    #[test]
    fn property_whatever_happens_room_is_kept_and_replay_agrees(acts in proptest::collection::vec(act(), 1..25)) {
        let mut world = World::new(3);
        for act in &acts {
            perform(&mut world, act);
            for _ in 0..6 {
                let decided = world.reconcile();
                check_room(&world.state);
                if !(world.agents() | decided) {
                    break;
                }
            }
        }
        // The same log gives the same state; so does a snapshot anywhere with the rest of the log.
        let mut replayed = State::default();
        let cut = world.log.len() / 2;
        for (n, (index, proposal)) in world.log.iter().enumerate() {
            if n == cut {
                replayed = State::from_bytes(&replayed.to_bytes()).unwrap();
            }
            replayed.apply(*index, proposal.clone());
        }
        prop_assert_eq!(replayed.digest(), world.state.digest());
        prop_assert_eq!(&replayed, &world.state);
    }

    #[test]
    fn property_it_settles_and_then_rests(acts in proptest::collection::vec(act(), 1..15)) {
        let mut world = World::new(3);
        for act in &acts {
            perform(&mut world, act);
        }
        // Nobody interferes any more, agents obey, and all nodes are there.
        world.behaviour.clear();
        world.command_ends = Some(0);
        for n in 0..3 {
            perform(&mut world, &Act::Tend { node: n, how: 1 });
            perform(&mut world, &Act::NodeUp(n));
        }
        world.run(60);
        let_go(&mut world);
        for deployment in world.state.deployments.values() {
            prop_assert!(deployment.phase.is_final(), "{deployment:?} never ended");
        }
        prop_assert!(!world.reconcile(), "it still has something to do");
        for workload in world.state.workloads.values().filter(|w| !w.stopped) {
            for index in 0..workload.copies {
                let copies = world.state.allocs_of(&workload.key).filter(|a| a.run && a.index == index).count();
                let unplaced = reconciler::unplaced(&world.state, workload, index, world.now);
                prop_assert!(copies == 1 || unplaced.is_some(), "{}-{index} has {copies} copies", workload.key);
            }
        }
    }

    #[test]
    fn property_a_plan_twice_changes_nothing_more(acts in proptest::collection::vec(act(), 1..12)) {
        let mut world = World::new(2);
        for act in &acts {
            perform(&mut world, act);
            let mut ids = world.ids;
            let outcome = reconciler::reconcile(&world.state, world.now, &mut || { ids += 1; AllocId(id(1_000_000 + ids)) });
            world.ids = ids;
            if !outcome.plan.is_empty() {
                world.apply(Command::Plan(outcome.plan.clone()));
                let before = world.state.clone();
                let again = world.apply(Command::Plan(outcome.plan));
                let unchanged = matches!(again, Applied::Unchanged { .. });
                prop_assert!(unchanged);
                prop_assert_eq!(State { index: before.index, ..world.state.clone() }, before);
            }
        }
    }

    #[test]
    fn property_without_news_the_leader_soon_rests(acts in proptest::collection::vec(act(), 1..15)) {
        let mut world = World::new(3);
        for act in &acts {
            perform(&mut world, act);
            // A copy that gave up is stopped before it is replaced, a deployment that fails turns round first, and one that is
            // set back by a lost node takes its phases one after the other.
            let looks = (0..6).take_while(|_| world.reconcile()).count();
            prop_assert!(looks < 6, "after {act:?} it finds something new each time");
        }
    }

    #[test]
    fn property_an_update_takes_no_more_than_two_looks_a_copy(copies in 1u32..12, parallel in 1u32..5, nodes in 1usize..4, fixed: bool) {
        let mut world = World::new(nodes);
        let copies = if fixed { copies.min(nodes as u32) } else { copies };
        let spec = |version| {
            let mut spec = changed(version);
            spec.copies = Some(copies);
            spec.update.parallel = parallel;
            spec.resources.cpu = Millicores(300);
            spec.ports[0].fixed = fixed.then_some(80);
            spec
        };
        world.deploy("web", spec(1));
        world.run(1);
        world.deploy("web", spec(2));
        let mut looks = 0;
        loop {
            let decided = world.reconcile();
            looks += u32::from(decided);
            prop_assert!(world.copies("web").iter().filter(|a| a.is_ready()).count() as u32 + parallel >= copies, "too few are left ready");
            if !(world.agents() | decided) {
                break;
            }
        }
        prop_assert!(world.copies("web").len() as u32 == copies && world.copies("web").iter().all(|a| a.release == 2));
        // And one or two to declare the end.
        prop_assert!(looks <= 2 * copies + 2, "{looks} looks for {copies} copies");
    }

    #[test]
    fn property_the_planner_and_the_judge_agree(acts in proptest::collection::vec(act(), 0..12), cpu in 10u32..4000, fixed: bool, ports in 0u16..4) {
        let mut world = World::new(3);
        for (_, node) in world.state.nodes.clone() {
            let mut few = node.facts.clone();
            few.ports = (20_000, 20_000 + ports);
            world.apply(Command::NodeUp { node: node.id, facts: few });
        }
        for act in acts.iter().filter(|act| !matches!(act, Act::NodeUp(_))) {
            perform(&mut world, act);
        }
        let mut spec = changed(7);
        spec.resources.cpu = Millicores(cpu);
        spec.ports[0].fixed = fixed.then_some(80);
        let (state, now) = (&world.state, world.now);
        let alloc = AllocId(id(77));
        let ask = scheduler::Ask { key: &key("new"), spec: &spec, alloc, troubled: &[] };
        let anywhere = state.nodes.keys().any(|node| scheduler::fits(state, *node, &key("new"), &spec, None, now).is_ok());
        let planned = scheduler::View::of(state, now).place(ask);
        prop_assert_eq!(planned.is_some(), anywhere);
        prop_assert_eq!(scheduler::why_nowhere(state, &key("new"), &spec, now).is_none(), anywhere);
        if let Some((node, ports)) = planned {
            prop_assert_eq!(scheduler::fits(state, node, &key("new"), &spec, Some(&ports), now), Ok(()));
            prop_assert_eq!(scheduler::judge(state, &key("new"), &spec, now)[0].node, node);
        }
    }
}
