//! Who gets in, and from where.

use optimus_control_plane::api::routes::table;
use optimus_control_plane::auth::Permission;
use optimus_control_plane::auth::throttle::FAILURES_BURST;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{Answer, start};

#[tokio::test]
async fn every_route_refuses_strangers() {
    let mut server = start().await;
    for (n, route) in table().iter().enumerate() {
        // Before so many wrong ones in a row are slowed down.
        if n as f64 % (FAILURES_BURST / 2.0) == 0.0 {
            std::mem::replace(&mut server, start().await).stop().await;
        }
        let path = filled(route.path);
        let none = Answer::of(server.bare(route.method.as_str(), &path).send().await.unwrap()).await;
        if route.permission == Permission::Public {
            // The way in answers everybody, with a refusal.
            let fine = if route.path == "/v1/sessions" { 415 } else { 200 };
            assert_eq!(none.status, fine, "{} {path}", route.method);
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
async fn a_browser_logs_in_with_a_code_and_out() {
    let server = start().await;
    let origin = format!("https://localhost:{}", server.address.port());
    let code = server.post("/v1/login-codes", &json!({})).await;
    assert_eq!(code.status, 201);
    let code = code.json()["code"].as_str().unwrap().to_owned();
    let log_in = async |code: &str| {
        let request = server.bare("POST", "/v1/sessions").header("origin", &origin).json(&json!({ "code": code }));
        Answer::of(request.send().await.unwrap()).await
    };
    log_in("wrong").await.problem(401, "OPT-1102");
    let answer = log_in(&code).await;
    assert_eq!(answer.status, 201);
    log_in(&code).await.problem(401, "OPT-1102");
    let cookie = answer.header("set-cookie").to_owned();
    let (pair, attributes) = cookie.split_once("; ").unwrap();
    assert!(pair.starts_with("__Host-optimus="));
    assert_eq!(attributes, "Path=/; Max-Age=43200; Secure; HttpOnly; SameSite=Strict");

    let with = async |method: &str, path: &str, from: Option<&str>| {
        let mut request = server.bare(method, path).header("cookie", pair);
        if let Some(from) = from {
            request = request.header("origin", from);
        }
        Answer::of(request.send().await.unwrap()).await
    };
    assert_eq!(with("GET", "/v1/status", None).await.status, 200);
    // A change needs the word of the browser that a page of ours made it.
    let change = "/v1/login-codes";
    with("POST", change, None).await.problem(403, "OPT-1103");
    with("POST", change, Some("https://evil.example")).await.problem(403, "OPT-1112");
    assert_eq!(with("POST", change, Some(&origin)).await.status, 201);
    // Another credential beside it decides alone.
    let beside = server.bare("GET", "/v1/status").header("cookie", pair).bearer_auth("guess");
    Answer::of(beside.send().await.unwrap()).await.problem(401, "OPT-1102");
    let forged = server.bare("GET", "/v1/status").header("cookie", format!("{pair}A"));
    Answer::of(forged.send().await.unwrap()).await.problem(401, "OPT-1102");

    let out = with("DELETE", "/v1/sessions", Some(&origin)).await;
    assert_eq!(out.status, 204);
    assert!(out.header("set-cookie").starts_with("__Host-optimus=; Path=/; Max-Age=0"));
    with("GET", "/v1/status", None).await.problem(401, "OPT-1102");
    server.stop().await;
}

/// A route's template with names filled in.
fn filled(path: &str) -> String {
    let path = path.replace("{project}", "shop").replace("{env}", "prod").replace("{workload}", "web").replace("{allocation}", "web-0");
    path.replace("{id}", "018f0000-0000-7000-8000-000000000000").replace("{node}", "host-1")
}
