//! Jobs, drains and rebalancing.

use serde_json::{Value, json};

use crate::fake::{Fake, Reply, Seen};
use crate::world::*;

const RUN: &str = "/v1/projects/shop/envs/dev/workloads/report";

fn run(number: u64, phase: &str) -> Value {
    json!({
        "id": id(number.into()), "project": "shop", "environment": "dev", "workload": "report", "number": number, "trigger": "request",
        "phase": phase, "release": 1, "copies": ["report-0"], "copies_wanted": 1, "copies_done": 0, "attempts": 1, "failures": 0,
        "created_at": "2026-01-01T00:00:00Z", "started_at": "2026-01-01T00:00:00Z", "ended_at": "2026-01-01T00:00:02Z", "exit": 3,
    })
}

fn node(drain: Value, cordoned: bool) -> Value {
    json!({
        "id": id(1), "name": "host-1", "phase": "up", "address": "10.0.0.1", "version": "0.1.0", "arch": "x86_64", "kernel": "6.1",
        "cgroup": "v2", "unenforced": [], "drivers": ["process"], "cpu": 4.0, "cpu_reserved": 0.5, "memory": 1024, "memory_reserved": 64,
        "copies": 3, "joined_at": "2026-01-01T00:00:00Z", "last_seen": "2026-01-01T00:00:00Z",
        "certificate_expires_at": "2026-01-01T00:00:00Z", "labels": {"zone": "b"}, "pool": "batch", "cordoned": cordoned, "drain": drain,
    })
}

fn api(seen: &Seen) -> Reply {
    let ended = json!({"started_at": "2026-01-01T00:00:00Z", "keep_daemons": false, "done_at": "2026-01-01T00:00:03Z"});
    match (seen.method.as_str(), seen.path()) {
        ("GET", "/v1/workloads") => Reply::json(page(vec![workload("shop/dev/report")])),
        ("POST", path) if path == format!("{RUN}:run") => Reply::json(json!({"index": 5, "changed": true, "run": run(4, "waiting")})),
        ("POST", path) if path == format!("{RUN}/runs/4:cancel") => {
            Reply::json(json!({"index": 6, "changed": true, "run": run(4, "cancelled")}))
        }
        ("GET", path) if path == format!("{RUN}/runs/4") => Reply::json(run(4, "failed")),
        ("GET", path) if path == format!("{RUN}/runs") => {
            Reply::json(json!({"items": [run(4, "failed"), run(3, "succeeded")], "index": 7}))
        }
        ("GET", "/v1/jobs") => Reply::json(json!({"index": 7, "items": [{
            "project": "shop", "environment": "dev", "workload": "report", "release": 2, "stopped": false,
            "schedule": {"cron": "0 3 * * *", "timezone": "Europe/Berlin", "overlap": "forbid", "missed": "run_once", "jitter": "0s"},
            "next_at": "2126-01-01T02:00:00Z", "next_local": "2126-01-01T03:00:00+01:00[Europe/Berlin]",
            "waiting": 1, "active": 2, "skipped": 5, "last_run": run(4, "failed"),
        }]})),
        ("POST", "/v1/nodes/host-1:drain") => Reply::json(node(ended, true)),
        ("POST", path) if path.starts_with("/v1/nodes/host-1:") => Reply::json(node(Value::Null, path.ends_with(":cordon"))),
        ("GET", "/v1/nodes/host-1") => Reply::json(node(Value::Null, false)),
        ("GET", "/v1/nodes/host-1:preview-drain") => Reply::json(json!({"node": id(1), "waves": 2, "copies": [
            {"copy": "shop/dev/web-0", "fate": "moves", "to": "host-2"}, {"copy": "shop/dev/report-3", "fate": "finishes"},
        ]})),
        ("GET" | "PUT" | "POST", "/v1/rebalance") => Reply::json(json!({
            "index": 7, "changed": true, "settings": {"automatic": false, "moves": 3, "every": "10m"},
            "moves": [{"allocation": id(9), "copy": "shop/dev/web-1", "from": "host-1", "to": "host-2", "why": "2 copies share the node"}],
        })),
        _ => Reply::problem(404, "OPT-1104", &format!("no route {} {}", seen.method, seen.target)),
    }
}

