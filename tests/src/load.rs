//! Clients that write and read registers through all servers of a cluster, and listeners on its events.
//!
//! A register is a workload with no copies and one variable in its environment: written by a deploy, read by a
//! linearizable GET. A write is sent again under the same idempotency key, to any server, until it is acknowledged or given
//! up; given up means its outcome is unknown. The history goes to [`linearizability`](crate::linearizability), the events
//! to [`event_stream`](crate::event_stream).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::api_client::ApiClient;
use crate::dice::Dice;
use crate::event_stream::{Item, Position, Stream};
use crate::linearizability::{Kind, Op, check};

/// Longest wait for one answer; then the request goes to another server.
const TRY: Duration = Duration::from_secs(1);
/// Longest time a write is tried; then its outcome is unknown.
const GIVE_UP: Duration = Duration::from_secs(15);
/// Pause before the next try after a refusal.
const AGAIN: Duration = Duration::from_millis(20);
/// Longest pause between two operations of a client.
const PACE_MS: u64 = 10;
const PROJECT: &str = "chaos";

/// Clients at work.
pub struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    clients: JoinSet<Vec<Op>>,
    api: ApiClient,
    registers: u64,
    started: Instant,
}

/// What clients saw.
pub struct History {
    pub ops: Vec<Op>,
}

impl History {
    /// Writes that were acknowledged.
    pub fn acknowledged(&self) -> usize {
        self.writes().filter(|op| op.end.is_some()).count()
    }

    /// Writes of unknown outcome.
    pub fn unknown(&self) -> usize {
        self.writes().filter(|op| op.end.is_none()).count()
    }

    /// Reads that were answered.
    pub fn reads(&self) -> usize {
        self.ops.iter().filter(|op| matches!(op.kind, Kind::Read(_)) && op.end.is_some()).count()
    }

    fn writes(&self) -> impl Iterator<Item = &Op> {
        self.ops.iter().filter(|op| matches!(op.kind, Kind::Write(_)))
    }

    /// The longest time in which no write was acknowledged, of all that ended within `within` (microseconds of the load).
    pub fn longest_gap(&self, within: std::ops::Range<u64>) -> Duration {
        let mut ends: Vec<u64> = self.writes().filter_map(|op| op.end).filter(|end| within.contains(end)).collect();
        ends.extend([within.start, within.end]);
        ends.sort_unstable();
        Duration::from_micros(ends.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0))
    }

    /// Fails the test when no order explains what clients saw.
    #[track_caller]
    pub fn expect_linearizable(&self) {
        if let Err(violation) = check(&self.ops) {
            panic!("not linearizable: {violation}");
        }
    }
}

impl Load {
    /// `clients` writing and reading `registers`, each by its own dice.
    pub fn start(api: &ApiClient, clients: u32, registers: u64, seed: u64) -> Self {
        Self::reading(api, clients, registers, seed, "linearizable")
    }

    /// The same with reads that may be old: a history of which the checker must refuse, to prove that it looks.
    pub fn start_stale(api: &ApiClient, clients: u32, registers: u64, seed: u64) -> Self {
        Self::reading(api, clients, registers, seed, "stale")
    }

