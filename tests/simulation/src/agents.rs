//! Simulated hosts: the agent's real decisions (its allocation machine and its diff of wanted and held) over processes
//! that are nothing but timers.
//!
//! As in the product today, an agent talks to the server that leads and is sent away by the others.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use optimus_agent::alloc::machine::{Action, Event as Happened, Machine, Now, Policy, State as CopyState};
use optimus_agent::alloc::status::describe;
use optimus_agent::manager::reconcile::{HeldState, Step, diff};
use optimus_common::env::Clock;
use optimus_common::protocol::{AllocStatus, DesiredAlloc, NodeFacts, Phase};
use optimus_common::reason::Exit;
use optimus_common::spec::Resources;
use optimus_common::{AllocId, Bytes, Millicores, NodeId, Reason, Span};
use optimus_control_plane::gateway::{GRACE, LEASE};
use optimus_core::reconciler::desired_for;
use optimus_core::state::{Applied, Command};
use tokio::time::sleep;

use crate::clock::SimClock;
use crate::entropy::Rng;
use crate::invariants::Event;
use crate::server::{Process, Server};
use crate::world::World;

/// How often a server looks for silent agents, as the gateway does.
const CHECK: Duration = Duration::from_millis(250);
/// Longest an agent waits for one answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// Asks a server's process something over the network. `None`: no answer came, whatever became of the question.
pub async fn ask<T, F>(world: &Arc<World>, server: &Arc<Server>, patience: Duration, question: impl FnOnce(Process) -> F) -> Option<T>
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let work = async {
        let (lost, delay) = world.net.roll();
        sleep(delay).await;
        if lost {
            std::future::pending::<()>().await;
        }
        let process = server.process()?;
        let hooks = process.hooks.clone();
        let (done, answer) = tokio::sync::oneshot::channel();
        let asked = question(process);
        optimus_control_plane::raft::runtime::spawn_in(hooks, async move {
            let _ = done.send(asked.await);
        });
        let answer = answer.await.ok()?;
        let (lost, delay) = world.net.roll();
        sleep(delay).await;
        if lost { std::future::pending().await } else { Some(answer) }
    };
    tokio::time::timeout(patience, work).await.ok().flatten()
}

/// Declares agents down that the leader has not heard, by the rule of the gateway.
pub async fn leases(world: Arc<World>, server: Arc<Server>, process: Process) {
    let clock = process.store.env.clock.clone();
    let mut last = clock.monotonic();
    let mut since: Option<Duration> = None;
    loop {
        clock.sleep(CHECK).await;
        let now = clock.monotonic();
        if now.saturating_sub(last) > LEASE {
            since = None;
        }
        last = now;
        if !process.store.status().is_leader {
            since = None;
            continue;
        }
        let since = *since.get_or_insert(now);
        let state = process.store.state();
        for node in state.nodes.values().filter(|n| n.up) {
            let silent = match world.last_heard(server.id, node.id) {
                Some(heard) if heard >= since => now.saturating_sub(heard) > LEASE,
                _ => now.saturating_sub(since) > GRACE,
            };
            if silent {
                world.count("node declared down");
                let _ = process.store.propose(Command::NodeDown { node: node.id }).await;
            }
        }
    }
}

/// One simulated machine with an agent.
pub struct Host {
    pub node: NodeId,
    pub name: String,
    clock: SimClock,
    inner: Mutex<Inner>,
}

struct Inner {
    rng: Rng,
    copies: BTreeMap<AllocId, Copy>,
    /// Generation of the desired set held.
    generation: u64,
    gone: Vec<AllocId>,
    cut_off: bool,
    /// Which server it tries next.
    server: usize,
}

struct Copy {
    machine: Machine,
    policy: Policy,
    ports: Vec<u16>,
    stopping: bool,
    attempt: u32,
    /// The attempt whose process runs.
    runs: Option<u32>,
    due: Vec<(Duration, Happened)>,
    /// The limits in force, and those that are wanted.
    limits: (Resources, Resources),
    status: AllocStatus,
    /// Sequence the control plane has.
    told: u64,
}

