//! One server: the product's consensus, store, state and peers, with etcd's put for a front door.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use optimus_common::protocol::ALPN_RAFT;
use optimus_control_plane::consensus::{CoreMachine, RaftConsensus};
use optimus_control_plane::peers::{PeerServe as _, PeerServer, QuicPeers};
use optimus_control_plane::raft::{NoPeers, PeerTransport, RaftConfig, RaftNode, Tuning};
use optimus_core::state::{Applied, Command, Proposal, ServerFacts};
use optimus_host::disk::HostDisk;
use optimus_host::home::Home;
use optimus_host::{tls, transport};
use tokio::signal::unix::{SignalKind, signal};

use crate::{certs, door};

/// Longest wait for a leader at the start.
const PATIENCE: Duration = Duration::from_secs(30);

/// Serves until it is killed. Says on its output when it begins to lead; SIGUSR1 makes it hand leadership over.
pub async fn run(dir: &str, certs: &Path, id: u64, peers: &str, doors: &str) -> anyhow::Result<()> {
    let addresses: Vec<SocketAddr> = peers.split(',').map(str::parse).collect::<Result<_, _>>()?;
    let doors: Vec<SocketAddr> = doors.split(',').map(str::parse).collect::<Result<_, _>>()?;
    let own = |list: &[SocketAddr]| list.get(id as usize - 1).copied().context("no address for this server");
    let (settings, shown) = certs::load(certs, id, addresses.len() as u64)?;
    // As the product has it: consensus and QUIC on a runtime of their own, the front door on that of the process.
    let home = Home::new("consensus")?;
    let calls = {
        let _home = home.enter();
        QuicPeers::new(settings.clone())?
    };
    let alone = addresses.len() == 1;
    let network: Arc<dyn PeerTransport> = if alone { Arc::new(NoPeers) } else { calls.clone() };
    let (machine, consensus) = RaftConsensus::machine();
    let disk = Arc::new(HostDisk::open(dir)?);
    let node = home.run(RaftNode::start(RaftConfig { node_id: id, disk, machine, tuning: Tuning::default(), network })).await?;
    let consensus = consensus(node.clone());

    let tls = tls::machine_server(&settings.roots, shown, settings.pins.clone(), &[ALPN_RAFT], &settings.env.clock)?;
    let (endpoint, server) = {
        let _home = home.enter();
        let endpoint = transport::server_endpoint(transport::server_config(tls)?, own(&addresses)?, &[id as u8; 32])?;
        (endpoint, PeerServer::new(&settings, Arc::new(node.clone()), Some(calls)))
    };
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let server = server.clone();
            tokio::spawn(async move {
                if let Ok(connection) = incoming.await {
                    server.serve(connection).await;
                }
            });
        }
    });
    if id == 1 {
        let members: BTreeMap<u64, String> = (1..).zip(addresses.iter().map(ToString::to_string)).collect();
        node.initialize(members).await?;
        admit(&node).await?;
    }
    tokio::spawn(door::serve(own(&doors)?, Arc::new(consensus)));
    announce(node).await
}

/// The row that every put changes.
async fn admit(node: &RaftNode<CoreMachine>) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let command = Command::AdmitServer { token: None, server: facts(String::new()), key_fingerprint: vec![1] };
        match node.propose(Proposal { at: HostTime::now(), request: None, command }).await {
            Ok((_, Applied::Done { .. } | Applied::Unchanged { .. })) => return Ok(()),
            other => anyhow::ensure!(Instant::now() < end, "no first write: {other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub fn facts(value: String) -> ServerFacts {
    ServerFacts { name: String::new(), address: String::new(), api: String::new(), version: value, level: u32::MAX }
}

/// The wall clock, as the product's own proposals carry it.
pub struct HostTime;

impl HostTime {
    pub fn now() -> optimus_common::Timestamp {
        optimus_common::env::Clock::now(&optimus_host::clock::HostClock)
    }
}

async fn announce(node: RaftNode<CoreMachine>) -> anyhow::Result<()> {
    let (mut leads, mut hand_over) = (node.is_leader(), signal(SignalKind::user_defined1())?);
    loop {
        let now = *leads.borrow_and_update();
        println!("{}", if now { "leads" } else { "follows" });
        std::io::stdout().flush()?;
        tokio::select! {
            changed = leads.changed() => changed?,
            _ = hand_over.recv() => println!("handed over: {:?}", node.transfer_leader(None).await),
            reason = node.fatal() => anyhow::bail!("stopped: {reason}"),
        }
    }
}
