//! An agent is connected to one server; every server passes on what is asked of it.

use std::time::{Duration, Instant};

use optimus_tests::cluster::Cluster;
use optimus_tests::harness::PATIENCE;

use crate::{ONE, seed};

const ANSWER: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_and_figures_are_had_from_every_server() {
    let _one = ONE.lock().await;
    let mut cluster = Cluster::behind_proxies(3, seed("relay")).await;
    cluster.add_agent().await;
    let project = tempfile::tempdir().expect("a directory");
    let spec = "project = \"relay\"\nname = \"talker\"\nrun = \"sh -c 'echo said once; sleep 1000'\"\n";
    std::fs::write(project.path().join("optimus.toml"), spec).expect("a project file");
    cluster.cli(0, &["deploy", &project.path().display().to_string()]).expect(0);

    for server in 0..3 {
        let said = cluster.cli(server, &["logs", "talker"]).expect(0);
        assert!(said.stdout.contains("said once"), "server {server}: {}", said.all());
    }
    // Wherever the agent goes when its server dies, the others find it.
    let began = Instant::now();
    cluster.servers[0].kill();
    for server in 1..3 {
        while !cluster.cli(server, &["logs", "talker"]).stdout.contains("said once") {
            assert!(began.elapsed() < PATIENCE, "server {server} does not find the agent");
        }
        let seen = cluster.api.get(server, "/v1/nodes/host-0/metrics?metrics=cpu", ANSWER).await.expect("an answer");
        assert_eq!(seen.status, 200, "{}", seen.body);
    }
    cluster.cli(1, &["rm", "talker", "--yes"]).expect(0);
}
