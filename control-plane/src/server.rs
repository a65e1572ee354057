//! One server: what it is made of, in the order it starts; it stops in the reverse order.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use optimus_common::disk::Disk;
use optimus_common::env::Env;
use optimus_core::state::{LEVEL, ServerFacts};
use optimus_host::disk::HostDisk;
use optimus_host::files::DataDirLock;
use optimus_host::home::Home;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::announce::{self, Announcement};
use crate::api::{self, ApiConfig, ApiDeps};
use crate::auth::{self, Auth};
use crate::cluster_admin::{self, RaftAdmin, ServerAdmin};
use crate::consensus::{CoreMachine, RaftConsensus};
use crate::gateway::{Gateway, GatewayConfig};
use crate::identity::record::Record;
use crate::identity::{Identity, ServerNames, host_name, joining};
use crate::leader;
use crate::membership;
use crate::metrics::Metrics;
use crate::peer_link::PeerLink;
use crate::peers::{PeerServer, QuicPeers};
use crate::raft::{self, PeerError, PeerHandler, PeerRpc, RaftConfig, RaftNode, Tuning};
use crate::rescue::{self, archive, archiver::Archiver, schedule::Figures, schedule::Schedule};
use crate::rotation;
use crate::server_clock;
use crate::store::Store;

/// How long a server may take to lead itself after its start; more means its disk is broken.
const LEAD_WITHIN: Duration = Duration::from_secs(30);
/// Longest wait at the end for answers to other servers.
const CLOSE_PATIENCE: Duration = Duration::from_secs(1);
/// Raft id of the server that founds the cluster; the others get theirs when they join, a restored one from its store.
const FOUNDER: u64 = 1;

#[derive(Debug, Clone)]
pub struct ServerConfig {
    pub data_dir: PathBuf,
    pub api_listen: SocketAddr,
    /// UDP address agents connect to.
    pub agent_listen: SocketAddr,
    /// `host:port` agents reach this server at, if not `agent_listen`. For join tokens.
    pub advertise: Vec<String>,
    /// Further host names the API answers to.
    pub allow_hosts: Vec<String>,
    /// Token of the cluster to join. Not needed, and not used, by a server that is a member already.
    pub join: Option<String>,
    /// Scheduled exports and the archive.
    pub rescue: rescue::Options,
}

/// Why a server did not start. The message names the step; the cause is in `source`.
#[derive(Debug, thiserror::Error)]
#[error("failed to {step}")]
pub struct StartError {
    step: String,
    #[source]
    source: Box<dyn std::error::Error + Send + Sync>,
}

fn step<E: Into<Box<dyn std::error::Error + Send + Sync>>>(step: impl Into<String>) -> impl FnOnce(E) -> StartError {
    let step = step.into();
    move |source| StartError { step, source: source.into() }
}

/// A running server.
pub struct Server {
    pub store: Store,
    pub identity: Arc<Identity>,
    pub gateway: Arc<Gateway>,
    /// Where the API really listens.
    pub api_addr: SocketAddr,
    pub admin_token: String,
    raft: RaftNode<CoreMachine>,
    calls: Arc<QuicPeers>,
    serve_peers: PeerServer,
    left: watch::Sender<Option<String>>,
    shutdown: CancellationToken,
    tasks: Vec<(&'static str, JoinHandle<()>)>,
    /// The runtime of consensus and QUIC, and the lock of the data directory; the last to go.
    base: Option<(Home, DataDirLock)>,
}

impl Server {
    pub async fn start(config: ServerConfig, env: Env) -> Result<Server, StartError> {
        let dir = &config.data_dir;
        optimus_host::files::create_private_dir(dir).map_err(step("create the data directory"))?;
        let lock = DataDirLock::acquire(dir).map_err(step("lock the data directory"))?;

        let record = match (Record::load(dir).map_err(step("read who this server is"))?, &config.join) {
            (Some(record), _) => Some(record),
            (None, None) => None,
            (None, Some(token)) => {
                let facts = facts(&config, None);
                Some(joining::join(token, &facts, dir, &env).await.map_err(step("join the cluster"))?)
            }
        };
        let disk: Arc<dyn Disk> = Arc::new(HostDisk::open(dir.join("raft")).map_err(step("open the log store"))?);
        let owner = raft::owner(&*disk).map_err(step("open the log store"))?;
        // A restored or recovered store begins a cluster of its own: what the record says is of the one before.
        let record = record.filter(|r| owner.is_none_or(|id| id == r.server));
        let (machine, consensus) = RaftConsensus::machine();
        let peers = Arc::new(PeerLink::default());
        let home = Home::new("consensus").map_err(step("start the thread of consensus"))?;
        let starting = RaftNode::start(RaftConfig {
            node_id: owner.or(record.as_ref().map(|r| r.server)).unwrap_or(FOUNDER),
            disk,
            machine,
            tuning: Tuning::default(),
            network: peers.clone(),
        });
        let raft = home.run(starting).await.map_err(step("start consensus"))?;
        let consensus = consensus(raft.clone());
        match Self::on_raft(&config, env, record, peers, raft.clone(), consensus, &home).await {
            Ok(mut server) => {
                server.base = Some((home, lock));
                Ok(server)
            }
            Err(error) => {
                raft.shutdown().await;
                Err(error)
            }
        }
    }

