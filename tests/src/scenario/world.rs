//! The state with its log, a clock, the leader, and agents that do as they are told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use optimus_common::spec::{Kind, WorkloadSpec};
use optimus_common::{AllocId, ClusterId, Name, NodeId, Span, Timestamp, WorkloadKey};
use optimus_core::reconciler::Outcome;
use optimus_core::state::{Alloc, Applied, Command, LEVEL, Plan, Proposal, ServerFacts, State};
use optimus_core::{reconciler, scheduler};
use uuid::Uuid;

use super::agents::Agents;
use super::print;

/// Most rounds of leader and agents until nothing changes any more. A scenario that needs more does not converge.
const ROUNDS_MAX: usize = 200;
/// When every scenario begins.
pub const BEGAN: Timestamp = Timestamp(1_800_000_000_000);

/// What must hold after every single command from the line on that says so.
#[derive(Debug, Clone)]
pub enum Rule {
    /// Copies that should run, on nodes that answer.
    NeverMore { most: usize, of: String },
    /// Ready copies that should run, on nodes that answer.
    NeverFewer { least: usize, of: String },
}

pub struct World {
    pub state: State,
    pub now: Timestamp,
    /// Names of the scenario. A node that was removed keeps its name here.
    pub nodes: BTreeMap<String, NodeId>,
    pub specs: BTreeMap<String, WorkloadSpec>,
    pub agents: Agents,
    /// Of the newest command of a user.
    pub answer: Option<Applied>,
    /// Plans of the leader that had something in them.
    pub decisions: usize,
    /// When the leader wants to look again, by its last look.
    pub wake_at: Option<Timestamp>,
    /// Plans that were made but not yet applied, by the name the scenario gives them.
    pub plans: BTreeMap<String, Plan>,
    /// Nobody leads.
    pub leader_away: bool,
    pub rules: Vec<Rule>,
    /// The state when the newest `when` began, and since then: copies placed and told to stop, by workload.
    pub marked: State,
    pub placed: BTreeMap<String, usize>,
    pub stopped: BTreeMap<String, usize>,
    /// One entry for each command since the line began; kept only when asked for.
    pub trace: Vec<String>,
    tracing: bool,
    broken: Option<String>,
    ids: u128,
    log: Vec<(u64, Proposal)>,
}

impl World {
    /// A cluster of the newest version, without nodes.
    pub(super) fn new(tracing: bool) -> Self {
        let mut world = World {
            state: State::default(),
            now: BEGAN,
            nodes: BTreeMap::new(),
            specs: BTreeMap::new(),
            agents: Agents::default(),
            answer: None,
            decisions: 0,
            wake_at: None,
            plans: BTreeMap::new(),
            leader_away: false,
            rules: vec![],
            marked: State::default(),
            placed: BTreeMap::new(),
            stopped: BTreeMap::new(),
            trace: vec![],
            tracing,
            broken: None,
            ids: 0,
            log: vec![],
        };
        let id = ClusterId(Uuid::from_u128(9));
        world.apply(Command::CreateCluster { id, ca_certificate: vec![], ca_key_sealed: vec![] });
        let facts = |text: &str| text.to_owned();
        let server = ServerFacts {
            name: facts("server-1"),
            address: facts("10.0.0.9:7601"),
            api: facts("10.0.0.9:7600"),
            version: facts("1"),
            level: LEVEL,
        };
        world.apply(Command::AdmitServer { token: None, server, key_fingerprint: vec![] });
        world.apply(Command::RaiseVersion { to: LEVEL });
        world.trace.clear();
        world
    }

    // ---- acting ----

    pub fn propose(&mut self, proposal: Proposal) -> Applied {
        let index = self.state.index + 1;
        let before = self.state.clone();
        self.log.push((index, proposal.clone()));
        let what = self.tracing.then(|| print::command(&proposal.command));
        let planned = if let Command::Plan(plan) = &proposal.command { Some(plan.clone()) } else { None };
        let applied = self.state.apply(index, proposal);
        if let Some(plan) = planned {
            self.count(&before, &plan);
        }
        if let Some(what) = what {
            let changes = print::changes(&before, &self.state);
            self.trace.push(format!("{} {what}", print::clock(self.now)));
            self.trace.extend(changes.into_iter().map(|c| format!("  {c}")));
        }
        self.watch_rules();
        applied
    }

