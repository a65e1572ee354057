//! Reads and writes on servers that do not lead, while all is well.

use super::super::network::forwarded::{self, ReadAt, Taken};
use super::super::types::Blob;
use super::super::{IoMode, MAX_BATCH_COMMANDS, PeerError, PeerRpc, ProposeError, ReadError};
use super::cluster::Cluster;
use super::*;

/// For tests under tokio's paused clock: time passes only while everybody waits.
pub(super) fn paused() -> Tuning {
    Tuning { io: IoMode::Inline, ..Tuning::fast() }
}

/// A cluster, its leader and the others.
pub(super) async fn led() -> (Cluster, u64, Vec<u64>) {
    let cluster = Cluster::found(paused()).await;
    let leader = cluster.leader().await;
    eventually("all know the leader", || cluster.nodes.values().all(|(n, _)| n.status().leader == Some(leader))).await;
    let others = cluster.nodes.keys().copied().filter(|id| *id != leader).collect();
    (cluster, leader, others)
}

impl Cluster {
    pub(super) fn node(&self, id: u64) -> &Node {
        &self.nodes[&id].0
    }

    /// What readers of server `id` see now.
    pub(super) fn sees(&self, id: u64, key: &str) -> Option<u64> {
        self.nodes[&id].1.lock().unwrap().1.values.get(key).copied()
    }
}

#[tokio::test(start_paused = true)]
async fn every_server_takes_writes_and_shows_them_at_once() {
    let (cluster, leader, others) = led().await;
    let mut last = 0;
    for round in 0..20 {
        for id in 1..=3 {
            let (index, answer) = cluster.node(id).propose(add("n", 1)).await.unwrap();
            assert!(index > last, "entries follow each other");
            last = index;
            let total = round * 3 + id;
            assert_eq!(answer, Answer { before: (total > 1).then(|| total - 1), after: total });
            assert_eq!(cluster.sees(id, "n"), Some(total), "server {id} shows what it wrote");
        }
    }
    for id in 1..=3 {
        assert!(cluster.node(id).linearizable().await.unwrap() >= last);
        assert_eq!(cluster.sees(id, "n"), Some(60));
    }
    for id in others {
        let traffic = cluster.node(id).traffic();
        assert_eq!((traffic.forwarded, traffic.forwards, traffic.taken, traffic.retries), (20, 20, 0, 0));
    }
    assert_eq!(cluster.node(leader).traffic().taken, 40);
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn proposals_that_wait_go_to_the_leader_together() {
    let (cluster, _, others) = led().await;
    let node = cluster.node(others[0]);
    let all = (0..1000).map(|n| node.propose_many(vec![set(&format!("a{n}"), n), set(&format!("b{n}"), n + 1)]));
    for (n, done) in futures_util::future::join_all(all).await.into_iter().enumerate() {
        let (_, answers) = done.unwrap();
        let after: Vec<u64> = answers.iter().map(|a| a.after).collect();
        assert_eq!(after, [n as u64, n as u64 + 1], "everybody gets its own answers");
    }
    let traffic = node.traffic();
    assert_eq!(traffic.forwarded, 1000);
    let least = 2000_u64.div_ceil(MAX_BATCH_COMMANDS as u64);
    assert!((least..=least + 4).contains(&traffic.forwards), "{traffic:?}");
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn reads_that_wait_share_a_round() {
    let (cluster, leader, others) = led().await;
    cluster.node(leader).propose(set("a", 1)).await.unwrap();
    for id in [leader, others[0]] {
        let before = cluster.node(id).traffic();
        let reads = futures_util::future::join_all((0..500).map(|_| cluster.node(id).linearizable())).await;
        assert!(reads.iter().all(|r| r == &reads[0] && r.is_ok()));
        let after = cluster.node(id).traffic();
        assert_eq!(after.reads - before.reads, 500);
        assert!(after.read_rounds - before.read_rounds <= 3, "{after:?}");
    }
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_does_not_lead_sends_nothing_further() {
    let (cluster, leader, others) = led().await;
    let (asked, other) = (others[0], others[1]);
    let command = Blob(rmp_serde::to_vec_named(&set("x", 1)).unwrap().into());
    let request = forwarded::encode_propose(asked, vec![vec![command.clone()], vec![command]]);
    let answer = cluster.node(asked).handle_peer_rpc(other, PeerRpc::Propose, request).await.unwrap();
    let not_leader = Taken::NotLeader { leader: Some(leader) };
    assert_eq!(forwarded::decode_taken(&answer).unwrap(), vec![not_leader.clone(), not_leader]);
    let request = forwarded::encode_read_index(asked);
    let answer = cluster.node(asked).handle_peer_rpc(other, PeerRpc::ReadIndex, request).await.unwrap();
    assert_eq!(forwarded::decode_read_at(&answer), Some(ReadAt::NotLeader { leader: Some(leader) }));
    assert_eq!(cluster.node(asked).propose_here(set("x", 1)).await, Err(ProposeError::NoLeader { leader: Some(leader) }));
    assert_eq!(cluster.node(asked).read_index().await, Err(ReadError::NoLeader { leader: Some(leader) }));
    assert_eq!((cluster.node(asked).traffic().forwards, cluster.sees(leader, "x")), (0, None));
    cluster.stop().await;
}

/// In the log it would stop every server that runs the leader's version.
#[tokio::test(start_paused = true)]
async fn a_command_the_leader_does_not_understand_is_refused_and_harms_nobody() {
    let (cluster, leader, others) = led().await;
    let good = || Blob(rmp_serde::to_vec_named(&set("good", 1)).unwrap().into());
    let strange = Blob(rmp_serde::to_vec_named(&BTreeMap::from([("Multiply", 3)])).unwrap().into());
    let request = forwarded::encode_propose(leader, vec![vec![good(), strange], vec![good()]]);
    let answer = cluster.node(leader).handle_peer_rpc(others[0], PeerRpc::Propose, request).await.unwrap();
    let taken = forwarded::decode_taken(&answer).unwrap();
    assert!(matches!(&taken[..], [Taken::Refused(_), Taken::Done { .. }]), "{taken:?}");
    for groups in [vec![vec![]], vec![vec![good(); MAX_BATCH_COMMANDS], vec![good()]]] {
        let request = forwarded::encode_propose(leader, groups);
        let refused = cluster.node(leader).handle_peer_rpc(others[0], PeerRpc::Propose, request).await;
        assert!(matches!(refused, Err(PeerError::Refused(_))), "{refused:?}");
    }
    assert_eq!(cluster.converged().await.history.len(), 1);
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn the_age_of_what_a_server_knows_is_the_silence_of_its_leader() {
    let (cluster, leader, others) = led().await;
    cluster.node(others[0]).linearizable().await.unwrap();
    let age = |id| cluster.node(id).status().leader_age_ms;
    for id in 1..=3 {
        assert!(age(id).is_some_and(|ms| ms <= 200), "server {id}: {:?}", age(id));
    }
    let lost = others[0];
    for other in [leader, others[1]] {
        cluster.network.cut(other, lost);
        cluster.network.cut(lost, other);
    }
    eventually("it has heard nothing for long", || age(lost).is_some_and(|ms| ms > 3000)).await;
    cluster.network.heal();
    eventually("it hears a leader again", || age(lost).is_some_and(|ms| ms <= 200)).await;
    cluster.stop().await;
}
