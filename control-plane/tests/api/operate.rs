//! Jobs and their runs; labels, drains and rebalancing.

use optimus_core::state::{Applied, Command, LEVEL, RunStep, ServerFacts};
use serde_json::json;

use crate::support::{Answer, Server, key, project, spec, start};

const JOB: &str = "/v1/projects/shop/envs/prod/workloads/report";

/// A cluster that understands all commands.
pub async fn upgraded() -> Server {
    let server = start().await;
    let facts = ServerFacts { name: "s".into(), address: String::new(), api: String::new(), version: String::new(), level: LEVEL };
    for command in [Command::AdmitServer { token: None, server: facts, key_fingerprint: vec![9] }, Command::RaiseVersion { to: LEVEL }] {
        assert!(matches!(server.store.propose(command).await.unwrap(), Applied::Done { .. }));
    }
    server
}

async fn with_job(schedule: Option<&str>) -> Server {
    let server = upgraded().await;
    let mut job = spec();
    (job["kind"], job["ports"], job["health"]) = (json!("job"), json!([]), json!({}));
    job["runs"] = json!({"active": 1, "waiting": 1, "retries": 0, "keep": 20, "on": "request", "params": ["CUSTOMER"], "payload": "optional",
        "start_within": "1h"});
    job["copies"] = json!(1);
    if let Some(line) = schedule {
        job["schedule"] = json!(line);
        job["runs"]["params"] = json!([]);
    }
    let body = json!({"project": "shop", "environment": "prod", "workloads": {"report": job}});
    let answer = server.post("/v1/deploy", &body).await;
    assert_eq!(answer.status, 200, "{}", answer.json());
    server
}

#[tokio::test]
async fn a_run_is_started_looked_at_and_cancelled() {
    let server = with_job(None).await;
    let started = server.post(&format!("{JOB}:run"), &json!({"params": {"CUSTOMER": "7"}, "payload": "aGk="})).await;
    assert_eq!(started.status, 200, "{}", started.json());
    let run = &started.json()["run"];
    assert_eq!((run["number"].as_u64(), run["phase"].as_str(), run["trigger"].as_str()), (Some(1), Some("waiting"), Some("request")));
    assert_eq!(server.get(&format!("{JOB}/runs")).await.json()["items"][0]["params"]["CUSTOMER"], "7");
    assert_eq!(server.get(&format!("{JOB}/runs/1")).await.json()["number"], 1);
    server.get(&format!("{JOB}/runs/9")).await.problem(404, "OPT-1104");
    let cancelled = server.post(&format!("{JOB}/runs/1:cancel"), &json!({})).await;
    assert_eq!(cancelled.json()["run"]["phase"], "cancelled");
    server.stop().await;
}

#[tokio::test]
async fn a_retry_of_a_run_starts_no_second_and_a_flood_is_told_to_wait() {
    let server = with_job(None).await;
    let send = async |key: &str| {
        let body = json!({"params": {"CUSTOMER": "7"}});
        Answer::of(server.request("POST", &format!("{JOB}:run")).header("idempotency-key", key).json(&body).send().await.unwrap()).await
    };
    let (first, again) = (send("a").await, send("a").await);
    assert_eq!((first.json()["run"]["id"].clone(), again.header("idempotency-replayed")), (again.json()["run"]["id"].clone(), "true"));
    assert_eq!(send("b").await.json()["run"]["number"], 2);
    let refused = send("c").await;
    refused.problem(429, "OPT-1113");
    assert!(!refused.header("retry-after").is_empty());
    server.stop().await;
}

#[tokio::test]
async fn what_a_job_does_not_ask_for_is_refused() {
    let server = with_job(None).await;
    for body in [json!({}), json!({"params": {"CUSTOMER": "7", "X": "1"}}), json!({"params": {"CUSTOMER": "7".repeat(2000)}})] {
        server.post(&format!("{JOB}:run"), &body).await.problem(422, "OPT-1101");
    }
    server.post(&format!("{JOB}:run"), &json!({"params": {"CUSTOMER": "7"}, "payload": "%%"})).await.problem(400, "OPT-1101");
    server.deploy(&["web"]).await;
    server.post("/v1/projects/shop/envs/prod/workloads/web:run", &json!({})).await.problem(409, "OPT-1109");
    server.get("/v1/projects/shop/envs/prod/workloads/web/runs").await.problem(409, "OPT-1109");
    server.stop().await;
}

