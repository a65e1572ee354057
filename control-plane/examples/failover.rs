//! Measures how long writes stop when the leader dies, and when it hands over.
//!
//! ```text
//! cargo run --example failover -- [kills] [hand-overs] [servers] [directory]
//! ```
//! All servers run in this process over a `MemoryNetwork`, with their logs on real files (below the directory, or a
//! temporary one). Writers propose all the time. A gap is the longest time without an acknowledged write around the event.
//! A killed leader's tasks are aborted where they stand and it is started again from its files afterwards.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use optimus_control_plane::raft::runtime::{Hooks, scope};
use optimus_control_plane::raft::{Capture, Machine, MemoryNetwork, ProposeError, RaftConfig, RaftNode, Role, Tuning};
use optimus_host::disk::HostDisk;
use tokio::task::AbortHandle;

/// Writers that propose at the same time.
const WRITERS: usize = 4;
/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(30);

/// Keeps every number it was told, so that a lost one shows.
#[derive(Default)]
struct Numbers(Arc<Mutex<Vec<u64>>>);

impl Machine for Numbers {
    type Command = u64;
    type Answer = u64;

    fn apply(&mut self, _: u64, command: u64) -> u64 {
        self.lock().push(command);
        command
    }

    fn snapshot(&self) -> Capture {
        let held = self.lock().clone();
        Box::new(move || held.iter().flat_map(|n| n.to_le_bytes()).collect())
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), String> {
        let numbers = bytes.chunks(8).map(|c| c.try_into().map(u64::from_le_bytes).map_err(|_| "cut off".to_owned()));
        *self.lock() = numbers.collect::<Result<_, _>>()?;
        Ok(())
    }

    fn published(&mut self, _: u64) {}
}

impl Numbers {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<u64>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// The tasks of one server.
#[derive(Debug, Default)]
struct Tasks(Mutex<Vec<AbortHandle>>);

impl Hooks for Tasks {
    fn random(&self) -> u64 {
        rand::random()
    }

