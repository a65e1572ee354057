//! The root key is replaced under everybody's eyes: all servers have the new one, and nothing else is different.

use std::time::{Duration, Instant};

use optimus_tests::api_client::Answer;
use optimus_tests::cluster::Cluster;
use optimus_tests::harness::PATIENCE;
use serde_json::json;

use crate::ONE;

const ANSWER: Duration = Duration::from_secs(20);

async fn rotate(cluster: &Cluster, server: usize, key: &str) -> Answer {
    cluster.api.post(server, "/v1/cluster:rotate-root-key", key, &json!({}), ANSWER).await.expect("an answer")
}

/// The content of one of the key files of each server.
fn keys(cluster: &Cluster, file: &str) -> Vec<Option<String>> {
    cluster.servers.iter().map(|s| std::fs::read_to_string(s.data().join(file)).ok()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_root_key_is_replaced_on_all_servers_or_on_none() {
    let _one = ONE.lock().await;
    let mut cluster = Cluster::in_namespaces(3, 2).await;
    cluster.add_agent().await;
    let old = keys(&cluster, "root.key");
    assert!(old.iter().all(|key| key.is_some() && *key == old[0]), "one key");

    cluster.servers[2].kill();
    let refused = rotate(&cluster, 0, "without-2").await;
    assert_eq!(refused.status, 409, "{}", refused.body);
    let why = refused.body["detail"].as_str().unwrap_or_default().to_owned();
    assert!(why.contains("did not take the new root key") && why.contains("bring it back, or remove it"), "{why}");
    cluster.start_server(2);
    cluster.wait_ready(2).await;
    cluster.wait_voters(3).await;
    assert_eq!(keys(&cluster, "root.key"), old);

    let done = rotate(&cluster, 1, "with-all").await;
    assert_eq!(done.status, 200, "{}", done.body);
    let end = Instant::now() + PATIENCE;
    let new = loop {
        let new = keys(&cluster, "root.key");
        if new[0] != old[0] && new.iter().all(|key| *key == new[0]) {
            break new;
        }
        assert!(Instant::now() < end, "not all servers took it up");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(keys(&cluster, "root.key.retired"), old, "what was exported before can be restored");
    let again = rotate(&cluster, 1, "with-all").await;
    assert_eq!((again.status, keys(&cluster, "root.key")), (200, new.clone()), "the same request has one effect");

    // All start again from their disks, let a node in and another server, which gets the new key.
    for n in 0..3 {
        cluster.servers[n].kill();
    }
    for n in 0..3 {
        cluster.start_server(n);
    }
    for n in 0..3 {
        cluster.wait_ready(n).await;
    }
    cluster.wait_voters(3).await;
    cluster.add_agent().await;
    cluster.servers[2].kill();
    cluster.wipe_server(2);
    cluster.rejoin_server(2).await;
    let joined = cluster.servers[2].data().join("root.key");
    while std::fs::read_to_string(&joined).ok() != new[0] {
        assert!(cluster.servers[2].is_running() && Instant::now() < end + PATIENCE, "it joins with the new key");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
