//! Several servers over one store: agents hold their session with any of them, and move when theirs is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use optimus_agent::link::{AgentIdentity, LinkStatus, join};
use optimus_common::Timestamp;
use optimus_common::join_token::Role;
use optimus_control_plane::auth::AdminToken;
use optimus_control_plane::gateway::{Gateway, GatewayConfig, LeaseReports};
use optimus_control_plane::identity::{Identity, ServerNames};
use optimus_control_plane::join_tokens::JoinTokens;
use optimus_control_plane::raft::{PeerError, PeerHandler, PeerRpc};
use optimus_control_plane::store::{Consensus, ConsensusStatus, ProposeError, Store};
use optimus_core::state::{Applied, Command, Proposal, ServerRow, State};
use tokio::net::UdpSocket;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::support::*;

/// What all servers of a test share.
struct World {
    store: Arc<TestStore>,
    leader: AtomicU64,
    members: Mutex<BTreeMap<u64, String>>,
    handlers: Mutex<BTreeMap<u64, Arc<dyn PeerHandler>>>,
    /// Servers the others cannot reach.
    cut: Mutex<BTreeSet<u64>>,
    /// Servers whose state does not move.
    behind: Mutex<BTreeMap<u64, State>>,
    downs: AtomicU64,
}

/// One server's view of it.
#[derive(Clone)]
struct View {
    id: u64,
    world: Arc<World>,
}

impl Consensus for View {
    fn propose(&self, proposal: Proposal) -> Pin<Box<dyn Future<Output = Result<Applied, ProposeError>> + Send + '_>> {
        Box::pin(async move {
            tokio::task::yield_now().await;
            if self.world.cut.lock().unwrap().contains(&self.id) {
                return Err(ProposeError::NoLeader { retry_after: optimus_common::Span::millis(10) });
            }
            if matches!(proposal.command, Command::NodeDown { .. }) {
                self.world.downs.fetch_add(1, Ordering::Relaxed);
            }
            Ok(self.world.store.commit(proposal))
        })
    }
    fn state(&self) -> State {
        self.world.behind.lock().unwrap().get(&self.id).cloned().unwrap_or_else(|| self.world.store.now())
    }
    fn applied(&self) -> watch::Receiver<u64> {
        self.world.store.applied()
    }
    fn linearizable(&self) -> Pin<Box<dyn Future<Output = Result<(), ProposeError>> + Send + '_>> {
        Box::pin(async { Ok(()) })
    }
    fn status(&self) -> ConsensusStatus {
        let leader = self.world.leader.load(Ordering::Relaxed);
        let members = self.world.members.lock().unwrap().clone();
        ConsensusStatus { server: self.id, leader: Some(leader), is_leader: leader == self.id, members, ..ConsensusStatus::default() }
    }
}

impl LeaseReports for View {
    fn ask_leader(&self, body: Bytes, _ttl: Duration) -> BoxFuture<'_, Result<Bytes, PeerError>> {
        Box::pin(async move {
            let leader = self.world.leader.load(Ordering::Relaxed);
            let cut = |id: u64| self.world.cut.lock().unwrap().contains(&id);
            let handler = self.world.handlers.lock().unwrap().get(&leader).cloned();
            match handler.filter(|_| !cut(leader) && !cut(self.id)) {
                Some(handler) => handler.handle(self.id, PeerRpc::Leases, body).await,
                None => Err(PeerError::Unreachable(format!("server {leader}"))),
            }
        })
    }
}