#[tokio::test]
async fn jobs_are_listed_with_their_schedule() {
    let server = with_job(Some("0 3 * * *")).await;
    let next = optimus_core::jobs::next_due(&key("report"), &optimus_common::spec::Schedule::of("0 3 * * *"), optimus_common::Timestamp(0));
    let arm = RunStep::Arm { key: key("report"), release: 1, decided: optimus_common::Timestamp(1), next };
    server.store.propose(Command::RunSteps(vec![arm])).await.unwrap();
    let jobs = server.get("/v1/jobs?project=shop").await.json();
    assert_eq!(jobs["items"][0]["schedule"]["cron"], "0 3 * * *");
    assert_eq!(jobs["items"][0]["next_local"], "1970-01-01T03:00:00+00:00[UTC]");
    assert_eq!(server.get("/v1/jobs?project=other").await.json()["items"], json!([]));
    assert_eq!(server.get(&format!("{JOB}/job")).await.json()["workload"], "report");
    let mut bad = project(&["x"]);
    bad["workloads"]["x"]["kind"] = json!("job");
    bad["workloads"]["x"]["health"] = json!({});
    bad["workloads"]["x"]["schedule"] = json!({"cron": "61 * * * *"});
    let problem = server.post("/v1/deploy", &bad).await.problem(422, "OPT-1001");
    assert_eq!(problem["errors"][0]["pointer"], "/workloads/x/schedule/cron");
    server.stop().await;
}

#[tokio::test]
async fn a_node_is_labelled_pooled_cordoned_and_drained() {
    let server = upgraded().await;
    let labelled = server.post("/v1/nodes/host-1:label", &json!({"labels": {"zone": "b"}})).await.json();
    assert_eq!((labelled["labels"]["zone"].as_str(), labelled["pool"].as_str()), (Some("b"), Some("default")));
    server.post("/v1/nodes/host-1:label", &json!({"labels": {"no space": "b"}})).await.problem(422, "OPT-1101");
    assert_eq!(server.post("/v1/nodes/host-1:pool", &json!({"pool": "batch"})).await.json()["pool"], "batch");
    assert_eq!(server.post("/v1/nodes/host-1:cordon", &json!({})).await.json()["cordoned"], true);
    assert_eq!(server.post("/v1/nodes/host-1:uncordon", &json!({})).await.json()["cordoned"], false);
    // What names no pool is not placed in this one.
    assert_eq!(server.post("/v1/nodes/host-1:pool", &json!({"pool": "default"})).await.json()["pool"], "default");
    server.deploy(&["web"]).await;
    server.place("web", 0).await;
    let preview = server.get("/v1/nodes/host-1:preview-drain").await.json();
    assert_eq!((preview["copies"][0]["copy"].as_str(), preview["copies"][0]["fate"].as_str()), (Some("shop/prod/web-0"), Some("waits")));
    assert_eq!(server.get("/v1/nodes/host-1").await.json()["cordoned"], false);
    let drained = server.post("/v1/nodes/host-1:drain", &json!({"deadline": "10m"})).await.json();
    assert_eq!((drained["cordoned"].as_bool(), drained["drain"]["left"][0]["copy"].as_str()), (Some(true), Some("shop/prod/web-0")));
    let kept = server.post("/v1/nodes/host-1:cancel-drain", &json!({})).await.json();
    assert_eq!((kept["cordoned"].as_bool(), kept.get("drain")), (Some(false), None));
    server.post("/v1/nodes/host-9:drain", &json!({})).await.problem(404, "OPT-1104");
    server.stop().await;
}

#[tokio::test]
async fn rebalancing_is_set_within_bounds_and_a_dry_run_touches_nothing() {
    let server = upgraded().await;
    let put = async |body: serde_json::Value| Answer::of(server.request("PUT", "/v1/rebalance").json(&body).send().await.unwrap()).await;
    put(json!({"automatic": true, "moves": 0, "every": "10m"})).await.problem(400, "OPT-1101");
    put(json!({"automatic": true, "moves": 2, "every": "1s"})).await.problem(400, "OPT-1101");
    assert_eq!(put(json!({"automatic": false, "moves": 2, "every": "10m"})).await.status, 200);
    assert_eq!(server.get("/v1/rebalance").await.json()["settings"], json!({"automatic": false, "moves": 2, "every": "10m"}));
    let before = server.store.state();
    assert_eq!(server.post("/v1/rebalance", &json!({"dry_run": true})).await.json()["changed"], false);
    assert_eq!(server.store.state(), before);
    server.stop().await;
}

#[tokio::test]
async fn before_every_server_understands_them_jobs_and_drains_are_refused() {
    let server = start().await;
    server.post("/v1/nodes/host-1:drain", &json!({})).await.problem(409, "OPT-1109");
    let mut daemon = project(&["logger"]);
    (daemon["workloads"]["logger"]["kind"], daemon["workloads"]["logger"]["copies"]) = (json!("daemon"), json!(null));
    server.post("/v1/deploy", &daemon).await.problem(409, "OPT-1109");
    server.stop().await;
}
