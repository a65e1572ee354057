//! One run: found a cluster, let things go wrong, heal, and see that all settles.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use optimus_common::join_token::Role;
use optimus_common::{ClusterId, NodeId, Timestamp, TokenId, WorkloadKey};
use optimus_core::state::{Alloc, Applied, Command, LEVEL, ServerFacts, State, Workload};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};

use crate::agents::{Host, ask};
use crate::client::{Client, follow};
use crate::entropy::{Rng, seed_process};
use crate::faults::{Nemesis, leader, retire};
use crate::invariants::{End, Event};
use crate::operator::route;
use crate::server::Server;
use crate::world::{World, part};

/// How long things go wrong, in virtual time.
const FAULTS_FOR: Duration = Duration::from_secs(25);
/// How long the healed cluster may take to accept a write.
const WRITABLE_WITHIN: Duration = Duration::from_secs(20);
/// How long it may take until everything runs as it should: a rollout that was disturbed has to fail by its deadline first.
const SETTLED_WITHIN: Duration = Duration::from_secs(90);
const CLIENTS: u64 = 4;
const READERS: u64 = 2;

/// What a run came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    pub seed: u64,
    /// Of every line of the trace: equal for equal runs.
    pub hash: String,
    pub events: u64,
    pub virtual_ms: u64,
    /// Recorded operations of clients.
    pub operations: usize,
    /// Faults by kind.
    pub faults: BTreeMap<String, u64>,
    pub violations: Vec<String>,
    /// The last lines of the trace.
    pub tail: Vec<String>,
}

impl Outcome {
    /// How to see this run again.
    pub fn replay(&self, planted: Option<&str>) -> String {
        let planted = planted.map(|name| format!(" --planted {name}")).unwrap_or_default();
        format!("simulate seed {}{planted} --trace", self.seed)
    }
}

static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// A panic anywhere is a violation, but for those of the storage engine on a damaged page, which the store turns into a
/// refusal.
fn watch_panics() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(|l| format!("{}:{}", l.file(), l.line())).unwrap_or_default();
        if !place.contains("/redb-") {
            let text = info.to_string().replace('\n', " ");
            PANICS.lock().unwrap_or_else(PoisonError::into_inner).push(format!("panic: {text}"));
        }
    }));
}

/// Runs a seed in this process. Call it once: a process runs one seed.
///
/// # Errors
/// When the runtime cannot be made.
pub fn run(seed: u64, print: bool) -> std::io::Result<Outcome> {
    seed_process(seed);
    watch_panics();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
    Ok(runtime.block_on(whole(seed, print)))
}

async fn whole(seed: u64, print: bool) -> Outcome {
    let world = World::new(seed, print);
    let mut rng = Rng::new(seed, part::WORLD);
    if let Err(what) = story(&world, &mut rng).await {
        world.say(format!("VIOLATION {what}"));
        world.checks(|c| c.add(what));
    }
    world.set_done();
    for panic in PANICS.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        world.checks(|c| c.add(panic));
    }
    let faults: BTreeMap<String, u64> = world.faults().into_iter().map(|(kind, n)| (kind.to_owned(), n)).collect();
    let mut violations = world.checks(|c| c.violations().to_vec());
    if faults.values().sum::<u64>() == 0 {
        violations.push("no fault was injected, so the run says nothing".to_owned());
    }
    let (hash, events) = world.trace.summary();
    let virtual_ms = world.now() / 1000;
    let operations = world.history().len();
    Outcome { seed, hash: format!("{hash:016x}"), events, virtual_ms, operations, faults, violations, tail: world.trace.tail() }
}

async fn story(world: &Arc<World>, rng: &mut Rng) -> Result<(), String> {
    found(world, rng).await?;
    let mut tasks = Vec::new();
    for number in 1..=CLIENTS {
        let client = Client { world: world.clone(), rng: Rng::new(world.seed, part::CLIENTS + number), number, written: 0 };
        tasks.push(tokio::spawn(client.live()));
    }
    for number in 1..=READERS {
        tokio::spawn(follow(world.clone(), number, Rng::new(world.seed, part::READERS + number)));
    }
    tokio::spawn(route(world.clone(), Rng::new(world.seed, part::ROUTER)));
    let nemesis = Nemesis { world: world.clone(), rng: Rng::new(world.seed, part::FAULTS), damaged: false, unresolved: false };
    nemesis.run(Instant::now() + FAULTS_FOR).await;
    heal(world);
    let orderly = Client { world: world.clone(), rng: Rng::new(world.seed, part::CLIENTS + CLIENTS + 1), number: CLIENTS + 1, written: 0 };
    tokio::spawn(orderly.tidy_up());
    for task in tasks {
        let _ = task.await; // a panic in a client is told by the hook
    }
    let end = settle(world).await;
    world.see(&Event::End(&end));
    Ok(())
}