impl Host {
    pub fn new(world: &World, number: u64, rng: Rng) -> Arc<Self> {
        let clock = SimClock::new(world.start, number as i64 * 130 - 300, number as i64 * 2000 - 5000);
        let inner = Inner { rng, copies: BTreeMap::new(), generation: 0, gone: Vec::new(), cut_off: false, server: 0 };
        let node = NodeId(uuid::Uuid::from_u128(0x100 + u128::from(number)));
        Arc::new(Self { node, name: format!("host-{number}"), clock, inner: Mutex::new(inner) })
    }

    pub fn facts(&self) -> NodeFacts {
        NodeFacts {
            name: self.name.clone(),
            cpu: Millicores(4000),
            memory: Bytes(2 << 30),
            drivers: vec!["process".into()],
            ports: (20_000, 20_011), // few, so that they are given again soon
            address: "127.0.0.1".into(),
            ..NodeFacts::default()
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Cuts the agent off from all servers, or lets it back.
    pub fn cut_off(&self, cut: bool) {
        self.lock().cut_off = cut;
    }

    /// Processes that run, and whether everything the control plane should know it was told.
    pub fn running(&self) -> Vec<AllocId> {
        self.lock().copies.iter().filter(|(_, c)| c.runs.is_some()).map(|(id, _)| *id).collect()
    }

    fn time(&self) -> Now {
        Now { wall: self.clock.now(), mono: self.clock.monotonic() }
    }

    /// The machine loses power and is back at once: every process is gone, the agent starts what it should hold.
    pub fn power_cycle(&self, world: &World) {
        let now = self.time();
        let mut inner = self.lock();
        let Inner { copies, rng, .. } = &mut *inner;
        for (id, copy) in copies.iter_mut() {
            if copy.runs.take().is_some() {
                world.see(&Event::Process { node: self.node, alloc: *id, ports: &copy.ports, runs: false });
            }
            copy.due.clear();
            if copy.machine.is_final() {
                continue;
            }
            copy.machine = Machine::new(copy.policy.clone(), copy.machine.row());
            let event = if copy.stopping { Happened::StopRequested } else { Happened::Launch { attempt: copy.attempt + 1 } };
            copy.happen(event, now, rng, world.is_calm());
        }
    }

    /// Lets due things happen to every copy.
    fn turn(&self, world: &World) {
        let now = self.time();
        let mut inner = self.lock();
        let Inner { copies, rng, .. } = &mut *inner;
        let calm = world.is_calm();
        // Ends first: a process that ends in the same moment as another begins has left its port.
        for ends in [true, false] {
            for (id, copy) in copies.iter_mut() {
                let (due, later): (Vec<_>, Vec<_>) = std::mem::take(&mut copy.due)
                    .into_iter()
                    .partition(|(at, e)| *at <= now.mono && matches!(e, Happened::Ended { .. }) == ends);
                copy.due = later;
                for (_, event) in due {
                    match &event {
                        Happened::Ended { attempt, .. } if copy.runs != Some(*attempt) => continue,
                        Happened::Ended { .. } => {
                            copy.runs = None;
                            world.see(&Event::Process { node: self.node, alloc: *id, ports: &copy.ports, runs: false });
                        }
                        Happened::Started { attempt } if copy.machine.live() == Some(*attempt) && copy.runs.is_none() => {
                            copy.runs = Some(*attempt);
                            if copy.policy.run_once {
                                let code = i32::from(!calm && rng.chance(15.0));
                                let exit = Exit { code: Some(code), signal: None, oom: None, at: now.wall, ran_for: Span(10) };
                                let ended = Happened::Ended { attempt: *attempt, reason: Reason::Exited { exit }, jitter: 0.5 };
                                copy.due.push((now.mono + Duration::from_millis(rng.range(10..1500)), ended));
                            }
                            world.see(&Event::Process { node: self.node, alloc: *id, ports: &copy.ports, runs: true });
                        }
                        Happened::Started { .. } => continue,
                        _ => {}
                    }
                    copy.happen(event, now, rng, calm);
                }
                // A kernel that cannot give the limits now can later.
                if !ends && copy.limits.0 != copy.limits.1 && (calm || rng.chance(20.0)) {
                    copy.limits.0 = copy.limits.1;
                    copy.say_state(now);
                }
                if !ends && copy.machine.deadline().is_some_and(|at| at <= now.mono) {
                    copy.happen(Happened::Tick, now, rng, calm);
                }
            }
        }
    }

    /// Takes a desired set over, unless it is older than the one held.
    fn desire(&self, world: &World, generation: u64, allocs: &[DesiredAlloc]) {
        let now = self.time();
        let mut inner = self.lock();
        let Inner { copies, rng, generation: held, gone, .. } = &mut *inner;
        if generation < *held {
            world.count("older desired set refused");
            return;
        }
        *held = generation;
        let calm = world.is_calm();
        let wanted: BTreeMap<AllocId, bool> = allocs.iter().map(|a| (a.id, a.run)).collect();
        let states = copies.iter().map(|(id, c)| (*id, HeldState { stopping: c.stopping, ended: c.machine.is_final() })).collect();
        for alloc in allocs {
            let spec = copies.contains_key(&alloc.id).then(|| alloc.spec().ok()).flatten();
            if let (Some(copy), Some(spec)) = (copies.get_mut(&alloc.id), spec) {
                copy.limits.1 = spec.resources;
            }
        }
        for step in diff(&wanted, &states) {
            match step {
                Step::Take { alloc, run } => {
                    let Some(desired) = allocs.iter().find(|a| a.id == alloc) else { continue };
                    let Ok(spec) = desired.spec() else { continue };
                    let policy = Policy::of(&spec);
                    let mut copy = Copy {
                        machine: Machine::new(policy.clone(), 0),
                        policy,
                        ports: desired.ports.iter().map(|(_, port)| *port).collect(),
                        stopping: !run,
                        attempt: 0,
                        runs: None,
                        due: Vec::new(),
                        limits: (spec.resources, spec.resources),
                        status: AllocStatus::unknown(alloc),
                        told: 0,
                    };
                    copy.happen(if run { Happened::Launch { attempt: 1 } } else { Happened::StopRequested }, now, rng, calm);
                    copies.insert(alloc, copy);
                }
                Step::Stop(alloc) => {
                    if let Some(copy) = copies.get_mut(&alloc) {
                        copy.stopping = true;
                        copy.happen(Happened::StopRequested, now, rng, calm);
                    }
                }
                Step::Forget(alloc) => {
                    copies.remove(&alloc);
                    gone.push(alloc);
                }
            }
        }
    }

    fn news(&self) -> (Vec<AllocStatus>, Vec<AllocId>) {
        let inner = self.lock();
        (inner.copies.values().filter(|c| c.status.seq > c.told).map(|c| c.status.clone()).collect(), inner.gone.clone())
    }

    fn told(&self, statuses: &[AllocStatus], gone: &[AllocId]) {
        let mut inner = self.lock();
        for status in statuses {
            if let Some(copy) = inner.copies.get_mut(&status.id) {
                copy.told = copy.told.max(status.seq);
            }
        }
        inner.gone.retain(|id| !gone.contains(id));
    }

    /// The agent's life.
    pub async fn live(self: Arc<Self>, world: Arc<World>) {
        while !world.is_done() {
            let (pause, cut_off) = {
                let mut inner = self.lock();
                (Duration::from_millis(inner.rng.range(80..250)), inner.cut_off)
            };
            sleep(pause).await;
            self.turn(&world);
            if !cut_off {
                self.talk(&world).await;
            }
        }
    }

    /// One exchange with a server: its desired set one way, what is new the other.
    async fn talk(self: &Arc<Self>, world: &Arc<World>) {
        let servers = world.servers();
        let at = self.lock().server;
        let Some(server) = servers.get(at % servers.len().max(1)).cloned() else { return };
        let (host, seen) = (self.clone(), world.clone());
        let (statuses, gone) = self.news();
        let (report, ended) = (statuses.clone(), gone.clone());
        let id = server.id;
        let confused = !world.is_calm() && self.lock().rng.chance(0.5);
        let answer = ask(world, &server, PATIENCE, move |process| async move {
            let store = process.store;
            if !store.status().is_leader {
                return None;
            }
            seen.heard(id, host.node, store.env.clock.monotonic());
            let state = store.state();
            let known = state.nodes.get(&host.node)?;
            if !known.up {
                store.propose(Command::NodeUp { node: host.node, facts: host.facts() }).await.ok()?;
            }
            // A cloned or confused machine speaks of copies that are not its own.
            if let Some(other) = state.allocs.values().find(|a| a.node != host.node && !a.has_ended()).filter(|_| confused) {
                let seq = other.status.as_ref().map_or(1, |s| s.seq + 1);
                let foreign = AllocStatus { seq, phase: Phase::Failed, ..AllocStatus::unknown(other.id) };
                let _ = store.propose(Command::Report { node: host.node, statuses: vec![foreign], gone: vec![other.id] }).await;
            }
            let told = if report.is_empty() && ended.is_empty() {
                true
            } else {
                let done = store.propose(Command::Report { node: host.node, statuses: report, gone: ended }).await;
                matches!(done, Ok(applied) if !matches!(applied, Applied::Refused(_)))
            };
            let state = store.state();
            Some((told, state.index, desired_for(&state, host.node, &|_, _| None).unwrap_or_default()))
        })
        .await
        .flatten();
        match answer {
            Some((told, generation, allocs)) => {
                if told {
                    self.told(&statuses, &gone);
                }
                self.desire(world, generation, &allocs);
            }
            None => self.lock().server = at + 1,
        }
    }
}

impl Copy {
    /// Feeds an event to the real machine and lets the simulated host do what it says.
    fn happen(&mut self, event: Happened, now: Now, rng: &mut Rng, calm: bool) {
        // An event of a run that the machine has given up does not fit; the agent's worker drops it as well.
        let Ok(actions) = self.machine.on(event, now) else { return };
        for action in actions {
            let jitter = 0.5;
            let exit = |code| Exit { code: Some(code), signal: None, oom: None, at: now.wall, ran_for: Span(10) };
            let after = |ms| now.mono + Duration::from_millis(ms);
            match action {
                Action::Start { attempt } => {
                    self.attempt = attempt;
                    let up = after(rng.range(20..400));
                    if !calm && rng.chance(4.0) {
                        let reason = Reason::StartFailed { step: "start the process".into(), error: "simulated".into() };
                        self.due.push((up, Happened::StartFailed { attempt, reason, elsewhere: rng.chance(50.0), jitter }));
                    } else {
                        self.due.push((up, Happened::Started { attempt }));
                        if !calm && rng.chance(8.0) {
                            let end = up + Duration::from_millis(rng.range(10..8000));
                            self.due.push((end, Happened::Ended { attempt, reason: Reason::Exited { exit: exit(1) }, jitter }));
                        }
                    }
                }
                Action::Stop { attempt } => {
                    let took = after(rng.range(5..600));
                    self.due.push((took, Happened::Ended { attempt, reason: Reason::Exited { exit: exit(0) }, jitter }));
                }
                Action::Kill { attempt } => {
                    self.due.push((after(5), Happened::Ended { attempt, reason: Reason::Exited { exit: exit(0) }, jitter }));
                }
            }
        }
        self.say_state(now);
    }

    /// Takes what is new into the status that the control plane is told.
    fn say_state(&mut self, now: Now) {
        let (phase, reason) = describe(self.machine.state(), None);
        let ready = matches!(self.machine.state(), CopyState::Running { .. });
        let restarts = self.attempt.saturating_sub(1);
        let limits = Some(self.limits.0);
        let said = (self.status.phase, self.status.ready, self.status.restarts, self.status.limits);
        if said != (phase, ready, restarts, limits) || self.status.seq == 0 {
            self.status.seq += 1;
            self.status.limits = limits;
            self.status.started_at = if phase == Phase::Running { self.status.started_at.or(Some(now.wall)) } else { None };
            (self.status.phase, self.status.ready, self.status.reason, self.status.restarts) = (phase, ready, reason, restarts);
        }
    }
}
