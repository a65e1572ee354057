//! What is too slow, too much or no HTTP at all.

use std::time::{Duration, Instant};

use optimus_control_plane::api::Limits;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{Answer, DEADLINE, WEB, project, start, start_with, until_waiting};

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