    /// The steps that stand on consensus.
    async fn on_raft(
        config: &ServerConfig,
        env: Env,
        record: Option<Record>,
        peers: Arc<PeerLink>,
        raft: RaftNode<CoreMachine>,
        consensus: RaftConsensus,
        home: &Home,
    ) -> Result<Server, StartError> {
        let dir = &config.data_dir;
        if record.is_none() {
            raft.initialize_single(&config.agent_listen.to_string()).await.map_err(step("create the cluster"))?;
        }
        let store = Store::new(Arc::new(consensus), env.clone());
        // With peers the others are waited for while this server serves already.
        let alone = raft.is_alone().await;
        if alone {
            lead(&raft).await?;
        }

        let names = ServerNames { server: raft.id(), names: names_of(config) };
        let identity = match record {
            Some(record) => Identity::open(dir, record, &names, &env),
            None => Identity::found(dir, &store, &names).await,
        }
        .map_err(step("open the cluster's identity"))?;
        let token = auth::load_or_create(&dir.join(auth::TOKEN_FILE), &*env.entropy).map_err(step("open the admin token"))?;

        // Opened before anything serves: a directory that cannot be written must be known now, not on the day it is needed.
        let own_dir = |dir: &std::path::Path| -> Result<Arc<dyn Disk>, StartError> {
            let dir = archive::server_dir(dir, raft.id());
            Ok(Arc::new(HostDisk::open(&dir).map_err(step(format!("open {} for exports", dir.display())))?))
        };
        let schedule = config.rescue.schedule.clone().map(|o| own_dir(&o.dir).map(|disk| (o, disk))).transpose()?;
        let archive = config.rescue.archive.clone().map(|o| own_dir(&o.dir).map(|disk| (o, disk))).transpose()?;

        let settings = identity.peer_settings(Arc::new(identity.members().clone()));
        let agents = GatewayConfig { listen: config.agent_listen, advertise: config.advertise.clone(), admin: token.clone() };
        let (calls, serve_peers, gateway) = {
            let _home = home.enter();
            let calls = QuicPeers::new(settings.clone()).map_err(step("open a socket to reach other servers"))?;
            let serve_peers = PeerServer::new(&settings, Arc::new(raft.clone()), Some(calls.clone()));
            let gateway = Gateway::bind_with_peers(store.clone(), identity.clone(), agents, Some(Arc::new(serve_peers.clone())))
                .map_err(step(format!("listen for agents on {} (UDP)", config.agent_listen)))?;
            (calls, serve_peers, gateway)
        };
        gateway.set_peers(Arc::new(raft.clone()));
        let listener = TcpListener::bind(config.api_listen).await.map_err(step(format!("listen for the API on {}", config.api_listen)))?;
        let api_addr = listener.local_addr().map_err(step("listen for the API"))?;
        peers.connect(calls.clone(), identity.members().clone());
        raft.set_handler(Arc::new(PeerCalls {
            admin: RaftAdmin(raft.clone()),
            leases: gateway.lease_handler(),
            identity: identity.clone(),
            env: env.clone(),
        }));
        let listening = Some((gateway.local_addr(), api_addr));
        let own = Announcement { server: raft.id(), facts: facts(config, listening), key_fingerprint: identity.key_fingerprint(), alone };
        let api_config = ApiConfig {
            listeners: vec![listener],
            tls: identity.api_tls().map_err(step("prepare TLS for the API"))?,
            allowed_hosts: config.allow_hosts.clone(),
            limits: api::Limits::default(),
        };
        let metrics = Arc::new(Metrics::new());
        let (exports, archived) = Figures::register(metrics.registry());
        let deps = ApiDeps {
            store: store.clone(),
            agents: gateway.clone(),
            auth: Arc::new(Auth::new(&token)),
            joins: gateway.clone(),
            secrets: identity.clone(),
            cluster: Arc::new(ServerAdmin { raft: RaftAdmin(raft.clone()), identity: identity.clone(), store: store.clone() }),
            metrics,
        };

        let mut server = Server {
            store: store.clone(),
            identity: identity.clone(),
            gateway: gateway.clone(),
            api_addr,
            admin_token: token.expose().to_owned(),
            raft: raft.clone(),
            calls,
            serve_peers,
            left: watch::Sender::new(None),
            shutdown: CancellationToken::new(),
            tasks: Vec::new(),
            base: None,
        };
        let end = || server.shutdown.child_token();
        let (identity_end, gateway_end, announce_end) = (end(), end(), end());
        let left = server.left.clone();
        let mut tasks = vec![
            (
                "identity",
                tokio::spawn({
                    let store = store.clone();
                    async move { identity.run(store, identity_end).await }
                }),
            ),
            ("CA rotation", tokio::spawn(rotation::run(store.clone(), end()))),
            ("gateway", tokio::spawn(async move { gateway.run(gateway_end).await })),
            ("leader", tokio::spawn(leader::run(store.clone(), end()))),
            ("clock", tokio::spawn(server_clock::run(store.clone(), RaftAdmin(raft.clone()), raft.id(), end()))),
            ("membership", tokio::spawn(membership::run(store.clone(), raft, end()))),
            (
                "announce",
                tokio::spawn(async move {
                    if let Some(why) = announce::run(store, own, announce_end).await {
                        left.send_replace(Some(why));
                    }
                }),
            ),
            ("api", tokio::spawn(serve(api_config, deps, end()))),
        ];
        if let Some((options, disk)) = schedule {
            let rescue::schedule::ScheduleOptions { dir: _, lock, every, keep } = options;
            let schedule = Schedule { store: server.store.clone(), disk, lock, every, keep, figures: exports };
            tasks.push(("exports", tokio::spawn(schedule.run(end()))));
        }
        if let Some((options, disk)) = archive {
            let rescue::archiver::ArchiveOptions { dir: _, lock, keep } = options;
            let archiver = Archiver::new(server.raft.clone(), server.store.clone(), disk, lock, keep, archived);
            tasks.push(("archive", tokio::spawn(archiver.run(end()))));
        }
        server.tasks = tasks;
        Ok(server)
    }