    pub fn apply(&mut self, command: Command) -> Applied {
        self.propose(Proposal { at: self.now, request: None, command })
    }

    /// A command of a user: its answer can be asked for.
    pub fn ask(&mut self, command: Command) {
        self.answer = Some(self.apply(command));
    }

    /// Ids are counted, so that a scenario gives the same state every time.
    pub fn next_id(&mut self) -> Uuid {
        self.ids += 1;
        Uuid::from_u128(1_000_000 + self.ids)
    }

    /// What the leader would propose now.
    pub fn think(&mut self) -> Outcome {
        let mut ids = self.ids;
        let outcome = reconciler::reconcile(&self.state, self.now, &mut || {
            ids += 1;
            AllocId(Uuid::from_u128(1_000_000 + ids))
        });
        self.ids = ids;
        self.wake_at = outcome.wake_at;
        outcome
    }

    /// Proposes what the leader wants beside its plan. True: something of it took effect.
    fn propose_own(&mut self, commands: Vec<Command>) -> anyhow::Result<bool> {
        let mut acted = false;
        for command in commands {
            let answer = self.apply(command.clone());
            ensure!(!matches!(answer, Applied::Refused(_)), "the leader's own command was refused: {command:?} {answer:?}");
            acted |= matches!(answer, Applied::Done { .. });
            let mut again = self.state.clone();
            let index = again.index;
            again.apply(index, Proposal { at: self.now, request: None, command: command.clone() });
            ensure!(again.digest() == self.state.digest(), "applied twice it is not what it is applied once: {command:?}");
        }
        Ok(acted)
    }

    /// One look of the leader. True: it had something to do, and it took effect.
    pub fn decide(&mut self) -> anyhow::Result<bool> {
        if self.leader_away {
            return Ok(false);
        }
        let Outcome { plan, commands, wake_at } = self.think();
        self.wake_at = wake_at;
        let acted = self.propose_own(commands)?;
        if plan.is_empty() {
            return Ok(acted);
        }
        self.decisions += 1;
        let answer = self.apply(Command::Plan(plan.clone()));
        ensure!(acted || !matches!(answer, Applied::Unchanged { .. }), "a plan had no effect: {plan:?}");
        let lost = plan.place.iter().find(|p| !self.state.allocs.contains_key(&p.alloc));
        ensure!(lost.is_none(), "planned but refused when applied: {lost:?}");
        // Proposed twice, as after a lost answer, it changes nothing more.
        let before = self.state.digest();
        let mut again = self.state.clone();
        let index = again.index;
        again.apply(index, Proposal { at: self.now, request: None, command: Command::Plan(plan.clone()) });
        ensure!(again.digest() == before, "a plan applied twice is not the plan applied once: {plan:?}");
        Ok(true)
    }

    /// Every agent that answers reports what changed on its node.
    pub fn report(&mut self) -> bool {
        let mut any = false;
        let nodes: Vec<NodeId> = self.state.nodes.values().filter(|n| n.up).map(|n| n.id).collect();
        for node in nodes {
            let held: Vec<Arc<Alloc>> = reconciler::desired_allocs(&self.state, node).cloned().collect();
            let is_job = |alloc: &Alloc| {
                alloc.is_release_step() || self.state.release(&alloc.key, alloc.release).is_some_and(|r| r.spec.kind == Kind::Job)
            };
            let statuses: Vec<_> = held.iter().filter_map(|alloc| self.agents.obey(alloc, is_job(alloc), self.now)).collect();
            if !statuses.is_empty() {
                any = true;
                self.apply(Command::Report { node, statuses, gone: vec![] });
            }
        }
        any
    }

    /// Leader and agents in turn, until none of them has anything more to do at this time.
    pub fn settle(&mut self) -> anyhow::Result<()> {
        for _ in 0..ROUNDS_MAX {
            let decided = self.decide()?;
            self.check_room()?;
            if !(self.report() | decided) {
                return Ok(());
            }
        }
        bail!("it does not settle within {ROUNDS_MAX} rounds")
    }

    /// Second by second, each of them settled.
    pub fn advance(&mut self, span: Span) -> anyhow::Result<()> {
        for _ in 0..span.0 / 1000 {
            self.now = self.now + Span::secs(1);
            self.settle()?;
        }
        Ok(())
    }

