//! The long-running roles of the binary. Each takes its parsed flags and runs until it is told to stop.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use optimus_agent::agent::Agent;
use optimus_agent::link;
use optimus_common::env::Env;
use optimus_common::join_token::Role;
use optimus_common::protocol::NodeFacts;
use optimus_common::{Name, Span};
use optimus_control_plane::join_tokens::JoinTokens;
use optimus_control_plane::server::{self, Server};
use optimus_host::env::HostEnv;
use optimus_host::telemetry::{self, Format};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::commands::agent::AgentConfig;
use crate::commands::deploy::deploy_paths;
use crate::commands::dev::DevConfig;
use crate::commands::server::ServerConfig;
use crate::commands::{Session, console};
use crate::context::{self, Context};
use crate::output::Terminal;
use crate::target::Scope;

/// Longest time `dev` waits at its end for workloads to stop by themselves. Theirs is usually shorter.
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// How long the join of `dev`'s own agent may take before something is wrong.
const TOKEN_TTL: Span = Span::secs(300);
/// How often a server looks whether the context it wrote must know other CAs.
const CA_LOOK_EVERY: Duration = Duration::from_secs(2);
/// How long `dev` waits for an example it deploys.
const DEPLOY_DEADLINE: Duration = Duration::from_secs(300);
/// User of workloads that name none, when the agent is root.
const DEFAULT_WORKLOAD_USER: &str = "nobody";
/// The directory of control groups that holds those of workloads.
const CGROUP_OWNER: &str = "optimus";

/// `optimus server`: one server of the control plane.
///
/// # Errors
/// When it cannot start, or ends other than on request.
pub async fn server(config: ServerConfig) -> anyhow::Result<()> {
    // openraft warns of what heals by itself; what does not reaches us as an error.
    logs("info,openraft=error")?;
    let data_dir = config.data_dir.clone();
    let agent_listen = config.agent_listen;
    let config = server::ServerConfig {
        data_dir: config.data_dir,
        api_listen: config.api_listen,
        agent_listen: config.agent_listen,
        join: config.join,
        advertise: config.advertise.into_iter().collect(),
        allow_hosts: config.allow_hosts,
        rescue: config.rescue,
    };
    let server = Box::pin(Server::start(config, HostEnv::new())).await?;
    let credentials = context::write_context("server", &context_of(&server))?;
    println!("Optimus server {}", env!("CARGO_PKG_VERSION"));
    println!("  API          https://{}", server.api_addr);
    println!("  agents       {agent_listen} (UDP)");
    println!("  data         {}", data_dir.display());
    println!("  credentials  {} (read by the CLI)", credentials.display());
    println!("next: `optimus nodes join-token`, then `optimus agent --join TOKEN` on each host");
    let ended = tokio::select! {
        result = asked_to_end() => result,
        why = server.fatal() => Err(anyhow::anyhow!("the server must stop: {why}")),
        never = keep_ca_known(&server) => match never {},
        news = server.left() => {
            println!("{news}; its data directory may be removed");
            Ok(())
        }
    };
    server.stop().await;
    ended
}

/// `optimus agent`: the agent of this host. Its workloads outlive it.
///
/// # Errors
/// When it cannot start or join, or ends other than on request.
pub async fn agent(config: AgentConfig) -> anyhow::Result<()> {
    logs("info")?;
    let env = HostEnv::new();
    let name = config.name.as_ref().map_or_else(host_name, Name::to_string);
    agent_dirs(&config.data_dir)?;
    let identity = link::join_or_open(config.join.as_deref(), &name, &config.data_dir, &env).await?;
    let address = config.address.map_or_else(|| address_towards(&identity.servers), |ip| ip.to_string());
    let workload_user = config.workload_user.or_else(|| is_root().then(|| DEFAULT_WORKLOAD_USER.to_owned()));
    let agent = Agent::start(
        optimus_agent::agent::AgentConfig {
            data_dir: config.data_dir.clone(),
            runner: runner()?,
            ports: (*config.ports.start(), *config.ports.end()),
            allow_unenforced: false,
            workload_user,
            address,
            name: Some(name.clone()),
            // Two agents of one machine must not take each other's groups for leaked ones.
            cgroup_owner: format!("{CGROUP_OWNER}-{}", identity.node.short()),
            labels: BTreeMap::new(),
            mock: config.mock,
            container_engine: container_engine(),
        },
        env.clone(),
    )
    .await?;
    println!("Optimus agent {} on {name}, node {}", env!("CARGO_PKG_VERSION"), identity.node);
    println!("  data         {}", config.data_dir.display());
    let shutdown = CancellationToken::new();
    let link = tokio::spawn(link::run(identity, agent.workloads(), env, shutdown.child_token()));
    let ended = asked_to_end().await;
    shutdown.cancel();
    let _ = link.await;
    agent.detach().await;
    ended
}

