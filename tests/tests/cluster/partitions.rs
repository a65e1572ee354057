//! Servers that do not see each other, or only one way, while clients see all of them.

use optimus_tests::cluster::Cluster;
use optimus_tests::dice::Dice;
use optimus_tests::linearizability::Violation;
use optimus_tests::load::Load;

use crate::{CLIENTS, ONE, REGISTERS, Trial, rounds, seed};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_cut_off_either_way_never_answers_alone() {
    let _one = ONE.lock().await;
    let seed = seed("partitions");
    let mut dice = Dice(seed);
    let cluster = Cluster::in_namespaces(3, 0).await;
    let trial = Trial::start(&cluster, seed).await;
    for round in 0..rounds("OPTIMUS_CLUSTER_ROUNDS", 3) {
        let leader = cluster.leader().await;
        let victim = if dice.below(3) > 0 { leader } else { dice.below(3) as usize };
        let network = cluster.network();
        let how = match round % 3 {
            0 => network.isolate(victim).map(|()| "is cut off"),
            1 => network.mute(victim).map(|()| "is not heard"),
            _ => network.deafen(victim).map(|()| "hears nobody"),
        };
        println!("round {round}: server {victim} (leader {leader}) {}", how.expect("rules"));
        // The majority goes on; clients that ask the one cut off are refused and ask others.
        trial.load.wait_more(20 + dice.below(40)).await;
        network.heal().expect("rules");
        trial.load.wait_more(10).await;
    }
    trial.judge(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_datagram_in_twenty_lost_costs_time_only() {
    let _one = ONE.lock().await;
    let seed = seed("loss");
    let mut cluster = Cluster::in_namespaces(3, 1).await;
    cluster.add_agent().await;
    let trial = Trial::start(&cluster, seed).await;
    cluster.network().lose(0.05).expect("rules");
    trial.load.wait_more(rounds("OPTIMUS_CLUSTER_ROUNDS", 10) * 20).await;
    cluster.network().heal().expect("rules");
    trial.judge(&cluster).await;
    assert_eq!(cluster.nodes_up().await, Some(1), "the agent kept its lease");
}

/// The proof that the tests above can fail: reads that may be old, beside a server that is cut off, are found out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stale_reads_of_a_server_cut_off_are_found_out() {
    let _one = ONE.lock().await;
    let seed = seed("stale");
    let cluster = Cluster::in_namespaces(3, 0).await;
    let load = Load::start_stale(&cluster.api, CLIENTS, REGISTERS, seed);
    load.wait_more(20).await;
    let follower = (cluster.leader().await + 1) % 3;
    cluster.network().isolate(follower).expect("rules");
    load.wait_more(60).await;
    cluster.network().heal().expect("rules");
    cluster.wait_voters(3).await;
    let history = load.stop().await;
    match optimus_tests::linearizability::check(&history.ops) {
        Err(violation @ Violation::NotLinearizable { .. }) => println!("{violation}"),
        other => panic!("{} writes and {} stale reads were not found out: {other:?}", history.acknowledged(), history.reads()),
    }
}
