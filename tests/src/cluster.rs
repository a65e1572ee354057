//! A real cluster of `optimus server` and `optimus agent` processes: in network namespaces, or on loopback behind proxies.
//!
//! The first server founds, the others join one after the other with a token each. Processes are killed, frozen, started
//! again and wiped by number. Everything ends with this value; the logs of a failed test are printed.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::api_client::ApiClient;
use crate::chaos_proxy::ChaosProxy;
use crate::harness::{PATIENCE, Said, bin_dir, free_tcp_port, free_udp_port};
use crate::netns::Network;

/// Longest wait for an answer of a healthy server.
const ANSWER: Duration = Duration::from_secs(10);
/// Ports inside a namespace, where nobody else is.
const API_PORT: u16 = 7600;
const PEER_PORT: u16 = 7601;
/// First workload port of the first agent; each has a hundred.
const WORKLOAD_PORTS: u16 = 21_000;
/// Lines of each log shown when a test fails.
const TAIL: usize = 30;

/// Where the processes run.
pub enum Place {
    /// A namespace each: servers first, then agents.
    Namespaces(Network),
    /// On loopback ports, each server behind a proxy with a seed of its own.
    Proxies(Vec<ChaosProxy>),
}

/// One process and where its things are.
pub struct Member {
    name: String,
    /// Home of its configuration and data.
    dir: PathBuf,
    child: Option<Child>,
    /// Further variables of its environment.
    pub env: Vec<(String, String)>,
    api: SocketAddr,
    peers: SocketAddr,
}