    fn spawned(&self, task: AbortHandle) {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(task);
    }
}

struct Server {
    node: RaftNode<Numbers>,
    tasks: Arc<Tasks>,
    numbers: Arc<Mutex<Vec<u64>>>,
}

type Servers = Arc<Mutex<BTreeMap<u64, Server>>>;

async fn start(id: u64, dir: &Path, network: &MemoryNetwork) -> Result<Server> {
    let dir = dir.join(format!("s{id}"));
    std::fs::create_dir_all(&dir)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        // The log of a killed server is closed by its writer thread a moment later.
        let machine = Numbers::default();
        let numbers = machine.0.clone();
        let disk = Arc::new(HostDisk::open(&dir)?);
        let config = RaftConfig { node_id: id, disk, machine, tuning: Tuning::default(), network: network.transport(id) };
        let tasks = Arc::new(Tasks::default());
        match scope(tasks.clone(), RaftNode::start(config)).await {
            Ok(node) => {
                network.connect(&node);
                return Ok(Server { node, tasks, numbers });
            }
            Err(e) if Instant::now() > deadline => return Err(e).context(format!("server {id} does not start")),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

fn with<T>(servers: &Servers, f: impl FnOnce(&mut BTreeMap<u64, Server>) -> T) -> T {
    f(&mut servers.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
}

fn leader(servers: &Servers) -> Option<u64> {
    with(servers, |s| s.iter().find(|(_, s)| *s.node.is_leader().borrow() && s.node.status().role == Role::Leader).map(|(id, _)| *id))
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        if Instant::now() > deadline {
            bail!("{what}: not within {PATIENCE:?}");
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

/// Everything acknowledged, and when.
type Acknowledged = Arc<Mutex<Vec<(Instant, u64)>>>;

async fn write(writer: u64, servers: Servers, acknowledged: Acknowledged) {
    let mut at = 1;
    for n in 0.. {
        let number = writer << 40 | n;
        loop {
            let node = with(&servers, |s| s.get(&at).map(|s| s.node.clone()));
            let answer = match node {
                Some(node) => node.propose(number).await,
                None => Err(ProposeError::NoLeader { leader: None }),
            };
            match answer {
                Ok(_) => {
                    acknowledged.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((Instant::now(), number));
                    break;
                }
                Err(ProposeError::NoLeader { leader: Some(leader) }) if leader != at => at = leader,
                Err(_) => {
                    at = at % with(&servers, |s| s.keys().max().copied().unwrap_or(1)) + 1;
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        }
    }
}

/// The longest pause between two acknowledgements since `from`.
fn gap(acknowledged: &Acknowledged, from: Instant) -> Duration {
    let times = acknowledged.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let times: Vec<_> = times.iter().map(|(at, _)| *at).filter(|at| *at >= from).collect();
    times.windows(2).map(|w| w[1] - w[0]).max().unwrap_or_default()
}

fn table(what: &str, mut gaps: Vec<Duration>) {
    if gaps.is_empty() {
        return;
    }
    gaps.sort();
    let at = |share: f64| gaps[((gaps.len() - 1) as f64 * share) as usize].as_millis();
    let (n, worst) = (gaps.len(), gaps[gaps.len() - 1].as_millis());
    println!("{what:<10} n={n:<4} p10={:<5} median={:<5} p90={:<5} p99={:<5} worst={worst} ms", at(0.1), at(0.5), at(0.9), at(0.99));
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let mut number = |otherwise: usize| args.next().map_or(Ok(otherwise), |n| n.parse());
    let (kills, transfers, count) = (number(20)?, number(20)?, number(3)? as u64);
    let temporary = tempfile::tempdir()?;
    let dir = args.next().map_or(temporary.path().to_owned(), PathBuf::from);
    let network = MemoryNetwork::new();
    let servers: Servers = Arc::default();
    for id in 1..=count {
        let server = start(id, &dir, &network).await?;
        with(&servers, |s| s.insert(id, server));
    }
    let first = with(&servers, |s| s.get(&1).map(|s| s.node.clone())).context("server 1")?;
    first.initialize((1..=count).map(|id| (id, format!("s{id}:1"))).collect()).await?;
    drop(first);
    until("a leader", || leader(&servers).is_some()).await?;
    let acknowledged = Acknowledged::default();
    let writers: Vec<_> = (0..WRITERS as u64).map(|w| tokio::spawn(write(w, servers.clone(), acknowledged.clone()))).collect();
    let writes = || acknowledged.lock().unwrap_or_else(std::sync::PoisonError::into_inner).len();

    let (mut died, mut handed) = (Vec::new(), Vec::new());
    for round in 0..kills + transfers {
        let before = writes();
        until("writes", || writes() > before + 50).await?;
        until("a leader", || leader(&servers).is_some()).await?;
        let (from, old) = (Instant::now() - Duration::from_millis(20), leader(&servers).context("a leader")?);
        if round < transfers {
            let node = with(&servers, |s| s.get(&old).map(|s| s.node.clone())).context("the leader")?;
            let result = node.transfer_leader(None).await;
            let now = writes();
            until("writes go on", || writes() > now + 20).await?;
            match result {
                Ok(_) => handed.push(gap(&acknowledged, from)),
                Err(e) => println!("hand-over {round} from {old}: {e}, gap {:?}", gap(&acknowledged, from)),
            }
            continue;
        }
        network.disconnect(old);
        let server = with(&servers, |s| s.remove(&old)).context("the leader")?;
        server.tasks.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).iter().for_each(AbortHandle::abort);
        drop(server);
        let now = writes();
        until("another leader", || leader(&servers).is_some()).await?;
        until("writes go on", || writes() > now + 20).await?;
        died.push(gap(&acknowledged, from));
        let server = start(old, &dir, &network).await?;
        with(&servers, |s| s.insert(old, server));
        let caught_up = || {
            with(&servers, |s| {
                let applied: Vec<_> = s.values().map(|s| *s.node.applied().borrow()).collect();
                applied.iter().max().zip(applied.iter().min()).is_some_and(|(a, b)| a - b < 50)
            })
        };
        until("it has caught up", caught_up).await?;
    }
    writers.iter().for_each(tokio::task::JoinHandle::abort);
    let status = with(&servers, |s| s.values().map(|s| s.node.status()).collect::<Vec<_>>());
    for s in &status {
        println!("server {}: election timeout {} ms, append p99 {} ms", s.node_id, s.election_timeout_ms, s.append_p99_ms);
    }
    table("hand-over", handed);
    table("death", died);

    let acknowledged: Vec<u64> = acknowledged.lock().unwrap_or_else(std::sync::PoisonError::into_inner).iter().map(|(_, n)| *n).collect();
    let holder = leader(&servers).context("a leader at the end")?;
    let held: std::collections::BTreeSet<u64> = with(&servers, |s| {
        s.get(&holder).map(|s| s.numbers.lock().unwrap_or_else(std::sync::PoisonError::into_inner).iter().copied().collect())
    })
    .context("the leader's state")?;
    let lost = acknowledged.iter().filter(|n| !held.contains(n)).count();
    println!("{} writes acknowledged, {lost} lost", acknowledged.len());
    let nodes = with(&servers, |s| s.values().map(|s| s.node.clone()).collect::<Vec<_>>());
    for node in nodes {
        node.shutdown().await;
    }
    if lost > 0 {
        bail!("{lost} acknowledged writes are lost");
    }
    Ok(())
}
