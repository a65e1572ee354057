//! Every error is a problem with a code, a request id and a hint.

use optimus_common::Span;
use optimus_control_plane::api::BODY_MAX;
use optimus_control_plane::store::ProposeError;
use serde_json::json;

use crate::support::{Answer, Output, WEB, project, start};

#[tokio::test]
async fn every_kind_of_error_is_a_problem() {
    let server = start().await;
    assert_eq!(server.deploy(&["web"]).await.status, 200);

    server.get("/v1/nonsense").await.problem(404, "OPT-1104");
    server.get("/").await.problem(404, "OPT-1104");
    server.get(&format!("/v1/{}", "x".repeat(5000))).await.problem(404, "OPT-1104");
    server.get(&format!("{WEB}:fly")).await.problem(404, "OPT-1104");
    server.get("/v1/projects/shop/envs/prod/workloads/none").await.problem(404, "OPT-1104");
    server.get("/v1/projects/Shop/envs/prod/workloads/web").await.problem(400, "OPT-1101");
    server.get("/v1/projects/%ff/envs/prod/workloads/web").await.problem(400, "OPT-1101");
    server.get("/v1/deployments/nonsense").await.problem(400, "OPT-1101");
    server.get("/v1/nodes/none").await.problem(404, "OPT-1104");
    assert_eq!(server.get("/v1/nodes/host-1").await.json()["name"], "host-1");
    assert_eq!(server.get("/v1/nodes").await.json()["items"].as_array().unwrap().len(), 1);
    server.get(&format!("{WEB}/allocations/web-0")).await.problem(404, "OPT-1104");
    server.get(&format!("{WEB}/logs")).await.problem(404, "OPT-1104");

    let wrong_method = Answer::of(server.request("PATCH", "/v1/deploy").send().await.unwrap()).await;
    wrong_method.problem(405, "OPT-1105");
    assert_eq!(wrong_method.header("allow"), "POST");
    let wrong_method = Answer::of(server.request("POST", WEB).send().await.unwrap()).await;
    wrong_method.problem(405, "OPT-1105");
    assert_eq!(wrong_method.header("allow"), "GET, DELETE, HEAD");
    let wrong_method = Answer::of(server.request("GET", &format!("{WEB}:scale")).send().await.unwrap()).await;
    wrong_method.problem(405, "OPT-1105");
    assert_eq!(wrong_method.header("allow"), "POST");

    for query in [
        "page_size=0",
        "page_size=-1",
        "page_size=x",
        "nonsense=1",
        "project=UPPER",
        "page_token=zzz",
        "project=a&project=b",
        "wait=5s",
        "consistency=eventual",
        "index=1&wait=soon",
    ] {
        server.get(&format!("/v1/workloads?{query}")).await.problem(400, "OPT-1101");
    }

    let send = async |body: &str, kind: &str| {
        Answer::of(server.request("POST", "/v1/deploy").header("content-type", kind).body(body.to_owned()).send().await.unwrap()).await
    };
    send("{", "application/json").await.problem(400, "OPT-1101");
    send("", "application/json").await.problem(400, "OPT-1101");
    send("\u{0}", "application/json").await.problem(400, "OPT-1101");
    send(&"[".repeat(100_000), "application/json").await.problem(400, "OPT-1101");
    send("{}", "text/plain").await.problem(415, "OPT-1106");
    send(&" ".repeat(BODY_MAX + 1), "application/json").await.problem(413, "OPT-1107");
    send("{}", "application/json").await.problem(400, "OPT-1101");
    let mut odd = project(&["web"]);
    odd["workloads"]["web"]["colour"] = json!("blue");
    odd["workloads"]["web"]["resources"]["cpus"] = json!(2);
    let problem = server.post("/v1/deploy", &odd).await.problem(422, "OPT-1001");
    let pointers: Vec<&str> = problem["errors"].as_array().unwrap().iter().map(|error| error["pointer"].as_str().unwrap()).collect();
    assert_eq!(pointers, ["/workloads/web/colour", "/workloads/web/resources/cpus"]);
    server.post("/v1/deploy", &project(&[])).await.problem(422, "OPT-1001");
    let mut wrong = project(&["web"]);
    wrong["workloads"]["web"]["resources"]["pids"] = json!(0);
    let problem = server.post("/v1/deploy", &wrong).await.problem(422, "OPT-1001");
    assert!(problem["errors"][0]["pointer"].as_str().unwrap().starts_with("/workloads/web/"), "{problem}");
    let mut early = project(&["web"]);
    early["workloads"]["web"]["health"]["readiness"]["check"] = json!({"grpc": {"service": ""}});
    let problem = server.post("/v1/deploy?dry_run=true", &early).await.problem(422, "OPT-1002");
    assert!(problem["errors"][0]["pointer"].as_str().unwrap().contains("grpc"), "{problem}");
    server.post(&format!("{WEB}:scale"), &json!({"copies": 1_000_000})).await.problem(422, "OPT-1001");
    server.post("/v1/projects/shop/envs/prod/workloads/none:scale", &json!({"copies": 1})).await.problem(404, "OPT-1104");
    server.post(&format!("{WEB}:stop"), &json!({"now": true})).await.problem(400, "OPT-1101");

    let long = Answer::of(
        server.request("POST", "/v1/deploy").header("idempotency-key", "k".repeat(256)).json(&project(&["web"])).send().await.unwrap(),
    )
    .await;
    long.problem(400, "OPT-1101");
    server.stop().await;
}

