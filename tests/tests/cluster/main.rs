//! A real cluster: server and agent processes, killed, frozen, cut off and lied to about the time, while clients write.
//!
//! After each run what the clients saw is explained by one order of writes, the event streams of all servers fit together,
//! and all servers show the same state. Each test prints its seed. Longer: `OPTIMUS_CLUSTER_ROUNDS=200`.

mod disk;
mod kills;
mod network;
mod partitions;
mod quorum_lost;
mod relay;
mod root_key;
mod weather;

use optimus_tests::cluster::Cluster;
use optimus_tests::dice::{number_from_env, seed_from_env};
use optimus_tests::load::{Listeners, Load, expect_same_state};

/// Clients and registers of a load: enough that every register is always contended.
const CLIENTS: u32 = 10;
const REGISTERS: u64 = 3;

/// One cluster at a time: they share two cores in CI.
static ONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// What a test runs, longer on demand.
fn rounds(name: &str, otherwise: u64) -> u64 {
    number_from_env(name, otherwise)
}

/// The seed of a test, printed.
fn seed(test: &str) -> u64 {
    let seed = seed_from_env("OPTIMUS_CLUSTER_SEED");
    println!("{test}: OPTIMUS_CLUSTER_SEED={seed}");
    seed
}

/// A cluster under load.
struct Trial {
    began: std::time::Instant,
    load: Load,
    listeners: Listeners,
}

impl Trial {
    async fn start(cluster: &Cluster, seed: u64) -> Self {
        let trial = Self {
            began: std::time::Instant::now(),
            load: Load::start(&cluster.api, CLIENTS, REGISTERS, seed),
            listeners: Listeners::start(&cluster.api),
        };
        trial.load.wait_more(20).await;
        trial
    }

    /// Ends the load and judges everything that was seen.
    async fn judge(self, cluster: &Cluster) -> optimus_tests::load::History {
        cluster.wait_voters(cluster.servers.len()).await;
        let history = self.load.stop().await;
        history.expect_linearizable();
        expect_same_state(&cluster.api).await;
        let streams = self.listeners.stop().await;
        if let Err(fault) = optimus_tests::event_stream::check(&streams) {
            panic!("events: {fault}");
        }
        let events: usize = streams.iter().map(|s| s.items.len()).sum();
        assert!(events > 0, "no events were seen: nothing was proven");
        println!(
            "{:.1?} of load: {} writes acknowledged, {} of unknown outcome, {} reads, {events} events on {} streams",
            self.began.elapsed(),
            history.acknowledged(),
            history.unknown(),
            history.reads(),
            streams.len()
        );
        history
    }
}
