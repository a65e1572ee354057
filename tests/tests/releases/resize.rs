//! Other limits for copies that run: set in the kernel without a restart, or refused and told.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use super::support::*;

/// The number in a file of a process's v1 control group.
fn kernel(pid: i32, controller: &str, file: &str) -> u64 {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let line = groups.lines().find(|l| l.split(':').nth(1).is_some_and(|c| c.split(',').any(|c| c == controller))).unwrap();
    let group = line.splitn(3, ':').nth(2).unwrap().trim_start_matches('/');
    let path = PathBuf::from("/sys/fs/cgroup").join(controller).join(group).join(file);
    fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

fn limits(copy: &Value) -> (&Value, &Value) {
    (&copy["limits"]["cpu"], &copy["limits"]["memory_limit"])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_change_under_a_running_copy_and_what_it_needs_is_not_taken_away() {
    let world = World::new();
    let held = "labels = { team = \"shop\" }";
    world.deploy("web", &[Web { cpu: "0.2", memory: "32M..128M", mode: "ok", ..Web::new("web", 2, "v1", held) }]);
    world.phase("web", &["done"]).await;
    let pids = world.pids("web");
    let limit = |pid: i32| kernel(pid, "memory", "memory.limit_in_bytes") >> 20;
    assert_eq!(pids.iter().map(|pid| limit(*pid)).collect::<Vec<_>>(), [128, 128]);

    // More, as it runs.
    world.sandbox.run(&["scale", "web", "--cpu", "0.3", "--memory", "64M..256M"]).expect(0);
    let done = world.phase("web", &["done"]).await;
    assert_eq!((done["trigger"].as_str(), done["release"].as_u64()), (Some("resize"), Some(2)));
    assert_eq!(world.pids("web"), pids, "nothing was restarted");
    assert_eq!(pids.iter().map(|pid| limit(*pid)).collect::<Vec<_>>(), [256, 256]);
    assert_eq!(kernel(pids[0], "cpu", "cpu.cfs_quota_us") * 1000 / kernel(pids[0], "cpu", "cpu.cfs_period_us"), 300);
    for copy in world.sandbox.copies("web") {
        assert_eq!(limits(&copy), (&Value::from(0.3), &Value::from(256 << 20)), "{copy:#}");
        assert_eq!((&copy["restarts"], &copy["release"]), (&Value::from(0), &Value::from(2)));
    }
    assert!(world.sandbox.run(&["explain", "web-0"]).expect(0).stdout.contains("256 MiB"), "explain names the limits");

    // Less, by a deploy, and still as it runs.
    world.deploy("web", &[Web { cpu: "0.2", memory: "32M..96M", mode: "ok", ..Web::new("web", 2, "v1", held) }]);
    world.phase("web", &["done"]).await;
    assert_eq!((world.pids("web"), limit(pids[1])), (pids.clone(), 96));

    // Below what it uses: refused, told, and undone.
    world.deploy("big", &[Web { cpu: "0.1", memory: "64M..128M", version: "v1\", WEB_HOLD = \"64", ..Web::new("big", 1, "", "") }]);
    world.phase("big", &["done"]).await;
    let big = world.pids("big");
    world.sandbox.run(&["scale", "big", "--memory", "32M"]).expect(6);
    let ended = world.phase("big", &["rolled_back"]).await;
    let why = ended["reason"]["message"].as_str().unwrap();
    assert!(why.contains("cannot enforce") && why.contains("memory"), "{why}");
    until("the old limits to be told", async || {
        let copy = world.sandbox.copies("big").remove(0);
        (copy["limits"]["memory_limit"] == 128 << 20 && copy["release"] == 1 && copy["reason"].is_null()).then_some(())
    })
    .await;
    assert_eq!((world.pids("big"), limit(big[0])), (big.clone(), 128));
    let nothing = world.sandbox.run(&["scale", "web", "--memory", "128K"]);
    assert!(nothing.code != 0 && nothing.stderr.contains("memory"), "{}", nothing.all());
}
