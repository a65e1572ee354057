//! The control plane's decisions against a model of agents that do as they are told, or misbehave as scripted.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::state::*;
use crate::{reconciler, view};
use optimus_common::api::v1::DeploymentPhase;
use optimus_common::ids::RequestId;
use optimus_common::join_token::Role;
use optimus_common::protocol::{AllocStatus, NodeFacts, Phase};
use optimus_common::reason::Exit;
use optimus_common::spec::*;
use optimus_common::{AllocId, Bytes, ClusterId, DeploymentId, Millicores, Name, NodeId, Reason, Span, Timestamp, TokenId, WorkloadKey};

mod ca_rotation;
mod crons;
mod deployments;
mod drains;
mod fleet;
mod kinds;
mod properties;
mod release_step;
mod rollouts;
mod routing;

fn id(n: u128) -> uuid::Uuid {
    uuid::Uuid::from_u128(n)
}

fn key(name: &str) -> WorkloadKey {
    let name_of = |n: &str| Name::new(n).unwrap();
    WorkloadKey { project: name_of("shop"), environment: name_of("dev"), workload: name_of(name) }
}

fn spec() -> WorkloadSpec {
    WorkloadSpec {
        kind: Kind::Service,
        driver: Driver::Process,
        run: Run::Argv(vec!["app".into()]),
        dir: None,
        env: BTreeMap::new(),
        user: None,
        copies: Some(3),
        ports: vec![Port { name: Name::new("http").unwrap(), fixed: None }],
        resources: Resources { cpu: Millicores(500), memory_request: Bytes::mib(64), memory_limit: Bytes::mib(64), pids: 100 },
        health: Health { readiness: None, liveness: None },
        restart: Restart { delay: Span::secs(1), delay_max: Span::secs(60), reset_after: Span::secs(60) },
        stop: Stop { signal: "TERM".into(), grace: Span::secs(10) },
        update: Update { deadline: Span::secs(60), ..Update::default() },
        logs: Logs { size: Bytes::mib(1) },
        secrets: vec![],
        secret_values: Default::default(),
        labels: BTreeMap::new(),
        placement: Default::default(),
        schedule: None,
        timeout: None,
        disconnect: None,
        runs: None,
    }
}

/// What a copy does after it was placed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Behaviour {
    Ready,
    NeverReady,
    Crashes,
    PortTaken,
}

/// A control plane with obedient agents on `nodes`.
struct World {
    state: State,
    now: Timestamp,
    ids: u128,
    seq: u64,
    /// By release; ready unless scripted.
    behaviour: BTreeMap<u64, Behaviour>,
    /// How release commands end; unset: they do not.
    command_ends: Option<i32>,
    log: Vec<(u64, Proposal)>,
}

impl World {
    fn new(nodes: usize) -> Self {
        let mut world = World {
            state: State::default(),
            now: Timestamp(1_000_000),
            ids: 0,
            seq: 0,
            behaviour: BTreeMap::new(),
            command_ends: Some(0),
            log: vec![],
        };
        world.apply(Command::CreateCluster { id: ClusterId(id(1)), ca_certificate: vec![], ca_key_sealed: vec![] });
        let server = ServerFacts { name: "s".into(), address: "h:1".into(), api: "h:2".into(), version: "1".into(), level: LEVEL };
        world.apply(Command::AdmitServer { token: None, server, key_fingerprint: vec![1] });
        world.apply(Command::RaiseVersion { to: LEVEL });
        let token = TokenId(id(2));
        let expires_at = world.now + Span::secs(60);
        world.apply(Command::CreateToken { id: token, secret_hash: vec![], expires_at, uses: nodes as u32, role: Role::Agent });
        for n in 0..nodes {
            let node = NodeId(id(100 + n as u128));
            let name = format!("host-{n}");
            let certificate_expires_at = expires_at;
            world.apply(Command::AdmitNode { token, node, name: name.clone(), key_fingerprint: vec![], certificate_expires_at });
            world.apply(Command::NodeUp { node, facts: facts(&name) });
        }
        world
    }

