//! Deploys and actions: one effect, dry runs.

use serde_json::{Value, json};

use crate::support::{Answer, WEB, project, start};

#[tokio::test]
async fn a_retry_with_the_same_key_has_one_effect() {
    let server = start().await;
    let send = async |key: &str, body: &Value| {
        Answer::of(server.request("POST", "/v1/deploy").header("idempotency-key", key).json(body).send().await.unwrap()).await
    };
    let body = project(&["web"]);
    let first = send("deploy-1", &body).await;
    assert_eq!(first.status, 200);
    assert_eq!(first.header("idempotency-replayed"), "");
    let again = send("deploy-1", &body).await;
    assert_eq!(again.header("idempotency-replayed"), "true");
    assert_eq!(again.json()["deployments"][0]["id"], first.json()["deployments"][0]["id"]);
    assert_eq!(again.json()["index"], first.json()["index"]);
    assert_eq!(server.store.state().deployments.len(), 1);

    send("deploy-1", &project(&["web", "api"])).await.problem(422, "OPT-1109");
    let elsewhere = server.request("POST", &format!("{WEB}:stop")).header("idempotency-key", "deploy-1").send().await.unwrap();
    Answer::of(elsewhere).await.problem(422, "OPT-1109");

    let other = send("deploy-2", &body).await;
    assert_eq!(other.json()["unchanged"][0]["workload"], "web", "{}", other.json());

    // At the same time, too.
    let body = project(&["api"]);
    let (a, b, c) = tokio::join!(send("deploy-3", &body), send("deploy-3", &body), send("deploy-3", &body));
    assert_eq!(a.json()["deployments"][0]["id"], b.json()["deployments"][0]["id"]);
    assert_eq!(b.json()["deployments"][0]["id"], c.json()["deployments"][0]["id"]);
    server.stop().await;
}

#[tokio::test]
async fn a_dry_run_gives_the_verdict_and_changes_nothing() {
    let server = start().await;
    let dry = server.post("/v1/deploy?dry_run=true", &project(&["web"])).await;
    assert_eq!(dry.json()["deployments"].as_array().unwrap().len(), 1, "{}", dry.json());
    assert!(server.store.state().workloads.is_empty());
    server.deploy(&["web"]).await;
    let index = server.store.state().index;
    assert_eq!(server.post("/v1/deploy?dry_run=true", &project(&["web"])).await.json()["unchanged"].as_array().unwrap().len(), 1);
    server.post("/v1/projects/shop/envs/prod/workloads/none:scale?dry_run=true", &json!({"copies": 1})).await.problem(404, "OPT-1104");
    assert_eq!(server.store.state().index, index);
    server.stop().await;
}

#[tokio::test]
async fn actions_change_what_they_say() {
    let server = start().await;
    server.deploy(&["web"]).await;
    let scaled = server.post(&format!("{WEB}:scale"), &json!({"copies": 5})).await;
    assert_eq!((scaled.status, &scaled.json()["changed"]), (200, &json!(true)), "{}", scaled.json());
    assert_eq!(server.get(WEB).await.json()["copies_wanted"], 5);
    assert_eq!(server.post(&format!("{WEB}:scale"), &json!({"copies": 5})).await.json()["changed"], false);
    for action in [":restart", ":stop"] {
        let answer = Answer::of(server.request("POST", &format!("{WEB}{action}")).send().await.unwrap()).await;
        assert_eq!(answer.status, 200, "{action}: {}", answer.json());
    }
    let removed = Answer::of(server.request("DELETE", WEB).send().await.unwrap()).await;
    assert_eq!(removed.status, 200, "{}", removed.json());
    let token = server.post("/v1/join-tokens", &json!({"ttl": "2h", "uses": 3})).await;
    assert_eq!((token.status, &token.json()["uses"]), (201, &json!(3)));
    server.post("/v1/join-tokens", &json!({"ttl": "90d"})).await.problem(422, "OPT-1101");
    server.post("/v1/join-tokens", &json!({"uses": 0})).await.problem(422, "OPT-1101");
    server.stop().await;
}