/// A cluster with its hosts and first workloads.
async fn found(world: &Arc<World>, rng: &mut Rng) -> Result<(), String> {
    let count = *rng.pick(&[1, 3, 3, 3, 5]).unwrap_or(&3);
    for id in 1..=count {
        let server = Server::new(world, id, rng.range(0..400) as i64 - 200, rng.range(0..20_000) as i64 - 10_000);
        world.add_server(server.clone());
        server.start(world);
    }
    let members: BTreeMap<u64, String> = (1..=count).map(|id| (id, format!("s{id}:1"))).collect();
    let founded = patiently(Duration::from_secs(30), async || {
        let process = world.servers().first()?.process()?;
        process.node.initialize(members.clone()).await.ok()?;
        leader(world)
    });
    founded.await.ok_or("no cluster was founded")?;

    let mut client = Client { world: world.clone(), rng: Rng::new(world.seed, part::CLIENTS), number: 0, written: 0 };
    let patience = Duration::from_secs(30);
    let id = |n: u128| uuid::Uuid::from_u128(n);
    let forever = Timestamp(u64::MAX / 2);
    let text = || "s1".to_owned();
    let facts = ServerFacts { name: text(), address: text(), api: text(), version: text(), level: LEVEL };
    let mut commands = vec![
        Command::CreateCluster { id: ClusterId(id(1)), ca_certificate: vec![], ca_key_sealed: vec![] },
        Command::AdmitServer { token: None, server: facts, key_fingerprint: vec![] },
        Command::RaiseVersion { to: LEVEL },
        Command::CreateToken { id: TokenId(id(2)), secret_hash: vec![], expires_at: forever, uses: 100, role: Role::Agent },
    ];
    for number in 0..rng.range(2..7) {
        let host = Host::new(world, number, Rng::new(world.seed, part::HOSTS + number));
        commands.push(Command::AdmitNode {
            token: TokenId(id(2)),
            node: host.node,
            name: host.name.clone(),
            key_fingerprint: vec![],
            certificate_expires_at: forever,
        });
        world.add_host(host);
    }
    for command in commands {
        let answer = client.send(command, patience).await.ok_or("the cluster could not be set up")?;
        if let Applied::Refused(refusal) = answer {
            return Err(format!("the set-up was refused: {refusal}"));
        }
    }
    for host in world.hosts() {
        tokio::spawn(host.live(world.clone()));
    }
    client.found(patience).await?;
    client.found_steered(patience).await
}

/// Ends every fault; what is down starts.
fn heal(world: &Arc<World>) {
    world.set_calm();
    world.net.calm();
    world.say("healed");
    for server in world.servers() {
        server.disk.set_capacity(None);
        server.clock.set_right(0);
        if let Some(hooks) = server.hooks() {
            hooks.pause(false);
        }
        if !server.is_refused() {
            server.start(world);
        }
    }
    for host in world.hosts() {
        host.cut_off(false);
    }
}

/// Waits until everything is as it should be, and tells what is not.
async fn settle(world: &Arc<World>) -> End {
    let mut end = End::default();
    let written = patiently(WRITABLE_WITHIN, async || {
        // Late faults may still strike.
        world.servers().iter().filter(|s| !s.is_refused()).for_each(|s| s.start(world));
        let (leader, voters) = leader(world)?;
        ask(world, &leader, Duration::from_secs(3), |p| async move { p.store.read().await.is_ok() }).await.filter(|ok| *ok)?;
        members(world, &leader, voters).await
    });
    end.writable = written.await.is_some();
    let settled = patiently(SETTLED_WITHIN, async || {
        world.servers().iter().filter(|s| !s.is_refused()).for_each(|s| s.start(world));
        let what = unsettled(world);
        let calm = what.is_none();
        end.unsettled = what;
        calm.then_some(())
    });
    settled.await;
    for server in world.servers() {
        if let Some(process) = server.process() {
            end.states.insert(server.id, process.store.state());
        }
        let files = optimus_common::disk::Disk::list(&server.disk).map_or(0, |names| names.len() as u64);
        world.see(&Event::Size { what: "files", server: server.id, size: files, bound: 6 });
        let known = world.checks(|c| c.model.server(server.id).log.len() as u64);
        world.see(&Event::Size { what: "log entries", server: server.id, size: known, bound: 200 });
    }
    end.processes = world.hosts().iter().flat_map(|h| h.running().into_iter().map(|id| (h.node, id)).collect::<Vec<_>>()).collect();
    end.history = world.history();
    end
}