#[test]
fn a_run_is_started_with_what_it_is_given_and_followed_to_its_end() {
    let fake = Fake::start(api);
    let world = World::with(&fake);
    let file = world.write("order.json", "{}");
    let ran = world.run(&["run", "report", "-p", "CUSTOMER=7=x", "--payload", file.to_str().unwrap()]).expect(1);
    assert_eq!(fake.seen_of("POST", &format!("{RUN}:run"))[0].body, json!({"params": {"CUSTOMER": "7=x"}, "payload": "e30="}));
    assert!(ran.err.contains("run 4 of shop/dev/report failed after 2.0s") && ran.err.contains("optimus logs"), "{}", ran.err);
    let ran = world.run(&["run", "report", "--no-wait"]).expect(0);
    assert!(ran.err.contains("run 4 of shop/dev/report is waiting"), "{}", ran.err);
    std::fs::write(&file, vec![b'x'; 20_000]).unwrap();
    let ran = world.run(&["run", "report", "--payload", file.to_str().unwrap()]).expect(2);
    assert!(ran.err.contains("longer than 16384 bytes"), "{}", ran.err);
    world.run(&["run", "report", "-p", "CUSTOMER"]).expect(2);
}

#[test]
fn runs_and_jobs_are_listed() {
    let fake = Fake::start(api);
    let world = World::with(&fake);
    let ran = world.run(&["runs", "report"]).expect(0);
    assert!(ran.out.contains("failed") && ran.out.contains("succeeded") && ran.out.contains("request"), "{}", ran.out);
    assert_eq!(world.run(&["runs", "report", "--json"]).expect(0).json()["items"][1]["number"], 3);
    world.run(&["runs", "report", "--cancel", "4"]).expect(0);
    let ran = world.run(&["jobs"]).expect(0);
    for part in ["shop/dev/report", "0 3 * * * Europe/Berlin", "2126-01-01T03:00:00+01:00[Europe/Berlin]", "2+1", "#4 failed"] {
        assert!(ran.out.contains(part), "{part}: {}", ran.out);
    }
}

#[test]
fn nodes_are_labelled_cordoned_and_drained() {
    let fake = Fake::start(api);
    let world = World::with(&fake);
    world.run(&["nodes", "label", "host-1", "zone=b", "disk-"]).expect(0);
    assert_eq!(fake.seen_of("POST", "/v1/nodes/host-1:label")[0].body, json!({"labels": {"zone": "b", "disk": null}}));
    world.run(&["nodes", "label", "host-1", "zone"]).expect(2);
    world.run(&["nodes", "pool", "host-1", "batch"]).expect(0);
    assert!(world.run(&["nodes", "cordon", "host-1"]).expect(0).err.contains("takes no new copies"));
    assert!(world.run(&["nodes", "uncordon", "host-1"]).expect(0).err.contains("takes copies again"));
    let ran = world.run(&["nodes", "show", "host-1"]).expect(0);
    assert!(ran.out.contains("pool     batch") && ran.out.contains("zone=b"), "{}", ran.out);
    let ran = world.run(&["nodes", "drain", "host-1", "--preview"]).expect(0);
    assert!(
        ran.out.contains("moves to host-2") && ran.out.contains("left to finish") && ran.err.contains("2 waves"),
        "{}{}",
        ran.out,
        ran.err
    );
    assert!(fake.seen_of("POST", "/v1/nodes/host-1:drain").is_empty());
    let ran = world.run(&["nodes", "drain", "host-1", "--deadline", "10m", "--keep-daemons"]).expect(0);
    assert!(ran.err.contains("is drained, in 3.0s"), "{}", ran.err);
    assert_eq!(fake.seen_of("POST", "/v1/nodes/host-1:drain")[0].body, json!({"deadline": "10m", "force": false, "keep_daemons": true}));
    world.run(&["nodes", "drain", "host-1", "--cancel"]).expect(0);
    world.run(&["nodes", "drain", "host-1", "--cancel", "--force"]).expect(2);
}

#[test]
fn rebalancing_says_what_moves_and_keeps_what_is_not_set() {
    let fake = Fake::start(api);
    let world = World::with(&fake);
    let ran = world.run(&["rebalance", "--dry-run"]).expect(0);
    assert!(ran.out.contains("shop/dev/web-1") && ran.out.contains("share the node"), "{}", ran.out);
    assert_eq!(fake.seen_of("POST", "/v1/rebalance")[0].body, json!({"dry_run": true}));
    world.run(&["rebalance", "--auto", "on", "--moves", "2"]).expect(0);
    assert_eq!(fake.seen_of("PUT", "/v1/rebalance")[0].body, json!({"automatic": true, "moves": 2, "every": "10m"}));
}
