//! Figures for Prometheus: what this server does and what the state holds.

use std::time::Duration;

use http::{Method, StatusCode};
use optimus_common::protocol::Phase;
use prometheus::{Encoder, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

use crate::store::{Store, Traffic};

/// The figures of one server. Other parts register theirs with [`Metrics::registry`].
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    latency: HistogramVec,
    raft: IntGaugeVec,
    traffic: IntCounterVec,
    nodes: IntGaugeVec,
    clocks_off: IntGauge,
    server_clocks: IntGaugeVec,
    workloads: IntGauge,
    copies: IntGaugeVec,
    deployments_running: IntGauge,
    process: GaugeVec,
}

/// Seconds. From a cached read to a long poll.
const LATENCY_BUCKETS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 90.0];

impl Metrics {
    pub fn new() -> Self {
        let registry = Registry::new();
        let requests = IntCounterVec::new(
            Opts::new("optimus_api_requests_total", "Requests answered, by route and status."),
            &["method", "route", "status"],
        );
        let latency = HistogramVec::new(
            HistogramOpts::new("optimus_api_request_seconds", "Time from a request's head to its answer's head.")
                .buckets(LATENCY_BUCKETS.to_vec()),
            &["method", "route"],
        );
        let metrics = Metrics {
            requests: register(&registry, requests),
            latency: register(&registry, latency),
            raft: register(&registry, gauges("optimus_raft", "Where consensus stands on this server.", "what")),
            traffic: register(
                &registry,
                IntCounterVec::new(
                    Opts::new("optimus_raft_traffic_total", "What went between this server and the leader, by kind."),
                    &["what"],
                ),
            ),
            nodes: register(&registry, gauges("optimus_nodes", "Nodes, by whether they answer.", "phase")),
            server_clocks: register(
                &registry,
                gauges(
                    "optimus_server_clock_skew_milliseconds",
                    "How far a server's clock is ahead of the leader's; 0 while it is off by less than 1 s.",
                    "server",
                ),
            ),
            clocks_off: register(&registry, IntGauge::new("optimus_clocks_off", "Servers and nodes whose clock is off by more than 1 s.")),
            workloads: register(&registry, IntGauge::new("optimus_workloads", "Workloads.")),
            copies: register(&registry, gauges("optimus_copies", "Copies, by phase.", "phase")),
            deployments_running: register(&registry, IntGauge::new("optimus_deployments_running", "Deployments under way.")),
            process: register(
                &registry,
                GaugeVec::new(
                    Opts::new("optimus_process", "The server's process: memory in bytes, CPU in seconds since its start."),
                    &["what"],
                ),
            ),
            registry: registry.clone(),
        };
        let build = register(&registry, gauges("optimus_build_info", "Always 1; the version is in the label.", "version"));
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        metrics
    }

    /// For other parts' own figures.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Counts a request. `route` is the template, never the path: paths are without number.
    pub fn observe_request(&self, method: &Method, route: &'static str, status: StatusCode, took: Duration) {
        let method = match method.as_str() {
            known @ ("GET" | "HEAD" | "POST" | "PUT" | "DELETE" | "PATCH" | "OPTIONS") => known,
            _ => "other", // methods are without number too
        };
        self.requests.with_label_values(&[method, route, status.as_str()]).inc();
        self.latency.with_label_values(&[method, route]).observe(took.as_secs_f64());
    }

    /// All figures, those of the state as it is on this server now.
    pub fn render(&self, store: &Store) -> Result<Vec<u8>, prometheus::Error> {
        self.look(store);
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }

