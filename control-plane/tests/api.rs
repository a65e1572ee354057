//! The REST API as its users meet it: over TLS, through a client that knows nothing of the server.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use optimus_common::Span;
use optimus_control_plane::agent_calls::AgentCallError;
use optimus_control_plane::api::routes::table;
use optimus_control_plane::api::{BODY_MAX, Limits, WAIT_MAX};
use optimus_control_plane::auth::Permission;
use optimus_control_plane::store::ProposeError;
use optimus_core::state::EVENTS_KEPT;
use serde_json::{Value, json};
use support::{Answer, DEADLINE, Output, chunk, key, project, spec, start, start_with};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const WEB: &str = "/v1/projects/shop/envs/prod/workloads/web";

/// A route's template with names filled in.
fn filled(path: &str) -> String {
    let path = path.replace("{project}", "shop").replace("{env}", "prod").replace("{workload}", "web").replace("{allocation}", "web-0");
    path.replace("{id}", "018f0000-0000-7000-8000-000000000000").replace("{node}", "host-1")
}

#[tokio::test]
async fn every_route_refuses_strangers() {
    let server = start().await;
    for route in table() {
        let path = filled(route.path);
        let none = Answer::of(server.bare(route.method.as_str(), &path).send().await.unwrap()).await;
        if route.permission == Permission::Public {
            assert_eq!(none.status, 200, "{} {path}", route.method);
            continue;
        }
        none.problem(401, "OPT-1102");
        assert!(none.header("www-authenticate").starts_with("Bearer"));
        let wrong = server.bare(route.method.as_str(), &path).bearer_auth(format!("{}x", server.token.expose()));
        Answer::of(wrong.send().await.unwrap()).await.problem(401, "OPT-1102");
    }
    server.stop().await;
}

#[tokio::test]
async fn wrong_credentials_are_throttled_and_lock_nobody_out() {
    let server = start().await;
    let mut throttled = None;
    for _ in 0..200 {
        let answer = Answer::of(server.bare("GET", "/v1/status").bearer_auth("guess").send().await.unwrap()).await;
        if answer.status != 401 {
            throttled = Some(answer);
            break;
        }
    }
    let throttled = throttled.expect("guessing was never slowed down");
    throttled.problem(429, "OPT-1102");
    assert!(throttled.header("retry-after").parse::<u64>().unwrap() >= 1);
    assert_eq!(server.get("/v1/status").await.status, 200);
    server.stop().await;
}

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

#[tokio::test]
async fn answers_carry_ids_and_security_headers() {
    let server = start().await;
    let answer = Answer::of(server.request("GET", "/v1/status").header("x-request-id", "ci-42").send().await.unwrap()).await;
    assert_eq!(answer.header("x-request-id"), "ci-42");
    assert_eq!(answer.header("x-content-type-options"), "nosniff");
    assert_eq!(answer.header("cache-control"), "no-store");
    assert!(answer.header("content-security-policy").starts_with("default-src 'none'"));
    assert_eq!(answer.header("optimus-leader"), "1");
    assert_eq!(answer.header("optimus-index"), answer.json()["index"].to_string());
    let odd = Answer::of(server.request("GET", "/v1/status").header("x-request-id", "<script>").send().await.unwrap()).await;
    assert_eq!(odd.header("x-request-id").len(), 36, "an id of ours");
    server.stop().await;
}

#[tokio::test]
async fn foreign_hosts_and_origins_are_refused() {
    let server = start().await;
    // HTTP/1.1 by hand: the client would not send a foreign Host.
    let ask = async |host: &str, origin: &str| {
        let mut stream = server.raw().await;
        let origin = if origin.is_empty() { String::new() } else { format!("origin: {origin}\r\n") };
        let request = format!(
            "GET /v1/status HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {}\r\n{origin}connection: close\r\n\r\n",
            server.token.expose()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    };
    let port = server.address.port();
    assert!(ask("optimus.example", "").await.starts_with("HTTP/1.1 200"));
    assert!(ask(&format!("localhost:{port}"), &format!("https://localhost:{port}")).await.starts_with("HTTP/1.1 200"));
    for (host, origin) in
        [("evil.example", ""), ("localhost", "https://evil.example"), ("localhost", "null"), ("localhost", "http://localhost")]
    {
        let answer = ask(host, origin).await;
        assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("OPT-1112"), "{host} {origin}: {answer}");
    }
    assert!(ask("a b", "").await.starts_with("HTTP/1.1 400"));
    server.stop().await;
}

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

