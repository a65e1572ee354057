//! A server, an agent, a router in front, and how tests deploy the little web server on it.

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
    /// Lines of the workload's own table.
    pub more: &'a str,
}

impl Web<'_> {
    fn table(&self) -> String {
        let Web { name, copies, version, mode, more } = self;
        let program = bin_dir().join("optimus-test-web");
        format!(
            "[service.{name}]\nrun = [\"{}\"]\ncopies = {copies}\nport = \"auto\"\ncpu = 0.05\nmemory = \"16M..32M\"\nhealth = {{ http = \"/healthz\", interval = \"100ms\" }}\nrestart = {{ delay = \"100ms\", delay_max = \"100ms\" }}\nenv = {{ WEB_MODE = \"{mode}\", WEB_VERSION = \"{version}\", WEB_DELAY_MS = \"5\" }}\n{more}\n",
            program.display()
        )
    }
}

/// A cluster of one server and one agent, as users run it.
pub struct World {
    pub sandbox: Sandbox,
    pub api: ApiClient,
}

impl World {
    pub fn new() -> World {
        let mut sandbox = Sandbox::new();
        sandbox.server();
        sandbox.agent();
        let server = format!("127.0.0.1:{}", sandbox.api_port).parse().unwrap();
        let api = ApiClient::new(&sandbox.path("config"), vec![server]).unwrap();
        World { sandbox, api }
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

    pub async fn remove(&self, workload: &str) {
        self.sandbox.run(&["rm", workload, "--yes"]).expect(0);
        until("the copies to end", async || self.sandbox.copies(workload).is_empty().then_some(())).await;
    }
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
