//! One simulated world: servers, network, hosts and clients under one virtual clock, and everything seen of them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use optimus_common::NodeId;
use tokio::time::Instant;

use crate::agents::Host;
use crate::entropy::Rng;
use crate::history::Op;
use crate::invariants::{Checks, Event};
use crate::net::Net;
use crate::server::Server;
use crate::trace::Trace;

/// The numbers of the generators of each part of a run.
pub mod part {
    pub const WORLD: u64 = 1;
    pub const NET: u64 = 2;
    pub const FAULTS: u64 = 3;
    pub const CLIENTS: u64 = 1000;
    pub const HOSTS: u64 = 2000;
    pub const SERVERS: u64 = 3000;
    pub const READERS: u64 = 4000;
    pub const ROUTER: u64 = 5000;
}

/// Everything of one run.
pub struct World {
    pub seed: u64,
    pub start: Instant,
    pub trace: Trace,
    pub net: Net,
    checks: Mutex<Checks>,
    servers: Mutex<BTreeMap<u64, Arc<Server>>>,
    hosts: Mutex<Vec<Arc<Host>>>,
    faults: Mutex<BTreeMap<&'static str, u64>>,
    history: Mutex<Vec<Op>>,
    heard: Mutex<BTreeMap<(u64, NodeId), Duration>>,
    calm: AtomicBool,
    done: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    pub fn new(seed: u64, print: bool) -> Arc<Self> {
        Arc::new_cyclic(|world: &Weak<World>| Self {
            seed,
            start: Instant::now(),
            trace: Trace::new(print),
            net: Net::new(world.clone(), Rng::new(seed, part::NET)),
            checks: Mutex::default(),
            servers: Mutex::default(),
            hosts: Mutex::default(),
            faults: Mutex::default(),
            history: Mutex::default(),
            heard: Mutex::default(),
            calm: AtomicBool::new(false),
            done: AtomicBool::new(false),
        })
    }

    /// Virtual microseconds since the start.
    pub fn now(&self) -> u64 {
        self.start.elapsed().as_micros() as u64
    }

    /// Adds a line to the trace.
    pub fn say(&self, line: impl AsRef<str>) {
        self.trace.line(format!("{:>9} {}", self.now(), line.as_ref()));
    }

    /// Shows an event to all invariants.
    pub fn see(&self, event: &Event<'_>) {
        let found = lock(&self.checks).see(event);
        for violation in found {
            self.say(format!("VIOLATION {violation}"));
        }
    }

    /// Looks into what the invariants know.
    pub fn checks<T>(&self, look: impl FnOnce(&mut Checks) -> T) -> T {
        look(&mut lock(&self.checks))
    }

    /// Counts an injected fault and tells of it.
    pub fn fault(&self, kind: &'static str, what: impl AsRef<str>) {
        *lock(&self.faults).entry(kind).or_default() += 1;
        self.say(format!("FAULT {kind} {}", what.as_ref()));
    }

    /// Counts what is too frequent to tell.
    pub fn count(&self, kind: &'static str) {
        *lock(&self.faults).entry(kind).or_default() += 1;
    }

    pub fn faults(&self) -> BTreeMap<&'static str, u64> {
        lock(&self.faults).clone()
    }

    /// After the heal nothing is injected any more.
    pub fn is_calm(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }

    pub fn set_calm(&self) {
        self.calm.store(true, Ordering::Relaxed);
    }

    /// The run is over; whoever looks ends.
    pub fn is_done(&self) -> bool {
        self.done.load(Ordering::Relaxed)
    }

    pub fn set_done(&self) {
        self.done.store(true, Ordering::Relaxed);
    }

    pub fn add_server(&self, server: Arc<Server>) {
        lock(&self.servers).insert(server.id, server);
    }

    /// All servers that were not retired.
    pub fn servers(&self) -> Vec<Arc<Server>> {
        lock(&self.servers).values().filter(|s| !s.is_retired()).cloned().collect()
    }

    pub fn server(&self, id: u64) -> Option<Arc<Server>> {
        lock(&self.servers).get(&id).cloned()
    }

    /// An id no server ever had.
    pub fn next_server_id(&self) -> u64 {
        lock(&self.servers).keys().next_back().map_or(1, |id| id + 1)
    }

    pub fn add_host(&self, host: Arc<Host>) {
        lock(&self.hosts).push(host);
    }

    pub fn hosts(&self) -> Vec<Arc<Host>> {
        lock(&self.hosts).clone()
    }

    /// A server has heard an agent.
    pub fn heard(&self, server: u64, node: NodeId, at: Duration) {
        lock(&self.heard).insert((server, node), at);
    }

    /// When a server last heard an agent, by its own monotonic clock.
    pub fn last_heard(&self, server: u64, node: NodeId) -> Option<Duration> {
        lock(&self.heard).get(&(server, node)).copied()
    }

    /// What a server knew of agents dies with its process.
    pub fn forget_heard(&self, server: u64) {
        lock(&self.heard).retain(|(by, _), _| *by != server);
    }

    pub fn record(&self, op: Op) {
        lock(&self.history).push(op);
    }

    pub fn history(&self) -> Vec<Op> {
        lock(&self.history).clone()
    }
}