#[tokio::test]
async fn pages_hold_every_workload_once() {
    let server = start().await;
    let names: Vec<String> = (0..120).map(|n| format!("w{n:03}")).collect();
    assert_eq!(server.deploy(&names.iter().map(String::as_str).collect::<Vec<_>>()).await.status, 200);
    for size in [1usize, 7, 50, 120, 5000] {
        let (mut seen, mut token, mut pages) = (Vec::new(), String::new(), 0);
        loop {
            let page = server.get(&format!("/v1/workloads?page_size={size}&page_token={token}")).await.json();
            let items = page["items"].as_array().unwrap();
            assert!(items.len() <= size);
            seen.extend(items.iter().map(|item| item["workload"].as_str().unwrap().to_owned()));
            pages += 1;
            match page["next_page_token"].as_str() {
                Some(next) => token = next.to_owned(),
                None => break,
            }
        }
        assert_eq!(seen, names, "pages of {size}");
        assert_eq!(pages, names.len().div_ceil(size));
    }
    // A workload that comes in between shifts nothing; a token goes with its filter only.
    let page = server.get("/v1/workloads?page_size=60").await.json();
    let token = page["next_page_token"].as_str().unwrap();
    server.deploy(&["a-new-one"]).await;
    let rest = server.get(&format!("/v1/workloads?page_size=100&page_token={token}")).await.json();
    assert_eq!(rest["items"][0]["workload"], "w060");
    assert_eq!(rest["items"].as_array().unwrap().len(), 60);
    server.get(&format!("/v1/workloads?project=shop&page_token={token}")).await.problem(400, "OPT-1101");
    assert_eq!(server.get("/v1/workloads?project=other").await.json()["items"], json!([]));
    assert_eq!(server.get("/v1/workloads?environment=prod&page_size=200").await.json()["items"].as_array().unwrap().len(), 121);

    let newest_first = server.get("/v1/deployments?page_size=3").await.json();
    assert_eq!(newest_first["items"][0]["workload"], "a-new-one");
    let next = server
        .get(&format!("/v1/deployments?page_size=1000&page_token={}", newest_first["next_page_token"].as_str().unwrap()))
        .await
        .json();
    assert_eq!(next["items"].as_array().unwrap().len(), 118);
    server.stop().await;
}

#[tokio::test]
async fn copies_are_listed_and_found_by_name_and_id() {
    let server = start().await;
    server.deploy(&["web", "api"]).await;
    let mut ids = Vec::new();
    for index in 0..3 {
        ids.push(server.place("web", index).await);
    }
    server.place("api", 0).await;
    let page = server.get(&format!("{WEB}/allocations?page_size=2")).await.json();
    assert_eq!(page["items"][1]["name"], "web-1");
    let rest = server.get(&format!("{WEB}/allocations?page_size=2&page_token={}", page["next_page_token"].as_str().unwrap())).await.json();
    assert_eq!((rest["items"].as_array().unwrap().len(), &rest["items"][0]["name"]), (1, &json!("web-2")));
    assert_eq!(server.get("/v1/allocations").await.json()["items"].as_array().unwrap().len(), 4);
    assert_eq!(server.get("/v1/allocations?workload=api").await.json()["items"].as_array().unwrap().len(), 1);
    for name in ["web-1".to_owned(), ids[1].to_string()] {
        assert_eq!(server.get(&format!("{WEB}/allocations/{name}")).await.json()["id"], ids[1].to_string());
        let explained = server.get(&format!("{WEB}/allocations/{name}:explain")).await;
        assert_eq!(explained.json()["workload"]["workload"], "web", "{}", explained.json());
    }
    assert_eq!(server.get(&format!("{WEB}:explain")).await.status, 200);
    // Of another workload: not here.
    server.get(&format!("/v1/projects/shop/envs/prod/workloads/api/allocations/{}", ids[1])).await.problem(404, "OPT-1104");
    server.stop().await;
}

