//! Long polls, events and logs.

use std::time::{Duration, Instant};

use optimus_control_plane::agent_calls::AgentCallError;
use optimus_control_plane::api::WAIT_MAX;
use optimus_core::state::EVENTS_KEPT;
use serde_json::{Value, json};

use crate::support::{Answer, DEADLINE, Output, WEB, chunk, start, until_waiting};

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
async fn a_silent_stream_shows_that_it_lives() {
    let server = start().await;
    server.deploy(&["web"]).await;
    let since = server.store.state().index;
    let first_piece = async |path: String| {
        let mut stream = server.request("GET", &path).send().await.unwrap();
        tokio::time::timeout(DEADLINE, stream.chunk()).await.expect("no heartbeat came").unwrap()
    };
    let (events, logs) =
        tokio::join!(first_piece(format!("/v1/events?since={since}&follow=true")), first_piece(format!("{WEB}/logs?follow=true")));
    assert_eq!(events.as_deref(), Some(b"\n".as_slice()));
    assert_eq!(logs.as_deref(), Some(b"\n".as_slice()));
    server.stop().await;
}
