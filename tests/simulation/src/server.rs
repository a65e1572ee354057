//! One server of the control plane, as a process that starts, is paused, and dies: the real Raft node, the real leader
//! loop and the real store over a simulated disk, clock and network.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use optimus_common::disk::Disk;
use optimus_common::disk::sim::{Crash, MemDisk};
use optimus_common::env::{Clock, Env, Spawn};
use optimus_control_plane::consensus::{CoreMachine, Observer, RaftConsensus};
use optimus_control_plane::leader;
use optimus_control_plane::raft::runtime::{Hooks, Stored, spawn_in};
use optimus_control_plane::raft::{IoMode, RaftConfig, RaftNode, Tuning};
use optimus_control_plane::store::Store;
use optimus_core::state::{Applied, Proposal, State};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;

use crate::agents;
use crate::clock::{SimClock, SimEntropy};
use crate::disk::SimDisk;
use crate::entropy::Rng;
use crate::invariants::Event;
use crate::world::{World, part};

/// Tasks of one server alive at once.
const TASKS_MAX: u64 = 2000;

/// The timers of all simulated servers: short, so that a run holds many elections and snapshots.
pub fn tuning() -> Tuning {
    Tuning {
        heartbeat: Duration::from_millis(100),
        election_min: Duration::from_millis(400),
        election_max: Duration::from_millis(800),
        snapshot_every: 40,
        keep_logs: 5,
        patience: Duration::from_secs(2),
        io: IoMode::Inline,
        ..Tuning::default()
    }
}

/// A server, up or down. Its disk and clock outlive its process.
pub struct Server {
    pub id: u64,
    pub disk: MemDisk,
    pub clock: SimClock,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    life: u64,
    hooks: Option<Arc<NodeHooks>>,
    process: Option<Process>,
    /// A fault is armed that may end this life, or keep the next from starting.
    excused: bool,
    refused: bool,
    retired: bool,
}

/// A running server process.
#[derive(Clone)]
pub struct Process {
    pub node: RaftNode<CoreMachine>,
    pub store: Store,
    pub hooks: Arc<NodeHooks>,
}