impl Member {
    fn log(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// Everything it has said, over all its lives.
    pub fn output(&self) -> String {
        fs::read_to_string(self.log()).unwrap_or_default()
    }

    /// The directory of its state.
    pub fn data(&self) -> PathBuf {
        self.dir.join("state")
    }

    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    fn signal(&self, signal: i32) {
        if let Some(child) = &self.child {
            // SAFETY: plain kill(2) on a child we have not reaped.
            unsafe { libc::kill(child.id() as i32, signal) };
        }
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Freezes it.
    pub fn pause(&self) {
        self.signal(libc::SIGSTOP);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.signal(libc::SIGCONT);
    }

    /// Asks it to end, and gives the exit code.
    pub fn stop(&mut self) -> Option<i32> {
        self.signal(libc::SIGTERM);
        self.wait_ended()
    }

    /// Waits for its end, and gives the exit code.
    pub fn wait_ended(&mut self) -> Option<i32> {
        let mut child = self.child.take()?;
        let end = Instant::now() + PATIENCE;
        loop {
            if let Ok(Some(status)) = child.try_wait() {
                return status.code();
            }
            if Instant::now() >= end {
                let _ = child.kill();
                let _ = child.wait();
                panic!("{} did not end", self.name);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A running cluster.
pub struct Cluster {
    dir: tempfile::TempDir,
    place: Place,
    pub servers: Vec<Member>,
    pub agents: Vec<Member>,
    /// Knows every server.
    pub api: ApiClient,
}

impl Cluster {
    /// `servers` in namespaces, and room for `agents`.
    pub async fn in_namespaces(servers: usize, agents: usize) -> Self {
        crate::netns::sweep();
        Self::start(servers, Place::Namespaces(Network::new(servers + agents).expect("network namespaces"))).await
    }

    /// `servers` on loopback. Each is told to others as the address of its proxy.
    pub async fn behind_proxies(servers: usize, seed: u64) -> Self {
        let mut proxies = Vec::new();
        for n in 0..servers as u64 {
            let upstream = SocketAddr::from(([127, 0, 0, 1], free_udp_port()));
            proxies.push(ChaosProxy::start(seed.wrapping_add(n), upstream).await.expect("a proxy"));
        }
        Self::start(servers, Place::Proxies(proxies)).await
    }

    async fn start(servers: usize, place: Place) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut members: Vec<Member> = (0..servers).map(|n| member(dir.path(), "server", n, &place)).collect();
        let args = server_args(&members[0], &place, 0, None);
        launch(&place, 0, &mut members[0], &args);
        let config = members[0].dir.join("config");
        let addresses = members.iter().map(|m| m.api).collect();
        let api = poll("the founder's credentials", || ApiClient::new(&config, Vec::clone(&addresses)).ok()).await;
        let mut cluster = Self { dir, place, servers: members, agents: Vec::new(), api };
        cluster.wait_ready(0).await;
        for n in 1..servers {
            let token = cluster.join_token("server").await;
            let args = server_args(&cluster.servers[n], &cluster.place, n, Some(&token));
            launch(&cluster.place, n, &mut cluster.servers[n], &args);
            cluster.wait_voters(n + 1).await;
        }
        cluster
    }

    /// Starts one more agent and waits until its node is up.
    pub async fn add_agent(&mut self) {
        let n = self.agents.len();
        let token = self.join_token("agent").await;
        let agent = member(self.dir.path(), "agent", n, &self.place);
        self.agents.push(agent);
        self.start_agent(n, Some(&token));
        let deadline = Instant::now() + PATIENCE;
        while self.nodes_up().await != Some(n + 1) {
            assert!(self.agents[n].is_running() && Instant::now() < deadline, "agent {n} does not come up");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Starts an agent again, or for the first time with a token.
    pub fn start_agent(&mut self, n: usize, token: Option<&str>) {
        let ports = WORKLOAD_PORTS + 100 * n as u16;
        let data = self.agents[n].data().display().to_string();
        let mut args = ["agent", "--data-dir", &data, "--ports", &format!("{ports}-{}", ports + 99), "--workload-user", "root"]
            .map(str::to_owned)
            .to_vec();
        args.extend(["--name".to_owned(), format!("host-{n}")]);
        args.extend(token.map(|t| format!("--join={t}")));
        launch(&self.place, self.servers.len() + n, &mut self.agents[n], &args);
    }

    /// Starts a server again that was killed or has ended.
    pub fn start_server(&mut self, n: usize) {
        let args = server_args(&self.servers[n], &self.place, n, None);
        launch(&self.place, n, &mut self.servers[n], &args);
    }

    /// Throws away all that a server that does not run had; to come back it must join anew, under a new id.
    pub fn wipe_server(&mut self, n: usize) {
        assert!(!self.servers[n].is_running(), "server {n} runs");
        fs::remove_dir_all(self.servers[n].data()).expect("its state can be removed");
    }

    /// Starts a wiped server as a new one.
    pub async fn rejoin_server(&mut self, n: usize) {
        let token = self.join_token("server").await;
        let args = server_args(&self.servers[n], &self.place, n, Some(&token));
        launch(&self.place, n, &mut self.servers[n], &args);
    }

    /// A token of any server that gives one.
    async fn join_token(&self, role: &str) -> String {
        // An agent's role is the default, and not said.
        let body = if role == "agent" { json!({ "uses": 1 }) } else { json!({ "role": role, "uses": 1 }) };
        self.ask(
            "a join token",
            |answer| answer["token"].as_str().map(str::to_owned),
            async |server| {
                let key = format!("token-{}", uuid::Uuid::now_v7());
                self.api.post(server, "/v1/join-tokens", &key, &body, ANSWER).await
            },
        )
        .await
    }

    /// Asks one server after the other until `wanted` finds what it wants in a good answer.
    async fn ask<T>(
        &self,
        what: &str,
        wanted: impl Fn(&Value) -> Option<T>,
        request: impl AsyncFn(usize) -> anyhow::Result<crate::api_client::Answer>,
    ) -> T {
        let end = Instant::now() + PATIENCE;
        for server in (0..self.api.servers()).cycle() {
            let last = match request(server).await {
                Ok(answer) if answer.is_success() => match wanted(&answer.body) {
                    Some(found) => return found,
                    None => answer.body.to_string(),
                },
                Ok(answer) if answer.is_retryable() => format!("{} {}", answer.status, answer.body),
                Ok(answer) => panic!("asked for {what}: {} {}", answer.status, answer.body),
                Err(e) => format!("{e:#}"),
            };
            assert!(Instant::now() < end, "gave up waiting for {what}; last: {last}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        unreachable!("a cluster has servers")
    }

    /// Waits until a server answers linearizable reads.
    pub async fn wait_ready(&mut self, n: usize) {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Ok(answer) = self.api.get(n, "/v1/status", ANSWER).await
                && answer.is_success()
            {
                return;
            }
            assert!(self.servers[n].is_running(), "server {n} ended");
            assert!(Instant::now() < end, "server {n} is not ready");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until that many servers have a vote and the leader hears all of them.
    pub async fn wait_voters(&self, voters: usize) {
        let all = |view: &Value| {
            let servers = view["servers"].as_array()?;
            let voting = servers.iter().filter(|s| s["alive"] == true && (s["role"] == "leader" || s["role"] == "voter"));
            (voting.count() == voters).then_some(())
        };
        self.ask(&format!("{voters} voters"), all, async |server| self.api.get(server, "/v1/cluster", ANSWER).await).await;
    }

    /// The number of the server that leads, as a majority of the servers that answer sees it.
    pub async fn leader(&self) -> usize {
        let api = |view: &Value| {
            let leader = view["servers"].as_array()?.iter().find(|s| s["role"] == "leader")?;
            leader["api"].as_str().map(str::to_owned)
        };
        let address = self.ask("a leader", api, async |server| self.api.get(server, "/v1/cluster", ANSWER).await).await;
        // Behind a proxy the host of the address is the same for all; the port tells them apart.
        let port = |text: &str| text.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
        let host = |text: &str| text.rsplit_once(':').map(|(host, _)| host.to_owned());
        let is = |m: &Member| port(&address) == Some(m.api.port()) && host(&address) == Some(m.api.ip().to_string());
        self.servers.iter().position(is).unwrap_or_else(|| panic!("{address} is none of our servers"))
    }

    /// Nodes that are up, when a server can tell.
    pub async fn nodes_up(&self) -> Option<usize> {
        for server in 0..self.api.servers() {
            if let Ok(answer) = self.api.get(server, "/v1/status", ANSWER).await
                && answer.is_success()
            {
                return answer.body["nodes_up"].as_u64().map(|n| n as usize);
            }
        }
        None
    }

    /// What `optimus ARGS` says on the host of server `n`, with its credentials; by itself it ends within seconds.
    pub fn cli(&self, n: usize, args: &[&str]) -> Said {
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let output = command(&self.place, n, &self.servers[n], &args).stdin(Stdio::null()).output().expect("the CLI runs");
        Said::of(output)
    }

    /// The network, when the processes are in namespaces.
    pub fn network(&self) -> &Network {
        match &self.place {
            Place::Namespaces(network) => network,
            Place::Proxies(_) => panic!("this cluster is on loopback"),
        }
    }

    /// The proxies, when the servers are behind some.
    pub fn proxies(&self) -> &[ChaosProxy] {
        match &self.place {
            Place::Proxies(proxies) => proxies,
            Place::Namespaces(_) => panic!("this cluster is in namespaces"),
        }
    }
}

async fn poll<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < end, "gave up waiting for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn member(root: &Path, role: &str, n: usize, place: &Place) -> Member {
    let name = format!("{role}-{n}");
    let dir = root.join(&name);
    fs::create_dir_all(&dir).expect("a directory");
    let (api, peers) = match place {
        Place::Namespaces(network) => {
            // Only servers have addresses others are told; an agent's are never used.
            let ip = network.address(n).into();
            (SocketAddr::new(ip, API_PORT), SocketAddr::new(ip, PEER_PORT))
        }
        Place::Proxies(proxies) => {
            let peers = proxies.get(n).map_or(SocketAddr::from(([127, 0, 0, 1], 0)), ChaosProxy::upstream);
            (SocketAddr::from(([127, 0, 0, 1], free_tcp_port())), peers)
        }
    };
    Member { name, dir, child: None, env: Vec::new(), api, peers }
}

/// The one place that knows the flags of `optimus server`.
fn server_args(member: &Member, place: &Place, n: usize, join: Option<&str>) -> Vec<String> {
    let advertise = match place {
        Place::Namespaces(_) => member.peers,
        Place::Proxies(proxies) => proxies[n].addr(),
    };
    let mut args = vec!["server".to_owned()];
    let flags = [
        ("--data-dir", member.data().display().to_string()),
        ("--api-listen", member.api.to_string()),
        ("--agent-listen", member.peers.to_string()),
        ("--advertise", advertise.to_string()),
    ];
    args.extend(flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
    args.extend(join.map(|token| format!("--join={token}")));
    args
}

fn launch(place: &Place, host: usize, member: &mut Member, args: &[String]) {
    assert!(!member.is_running(), "{} runs already", member.name);
    let log = fs::File::options().create(true).append(true).open(member.log()).expect("a log file");
    let mut command = command(place, host, member, args);
    command.stdin(Stdio::null()).stdout(log.try_clone().expect("a second handle")).stderr(log);
    member.child = Some(command.spawn().unwrap_or_else(|e| panic!("{} does not start: {e}", member.name)));
}

/// `optimus` on a host, with a member's configuration.
fn command(place: &Place, host: usize, member: &Member, args: &[String]) -> Command {
    let program = bin_dir().join("optimus");
    let mut command = match place {
        Place::Namespaces(network) => network.command(host, &program),
        Place::Proxies(_) => Command::new(&program),
    };
    command
        .args(args)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", member.dir.join("home"))
        .env("XDG_CONFIG_HOME", member.dir.join("config"))
        .env("XDG_DATA_HOME", member.dir.join("data"))
        .env("NO_COLOR", "1")
        .envs(member.env.iter().cloned());
    command
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for member in self.agents.iter_mut().chain(&mut self.servers) {
            member.kill();
        }
        if std::thread::panicking() {
            for member in self.servers.iter().chain(&self.agents) {
                let output = member.output();
                let lines: Vec<&str> = output.lines().collect();
                eprintln!("---- {} (last lines)\n{}", member.name, lines[lines.len().saturating_sub(TAIL)..].join("\n"));
            }
        }
    }
}