    fn apply(&mut self, command: Command) -> Applied {
        self.propose(Proposal { at: self.now, request: None, command })
    }

    fn propose(&mut self, proposal: Proposal) -> Applied {
        let index = self.state.index + 1;
        self.log.push((index, proposal.clone()));
        self.state.apply(index, proposal)
    }

    fn next_id(&mut self) -> uuid::Uuid {
        self.ids += 1;
        id(1_000_000 + self.ids)
    }

    fn deploy(&mut self, name: &str, spec: WorkloadSpec) -> Applied {
        let deployment = DeploymentId(self.next_id());
        self.apply(Command::Deploy { items: vec![DeployItem { key: key(name), spec: Arc::new(spec), source: None, deployment }] })
    }

    /// One look of the leader; true if it had something to do.
    fn reconcile(&mut self) -> bool {
        let mut ids = self.ids;
        let outcome = reconciler::reconcile(&self.state, self.now, &mut || {
            ids += 1;
            AllocId(id(1_000_000 + ids))
        });
        self.ids = ids;
        if outcome.plan.is_empty() {
            return false;
        }
        self.apply(Command::Plan(outcome.plan));
        true
    }

    /// Agents report once on everything they should do.
    fn agents(&mut self) -> bool {
        let mut any = false;
        let nodes: Vec<NodeId> = self.state.nodes.values().filter(|n| n.up).map(|n| n.id).collect();
        for node in nodes {
            let allocs: Vec<Arc<Alloc>> = self.state.allocs_on(node).filter(|a| !a.has_ended()).cloned().collect();
            let statuses: Vec<AllocStatus> = allocs.iter().filter_map(|a| self.obey(a)).collect();
            if !statuses.is_empty() {
                any = true;
                self.apply(Command::Report { node, statuses, gone: vec![] });
            }
        }
        any
    }

    fn obey(&mut self, alloc: &Alloc) -> Option<AllocStatus> {
        let behaviour = self.behaviour.get(&alloc.release).copied().unwrap_or(Behaviour::Ready);
        let old = alloc.status.as_deref();
        if alloc.is_release_step() {
            return self.obey_command(alloc);
        }
        let (phase, ready, restarts, reason) = match (alloc.run, behaviour) {
            (false, _) => (Phase::Stopped, false, 0, None),
            (true, Behaviour::Ready) => (Phase::Running, true, 0, None),
            (true, Behaviour::NeverReady) => {
                let reason = Reason::NotReady { probe: "GET /".into(), last: "refused".into(), listening: vec![], port: None };
                (Phase::Running, false, 0, Some(reason))
            }
            (true, Behaviour::Crashes) => {
                let exit = Exit { code: Some(1), signal: None, oom: None, at: self.now, ran_for: Span(5) };
                (Phase::Backoff, false, old.map_or(0, |s| s.restarts + 1), Some(Reason::Exited { exit }))
            }
            (true, Behaviour::PortTaken) => {
                (Phase::Failed, false, 0, Some(Reason::PortTaken { port: alloc.ports[0].1, holder: Some("nginx (pid 1)".into()) }))
            }
        };
        if behaviour != Behaviour::Crashes && old.is_some_and(|s| s.phase == phase && s.ready == ready) {
            return None;
        }
        self.seq += 1;
        let ready_since = ready.then_some(self.now);
        Some(AllocStatus {
            id: alloc.id,
            seq: self.seq,
            phase,
            ready,
            ready_since,
            reason,
            restarts,
            pid: ready.then_some(7),
            started_at: ready.then_some(self.now),
            last_exit: None,
            unenforced: vec![],
            last_lines: vec![],
            limits: None,
        })
    }

