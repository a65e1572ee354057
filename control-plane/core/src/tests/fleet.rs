//! A fleet for jobs, daemons and drains: agents that start and end copies over time, on a clock of its own, with a
//! leader that may be away.

use super::*;
use crate::reconciler::Outcome;

/// What the copies of a workload do.
#[derive(Debug, Clone)]
pub struct Work {
    /// Ready so long after the start; unset: never.
    pub ready_after: Option<Span>,
    /// A job's copy ends after so long.
    pub takes: Span,
    /// Exit statuses of the tries in order; the last repeats.
    pub exits: Vec<i32>,
}

impl Default for Work {
    fn default() -> Self {
        Work { ready_after: Some(Span(0)), takes: Span::secs(10), exits: vec![0] }
    }
}

pub struct Fleet {
    pub state: State,
    pub now: Timestamp,
    pub leader: bool,
    pub work: BTreeMap<String, Work>,
    pub log: Vec<(u64, Proposal)>,
    began: BTreeMap<AllocId, Timestamp>,
    tries: BTreeMap<String, usize>,
    /// Copies that stay as they are, whatever their workload does now.
    held: std::collections::BTreeSet<AllocId>,
    ids: u128,
    seq: u64,
}

impl Fleet {
    pub fn new(nodes: usize) -> Self {
        Self::at(nodes, Timestamp(1_767_225_600_000)) // 2026-01-01T00:00:00Z
    }

    pub fn at(nodes: usize, now: Timestamp) -> Self {
        let mut fleet = Fleet {
            state: State::default(),
            now,
            leader: true,
            work: BTreeMap::new(),
            log: vec![],
            began: BTreeMap::new(),
            tries: BTreeMap::new(),
            held: Default::default(),
            ids: 0,
            seq: 0,
        };
        fleet.apply(Command::CreateCluster { id: ClusterId(id(1)), ca_certificate: vec![], ca_key_sealed: vec![] });
        let server = ServerFacts { name: "s".into(), address: String::new(), api: String::new(), version: String::new(), level: LEVEL };
        fleet.apply(Command::AdmitServer { token: None, server, key_fingerprint: vec![] });
        fleet.apply(Command::RaiseVersion { to: LEVEL });
        let expires_at = fleet.now + Span::secs(1_000_000);
        fleet.apply(Command::CreateToken { id: TokenId(id(2)), secret_hash: vec![], expires_at, uses: 1000, role: Role::Agent });
        for n in 0..nodes {
            fleet.join(n);
        }
        fleet
    }

    pub fn join(&mut self, n: usize) {
        let (node, name) = (NodeId(id(100 + n as u128)), format!("host-{n}"));
        let certificate_expires_at = Timestamp(u64::MAX);
        self.apply(Command::AdmitNode {
            token: TokenId(id(2)),
            node,
            name: name.clone(),
            key_fingerprint: vec![n as u8],
            certificate_expires_at,
        });
        self.apply(Command::NodeUp { node, facts: facts(&name) });
    }

    pub fn apply(&mut self, command: Command) -> Applied {
        let proposal = Proposal { at: self.now, request: None, command };
        let index = self.state.index + 1;
        self.log.push((index, proposal.clone()));
        self.state.apply(index, proposal)
    }

    fn id(&mut self) -> uuid::Uuid {
        self.ids += 1;
        id(1_000_000 + self.ids)
    }

    pub fn deploy(&mut self, name: &str, spec: WorkloadSpec) -> Applied {
        let deployment = DeploymentId(self.id());
        self.apply(Command::Deploy { items: vec![DeployItem { key: key(name), spec: Arc::new(spec), source: None, deployment }] })
    }

    pub fn run_job(&mut self, name: &str) -> Applied {
        let id = optimus_common::RunId(self.id());
        self.apply(Command::StartRun(RunOrder { key: key(name), id, params: BTreeMap::new(), payload: None }))
    }

    pub fn change(&mut self, n: usize, change: NodeChange) -> Applied {
        self.apply(Command::ChangeNode { node: node(n), change })
    }

    pub fn drain(&mut self, n: usize, deadline: Option<Span>) {
        let deadline = deadline.map(|after| self.now + after);
        self.change(n, NodeChange::Drain { deadline, keep_daemons: false });
    }

    /// One look of the leader; true if something came of it.
    pub fn look(&mut self) -> bool {
        let mut ids = self.ids;
        let Outcome { plan, commands, .. } = reconciler::reconcile(&self.state, self.now, &mut || {
            ids += 1;
            AllocId(id(1_000_000 + ids))
        });
        self.ids = ids;
        let mut acted = false;
        for command in commands {
            acted |= matches!(self.apply(command), Applied::Done { .. });
        }
        if !plan.is_empty() {
            acted |= matches!(self.apply(Command::Plan(plan)), Applied::Done { .. });
        }
        acted
    }

    /// Agents and leader take turns until neither has anything to do at this instant.
    pub fn settle(&mut self) {
        for _ in 0..2000 {
            let reported = self.agents();
            let acted = self.leader && self.look();
            if !reported && !acted {
                return;
            }
        }
        panic!("does not come to rest at {:?}: {:#?}", self.now, self.state.events.values().rev().take(5).collect::<Vec<_>>());
    }

    pub fn pass(&mut self, seconds: u64) {
        self.pass_by(seconds, 1);
    }