#[tokio::test]
async fn unchanged_objects_are_not_sent_again() {
    let server = start().await;
    server.deploy(&["web"]).await;
    let first = server.get(WEB).await;
    let tag = first.header("etag").to_owned();
    assert!(tag.starts_with('"'));
    let again = Answer::of(server.request("GET", WEB).header("if-none-match", &tag).send().await.unwrap()).await;
    assert_eq!((again.status, again.bytes.len(), again.header("etag")), (304, 0, tag.as_str()));
    server.post(&format!("{WEB}:scale"), &json!({"copies": 7})).await;
    let changed = Answer::of(server.request("GET", WEB).header("if-none-match", &tag).send().await.unwrap()).await;
    assert_eq!(changed.status, 200);
    assert_ne!(changed.header("etag"), tag);
    let head = Answer::of(server.request("HEAD", WEB).send().await.unwrap()).await;
    assert_eq!((head.status, head.bytes.len()), (200, 0));
    assert_eq!(head.header("etag"), changed.header("etag"));
    assert_eq!(head.header("content-length"), changed.bytes.len().to_string());
    server.stop().await;
}

#[tokio::test]
async fn a_long_poll_wakes_on_a_change_and_not_before() {
    let server = start().await;
    let deployed = server.deploy(&["web", "api"]).await.json();
    let deployment = deployed["deployments"].as_array().unwrap().iter().find(|d| d["workload"] == "web").unwrap();
    let id = deployment["id"].as_str().unwrap();
    let index = server.store.state().index;

    // Nothing of it changes, though something else does: it answers at its time.
    let began = Instant::now();
    let path = format!("/v1/deployments/{id}?index={index}&wait=700ms");
    let (quiet, _) = tokio::join!(server.get(&path), server.place("api", 0));
    assert_eq!(quiet.status, 200);
    assert!(began.elapsed() >= Duration::from_millis(700), "woke for another workload's copy");

    // A copy of it comes: it answers at once.
    let index = server.store.state().index;
    let waiting = tokio::spawn(server.request("GET", &format!("/v1/deployments/{id}?index={index}&wait=30s")).send());
    let waiting_list = tokio::spawn(server.request("GET", &format!("/v1/workloads?index={index}&wait=30s")).send());
    until_waiting(&server, 2).await;
    let began = Instant::now();
    server.place("web", 0).await;
    let woken = Answer::of(waiting.await.unwrap().unwrap()).await;
    assert_eq!(woken.status, 200);
    assert!(began.elapsed() < Duration::from_secs(5), "took {:?}", began.elapsed());
    assert!(woken.header("optimus-index").parse::<u64>().unwrap() > index);
    server.post(&format!("{WEB}:scale"), &json!({"copies": 9})).await;
    assert_eq!(waiting_list.await.unwrap().unwrap().status(), 200);

    // What changed before the question is answered at once.
    let began = Instant::now();
    assert_eq!(server.get(&format!("{WEB}?index={index}&wait=30s")).await.status, 200);
    assert!(began.elapsed() < Duration::from_secs(5));

    // By tag.
    let tag = server.get(WEB).await.header("etag").to_owned();
    let waiting = tokio::spawn(server.request("GET", &format!("{WEB}?wait=30s")).header("if-none-match", &tag).send());
    until_waiting(&server, 1).await;
    server.post(&format!("{WEB}:scale"), &json!({"copies": 3})).await;
    assert_eq!(Answer::of(waiting.await.unwrap().unwrap()).await.json()["copies_wanted"], 3);
    const { assert!(WAIT_MAX.as_secs() >= 60) };
    server.stop().await;
}

