//! Whatever wires are cut and servers freeze: every acknowledged write is there exactly once, and each client sees what
//! it wrote, on any server.

use proptest::prelude::*;

use super::cluster::Cluster;
use super::forward::led;
use super::*;

const CLIENTS: u64 = 4;
const WRITES: u64 = 12;

/// What happens to the network, and for how long it stays so.
#[derive(Clone, Debug)]
enum Fault {
    Cut { pairs: Vec<(u64, u64)>, ms: u64 },
    Freeze { id: u64, ms: u64 },
    Calm { ms: u64 },
}

fn fault() -> impl Strategy<Value = Fault> {
    let server = 1..=3_u64;
    prop_oneof![
        3 => (proptest::collection::vec((server.clone(), server.clone()), 1..4), 20..900_u64)
            .prop_map(|(pairs, ms)| Fault::Cut { pairs, ms }),
        2 => (server.clone(), 20..900_u64).prop_map(|(id, ms)| {
            let pairs = (1..=3).filter(|o| *o != id).flat_map(|o| [(id, o), (o, id)]).collect();
            Fault::Cut { pairs, ms }
        }),
        1 => (server, 20..900_u64).prop_map(|(id, ms)| Fault::Freeze { id, ms }),
        2 => (1..600_u64).prop_map(|ms| Fault::Calm { ms }),
    ]
}

/// One client: writes one after the other, each on servers of its choice until it is acknowledged.
async fn client(cluster: &Cluster, id: u64, choices: &[u64]) {
    let key = format!("c{id}");
    let mut choices = choices.iter().cycle();
    let mut next = || *choices.next().unwrap();
    for seq in 1..=WRITES {
        let server = loop {
            let server = next();
            match cluster.node(server).propose(add_once(id, seq, &key, 1)).await {
                Ok((_, answer)) => {
                    assert_eq!(answer, Answer { before: (seq > 1).then(|| seq - 1), after: seq }, "client {id}, write {seq}");
                    break server;
                }
                Err(_) => continue,
            }
        };
        assert_eq!(cluster.sees(server, &key), Some(seq), "server {server} acknowledged it and does not show it");
        let reader = next();
        if cluster.node(reader).linearizable().await.is_ok() {
            assert_eq!(cluster.sees(reader, &key), Some(seq), "a confirmed read at server {reader} does not show it");
        }
        tokio::time::sleep(Duration::from_millis(next() * 20)).await;
    }
}

async fn run(faults: Vec<Fault>, choices: Vec<u64>) -> u64 {
    let (cluster, ..) = led().await;
    let trouble = async {
        for fault in faults {
            let ms = match fault {
                Fault::Cut { pairs, ms } => {
                    pairs.iter().for_each(|(a, b)| cluster.network.cut(*a, *b));
                    ms
                }
                Fault::Freeze { id, ms } => {
                    cluster.network.freeze(id);
                    ms
                }
                Fault::Calm { ms } => ms,
            };
            tokio::time::sleep(Duration::from_millis(ms)).await;
            cluster.network.heal();
        }
    };
    let clients = (1..=CLIENTS).map(|id| client(&cluster, id, &choices[id as usize..]));
    let ends = async { tokio::join!(trouble, futures_util::future::join_all(clients)) };
    tokio::time::timeout(Duration::from_secs(300), ends).await.expect("within 300 s of the cluster's time");
    let state = cluster.converged().await;
    for id in 1..=CLIENTS {
        assert_eq!(state.values.get(&format!("c{id}")), Some(&WRITES), "client {id}");
    }
    assert_eq!(state.history.len() as u64, CLIENTS * WRITES, "every write once");
    let retries = (1..=3).map(|id| cluster.node(id).traffic().retries).sum();
    cluster.stop().await;
    retries
}

#[test]
fn acknowledged_writes_happen_once_and_are_seen_by_who_wrote_them() {
    let mut runner =
        proptest::test_runner::TestRunner::new(ProptestConfig { cases: 24, max_shrink_iters: 40, ..ProptestConfig::default() });
    let retries = std::cell::Cell::new(0);
    let script = (proptest::collection::vec(fault(), 5..14), proptest::collection::vec(1..=3_u64, 40..60));
    let outcome = runner.run(&script, |(faults, choices)| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        retries.set(retries.get() + runtime.block_on(run(faults, choices)));
        Ok(())
    });
    outcome.unwrap();
    println!("{} tries were repeated inside the servers", retries.get());
    assert!(retries.get() > 0, "no fault met a request");
}
