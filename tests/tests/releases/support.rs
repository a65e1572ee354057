//! A server, an agent, a router in front, and how tests deploy the little web server on it.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use optimus_tests::api_client::ApiClient;
use optimus_tests::edge::{Edge, Seen};
use optimus_tests::harness::{PATIENCE, Sandbox, bin_dir};
use serde_json::Value;

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(10);

/// One workload: the little web server in one of its ways, with more lines for its table.
pub struct Web<'a> {
    pub name: &'a str,
    pub copies: u32,
    pub version: &'a str,
    pub mode: &'a str,
    /// As the file has them: cores, and reserved memory and limit.
    pub cpu: &'a str,
    pub memory: &'a str,
    /// Lines of the workload's own table.
    pub more: &'a str,
}

impl<'a> Web<'a> {
    /// One that does what it should.
    pub fn new(name: &'a str, copies: u32, version: &'a str, more: &'a str) -> Web<'a> {
        Web { name, copies, version, mode: "ok", cpu: "0.05", memory: "8M..32M", more }
    }

    fn table(&self) -> String {
        let Web { name, copies, version, mode, cpu, memory, more } = self;
        let program = bin_dir().join("optimus-test-web");
        format!(
            "[service.{name}]\nrun = [\"{}\"]\ncopies = {copies}\nport = \"auto\"\ncpu = {cpu}\nmemory = \"{memory}\"\nhealth = {{ http = \"/healthz\", interval = \"100ms\" }}\nrestart = {{ delay = \"100ms\", delay_max = \"100ms\" }}\nenv = {{ WEB_MODE = \"{mode}\", WEB_VERSION = \"{version}\", WEB_DELAY_MS = \"5\" }}\n{more}\n",
            program.display()
        )
    }
}

/// A cluster of one server and one agent, as users run it.
pub struct World {
    pub sandbox: Sandbox,
    pub api: ApiClient,
    /// Their processes.
    pub server: usize,
    pub agent: usize,
}

impl World {
    pub fn new() -> World {
        let mut sandbox = Sandbox::new();
        let server_process = sandbox.server();
        let agent = sandbox.agent();
        let server = format!("127.0.0.1:{}", sandbox.api_port).parse().unwrap();
        let api = ApiClient::new(&sandbox.path("config"), vec![server]).unwrap();
        World { sandbox, api, server: server_process, agent }
    }

    /// A router in front of these workloads that the cluster knows of.
    pub async fn edge(&self, name: &str, workloads: &[&str]) -> Edge {
        let edge = Edge::start(self.api.clone(), name, workloads).await.unwrap();
        until("the router to be known", async || edge.acked().1).await;
        edge
    }

    /// Deploys without waiting.
    pub fn deploy(&self, file: &str, webs: &[Web<'_>]) {
        let text: String = std::iter::once("project = \"shop\"\n".to_owned()).chain(webs.iter().map(Web::table)).collect();
        let dir = self.sandbox.project(file, &[]);
        fs::write(dir.join("optimus.toml"), text).unwrap();
        self.sandbox.run(&["deploy", dir.to_str().unwrap(), "--no-wait"]).expect(0);
    }

    async fn get(&self, path: &str) -> Value {
        let answer = self.api.get(0, path, Duration::from_secs(10)).await.unwrap();
        assert!(answer.is_success(), "{path}: {} {}", answer.status, answer.body);
        answer.body
    }

    /// The newest deployment of a workload.
    pub async fn deployment(&self, workload: &str) -> Value {
        self.get(&format!("/v1/deployments?project=shop&workload={workload}&page_size=1")).await["items"][0].clone()
    }

    /// The newest deployment once it is in one of these phases. Fails at once when it ended otherwise.
    pub async fn phase(&self, workload: &str, phases: &[&str]) -> Value {
        let ended = ["done", "failed", "rolled_back", "superseded", "cancelled"];
        let end = Instant::now() + PATIENCE;
        loop {
            let deployment = self.deployment(workload).await;
            let phase = deployment["phase"].as_str().unwrap_or_default();
            if phases.contains(&phase) {
                return deployment;
            }
            let in_time = !ended.contains(&phase) && Instant::now() < end;
            assert!(in_time, "{workload} is {phase}, not {phases:?}: {deployment:#}\n{:#?}", self.sandbox.copies(workload));
            tokio::time::sleep(POLL).await;
        }
    }

    /// Pids of the copies that should run, in the order of their slots.
    pub fn pids(&self, workload: &str) -> Vec<i32> {
        self.sandbox.copies(workload).iter().filter(|c| c["desired_run"] == true).map(|c| c["pid"].as_i64().unwrap_or(0) as i32).collect()
    }

    /// Fails unless exactly these processes run, ready and of this release, and routers send requests to all of them alike.
    #[track_caller]
    pub fn expect_whole(&self, workload: &str, pids: &[i32], release: u64, seen: &Seen) {
        let copies = self.sandbox.copies(workload);
        assert_eq!(self.pids(workload), pids, "{workload}: {copies:#?}");
        assert!(copies.iter().all(|c| c["ready"] == true && c["release"] == release), "{workload}: {copies:#?}");
        let weights: BTreeSet<u32> = seen.set.endpoints.iter().map(|e| e.weight).collect();
        assert!(weights.len() == 1 && !weights.contains(&0), "{workload}: {seen:?}");
        assert!(seen.releases.values().all(|r| *r == release), "{workload}: {seen:?}");
    }
}

/// Whether a process runs; a zombie does not.
pub fn alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.rsplit(')').next().unwrap_or("").trim_start().starts_with('Z'))
}

/// Polls until there is a value; panics with `what` when patience is at its end.
pub async fn until<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(Instant::now() < end, "gave up waiting for {what}");
        tokio::time::sleep(POLL).await;
    }
}

/// Waits until the router sends requests to `n` endpoints of a workload.
pub async fn routed(edge: &Edge, workload: &str, n: usize) -> Seen {
    until(&format!("{n} endpoints of {workload}"), async || {
        let seen = edge.seen(workload);
        (seen.set.endpoints.iter().filter(|e| e.weight > 0).count() == n).then_some(seen)
    })
    .await
}