    /// Resolves with the news when this server has left the cluster, or was removed: it has nothing more to do.
    pub async fn left(&self) -> String {
        let mut left = self.left.subscribe();
        match left.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or_default(),
            Err(_) => std::future::pending().await,
        }
    }

    /// Resolves with the cause when the server can no longer keep its promises and must end.
    pub async fn fatal(&self) -> String {
        self.raft.fatal().await
    }

    /// Stops in the reverse order of the start and waits for every task.
    pub async fn stop(mut self) {
        self.shutdown.cancel();
        while let Some((name, task)) = self.tasks.pop() {
            if let Err(error) = task.await {
                tracing::error!(task = name, %error, "task ended badly");
            }
        }
        self.raft.shutdown().await;
        // Last: handing leadership over takes the way to the others.
        self.serve_peers.close(CLOSE_PATIENCE).await;
        self.calls.close_endpoint().await;
        drop(self.base.take());
    }
}

/// What peers ask beside Raft's own requests.
struct PeerCalls {
    admin: RaftAdmin<CoreMachine>,
    leases: Arc<dyn PeerHandler>,
    identity: Arc<Identity>,
    env: Env,
}

impl PeerHandler for PeerCalls {
    fn handle(&self, from: u64, kind: PeerRpc, body: Bytes) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        match kind {
            PeerRpc::Leases => self.leases.handle(from, kind, body),
            PeerRpc::Admin => {
                if let Some(answer) = cluster_admin::clock_answer(&body, self.env.clock.now()) {
                    return Box::pin(async { Ok(answer) });
                }
                let (admin, identity) = (RaftAdmin(self.admin.0.clone()), self.identity.clone());
                Box::pin(async move {
                    match cluster_admin::key_answer(&body, &identity) {
                        Some(answer) => Ok(answer),
                        None => admin.handle(&body).await,
                    }
                })
            }
            other => Box::pin(async move { Err(PeerError::Refused(format!("{other:?} requests are not served here"))) }),
        }
    }
}

async fn serve(config: ApiConfig, deps: ApiDeps, shutdown: CancellationToken) {
    if let Err(error) = api::serve(config, deps, shutdown).await {
        tracing::error!(%error, "the API ended");
    }
}

/// Waits until this server leads: with one voter, as soon as its disk has taken the vote.
async fn lead(raft: &RaftNode<CoreMachine>) -> Result<(), StartError> {
    let mut leading = raft.is_leader();
    let wait = async {
        while !*leading.borrow_and_update() {
            if leading.changed().await.is_err() {
                return Err("consensus ended");
            }
        }
        Ok(())
    };
    match tokio::time::timeout(LEAD_WITHIN, wait).await {
        Ok(result) => result.map_err(step("become leader"))?,
        Err(_) => return Err(step("become leader")("no vote was stored in time")),
    }
    // What was committed before must be in the state before anything reads it.
    raft.linearizable().await.map_err(step("become leader"))?;
    Ok(())
}

fn names_of(config: &ServerConfig) -> Vec<String> {
    let mut names = config.allow_hosts.clone();
    names.push(config.api_listen.ip().to_string());
    for address in &config.advertise {
        names.push(address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host).trim_matches(['[', ']']).to_owned());
    }
    names
}

/// What this server says of itself; `listening` are its real addresses (UDP and API), once they are known.
fn facts(config: &ServerConfig, listening: Option<(SocketAddr, SocketAddr)>) -> ServerFacts {
    let (agents, api) = listening.unwrap_or((config.agent_listen, config.api_listen));
    let address = config.advertise.first().cloned().unwrap_or_else(|| agents.to_string());
    let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host);
    ServerFacts {
        name: host_name().unwrap_or_else(|| "unknown".to_owned()),
        api: format!("{host}:{}", api.port()),
        address,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        level: LEVEL,
    }
}
