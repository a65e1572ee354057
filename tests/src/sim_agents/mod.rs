//! Simulated agents: thousands of nodes in one process, over real QUIC with real certificates.
//!
//! Each joins with a real token and speaks through the agent's own link; only what stands behind the link is played
//! ([`host::Host`]). Hosts are cut off, frozen, killed and started again; copies do what the script in their spec says
//! ([`optimus_agent::driver::script`]).
//!
//! ```text
//!   Fleet ── owns ──► SimAgent ── link (agent crate) ── QUIC over a socket that can be cut ──► servers
//!                        └── Host: desired sets in, statuses out
//! ```

pub mod host;
mod socket;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use optimus_agent::link::{self, AgentIdentity, Link, LinkStatus};
use optimus_common::env::Env;
use optimus_common::protocol::NodeFacts;
use optimus_common::{Bytes, Millicores, WorkloadKey};
use optimus_host::transport::SetupError;
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use host::{Count, Host, Seen};
use socket::Cut;

/// Most agents of one process.
pub const AGENTS_MAX: usize = 20_000;
/// Tries of one agent to join: servers refuse what comes too fast.
const JOIN_TRIES: u32 = 50;
const JOIN_PAUSE: Duration = Duration::from_millis(200);
/// How often the copies of a lost host are looked for elsewhere.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What a fleet is made of.
#[derive(Debug, Clone)]
pub struct FleetConfig {
    /// For at least as many uses as there are agents that have not joined yet.
    pub token: String,
    pub agents: usize,
    /// Hosts are called `PREFIX-0` and so on.
    pub prefix: String,
    /// Identities are kept below it.
    pub dir: PathBuf,
    /// How many join at once.
    pub at_once: usize,
    pub cpu: Millicores,
    pub memory: Bytes,
    /// Hosts carry `zone=z0` to `zone=zN` in turn; 0: none.
    pub zones: usize,
}

/// One simulated node.
pub struct SimAgent {
    pub name: String,
    pub identity: AgentIdentity,
    facts: NodeFacts,
    host: Arc<Host>,
    cut: Cut,
    status: watch::Receiver<LinkStatus>,
    link: Option<(CancellationToken, JoinHandle<()>)>,
}

impl SimAgent {
    pub fn connected(&self) -> bool {
        self.link.is_some() && matches!(*self.status.borrow(), LinkStatus::Connected { .. })
    }
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }
}

/// The agents of this process.
pub struct Fleet {
    pub agents: Vec<SimAgent>,
    pub shared: Arc<host::Shared>,
    env: Env,
}

/// How the copies of a lost host came back elsewhere, from the moment it was lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replaced {
    pub copies: usize,
    /// When the first, and when the last of them ran elsewhere.
    pub first: Duration,
    pub last: Duration,
}

/// The fleet as a whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    pub agents: usize,
    pub connected: usize,
    pub held: usize,
    pub running: usize,
    pub ready: usize,
    pub starts: u64,
    /// Desired sets received, and copies in them.
    pub sets: u64,
    pub set_copies: u64,
}

impl Fleet {
    /// Joins and starts all of them. They connect by themselves; see [`Fleet::wait_connected`].
    pub async fn start(config: &FleetConfig, env: &Env) -> anyhow::Result<Self> {
        let FleetConfig { token, agents, prefix, dir, at_once, cpu, memory, zones } = config;
        ensure!(*agents <= AGENTS_MAX, "{agents} agents are more than {AGENTS_MAX}");
        let room = Arc::new(Semaphore::new((*at_once).max(1)));
        let mut joining = JoinSet::new();
        for number in 0..*agents {
            let (room, env, token) = (Arc::clone(&room), env.clone(), token.clone());
            let name = format!("{prefix}-{number}");
            let dir = dir.join(&name);
            joining.spawn(async move {
                let _place = room.acquire().await;
                (number, name.clone(), join(&token, &name, &dir, &env).await)
            });
        }
        let mut fleet = Fleet { agents: vec![], shared: Arc::default(), env: env.clone() };
        let mut joined: Vec<_> = joining.join_all().await;
        joined.sort_by_key(|(number, ..)| *number);
        for (number, name, identity) in joined {
            let identity = identity.with_context(|| format!("{name} cannot join"))?;
            let mut facts = facts(&name, *cpu, *memory);
            if *zones > 0 {
                facts.labels.insert("zone".into(), format!("z{}", number % zones));
            }
            fleet.agents.push(fleet.agent(name, identity, facts));
        }
        // Joining takes far more memory than being there: what it left behind goes back to the system.
        // SAFETY: takes no pointers; frees only what the allocator holds unused.
        unsafe { libc::malloc_trim(0) };
        for agent in &mut fleet.agents {
            agent.begin(&fleet.env);
        }
        Ok(fleet)
    }

