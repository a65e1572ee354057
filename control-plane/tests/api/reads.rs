//! Lists, single objects and documents.

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{Answer, WEB, key, spec, start};

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
