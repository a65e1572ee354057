//! What can be asked of a deployment.

use optimus_core::state::{Command, LEVEL, ServerFacts};
use serde_json::json;

use crate::support::{Server, project, start};

const WEB: &str = "/v1/projects/shop/envs/prod/workloads/web";

/// As a cluster whose servers all understand this build's commands.
async fn start_raised() -> Server {
    let server = start().await;
    let facts = ServerFacts { name: "s".into(), address: "h:1".into(), api: "h:2".into(), version: "1".into(), level: LEVEL };
    server.store.propose(Command::AdmitServer { token: None, server: facts, key_fingerprint: vec![1] }).await.unwrap();
    server.store.propose(Command::RaiseVersion { to: LEVEL }).await.unwrap();
    server
}

#[tokio::test]
async fn a_deployment_is_paused_resumed_and_called_off() {
    let server = start_raised().await;
    server.deploy(&["web"]).await;
    let paused = server.post(&format!("{WEB}:pause"), &json!({"reason": "a look first"})).await.json();
    assert_eq!((&paused["changed"], &paused["deployment"]["paused"]), (&json!(true), &json!(true)), "{paused}");
    assert!(paused["deployment"]["reason"]["message"].as_str().unwrap().ends_with("a look first"), "{paused}");
    assert_eq!(server.post(&format!("{WEB}:pause"), &json!({})).await.json()["changed"], false);
    let resumed = server.post(&format!("{WEB}:resume"), &json!({})).await.json();
    assert_eq!(resumed["deployment"].get("paused"), None, "{resumed}");
    // A first rolling deployment has nothing to promote and nothing before it.
    server.post(&format!("{WEB}:promote"), &json!({})).await.problem(409, "OPT-1109");
    server.post(&format!("{WEB}:rollback"), &json!({})).await.problem(409, "OPT-1109");
    server.post(&format!("{WEB}:rollback"), &json!({"to": 9})).await.problem(404, "OPT-1104");
    server.post(&format!("{WEB}:retry"), &json!({})).await.problem(409, "OPT-1109");
    let aborted = server.post(&format!("{WEB}:abort"), &json!({})).await.json();
    assert_eq!(aborted["deployment"]["phase"], "cancelled", "{aborted}");
    let again = server.post(&format!("{WEB}:retry"), &json!({})).await.json();
    assert_eq!((&again["deployment"]["trigger"], &again["deployment"]["phase"]), (&json!("retry"), &json!("preparing")), "{again}");
    server.stop().await;
}

#[tokio::test]
async fn what_is_asked_wrongly_is_told() {
    let server = start_raised().await;
    server.deploy(&["web"]).await;
    server.post("/v1/projects/shop/envs/prod/workloads/none:pause", &json!({})).await.problem(404, "OPT-1104");
    server.post(&format!("{WEB}:pause"), &json!({"to": 1})).await.problem(422, "OPT-1001");
    server.post(&format!("{WEB}:pause"), &json!({"reason": "x".repeat(501)})).await.problem(422, "OPT-1001");
    server.stop().await;
}

/// Servers of an older build would not understand it.
#[tokio::test]
async fn before_every_server_understands_it_nothing_is_steered() {
    let server = start().await;
    server.deploy(&["web"]).await;
    server.post(&format!("{WEB}:pause"), &json!({})).await.problem(409, "OPT-1109");
    server.stop().await;
}

#[tokio::test]
async fn a_plan_changes_nothing_and_a_deploy_bound_to_it_does_that_or_refuses() {
    let server = start_raised().await;
    let index = server.store.state().index;
    let plan = server.post("/v1/plan", &project(&["web"])).await.json();
    assert_eq!((&plan["workloads"][0]["action"], &plan["index"]), (&json!("create"), &json!(index)), "{plan}");
    assert!(server.store.state().workloads.is_empty());
    let mut bound = project(&["web"]);
    bound["if_plan"] = plan["digest"].clone();
    let answer = server.post("/v1/deploy", &bound).await;
    assert_eq!(answer.status, 200, "{}", answer.json());
    // Now it would do something else: nothing.
    server.post("/v1/deploy", &bound).await.problem(409, "OPT-1109");
    let revision = server.get(WEB).await.json()["revision"].as_u64().unwrap();
    let mut bound = project(&["web"]);
    bound["if_revision"] = json!(revision - 1);
    server.post("/v1/deploy", &bound).await.problem(409, "OPT-1109");
    bound["if_revision"] = json!(revision);
    assert_eq!(server.post("/v1/deploy", &bound).await.status, 200);
    server.stop().await;
}

#[tokio::test]
async fn routers_read_endpoints_and_say_what_they_took_on() {
    let server = start_raised().await;
    server.deploy(&["web"]).await;
    let page = server.get("/v1/endpoints?project=shop").await.json();
    assert_eq!((&page["items"][0]["workload"], &page["items"][0]["endpoints"]), (&json!("web"), &json!([])), "{page}");
    let ack = json!({"router": "edge-1", "generation": page["index"]});
    assert_eq!(server.post("/v1/endpoints/acks", &ack).await.json()["changed"], true);
    assert_eq!(server.post("/v1/endpoints/acks", &ack).await.json()["changed"], false);
    assert_eq!(server.store.state().routers["edge-1"].generation, page["index"].as_u64().unwrap());
    server.post("/v1/endpoints/acks", &json!({"router": "", "generation": 1})).await.problem(422, "OPT-1001");
    server.stop().await;
}