/// Until so many long polls listen for changes.
async fn until_waiting(server: &support::Server, count: usize) {
    let began = Instant::now();
    while server.memory.listeners() < count {
        assert!(began.elapsed() < DEADLINE, "nobody waits");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn events_come_as_pages_and_as_a_stream() {
    let server = start().await;
    for name in ["web", "api", "db"] {
        server.deploy(&[name]).await;
    }
    let all = server.get("/v1/events?since=0").await.json();
    let events = all["items"].as_array().unwrap();
    assert!(events.len() >= 4, "{all}");
    assert!(events.is_sorted_by_key(|event| (event["index"].as_u64(), event["n"].as_u64())));
    let newest = server.get("/v1/events?page_size=2").await.json();
    assert_eq!(newest["items"].as_array().unwrap()[..], events[events.len() - 2..]);
    let mut seen = Vec::new();
    let mut token = String::new();
    loop {
        let page = server.get(&format!("/v1/events?since=0&page_size=1&page_token={token}")).await.json();
        seen.extend(page["items"].as_array().unwrap().clone());
        match page["next_page_token"].as_str() {
            Some(next) => token = next.into(),
            None => break,
        }
    }
    assert_eq!(&seen, events);

    let since = server.store.state().index;
    let mut stream = server
        .request("GET", &format!("/v1/events?since={since}&follow=true"))
        .header("accept", "application/x-ndjson")
        .send()
        .await
        .unwrap();
    assert_eq!(stream.headers()["content-type"], "application/x-ndjson");
    server.deploy(&["cache"]).await;
    let line = next_line(&mut stream, &mut Vec::new()).await;
    assert_eq!(line["subject"], "shop/prod/cache");
    drop(stream);

    let once = server.request("GET", "/v1/events?since=0").header("accept", "application/x-ndjson").send().await.unwrap();
    let text = once.text().await.unwrap();
    assert_eq!(text.lines().count(), events.len() + 1, "{text}");

    server.memory.edit(|state| {
        let (_, event) = state.events.get_max().map(|(key, event)| (*key, event.clone())).unwrap();
        state.events.clear();
        for n in 0..EVENTS_KEPT as u64 {
            let mut event = (*event).clone();
            (event.index, event.n) = (1000 + n, 0);
            state.events.insert((1000 + n, 0), event.into());
        }
        state.index = 1000 + EVENTS_KEPT as u64;
    });
    server.get("/v1/events?since=5").await.problem(410, "OPT-1114");
    assert_eq!(server.get("/v1/events?since=999").await.status, 200, "the first event kept is the next one");
    server.stop().await;
}

/// The next line of a stream that is not a heartbeat.
async fn next_line(stream: &mut reqwest::Response, rest: &mut Vec<u8>) -> Value {
    loop {
        if let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            if line.len() > 1 {
                return serde_json::from_slice(&line).unwrap();
            }
            continue;
        }
        let piece = tokio::time::timeout(DEADLINE, stream.chunk()).await.expect("no line came").unwrap();
        rest.extend_from_slice(&piece.expect("the stream ended"));
    }
}

#[tokio::test]
async fn logs_of_all_copies_merge_in_time_order() {
    let server = start().await;
    server.deploy(&["web"]).await;
    let (a, b, gone) = (server.place("web", 0).await, server.place("web", 1).await, server.place("web", 2).await);
    {
        let mut outputs = server.agents.outputs.lock().unwrap();
        outputs.insert(a, Output::Lines(vec![(1000, "a1"), (3000, "a2")]));
        outputs.insert(b, Output::Lines(vec![(2000, "b1"), (4000, "b2")]));
    }
    let lines = |answer: &Answer| -> Vec<Value> {
        String::from_utf8_lossy(&answer.bytes).lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    };
    let answer = server.get(&format!("{WEB}/logs?tail=10&since=1970-01-01T00:00:00Z")).await;
    assert_eq!(answer.header("content-type"), "application/x-ndjson");
    let all = lines(&answer);
    assert_eq!(all[0]["stream"], "optimus", "the copy whose node is away is said to be missing: {all:?}");
    assert_eq!(all[0]["copy"], "web-2");
    assert_eq!(all[1..].iter().map(|line| line["text"].as_str().unwrap()).collect::<Vec<_>>(), ["a1", "b1", "a2", "b2"]);
    assert_eq!(all[1]["copy"], "web-0");
    assert!(server.agents.asked.lock().unwrap().iter().all(|asked| asked.tail == Some(10) && asked.since.is_some() && !asked.follow));
    let one = server.get(&format!("{WEB}/logs?copy=web-1")).await;
    assert_eq!(lines(&one).len(), 2);

    server.get(&format!("{WEB}/logs?copy=web-2")).await.problem(503, "OPT-2004");
    server.agents.outputs.lock().unwrap().insert(gone, Output::Refuse(AgentCallError::TimedOut));
    server.get(&format!("{WEB}/logs?copy=2")).await.problem(504, "OPT-1108");
    server.get(&format!("{WEB}/logs?copy=web-9")).await.problem(404, "OPT-1104");
    server.get(&format!("{WEB}/logs?since=yesterday")).await.problem(400, "OPT-1101");
    server.stop().await;
}

#[tokio::test]
async fn followed_logs_take_in_new_copies_and_mend_broken_streams() {
    let server = start().await;
    server.deploy(&["web"]).await;
    let first = server.place("web", 0).await;
    server.agents.outputs.lock().unwrap().insert(first, Output::Lines(vec![(1000, "one")]));
    let mut stream = server.request("GET", &format!("{WEB}/logs?follow=true")).send().await.unwrap();
    let mut rest = Vec::new();
    assert_eq!(next_line(&mut stream, &mut rest).await["text"], "one");

    let second = server.place("web", 1).await;
    server.agents.outputs.lock().unwrap().insert(second, Output::Lines(vec![(2000, "two")]));
    // The node may not have the new copy yet when it is first asked; then its absence is remarked on.
    let line = loop {
        let line = next_line(&mut stream, &mut rest).await;
        if line["stream"] != "optimus" {
            break line;
        }
    };
    assert_eq!((&line["copy"], &line["text"]), (&json!("web-1"), &json!("two")));

    // The stream of the first breaks; it is asked again and goes on where it broke.
    server.agents.outputs.lock().unwrap().insert(first, Output::Lines(vec![(1000, "one"), (3000, "three")]));
    server.agents.open.lock().unwrap().retain(|(alloc, _)| *alloc != first);
    assert_eq!(next_line(&mut stream, &mut rest).await["text"], "three");

    let sender = server.agents.open.lock().unwrap().iter().find(|(alloc, _)| *alloc == second).unwrap().1.clone();
    sender.send(chunk(&[(4000, "four")])).await.unwrap();
    assert_eq!(next_line(&mut stream, &mut rest).await["text"], "four");

    // A followed stream does not keep the server from stopping.
    server.stop().await;
}

#[tokio::test]
async fn figures_and_the_document_are_served() {
    let server = start().await;
    server.deploy(&["web"]).await;
    server.get("/v1/nonsense").await;
    let figures = server.get("/metrics").await;
    assert!(figures.header("content-type").starts_with("text/plain"));
    let text = String::from_utf8(figures.bytes).unwrap();
    for line in [
        r#"optimus_api_requests_total{method="POST",route="/v1/deploy",status="200"} 1"#,
        r#"optimus_api_requests_total{method="GET",route="unmatched",status="404"} 1"#,
        "optimus_workloads 1",
        r#"optimus_raft{what="is_leader"} 1"#,
    ] {
        assert!(text.contains(line), "no {line} in {text}");
    }
    let document = server.get("/v1/openapi.json").await.json();
    assert!(document["paths"]["/v1/projects/{project}/envs/{env}/workloads/{workload}:scale"]["post"].is_object());
    server.stop().await;
}

#[tokio::test]
async fn what_takes_too_long_is_ended() {
    let limits = Limits {
        request: Duration::from_millis(300),
        header: Duration::from_millis(300),
        handshake: Duration::from_millis(300),
        ..Limits::default()
    };
    let server = start_with(limits).await;
    // The store hangs.
    server.memory.hangs.store(true, std::sync::atomic::Ordering::Relaxed);
    server.get("/v1/status").await.problem(504, "OPT-1108");
    // The body never comes.
    let mut slow = server.raw().await;
    let head = format!(
        "POST /v1/deploy HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\ncontent-length: 10\r\nconnection: close\r\n\r\n{{",
        server.token.expose()
    );
    slow.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(DEADLINE, slow.read_to_end(&mut answer)).await.expect("the server waited for a body");
    assert!(String::from_utf8_lossy(&answer).contains("OPT-1108"));
    // The head never ends.
    let mut slow = server.raw().await;
    slow.write_all(b"GET /v1/version HTTP/1.1\r\nhost: lo").await.unwrap();
    let _ = tokio::time::timeout(DEADLINE, slow.read_to_end(&mut Vec::new())).await.expect("the server waited for a head");
    // The TLS handshake never begins.
    let mut silent = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let _ = tokio::time::timeout(DEADLINE, silent.read_to_end(&mut Vec::new())).await.expect("the server waited for a handshake");
    server.stop().await;
}

#[tokio::test]
async fn a_full_server_says_so_and_recovers() {
    let limits = Limits { in_flight: 1, waiters: 1, request: Duration::from_secs(2), ..Limits::default() };
    let server = start_with(limits).await;
    server.deploy(&["web"]).await;
    let index = server.store.state().index;
    // A long poll does not take the place of a request, but that of a waiter.
    let waiting = tokio::spawn(server.request("GET", &format!("{WEB}?index={index}&wait=30s")).send());
    until_waiting(&server, 1).await;
    assert_eq!(server.get(WEB).await.status, 200);
    let full = server.get(&format!("{WEB}?index={index}&wait=30s")).await;
    full.problem(503, "OPT-1113");
    assert_eq!(full.header("retry-after"), "1");
    server.get("/v1/events?follow=true").await.problem(503, "OPT-1113");
    server.post(&format!("{WEB}:scale"), &json!({"copies": 4})).await;
    assert_eq!(waiting.await.unwrap().unwrap().status(), 200);
    assert_eq!(server.get(&format!("{WEB}?index={index}&wait=30s")).await.status, 200);

    server.memory.hangs.store(true, std::sync::atomic::Ordering::Relaxed);
    let hanging = tokio::spawn(server.request("GET", "/v1/status").send());
    let began = Instant::now();
    while Answer::of(server.bare("GET", "/healthz").send().await.unwrap()).await.status != 503 {
        assert!(began.elapsed() < DEADLINE, "the bound was never reached");
    }
    Answer::of(hanging.await.unwrap().unwrap()).await.problem(504, "OPT-1108");
    assert_eq!(Answer::of(server.bare("GET", "/healthz").send().await.unwrap()).await.status, 200);
    server.stop().await;
}

#[tokio::test]
async fn connections_above_the_bound_wait_for_a_place() {
    let server = start_with(Limits { connections: 2, ..Limits::default() }).await;
    let (first, _second) = (server.raw().await, server.raw().await);
    let third = tokio::time::timeout(Duration::from_millis(300), server.raw()).await;
    assert!(third.is_err(), "a third connection was served");
    drop(first);
    let mut third = tokio::time::timeout(DEADLINE, server.raw()).await.expect("no place came free");
    third.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    let _ = third.read_to_string(&mut answer).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    drop(third);
    server.stop().await;
}

/// A generator of garbage with a seed, printed on failure.
struct Garbage(u64);
impl Garbage {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }
    fn bytes(&mut self, most: u64) -> Vec<u8> {
        let count = self.next() % most;
        (0..count).map(|_| self.next() as u8).collect()
    }
}