    /// Another server leads: all it has is what a snapshot and the log hold.
    pub fn change_leader(&mut self) -> anyhow::Result<()> {
        self.state = State::from_bytes(&self.state.to_bytes()).context("the state does not survive a snapshot")?;
        self.wake_at = None;
        Ok(())
    }

    pub(super) fn mark(&mut self) {
        self.marked = self.state.clone();
        self.placed.clear();
        self.stopped.clear();
    }

    fn count(&mut self, before: &State, plan: &Plan) {
        for placement in plan.place.iter().filter(|p| self.state.allocs.contains_key(&p.alloc)) {
            *self.placed.entry(placement.key.workload.to_string()).or_default() += 1;
        }
        let told: BTreeSet<AllocId> = plan.stop.iter().map(|(id, _)| *id).collect();
        for alloc in told.iter().filter_map(|id| before.allocs.get(id)).filter(|a| a.run) {
            *self.stopped.entry(alloc.key.workload.to_string()).or_default() += 1;
        }
    }

    // ---- looking ----

    pub fn node(&self, name: &str) -> anyhow::Result<NodeId> {
        self.nodes.get(name).copied().with_context(|| format!("no node {name}"))
    }

    pub fn node_name(&self, id: NodeId) -> &str {
        self.nodes.iter().find(|(_, n)| **n == id).map_or("?", |(name, _)| name.as_str())
    }

    /// The copies of a workload that should run.
    pub fn running(&self, name: &str) -> anyhow::Result<Vec<Arc<Alloc>>> {
        Ok(self.state.allocs_of(&key(name)?).filter(|a| a.run && !a.is_release_step()).cloned().collect())
    }

    /// The copies of a slot (`web-0`), newest last.
    pub fn copies_in(&self, slot: &str) -> anyhow::Result<Vec<Arc<Alloc>>> {
        let (key, index) = slot_of(slot)?;
        let mut copies: Vec<_> = self.state.allocs_in(&key, index).cloned().collect();
        copies.sort_by_key(|a| (a.created_at, a.id));
        Ok(copies)
    }

    /// The copy of a slot that should run; the newest if there are two.
    pub fn copy_in(&self, slot: &str) -> anyhow::Result<Arc<Alloc>> {
        self.copies_in(slot)?.into_iter().rfind(|a| a.run).with_context(|| format!("slot {slot} has no copy that should run"))
    }

    /// Copies that should run, on nodes that answer.
    fn answering(&self, name: &str) -> Vec<Arc<Alloc>> {
        let Ok(key) = key(name) else { return vec![] };
        let answers = |a: &&Arc<Alloc>| a.run && !a.is_release_step() && self.state.nodes.get(&a.node).is_some_and(|n| n.up);
        self.state.allocs_of(&key).filter(answers).cloned().collect()
    }

    // ---- what always holds ----

    fn watch_rules(&mut self) {
        if self.broken.is_some() {
            return;
        }
        let broken = self.rules.iter().find_map(|rule| match rule {
            Rule::NeverMore { most, of } => {
                let count = self.answering(of).len();
                (count > *most).then(|| format!("{of} has {count} copies, never more than {most} are allowed"))
            }
            Rule::NeverFewer { least, of } => {
                let count = self.answering(of).iter().filter(|a| a.is_ready()).count();
                (count < *least).then(|| format!("{of} has {count} ready copies, never fewer than {least} are allowed"))
            }
        });
        self.broken = broken.map(|what| format!("at {}: {what}", print::clock(self.now)));
    }

    pub(super) fn check_always(&self) -> anyhow::Result<()> {
        if let Some(broken) = &self.broken {
            bail!("{broken}");
        }
        self.check_room()
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

    pub(super) fn check_replay(&self) -> anyhow::Result<()> {
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

/// All workloads of a scenario are of one project and environment.
pub fn key(name: &str) -> anyhow::Result<WorkloadKey> {
    Ok(WorkloadKey { project: Name::new("shop")?, environment: Name::new("prod")?, workload: Name::new(name)? })
}

/// `web-0`
pub fn slot_of(slot: &str) -> anyhow::Result<(WorkloadKey, u32)> {
    let (name, index) = slot.rsplit_once('-').context("a slot is written web-0")?;
    Ok((key(name)?, index.parse().context("a slot is written web-0")?))
}