    fn agent(&self, name: String, identity: AgentIdentity, facts: NodeFacts) -> SimAgent {
        let host = Arc::new(Host::new(facts.clone(), self.env.clone(), Arc::clone(&self.shared)));
        let (_, status) = watch::channel(LinkStatus::Connecting);
        SimAgent { name, identity, facts, host, cut: Cut::default(), status, link: None }
    }

    /// Waits until that many are connected.
    pub async fn wait_connected(&self, count: usize, patience: Duration) -> anyhow::Result<()> {
        self.wait(patience, |totals| totals.connected >= count).await
    }

    /// Waits until the fleet is as `wanted`.
    pub async fn wait(&self, patience: Duration, wanted: impl Fn(&Totals) -> bool) -> anyhow::Result<()> {
        let end = Instant::now() + patience;
        loop {
            let totals = self.totals();
            if wanted(&totals) {
                return Ok(());
            }
            ensure!(Instant::now() < end, "not within {patience:?}: {totals:?}");
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    pub fn totals(&self) -> Totals {
        let mut totals = Totals {
            agents: self.agents.len(),
            starts: self.shared.starts.load(Ordering::Relaxed),
            sets: self.shared.sets.load(Ordering::Relaxed),
            set_copies: self.shared.set_copies.load(Ordering::Relaxed),
            ..Totals::default()
        };
        for agent in &self.agents {
            let Count { held, running, ready } = agent.host.count();
            totals.connected += usize::from(agent.connected());
            totals.held += held;
            totals.running += running;
            totals.ready += ready;
        }
        totals
    }

    /// The number of a host by its name or number.
    pub fn find(&self, name: &str) -> anyhow::Result<usize> {
        let by_name = self.agents.iter().position(|a| a.name == name);
        let found = by_name.or_else(|| name.parse().ok().filter(|n| *n < self.agents.len()));
        found.with_context(|| format!("no host {name}"))
    }

    /// Cuts a host off: no packet gets through, either way, and its copies run on.
    pub fn disconnect(&self, agent: usize) {
        self.agents[agent].cut.store(true, Ordering::Relaxed);
    }

    /// Ends [`Fleet::disconnect`].
    pub fn reconnect(&self, agent: usize) {
        self.agents[agent].cut.store(false, Ordering::Relaxed);
    }

    /// Freezes a host: cut off, and nothing happens on it.
    pub fn freeze(&self, agent: usize) {
        self.disconnect(agent);
        self.agents[agent].host.freeze(true);
    }

    pub fn thaw(&self, agent: usize) {
        self.agents[agent].host.freeze(false);
        self.reconnect(agent);
    }

    /// The host loses power: no farewell, and everything on it is gone.
    pub fn kill(&mut self, agent: usize) {
        self.disconnect(agent);
        let agent = &mut self.agents[agent];
        if let Some((_, task)) = agent.link.take() {
            task.abort();
        }
        agent.host = Arc::new(Host::new(agent.facts.clone(), self.env.clone(), Arc::clone(&self.shared)));
    }

    /// A killed host starts again, with nothing but its identity.
    pub fn restart(&mut self, agent: usize) {
        self.kill(agent); // a no-op where it is dead
        let agent = &mut self.agents[agent];
        agent.cut = Cut::default();
        agent.host = Arc::new(Host::new(agent.facts.clone(), self.env.clone(), Arc::clone(&self.shared)));
        agent.begin(&self.env);
    }

    /// Kills a host and waits until each of its running copies runs on another one.
    pub async fn lose(&mut self, agent: usize, patience: Duration) -> anyhow::Result<Replaced> {
        let missing = self.kill_noting(agent);
        let since = Instant::now();
        self.replaced(agent, missing, since, patience).await
    }

    /// Kills a host and gives the slots its running copies were in.
    pub fn kill_noting(&mut self, agent: usize) -> BTreeSet<(WorkloadKey, u32)> {
        let copies = self.agents[agent].host.copies();
        self.kill(agent);
        copies.into_iter().filter(|c| c.running).map(|c| (c.key, c.index)).collect()
    }

    /// Waits until each slot has a running copy on another host than `lost`. Call it at once.
    pub async fn replaced(
        &self,
        lost: usize,
        mut missing: BTreeSet<(WorkloadKey, u32)>,
        since: Instant,
        patience: Duration,
    ) -> anyhow::Result<Replaced> {
        let copies = missing.len();
        if copies == 0 {
            bail!("{} held no running copy", self.agents[lost].name);
        }
        let mut first = None;
        loop {
            for (_, agent) in self.agents.iter().enumerate().filter(|(n, _)| *n != lost) {
                for Seen { key, index, running, .. } in agent.host.copies() {
                    if running && missing.remove(&(key, index)) {
                        first.get_or_insert_with(|| since.elapsed());
                    }
                }
            }
            if missing.is_empty() {
                return Ok(Replaced { copies, first: first.unwrap_or_default(), last: since.elapsed() });
            }
            ensure!(since.elapsed() < patience, "{} of {copies} copies are not replaced within {patience:?}", missing.len());
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Ends all sessions with a farewell.
    pub async fn stop(&mut self) {
        let mut ending = JoinSet::new();
        for agent in &mut self.agents {
            if let Some((shutdown, task)) = agent.link.take() {
                shutdown.cancel();
                ending.spawn(task);
            }
        }
        ending.join_all().await;
    }
}

impl SimAgent {
    fn begin(&mut self, env: &Env) {
        let cut = Arc::clone(&self.cut);
        let address = std::net::SocketAddr::from(([0, 0, 0, 0], 0));
        let endpoints = Box::new(move || socket::endpoint(&cut).map_err(|source| SetupError::Bind { address, source }));
        let link = Link::new(self.identity.clone(), Arc::clone(&self.host) as _, env.clone()).with_endpoints(endpoints);
        self.status = link.status();
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(link.run(shutdown.clone()));
        self.link = Some((shutdown, task));
    }
}

impl Drop for SimAgent {
    fn drop(&mut self) {
        if let Some((_, task)) = self.link.take() {
            task.abort();
        }
    }
}

async fn join(token: &str, name: &str, dir: &Path, env: &Env) -> anyhow::Result<AgentIdentity> {
    std::fs::create_dir_all(dir)?;
    let mut tries = 0;
    loop {
        match link::join_or_open(Some(token), name, dir, env).await {
            Ok(identity) => return Ok(identity),
            Err(error) => {
                tries += 1;
                if tries >= JOIN_TRIES || !matches!(error, link::JoinError::Unreachable { .. }) {
                    return Err(error.into());
                }
                env.clock.sleep(JOIN_PAUSE.mul_f64(0.5 + env.fraction())).await;
            }
        }
    }
}

fn facts(name: &str, cpu: Millicores, memory: Bytes) -> NodeFacts {
    NodeFacts {
        name: name.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        cpu,
        memory,
        arch: "x86_64".into(),
        kernel: "simulated".into(),
        cgroup: "v2".into(),
        drivers: vec!["process".into()],
        ports: (20_000, 29_999),
        address: "127.0.0.1".into(),
        boot_id: format!("boot-of-{name}"),
        ..NodeFacts::default()
    }
}

/// Raises the number of files this process may open to what is allowed: each agent needs a socket.
pub fn raise_file_limit() -> std::io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: plain getrlimit(2) and setrlimit(2) on a local value.
    let result = unsafe {
        match libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) {
            0 => {
                limit.rlim_cur = limit.rlim_max;
                libc::setrlimit(libc::RLIMIT_NOFILE, &limit)
            }
            failed => failed,
        }
    };
    if result == 0 { Ok(limit.rlim_cur) } else { Err(std::io::Error::last_os_error()) }
}