    fn obey_command(&mut self, alloc: &Alloc) -> Option<AllocStatus> {
        let exit = |code| Exit { code: Some(code), signal: None, oom: None, at: self.now, ran_for: Span(5) };
        let (phase, reason) = match (alloc.phase().is_terminal(), alloc.run, self.command_ends) {
            (true, ..) => return None,
            (_, false, _) => (Phase::Stopped, Some(Reason::StopRequested)),
            (.., None) if alloc.phase() == Phase::Running => return None,
            (.., None) => (Phase::Running, None),
            (.., Some(0)) => (Phase::Stopped, Some(Reason::Exited { exit: exit(0) })),
            (.., Some(code)) => (Phase::Failed, Some(Reason::Exited { exit: exit(code) })),
        };
        self.seq += 1;
        let last_lines = if phase == Phase::Failed { vec!["no such table".into()] } else { vec![] };
        Some(AllocStatus { seq: self.seq, phase, reason, last_lines, ..AllocStatus::unknown(alloc.id) })
    }

    /// Lets leader and agents act until nothing changes, a second at a time, for `seconds` at most.
    fn run(&mut self, seconds: u64) {
        for _ in 0..seconds {
            for _ in 0..50 {
                let decided = self.reconcile();
                if !(self.agents() | decided) {
                    break;
                }
            }
            self.now = self.now + Span::secs(1);
        }
    }

    fn copies(&self, name: &str) -> Vec<Arc<Alloc>> {
        let mut copies: Vec<Arc<Alloc>> = self.state.allocs_of(&key(name)).filter(|a| a.run).cloned().collect();
        copies.sort_by_key(|a| a.index);
        copies
    }

    fn ready(&self, name: &str) -> usize {
        self.copies(name).iter().filter(|a| a.is_ready()).count()
    }

    fn deployment(&self, name: &str) -> Deployment {
        let id = self.state.workload(&key(name)).unwrap().deployment.unwrap();
        Deployment::clone(&self.state.deployments[&id])
    }
}

fn facts(name: &str) -> NodeFacts {
    NodeFacts {
        name: name.into(),
        cpu: Millicores(4000),
        memory: Bytes(8 << 30),
        drivers: vec!["process".into()],
        ports: (20_000, 20_099),
        address: "127.0.0.1".into(),
        ..NodeFacts::default()
    }
}