/// A wire to a server that can be cut without a farewell.
struct Wire {
    address: SocketAddr,
    cut: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Wire {
    async fn to(target: watch::Receiver<Option<SocketAddr>>) -> Wire {
        let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let (address, cut) = (front.local_addr().unwrap(), Arc::new(AtomicBool::new(false)));
        let dropped = cut.clone();
        let task = tokio::spawn(async move {
            let mut target = target;
            let to = target.wait_for(Option::is_some).await.unwrap().unwrap();
            let mut backs: BTreeMap<SocketAddr, Arc<UdpSocket>> = BTreeMap::new();
            let mut ways_back = tokio::task::JoinSet::new();
            let mut packet = vec![0; 2048];
            loop {
                let Ok((length, from)) = front.recv_from(&mut packet).await else { continue };
                if let std::collections::btree_map::Entry::Vacant(new) = backs.entry(from) {
                    let back = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
                    back.connect(to).await.unwrap();
                    new.insert(back.clone());
                    let (front, dropped) = (front.clone(), dropped.clone());
                    ways_back.spawn(async move {
                        let mut packet = vec![0; 2048];
                        loop {
                            let Ok(length) = back.recv(&mut packet).await else { continue };
                            if !dropped.load(Ordering::Relaxed) {
                                let _ = front.send_to(&packet[..length], from).await;
                            }
                        }
                    });
                }
                if !dropped.load(Ordering::Relaxed) {
                    let _ = backs[&from].send(&packet[..length]).await;
                }
            }
        });
        Wire { address, cut, task }
    }
}

struct OneServer {
    gateway: Arc<Gateway>,
    wire: Wire,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

struct Cluster {
    world: Arc<World>,
    servers: BTreeMap<u64, OneServer>,
}

impl Cluster {
    async fn start(test: &TestEnv, dir: &Path, count: u64) -> Cluster {
        let world = Arc::new(World {
            store: TestStore::new(),
            leader: AtomicU64::new(1),
            members: Mutex::default(),
            handlers: Mutex::default(),
            cut: Mutex::default(),
            behind: Mutex::default(),
            downs: AtomicU64::new(0),
        });
        let mut wires = BTreeMap::new();
        for id in 1..=count {
            let (found, target) = watch::channel(None);
            let wire = Wire::to(target).await;
            let address = wire.address.to_string();
            world.members.lock().unwrap().insert(id, address.clone());
            world.store.edit(|state| {
                let row = ServerRow {
                    id,
                    name: format!("s{id}"),
                    api: address.clone(),
                    address: address.clone(),
                    key_fingerprint: vec![],
                    version: "test".into(),
                    level: 2,
                    joined_at: Timestamp(0),
                    leaving: false,
                    ca_trusted: 0,
                    ca_signer: 0,
                    clock_skew_ms: None,
                };
                state.servers.insert(id, Arc::new(row));
            });
            wires.insert(id, (found, wire));
        }
        let mut servers = BTreeMap::new();
        for (id, (found, wire)) in wires {
            let view = View { id, world: world.clone() };
            let store = Store::new(Arc::new(view.clone()), test.env.clone());
            // One identity: how servers come to share the cluster's key is another story.
            let identity = Identity::found(dir, &store, &ServerNames { server: id, names: vec![] }).await.unwrap();
            let config = GatewayConfig {
                listen: "127.0.0.1:0".parse().unwrap(),
                advertise: vec![wire.address.to_string()],
                admin: AdminToken::generate(&*test.env.entropy),
            };
            let gateway = Gateway::bind(store, identity, config).unwrap();
            found.send_replace(Some(gateway.local_addr()));
            gateway.set_peers(Arc::new(view));
            world.handlers.lock().unwrap().insert(id, gateway.lease_handler());
            let stop = CancellationToken::new();
            let task = tokio::spawn({
                let (gateway, stop) = (gateway.clone(), stop.clone());
                async move { gateway.run(stop).await }
            });
            servers.insert(id, OneServer { gateway, wire, stop, task });
        }
        Cluster { world, servers }
    }

    async fn joined(&self, test: &TestEnv, dir: &Path) -> AgentIdentity {
        let token = self.servers[&1].gateway.create(Role::Agent, HOUR, 1).await.unwrap().token;
        join(&token, "host-1", dir, &test.env).await.unwrap()
    }

    fn lead(&self, id: u64) {
        self.world.leader.store(id, Ordering::Relaxed);
    }

    /// The server whose word the agent has.
    fn server_of(&self, agent: &Agent) -> Option<u64> {
        let LinkStatus::Connected { server } = agent.status.borrow().clone() else { return None };
        self.servers.iter().find(|(_, s)| s.wire.address.to_string() == server).map(|(id, _)| *id)
    }

    async fn connected(&self, agent: &Agent) -> u64 {
        until("the agent is connected", || self.server_of(agent).is_some()).await;
        self.server_of(agent).unwrap()
    }

    /// Neither agents nor servers reach it any more, and nobody is told.
    fn kill(&self, id: u64) {
        self.servers[&id].wire.cut.store(true, Ordering::Relaxed);
        self.world.cut.lock().unwrap().insert(id);
    }

    /// Watches for longer than a lease that the node stays up.
    async fn stays_up(&self, node: optimus_common::NodeId, from: Instant) {
        until("a lease is over", || {
            assert!(self.world.store.is_up(node), "declared down {:?} after the fault", from.elapsed());
            from.elapsed() > Duration::from_secs(8)
        })
        .await;
        assert_eq!(self.world.downs.load(Ordering::Relaxed), 0);
    }