    fn look(&self, store: &Store) {
        let status = store.status();
        for (what, value) in [
            ("is_leader", u64::from(status.is_leader)),
            ("has_leader", u64::from(status.leader.is_some())),
            ("term", status.term),
            ("last_log", status.last_log),
            ("applied", status.applied),
            ("voters", u64::from(status.voters)),
        ] {
            self.raft.with_label_values(&[what]).set(signed(value));
        }
        if let Some(age) = status.leader_age {
            self.raft.with_label_values(&["leader_age_ms"]).set(signed(u64::try_from(age.as_millis()).unwrap_or(u64::MAX)));
        }
        let Traffic { forwarded, forwards, taken, read_rounds, reads, retries } = status.traffic;
        for (what, total) in [
            ("forwarded", forwarded),
            ("forward_requests", forwards),
            ("taken", taken),
            ("read_rounds", read_rounds),
            ("reads", reads),
            ("retries", retries),
        ] {
            let counter = self.traffic.with_label_values(&[what]);
            counter.inc_by(total.saturating_sub(counter.get()));
        }
        let state = store.state();
        let up = state.nodes.values().filter(|node| node.up).count();
        self.nodes.with_label_values(&["up"]).set(signed(up as u64));
        self.nodes.with_label_values(&["down"]).set(signed((state.nodes.len() - up) as u64));
        self.server_clocks.reset(); // those that have left
        for (id, server) in &state.servers {
            self.server_clocks.with_label_values(&[&id.to_string()]).set(server.clock_skew_ms.unwrap_or(0));
        }
        let servers_off = state.servers.values().filter(|server| server.clock_skew_ms.is_some()).count();
        let nodes_off = state.nodes.values().filter(|node| node.up && node.clock_skew_ms.is_some()).count();
        self.clocks_off.set(signed((servers_off + nodes_off) as u64));
        self.workloads.set(signed(state.workloads.len() as u64));
        self.deployments_running.set(signed(state.deployments.values().filter(|deployment| !deployment.phase.is_final()).count() as u64));
        let phases = [Phase::Pending, Phase::Starting, Phase::Running, Phase::Backoff, Phase::Stopping, Phase::Stopped, Phase::Failed];
        let mut counts = [0u64; 7];
        let mut ready = 0;
        for alloc in state.allocs.values() {
            let phase = alloc.status.as_ref().map_or(Phase::Pending, |status| status.phase);
            counts[phases.iter().position(|p| *p == phase).unwrap_or(0)] += 1;
            ready += u64::from(alloc.status.as_ref().is_some_and(|status| status.ready));
        }
        for (phase, count) in phases.iter().zip(counts) {
            self.copies.with_label_values(&[phase_name(*phase)]).set(signed(count));
        }
        self.copies.with_label_values(&["ready"]).set(signed(ready));
        if let Some((cpu, memory)) = own_process() {
            self.process.with_label_values(&["cpu_seconds"]).set(cpu);
            self.process.with_label_values(&["resident_bytes"]).set(memory);
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Pending => "pending",
        Phase::Starting => "starting",
        Phase::Running => "running",
        Phase::Backoff => "backoff",
        Phase::Stopping => "stopping",
        Phase::Stopped => "stopped",
        Phase::Failed => "failed",
    }
}

fn gauges(name: &str, help: &str, label: &str) -> prometheus::Result<IntGaugeVec> {
    IntGaugeVec::new(Opts::new(name, help), &[label])
}

fn register<C: prometheus::core::Collector + Clone + 'static>(registry: &Registry, collector: prometheus::Result<C>) -> C {
    let collector = collector.expect("names and labels are constants that a test has checked");
    registry.register(Box::new(collector.clone())).expect("every name is registered once, which a test has checked");
    collector
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// CPU seconds and resident bytes of this process.
fn own_process() -> Option<(f64, f64)> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name in brackets may hold spaces and brackets: count from the last one.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks: f64 = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
    let pages: f64 = fields.get(21)?.parse().ok()?;
    let per_second = rustix::param::clock_ticks_per_second() as f64;
    Some((ticks / per_second, pages * rustix::param::page_size() as f64))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_route() {
        let metrics = Metrics::new();
        metrics.observe_request(&Method::GET, "/v1/status", StatusCode::OK, Duration::from_millis(3));
        metrics.observe_request(&Method::from_bytes(b"BREW").unwrap(), "unmatched", StatusCode::NOT_FOUND, Duration::ZERO);
        let mut text = Vec::new();
        TextEncoder::new().encode(&metrics.registry().gather(), &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains(r#"optimus_api_requests_total{method="GET",route="/v1/status",status="200"} 1"#), "{text}");
        assert!(text.contains(r#"method="other""#), "{text}");
        assert!(text.contains("optimus_build_info"), "{text}");
    }

    #[test]
    fn a_process_has_memory() {
        let (cpu, memory) = own_process().unwrap();
        assert!(cpu >= 0.0 && memory > 100_000.0);
    }
}
