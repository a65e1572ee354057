//! Quotas, pools, volumes and what a node holds.

use serde_json::{Value, json};

use crate::fake::{Fake, Reply, Seen};
use crate::world::*;

const QUOTA: &str = "/v1/projects/shop/envs/prod/quota";
const VOLUME: &str = "/v1/projects/shop/envs/prod/volumes/data";

fn quota() -> Value {
    json!({"project": "shop", "environment": "prod", "limits": {"cpu": 8.0, "copies": 2},
        "used": {"cpu": 1.5, "memory": 64, "disk": 0, "copies": 3, "devices": 0}})
}

fn pool() -> Value {
    json!({"name": "gpu", "layout": "bin-pack", "set": true, "nodes": 2, "nodes_up": 1, "node_names": ["host-1", "host-2"], "copies": 3,
        "cpu": 8.0, "cpu_reserved": 1.5, "memory": 1 << 30, "memory_reserved": 1 << 20})
}

fn volume(name: &str, holders: Value, orphan: bool) -> Value {
    json!({"project": "shop", "environment": "prod", "name": name, "node": id(1), "node_name": "host-1", "node_up": true,
        "holders": holders, "workloads": [], "orphan": orphan})
}

fn api(seen: &Seen) -> Reply {
    match (seen.method.as_str(), seen.path()) {
        ("GET", "/v1/quotas") => Reply::json(json!({"items": [quota()], "index": 7})),
        ("GET" | "PUT", QUOTA) => Reply::json(quota()),
        ("GET", "/v1/pools") => Reply::json(json!({"items": [pool()], "index": 7})),
        ("PUT", "/v1/pools/gpu") => Reply::json(pool()),
        ("GET", "/v1/volumes") => {
            let all = [volume("data", json!(["shop/prod/db-0"]), false), volume("old", json!([]), true)];
            Reply::json(json!({"items": all, "index": 7}))
        }
        ("GET" | "PUT", VOLUME) => Reply::json(volume("data", json!(["shop/prod/db-0"]), false)),
        ("DELETE", VOLUME | QUOTA) => Reply::json(json!({"index": 8, "changed": true})),
        ("GET", "/v1/nodes/host-1") => Reply::json(json!({
            "id": id(1), "name": "host-1", "phase": "up", "address": "10.0.0.1", "version": "0.1.0", "arch": "x86_64", "kernel": "6.1",
            "cgroup": "v2", "unenforced": [], "drivers": ["process"], "cpu": 4.0, "cpu_reserved": 0.5, "memory": 1024,
            "memory_reserved": 64, "copies": 3, "joined_at": "2026-01-01T00:00:00Z", "last_seen": "2026-01-01T00:00:00Z",
            "certificate_expires_at": "2026-01-01T00:00:00Z", "labels": {}, "pool": "gpu", "cordoned": false,
            "disk": 4u64 << 30, "disk_reserved": 1 << 30, "disk_free": 2u64 << 30, "host_reserve": {"cpu": 0.5, "memory": 1 << 30, "disk": 0},
            "attributes": {"os.name": "debian"}, "volumes": ["shop/prod/data"],
            "devices": [{"kind": "acme/fpga/x1", "id": "a", "holder": "shop/prod/web-0"}, {"kind": "acme/fpga/x1", "id": "b"}],
        })),
        _ => Reply::problem(404, "OPT-1104", &format!("no route {} {}", seen.method, seen.target)),
    }
}

#[test]
fn quotas_are_shown_with_what_is_used_and_set_with_what_is_named() {
    let fake = Fake::start(api);
    let world = World::with(&fake);
    let out = world.run(&["quota"]).expect(0).out;
    assert!(out.contains("shop/prod") && out.contains("1.5/8") && out.contains("3/2 over"), "{out}");
    let out = world.run(&["quota", "set", "shop/prod", "--cpu", "8", "--copies", "2"]).expect(0).out;
    assert!(out.contains("3 of 2 reserved, more than it may") && !out.contains("memory"), "{out}");
    assert_eq!(fake.seen_of("PUT", QUOTA)[0].body, json!({"cpu": 8.0, "copies": 2}));
    world.run(&["quota", "set", "shop/prod"]).expect(2);
    world.run(&["quota", "show", "a/b/c"]).expect(2);
    world.run(&["quota", "rm", "shop/prod"]).expect(0);
}

#[test]
fn pools_are_shown_with_their_nodes_and_set() {
    let fake = Fake::start(api);
    let world = World::with(&fake);
    let out = world.run(&["pool"]).expect(0).out;
    assert!(out.contains("bin-pack") && out.contains("2 nodes") && out.contains("1.5/8"), "{out}");
    let out = world.run(&["pool", "set", "gpu", "--layout", "bin-pack"]).expect(0).out;
    assert!(out.contains("2, 1 up: host-1, host-2"), "{out}");
    assert_eq!(fake.seen_of("PUT", "/v1/pools/gpu")[0].body, json!({"layout": "bin-pack"}));
    world.run(&["pool", "set", "gpu", "--layout", "tall"]).expect(2);
}

#[test]
fn a_volume_is_created_on_a_node_and_removed_only_when_meant() {
    let fake = Fake::start(api);
    let world = World::with(&fake);
    let out = world.run(&["volume", "ls"]).expect(0).out;
    assert!(out.contains("shop/prod/db-0") && out.contains("orphan"), "{out}");
    let out = world.run(&["volume", "ls", "--orphans"]).expect(0).out;
    assert!(out.contains("shop/prod/old") && !out.contains("shop/prod/data"), "{out}");
    world.run(&["volume", "create", "shop/prod/data", "--node", "host-1"]).expect(0);
    assert_eq!(fake.seen_of("PUT", VOLUME)[0].body, json!({"node": "host-1"}));
    assert!(world.run(&["volume", "inspect", "shop/prod/data"]).expect(0).out.contains("held by  shop/prod/db-0"));
    let ran = world.run(&["volume", "rm", "shop/prod/data"]).expect(2);
    assert!(ran.err.contains("--yes") && fake.seen_of("DELETE", VOLUME).is_empty(), "{}", ran.err);
    world.run(&["volume", "rm", "shop/prod/data", "--yes"]).expect(0);
    assert_eq!(fake.seen_of("DELETE", VOLUME).len(), 1);
    world.run(&["volume", "inspect", "data"]).expect(2);
}

#[test]
fn a_node_shows_what_it_has_and_who_holds_it() {
    let fake = Fake::start(api);
    let world = World::with(&fake);
    let out = world.run(&["node", "show", "host-1"]).expect(0).out;
    for line in ["acme/fpga/x1 a held by shop/prod/web-0", "acme/fpga/x1 b free", "os.name = debian", "1 GiB of 4 GiB reserved, 2 GiB free"]
    {
        assert!(out.contains(line), "{line}: {out}");
    }
    assert!(out.contains("0.5 cores, 1 GiB memory"), "{out}");
}