    /// Lets time pass, looking every `step` seconds.
    pub fn pass_by(&mut self, seconds: u64, step: u64) {
        self.settle();
        for _ in 0..seconds / step {
            self.now = self.now + Span::secs(step);
            self.settle();
        }
    }

    fn agents(&mut self) -> bool {
        let up: Vec<NodeId> = self.state.nodes.values().filter(|n| n.up).map(|n| n.id).collect();
        let mut any = false;
        for node in up {
            let allocs: Vec<Arc<Alloc>> = self.state.allocs_on(node).filter(|a| !a.has_ended()).cloned().collect();
            let statuses: Vec<AllocStatus> = allocs.iter().filter_map(|a| self.obey(a)).collect();
            if !statuses.is_empty() {
                any |= matches!(self.apply(Command::Report { node, statuses, gone: vec![] }), Applied::Done { .. });
            }
        }
        any
    }

    fn obey(&mut self, alloc: &Alloc) -> Option<AllocStatus> {
        let name = alloc.key.workload.to_string();
        let work = self.work.get(&name).cloned().unwrap_or_default();
        let began = *self.began.entry(alloc.id).or_insert(self.now);
        let spec = self.state.release(&alloc.key, alloc.release)?.spec.clone();
        let mut new = alloc.status.as_ref().map_or_else(|| AllocStatus::unknown(alloc.id), |s| AllocStatus::clone(s));
        if new.phase.is_terminal() {
            return None;
        }
        let is_job = spec.kind == Kind::Job;
        let end = began + spec.timeout.map_or(work.takes, |most| most.min(work.takes));
        if alloc.run && self.held.contains(&alloc.id) {
            return None;
        }
        if !alloc.run {
            (new.phase, new.ready, new.reason) = (Phase::Stopped, false, Some(Reason::StopRequested));
        } else if is_job && self.now >= end {
            let tries = self.tries.entry(name).or_default();
            let code = work.exits.get(*tries).or(work.exits.last()).copied().unwrap_or(0);
            *tries += 1;
            let exit = Exit { code: Some(code), signal: None, oom: None, at: self.now, ran_for: self.now.since(began) };
            let timed_out = spec.timeout.filter(|most| *most < work.takes);
            let good = code == 0 && timed_out.is_none();
            new.phase = if good { Phase::Stopped } else { Phase::Failed };
            new.reason = Some(timed_out.map_or(Reason::Exited { exit: exit.clone() }, |after| Reason::TimedOut { after }));
            (new.ready, new.last_exit) = (false, Some(exit));
        } else {
            let ready = is_job || work.ready_after.is_some_and(|after| self.now >= began + after);
            if new.phase == Phase::Running && new.ready == ready {
                return None;
            }
            (new.phase, new.ready, new.started_at) = (Phase::Running, ready, Some(began));
            new.reason = (!ready).then_some(Reason::Starting);
        }
        self.seq += 1;
        new.seq = self.seq;
        Some(new)
    }

    pub fn hold(&mut self, copies: &[AllocId]) {
        self.held.extend(copies);
    }

    pub fn work(&mut self, name: &str, work: Work) {
        self.work.insert(name.into(), work);
    }

    /// Copies that run on a node, ready or not.
    pub fn running(&self, name: &str, n: usize) -> usize {
        self.state.allocs_on(node(n)).filter(|a| a.key == key(name) && a.run && !a.phase().is_terminal()).count()
    }

    pub fn ready(&self, name: &str) -> usize {
        self.state.allocs_of(&key(name)).filter(|a| a.run && a.is_ready()).count()
    }

    pub fn runs(&self, name: &str) -> Vec<JobRun> {
        self.state.runs_of(&key(name)).map(|r| JobRun::clone(r)).collect()
    }

    pub fn phases(&self, name: &str) -> Vec<RunPhase> {
        self.runs(name).iter().map(|r| r.phase).collect()
    }

    /// Ends every test: the log replayed gives the same state.
    pub fn replays(&self) {
        let mut again = State::default();
        for (index, proposal) in &self.log {
            again.apply(*index, proposal.clone());
        }
        assert_eq!(again.digest(), self.state.digest());
        assert_eq!(State::from_bytes(&self.state.to_bytes()).unwrap(), self.state);
    }
}

pub fn node(n: usize) -> NodeId {
    NodeId(id(100 + n as u128))
}

pub fn daemon() -> WorkloadSpec {
    WorkloadSpec { kind: Kind::Daemon, copies: None, ..spec() }
}

pub fn job() -> WorkloadSpec {
    WorkloadSpec { kind: Kind::Job, copies: None, ports: vec![], runs: Some(Runs::of(None)), ..spec() }
}

pub fn cron(line: &str) -> WorkloadSpec {
    let schedule = Schedule::of(line);
    WorkloadSpec { runs: Some(Runs::of(Some(&schedule))), schedule: Some(schedule), ..job() }
}

pub fn service(copies: u32) -> WorkloadSpec {
    WorkloadSpec { copies: Some(copies), resources: Resources { cpu: Millicores(100), ..spec().resources }, ..spec() }
}

/// The same, as another release.
pub fn again(spec: WorkloadSpec, n: u32) -> WorkloadSpec {
    WorkloadSpec { run: Run::Argv(vec!["app".into(), n.to_string()]), ..spec }
}
