//! Servers that die or freeze under load.

use std::time::{Duration, Instant};

use optimus_tests::cluster::Cluster;
use optimus_tests::dice::Dice;

use crate::{ONE, Trial, rounds, seed};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_of_any_and_of_all_servers_lose_no_acknowledged_write() {
    let _one = ONE.lock().await;
    let seed = seed("kills");
    let mut dice = Dice(seed);
    let mut cluster = Cluster::in_namespaces(3, 2).await;
    cluster.add_agent().await;
    cluster.add_agent().await;
    let trial = Trial::start(&cluster, seed).await;
    for round in 0..rounds("OPTIMUS_CLUSTER_ROUNDS", 10) {
        let victims = match dice.below(4) {
            0 => vec![0, 1, 2],
            1 => vec![cluster.leader().await],
            _ => vec![dice.below(3) as usize],
        };
        println!("round {round}: kill -9 of {victims:?}");
        victims.iter().for_each(|n| cluster.servers[*n].kill());
        // Sometimes the others go on for a while, sometimes it is back before they notice.
        tokio::time::sleep(Duration::from_millis(dice.below(1500))).await;
        victims.iter().for_each(|n| cluster.start_server(*n));
        trial.load.wait_more(10).await;
    }
    let history = trial.judge(&cluster).await;
    assert!(history.acknowledged() > 100, "only {} writes", history.acknowledged());
    assert_eq!(cluster.nodes_up().await, Some(2), "agents are back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_freezes_and_goes_on_answers_nothing_old() {
    let _one = ONE.lock().await;
    let seed = seed("freezes");
    let mut dice = Dice(seed);
    let cluster = Cluster::in_namespaces(3, 0).await;
    let trial = Trial::start(&cluster, seed).await;
    for round in 0..rounds("OPTIMUS_CLUSTER_ROUNDS", 2) {
        let leader = cluster.leader().await;
        println!("round {round}: server {leader} freezes");
        cluster.servers[leader].pause();
        // The others elect and write on; then the old one wakes up and still believes that it leads.
        trial.load.wait_more(20 + dice.below(40)).await;
        cluster.servers[leader].resume();
        trial.load.wait_more(20).await;
    }
    trial.judge(&cluster).await;
}

/// How long clients see no acknowledged write when the leader dies. It is printed, not judged: this machine is shared.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_gap_after_a_leaders_death_is_measured() {
    let _one = ONE.lock().await;
    let seed = seed("gaps");
    let mut cluster = Cluster::in_namespaces(3, 0).await;
    let trial = Trial::start(&cluster, seed).await;
    let mut killed = Vec::new();
    for _ in 0..rounds("OPTIMUS_GAP_TRIALS", 3) {
        cluster.wait_voters(3).await;
        let leader = cluster.leader().await;
        trial.load.wait_more(20).await;
        let at = trial.load.now();
        cluster.servers[leader].kill();
        trial.load.wait_more(20).await;
        killed.push(at..trial.load.now());
        cluster.start_server(leader);
    }
    let history = trial.judge(&cluster).await;
    let mut gaps: Vec<Duration> = killed.into_iter().map(|window| history.longest_gap(window)).collect();
    gaps.sort();
    println!(
        "gap in acknowledged writes after kill -9 of the leader, {} trials: median {:?}, worst {:?}",
        gaps.len(),
        gaps[gaps.len() / 2],
        gaps[gaps.len() - 1]
    );
    // A server that was wiped comes back under a new id and gets everything.
    let started = Instant::now();
    cluster.servers[2].kill();
    cluster.wipe_server(2);
    cluster.rejoin_server(2).await;
    cluster.wait_ready(2).await;
    println!("a wiped server was back after {:?}", started.elapsed());
}