impl Server {
    pub fn new(world: &World, id: u64, offset_ms: i64, drift_ppm: i64) -> Arc<Self> {
        let clock = SimClock::new(world.start, offset_ms, drift_ppm);
        Arc::new(Self { id, disk: MemDisk::new(), clock, inner: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The process, when it runs.
    pub fn process(&self) -> Option<Process> {
        self.lock().process.clone()
    }

    /// Whether a process exists, also one that is still starting.
    pub fn is_up(&self) -> bool {
        self.lock().hooks.is_some()
    }

    pub fn hooks(&self) -> Option<Arc<NodeHooks>> {
        self.lock().hooks.clone()
    }

    /// Never started again: it was replaced.
    pub fn retire(&self) {
        self.lock().retired = true;
    }

    pub fn is_retired(&self) -> bool {
        self.lock().retired
    }

    /// Its disk is damaged and it said so.
    pub fn is_refused(&self) -> bool {
        self.lock().refused
    }

    /// From now on until its next crash it may fail to start, or end.
    pub fn excuse(&self) {
        self.lock().excused = true;
    }

    /// Starts a process; returns at once.
    pub fn start(self: &Arc<Self>, world: &Arc<World>) {
        let hooks = {
            let mut inner = self.lock();
            if inner.hooks.is_some() || inner.retired {
                return;
            }
            inner.life += 1;
            let rng = Rng::new(world.seed, part::SERVERS + self.id * 10_000 + inner.life);
            let hooks = NodeHooks::new(world, self, inner.life, rng);
            inner.hooks = Some(hooks.clone());
            hooks
        };
        world.say(format!("s{} starts", self.id));
        world.see(&Event::Starts { server: self.id });
        let (server, world) = (self.clone(), world.clone());
        let (told, started) = oneshot::channel();
        let inside = (self.clone(), world.clone(), hooks.clone());
        spawn_in(hooks.clone(), async move {
            let (server, world, hooks) = inside;
            let _ = told.send(server.boot(&world, hooks).await);
        });
        tokio::spawn(async move {
            // An error: it crashed while it started. It may have said so before its task was gone.
            let Ok(result) = started.await else { return };
            if hooks.dead.load(Ordering::Relaxed) {
                return;
            }
            if let Err(reason) = result {
                let expected = server.lock().excused;
                world.say(format!("s{} refuses to start: {reason}", server.id));
                world.see(&Event::Refused { server: server.id, reason: &reason, expected });
                let damaged = world.checks(|c| c.model.server(server.id).damaged);
                server.lock().refused = damaged;
                hooks.end(&world, Crash::KeepAll, "refused to start");
            }
        });
    }

    /// What a server does from its start on; the order of `server.rs` of the control plane, without its sockets.
    async fn boot(self: &Arc<Self>, world: &Arc<World>, hooks: Arc<NodeHooks>) -> Result<(), String> {
        let env = Env {
            clock: Arc::new(self.clock.clone()),
            entropy: Arc::new(SimEntropy::new(hooks.rng_for_env())),
            spawn: Arc::new(InScope(hooks.clone())),
        };
        let seen: Arc<dyn Observer> = Arc::new(Seen { world: Arc::downgrade(world), server: self.id, state: Mutex::default() });
        let (machine, finish) = RaftConsensus::machine_seen_by(Some(seen));
        let config =
            RaftConfig { node_id: self.id, disk: hooks.disk(self), machine, tuning: tuning(), network: world.net.transport(self.id) };
        let node = RaftNode::start(config).await.map_err(|e| format!("{:#}", anyhow::Error::new(e)))?;
        let store = Store::new(Arc::new(finish(node.clone())), env);
        world.net.connect(node.clone(), hooks.clone());
        let process = Process { node: node.clone(), store: store.clone(), hooks: hooks.clone() };
        self.lock().process = Some(process.clone());
        world.say(format!("s{} is up", self.id));
        // The node never drops this token: a simulated server ends by dying.
        spawn_in(hooks.clone(), leader::run(store, CancellationToken::new()));
        spawn_in(hooks.clone(), agents::leases(world.clone(), self.clone(), process));
        spawn_in(hooks.clone(), watch_leadership(world.clone(), node.clone()));
        let (world, hooks) = (world.clone(), hooks.clone());
        let fatal = node.clone();
        spawn_in(hooks.clone(), async move {
            let reason = fatal.fatal().await;
            world.say(format!("s{} must stop: {reason}", fatal.id()));
            world.fatal(fatal.id(), &reason);
            // After a failed flush the kernel may have dropped any of the pages.
            let seed = world.now();
            hooks.end(&world, Crash::Scattered { seed }, "exits");
        });
        Ok(())
    }
}

impl World {
    /// A server said that it must stop: fine when its disk was made to fail, else a violation.
    fn fatal(&self, server: u64, reason: &str) {
        let excused = self.server(server).is_some_and(|s| s.lock().excused);
        let damaged = self.checks(|c| c.model.server(server).damaged);
        if !excused && !damaged {
            self.say(format!("VIOLATION s{server} failed: {reason}"));
            self.checks(|c| c.add(format!("fatal: server {server} failed without a fault of its disk: {reason}")));
        }
    }
}

async fn watch_leadership(world: Arc<World>, node: RaftNode<CoreMachine>) {
    let mut leads = node.is_leader();
    loop {
        let now = *leads.borrow_and_update();
        if now {
            let term = node.status().term;
            world.say(format!("s{} leads term {term}", node.id()));
            world.see(&Event::Leads { server: node.id(), term });
        } else {
            world.see(&Event::Follows { server: node.id() });
        }
        if leads.changed().await.is_err() {
            return;
        }
    }
}

/// Spawns a server's tasks so that they die with it.
struct InScope(Arc<NodeHooks>);

impl Spawn for InScope {
    fn spawn(&self, _name: &'static str, task: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>) {
        spawn_in(self.0.clone(), task);
    }
}

/// Shows what a server applies to the invariants.
struct Seen {
    world: Weak<World>,
    server: u64,
    /// The state before the next proposal, with its index and how many were applied there.
    state: Mutex<(State, u64, usize)>,
}

impl Observer for Seen {
    fn applied(&self, index: u64, proposal: &Proposal, answer: &Applied, after: &State) {
        let Some(world) = self.world.upgrade() else { return };
        let mut held = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let n = if held.1 == index { held.2 } else { 0 };
        let kind = format!("{:?}", proposal.command);
        let kind = kind.split([' ', '{', '(']).next().unwrap_or_default();
        let answer = format!("{answer:?}");
        let answer = answer.split([' ', '{', '(']).next().unwrap_or_default();
        world.say(format!("s{} applies {index}.{n} {kind}: {answer}", self.server));
        world.see(&Event::Applied { server: self.server, index, n, proposal, before: &held.0, after });
        *held = (after.clone(), index, n + 1);
    }

    fn restored(&self, state: &State) {
        let Some(world) = self.world.upgrade() else { return };
        world.say(format!("s{} restores {}", self.server, state.index));
        world.see(&Event::Restored { server: self.server, state });
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = (state.clone(), 0, 0);
    }
}

/// The simulator's hold on one life of one server.
pub struct NodeHooks {
    world: Weak<World>,
    server: Weak<Server>,
    id: u64,
    pub life: u64,
    dead: Arc<AtomicBool>,
    state: Mutex<HookState>,
}

struct HookState {
    rng: Rng,
    tasks: Vec<AbortHandle>,
    paused: bool,
    waiting: Vec<Waker>,
    /// Steps of tasks left until the power fails, and what is left of the disk then.
    crash_after: Option<(u64, Crash)>,
    /// What is left of the disk when its armed power cut strikes.
    on_power_loss: Crash,
}

impl fmt::Debug for NodeHooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeHooks({}, life {})", self.id, self.life)
    }
}

impl NodeHooks {
    fn new(world: &Arc<World>, server: &Arc<Server>, life: u64, rng: Rng) -> Arc<Self> {
        let state =
            HookState { rng, tasks: Vec::new(), paused: false, waiting: Vec::new(), crash_after: None, on_power_loss: Crash::LoseAll };
        Arc::new(Self {
            world: Arc::downgrade(world),
            server: Arc::downgrade(server),
            id: server.id,
            life,
            dead: Arc::new(AtomicBool::new(false)),
            state: Mutex::new(state),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HookState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rng_for_env(&self) -> Rng {
        let seed = self.lock().rng.u64();
        Rng::new(seed, self.id)
    }

    fn disk(self: &Arc<Self>, server: &Server) -> Arc<dyn Disk> {
        let hooks = self.clone();
        let on_power_loss = Arc::new(move || {
            if let Some(world) = hooks.world.upgrade() {
                let how = hooks.lock().on_power_loss;
                hooks.end(&world, how, "loses power in the middle of a write");
            }
        });
        Arc::new(SimDisk::new(server.disk.clone(), self.dead.clone(), on_power_loss))
    }

    /// Ends this life: no task of it takes another step, and of its disk's unsynced writes only what `how` says is left.
    pub fn end(self: &Arc<Self>, world: &Arc<World>, how: Crash, why: &str) {
        if self.dead.swap(true, Ordering::Relaxed) {
            return;
        }
        let Some(server) = self.server.upgrade() else { return };
        let pending = server.disk.pending();
        server.disk.crash(how);
        let (tasks, waiting) = {
            let mut state = self.lock();
            (std::mem::take(&mut state.tasks), std::mem::take(&mut state.waiting))
        };
        for task in tasks {
            task.abort();
        }
        waiting.into_iter().for_each(Waker::wake);
        world.net.disconnect(self.id);
        world.forget_heard(self.id);
        {
            let mut inner = server.lock();
            (inner.hooks, inner.process, inner.excused) = (None, None, false);
        }
        world.say(format!("s{} {why} ({pending} writes unsynced, {how:?})", self.id));
        world.see(&Event::Ended { server: self.id });
    }

    /// Lets the power fail after so many more steps of its tasks.
    pub fn crash_after(&self, steps: u64, how: Crash) {
        self.lock().crash_after = Some((steps, how));
    }

    /// What is left when [`MemDisk::power_off_after`] strikes.
    pub fn on_power_loss(&self, how: Crash) {
        self.lock().on_power_loss = how;
    }

    /// Stops all tasks from taking steps, or lets them.
    pub fn pause(&self, paused: bool) {
        let waiting = {
            let mut state = self.lock();
            state.paused = paused;
            if paused { Vec::new() } else { std::mem::take(&mut state.waiting) }
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

impl Hooks for NodeHooks {
    fn random(&self) -> u64 {
        self.lock().rng.u64()
    }

    fn spawned(&self, task: AbortHandle) {
        if self.dead.load(Ordering::Relaxed) {
            task.abort();
            return;
        }
        let size = {
            let mut state = self.lock();
            state.tasks.push(task);
            if !state.tasks.len().is_multiple_of(64) {
                return;
            }
            state.tasks.retain(|t| !t.is_finished());
            state.tasks.len() as u64
        };
        if let Some(world) = self.world.upgrade() {
            world.see(&Event::Size { what: "tasks", server: self.id, size, bound: TASKS_MAX });
        }
    }

    fn may_run(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.dead.load(Ordering::Relaxed) {
            return Poll::Pending; // aborted; the runtime is about to drop it
        }
        let struck = {
            let mut state = self.lock();
            if state.paused {
                state.waiting.push(cx.waker().clone());
                return Poll::Pending;
            }
            match &mut state.crash_after {
                Some((0, how)) => Some(*how),
                Some((left, _)) => {
                    *left -= 1;
                    None
                }
                None => None,
            }
        };
        let Some(how) = struck else { return Poll::Ready(()) };
        if let (Some(world), Some(server)) = (self.world.upgrade(), self.server.upgrade())
            && let Some(hooks) = server.hooks().filter(|h| h.life == self.life)
        {
            hooks.end(&world, how, "loses power between two steps");
        }
        Poll::Pending
    }

    fn disk_delay(&self) -> Duration {
        let Some(world) = self.world.upgrade() else { return Duration::ZERO };
        let mut state = self.lock();
        let slow = !world.is_calm() && state.rng.chance(2.0);
        Duration::from_micros(if slow { state.rng.range(20_000..200_000) } else { state.rng.range(200..3_000) })
    }

    fn stored(&self, what: Stored) {
        let Some(world) = self.world.upgrade() else { return };
        if self.dead.load(Ordering::Relaxed) {
            return;
        }
        world.say(format!("s{} {}", self.id, brief(&what)));
        world.see(&Event::Stored { server: self.id, what: &what });
    }
}

fn brief(what: &Stored) -> String {
    match what {
        Stored::Opened { vote, purged, entries, committed, snapshot } => format!(
            "opened: vote {vote:?}, purged {:?}, entries {:?}..{:?}, committed {:?}, snapshot {:?}",
            purged.as_ref().map(|p| p.index),
            entries.first().map(|e| e.index),
            entries.last().map(|e| (e.index, e.leader)),
            committed.as_ref().map(|c| c.index),
            snapshot.as_ref().map(|s| s.index)
        ),
        Stored::Vote(term, of, granted) => format!("vote T{term}-N{of} {granted}"),
        Stored::Appended(entries) => format!("appended {:?}", entries.iter().map(|e| (e.index, e.leader)).collect::<Vec<_>>()),
        Stored::Truncating(from) => format!("truncates from {from}"),
        Stored::Purging(upto) => format!("purges to {}", upto.index),
        Stored::Committed(upto) => format!("committed {}", upto.index),
        Stored::Snapshot { last, installed } => format!("snapshot {} {}", last.index, if *installed { "installed" } else { "built" }),
    }
}

/// The clock of a server as the trait says it.
pub fn monotonic(server: &Server) -> Duration {
    server.clock.monotonic()
}
