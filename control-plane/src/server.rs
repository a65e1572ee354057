//! One server: what it is made of, in the order it starts; it stops in the reverse order.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use optimus_common::env::Env;
use optimus_host::disk::HostDisk;
use optimus_host::files::DataDirLock;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::api::{self, ApiConfig, ApiDeps};
use crate::auth::{self, Auth};
use crate::consensus::{CoreMachine, RaftConsensus};
use crate::gateway::{Gateway, GatewayConfig};
use crate::identity::{Identity, ServerNames};
use crate::leader;
use crate::metrics::Metrics;
use crate::raft::{NoPeers, RaftConfig, RaftNode, Tuning};
use crate::store::Store;

/// How long a server may take to lead itself after its start; more means its disk is broken.
const LEAD_WITHIN: Duration = Duration::from_secs(30);
/// This build runs one server; its id is fixed.
const SERVER_ID: u64 = 1;

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
    shutdown: CancellationToken,
    tasks: Vec<(&'static str, JoinHandle<()>)>,
    _lock: DataDirLock,
}

impl Server {
    pub async fn start(config: ServerConfig, env: Env) -> Result<Server, StartError> {
        let dir = &config.data_dir;
        optimus_host::files::create_private_dir(dir).map_err(step("create the data directory"))?;
        let lock = DataDirLock::acquire(dir).map_err(step("lock the data directory"))?;

        let disk = HostDisk::open(dir.join("raft")).map_err(step("open the log store"))?;
        let (machine, consensus) = RaftConsensus::machine();
        let raft = RaftNode::start(RaftConfig {
            node_id: SERVER_ID,
            disk: Arc::new(disk),
            machine,
            tuning: Tuning::default(),
            network: Arc::new(NoPeers),
        })
        .await
        .map_err(step("start consensus"))?;
        let consensus = consensus(raft.clone());
        match Self::on_raft(&config, env, raft.clone(), consensus, lock).await {
            Ok(server) => Ok(server),
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
        raft: RaftNode<CoreMachine>,
        consensus: RaftConsensus,
        lock: DataDirLock,
    ) -> Result<Server, StartError> {
        let dir = &config.data_dir;
        raft.initialize_single(&config.agent_listen.to_string()).await.map_err(step("create the cluster"))?;
        let store = Store::new(Arc::new(consensus), env.clone());
        lead(&raft).await?;

        let names = ServerNames { server: SERVER_ID, names: names_of(config) };
        let identity = Identity::open_or_create(dir, &store, &names).await.map_err(step("open the cluster's identity"))?;
        let token = auth::load_or_create(&dir.join("admin.token"), &*env.entropy).map_err(step("open the admin token"))?;

        let shutdown = CancellationToken::new();
        let gateway = Gateway::bind(
            store.clone(),
            identity.clone(),
            GatewayConfig { listen: config.agent_listen, advertise: config.advertise.clone() },
        )
        .map_err(step(format!("listen for agents on {} (UDP)", config.agent_listen)))?;
        gateway.set_peers(Arc::new(raft.clone()));
        raft.set_handler(gateway.lease_handler());
        let listener = TcpListener::bind(config.api_listen).await.map_err(step(format!("listen for the API on {}", config.api_listen)))?;
        let api_addr = listener.local_addr().map_err(step("listen for the API"))?;
        let api_config = ApiConfig {
            listeners: vec![listener],
            tls: identity.api_tls().map_err(step("prepare TLS for the API"))?,
            allowed_hosts: config.allow_hosts.clone(),
            limits: api::Limits::default(),
        };
        let deps = ApiDeps {
            store: store.clone(),
            agents: gateway.clone(),
            auth: Arc::new(Auth::new(&token)),
            joins: gateway.clone(),
            metrics: Arc::new(Metrics::new()),
        };

        let (own_identity, own_gateway, token_of) = (Arc::clone(&identity), Arc::clone(&gateway), || shutdown.child_token());
        let (identity_end, gateway_end) = (token_of(), token_of());
        let tasks = vec![
            ("identity", tokio::spawn(async move { own_identity.run(identity_end).await })),
            ("gateway", tokio::spawn(async move { own_gateway.run(gateway_end).await })),
            ("leader", tokio::spawn(leader::run(store.clone(), token_of()))),
            ("api", tokio::spawn(serve(api_config, deps, token_of()))),
        ];
        Ok(Server { store, identity, gateway, api_addr, admin_token: token.expose().to_owned(), raft, shutdown, tasks, _lock: lock })
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
