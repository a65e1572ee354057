//! Text scenarios: the control plane's decisions against a model of agents, as sentences.
//!
//! A scenario is a file of lines under `given`, `when` and `then`, which may repeat; `#` starts a comment.
//! See [`World::line`] for the words. Time stands still but for `advance`, which lets everybody act once a second.
//! After each line no node may hold more than it has; at the end the log is replayed, and once more with a snapshot
//! after every entry, and must give the same state.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use optimus_common::api::v1::DeploymentPhase;
use optimus_common::ids::RequestId;
use optimus_common::join_token::Role;
use optimus_common::protocol::{AllocStatus, NodeFacts, Phase};
use optimus_common::reason::Exit;
use optimus_common::spec::*;
use optimus_common::{AllocId, Bytes, DeploymentId, Millicores, Name, NodeId, Reason, Span, Timestamp, TokenId, WorkloadKey};
use optimus_core::state::{Alloc, Applied, Command, DeployItem, Proposal, State};
use optimus_core::{reconciler, scheduler, view};
use uuid::Uuid;

/// Most rounds of leader and agents until nothing changes any more. A scenario that needs more does not converge.
const ROUNDS_MAX: usize = 200;

/// What the copies of a release do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Behaviour {
    Ready,
    /// Runs, but its readiness check fails.
    NotReady,
    /// Ends a second after each start.
    Crash,
    /// A stranger holds its port.
    PortTaken,
    /// Cannot be started on its node.
    Broken,
    /// Nothing is ever heard of it.
    Silent,
    /// Ready, but does not end when told to.
    Stubborn,
}

/// The state with its log, a clock, and agents that do as they are told.
pub struct World {
    state: State,
    now: Timestamp,
    ids: u128,
    seq: u64,
    nodes: BTreeMap<String, NodeId>,
    specs: BTreeMap<String, WorkloadSpec>,
    /// By workload and release; ready unless said otherwise.
    behaviour: BTreeMap<(String, u64), Behaviour>,
    log: Vec<(u64, Proposal)>,
    answer: Option<Applied>,
    /// Placements of the last `decide`, to tell whether the leader is at rest.
    decisions: usize,
}

/// Runs a scenario; an error names the line.
pub fn run(text: &str) -> anyhow::Result<()> {
    let mut world = World::new();
    let mut lines = 0;
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() || ["given", "when", "then"].contains(&line) {
            continue;
        }
        lines += 1;
        world.line(line).and_then(|()| world.check_room()).with_context(|| format!("line {}: {line}", number + 1))?;
    }
    ensure!(lines > 1, "a scenario without lines proves nothing");
    world.check_replay()
}

impl World {
    fn new() -> Self {
        World {
            state: State::default(),
            now: Timestamp(1_800_000_000_000),
            ids: 0,
            seq: 0,
            nodes: BTreeMap::new(),
            specs: BTreeMap::new(),
            behaviour: BTreeMap::new(),
            log: vec![],
            answer: None,
            decisions: 0,
        }
    }

