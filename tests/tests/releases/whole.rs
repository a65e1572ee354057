//! The release before stays whole: while a canary is out, and when a deployment is called off, whatever its phase.

use super::support::*;

/// The processes of a node that is gone, and those of the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_old_copy_that_dies_during_a_canary_is_replaced_by_the_old_release() {
    let mut world = World::new();
    let first = world.sandbox.workload_ports;
    let second = world.sandbox.another_agent("second", 2, &format!("{}-{}", first + 100, first + 199));
    let canary = "update = { strategy = \"canary\", canary = 1, steps = [{ weight = 20, bake = \"10m\" }] }";
    let web = |version| Web::new("web", 4, version, canary);
    world.deploy("web", &[web("v1")]);
    world.phase("web", &["done"]).await;
    let edge = world.edge("edge", &["web"]).await;
    routed(&edge, "web", 4).await;
    world.deploy("web", &[web("v2")]);
    world.phase("web", &["baking"]).await;

    // One is killed: its agent starts it again, as it was.
    let old = |world: &World| {
        let copies = world.sandbox.copies("web");
        copies.into_iter().filter(|c| c["release"] == 1 && c["desired_run"] == true && c["ready"] == true).collect::<Vec<_>>()
    };
    let victim = old(&world)[0].clone();
    let pid = victim["pid"].as_i64().unwrap() as i32;
    // SAFETY: plain kill(2) of a copy of this test.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
    until("it to be back", async || old(&world).iter().any(|c| c["id"] == victim["id"] && c["pid"] != pid).then_some(())).await;

    // A whole node is gone, with what ran on it.
    let lost: Vec<_> = old(&world).into_iter().filter(|c| c["node_name"] == "second").collect();
    assert_eq!(lost.len(), 2, "half of them are there");
    world.sandbox.process(second).kill();
    for copy in &lost {
        // SAFETY: as above.
        unsafe { libc::kill(copy["pid"].as_i64().unwrap() as i32, libc::SIGKILL) };
    }
    until("four old copies on the node that is left", async || {
        (old(&world).iter().filter(|c| c["node_name"] != "second").count() == 4).then_some(())
    })
    .await;
    let deployment = world.phase("web", &["baking", "shifting", "health", "starting", "placing"]).await;
    assert_eq!(deployment["release"], 2, "the canary goes on: {deployment:#}");
    let seen = until("one canary beside four old copies", async || {
        let seen = edge.seen("web");
        let new = seen.releases.values().filter(|r| **r == 2).count();
        (new == 1 && seen.releases.len() == 5).then_some(seen)
    })
    .await;
    let share = |release: u64| -> u32 { seen.set.endpoints.iter().filter(|e| seen.releases[&e.id] == release).map(|e| e.weight).sum() };
    assert_eq!(share(2) * 4, share(1), "a fifth of the traffic: {seen:?}");
}

/// How a deployment comes to stay in a phase.
struct Stuck {
    phase: &'static str,
    strategy: &'static str,
    /// Further settings of its update.
    update: &'static str,
    mode: &'static str,
    /// Lines of the new release only.
    more: &'static str,
}

const STUCK: [Stuck; 11] = [
    Stuck { phase: "preparing", strategy: "canary", update: "", mode: "ok", more: "after = [\"absent\"]" },
    Stuck { phase: "placing", strategy: "canary", update: "", mode: "ok", more: "" },
    Stuck { phase: "starting", strategy: "canary", update: "", mode: "ok", more: "" },
    Stuck { phase: "health", strategy: "canary", update: "", mode: "never-ready", more: "" },
    Stuck { phase: "shifting", strategy: "canary", update: "", mode: "ok", more: "" },
    Stuck { phase: "baking", strategy: "canary", update: "steps = [{ weight = 10, bake = \"10m\" }]", mode: "ok", more: "" },
    Stuck {
        phase: "promoting",
        strategy: "canary",
        update: "steps = [{ weight = 10, bake = \"10ms\" }], auto_promote = false",
        mode: "ok",
        more: "",
    },
    Stuck { phase: "promoting", strategy: "blue-green", update: "auto_promote = false", mode: "ok", more: "" },
    Stuck { phase: "shifting", strategy: "blue-green", update: "", mode: "ok", more: "" },
    Stuck { phase: "baking", strategy: "blue-green", update: "hold = \"10m\"", mode: "ok", more: "" },
    // Its second copy is still to come.
    Stuck { phase: "placing", strategy: "rolling", update: "", mode: "never-ready", more: "" },
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deployment_called_off_in_any_phase_leaves_the_old_release_whole() {
    let mut world = World::new();
    let nodes = world.sandbox.run(&["nodes", "--json"]).expect(0).json();
    let memory = nodes["items"][0]["facts"]["memory"].as_u64().or(nodes["items"][0]["memory"].as_u64()).expect("a node's memory");
    // Two of them do not fit on the node at once.
    let most = format!("{}M", (memory * 6 / 10) >> 20);
    let names: Vec<String> = STUCK.iter().map(|s| format!("{}-{}", s.phase, s.strategy)).collect();
    let all: Vec<&str> = names.iter().map(String::as_str).collect();
    let edge = world.edge("edge", &all).await;
    for (stuck, name) in STUCK.iter().zip(&names) {
        let Stuck { phase, strategy, update, mode, more } = stuck;
        let comma = if update.is_empty() { "" } else { ", " };
        let update = format!("update = {{ strategy = \"{strategy}\", deadline = \"5m\"{comma}{update} }}");
        // What has no room beside itself stays in that phase.
        let big = (*phase, *strategy) == ("placing", "canary");
        let memory = if big { &most } else { "8M..32M" };
        let copies = if big { 1 } else { 2 };
        world.deploy(name, &[Web { memory, cpu: "0.03", ..Web::new(name, copies, "v1", &update) }]);
        world.phase(name, &["done"]).await;
        let before = routed(&edge, name, copies as usize).await;
        let pids = world.pids(name);

        let more = format!("{update}\n{more}");
        match *phase {
            "starting" => world.sandbox.process(world.agent).signal(libc::SIGSTOP),
            "shifting" => edge.hold(true),
            _ => {}
        }
        world.deploy(name, &[Web { memory, mode, cpu: "0.03", ..Web::new(name, copies, "v2", &more) }]);
        world.phase(name, &[phase]).await;
        world.sandbox.run(&["abort", name, "--reason", "changed our minds"]).expect(0);
        world.sandbox.process(world.agent).signal(libc::SIGCONT);
        edge.hold(false);
        let ended = world.phase(name, &["cancelled"]).await;
        assert!(ended["reason"]["message"].as_str().unwrap_or_default().contains("changed our minds"), "{ended:#}");
        let seen = until("the old endpoints alone", async || Some(edge.seen(name)).filter(|seen| seen.releases == before.releases)).await;
        world.expect_whole(name, &pids, 1, &seen);
        world.sandbox.run(&["rm", name, "--yes", "--no-wait"]);
    }
}