    fn reading(api: &ApiClient, clients: u32, registers: u64, seed: u64, consistency: &'static str) -> Self {
        let (stop, acknowledged): (Arc<AtomicBool>, Arc<AtomicU64>) = Default::default();
        let (values, started) = (Arc::new(AtomicU64::new(1)), Instant::now());
        let mut tasks = JoinSet::new();
        for client in 0..clients {
            let dice = Dice(seed.wrapping_add(u64::from(client)).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let (stop, acknowledged, values) = (stop.clone(), acknowledged.clone(), values.clone());
            let run = Client { api: api.clone(), client, registers, dice, started, stop, acknowledged, values, consistency };
            tasks.spawn(run.run());
        }
        Self { stop, acknowledged, clients: tasks, api: api.clone(), registers, started }
    }

    /// Microseconds since the start: the clock of the history.
    pub fn now(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// Writes acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// Waits until that many further writes are acknowledged.
    pub async fn wait_more(&self, writes: u64) {
        let (end, wanted) = (Instant::now() + crate::harness::PATIENCE, self.acknowledged() + writes);
        while self.acknowledged() < wanted {
            assert!(Instant::now() < end, "the cluster acknowledges no writes");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends the clients, reads every register once through every server, and gives what was seen.
    pub async fn stop(mut self) -> History {
        self.stop.store(true, Ordering::Relaxed);
        let mut ops = Vec::new();
        while let Some(seen) = self.clients.join_next().await {
            ops.extend(seen.expect("a client ends well"));
        }
        for register in 0..self.registers {
            for server in 0..self.api.servers() {
                let end = Instant::now() + crate::harness::PATIENCE;
                loop {
                    let call = self.now();
                    if let Some(kind) = read(&self.api, server, register, "linearizable").await {
                        ops.push(Op { client: u32::MAX, key: name(register), call, end: Some(self.now()), kind });
                        break;
                    }
                    assert!(Instant::now() < end, "server {server} does not answer reads");
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
        History { ops }
    }
}

struct Client {
    api: ApiClient,
    client: u32,
    registers: u64,
    dice: Dice,
    started: Instant,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    values: Arc<AtomicU64>,
    consistency: &'static str,
}

impl Client {
    fn now(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    fn server(&mut self) -> usize {
        self.dice.below(self.api.servers() as u64) as usize
    }

    async fn run(mut self) -> Vec<Op> {
        let mut ops = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            let register = self.dice.below(self.registers);
            let op = if self.dice.below(2) == 0 { self.write(register).await } else { self.read(register).await };
            ops.extend(op);
            let pause = self.dice.below(PACE_MS);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        ops
    }

    async fn write(&mut self, register: u64) -> Option<Op> {
        let value = self.values.fetch_add(1, Ordering::Relaxed);
        let (key, body) = (format!("write-{}-{value}", self.started.elapsed().as_nanos()), spec(register, value));
        let call = self.now();
        let mut end = None;
        // Some clients do not ask again, so that there are outcomes nobody knows.
        let patience = if self.dice.below(4) == 0 { Duration::ZERO } else { GIVE_UP };
        while end.is_none() {
            let server = self.server();
            match self.api.post(server, "/v1/deploy", &key, &body, TRY).await {
                Ok(answer) if answer.is_success() => end = Some(self.now()),
                Ok(answer) if answer.is_retryable() => tokio::time::sleep(AGAIN).await,
                Ok(answer) => panic!("write {value} was refused: {} {}", answer.status, answer.body),
                Err(_) => tokio::time::sleep(AGAIN).await,
            }
            if self.now() >= call + patience.as_micros() as u64 {
                break;
            }
        }
        self.acknowledged.fetch_add(u64::from(end.is_some()), Ordering::Relaxed);
        Some(Op { client: self.client, key: name(register), call, end, kind: Kind::Write(value) })
    }

    async fn read(&mut self, register: u64) -> Option<Op> {
        let (server, call) = (self.server(), self.now());
        let kind = read(&self.api, server, register, self.consistency).await?;
        Some(Op { client: self.client, key: name(register), call, end: Some(self.now()), kind })
    }
}

fn name(register: u64) -> String {
    format!("register-{register}")
}

/// One read; none when it was not answered.
async fn read(api: &ApiClient, server: usize, register: u64, consistency: &str) -> Option<Kind> {
    let path = format!("/v1/projects/{PROJECT}/envs/dev/workloads/{}?consistency={consistency}", name(register));
    let answer = api.get(server, &path, TRY).await.ok()?;
    match answer.status {
        200 => {
            let value = answer.body["spec"]["env"]["VALUE"].as_str().and_then(|v| v.parse().ok());
            Some(Kind::Read(Some(value.unwrap_or_else(|| panic!("no value in {}", answer.body)))))
        }
        404 => Some(Kind::Read(None)),
        _ if answer.is_retryable() => None,
        other => panic!("a read was refused: {other} {}", answer.body),
    }
}

/// The deploy that sets a register.
fn spec(register: u64, value: u64) -> Value {
    use optimus_common::spec::{Context, parse_toml};
    let text =
        format!("project = \"{PROJECT}\"\n[service.{}]\nrun = \"true\"\ncopies = 0\nenv = {{ VALUE = \"{value}\" }}\n", name(register));
    let context = Context { default_project: None, base_dir: "/".into(), environment: None };
    let parsed = parse_toml("registers", &text, &context).unwrap_or_else(|e| panic!("{e:?}"));
    json!(parsed.spec)
}

/// Listeners, one on each server.
pub struct Listeners {
    stop: Arc<AtomicBool>,
    listeners: JoinSet<Stream>,
}

/// Longest silence of a stream before the listener connects anew; servers send a blank line every 10 s.
const SILENCE: Duration = Duration::from_secs(15);

impl Listeners {
    pub fn start(api: &ApiClient) -> Self {
        let stop: Arc<AtomicBool> = Arc::default();
        let mut listeners = JoinSet::new();
        for server in 0..api.servers() {
            listeners.spawn(listen(api.clone(), server, stop.clone()));
        }
        Self { stop, listeners }
    }

    /// Ends them and gives what each saw.
    pub async fn stop(mut self) -> Vec<Stream> {
        self.stop.store(true, Ordering::Relaxed);
        let mut streams = Vec::new();
        while let Some(stream) = self.listeners.join_next().await {
            streams.push(stream.expect("a listener ends well"));
        }
        streams
    }
}

async fn listen(api: ApiClient, server: usize, stop: Arc<AtomicBool>) -> Stream {
    let mut stream = Stream { source: format!("server {server}"), items: Vec::new() };
    let mut last: Option<Position> = None;
    while !stop.load(Ordering::Relaxed) {
        // The last entry may not have been sent in full: it is asked for again, and what was seen of it is left out.
        let since = last.map_or(0, |at| at.index.saturating_sub(1));
        match api.stream(server, &format!("/v1/events?follow=true&since={since}")).await {
            Ok(response) if response.status() == 200 => follow(response, &mut stream, &mut last, &stop).await,
            Ok(response) if response.status() == 410 => {
                stream.items.push(Item::Gap);
                last = None;
            }
            _ => tokio::time::sleep(AGAIN).await,
        }
    }
    stream
}

/// Reads lines until the connection ends. Half a line at its end does not count.
async fn follow(mut response: reqwest::Response, stream: &mut Stream, last: &mut Option<Position>, stop: &AtomicBool) {
    let resumed = *last;
    let (mut text, mut heard) = (Vec::new(), Instant::now());
    while !stop.load(Ordering::Relaxed) && heard.elapsed() < SILENCE {
        let chunk = match tokio::time::timeout(Duration::from_millis(200), response.chunk()).await {
            Err(_) => continue,
            Ok(Ok(Some(chunk))) => chunk,
            Ok(Ok(None) | Err(_)) => return,
        };
        heard = Instant::now();
        text.extend_from_slice(&chunk);
        while let Some(end) = text.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            if line.trim_ascii().is_empty() {
                continue;
            }
            let event: Value = serde_json::from_slice(&line).unwrap_or_else(|e| panic!("an event is not JSON: {e}"));
            let (Some(index), Some(n)) = (event["index"].as_u64(), event["n"].as_u64()) else { continue };
            let at = Position { index, n: n as u32 };
            if resumed.is_some_and(|resumed| at <= resumed) {
                continue;
            }
            stream.items.push(Item::Event { at, body: event.to_string() });
            *last = Some(at);
        }
    }
}

/// Waits until all servers have applied the same entries, and fails if their states then differ.
pub async fn expect_same_state(api: &ApiClient) {
    let end = Instant::now() + crate::harness::PATIENCE;
    loop {
        let mut seen: Vec<(Option<u64>, String)> = Vec::new();
        for server in 0..api.servers() {
            let answer = api.get(server, "/v1/cluster/digest", GIVE_UP).await.ok().filter(|answer| answer.is_success());
            let body = answer.map(|answer| answer.body).unwrap_or_default();
            seen.push((body["index"].as_u64(), body["digest"].as_str().unwrap_or_default().to_owned()));
        }
        let (index, digest) = seen[0].clone();
        if index.is_some() && seen.iter().all(|(other, _)| *other == index) {
            assert!(digest.len() == 64 && seen.iter().all(|(_, other)| *other == digest), "the servers differ at one index: {seen:?}");
            return;
        }
        assert!(Instant::now() < end, "the servers do not come to the same index: {seen:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