    /// One line of a scenario.
    fn line(&mut self, line: &str) -> anyhow::Result<()> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            // ---- the world ----
            ["node", name, settings @ ..] => self.add_node(name, settings),
            ["down", name] => self.answered(Command::NodeDown { node: self.node(name)? }),
            ["up", name] => {
                let node = self.node(name)?;
                let facts = self.state.nodes.get(&node).context("no such node")?.facts.clone();
                self.answered(Command::NodeUp { node, facts })
            }
            ["copies", "of", target, how] => self.behave(target, how),
            // ---- users ----
            ["workload", name, settings @ ..] => self.set_spec(name, settings),
            ["deploy", name, settings @ ..] => {
                self.set_spec(name, settings)?;
                let command = self.deploy_command(name)?;
                self.answered(command)
            }
            ["request", request, verb, name, settings @ ..] => {
                self.set_spec(name, settings)?;
                let command = match *verb {
                    "deploy" => self.deploy_command(name)?,
                    "restart" => Command::Restart { key: key(name)?, deployment: DeploymentId(self.next_id()) },
                    other => bail!("no request `{other}`"),
                };
                // As the API does it: the digest is that of the body, which a retry repeats.
                let digest = format!("{verb} {name} {settings:?}").into_bytes();
                let id = RequestId(Uuid::from_u128(blake(request)));
                self.answer = Some(self.propose(Proposal { at: self.now, request: Some((id, digest)), command }));
                Ok(())
            }
            ["scale", name, copies] => {
                let deployment = DeploymentId(self.next_id());
                self.answered(Command::Scale { key: key(name)?, copies: copies.parse()?, deployment })
            }
            ["restart", name] => {
                let deployment = DeploymentId(self.next_id());
                self.answered(Command::Restart { key: key(name)?, deployment })
            }
            ["stop", name] => self.answered(Command::StopWorkload { key: key(name)? }),
            ["remove", name] => self.answered(Command::RemoveWorkload { key: key(name)? }),
            // ---- time and turns ----
            ["settle"] => self.settle(),
            ["decide"] => {
                self.decide()?;
                Ok(())
            }
            ["report"] => {
                self.report();
                Ok(())
            }
            ["advance", span] => {
                for _ in 0..(span.parse::<Span>()?.0 / 1000) {
                    self.now = self.now + Span::secs(1);
                    self.settle()?;
                }
                Ok(())
            }
            ["pass", span] => {
                self.now = self.now + span.parse()?;
                Ok(())
            }
            // ---- what must be ----
            ["slots", rest @ ..] => self.expect_slots(rest),
            ["answer", "is", what] => same(&answer_name(self.answer.as_ref().context("nothing was asked")?), what),
            [name, "has", ready, "of", wanted, "ready"] => {
                let row = self.state.workload(&key(name)?).context("no such workload")?;
                let shown = view::workload(&self.state, row, self.now);
                same(&format!("{} of {}", shown.copies_ready, shown.copies_wanted), &format!("{ready} of {wanted}"))
            }
            [name, "is", phase] => {
                let shown = self.state.workload(&key(name)?).map(|row| view::workload(&self.state, row, self.now).phase);
                same(&shown.map_or("gone".into(), |phase| format!("{phase:?}").to_lowercase()), phase)
            }
            [name, "runs", "release", number] => {
                let row = self.state.workload(&key(name)?).context("no such workload")?;
                same(&row.release.to_string(), number)?;
                let releases = self.running(name)?.into_iter().map(|a| a.release);
                ensure!(releases.clone().all(|r| r == row.release), "copies of other releases run: {:?}", releases.collect::<Vec<_>>());
                Ok(())
            }
            ["deployment", "of", name, phase] => same(&phase_name(self.deployment(name)?.phase), phase),
            ["deployment", "of", name, "says", ..] => {
                let reason = self.deployment(name)?.reason.map_or_else(String::new, |r| r.message);
                contains(&reason, quoted(line)?)
            }
            ["slot", slot, "says", ..] => {
                let (name, index) = slot.rsplit_once('-').context("a slot is written web-0")?;
                let key = key(name)?;
                let row = self.state.workload(&key).context("no such workload")?;
                let reason = reconciler::unplaced(&self.state, row, index.parse()?, self.now).context("it has a copy, or needs none")?;
                contains(&reason.to_string(), quoted(line)?)
            }
            ["status", "says", ..] => {
                let mut state = self.state.clone();
                state.apply(0, Proposal { at: self.now, request: None, command: create_cluster() });
                contains(&view::status(&state, None, 0, 1).context("no cluster")?.summary, quoted(line)?)
            }
            ["answer", "says", ..] => match &self.answer {
                Some(Applied::Refused(refusal)) => contains(&refusal.to_string(), quoted(line)?),
                other => bail!("it was not refused: {other:?}"),
            },
            [node, "holds", copies] if self.nodes.contains_key(*node) => {
                same(&scheduler::taken(&self.state, self.node(node)?).copies.to_string(), copies)
            }
            ["ended", "copies", "of", name, count] => {
                same(&self.state.allocs_of(&key(name)?).filter(|a| a.has_ended()).count().to_string(), count)
            }
            ["event", kind, subject] => {
                let found = self.state.events.values().any(|e| {
                    let shown = view::event(e);
                    shown.kind == *kind && shown.subject.ends_with(subject)
                });
                ensure!(found, "no such event among {:?}", self.state.events.values().map(|e| (e.kind, &e.subject)).collect::<Vec<_>>());
                Ok(())
            }
            ["events", kind, subject, count] => {
                let is = |e: &&Arc<optimus_core::state::Event>| view::event(e).kind == *kind && e.subject.ends_with(subject);
                same(&self.state.events.values().filter(is).count().to_string(), count)
            }
            ["leader", "rests"] => {
                ensure!(!self.decide()?, "the leader still has something to do");
                Ok(())
            }
            ["leader", "decided", "at", "most", most] => {
                let most: usize = most.parse()?;
                ensure!(self.decisions <= most, "it took {} decisions", self.decisions);
                Ok(())
            }
            _ => bail!("no such line"),
        }
    }

    // ---- acting ----

    fn propose(&mut self, proposal: Proposal) -> Applied {
        let index = self.state.index + 1;
        self.log.push((index, proposal.clone()));
        self.state.apply(index, proposal)
    }

    fn answered(&mut self, command: Command) -> anyhow::Result<()> {
        self.answer = Some(self.propose(Proposal { at: self.now, request: None, command }));
        Ok(())
    }

    fn apply(&mut self, command: Command) -> Applied {
        self.propose(Proposal { at: self.now, request: None, command })
    }

    fn next_id(&mut self) -> Uuid {
        self.ids += 1;
        Uuid::from_u128(1_000_000 + self.ids)
    }

    /// One look of the leader. True: it had something to do, and it took effect.
    fn decide(&mut self) -> anyhow::Result<bool> {
        let mut ids = self.ids;
        let outcome = reconciler::reconcile(&self.state, self.now, &mut || {
            ids += 1;
            AllocId(Uuid::from_u128(1_000_000 + ids))
        });
        self.ids = ids;
        if outcome.plan.is_empty() {
            return Ok(false);
        }
        self.decisions += 1;
        let answer = self.apply(Command::Plan(outcome.plan.clone()));
        ensure!(!matches!(answer, Applied::Unchanged { .. }), "a plan had no effect: {:?}", outcome.plan);
        let lost = outcome.plan.place.iter().find(|p| !self.state.allocs.contains_key(&p.alloc));
        ensure!(lost.is_none(), "planned but refused when applied: {lost:?}");
        // Proposed twice, as after a lost answer, it changes nothing more.
        let before = self.state.digest();
        let mut again = self.state.clone();
        let index = again.index;
        again.apply(index, Proposal { at: self.now, request: None, command: Command::Plan(outcome.plan.clone()) });
        ensure!(again.digest() == before, "a plan applied twice is not the plan applied once: {:?}", outcome.plan);
        Ok(true)
    }

    /// Every agent that answers reports what changed on its node.
    fn report(&mut self) -> bool {
        let mut any = false;
        let nodes: Vec<NodeId> = self.state.nodes.values().filter(|n| n.up).map(|n| n.id).collect();
        for node in nodes {
            let held: Vec<Arc<Alloc>> = reconciler::desired_allocs(&self.state, node).cloned().collect();
            let statuses: Vec<AllocStatus> = held.iter().filter_map(|alloc| self.obey(alloc)).collect();
            if !statuses.is_empty() {
                any = true;
                self.apply(Command::Report { node, statuses, gone: vec![] });
            }
        }
        any
    }

    fn settle(&mut self) -> anyhow::Result<()> {
        for _ in 0..ROUNDS_MAX {
            let decided = self.decide()?;
            self.check_room()?;
            if !(self.report() | decided) {
                return Ok(());
            }
        }
        bail!("it does not settle within {ROUNDS_MAX} rounds")
    }

    /// What the copy's agent has to say that is new.
    fn obey(&mut self, alloc: &Alloc) -> Option<AllocStatus> {
        use Behaviour::*;
        let of = (alloc.key.workload.to_string(), alloc.release);
        let behaviour = self.behaviour.get(&of).copied().unwrap_or(Ready);
        let old = alloc.status.as_deref();
        let exit = Exit { code: Some(1), signal: None, oom: None, at: self.now, ran_for: Span::secs(1) };
        let failed = |step: &str| Reason::StartFailed { step: step.into(), error: "no such device".into() };
        let (phase, ready, restarts, reason) = match (alloc.run, behaviour) {
            (_, Silent) => return None,
            (false, Stubborn) => (Phase::Stopping, false, 0, None),
            (false, _) => (Phase::Stopped, false, 0, None),
            (true, Ready | Stubborn) => (Phase::Running, true, 0, None),
            (true, NotReady) => {
                let reason = Reason::NotReady { probe: "GET /healthz".into(), last: "status 500".into(), listening: vec![], port: None };
                (Phase::Running, false, 0, Some(reason))
            }
            (true, Crash) => (Phase::Backoff, false, old.map_or(0, |s| s.restarts + 1), Some(Reason::Exited { exit: exit.clone() })),
            (true, PortTaken) => {
                let port = alloc.ports.first().map_or(0, |(_, port)| *port);
                (Phase::Failed, false, 0, Some(Reason::PortTaken { port, holder: Some("nginx (pid 7)".into()) }))
            }
            (true, Broken) => (Phase::Failed, false, 0, Some(failed("mount the volume"))),
        };
        let crashed_now = old.and_then(|s| s.last_exit.as_ref()).is_some_and(|e| e.at == self.now);
        let known = old.is_some_and(|s| s.phase == phase && s.ready == ready);
        if known && (behaviour != Crash || crashed_now || !alloc.run) {
            return None;
        }
        self.seq += 1;
        Some(AllocStatus {
            id: alloc.id,
            seq: self.seq,
            phase,
            ready,
            // An agent whose clock is an hour ahead: nothing may hang on it.
            ready_since: ready.then_some(self.now + Span::secs(3600)),
            reason,
            restarts,
            pid: ready.then_some(7),
            started_at: ready.then_some(self.now),
            last_exit: (behaviour == Crash && alloc.run).then_some(exit),
            unenforced: vec![],
            last_lines: vec![],
        })
    }

    // ---- setting the scene ----

    fn add_node(&mut self, name: &str, settings: &[&str]) -> anyhow::Result<()> {
        let mut facts = NodeFacts {
            name: name.into(),
            cpu: Millicores(4000),
            memory: Bytes(8 << 30),
            drivers: vec!["process".into()],
            ports: (20_000, 20_099),
            address: "10.0.0.1".into(),
            ..NodeFacts::default()
        };
        for setting in settings {
            match setting.split_once('=').context("a setting is written key=value")? {
                ("cpu", value) => facts.cpu = value.parse()?,
                ("memory", value) => facts.memory = value.parse()?,
                ("ports", value) => {
                    let (first, last) = value.split_once('-').context("ports are written 20000-20009")?;
                    facts.ports = (first.parse()?, last.parse()?);
                }
                ("drivers", value) => facts.drivers = value.split(',').filter(|d| *d != "none").map(str::to_owned).collect(),
                (other, _) => bail!("a node has no `{other}`"),
            }
        }
        let number = self.nodes.len() as u128 + 1;
        let (node, token) = (NodeId(Uuid::from_u128(number)), TokenId(Uuid::from_u128(number)));
        let expires_at = self.now + Span::secs(60);
        self.apply(Command::CreateToken { id: token, secret_hash: vec![], expires_at, uses: 1, role: Role::Agent });
        let key_fingerprint = name.as_bytes().to_vec();
        self.apply(Command::AdmitNode { token, node, name: name.into(), key_fingerprint, certificate_expires_at: expires_at });
        self.nodes.insert(name.into(), node);
        self.answered(Command::NodeUp { node, facts })
    }

    /// `web` (its newest release) or `web@2`.
    fn behave(&mut self, target: &str, how: &str) -> anyhow::Result<()> {
        let behaviour = match how {
            "are-ready" => Behaviour::Ready,
            "are-not-ready" => Behaviour::NotReady,
            "crash" => Behaviour::Crash,
            "find-the-port-taken" => Behaviour::PortTaken,
            "are-broken" => Behaviour::Broken,
            "are-silent" => Behaviour::Silent,
            "are-stubborn" => Behaviour::Stubborn,
            other => bail!("copies do not `{other}`"),
        };
        let (name, release) = target.split_once('@').context("copies of a release are written web@2")?;
        self.behaviour.insert((name.into(), release.parse()?), behaviour);
        Ok(())
    }

    fn set_spec(&mut self, name: &str, settings: &[&str]) -> anyhow::Result<()> {
        let spec = self.specs.entry(name.into()).or_insert_with(spec);
        for setting in settings {
            let (setting, value) = setting.split_once('=').context("a setting is written key=value")?;
            match setting {
                "v" => spec.run = Run::Argv(vec!["app".into(), value.into()]),
                "copies" => spec.copies = if value == "unset" { None } else { Some(value.parse()?) },
                "cpu" => spec.resources.cpu = value.parse()?,
                "memory" => spec.resources.memory_request = value.parse()?,
                "port" => {
                    let fixed = if value == "auto" || value == "none" { None } else { Some(value.parse()?) };
                    spec.ports = if value == "none" { vec![] } else { vec![Port { name: Name::new("http")?, fixed }] };
                }
                "parallel" => spec.update.parallel = value.parse()?,
                "deadline" => spec.update.deadline = value.parse()?,
                "min-ready" => spec.update.min_ready = value.parse()?,
                "image" => spec.driver = Driver::Container(Box::new(Container::of(value))),
                other => bail!("a workload has no `{other}`"),
            }
        }
        Ok(())
    }

    fn deploy_command(&mut self, name: &str) -> anyhow::Result<Command> {
        let spec = Arc::new(self.specs.get(name).context("no such spec")?.clone());
        let deployment = DeploymentId(self.next_id());
        Ok(Command::Deploy { items: vec![DeployItem { key: key(name)?, spec, source: None, deployment }] })
    }

    // ---- looking ----

    fn node(&self, name: &str) -> anyhow::Result<NodeId> {
        self.nodes.get(name).copied().with_context(|| format!("no node {name}"))
    }

    fn running(&self, name: &str) -> anyhow::Result<Vec<Arc<Alloc>>> {
        Ok(self.state.allocs_of(&key(name)?).filter(|a| a.run).cloned().collect())
    }

    fn deployment(&self, name: &str) -> anyhow::Result<optimus_common::api::v1::Deployment> {
        let row = self.state.workload(&key(name)?).context("no such workload")?;
        let row = row.deployment.and_then(|id| self.state.deployments.get(&id)).context("it has no deployment")?;
        Ok(view::deployment(&self.state, row))
    }

    /// `slots web 0@host-1:r1 1@host-2:r1 | ...`: the copies that should run, each `INDEX@NODE:rRELEASE`.
    fn expect_slots(&self, rest: &[&str]) -> anyhow::Result<()> {
        let (name, expected) = rest.split_first().context("slots of what?")?;
        let node_name = |id: NodeId| self.nodes.iter().find(|(_, n)| **n == id).map_or("?", |(name, _)| name.as_str());
        let mut found: Vec<String> =
            self.running(name)?.iter().map(|a| format!("{}@{}:r{}", a.index, node_name(a.node), a.release)).collect();
        let mut expected: Vec<String> = expected.iter().filter(|w| **w != "none").map(|w| (*w).to_owned()).collect();
        found.sort();
        expected.sort();
        same(&found.join(" "), &expected.join(" "))
    }

    fn check_room(&self) -> anyhow::Result<()> {
        for (id, node) in &self.state.nodes {
            let taken = scheduler::taken(&self.state, *id);
            let name = &node.facts.name;
            ensure!(taken.cpu <= u64::from(node.facts.cpu.0), "{name} holds more cpu than it has");
            ensure!(taken.memory <= node.facts.memory.0, "{name} holds more memory than it has");
            let ports = reconciler::desired_allocs(&self.state, *id).map(|a| a.ports.len()).sum::<usize>();
            ensure!(ports == taken.ports.len(), "a port of {name} is given twice");
        }
        Ok(())
    }

    fn check_replay(&self) -> anyhow::Result<()> {
        let mut plain = State::default();
        let mut by_snapshots = State::default();
        for (index, proposal) in &self.log {
            plain.apply(*index, proposal.clone());
            by_snapshots.apply(*index, proposal.clone());
            by_snapshots = State::from_bytes(&by_snapshots.to_bytes())?;
        }
        ensure!(plain.digest() == self.state.digest(), "a replay gives another state");
        ensure!(by_snapshots == self.state, "snapshots and the rest of the log give another state");
        Ok(())
    }
}

