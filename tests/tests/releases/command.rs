//! The release command: once in a deployment, before its copies, with a log of its own.

use std::fs;

use super::support::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_release_command_runs_once_before_the_copies_and_its_failure_is_the_end() {
    let mut world = World::new();
    let notes = world.sandbox.path("notes");
    fs::write(&notes, "").unwrap();
    let go = world.sandbox.path("go");
    let noted = || fs::read_to_string(&notes).unwrap();
    let note = format!("echo began $OPTIMUS_RELEASE $WEB_VERSION >> {}", notes.display());

    // It ends when it may; the server is killed and comes back meanwhile.
    let waits = format!("release_command = '''{note}; echo migrating; until [ -e {} ]; do sleep 0.05; done; echo done'''", go.display());
    world.deploy("web", &[Web::new("web", 2, "v1", &waits)]);
    until("the command to run", async || (noted() == "began 1 v1\n").then_some(())).await;
    let before = world.phase("web", &["preparing"]).await;
    assert!(before["reason"]["message"].as_str().unwrap().contains("release command of release 1 runs on"), "{before:#}");
    world.sandbox.process(world.server).kill();
    world.sandbox.server();
    let copies = world.sandbox.copies("web");
    assert_eq!(copies.iter().map(|c| c["name"].as_str().unwrap()).collect::<Vec<_>>(), ["web-release"], "no copy starts before it ended");
    fs::write(&go, "").unwrap();
    let done = world.phase("web", &["done"]).await;
    assert_eq!(done["release_step"], copies[0]["id"]);
    assert_eq!(noted(), "began 1 v1\n", "once, whoever leads");
    let said = world.sandbox.run(&["logs", "web-release"]).expect(0).stdout;
    assert!(said.contains("migrating") && said.contains("done"), "{said}");
    let edge = world.edge("edge", &["web"]).await;
    routed(&edge, "web", 2).await;
    let pids = world.pids("web");
    assert_eq!(pids.len(), 2);

    // One that fails.
    let fails = format!("release_command = '''{note}; echo no such table; exit 3'''");
    world.deploy("web", &[Web::new("web", 2, "v2", &fails)]);
    let ended = world.phase("web", &["rolled_back"]).await;
    let why = ended["reason"]["message"].as_str().unwrap();
    assert!(why.contains("release command failed: exited with status 3") && why.ends_with("no such table"), "{why}");
    world.expect_whole("web", &pids, 1, &routed(&edge, "web", 2).await);

    // One that takes too long is ended at its own deadline.
    let slow = format!("release_command = {{ run = '''{note}; sleep 600''', timeout = \"1s\" }}");
    world.deploy("web", &[Web::new("web", 2, "v3", &slow)]);
    let ended = world.phase("web", &["rolled_back"]).await;
    assert!(ended["reason"]["message"].as_str().unwrap().contains("longer than its timeout of 1s"), "{ended:#}");
    world.expect_whole("web", &pids, 1, &routed(&edge, "web", 2).await);
    assert_eq!(noted(), "began 1 v1\nbegan 2 v2\nbegan 3 v3\n");
}
