//! Secrets: what can be told of them, and that their values cannot.

use serde_json::{Value, json};

use crate::operate::upgraded;
use crate::support::{Answer, Server, project};

const SECRET: &str = "/v1/projects/shop/envs/prod/secrets/DATABASE_URL";

async fn put(server: &Server, path: &str, body: Value) -> Answer {
    Answer::of(server.request("PUT", path).json(&body).send().await.unwrap()).await
}

async fn set(server: &Server, value: &str) -> Value {
    let answer = put(server, SECRET, json!({ "value": value })).await;
    assert_eq!(answer.status, 200, "{}", answer.json());
    assert!(!String::from_utf8_lossy(&answer.bytes).contains(value), "the answer holds the value");
    answer.json()
}

async fn deploy_reader(server: &Server) {
    let mut body = project(&["web"]);
    body["workloads"]["web"]["secrets"] = json!(["DATABASE_URL"]);
    let answer = Answer::of(server.request("POST", "/v1/deploy").json(&body).send().await.unwrap()).await;
    assert_eq!(answer.status, 200, "{}", answer.json());
}

#[tokio::test]
async fn a_secret_is_set_shown_without_its_value_and_removed() {
    let server = upgraded().await;
    server.get(SECRET).await.problem(404, "OPT-1104");
    let first = set(&server, "hunter2").await;
    assert_eq!((&first["changed"], &first["secret"]["version"]), (&json!(true), &json!(1)));
    let same = set(&server, "hunter2").await;
    assert_eq!((&same["changed"], &same["secret"]["version"]), (&json!(false), &json!(1)), "the same value makes no version");
    let other = set(&server, "hunter3").await;
    assert_eq!(other["secret"]["versions"].as_array().map(Vec::len), Some(2));

    deploy_reader(&server).await;
    let shown = server.get(SECRET).await.json();
    assert_eq!(shown["readers"], json!([{ "workload": "web", "version": 2 }]));
    let listed = server.get("/v1/secrets?project=shop&environment=prod").await.json();
    assert_eq!(listed["items"], json!([shown]));
    assert_eq!(server.get("/v1/secrets?environment=dev").await.json()["items"], json!([]));
    let refused = Answer::of(server.request("DELETE", SECRET).send().await.unwrap()).await;
    refused.problem(409, "OPT-1109");

    let state = server.store.state();
    let bytes = state.to_bytes();
    assert!(!bytes.windows(6).any(|w| w == b"hunter"), "the replicated state holds a value");

    put(&server, "/v1/projects/shop/envs/prod/secrets/UNUSED", json!({ "value": "x" })).await;
    let removed = Answer::of(server.request("DELETE", "/v1/projects/shop/envs/prod/secrets/UNUSED").send().await.unwrap()).await;
    assert_eq!(removed.status, 200);
}

#[tokio::test]
async fn what_is_refused_does_not_show_the_value() {
    let server = upgraded().await;
    let long = "7".repeat(70_000);
    for body in [
        json!({ "value": "" }),
        json!({ "value": "hunter7\0" }),
        json!({ "value": long }),
        json!({ "value": 7_777_777 }),
        json!({ "value": ["hunter7"] }),
        json!({ "valeu": "hunter7" }),
        json!({}),
    ] {
        let answer = put(&server, SECRET, body.clone()).await;
        let text = String::from_utf8_lossy(&answer.bytes).into_owned();
        assert!(!text.contains("hunter7") && !text.contains("7777"), "{text}");
        answer.problem(400, "OPT-1101");
    }
    for name in ["1A", "A-B", "PORT", "OPTIMUS_X", &"A".repeat(129)] {
        put(&server, &format!("/v1/projects/shop/envs/prod/secrets/{name}"), json!({ "value": "x" })).await.problem(400, "OPT-1101");
    }
}

#[tokio::test]
async fn a_new_version_restarts_what_is_behind_when_asked_to() {
    let server = upgraded().await;
    set(&server, "one").await;
    deploy_reader(&server).await;
    let behind = set(&server, "two").await;
    assert_eq!(behind["restarted"], json!([]));
    assert_eq!(behind["secret"]["readers"][0]["version"], json!(1));
    let again = put(&server, SECRET, json!({ "value": "two", "restart": true })).await.json();
    assert_eq!((&again["changed"], &again["restarted"]), (&json!(false), &json!(["web"])));
    assert_eq!(server.get(SECRET).await.json()["readers"][0]["version"], json!(2));
    let idle = put(&server, SECRET, json!({ "value": "two", "restart": true })).await.json();
    assert_eq!(idle["restarted"], json!([]), "it has the newest already");
}
