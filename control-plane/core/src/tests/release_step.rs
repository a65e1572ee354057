//! The release command runs once in a deployment, before anything else, and nothing follows when it ends badly.

use super::*;
use crate::deployments::RELEASE_STEP_MARGIN;
use optimus_common::protocol::RELEASE_SLOT;

fn migrating(n: u32) -> WorkloadSpec {
    let release = ReleaseStep { run: Run::Argv(vec!["migrate".into()]), timeout: Span::secs(30) };
    let update = Update { deadline: Span::secs(8), release: Some(release), ..Update::default() };
    WorkloadSpec { run: Run::Argv(vec!["app".into(), n.to_string()]), copies: Some(2), update, ..spec() }
}

impl World {
    /// The copies that ran release commands, oldest first.
    fn commands(&self) -> Vec<Arc<Alloc>> {
        self.state.allocs_in(&key("web"), RELEASE_SLOT).cloned().collect()
    }
}

#[test]
fn copies_start_when_the_command_has_ended_well() {
    let mut world = World::new(2);
    world.command_ends = None;
    world.deploy("web", migrating(1));
    world.run(20);
    let shown = view::deployment(&world.state, &world.deployment("web"));
    assert_eq!(shown.phase, DeploymentPhase::Preparing, "longer than the deadline: the command has its own");
    assert!(shown.reason.unwrap().message.starts_with("the release command of release 1 runs on host-"));
    let copies = world.copies("web");
    assert_eq!(copies.iter().map(|a| a.name()).collect::<Vec<_>>(), ["web-release"]);
    assert_eq!(shown.release_step, Some(copies[0].id));
    let desired = reconciler::desired_for(&world.state, copies[0].node, &|_, _| None).unwrap();
    let as_told = desired[0].spec().unwrap();
    assert_eq!((as_told.kind, as_told.timeout, as_told.run.argv()), (Kind::Job, Some(Span::secs(30)), vec!["migrate".to_owned()]));

    world.command_ends = Some(0);
    world.run(3);
    assert_eq!((world.deployment("web").phase, world.ready("web")), (DeploymentPhase::Succeeded, 2));
    assert_eq!((world.commands().len(), world.copies("web").len()), (1, 2), "its record is kept, and it is no copy");
    assert!(!world.reconcile(), "at rest");

    // The next release has a command run of its own; a restart and a scale have none.
    world.deploy("web", migrating(2));
    world.run(5);
    assert_eq!((world.deployment("web").phase, world.commands().len()), (DeploymentPhase::Succeeded, 2));
    let deployment = DeploymentId(world.next_id());
    world.apply(Command::Restart { key: key("web"), deployment });
    world.run(5);
    let deployment = DeploymentId(world.next_id());
    world.apply(Command::Scale { key: key("web"), copies: 3, deployment });
    world.run(5);
    assert_eq!((world.deployment("web").phase, world.ready("web"), world.commands().len()), (DeploymentPhase::Succeeded, 3, 2));
}

#[test]
fn a_command_that_fails_ends_the_deployment_and_says_why() {
    let mut world = World::new(2);
    world.deploy("web", migrating(1));
    world.run(3);
    let before = world.copies("web");
    world.command_ends = Some(3);
    world.deploy("web", migrating(2));
    world.run(5);
    let deployment = world.deployment("web");
    assert_eq!(deployment.phase, DeploymentPhase::RolledBack);
    let why = deployment.reason.unwrap().to_string();
    assert_eq!(why, "the release command failed: exited with status 3 after 5ms; its last line: no such table");
    assert_eq!(world.copies("web").iter().map(|a| a.id).collect::<Vec<_>>(), before.iter().map(|a| a.id).collect::<Vec<_>>());

    // Tried again it is another deployment, and runs once more.
    world.command_ends = Some(0);
    let deployment = DeploymentId(world.next_id());
    world.apply(Command::Steer { key: key("web"), act: Steering::Retry, why: None, deployment });
    world.run(5);
    assert_eq!((world.deployment("web").phase, world.copies("web")[0].release), (DeploymentPhase::Succeeded, 2));
}

#[test]
fn a_first_release_whose_command_failed_starts_no_copy_whatever_is_asked() {
    let mut world = World::new(1);
    world.command_ends = Some(1);
    world.deploy("web", migrating(1));
    world.run(5);
    assert_eq!((world.deployment("web").phase, world.copies("web").len()), (DeploymentPhase::Failed, 0));
    let why = view::explain_workload(&world.state, world.state.workload(&key("web")).unwrap(), world.now).summary;
    assert!(why.contains("release command") && why.contains("exited with status 1"), "{why}");
    let deployment = DeploymentId(world.next_id());
    world.apply(Command::Scale { key: key("web"), copies: 3, deployment });
    world.run(5);
    assert_eq!((world.deployment("web").phase, world.copies("web").len()), (DeploymentPhase::Failed, 0));
    world.command_ends = Some(0);
    let deployment = DeploymentId(world.next_id());
    world.apply(Command::Restart { key: key("web"), deployment });
    world.run(5);
    assert_eq!((world.deployment("web").phase, world.ready("web")), (DeploymentPhase::Succeeded, 3));
}

#[test]
fn whatever_becomes_of_its_node_it_is_not_run_again() {
    let mut world = World::new(2);
    world.command_ends = None;
    world.deploy("web", migrating(1));
    world.run(2);
    let command = world.commands()[0].clone();
    // A plan of a leader before, proposed late, changes nothing.
    let again = crate::state::Placement {
        alloc: AllocId(world.next_id()),
        key: key("web"),
        index: RELEASE_SLOT,
        release: 1,
        node: command.node,
        ports: vec![],
    };
    let plan = Plan { place: vec![again], ..Plan::default() };
    assert!(matches!(world.apply(Command::Plan(plan)), Applied::Unchanged { .. }));
    world.apply(Command::NodeDown { node: command.node });
    world.run(30);
    assert_eq!((world.deployment("web").phase, world.commands().len()), (DeploymentPhase::Preparing, 1), "it may still be at work");
    world.run(RELEASE_STEP_MARGIN.0 / 1000 + 5);
    let deployment = world.deployment("web");
    assert_eq!((deployment.phase, world.commands().len()), (DeploymentPhase::Failed, 1));
    assert!(deployment.reason.unwrap().to_string().contains("did not say within 30s and 1m how it ended; it is not run again"));
}

#[test]
fn a_newer_deployment_waits_until_the_command_of_the_one_before_has_ended() {
    let mut world = World::new(2);
    world.command_ends = None;
    world.deploy("web", migrating(1));
    world.run(2);
    world.deploy("web", migrating(2));
    for _ in 0..2 {
        world.reconcile();
    }
    let commands = world.commands();
    assert_eq!((commands.len(), commands[0].run), (1, false), "told to stop, and the next not there yet");
    world.run(3);
    let commands = world.commands();
    assert_eq!((commands.len(), commands[1].release, commands[1].run), (2, 2, true));
    // Called off: it stops as well, and nothing ran.
    let deployment = DeploymentId(world.next_id());
    world.apply(Command::Steer { key: key("web"), act: Steering::Abort, why: None, deployment });
    world.run(3);
    assert_eq!((world.deployment("web").phase, world.copies("web").len()), (DeploymentPhase::Cancelled, 0));
    assert!(world.commands().iter().all(|a| a.has_ended()));
}
