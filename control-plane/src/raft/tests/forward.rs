//! Writing and reading at servers that do not lead.

use super::super::{PeerError, PeerRpc, PeerTransport, ProposeError, ReadError, Role};
use super::cluster::Cluster;
use super::*;

/// Timers of a test that waits them out.
fn impatient() -> Tuning {
    Tuning { patience: Duration::from_millis(1500), ..Tuning::fast() }
}

fn followers(cluster: &Cluster, leader: u64) -> Vec<u64> {
    cluster.nodes.keys().copied().filter(|id| *id != leader).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_server_takes_a_write_and_reads_what_was_acknowledged_before() {
    let cluster = Cluster::found(Tuning::fast()).await;
    let leader = cluster.leader().await;
    let others = followers(&cluster, leader);
    for n in 0..60u64 {
        let (to, from) = (others[n as usize % 2], [leader, others[0], others[1]][n as usize % 3]);
        let (index, answer) = soon(cluster.nodes[&to].0.propose(add("k", 1))).await.unwrap();
        assert_eq!(answer.after, n + 1);
        // Read-your-writes at the server that took it, without asking anybody.
        assert!(cluster.nodes[&to].1.lock().unwrap().0 >= index);
        let node = &cluster.nodes[&from];
        assert!(soon(node.0.linearizable()).await.unwrap() >= index);
        assert_eq!(node.1.lock().unwrap().1.values["k"], n + 1, "server {from} after a write at {to}");
    }
    // Many at once, each with its own answer.
    let node = &cluster.nodes[&others[0]].0;
    let writes = futures_util::future::join_all((0..200).map(|_| node.propose(add("m", 1)))).await;
    let mut seen: Vec<u64> = writes.into_iter().map(|w| w.unwrap().1.after).collect();
    seen.sort_unstable();
    assert_eq!(seen, (1..=200).collect::<Vec<_>>());
    let reads = futures_util::future::join_all((0..200).map(|_| node.linearizable())).await;
    assert!(reads.iter().all(Result::is_ok));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_leader_is_elected_requests_wait_and_then_succeed() {
    let mut cluster = Cluster::found(Tuning::fast()).await;
    let leader = cluster.leader().await;
    let others = followers(&cluster, leader);
    cluster.kill(leader).await;
    let node = &cluster.nodes[&others[0]].0;
    let (write, read) = tokio::join!(node.propose(set("x", 1)), cluster.nodes[&others[1]].0.linearizable());
    write.unwrap();
    read.unwrap();
    assert_eq!(soon(cluster.converged()).await.values["x"], 1);
    cluster.stop().await;
}

/// A server that reaches nobody says so in bounded time, and its neighbours do not notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_cut_off_answers_in_time_that_it_cannot() {
    let cluster = Cluster::found(impatient()).await;
    let leader = cluster.leader().await;
    for lonely in [followers(&cluster, leader)[0], leader] {
        for other in 1..=3 {
            cluster.network.cut(lonely, other);
            cluster.network.cut(other, lonely);
        }
        let node = &cluster.nodes[&lonely].0;
        let (write, read) = tokio::join!(soon(node.propose(set("lonely", 1))), soon(node.linearizable()));
        assert!(matches!(write, Err(ProposeError::NoLeader { .. } | ProposeError::Timeout | ProposeError::Unknown)), "{write:?}");
        assert!(matches!(read, Err(ReadError::NoLeader { .. } | ReadError::Timeout)), "{read:?}");
        let there = followers(&cluster, lonely)[0];
        soon(cluster.nodes[&there].0.propose(set("there", 2))).await.unwrap();
        cluster.network.heal();
        soon(node.propose(set("back", 3))).await.unwrap();
        eventually("one leader for all", || cluster.nodes.values().filter(|(n, _)| n.status().role == Role::Leader).count() == 1).await;
    }
    cluster.stop().await;
}

/// The answer of the leader is lost: what is safe to repeat succeeds, the rest is told as unknown and had one effect.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_what_is_safe_to_repeat_is_repeated() {
    let cluster = Cluster::found(impatient()).await;
    let leader = cluster.leader().await;
    let follower = followers(&cluster, leader)[0];
    soon(cluster.nodes[&follower].0.propose(set("n", 0))).await.unwrap();
    // The way back is cut, so requests arrive and answers do not. The third server keeps the quorum.
    let node = cluster.nodes[&follower].0.clone();
    let network = cluster.network.clone();
    network.cut(leader, follower);
    let unknown = soon(node.propose(add("n", 1))).await;
    assert!(matches!(unknown, Err(ProposeError::Unknown | ProposeError::Timeout | ProposeError::NoLeader { .. })), "{unknown:?}");
    let repeated = tokio::spawn(async move { node.propose(set("s", 7)).await });
    cluster.network.heal();
    soon(repeated).await.unwrap().unwrap();
    let state = soon(cluster.converged()).await;
    assert_eq!(state.values["s"], 7);
    assert!(state.values["n"] <= 1, "added once at most");
    cluster.stop().await;
}

/// Garbage, and requests meant for another server, are refused and change nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_requests_are_refused() {
    let cluster = Cluster::found(Tuning::fast()).await;
    let leader = cluster.leader().await;
    let from = followers(&cluster, leader)[0];
    let transport: Arc<dyn PeerTransport> = cluster.network.transport(from);
    for kind in [PeerRpc::Propose, PeerRpc::ReadIndex] {
        for body in [&b""[..], b"garbage", &[0xff; 100]] {
            let peer = super::super::Peer { id: leader, addr: String::new() };
            let answer = transport.call(peer, kind, bytes::Bytes::copy_from_slice(body), Duration::from_secs(5)).await;
            assert!(matches!(answer, Err(PeerError::Refused(_))), "{kind:?}: {answer:?}");
        }
    }
    cluster.stop().await;
}