fn spec() -> WorkloadSpec {
    WorkloadSpec {
        kind: Kind::Service,
        driver: Driver::Process,
        run: Run::Argv(vec!["app".into()]),
        dir: None,
        env: BTreeMap::new(),
        user: None,
        copies: Some(1),
        ports: vec![],
        resources: Resources { cpu: Millicores(500), memory_request: Bytes(64 << 20), memory_limit: Bytes(1 << 30), pids: 100 },
        health: Health { readiness: None, liveness: None },
        restart: Restart { delay: Span::secs(1), delay_max: Span::secs(60), reset_after: Span::secs(60) },
        stop: Stop { signal: "TERM".into(), grace: Span::secs(10) },
        update: Update { strategy: Strategy::Rolling, parallel: 1, deadline: Span::secs(60), min_ready: Span(0) },
        logs: Logs { size: Bytes(1 << 20) },
        secrets: vec![],
        labels: BTreeMap::new(),
        schedule: None,
        timeout: None,
    }
}

fn create_cluster() -> Command {
    let id = optimus_common::ClusterId(Uuid::from_u128(9));
    Command::CreateCluster { id, ca_certificate: vec![], ca_key_sealed: vec![] }
}

fn key(name: &str) -> anyhow::Result<WorkloadKey> {
    Ok(WorkloadKey { project: Name::new("shop")?, environment: Name::new("prod")?, workload: Name::new(name)? })
}