#[test]
fn a_first_deploy_places_every_slot_and_succeeds() {
    let mut world = World::new(1);
    world.deploy("web", spec());
    world.run(2);
    let copies = world.copies("web");
    assert_eq!(copies.iter().map(|a| a.index).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(world.ready("web"), 3);
    assert_eq!(world.deployment("web").phase, DeploymentPhase::Succeeded);
    let mut ports: Vec<u16> = copies.iter().map(|a| a.ports[0].1).collect();
    ports.dedup();
    assert_eq!(ports.len(), 3, "each has a port of its own");
    assert_eq!(view::status(&world.state, Some(1), 1, 1).unwrap().summary, "all 3 copies of 1 workload are ready");
}

#[test]
fn copies_spread_over_nodes() {
    let mut world = World::new(3);
    world.deploy("web", spec());
    world.run(2);
    let mut nodes: Vec<NodeId> = world.copies("web").iter().map(|a| a.node).collect();
    nodes.sort();
    nodes.dedup();
    assert_eq!(nodes.len(), 3);
}

#[test]
fn what_does_not_fit_waits_and_says_why_for_each_node() {
    let mut world = World::new(2);
    let mut big = spec();
    big.resources.cpu = Millicores(3000);
    world.deploy("web", big);
    world.run(2);
    assert_eq!(world.ready("web"), 2, "one on each node");
    let workload = world.state.workload(&key("web")).unwrap().clone();
    let reason = reconciler::unplaced(&world.state, &workload, 2, world.now).unwrap();
    assert_eq!(reason.to_string(), "no node can take it: host-0: cpu: asks for 3 cores, 1 free; host-1: cpu: asks for 3 cores, 1 free");
    // The API says so while it waits, and when it has waited too long.
    assert!(view::deployment(&world.state, &world.deployment("web")).reason.unwrap().message.contains("3 cores"));
    world.run(70);
    let deployment = world.deployment("web");
    assert_eq!(deployment.phase, DeploymentPhase::Failed);
    assert!(deployment.reason.unwrap().to_string().contains("web-2: no node can take it"));
}

#[test]
fn no_node_at_all_is_a_reason_of_its_own() {
    let mut world = World::new(0);
    world.deploy("web", spec());
    world.run(1);
    let workload = world.state.workload(&key("web")).unwrap().clone();
    assert_eq!(reconciler::unplaced(&world.state, &workload, 0, world.now), Some(Reason::NoNodes));
}

#[test]
fn scaling_adds_and_takes_the_highest_slots() {
    let mut world = World::new(1);
    world.deploy("web", spec());
    world.run(2);
    for (copies, slots) in [(5, vec![0, 1, 2, 3, 4]), (2, vec![0, 1]), (0, vec![])] {
        let deployment = DeploymentId(world.next_id());
        world.apply(Command::Scale { key: key("web"), copies, deployment });
        world.run(2);
        assert_eq!(world.copies("web").iter().map(|a| a.index).collect::<Vec<_>>(), slots);
        assert_eq!(world.deployment("web").phase, DeploymentPhase::Succeeded);
    }
}

fn changed(n: u32) -> WorkloadSpec {
    WorkloadSpec { run: Run::Argv(vec!["app".into(), n.to_string()]), ..spec() }
}

#[test]
fn an_update_starts_each_new_copy_before_it_stops_the_old_one() {
    let mut world = World::new(1);
    world.deploy("web", spec());
    world.run(2);
    world.deploy("web", changed(2));
    for _ in 0..40 {
        let decided = world.reconcile();
        let running = world.state.allocs_of(&key("web")).filter(|a| !a.has_ended()).count();
        assert!(world.ready("web") >= 3, "never fewer ready than before");
        assert!(running <= 3 + 2, "one at a time");
        if !(world.agents() | decided) {
            break;
        }
    }
    assert!(world.copies("web").iter().all(|a| a.release == 2));
    assert_eq!(world.deployment("web").phase, DeploymentPhase::Succeeded);
}

#[test]
fn a_fixed_port_makes_the_old_copy_stop_first() {
    let mut world = World::new(1);
    let fixed = |n| WorkloadSpec { copies: Some(1), ports: vec![Port { name: Name::new("http").unwrap(), fixed: Some(80) }], ..changed(n) };
    world.deploy("web", fixed(1));
    world.run(2);
    world.deploy("web", fixed(2));
    world.run(3);
    let copies = world.copies("web");
    assert_eq!((copies.len(), copies[0].release, copies[0].ports[0].1), (1, 2, 80));
    assert_eq!(world.deployment("web").phase, DeploymentPhase::Succeeded);
}

#[test]
fn a_failed_update_goes_back_and_keeps_the_old_copies() {
    for behaviour in [Behaviour::NeverReady, Behaviour::Crashes] {
        let mut world = World::new(1);
        world.deploy("web", spec());
        world.run(2);
        let before: Vec<AllocId> = world.copies("web").iter().map(|a| a.id).collect();
        world.behaviour.insert(2, behaviour);
        world.deploy("web", changed(2));
        world.run(70);
        assert_eq!(world.copies("web").iter().map(|a| a.id).collect::<Vec<_>>(), before, "{behaviour:?}");
        let deployment = world.deployment("web");
        assert_eq!(deployment.phase, DeploymentPhase::RolledBack, "{behaviour:?}");
        let reason = deployment.reason.unwrap();
        match behaviour {
            Behaviour::NeverReady => assert!(reason.to_string().contains("no progress for 1m; web-0: GET / not passing"), "{reason}"),
            _ => assert!(matches!(reason, Reason::Exited { .. }), "{reason}"),
        }
        assert_eq!(world.state.workload(&key("web")).unwrap().release, 1);
    }
}

#[test]
fn a_failed_first_deployment_leaves_its_copies_to_be_looked_at() {
    let mut world = World::new(1);
    world.behaviour.insert(1, Behaviour::NeverReady);
    world.deploy("web", spec());
    world.run(70);
    assert_eq!(world.deployment("web").phase, DeploymentPhase::Failed);
    assert_eq!(world.copies("web").len(), 3);
    // The same file again is another try, not "unchanged".
    world.behaviour.clear();
    assert!(matches!(world.deploy("web", spec()), Applied::Deployed { ref deployments, .. } if deployments.len() == 1));
    world.run(5);
    assert_eq!(world.deployment("web").phase, DeploymentPhase::Succeeded);
}

#[test]
fn a_taken_port_moves_the_copy_and_is_avoided_for_a_while() {
    let mut world = World::new(1);
    let one = WorkloadSpec { copies: Some(1), ..spec() };
    world.behaviour.insert(1, Behaviour::PortTaken);
    world.deploy("web", one);
    world.reconcile();
    let taken = world.copies("web")[0].ports[0].1;
    world.agents();
    world.behaviour.clear();
    world.run(2);
    assert_ne!(world.copies("web")[0].ports[0].1, taken);
    assert!(world.state.nodes.values().next().unwrap().blocked_ports.contains_key(&taken));
    assert_eq!(world.ready("web"), 1);
}

#[test]
fn a_deploy_of_the_same_is_unchanged_and_keeps_a_scaled_number() {
    let mut world = World::new(1);
    let unset = WorkloadSpec { copies: None, ..spec() };
    world.deploy("web", unset.clone());
    world.run(2);
    assert_eq!(world.ready("web"), 1);
    let deployment = DeploymentId(world.next_id());
    world.apply(Command::Scale { key: key("web"), copies: 4, deployment });
    world.run(2);
    assert!(matches!(world.deploy("web", unset.clone()), Applied::Deployed { ref unchanged, .. } if unchanged.len() == 1));
    world.deploy("web", WorkloadSpec { copies: None, ..changed(9) });
    world.run(9);
    assert_eq!(world.ready("web"), 4, "the number is the server's unless the file says one");
}

#[test]
fn stop_rm_and_restart_do_what_they_say() {
    let mut world = World::new(1);
    world.deploy("web", spec());
    world.run(2);
    let before: Vec<AllocId> = world.copies("web").iter().map(|a| a.id).collect();
    let deployment = DeploymentId(world.next_id());
    world.apply(Command::Restart { key: key("web"), deployment });
    world.run(5);
    assert!(world.copies("web").iter().all(|a| !before.contains(&a.id) && a.release == 2));
    world.apply(Command::StopWorkload { key: key("web") });
    world.run(2);
    assert!(world.copies("web").is_empty());
    assert!(world.state.workload(&key("web")).unwrap().stopped);
    world.deploy("web", spec());
    world.run(5);
    assert_eq!(world.ready("web"), 3);
    world.apply(Command::RemoveWorkload { key: key("web") });
    assert!(matches!(world.deploy("web", spec()), Applied::Refused(Refusal::BeingRemoved(_))));
    world.run(3);
    assert!(world.state.workloads.is_empty() && world.state.allocs.is_empty() && world.state.releases.is_empty());
}

#[test]
fn copies_of_a_lost_node_are_replaced_where_there_is_room() {
    let mut world = World::new(2);
    world.deploy("web", WorkloadSpec { copies: Some(2), ..spec() });
    world.run(2);
    let lost = world.copies("web")[0].node;
    world.apply(Command::NodeDown { node: lost });
    world.run(2);
    let elsewhere = world.copies("web").iter().filter(|a| a.node != lost && a.is_ready()).count();
    assert_eq!(elsewhere, 2);
    // It comes back: each slot keeps one copy.
    let name = world.state.nodes[&lost].facts.name.clone();
    world.apply(Command::NodeUp { node: lost, facts: facts(&name) });
    world.run(3);
    assert_eq!(world.copies("web").len(), 2);
}

#[test]
fn with_no_other_node_the_lost_copies_stay_as_they_were() {
    let mut world = World::new(1);
    world.deploy("web", spec());
    world.run(2);
    let before: Vec<AllocId> = world.copies("web").iter().map(|a| a.id).collect();
    let node = world.copies("web")[0].node;
    world.apply(Command::NodeDown { node });
    world.run(5);
    assert_eq!(world.copies("web").iter().map(|a| a.id).collect::<Vec<_>>(), before);
    let shown = view::allocation(&world.state, &world.copies("web")[0]);
    assert_eq!((shown.current, shown.reason.unwrap().code.as_str()), (false, "OPT-2004"));
}

#[test]
fn a_retried_request_has_one_effect() {
    let mut world = World::new(1);
    world.deploy("web", spec());
    world.run(2);
    let restart = |world: &mut World, digest: u8| {
        let deployment = DeploymentId(world.next_id());
        let at = world.now;
        let request = Some((RequestId(id(77)), vec![digest]));
        world.propose(Proposal { at, request, command: Command::Restart { key: key("web"), deployment } })
    };
    let first = restart(&mut world, 1);
    assert_eq!(restart(&mut world, 1), first);
    assert_eq!(world.state.workload(&key("web")).unwrap().release, 2);
    assert_eq!(restart(&mut world, 2), Applied::Refused(Refusal::RequestReused));
}

/// The table of answers is bounded in number too: the oldest go first. It is part of the state, so it survives a snapshot.
#[test]
fn answers_are_kept_for_the_newest_requests() {
    let mut world = World::new(1);
    world.deploy("web", spec());
    world.run(2);
    let restart = |world: &mut World| {
        let (at, deployment) = (world.now, DeploymentId(world.next_id()));
        let request = Some((RequestId(id(77)), vec![1]));
        world.propose(Proposal { at, request, command: Command::Restart { key: key("web"), deployment } })
    };
    let first = restart(&mut world);
    for n in 1..REQUESTS_KEPT {
        let (at, request) = (world.now, Some((RequestId(id(100_000 + n as u128)), vec![])));
        world.propose(Proposal { at, request, command: Command::RevokeToken { id: TokenId(id(1)) } });
    }
    assert_eq!(world.state.requests.len(), REQUESTS_KEPT);
    world.state = State::from_bytes(&world.state.to_bytes()).unwrap();
    assert_eq!(restart(&mut world), first);
    let (at, request) = (world.now, Some((RequestId(id(99)), vec![])));
    world.propose(Proposal { at, request, command: Command::RevokeToken { id: TokenId(id(1)) } });
    assert_eq!(world.state.requests.len(), REQUESTS_KEPT);
    assert_ne!(restart(&mut world), first, "the oldest answer has gone");
}

#[test]
fn tokens_expire_and_are_used_up() {
    let mut world = World::new(0);
    let (token, at) = (TokenId(id(5)), world.now);
    world.apply(Command::CreateToken { id: token, secret_hash: vec![], expires_at: at + Span::secs(10), uses: 1, role: Role::Agent });
    let admit = |world: &mut World, node: u128| {
        let (node, certificate_expires_at) = (NodeId(id(node)), world.now);
        world.apply(Command::AdmitNode { token, node, name: "h".into(), key_fingerprint: vec![], certificate_expires_at })
    };
    assert!(matches!(admit(&mut world, 1), Applied::Done { .. }));
    assert_eq!(admit(&mut world, 2), Applied::Refused(Refusal::TokenUsedUp));
    world.apply(Command::CreateToken {
        id: TokenId(id(6)),
        secret_hash: vec![],
        expires_at: at + Span::secs(10),
        uses: 1,
        role: Role::Agent,
    });
    world.now = world.now + Span::secs(11);
    let late = Command::AdmitNode {
        token: TokenId(id(6)),
        node: NodeId(id(3)),
        name: "h".into(),
        key_fingerprint: vec![],
        certificate_expires_at: at,
    };
    assert_eq!(world.apply(late), Applied::Refused(Refusal::TokenExpired));
}

#[test]
fn old_and_foreign_reports_are_ignored() {
    let mut world = World::new(2);
    world.deploy("web", WorkloadSpec { copies: Some(1), ..spec() });
    world.run(2);
    let copy = world.copies("web")[0].clone();
    let mut old = AllocStatus::clone(copy.status.as_ref().unwrap());
    old.ready = false;
    assert!(matches!(
        world.apply(Command::Report { node: copy.node, statuses: vec![old.clone()], gone: vec![] }),
        Applied::Unchanged { .. }
    ));
    old.seq += 1;
    let other = world.state.nodes.keys().copied().find(|n| *n != copy.node).unwrap();
    assert!(matches!(world.apply(Command::Report { node: other, statuses: vec![old], gone: vec![copy.id] }), Applied::Unchanged { .. }));
    assert!(world.copies("web")[0].is_ready());
}

#[test]
fn events_of_one_index_are_numbered() {
    let mut world = World::new(1);
    let at = world.now;
    for n in 0..2 {
        let deployment = DeploymentId(id(50 + n));
        let items = vec![DeployItem { key: key(&format!("w{n}")), spec: Arc::new(spec()), source: None, deployment }];
        world.state.apply(99, Proposal { at, request: None, command: Command::Deploy { items } });
    }
    let keys: Vec<(u64, u32)> = world.state.events.keys().copied().filter(|(index, _)| *index == 99).collect();
    assert_eq!(keys, [(99, 0), (99, 1)]);
}

#[test]
fn an_end_for_want_of_memory_is_told_as_that_also_when_the_next_start_came_at_once() {
    let mut world = World::new(1);
    world.deploy("web", WorkloadSpec { copies: Some(1), ..spec() });
    world.run(2);
    let copy = world.copies("web")[0].clone();
    let oom = Some(optimus_common::reason::Oom { limit: Bytes::mib(64), peak: Bytes::mib(64), kills: 1 });
    let exit = Exit { code: None, signal: Some(9), oom, at: world.now, ran_for: Span::secs(3) };
    let old = AllocStatus::clone(copy.status.as_ref().unwrap());
    // One report tells of the end and of the next start.
    let status = AllocStatus { seq: old.seq + 1, last_exit: Some(exit), ready: false, reason: Some(Reason::Starting), restarts: 1, ..old };
    world.apply(Command::Report { node: copy.node, statuses: vec![status], gone: vec![] });
    let events: Vec<String> = world.state.events.values().filter(|e| e.kind == EventKind::CopyExited).map(|e| e.message.clone()).collect();
    assert_eq!(events, ["out of memory: killed at its limit of 64 MiB (peak 64 MiB) after 3s"]);
}

#[test]
fn the_time_of_a_leader_whose_clock_was_an_hour_ahead_is_not_waited_for() {
    let mut world = World::new(1);
    let right = world.now;
    world.now = right + Span::secs(3600);
    world.deploy("web", spec());
    world.reconcile();
    world.agents();
    assert!(world.state.allocs.values().all(|a| a.status.as_ref().unwrap().ready_since > Some(right)));
    let gave_up = SlotFailures { release: 1, count: 4, last_at: world.now };
    world.state.failures.insert((key("web"), 2), gave_up);
    world.now = right;
    world.run(2);
    assert_eq!(world.ready("web"), 3);
    assert_eq!(world.deployment("web").phase, DeploymentPhase::Succeeded);
}

#[test]
fn a_server_joins_once_per_token_and_its_id_is_never_given_again() {
    let mut state = State::default();
    let at = Timestamp(1_000);
    let mut index = 0;
    let mut apply = |state: &mut State, command| {
        index += 1;
        state.apply(index, Proposal { at, request: None, command })
    };
    let facts = |level| ServerFacts { name: "s".into(), address: "h:1".into(), api: "h:2".into(), version: "1".into(), level };
    apply(&mut state, Command::CreateCluster { id: ClusterId(id(1)), ca_certificate: vec![], ca_key_sealed: vec![] });
    let admit = |token, key: u8, level| Command::AdmitServer { token, server: facts(level), key_fingerprint: vec![key] };
    assert!(matches!(apply(&mut state, admit(None, 1, 2)), Applied::Done { .. }));
    assert!(matches!(apply(&mut state, admit(None, 1, 2)), Applied::Unchanged { .. }), "a retry");
    assert_eq!(apply(&mut state, admit(None, 2, 2)), Applied::Refused(Refusal::TokenUnknown), "one founder only");

    let (servers, agents) = (TokenId(id(2)), TokenId(id(3)));
    for (id, role) in [(servers, Role::Server), (agents, Role::Agent)] {
        apply(&mut state, Command::CreateToken { id, secret_hash: vec![], expires_at: at + Span::secs(10), uses: 2, role });
    }
    let wrong = Refusal::TokenRole { is: Role::Agent, wanted: Role::Server };
    assert_eq!(apply(&mut state, admit(Some(agents), 2, 2)), Applied::Refused(wrong));
    let node =
        Command::AdmitNode { token: servers, node: NodeId(id(9)), name: "n".into(), key_fingerprint: vec![9], certificate_expires_at: at };
    assert!(matches!(apply(&mut state, node), Applied::Refused(Refusal::TokenRole { .. })), "nor the other way round");
    assert!(matches!(apply(&mut state, admit(Some(servers), 2, 2)), Applied::Done { .. }));
    assert!(matches!(apply(&mut state, admit(Some(servers), 2, 2)), Applied::Unchanged { .. }), "a retry burns no second use");
    let second = *state.servers.keys().max().unwrap();

    // A version is raised only to what all understand, and commands wait for it.
    assert!(matches!(apply(&mut state, Command::RemoveServer { id: second }), Applied::Refused(Refusal::NotYet { .. })));
    assert!(matches!(apply(&mut state, Command::RaiseVersion { to: 3 }), Applied::Unchanged { .. }));
    assert!(matches!(apply(&mut state, Command::RaiseVersion { to: 2 }), Applied::Done { .. }));
    assert!(matches!(apply(&mut state, admit(Some(servers), 3, 1)), Applied::Refused(Refusal::TooOld { cluster: 2, server: 1 })));

    assert!(matches!(apply(&mut state, Command::ForgetServer { id: second }), Applied::Unchanged { .. }), "it is not leaving");
    assert!(matches!(apply(&mut state, Command::RemoveServer { id: second }), Applied::Done { .. }));
    assert_eq!(apply(&mut state, Command::RemoveServer { id: 1 }), Applied::Refused(Refusal::LastServer(1)));
    assert!(matches!(apply(&mut state, Command::ForgetServer { id: second }), Applied::Done { .. }));
    assert!(matches!(apply(&mut state, admit(Some(servers), 3, 2)), Applied::Done { .. }));
    assert!(*state.servers.keys().max().unwrap() > second);
    assert_eq!(state.servers.len(), 2);
}

#[test]
fn copies_of_a_node_that_came_back_do_not_hold_the_room_another_slot_waits_for() {
    let mut world = World::new(2);
    let fixed = |n, copies| WorkloadSpec {
        copies: Some(copies),
        ports: vec![Port { name: Name::new("http").unwrap(), fixed: Some(80) }],
        ..changed(n)
    };
    world.deploy("db", fixed(1, 1));
    world.run(2);
    let node = world.copies("db")[0].node;
    let name = world.state.nodes[&node].facts.name.clone();
    world.apply(Command::NodeDown { node });
    world.deploy("db", fixed(2, 1));
    world.reconcile();
    assert_eq!(world.copies("db").len(), 2, "one of them on the node that does not answer");
    // It comes back in the same moment as another release wants a second copy: both nodes' ports are held in slot 0.
    world.apply(Command::NodeUp { node, facts: facts(&name) });
    world.deploy("db", fixed(3, 2));
    world.run(30);
    let copies = world.copies("db");
    assert_eq!(copies.iter().map(|a| (a.index, a.release, a.is_ready())).collect::<Vec<_>>(), [(0, 3, true), (1, 3, true)]);
    assert_eq!(world.deployment("db").phase, DeploymentPhase::Succeeded);
}