/// `optimus dev`: one server and one agent in this process.
///
/// # Errors
/// When it cannot start, or ends other than on request.
pub async fn dev(config: DevConfig) -> anyhow::Result<()> {
    logs("warn")?;
    let DevConfig { dirs, data_dir, api_listen, agent_listen, ports, keep, terminal } = config;
    let env = HostEnv::new();
    let ours = DevData::open(&data_dir)?;
    let server_config = server::ServerConfig {
        data_dir: data_dir.join("server"),
        api_listen,
        agent_listen,
        advertise: vec![],
        allow_hosts: vec![],
        join: None,
        rescue: Default::default(),
    };
    let server = Box::pin(Server::start(server_config, env.clone())).await?;
    let before = context::current();
    let context = context_of(&server);
    context::write_context("dev", &context)?;
    context::set_current("dev")?;

    let shutdown = CancellationToken::new();
    let (agent, link) = match dev_agent(&server, &data_dir.join("agent"), (*ports.start(), *ports.end()), &env, &shutdown).await {
        Ok(started) => started,
        Err(error) => {
            server.stop().await;
            return Err(error);
        }
    };
    let session = Session::with(context, Scope::default(), terminal).map_err(|failure| anyhow::anyhow!("{}", failure.what))?;
    banner(&terminal, &server, &data_dir, keep);
    tell_console(&session).await;
    unenforced(&terminal, &agent.workloads().facts());

    let mut asked = std::pin::pin!(asked_to_end());
    let deployed = deploy_paths(&session, &dirs, Some(DEPLOY_DEADLINE));
    let mut ended = None;
    if !dirs.is_empty() {
        tokio::select! {
            result = &mut asked => ended = Some(result),
            why = server.fatal() => ended = Some(Err(anyhow::anyhow!("the server must stop: {why}"))),
            deployed = deployed => match deployed {
                Ok(()) => {
                    terminal.note(&next_steps(&dirs));
                    // Again, with a code of its own: building and starting may have taken longer than the first is good for.
                    tell_console(&session).await;
                }
                // It is shown and stays up to be looked at.
                Err(failure) => failure.print(&terminal),
            }
        }
    }
    let ended = match ended {
        Some(ended) => ended,
        None => tokio::select! {
            result = asked => result,
            why = server.fatal() => Err(anyhow::anyhow!("the server must stop: {why}")),
            never = keep_ca_known(&server) => match never {},
        },
    };

    if keep {
        terminal.note("leaving workloads running; `optimus dev --keep` finds them again");
        shutdown.cancel();
        let _ = link.await;
        agent.detach().await;
        server.stop().await;
    } else {
        terminal.note("stopping every workload (again: leave them)");
        tokio::select! {
            in_time = agent.stop_all(STOP_DEADLINE) => if !in_time {
                terminal.note("some workloads did not stop by themselves and were killed");
            },
            again = asked_to_end() => {
                again?;
                bail!("left workloads behind; `optimus dev --data-dir {}` takes them up again", data_dir.display());
            }
        }
        shutdown.cancel();
        let _ = link.await;
        server.stop().await;
        ours.remove();
        context::remove_context("dev", before.as_deref())?;
    }
    ended
}

async fn dev_agent(
    server: &Server,
    dir: &Path,
    ports: (u16, u16),
    env: &Env,
    shutdown: &CancellationToken,
) -> anyhow::Result<(Agent, tokio::task::JoinHandle<()>)> {
    let name = host_name();
    agent_dirs(dir)?;
    let identity = match link::AgentIdentity::open(dir)? {
        Some(identity) => identity,
        None => {
            let token = server.gateway.create(Role::Agent, TOKEN_TTL, 1).await.context("failed to make a join token")?;
            link::join(&token.token, &name, dir, env).await?
        }
    };
    let agent = Agent::start(
        optimus_agent::agent::AgentConfig {
            data_dir: dir.to_owned(),
            runner: runner()?,
            ports,
            allow_unenforced: true,
            workload_user: None,
            address: "127.0.0.1".into(),
            name: Some(name),
            // Two `dev` of one machine must not take each other's groups for leaked ones.
            cgroup_owner: format!("{CGROUP_OWNER}-dev-{}", identity.node.short()),
            labels: BTreeMap::new(),
            mock: false,
            container_engine: container_engine(),
        },
        env.clone(),
    )
    .await?;
    let link = tokio::spawn(link::run(identity, agent.workloads(), env.clone(), shutdown.child_token()));
    Ok((agent, link))
}

/// Socket of the container engine when it is not at a usual place: `OPTIMUS_CONTAINER_ENGINE`.
fn container_engine() -> Option<PathBuf> {
    std::env::var_os("OPTIMUS_CONTAINER_ENGINE").filter(|path| !path.is_empty()).map(PathBuf::from)
}

/// The agent's directory, which workloads of other users pass through to theirs, and the private one of its identity.
fn agent_dirs(dir: &Path) -> anyhow::Result<()> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o711).create(dir);
    made.and_then(|()| optimus_host::files::create_private_dir(&dir.join("identity")))
        .with_context(|| format!("failed to create {}", dir.display()))
}

/// What `dev` writes below its directory, and removes when it is not to keep it.
struct DevData {
    dir: PathBuf,
    made: bool,
}

const DEV_PARTS: [&str; 2] = ["server", "agent"];

