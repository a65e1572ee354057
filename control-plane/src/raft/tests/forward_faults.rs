//! Reads and writes on any server while the leader, or the way to it, is lost.

use super::super::{ProposeError, ReadError, Role};
use super::cluster::Cluster;
use super::forward::led;
use super::*;

type Clock = tokio::time::Instant;

/// A write may take twice the patience, a read the patience once; a little more for the turns of the tasks.
const WRITE_MAX: Duration = Duration::from_millis(10_100);
const READ_MAX: Duration = Duration::from_millis(5_100);
/// Without a leader nobody waits longer than this.
const LEADERLESS_MAX: Duration = Duration::from_millis(3_300);

/// What a client of server `id` gets for a repeatable write, a write that is not, and a read; each within its bound.
async fn bounded(cluster: &Cluster, id: u64, seq: u64) -> [Result<(), String>; 3] {
    let node = cluster.node(id);
    let began = Clock::now();
    let timed = |most: Duration, what: &str| assert!(began.elapsed() <= most, "{what} at server {id} took {:?}", began.elapsed());
    let safe = async {
        let done = node.propose(add_once(id, seq, "safe", 1)).await;
        timed(WRITE_MAX, "a repeatable write");
        done.map(drop).map_err(|e| e.to_string())
    };
    let plain = async {
        let done = node.propose(add("plain", 1)).await;
        timed(WRITE_MAX, "a plain write");
        done.map(drop).map_err(|e| e.to_string())
    };
    let read = async {
        let done = node.linearizable().await;
        timed(READ_MAX, "a read");
        done.map(drop).map_err(|e| e.to_string())
    };
    tokio::join!(safe, plain, read).into()
}

#[tokio::test(start_paused = true)]
async fn a_killed_leader_costs_an_election_and_no_error() {
    let (mut cluster, leader, others) = led().await;
    cluster.kill(leader).await;
    let began = Clock::now();
    let (a, b) = tokio::join!(bounded(&cluster, others[0], 1), bounded(&cluster, others[1], 1));
    // Nothing could be sent to it, so even what must not be repeated is tried again.
    assert!(a.iter().chain(&b).all(Result::is_ok), "{a:?} {b:?}");
    println!("all served {:?} after the leader was lost", began.elapsed());
    assert!(began.elapsed() < LEADERLESS_MAX, "{:?}", began.elapsed());
    assert_eq!(cluster.sees(others[0], "safe").max(cluster.sees(others[1], "safe")), Some(2));
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_frozen_leader_is_left_for_the_next_one() {
    let (cluster, leader, others) = led().await;
    cluster.network.freeze(leader);
    let (a, b) = tokio::join!(bounded(&cluster, others[0], 1), bounded(&cluster, others[1], 1));
    for [safe, plain, read] in [a, b] {
        assert_eq!((safe, read), (Ok(()), Ok(())));
        // It was sent, and nobody can say what became of it, unless the next leader was there already.
        assert!(plain.is_ok() || plain == Err(ProposeError::Unknown.to_string()), "{plain:?}");
    }
    // The frozen one finds itself alone and says so.
    let [safe, plain, read] = bounded(&cluster, leader, 1).await;
    assert!(safe.is_err() && plain.is_err() && read.is_err());
    cluster.network.heal();
    eventually("one leader", || cluster.nodes.values().filter(|(n, _)| n.status().role == Role::Leader).count() == 1).await;
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_server_cut_off_from_everybody_answers_in_time() {
    let (cluster, leader, others) = led().await;
    let lost = others[0];
    for other in [leader, others[1]] {
        cluster.network.cut(lost, other);
        cluster.network.cut(other, lost);
    }
    for seq in 0..3 {
        let began = Clock::now();
        let answers = bounded(&cluster, lost, seq).await;
        assert!(answers.iter().all(Result::is_err), "{answers:?}");
        assert!(began.elapsed() <= LEADERLESS_MAX, "{:?}", began.elapsed());
    }
    let refused = cluster.node(lost).propose(add("plain", 1)).await;
    assert!(matches!(refused, Err(ProposeError::NoLeader { .. })), "nothing was sent: {refused:?}");
    assert!(matches!(cluster.node(lost).linearizable().await, Err(ReadError::NoLeader { .. })));
    cluster.network.heal();
    let read = soon(async { while cluster.node(lost).linearizable().await.is_err() {} });
    read.await;
    assert_eq!(cluster.converged().await.values.get("plain"), None);
    cluster.stop().await;
}

/// One direction of one wire, or of all of the leader's, is cut: everything is served or refused in time.
#[tokio::test(start_paused = true)]
async fn wires_cut_one_way_leave_no_request_hanging() {
    for case in 0..4 {
        let (cluster, leader, others) = led().await;
        let (x, y) = (others[0], others[1]);
        let cuts = match case {
            0 => vec![(x, leader)],
            1 => vec![(leader, x)],
            2 => vec![(leader, x), (leader, y)],
            _ => vec![(x, leader), (y, leader)],
        };
        for (a, b) in cuts {
            cluster.network.cut(a, b);
        }
        let mut acknowledged = 0;
        for seq in 0..4 {
            let (a, b, c) = tokio::join!(bounded(&cluster, leader, seq), bounded(&cluster, x, seq), bounded(&cluster, y, seq));
            acknowledged += [a, b, c].iter().filter(|[safe, ..]| safe.is_ok()).count();
        }
        cluster.network.heal();
        soon(async { while cluster.node(x).linearizable().await.is_err() {} }).await;
        let state = cluster.converged().await;
        let safe = state.values.get("safe").copied().unwrap_or(0);
        assert!(safe >= acknowledged as u64, "case {case}: {acknowledged} acknowledged, {safe} applied");
        assert_eq!(safe, state.answered.len() as u64, "case {case}: each once");
        cluster.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn without_a_quorum_every_server_says_so_in_time() {
    let (mut cluster, leader, others) = led().await;
    cluster.kill(others[0]).await;
    cluster.kill(others[1]).await;
    let answers = bounded(&cluster, leader, 1).await;
    assert!(answers.iter().all(Result::is_err), "{answers:?}");
    cluster.start(others[0]).await;
    soon(async { while cluster.node(others[0]).propose(add_once(9, 9, "again", 1)).await.is_err() {} }).await;
    cluster.kill(leader).await;
    let answers = bounded(&cluster, others[0], 2).await;
    assert!(answers.iter().all(Result::is_err), "{answers:?}");
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_stopped_server_refuses_at_once() {
    let (cluster, _, others) = led().await;
    let node = cluster.node(others[0]).clone();
    node.shutdown().await;
    let began = Clock::now();
    assert_eq!(node.propose(add("n", 1)).await, Err(ProposeError::Stopped));
    assert_eq!(node.linearizable().await, Err(ReadError::Stopped));
    assert!(began.elapsed() < Duration::from_millis(100));
    cluster.stop().await;
}
