//! Releases that do not do: each gives way by itself, and says why.

use serde_json::Value;

use super::support::*;

const STRATEGIES: [(&str, &str); 3] = [
    ("rolling", "update = { strategy = \"rolling\", deadline = \"4s\" }"),
    ("canary", "update = { strategy = \"canary\", canary = 1, steps = [{ weight = 10, bake = \"1s\" }], deadline = \"4s\" }"),
    ("blue-green", "update = { strategy = \"blue-green\", hold = \"1s\", deadline = \"4s\" }"),
];

/// What is wrong with the new release, and what its reason has to name.
const FAULTS: [(&str, &[&str]); 4] = [
    ("exits", &["status 1", "no configuration found"]),
    ("never-ready", &["/healthz", "503"]),
    ("oom", &["out of memory", "32 MiB"]),
    ("wrong-port", &["refused", "listens on"]),
];

/// All at once: each of the four faults by each of the three strategies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_release_is_rolled_back_and_says_why() {
    let world = World::new();
    let mut cases = Vec::new();
    for (strategy, update) in STRATEGIES {
        for (fault, words) in FAULTS {
            cases.push((format!("{fault}-{strategy}"), fault, update, words));
        }
    }
    let web = |name, mode, more| Web { mode, cpu: "0.03", ..Web::new(name, 2, "v1", more) };
    let good: Vec<Web<'_>> = cases.iter().map(|(name, _, update, _)| web(name, "ok", update)).collect();
    world.deploy("all", &good);
    let names: Vec<&str> = cases.iter().map(|(name, ..)| name.as_str()).collect();
    let edge = world.edge("edge", &names).await;
    let mut before = Vec::new();
    for name in &names {
        world.phase(name, &["done"]).await;
        routed(&edge, name, 2).await;
        before.push(world.pids(name));
    }
    let bad: Vec<Web<'_>> = cases.iter().map(|(name, fault, update, _)| Web { version: "v2", ..web(name, fault, update) }).collect();
    world.deploy("all", &bad);
    for ((name, _, _, words), pids) in cases.iter().zip(before) {
        let ended = world.phase(name, &["rolled_back"]).await;
        let why = said(&ended["reason"]);
        assert!(words.iter().all(|word| why.contains(word)), "{name}: the reason names {words:?}: {why}");
        assert_eq!(ended["from_release"], 1, "{ended:#}");
        // The old release was there all the time, and has all requests again.
        let seen = routed(&edge, name, 2).await;
        world.expect_whole(name, &pids, 1, &seen);
        let listed = world.sandbox.run(&["deployments", "list", name]).expect(0).stdout;
        assert!(listed.contains("rolled") && listed.contains(words[0]), "{listed}");
    }
}

fn said(reason: &Value) -> String {
    reason["message"].as_str().unwrap_or_default().to_owned()
}