#[tokio::test]
async fn garbage_neither_kills_nor_confuses_the_server() {
    let server = start().await;
    server.deploy(&["web"]).await;
    let mut garbage = Garbage(0x5eed);
    // On the port itself, before TLS.
    for _ in 0..100 {
        let mut stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
        let _ = stream.write_all(&garbage.bytes(2000)).await;
    }
    // Inside TLS: pure garbage, and good requests with bytes changed.
    let good = format!(
        "POST /v1/deploy?dry_run=true HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\nidempotency-key: k\r\nconnection: close\r\ncontent-length: {{}}\r\n\r\n",
        server.token.expose()
    );
    let body = project(&["web"]).to_string();
    let good = format!("{}{body}", good.replace("{}", &body.len().to_string())).into_bytes();
    let (mut answered, mut problems) = (0, 0);
    for round in 0..300 {
        let bytes = if round % 5 == 0 {
            garbage.bytes(4000)
        } else {
            let mut bytes = good.clone();
            for _ in 0..1 + garbage.next() % 6 {
                let at = garbage.next() as usize % bytes.len();
                match garbage.next() % 3 {
                    0 => bytes[at] = garbage.next() as u8,
                    1 => drop(bytes.remove(at)),
                    _ => bytes.insert(at, garbage.next() as u8),
                }
            }
            bytes
        };
        let mut stream = server.raw().await;
        let _ = stream.write_all(&bytes).await;
        let mut answer = Vec::new();
        let mut piece = [0u8; 4096];
        // A request cut short makes the server wait for the rest: give it none for long.
        while let Ok(Ok(count)) = tokio::time::timeout(Duration::from_millis(300), stream.read(&mut piece)).await {
            if count == 0 {
                break;
            }
            answer.extend_from_slice(&piece[..count]);
            if ends_whole(&answer) {
                break;
            }
        }
        let Some(head) = answer.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        answered += 1;
        let head = String::from_utf8_lossy(&answer[..head]).to_lowercase();
        let status: u16 = head.get(9..12).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("round {round}: {head}"));
        assert_ne!(status, 500, "round {round}: {}", String::from_utf8_lossy(&answer));
        // What is not HTTP at all is answered by the HTTP library itself, without a body.
        let by_library = head.contains("content-length: 0") && [400, 414, 431].contains(&status);
        if status >= 400 && !by_library {
            assert!(head.contains("application/problem+json"), "round {round}: {head}");
            problems += 1;
        }
    }
    assert!(answered > 100 && problems > 50, "answered {answered}, of it problems {problems}");
    assert_eq!(server.get(WEB).await.status, 200);
    let figures = String::from_utf8(server.get("/metrics").await.bytes).unwrap();
    assert!(!figures.contains(r#"status="500""#), "{figures}");
    server.stop().await;
}

fn ends_whole(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer).to_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).and_then(|n| n.parse::<usize>().ok());
    length.is_some_and(|length| body.len() >= length)
}

#[tokio::test]
async fn both_versions_of_http_are_spoken() {
    let server = start().await;
    let response = server.bare("GET", "/v1/version").send().await.unwrap();
    let version = format!("{:?}", response.version());
    let mut stream = server.raw().await;
    stream.write_all(b"GET /v1/version HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer).await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let mut tls = (*server.tls).clone();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let h2 = reqwest::Client::builder().tls_backend_preconfigured(tls).http2_prior_knowledge().build().unwrap();
    let response = h2.get(server.url("/v1/version")).send().await.unwrap();
    assert_eq!(response.version(), reqwest::Version::HTTP_2, "the first spoke {version}");
    assert_eq!(response.status(), 200);
    server.stop().await;
}

#[tokio::test]
async fn a_spec_reads_back_as_sent() {
    let server = start().await;
    server.deploy(&["web"]).await;
    let workload = server.get(WEB).await.json();
    assert_eq!(workload["spec"]["run"], spec()["run"]);
    assert_eq!(workload["workload"], key("web").workload.as_str());
    server.stop().await;
}
