//! Quotas, pools and volumes; what a node and a copy hold.

use optimus_common::protocol::DeviceGroup;
use optimus_core::state::Command;
use serde_json::{Value, json};

use crate::operate::upgraded;
use crate::support::{Answer, NODE, Server, project, start};

async fn put(server: &Server, path: &str, body: Value) -> Answer {
    Answer::of(server.request("PUT", path).json(&body).send().await.unwrap()).await
}

async fn delete(server: &Server, path: &str) -> Answer {
    Answer::of(server.request("DELETE", path).send().await.unwrap()).await
}

#[tokio::test]
async fn a_quota_is_set_shown_with_what_is_used_and_removed() {
    let server = upgraded().await;
    let path = "/v1/projects/shop/envs/prod/quota";
    server.get(path).await.problem(404, "OPT-1104");
    put(&server, path, json!({})).await.problem(400, "OPT-1101");
    put(&server, path, json!({"cores": 8})).await.problem(400, "OPT-1101");
    let set = put(&server, path, json!({"cpu": 8, "memory": 1 << 30, "copies": 2})).await;
    assert_eq!(set.status, 200, "{}", set.json());
    assert_eq!(put(&server, "/v1/projects/shop/quota", json!({"copies": 50})).await.status, 200);
    server.deploy(&["web"]).await;
    server.place("web", 0).await;
    let shown = server.get(path).await.json();
    assert_eq!(shown["limits"], json!({"cpu": 8.0, "memory": 1 << 30, "copies": 2}));
    let spec = server.get("/v1/projects/shop/envs/prod/workloads/web").await.json()["spec"]["resources"].clone();
    assert_eq!((shown["used"]["copies"].as_u64(), &shown["used"]["cpu"]), (Some(1), &spec["cpu"]));
    let listed = server.get("/v1/quotas?page_size=1").await.json();
    assert_eq!((listed["items"][0]["project"].as_str(), listed["items"][0].get("environment")), (Some("shop"), None), "{listed}");
    let next = server.get(&format!("/v1/quotas?page_size=1&page_token={}", listed["next_page_token"].as_str().unwrap())).await.json();
    assert_eq!((&next["items"][0], next.get("next_page_token")), (&shown, None));
    assert_eq!(server.get("/v1/quotas?environment=dev").await.json()["items"], json!([]));
    assert_eq!(delete(&server, &format!("{path}?dry_run=true")).await.json()["changed"], false);
    assert_eq!(delete(&server, path).await.json()["changed"], true);
    delete(&server, path).await.problem(404, "OPT-1104");
    server.stop().await;
}

#[tokio::test]
async fn who_goes_over_a_quota_is_told_by_how_much() {
    let server = upgraded().await;
    put(&server, "/v1/projects/shop/envs/prod/quota", json!({"copies": 1})).await;
    let mut shop = project(&["web"]);
    shop["workloads"]["web"]["copies"] = json!(2);
    assert_eq!(server.post("/v1/deploy", &shop).await.status, 200);
    server.place("web", 0).await;
    let why = server.get("/v1/projects/shop/envs/prod/workloads/web:explain").await.json().to_string();
    assert!(why.contains("quota of shop/prod") && why.contains("copies"), "{why}");
    server.stop().await;
}

#[tokio::test]
async fn pools_are_listed_with_their_nodes_and_set() {
    let server = upgraded().await;
    let listed = server.get("/v1/pools").await.json();
    let default = &listed["items"][0];
    assert_eq!(
        (default["name"].as_str(), default["layout"].as_str(), default["set"].as_bool()),
        (Some("default"), Some("spread"), Some(false))
    );
    assert_eq!(default["node_names"], json!(["host-1"]));
    server.get("/v1/pools/gpu").await.problem(404, "OPT-1104");
    put(&server, "/v1/pools/gpu", json!({"layout": "tall"})).await.problem(400, "OPT-1101");
    assert_eq!(put(&server, "/v1/pools/gpu", json!({"layout": "bin-pack"})).await.json()["layout"], "bin-pack");
    server.post("/v1/nodes/host-1:pool", &json!({"pool": "gpu"})).await;
    let gpu = server.get("/v1/pools/gpu").await.json();
    assert_eq!((gpu["nodes"].as_u64(), gpu["set"].as_bool(), gpu["layout"].as_str()), (Some(1), Some(true), Some("bin-pack")));
    let node = server.get("/v1/nodes/host-1").await.json();
    assert_eq!(gpu["cpu"], node["cpu"]);
    assert_eq!(delete(&server, "/v1/pools/gpu").await.json()["changed"], true);
    let gpu = server.get("/v1/pools/gpu").await.json();
    assert_eq!((gpu["layout"].as_str(), gpu["set"].as_bool()), (Some("spread"), Some(false)), "its node is still in it");
    delete(&server, "/v1/pools/gpu").await.problem(404, "OPT-1104");
    server.stop().await;
}

