//! A cluster that has lost its majority says what it knows and who is missing, and comes back from one server's disk.

use std::time::Duration;

use optimus_tests::cluster::Cluster;
use serde_json::json;

use crate::ONE;

const ANSWER: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_a_person_sees_what_is_known_and_one_server_brings_all_back() {
    let _one = ONE.lock().await;
    let mut cluster = Cluster::in_namespaces(3, 1).await;
    cluster.add_agent().await;
    let project = tempfile::tempdir().expect("a directory");
    std::fs::write(project.path().join("optimus.toml"), "name = \"sleeper\"\nrun = \"sleep 1000\"\n").expect("a project file");
    // A namespace has no cgroups, so its copy never starts; what is asked for is all that counts here.
    cluster.cli(0, &["deploy", "--no-wait", &project.path().display().to_string()]).expect(0);
    let data = cluster.servers[0].data().display().to_string();

    // With one of three away the rest goes on, and its store alone is no reason to start over.
    cluster.servers[0].stop();
    let refused = cluster.cli(0, &["cluster", "recover", "--data-dir", &data, "--yes"]);
    assert!(refused.code != 0 && refused.stderr.contains("majority"), "{}", refused.all());
    cluster.start_server(0);
    cluster.wait_ready(0).await;
    cluster.wait_voters(3).await;

    for gone in [1, 2] {
        cluster.servers[gone].kill();
    }
    for verb in [["status"].as_slice(), &["ps"], &["nodes"]] {
        let said = cluster.cli(0, verb).expect(0);
        let shown = if verb == ["nodes"] { "host-0" } else { "sleeper" };
        assert!(said.stdout.contains(shown) && said.stderr.contains("no server leads"), "{}", said.all());
    }
    let said = cluster.cli(0, &["cluster"]).expect(0);
    assert!(said.stdout.contains("no server leads") && said.stdout.matches("silent").count() == 2, "{}", said.all());
    assert!(said.stderr.contains("no quorum: 1 of 3") && said.stderr.contains("optimus cluster recover"), "{}", said.all());
    let seen = cluster.api.get(0, "/v1/cluster", ANSWER).await.expect("an answer");
    assert_eq!((seen.status, &seen.body["leader"]), (200, &json!(null)), "{}", seen.body);

    cluster.servers[0].stop();
    cluster.cli(0, &["cluster", "recover", "--data-dir", &data, "--yes"]).expect(0);
    cluster.start_server(0);
    cluster.wait_ready(0).await;
    let said = cluster.cli(0, &["ps"]).expect(0);
    assert!(said.stdout.contains("sleeper") && !said.stderr.contains("no server leads"), "{}", said.all());
    for again in [1, 2] {
        cluster.wipe_server(again);
        cluster.rejoin_server(again).await;
        cluster.wait_voters(again + 1).await;
    }
    assert_eq!(cluster.nodes_up().await, Some(1), "its agent is back by itself");
}
