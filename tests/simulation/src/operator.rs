//! Operators: people who choose how releases take over, steer deployments, take nodes out of service, run jobs and change
//! limits, while all else goes wrong. And the router in front of the copies.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use optimus_common::spec::*;
use optimus_common::{Bytes, DeploymentId, Millicores, RunId, Span};
use optimus_core::state::{Command, NewLimits, NodeChange, RunOrder, State, Steering};
use tokio::time::sleep;

use crate::agents::ask;
use crate::client::{Client, PATIENCE, key, spec};
use crate::entropy::Rng;
use crate::world::World;

/// Services of the operators: how many copies they have and which release is theirs is nobody's record.
pub const STEERED: [&str; 2] = ["cart", "shop"];
/// A copy on every node.
pub const DAEMON: &str = "probe";
/// Runs when it is asked.
pub const JOB: &str = "task";
/// How long the router or somebody who tidies up waits for an answer.
const ONE_TRY: Duration = Duration::from_millis(2500);
/// Runs are numbered from 1; somebody cancels one of the first so many.
const RUNS_CANCELLED: u64 = 12;
/// Most copies of a steered service: two sets of both, with the largest limits, fit two hosts beside all else.
const COPIES_MAX: u64 = 2;

/// A service's spec with one of the ways to take over.
fn released(workload: &str, value: u64, rng: &mut Rng) -> WorkloadSpec {
    let mut spec = spec(workload, value, None);
    let update = &mut spec.update;
    update.strategy = *rng.pick(&[Strategy::Rolling, Strategy::BlueGreen, Strategy::Canary]).unwrap_or(&Strategy::Rolling);
    update.parallel = rng.range(1..3) as u32;
    update.canary = if rng.chance(50.0) { Amount::Count(1) } else { Amount::Percent(50) };
    update.steps =
        vec![CanaryStep { weight: 10, bake: Span::millis(rng.range(100..2000)) }, CanaryStep { weight: 50, bake: Span::secs(1) }];
    update.hold = Span::millis(rng.range(100..3000));
    update.min_ready = Span::millis(rng.range(0..500));
    update.auto_promote = rng.chance(85.0);
    update.auto_rollback = rng.chance(85.0);
    if rng.chance(25.0) {
        update.release = Some(ReleaseStep { run: Run::Argv(vec!["migrate".into()]), timeout: Span::secs(4) });
    }
    if rng.chance(30.0) {
        let keep = if rng.chance(50.0) { Keep::Original } else { Keep::Newest };
        spec.disconnect = Some(Disconnect { lost_after: Span::secs(rng.range(3..12)), keep });
    }
    spec
}

/// A daemon, or a job that runs once a release and whenever it is asked.
fn other(kind: Kind, value: u64) -> WorkloadSpec {
    let name = if kind == Kind::Job { JOB } else { DAEMON };
    let mut spec = spec(name, value, if kind == Kind::Job { Some(1) } else { None });
    (spec.kind, spec.ports) = (kind, vec![]);
    spec.resources = Resources { cpu: Millicores(50), memory_request: Bytes::mib(20), memory_limit: Bytes::mib(30), pids: 10 };
    spec
}

fn steering(rng: &mut Rng) -> Steering {
    match rng.range(0..9) {
        0..2 => Steering::Promote,
        2 => Steering::Pause,
        3..5 => Steering::Resume,
        5 => Steering::Abort,
        6 => Steering::Retry,
        7 => Steering::RollBack { to: None },
        _ => Steering::RollBack { to: Some(rng.range(1..6)) },
    }
}

fn node_change(rng: &mut Rng, now: optimus_common::Timestamp) -> NodeChange {
    match rng.range(0..10) {
        0..2 => NodeChange::Cordon,
        2..6 => NodeChange::Uncordon,
        6 => NodeChange::CancelDrain,
        7 => NodeChange::Labels(BTreeMap::from([("zone".to_owned(), rng.chance(70.0).then(|| format!("z{}", rng.range(0..3))))])),
        _ => {
            let deadline = rng.chance(70.0).then(|| now + Span::millis(rng.range(500..8000)));
            NodeChange::Drain { deadline, keep_daemons: rng.chance(50.0) }
        }
    }
}