#[tokio::test]
async fn a_store_in_trouble_is_said_so() {
    let server = start().await;
    let faults = [
        (ProposeError::NoLeader { retry_after: Span::millis(1500) }, 503, "OPT-1110", "2"),
        (ProposeError::Overloaded { retry_after: Span::millis(200) }, 503, "OPT-1113", "1"),
        (ProposeError::TimedOut(Span::secs(5)), 504, "OPT-1108", ""),
        (ProposeError::Unknown { retry_after: Span::secs(1) }, 503, "OPT-1110", "1"),
        (ProposeError::Stopping, 503, "OPT-1113", "1"),
    ];
    for (fault, status, code, retry) in faults {
        *server.memory.fault.lock().unwrap() = Some(fault);
        for answer in [server.get("/v1/status").await, server.get("/v1/workloads").await, server.deploy(&["web"]).await] {
            let problem = answer.problem(status, code);
            assert_eq!(answer.header("retry-after"), retry);
            assert_eq!(problem["retryable"], true);
        }
    }
    *server.memory.fault.lock().unwrap() = Some(ProposeError::NoLeader { retry_after: Span::secs(1) });
    let stale = server.get("/v1/status?consistency=stale").await;
    assert_eq!(stale.status, 200, "stale reads need no leader");
    assert_eq!(stale.header("optimus-leader"), "");
    assert_eq!(Answer::of(server.bare("GET", "/healthz").send().await.unwrap()).await.status, 200);
    Answer::of(server.bare("GET", "/readyz").send().await.unwrap()).await.problem(503, "OPT-1110");
    server.stop().await;
}

#[tokio::test]
async fn a_panic_is_a_problem_and_the_server_lives() {
    let server = start().await;
    server.deploy(&["web"]).await;
    let alloc = server.place("web", 0).await;
    server.agents.outputs.lock().unwrap().insert(alloc, Output::Panic);
    let answer = Answer::of(server.request("GET", &format!("{WEB}/logs")).header("x-request-id", "look-here").send().await.unwrap()).await;
    let problem = answer.problem(500, "OPT-1111");
    assert_eq!(problem["request_id"], "look-here");
    assert!(!problem.to_string().contains("panics"), "the cause stays inside");
    assert_eq!(server.get("/v1/status").await.status, 200);
    server.stop().await;
}