    async fn stop(self) {
        for (_, server) in self.servers {
            server.stop.cancel();
            server.task.await.unwrap();
            server.wire.task.abort();
        }
    }
}

async fn moves_when_its_server_dies(it_leads: bool) {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let cluster = Cluster::start(&test, dir.path(), 2).await;
    let identity = cluster.joined(&test, node_dir.path()).await;
    let node = identity.node;
    let agent = Agent::start(identity, Arc::new(FakeWorkloads::default()), &test.env);
    let first = cluster.connected(&agent).await;
    let other = 3 - first;
    let (leader, follower) = if it_leads { (first, other) } else { (other, first) };
    cluster.lead(leader);
    until("the node is up", || cluster.world.store.is_up(node)).await;
    if !it_leads {
        until("the leader is told who hears the node", || cluster.servers[&leader].gateway.holder(node) == Some(follower)).await;
    }
    let learned = || AgentIdentity::open(node_dir.path()).unwrap().unwrap().learned;
    until("the addresses of all servers are stored", || learned().len() == 2).await;

    cluster.kill(first);
    cluster.lead(other);
    let died = Instant::now();
    until("the agent has moved", || cluster.server_of(&agent) == Some(other)).await;
    let took = died.elapsed();
    println!("moved {took:?} after its server died");
    assert!(took < Duration::from_millis(2500), "moved after {took:?}; two seconds are the aim, and a lease is five");
    let alloc = cluster.world.store.place(node);
    until("the other server serves it", || agent.workloads.ids() == [alloc]).await;
    cluster.stays_up(node, died).await;
    agent.stop().await;
    // A node that is silent there too is down after its lease, as ever.
    let left = Instant::now();
    until("the node is down", || !cluster.world.store.is_up(node)).await;
    assert!(left.elapsed() < Duration::from_secs(8), "down after {:?}", left.elapsed());
    cluster.stop().await;
}

#[tokio::test]
async fn an_agent_moves_when_the_follower_that_holds_its_session_dies() {
    moves_when_its_server_dies(false).await;
}

#[tokio::test]
async fn an_agent_moves_when_the_leader_that_holds_its_session_dies() {
    moves_when_its_server_dies(true).await;
}

#[tokio::test]
async fn a_server_cut_off_from_its_leader_sends_its_agents_to_others() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let cluster = Cluster::start(&test, dir.path(), 2).await;
    let identity = cluster.joined(&test, node_dir.path()).await;
    let node = identity.node;
    let agent = Agent::start(identity, Arc::new(FakeWorkloads::default()), &test.env);
    let first = cluster.connected(&agent).await;
    cluster.lead(3 - first);
    until("the leader is told", || cluster.servers[&(3 - first)].gateway.holder(node) == Some(first)).await;
    cluster.world.cut.lock().unwrap().insert(first);
    let cut = Instant::now();
    until("the agent has moved", || cluster.server_of(&agent) == Some(3 - first)).await;
    let took = cut.elapsed();
    assert!(took > Duration::from_secs(2), "an election takes as long: {took:?}");
    cluster.stays_up(node, cut).await;
    assert_eq!(cluster.servers[&first].gateway.connected(), []);
    agent.stop().await;
    cluster.stop().await;
}

#[tokio::test]
async fn a_server_that_is_behind_sends_the_agent_on() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let cluster = Cluster::start(&test, dir.path(), 2).await;
    let identity = cluster.joined(&test, node_dir.path()).await;
    let first = if identity.order()[0] == cluster.servers[&1].wire.address.to_string() { 1 } else { 2 };
    cluster.lead(3 - first);
    // What the first one knows ends here, and the agent holds more.
    let frozen = cluster.world.store.now();
    cluster.world.behind.lock().unwrap().insert(first, frozen);
    let alloc = cluster.world.store.place(identity.node);
    let workloads = Arc::new(FakeWorkloads::default());
    workloads.generation.store(cluster.world.store.now().index, Ordering::Relaxed);
    let agent = Agent::start(identity, workloads.clone(), &test.env);
    assert_eq!(cluster.connected(&agent).await, 3 - first);
    until("the set is there", || workloads.ids() == [alloc]).await;
    assert_eq!(workloads.refused.load(Ordering::Relaxed), 0);
    agent.stop().await;
    cluster.stop().await;
}

#[tokio::test]
async fn the_newest_session_of_a_node_wins_across_servers() {
    let (test, dir, node_dir) = (TestEnv::new(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let cluster = Cluster::start(&test, dir.path(), 3).await;
    let identity = cluster.joined(&test, node_dir.path()).await;
    let first = Agent::start(identity.clone(), Arc::new(FakeWorkloads::default()), &test.env);
    let at = cluster.connected(&first).await;
    // A third one leads, so both sessions are known by reports only.
    let others: Vec<u64> = (1..=3).filter(|id| *id != at).collect();
    cluster.lead(others[0]);
    until("the leader is told", || cluster.servers[&others[0]].gateway.holder(identity.node) == Some(at)).await;
    let mut status = first.status.clone();
    status.borrow_and_update();
    let mut clone = identity.clone();
    (clone.servers, clone.learned) = (vec![cluster.servers[&others[1]].wire.address.to_string()], vec![]);
    let second = Agent::start(clone, Arc::new(FakeWorkloads::default()), &test.env);
    tokio::time::timeout(PATIENCE, status.changed()).await.unwrap().unwrap();
    let seen = status.borrow_and_update().clone();
    assert!(matches!(&seen, LinkStatus::Disconnected { reason } if reason.contains("another server")), "{seen:?}");
    first.stop().await;
    second.stop().await;
    cluster.stop().await;
}