/// Brings the membership to rest: no change half done, no refused server in it, strangers retired.
async fn members(world: &Arc<World>, leader: &Arc<Server>, voters: BTreeSet<u64>) -> Option<()> {
    let refused: BTreeSet<u64> = world.servers().iter().filter(|s| s.is_refused()).map(|s| s.id).collect();
    let next: BTreeSet<u64> = voters.difference(&refused).copied().collect();
    let changed = ask(world, leader, Duration::from_secs(3), |p| async move {
        p.node.change_voters(next).await.ok()?;
        Some(p.node.status().members)
    });
    let members = changed.await.flatten()?;
    for server in world.servers().iter().filter(|s| !members.contains_key(&s.id)) {
        retire(world, server);
    }
    Some(())
}

/// The first thing that is not as it should be.
fn unsettled(world: &Arc<World>) -> Option<String> {
    let mut states: Vec<(u64, State)> = Vec::new();
    for server in world.servers() {
        match server.process() {
            Some(process) => states.push((server.id, process.store.state())),
            None => return Some(format!("server {} is down", server.id)),
        }
    }
    let (first, state) = states.first()?.clone();
    if let Some((other, its)) = states.iter().find(|(_, s)| *s != state) {
        return Some(format!("server {first} is at {}, server {other} at {}", state.index, its.index));
    }
    if let Some(deployment) = state.deployments.values().find(|d| !d.phase.is_final()) {
        let now = crate::clock::wall(world);
        let why = state.workload(&deployment.key).map(|w| optimus_core::view::explain_workload(&state, w, now));
        let why = why.map(|w| format!("{}; {:?}; failures {:?}", w.summary, w.evidence, state.failures)).unwrap_or_default();
        return Some(format!("deployment of {} release {} is {:?}: {why}", deployment.key, deployment.release, deployment.phase));
    }
    if let Some(run) = state.runs.values().find(|run| !run.phase.is_final()) {
        return Some(format!("run {} of {} is {:?}: {:?}", run.number, run.job, run.phase, copies_of(&state, &run.job)));
    }
    for workload in state.workloads.values().filter(|w| !is_shut(&state, w)) {
        let seen = optimus_core::view::workload(&state, workload, crate::clock::wall(world));
        // Beyond the wanted number nothing is left either.
        let (wanted, ready) = (seen.copies_wanted, state.allocs_of(&workload.key).filter(|a| a.run && a.is_ready()).count() as u32);
        if (seen.copies_ready, ready) != (wanted, wanted) {
            let copies = copies_of(&state, &workload.key);
            let explained = optimus_core::view::explain_workload(&state, workload, crate::clock::wall(world)).summary;
            return Some(format!("{} has {ready} of {wanted} copies ready: {explained}; {copies:?}", workload.key));
        }
    }
    let wanted: BTreeSet<(NodeId, _)> = state.allocs.values().filter(|a| a.run).map(|a| (a.node, a.id)).collect();
    let running: BTreeSet<(NodeId, _)> =
        world.hosts().iter().flat_map(|h| h.running().into_iter().map(|id| (h.node, id)).collect::<Vec<_>>()).collect();
    wanted.symmetric_difference(&running).next().map(|(node, id)| {
        let row = state.allocs.get(id);
        let what = row.map_or_else(|| "no copy of the state".to_owned(), |a| format!("{} of release {}", a.name(), a.release));
        let status = row.and_then(|a| a.status.as_ref()).map(|s| (s.phase, &s.reason));
        let runs = running.contains(&(*node, *id));
        format!("{what} ({id}) on {node}: {status:?}, {}", if runs { "runs and should not" } else { "does not run and should" })
    })
}

/// Its release command failed, or was called off, and it never had a release that ran: there is nothing to run.
fn is_shut(state: &State, workload: &Workload) -> bool {
    let newest = workload.deployment.and_then(|id| state.deployments.get(&id));
    let has_step = state.release(&workload.key, workload.release).is_some_and(|r| r.spec.update.release.is_some());
    workload.stable.is_none() && has_step && newest.is_some_and(|d| d.phase.is_final() && !d.prepared)
}

fn copies_of(state: &State, key: &WorkloadKey) -> Vec<String> {
    let told = |a: &Alloc| {
        let up = state.nodes.get(&a.node).is_some_and(|n| n.up);
        let Alloc { release, node, run, .. } = a;
        format!("{} of release {release} on {node} (up {up}) run {run} {:?} ready {}", a.name(), a.phase(), a.is_ready())
    };
    state.allocs_of(key).map(|a| told(a)).collect()
}

/// Tries until it gives something or `limit` of virtual time is over.
async fn patiently<T>(limit: Duration, mut work: impl AsyncFnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = work().await {
            return Some(found);
        }
        if Instant::now() >= deadline {
            return None;
        }
        sleep(Duration::from_millis(50)).await;
    }
}
