//! Three servers whose consensus runs over these connections.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use optimus_common::disk::sim::MemDisk;
use serde::{Deserialize, Serialize};

use super::*;
use crate::raft::{Capture, Machine, ProposeError, RaftConfig, RaftNode, Role, Tuning};

/// Numbers under names.
#[derive(Default)]
pub(super) struct Table {
    values: BTreeMap<String, u64>,
    seen: Arc<Mutex<BTreeMap<String, u64>>>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Set(pub String, pub u64);

impl Machine for Table {
    type Command = Set;
    type Answer = ();

    fn apply(&mut self, _: u64, Set(name, value): Set) {
        self.values.insert(name, value);
    }
    fn snapshot(&self) -> Capture {
        let values = self.values.clone();
        Box::new(move || rmp_serde::to_vec_named(&values).unwrap())
    }
    fn restore(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.values = rmp_serde::from_slice(bytes).map_err(|e| e.to_string())?;
        Ok(())
    }
    fn published(&mut self, _: u64) {
        *self.seen.lock().unwrap() = self.values.clone();
    }
}

/// The node, once it runs: its port must be known before.
#[derive(Default)]
struct Late(OnceLock<RaftNode<Table>>);

impl PeerHandler for Late {
    fn handle(&self, from: u64, kind: PeerRpc, body: Bytes) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        match self.0.get() {
            Some(node) => node.handle(from, kind, body),
            None => Box::pin(async { Err(PeerError::Refused("this server is still starting".to_owned())) }),
        }
    }
}

pub(super) struct Member {
    pub node: RaftNode<Table>,
    pub peers: Arc<QuicPeers>,
    seen: Arc<Mutex<BTreeMap<String, u64>>>,
    listening: Listening,
    disk: MemDisk,
}

impl Member {
    async fn start(settings: PeerSettings, at: Option<SocketAddr>, disk: MemDisk, tuning: Tuning) -> Self {
        let peers = QuicPeers::new(settings.clone()).unwrap();
        let late = Arc::new(Late::default());
        let server = PeerServer::new(&settings, late.clone(), Some(peers.clone()));
        let node_id = settings.server;
        let listening = Listening::serve(settings, server, at);
        let machine = Table::default();
        let seen = machine.seen.clone();
        let config = RaftConfig { node_id, disk: Arc::new(disk.clone()), machine, tuning, network: peers.clone() };
        let node = RaftNode::start(config).await.unwrap();
        assert!(late.0.set(node.clone()).is_ok());
        Member { node, peers, seen, listening, disk }
    }

    /// The network falls away first, as when a process dies.
    async fn kill(self) -> (PeerSettings, SocketAddr, MemDisk) {
        let Member { node, peers, seen: _, listening, disk } = self;
        let (settings, addr) = listening.kill();
        node.shutdown().await;
        peers.close_endpoint().await;
        (settings, addr, disk)
    }
}

pub(super) struct Three {
    pub members: BTreeMap<u64, Member>,
    tuning: Tuning,
}

impl Three {
    pub async fn found(tuning: Tuning) -> Self {
        let world = World::new();
        let mut members = BTreeMap::new();
        for number in 1..=3 {
            let settings = world.settings(number, world.server(number));
            members.insert(number, Member::start(settings, None, MemDisk::new(), tuning.clone()).await);
        }
        let addresses = members.iter().map(|(n, m)| (*n, m.listening.addr.to_string())).collect();
        members[&1].node.initialize(addresses).await.unwrap();
        Three { members, tuning }
    }

    pub async fn leader(&self) -> u64 {
        let mut found = None;
        eventually("a leader", || {
            found = self.members.iter().find(|(_, m)| m.node.status().role == Role::Leader).map(|(n, _)| *n);
            found.is_some_and(|leader| self.members.values().filter(|m| m.node.status().leader == Some(leader)).count() >= 2)
        })
        .await;
        found.unwrap()
    }

    async fn write(&self, name: &str, value: u64) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            for member in self.members.values() {
                match member.node.propose(Set(name.to_owned(), value)).await {
                    Ok(_) => return,
                    Err(ProposeError::NoLeader { .. } | ProposeError::Timeout | ProposeError::Unknown) => {}
                    Err(e) => panic!("{e}"),
                }
            }
            assert!(Instant::now() < deadline, "{name}: no server took it within 20 s");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn restart(&mut self, number: u64) {
        let (settings, addr, disk) = self.members.remove(&number).unwrap().kill().await;
        let member = Member::start(settings, Some(addr), disk, self.tuning.clone()).await;
        self.members.insert(number, member);
    }

    async fn all_hold(&self, count: usize) {
        eventually("all servers hold the same", || self.members.values().all(|m| m.seen.lock().unwrap().len() == count)).await;
    }

    pub async fn stop(self) {
        for (_, member) in self.members {
            member.kill().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_servers_elect_replicate_and_take_a_restarted_one_back() {
    let mut three = Three::found(Tuning::fast()).await;
    let leader = three.leader().await;
    for n in 0..20 {
        three.write(&format!("a{n}"), n).await;
    }
    three.all_hold(20).await;

    let follower = (1..=3).find(|n| *n != leader).unwrap();
    three.restart(follower).await;
    for n in 0..20 {
        three.write(&format!("b{n}"), n).await;
    }
    three.all_hold(40).await;

    let leader = three.leader().await;
    three.restart(leader).await;
    for n in 0..20 {
        three.write(&format!("c{n}"), n).await;
    }
    three.all_hold(60).await;
    three.stop().await;
}