impl DevData {
    fn open(dir: &Path) -> anyhow::Result<Self> {
        let made = !dir.exists();
        std::fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
        Ok(DevData { dir: dir.to_owned(), made })
    }

    fn remove(self) {
        for part in DEV_PARTS {
            let path = self.dir.join(part);
            if let Err(error) = std::fs::remove_dir_all(&path)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "could not be removed");
            }
        }
        if self.made {
            let _ = std::fs::remove_dir(&self.dir);
        }
    }
}

fn banner(terminal: &Terminal, server: &Server, data_dir: &Path, keep: bool) {
    let paint = terminal.stderr_paint();
    terminal.note(&format!(
        "{} {}: a server and an agent in one process\n  API     https://{}\n  login   the CLI is logged in (context `dev`); the token for others is in {}\n  data    {}{}",
        paint.bold("Optimus dev"),
        env!("CARGO_PKG_VERSION"),
        server.api_addr,
        data_dir.join("server/admin.token").display(),
        data_dir.display(),
        if keep { ", kept" } else { ", removed at the end" },
    ));
    terminal.note(
        "  next    in another terminal: `optimus status`, `optimus deploy DIR`, `optimus logs -f NAME`; Ctrl-C here stops everything\n",
    );
}

/// The link to the console. Nothing depends on it, so a failure is told and no more.
async fn tell_console(session: &Session) {
    let terminal = session.terminal;
    if !optimus_control_plane::api::console_is_built() {
        return terminal.note("  console not in this binary: build it with `scripts/web build`, then build again\n");
    }
    match console::link(session).await {
        Ok((link, _)) => {
            terminal.note(&format!("  console {link}\n          good once, for five minutes; `optimus console` prints another\n"))
        }
        Err(failure) => failure.print(&terminal),
    }
}

/// Says loudly what this host cannot enforce, and how to get it.
fn unenforced(terminal: &Terminal, facts: &NodeFacts) {
    if facts.unenforced.is_empty() {
        return;
    }
    let paint = terminal.stderr_paint();
    terminal.note(&paint.error("WARNING: limits are not enforced on this host"));
    for limit in &facts.unenforced {
        terminal.note(&format!("  {limit}"));
    }
    terminal.note(
        "  Workloads run all the same. To have the limits enforced, run as root, or give this user a cgroup of its own:\n  systemd-run --user --scope -p Delegate=yes optimus dev\n",
    );
}

fn next_steps(dirs: &[PathBuf]) -> String {
    format!("deployed {}; Ctrl-C stops everything", dirs.iter().map(|d| d.display().to_string()).collect::<Vec<_>>().join(", "))
}

/// The context written at the start follows the cluster's CAs while this server runs.
async fn keep_ca_known(server: &Server) -> std::convert::Infallible {
    let ours = context_of(server);
    let mut known = ours.ca_pem;
    loop {
        tokio::time::sleep(CA_LOOK_EVERY).await;
        let ca_pem = server.identity.ca_pem();
        if ca_pem == known {
            continue;
        }
        let mine = |context: &Context| context.url == ours.url && context.token == ours.token;
        match context::Store::open().and_then(|store| store.learn_ca(mine, &ca_pem)) {
            Ok(()) => known = ca_pem,
            Err(error) => tracing::warn!(%error, "the CLI's context does not know the cluster's CAs yet; trying again"),
        }
    }
}

fn context_of(server: &Server) -> Context {
    Context {
        url: format!("https://{}", reachable(server.api_addr)),
        ca_pem: server.identity.ca_pem(),
        token: server.admin_token.clone(),
        project: None,
        environment: None,
    }
}

/// An address that can be connected to, for one that is listened on.
fn reachable(addr: SocketAddr) -> SocketAddr {
    let ip = match addr.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => IpAddr::from([127, 0, 0, 1]),
        IpAddr::V6(_) => IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]),
    };
    SocketAddr::new(ip, addr.port())
}

/// The address of this host on the way to the first server: what others most likely reach it at.
fn address_towards(servers: &[String]) -> String {
    let found = servers.iter().find_map(|server| {
        // A UDP socket that is connected sends nothing; it only learns its own address.
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").ok()?;
        socket.connect(server.as_str()).ok()?;
        Some(socket.local_addr().ok()?.ip().to_string())
    });
    found.unwrap_or_else(|| "127.0.0.1".into())
}

/// `optimus-runner`, beside this binary.
fn runner() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("failed to find the path of this binary")?;
    let runner = own.with_file_name("optimus-runner");
    if !runner.exists() {
        bail!("{} is missing; it belongs beside {}", runner.display(), own.display());
    }
    Ok(runner)
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map_or_else(|_| "localhost".into(), |name| name.trim().to_owned())
}

fn is_root() -> bool {
    // SAFETY: geteuid has no arguments and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

fn logs(filter: &str) -> anyhow::Result<()> {
    telemetry::init(&telemetry::Options { format: Format::Text, filter: filter.into() })?;
    Ok(())
}

/// Waits for Ctrl-C or SIGTERM.
async fn asked_to_end() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
