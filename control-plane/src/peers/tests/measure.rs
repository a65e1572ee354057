//! Figures for the documentation: `cargo test --lib peers::tests::measure -- --ignored --nocapture --test-threads 1`.

use super::cluster::Three;
use super::*;
use crate::raft::Tuning;

/// Processor time of this process so far.
fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10) // a tick is 10 ms on every Linux we build for
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures"]
async fn round_trips() {
    let world = World::new();
    let (two, one) = (world.start(2, Arc::new(Echo::default())), world.caller(1));
    append(&one, &two.peer(), "warm").await.unwrap();
    for (name, length, at_once, calls) in
        [("small", 100, 1, 5000), ("batch of 64 KiB", 64 << 10, 1, 1000), ("small, 16 at once", 100, 16, 20_000)]
    {
        let body = Bytes::from(vec![1u8; length]);
        let (began, used) = (Instant::now(), cpu());
        let tasks: Vec<_> = (0..at_once)
            .map(|_| {
                let (one, peer, body) = (one.clone(), two.peer(), body.clone());
                tokio::spawn(async move {
                    let mut waits = Vec::new();
                    for _ in 0..calls / at_once {
                        let at = Instant::now();
                        one.call(peer.clone(), PeerRpc::Append, body.clone(), TTL).await.unwrap();
                        waits.push(at.elapsed());
                    }
                    waits
                })
            })
            .collect();
        let mut waits = Vec::new();
        for task in tasks {
            waits.extend(task.await.unwrap());
        }
        waits.sort();
        let (p50, p99) = (waits[waits.len() / 2], waits[waits.len() * 99 / 100]);
        let per_second = waits.len() as f64 / began.elapsed().as_secs_f64();
        println!("{name}: p50 {p50:?}, p99 {p99:?}, {per_second:.0}/s, both ends {:?} of CPU a call", (cpu() - used) / waits.len() as u32);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures"]
async fn three_idle_servers() {
    let tuning = Tuning { heartbeat: Duration::from_millis(100), ..Tuning::default() };
    let three = Three::found(tuning).await;
    three.leader().await;
    let sent = |three: &Three| -> (u64, u64) {
        let mut sum = (0, 0);
        for member in three.members.values() {
            for (link, _) in member.peers.links().values() {
                if let Some(stats) = link.stats() {
                    sum = (sum.0 + stats.udp_tx.bytes + stats.udp_rx.bytes, sum.1 + stats.udp_tx.datagrams + stats.udp_rx.datagrams);
                }
            }
        }
        sum
    };
    tokio::time::sleep(Duration::from_secs(3)).await; // settle; nothing waits for it
    let (began, used, before) = (Instant::now(), cpu(), sent(&three));
    tokio::time::sleep(Duration::from_secs(10)).await; // the length of the measurement
    let (after, seconds) = (sent(&three), began.elapsed().as_secs_f64());
    let (bytes, packets) = ((after.0 - before.0) as f64 / seconds, (after.1 - before.1) as f64 / seconds);
    println!(
        "idle: {bytes:.0} bytes/s and {packets:.0} packets/s between the three, {:.2} % of a core for all",
        (cpu() - used).as_secs_f64() / seconds * 100.0
    );
    three.stop().await;
}