impl Client {
    /// Deploys what operators work with.
    ///
    /// # Errors
    /// When the first deploy of one was not answered.
    pub async fn found_steered(&mut self, patience: Duration) -> Result<(), String> {
        let mut first: Vec<(&str, WorkloadSpec)> = STEERED.iter().map(|name| (*name, spec(name, 1, Some(COPIES_MAX as u32)))).collect();
        first.extend([(DAEMON, other(Kind::Daemon, 1)), (JOB, other(Kind::Job, 1))]);
        for (name, spec) in first {
            let command = Self::deploy_spec(name, spec, DeploymentId(self.uuid()));
            self.send(command, patience).await.ok_or_else(|| format!("{name} could not be deployed"))?;
        }
        Ok(())
    }

    /// Something an operator does.
    pub async fn operate(&mut self) {
        let deployment = DeploymentId(self.uuid());
        let value = self.rng.u64() % 1_000_000;
        let free = *self.rng.pick(&STEERED).unwrap_or(&"shop");
        let now = crate::clock::wall(&self.world);
        let command = match self.rng.range(0..100) {
            0..22 => {
                let spec = released(free, value, &mut self.rng);
                Self::deploy_spec(free, spec, deployment)
            }
            22..55 => Command::Steer { key: key(free), act: steering(&mut self.rng), why: None, deployment },
            55..58 => Command::Scale { key: key(free), copies: self.rng.range(1..COPIES_MAX + 1) as u32, deployment },
            58..70 => {
                let hosts = self.world.hosts();
                let Some(host) = self.rng.pick(&hosts).cloned() else { return };
                Command::ChangeNode { node: host.node, change: node_change(&mut self.rng, now) }
            }
            70..78 => {
                let memory = Some(Bytes::mib(self.rng.range(100..200)));
                let limits =
                    NewLimits { cpu: Some(Millicores(self.rng.range(100..500) as u32)), memory_request: memory, memory_limit: None };
                Command::Resize { key: key(free), limits, copies: None, deployment }
            }
            78..88 => {
                let id = RunId(self.uuid());
                Command::StartRun(RunOrder { key: key(JOB), id, params: BTreeMap::new(), payload: None })
            }
            88..90 => Command::CancelRun { key: key(JOB), number: self.rng.range(1..RUNS_CANCELLED) },
            90..94 => Self::deploy_spec(JOB, other(Kind::Job, value), deployment),
            94..98 => Self::deploy_spec(DAEMON, other(Kind::Daemon, value), deployment),
            _ => Command::SetRebalance { automatic: self.rng.chance(50.0), moves: 1, every: Span::secs(2) },
        };
        self.send(command, PATIENCE).await;
    }

    /// Lets go, from time to time and until the run ends, what waits for a person.
    pub async fn tidy_up(mut self) {
        while !self.world.is_done() {
            let leads = |s: &Arc<crate::server::Server>| s.process().is_some_and(|p| p.store.status().is_leader);
            let leader = self.world.servers().into_iter().find(leads).and_then(|s| s.process());
            let commands = leader.map(|process| self.waiting(&process.store.state())).unwrap_or_default();
            for command in commands {
                self.send(command, ONE_TRY).await;
            }
            sleep(Duration::from_millis(500)).await;
        }
    }

    fn waiting(&mut self, state: &State) -> Vec<Command> {
        let mut commands = Vec::new();
        for node in state.nodes.values().filter(|n| n.cordoned || n.drain.is_some()) {
            commands.push(Command::ChangeNode { node: node.id, change: NodeChange::Uncordon });
        }
        for row in state.deployments.values().filter(|d| !d.phase.is_final()) {
            let act = if row.paused.is_some() { Steering::Resume } else { Steering::Promote };
            commands.push(Command::Steer { key: row.key.clone(), act, why: None, deployment: DeploymentId(self.uuid()) });
        }
        commands
    }
}

/// A router: takes on the endpoints as some server knows them, and says so there or elsewhere.
pub async fn route(world: Arc<World>, mut rng: Rng) {
    while !world.is_done() {
        sleep(Duration::from_millis(rng.range(50..900))).await;
        let servers = world.servers();
        let Some(server) = rng.pick(&servers).cloned() else { continue };
        let known = ask(&world, &server, ONE_TRY, |process| async move { process.store.state().index });
        let Some(generation) = known.await else { continue };
        let Some(server) = rng.pick(&servers).cloned() else { continue };
        ask(&world, &server, ONE_TRY, move |process| async move {
            let _ = process.store.propose(Command::AckEndpoints { router: "edge".into(), generation }).await;
        })
        .await;
    }
}
