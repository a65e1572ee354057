//! Three servers in one process.

use std::collections::BTreeSet;

use bytes::Bytes;
use optimus_common::disk::Disk;
use optimus_common::disk::sim::{Crash, MemDisk};

use super::super::network::Request;
use super::super::types::{AppendRequest, Vote};
use super::super::{MemoryNetwork, PeerError, PeerRpc, ProposeError, ReadError, Role};
use super::*;

pub(super) struct Cluster {
    pub(super) network: MemoryNetwork,
    disks: BTreeMap<u64, MemDisk>,
    pub(super) nodes: BTreeMap<u64, (Node, Seen)>,
    tuning: Tuning,
}

impl Cluster {
    pub(super) async fn found(tuning: Tuning) -> Self {
        let mut cluster = Self { network: MemoryNetwork::new(), disks: BTreeMap::new(), nodes: BTreeMap::new(), tuning };
        for id in 1..=3 {
            cluster.disks.insert(id, MemDisk::new());
            cluster.start(id).await;
        }
        let members = (1..=3).map(|id| (id, format!("s{id}:1"))).collect();
        cluster.nodes[&1].0.initialize(members).await.unwrap();
        cluster
    }

    pub(super) async fn start(&mut self, id: u64) {
        let (node, seen) = start(id, self.disks[&id].clone(), self.tuning.clone(), self.network.transport(id)).await.unwrap();
        self.network.connect(&node);
        self.nodes.insert(id, (node, seen));
    }

    /// Ends a server as a power cut does: what was not flushed is gone.
    pub(super) async fn kill(&mut self, id: u64) {
        self.network.disconnect(id);
        self.disks[&id].crash(Crash::LoseAll);
        let (node, _) = self.nodes.remove(&id).unwrap();
        node.shutdown().await;
    }

    /// The server that leads and is followed by a majority of those that run.
    pub(super) async fn leader(&self) -> u64 {
        let mut found = None;
        eventually("a leader", || {
            found = self.nodes.iter().find(|(id, (n, _))| n.status().role == Role::Leader && self.followed(**id)).map(|(id, _)| *id);
            found.is_some()
        })
        .await;
        found.unwrap()
    }

    fn followed(&self, leader: u64) -> bool {
        self.nodes.values().filter(|(n, _)| n.status().leader == Some(leader)).count() >= 2
    }

