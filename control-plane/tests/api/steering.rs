//! What can be asked of a deployment.

use optimus_core::state::{Command, LEVEL, ServerFacts};
use serde_json::json;

use crate::support::{Server, start};

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