fn blake(text: &str) -> u128 {
    text.bytes().fold(7, |sum: u128, b| sum.wrapping_mul(131).wrapping_add(u128::from(b)))
}

fn phase_name(phase: DeploymentPhase) -> String {
    match phase {
        DeploymentPhase::RollingBack => "rolling-back".into(),
        DeploymentPhase::RolledBack => "rolled-back".into(),
        other => format!("{other:?}").to_lowercase(),
    }
}

fn answer_name(answer: &Applied) -> String {
    match answer {
        Applied::Done { .. } => "done",
        Applied::Unchanged { .. } => "unchanged",
        Applied::Deployed { deployments, .. } if deployments.is_empty() => "unchanged",
        Applied::Deployed { .. } => "deployed",
        Applied::Refused(_) => "refused",
    }
    .into()
}

fn quoted(line: &str) -> anyhow::Result<&str> {
    let (_, rest) = line.split_once('"').context("what it says goes in quotes")?;
    rest.strip_suffix('"').context("the quote does not end")
}

fn same(found: &str, expected: &str) -> anyhow::Result<()> {
    ensure!(found == expected, "found `{found}`, expected `{expected}`");
    Ok(())
}

fn contains(found: &str, expected: &str) -> anyhow::Result<()> {
    ensure!(found.contains(expected), "found `{found}`, expected it to say `{expected}`");
    Ok(())
}