    /// Proposes wherever the leader is, until it is answered. The command must bear to be applied twice.
    pub(super) async fn write(&self, command: Command) -> u64 {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            for (node, _) in self.nodes.values() {
                match node.propose(command.clone()).await {
                    Ok((index, _)) => return index,
                    Err(ProposeError::NoLeader { .. } | ProposeError::Timeout | ProposeError::Unknown) => {}
                    Err(e) => panic!("{e}"),
                }
            }
            assert!(Instant::now() < deadline, "{command:?}: no server took it within 20 s");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub(super) async fn converged(&self) -> State {
        eventually("all servers hold the same", || {
            let states: Vec<_> = self.nodes.values().map(|(_, s)| s.lock().unwrap().clone()).collect();
            states.windows(2).all(|w| w[0] == w[1])
        })
        .await;
        self.nodes.values().next().unwrap().1.lock().unwrap().1.clone()
    }

    pub(super) async fn stop(self) {
        for (id, (node, _)) in &self.nodes {
            self.network.disconnect(*id);
            node.shutdown().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_servers_elect_replicate_and_survive_the_loss_of_the_leader() {
    let mut cluster = Cluster::found(Tuning::fast()).await;
    let first = cluster.leader().await;
    for n in 0..50 {
        cluster.write(set(&format!("k{n}"), n)).await;
    }
    cluster.converged().await;

    let follower = cluster.nodes.keys().copied().find(|id| *id != first).unwrap();
    let refused = cluster.nodes[&follower].0.propose_here(set("x", 1)).await;
    assert_eq!(refused, Err(ProposeError::NoLeader { leader: Some(first) }));
    assert_eq!(cluster.nodes[&follower].0.read_index().await, Err(ReadError::NoLeader { leader: Some(first) }));
    let read = cluster.nodes[&first].0.read_index().await.unwrap();
    cluster.nodes[&follower].0.wait_applied(read).await.unwrap();

    let stopped = Instant::now();
    cluster.kill(first).await;
    for n in 50..100 {
        cluster.write(set(&format!("k{n}"), n)).await;
        if n == 50 {
            println!("writes again {:?} after the leader was killed", stopped.elapsed());
        }
    }
    assert_ne!(cluster.leader().await, first);
    cluster.start(first).await;
    let state = cluster.converged().await;
    assert_eq!(state.values.len(), 100);
    assert!((0..100).all(|n| state.values[&format!("k{n}")] == n));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_survive_the_power_loss_of_all_servers() {
    let mut cluster = Cluster::found(Tuning::fast()).await;
    cluster.leader().await;
    for round in 0..3 {
        for n in 0..20 {
            cluster.write(set(&format!("r{round}k{n}"), n)).await;
        }
        for id in 1..=3 {
            cluster.kill(id).await;
        }
        for id in 1..=3 {
            cluster.start(id).await;
        }
    }
    cluster.write(set("end", 1)).await;
    let state = cluster.converged().await;
    assert_eq!(state.values.len(), 61);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_was_away_is_caught_up_by_a_snapshot() {
    let mut cluster = Cluster::found(Tuning { snapshot_every: 30, keep_logs: 5, ..Tuning::fast() }).await;
    let leader = cluster.leader().await;
    let away = cluster.nodes.keys().copied().find(|id| *id != leader).unwrap();
    cluster.write(set("before", 1)).await;
    cluster.kill(away).await;
    for n in 0..100 {
        cluster.write(set(&format!("k{n}"), n)).await;
    }
    eventually("the leader purges", || cluster.nodes[&leader].0.status().purged.is_some_and(|p| p > 40)).await;
    cluster.start(away).await;
    cluster.write(set("after", 1)).await;
    assert_eq!(cluster.converged().await.values.len(), 102);
    assert!(cluster.nodes[&away].0.status().snapshot.is_some());
    // What it was given is durable: it starts from it again.
    cluster.kill(away).await;
    cluster.start(away).await;
    assert_eq!(cluster.converged().await.values.len(), 102);
    cluster.stop().await;
}

/// A wire that loses, doubles and delays parts of snapshots by a fixed pattern, and counts them.
#[derive(Debug)]
struct Rough {
    wire: Arc<dyn super::super::PeerTransport>,
    parts: Arc<std::sync::atomic::AtomicUsize>,
    largest: Arc<std::sync::atomic::AtomicUsize>,
}

impl super::super::PeerTransport for Rough {
    fn call(
        &self,
        to: super::super::Peer,
        kind: PeerRpc,
        body: Bytes,
        ttl: Duration,
    ) -> futures_util::future::BoxFuture<'static, Result<Bytes, PeerError>> {
        use std::sync::atomic::Ordering::Relaxed;
        if kind != PeerRpc::Snapshot {
            return self.wire.call(to, kind, body, ttl);
        }
        let (n, wire) = (self.parts.fetch_add(1, Relaxed), self.wire.clone());
        self.largest.fetch_max(body.len(), Relaxed);
        Box::pin(async move {
            match n % 5 {
                // Lost on the way there, on the way back, doubled, and doubled with the answer to the second.
                1 => Err(PeerError::Timeout),
                2 => wire.call(to, kind, body, ttl).await.and(Err(PeerError::Timeout)),
                3 => {
                    let first = wire.call(to.clone(), kind, body.clone(), ttl).await;
                    let _ = wire.call(to, kind, body, ttl).await;
                    first
                }
                4 => {
                    let _ = wire.call(to.clone(), kind, body.clone(), ttl).await;
                    wire.call(to, kind, body, ttl).await
                }
                _ => wire.call(to, kind, body, ttl).await,
            }
        })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_of_many_parts_arrives_over_a_rough_wire_while_writes_go_on() {
    let (parts, largest) = (Arc::default(), Arc::default());
    let network = MemoryNetwork::new();
    let tuning = Tuning { snapshot_every: 60, keep_logs: 2, ..Tuning::fast() };
    let rough = |id| -> Arc<dyn super::super::PeerTransport> {
        Arc::new(Rough { wire: network.transport(id), parts: Arc::clone(&parts), largest: Arc::clone(&largest) })
    };
    let (leader, seen) = start(1, MemDisk::new(), tuning.clone(), rough(1)).await.unwrap();
    network.connect(&leader);
    leader.initialize_single("s1:1").await.unwrap();
    eventually("leads", || *leader.is_leader().borrow()).await;
    for n in 0..70 {
        leader.propose(set(&format!("{n}{}", "x".repeat(60_000)), n)).await.unwrap();
    }
    eventually("purges", || leader.status().purged.is_some_and(|p| p > 20)).await;

    let disk = MemDisk::new();
    let (learner, learned) = start(2, disk.clone(), tuning, rough(2)).await.unwrap();
    network.connect(&learner);
    leader.add_learner(2, "s2:1").await.unwrap();
    let mut slowest = Duration::ZERO;
    for n in 0..20 {
        let asked = Instant::now();
        leader.propose(set(&format!("after {n}"), n)).await.unwrap();
        slowest = slowest.max(asked.elapsed());
    }
    let same = || learned.lock().unwrap().1 == seen.lock().unwrap().1;
    eventually("the learner holds the same", same).await;
    let (parts, largest) = (parts.load(std::sync::atomic::Ordering::Relaxed), largest.load(std::sync::atomic::Ordering::Relaxed));
    println!("{parts} parts, the largest of {largest} bytes; slowest write meanwhile {slowest:?}");
    assert!(parts > 8 && largest < (1 << 20) + 1000, "{parts} parts, the largest of {largest} bytes");
    assert!(learner.status().snapshot.is_some());
    assert!(!disk.list().unwrap().iter().any(|n| n.starts_with("receiving")), "{:?}", disk.list());
    for node in [&leader, &learner] {
        network.disconnect(node.id());
        node.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_part_of_a_deposed_leader_is_answered_with_the_newer_vote() {
    use super::super::network::{Reply, SnapshotKey, SnapshotPart};
    let (node, _) = start(1, MemDisk::new(), Tuning::fast(), Arc::new(super::super::NoPeers)).await.unwrap();
    let request = AppendRequest { vote: Vote::new_committed(5, 2), prev_log_id: None, entries: Vec::new(), leader_commit: None };
    node.handle_peer_rpc(2, PeerRpc::Append, Request::encode_append(1, &request)).await.unwrap();
    let key = SnapshotKey { id: "s".to_owned(), last: None, hash: [0; 32], total: 1000 };
    let part = SnapshotPart { key, offset: 0, bytes: Bytes::from_static(b"x") };
    let answer = node.handle_peer_rpc(3, PeerRpc::Snapshot, Request::encode_snapshot(1, Vote::new_committed(4, 3), &part)).await;
    let said = Reply::decode_snapshot(&answer.unwrap()).unwrap();
    assert_eq!((said.vote, said.done), (Vote::new_committed(5, 2), false));
    let not_leading = node.handle_peer_rpc(3, PeerRpc::Snapshot, Request::encode_snapshot(1, Vote::new(9, 3), &part)).await;
    assert!(matches!(not_leading, Err(PeerError::Refused(_))), "{not_leading:?}");
    let answer = node.handle_peer_rpc(2, PeerRpc::Snapshot, Request::encode_snapshot(1, Vote::new_committed(5, 2), &part)).await;
    assert_eq!(Reply::decode_snapshot(&answer.unwrap()).unwrap().wants, 1);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_cut_off_from_its_peers_answers_neither_writes_nor_reads() {
    let tuning = Tuning { patience: Duration::from_millis(500), ..Tuning::fast() };
    let cluster = Cluster::found(tuning).await;
    let old = cluster.leader().await;
    cluster.write(set("a", 1)).await;
    for other in (1..=3).filter(|id| *id != old) {
        cluster.network.cut(old, other);
        cluster.network.cut(other, old);
    }
    let lost = cluster.nodes[&old].0.propose(set("lost", 1)).await;
    assert!(matches!(lost, Err(ProposeError::Timeout | ProposeError::NoLeader { .. })), "{lost:?}");
    let read = cluster.nodes[&old].0.linearizable().await;
    assert!(matches!(read, Err(ReadError::Timeout | ReadError::NoLeader { .. })), "{read:?}");
    eventually("another leader", || cluster.nodes.iter().any(|(id, (n, _))| *id != old && n.status().role == Role::Leader)).await;
    let refused = Instant::now();
    eventually("refused at once", || cluster.nodes[&old].0.status().quorum_age_ms.is_none_or(|ms| ms > 800)).await;
    let answer = cluster.nodes[&old].0.propose(set("lost", 2)).await;
    assert!(matches!(answer, Err(ProposeError::NoLeader { .. })), "{answer:?} after {:?}", refused.elapsed());
    cluster.network.heal();
    cluster.write(set("b", 1)).await;
    let state = cluster.converged().await;
    assert!(state.values.contains_key("a") && state.values.contains_key("b"));
    assert_ne!(state.values.get("lost"), Some(&2), "a refused write must not appear");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_join_as_learners_become_voters_and_leave() {
    let network = MemoryNetwork::new();
    let mut nodes = BTreeMap::new();
    for id in 1..=3 {
        let (node, seen) = start(id, MemDisk::new(), Tuning::fast(), network.transport(id)).await.unwrap();
        network.connect(&node);
        nodes.insert(id, (node, seen));
    }
    nodes[&1].0.initialize_single("s1:1").await.unwrap();
    eventually("leads", || *nodes[&1].0.is_leader().borrow()).await;
    nodes[&1].0.propose(set("a", 1)).await.unwrap();
    for id in 2..=3 {
        nodes[&1].0.add_learner(id, &format!("s{id}:1")).await.unwrap();
        eventually("the learner has caught up", || nodes[&id].1.lock().unwrap().1.values.get("a") == Some(&1)).await;
    }
    nodes[&1].0.change_voters(BTreeSet::from([1, 2, 3])).await.unwrap();
    assert_eq!(nodes[&1].0.status().members[&3], "s3:1");
    nodes[&1].0.change_voters(BTreeSet::from([1, 2])).await.unwrap();
    eventually("it is gone", || !nodes[&1].0.status().members.contains_key(&3)).await;
    assert!(nodes[&1].0.change_voters(BTreeSet::from([1, 9])).await.is_err(), "server 9 is no member");
    for (id, (node, _)) in &nodes {
        network.disconnect(*id);
        node.shutdown().await;
    }
}

/// Guard G3 at the receiver: the bytes are intact and the sender is who it says, and still the request is refused.
#[tokio::test]
async fn g3_an_append_with_a_hole_is_refused_by_the_receiver() {
    use openraft::{CommittedLeaderId, EntryPayload, LogId};
    let (node, _) = start(1, MemDisk::new(), Tuning::fast(), Arc::new(super::super::NoPeers)).await.unwrap();
    let entry = |term, index| openraft::Entry { log_id: LogId::new(CommittedLeaderId::new(term, 2), index), payload: EntryPayload::Blank };
    let request = |entries| AppendRequest { vote: Vote::new_committed(5, 2), prev_log_id: None, entries, leader_commit: None };
    for bad in [vec![entry(5, 3)], vec![entry(5, 0), entry(5, 2)], vec![entry(6, 0)]] {
        let refused = node.handle_peer_rpc(2, PeerRpc::Append, Request::encode_append(1, &request(bad))).await;
        assert!(matches!(refused, Err(PeerError::Refused(_))), "{refused:?}");
    }
    assert_eq!(node.status().last_log, None);
    node.handle_peer_rpc(2, PeerRpc::Append, Request::encode_append(1, &request(vec![entry(5, 0), entry(5, 1)]))).await.unwrap();
    eventually("appended", || node.status().last_log == Some(1)).await;
    let nonsense = node.handle_peer_rpc(2, PeerRpc::Vote, Bytes::from_static(b"nonsense")).await;
    assert!(matches!(nonsense, Err(PeerError::Refused(_))));
    node.shutdown().await;
}