#[tokio::test]
async fn a_volume_shows_its_holders_and_is_not_removed_while_it_is_used() {
    let server = upgraded().await;
    let path = "/v1/projects/shop/envs/prod/volumes/data";
    put(&server, path, json!({"node": "host-9"})).await.problem(404, "OPT-1104");
    let made = put(&server, path, json!({"node": "host-1"})).await.json();
    assert_eq!((made["node_name"].as_str(), made["orphan"].as_bool()), (Some("host-1"), Some(true)), "{made}");
    let mut shop = project(&["web"]);
    shop["workloads"]["web"]["placement"] = json!({"volumes": ["data"]});
    assert_eq!(server.post("/v1/deploy", &shop).await.status, 200);
    let id = server.place("web", 0).await;
    let shown = server.get(path).await.json();
    assert_eq!((&shown["holders"], &shown["workloads"][0]["workload"]), (&json!(["shop/prod/web-0"]), &json!("web")));
    assert_eq!(server.get("/v1/volumes?project=shop").await.json()["items"], json!([shown]));
    assert_eq!(server.get(&format!("/v1/projects/shop/envs/prod/workloads/web/allocations/{id}")).await.json()["volumes"], json!(["data"]));
    assert_eq!(server.get("/v1/nodes/host-1").await.json()["volumes"], json!(["shop/prod/data"]));
    let refused = delete(&server, path).await.problem(409, "OPT-1109");
    assert!(refused["detail"].as_str().unwrap().contains("shop/prod/web-0"), "{refused}");
    // A stopped workload still asks for it.
    server.post("/v1/projects/shop/envs/prod/workloads/web:stop", &json!({})).await;
    delete(&server, path).await.problem(409, "OPT-1109");
    // Another of the same name elsewhere is not in its way.
    let other = "/v1/projects/shop/envs/dev/volumes/data";
    put(&server, other, json!({"node": "host-1"})).await;
    assert_eq!(delete(&server, other).await.json()["changed"], true);
    server.stop().await;
}

#[tokio::test]
async fn a_node_shows_its_devices_and_who_has_them() {
    let server = upgraded().await;
    let mut facts = server.store.state().nodes[&NODE].facts.clone();
    facts.attributes.insert("os.name".into(), "debian".into());
    facts.devices = vec![DeviceGroup {
        vendor: "acme".into(),
        kind: "fpga".into(),
        name: "x1".into(),
        ids: vec!["a".into(), "b".into()],
        paths: [("a".to_owned(), vec!["/dev/fpga0".to_owned()])].into(),
        ..DeviceGroup::default()
    }];
    server.store.propose(Command::NodeUp { node: NODE, facts }).await.unwrap();
    let mut shop = project(&["web"]);
    shop["workloads"]["web"]["placement"] = json!({"devices": ["acme/fpga"]});
    assert_eq!(server.post("/v1/deploy", &shop).await.status, 200);
    let id = server.place("web", 0).await;
    let node = server.get("/v1/nodes/host-1").await.json();
    assert_eq!(node["attributes"]["os.name"], "debian");
    assert_eq!(
        node["devices"],
        json!([
            {"kind": "acme/fpga/x1", "id": "a", "paths": ["/dev/fpga0"], "holder": "shop/prod/web-0"},
            {"kind": "acme/fpga/x1", "id": "b"},
        ])
    );
    assert_eq!(
        server.get(&format!("/v1/projects/shop/envs/prod/workloads/web/allocations/{id}")).await.json()["devices"],
        json!([{"kind": "acme/fpga/x1", "id": "a"}])
    );
    server.stop().await;
}

#[tokio::test]
async fn before_every_server_understands_them_quotas_are_refused() {
    let server = start().await;
    put(&server, "/v1/projects/shop/quota", json!({"copies": 5})).await.problem(409, "OPT-1109");
    server.stop().await;
}
