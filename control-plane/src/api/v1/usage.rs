//! What nodes and copies use: over time, and for Prometheus.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::response::Response;
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use optimus_common::api::usage::{MetricHistory, MetricSeries, UsageCopy, UsageList, UsageRow};
use optimus_common::api::v1::{PAGE_DEFAULT, PAGE_MAX};
use optimus_common::usage::{HistoryRequest, POINTS_MAX};
use optimus_common::{AllocId, Bytes, Metric, Name, NodeId, Span, Timestamp, WorkloadKey};
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};

use super::{allocations, nodes};
use crate::agent_calls::{Measured, NodeUsage};
use crate::api::context::{Consistency, Ctx, Freshness};
use crate::api::problem::ApiError;
use crate::federation::{self, Selector};

/// Points of a series when no step is asked for.
const POINTS_DEFAULT: u64 = 180;
/// How far back it reaches when no start is asked for.
const BACK_DEFAULT: Span = Span::secs(15 * 60);
/// Agents measure every second.
const STEP_MIN: Span = Span::secs(1);
/// Most selectors of one request.
const SELECTORS_MAX: usize = 100;

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct HistoryQuery {
    /// Names with commas between: `cpu,memory_working`, which is the default.
    pub metrics: Option<String>,
    /// RFC 3339, or how long ago (`15m`, the default).
    pub from: Option<String>,
    /// RFC 3339, or how long ago; default: now.
    pub to: Option<String>,
    /// Time of one point, at least 1s; default: what gives 180 points.
    pub step: Option<Span>,
}

impl HistoryQuery {
    fn request(self, alloc: Option<AllocId>, now: Timestamp) -> Result<(HistoryRequest, Vec<Metric>), ApiError> {
        let bad = |what: &str, why: String| ApiError::bad_request(format!("query: {what}: {why}"));
        let names = self.metrics.as_deref().unwrap_or("cpu,memory_working");
        let mut metrics = Vec::new();
        for name in names.split(',') {
            let metric: Metric = name.trim().parse().map_err(|error| {
                let known: Vec<_> = Metric::ALL.iter().map(|m| m.word()).collect();
                bad("metrics", format!("{error}")).hint(format!("known are {}", known.join(", ")))
            })?;
            if metrics.contains(&metric) {
                return Err(bad("metrics", format!("`{metric}` is named twice")));
            }
            metrics.push(metric);
        }
        let time = |what: &str, text: Option<String>, default: Timestamp| match text {
            None => Ok(default),
            Some(text) => match text.parse::<Span>() {
                Ok(ago) => Ok(now - ago),
                Err(_) => {
                    serde_json::from_value(serde_json::Value::String(text)).map_err(|_| bad(what, "neither a time nor a duration".into()))
                }
            },
        };
        let (from, to) = (time("from", self.from, now - BACK_DEFAULT)?, time("to", self.to, now)?);
        if from >= to {
            return Err(bad("from", "it is not before `to`".into()));
        }
        let length = to.since(from).0;
        let step = self.step.unwrap_or(Span(length.div_ceil(POINTS_DEFAULT).max(STEP_MIN.0)));
        if step < STEP_MIN {
            return Err(bad("step", format!("{step} is less than {STEP_MIN}")));
        }
        if length.div_ceil(step.0) > POINTS_MAX {
            return Err(bad("step", format!("{} points; at most {POINTS_MAX}", length.div_ceil(step.0))));
        }
        Ok((HistoryRequest { alloc, metrics: metrics.iter().map(|m| *m as u8).collect(), from, to, step }, metrics))
    }
}

/// What a node used, as its agent remembers it: some hours.
#[utoipa::path(get, path = "/v1/nodes/{node}/metrics", tag = "nodes", operation_id = "node_metrics", params(HistoryQuery),
    responses((status = 200, body = MetricHistory)))]
pub(crate) async fn node_metrics(ctx: Ctx) -> Result<Response, ApiError> {
    let query: HistoryQuery = ctx.query()?;
    let state = ctx.read(Freshness::default()).await?;
    let node = nodes::find(&state, ctx.param("node")?)?.id;
    answer(ctx, state.index, node, None, query).await
}

/// What a copy used, as its node's agent remembers it: some hours, also after its end.
#[utoipa::path(get, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}/allocations/{allocation}/metrics", tag = "allocations",
    operation_id = "allocation_metrics", params(HistoryQuery), responses((status = 200, body = MetricHistory)))]
pub(crate) async fn allocation_metrics(ctx: Ctx) -> Result<Response, ApiError> {
    let query: HistoryQuery = ctx.query()?;
    let key = ctx.workload_key()?;
    let state = ctx.read(Freshness::default()).await?;
    let alloc = allocations::find(&state, &key, ctx.param("allocation")?)?;
    answer(ctx, state.index, alloc.node, Some(alloc.id), query).await
}

async fn answer(ctx: Ctx, index: u64, node: NodeId, alloc: Option<AllocId>, query: HistoryQuery) -> Result<Response, ApiError> {
    let (request, metrics) = query.request(alloc, ctx.store().env.clock.now())?;
    let HistoryRequest { from, to, step, .. } = request;
    let answer = ctx.shared.deps.agents.history(node, request).await?;
    let series = metrics.into_iter().zip(answer.series).map(|(metric, points)| MetricSeries {
        metric,
        unit: metric.unit(),
        mean: points.iter().map(|point| point.map(|p| p.mean)).collect(),
        max: points.iter().map(|point| point.map(|p| p.max)).collect(),
    });
    ctx.json(index, &MetricHistory { from, to, step, series: series.collect() })
}

/// What is listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Of {
    #[default]
    Allocations,
    Nodes,
}

/// What they are ordered by, the most first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum By {
    #[default]
    Cpu,
    Memory,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct UsageQuery {
    #[serde(default)]
    #[param(inline)]
    pub of: Of,
    #[serde(default)]
    #[param(inline)]
    pub by: By,
    /// Only copies of this project.
    pub project: Option<Name>,
    /// Only copies of environments of this name.
    pub environment: Option<Name>,
    /// Only copies of workloads of this name.
    pub workload: Option<Name>,
    /// Only this node (id or name), or copies on it.
    pub node: Option<String>,
    /// How many: default 50, at most 1000.
    #[param(minimum = 1, maximum = 1000)]
    pub limit: Option<usize>,
}

/// Most hosts named as missing.
const MISSING_MAX: usize = 100;

/// What copies, or hosts, use now: those that use most first, of the hosts connected to this server.
#[utoipa::path(get, path = "/v1/usage", tag = "nodes", operation_id = "get_usage", params(UsageQuery),
    responses((status = 200, body = UsageList)))]
pub(crate) async fn get_usage(ctx: Ctx) -> Result<Response, ApiError> {
    let query: UsageQuery = ctx.query()?;
    let limit = query.limit.unwrap_or(PAGE_DEFAULT);
    if !(1..=PAGE_MAX).contains(&limit) {
        return Err(ApiError::bad_request(format!("query: limit is 1 to {PAGE_MAX}")));
    }
    let state = ctx.read(Freshness { consistency: Some(Consistency::Stale), ..Freshness::default() }).await?;
    let only = query.node.as_deref().map(|node| nodes::find(&state, node)).transpose()?.map(|node| node.id);
    let now = ctx.store().env.clock.monotonic();
    let usages: BTreeMap<NodeId, NodeUsage> = ctx.shared.deps.agents.usages(true).into_iter().collect();
    let (mut items, mut missing) = (Vec::new(), Vec::new());
    for node in state.nodes.values().filter(|node| only.is_none_or(|only| only == node.id)) {
        let fresh = usages.get(&node.id).filter(|usage| now.saturating_sub(usage.came) <= federation::FRESH);
        let Some(usage) = fresh else {
            missing.push(node.facts.name.clone());
            continue;
        };
        let row = |measured: &Measured, allocation, cpu_limit, memory_limit| UsageRow {
            node: node.id,
            node_name: node.facts.name.clone(),
            allocation,
            age: now.saturating_sub(usage.came).into(),
            cpu: measured.cpu,
            cpu_limit,
            memory: measured.figures.memory_working().map(Bytes),
            memory_limit,
            pids: measured.figures.pids,
        };
        match query.of {
            Of::Nodes => items.push(row(&usage.host, None, node.facts.cpu, node.facts.memory)),
            Of::Allocations => items.extend(usage.allocs.iter().filter_map(|(id, measured)| {
                let alloc = state.allocs.get(id).filter(|alloc| query.wants(&alloc.key))?;
                let limits = state.release(&alloc.key, alloc.release)?.spec.resources;
                let copy = UsageCopy { id: *id, name: alloc.name(), key: alloc.key.clone() };
                Some(row(measured, Some(copy), limits.cpu, limits.memory_limit))
            })),
        }
    }
    items.sort_by_key(|row: &UsageRow| {
        std::cmp::Reverse(match query.by {
            By::Cpu => (row.cpu.map_or(0, |cpu| u64::from(cpu.0)), row.memory),
            By::Memory => (row.memory.map_or(0, |memory| memory.0), None),
        })
    });
    let total = items.len() as u64;
    items.truncate(limit);
    missing.truncate(MISSING_MAX);
    ctx.json(state.index, &UsageList { items, total, missing, index: state.index })
}

impl UsageQuery {
    fn wants(&self, key: &WorkloadKey) -> bool {
        self.project.as_ref().is_none_or(|name| *name == key.project)
            && self.environment.as_ref().is_none_or(|name| *name == key.environment)
            && self.workload.as_ref().is_none_or(|name| *name == key.workload)
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[allow(dead_code, reason = "documents the parameter; repeated ones are read from the query itself")]
pub(crate) struct FederateQuery {
    /// A selector of Prometheus; repeated, a series that one of them asks for is given.
    #[serde(rename = "match[]")]
    #[param(rename = "match[]")]
    pub selector: Vec<String>,
}

/// Newest figures of the nodes connected to this server and of their copies, in Prometheus' text format.
///
/// `optimus_node_measured` is 0 for nodes whose figures this server does not have.
#[utoipa::path(get, path = "/federate", tag = "server", operation_id = "federate", params(FederateQuery),
    responses((status = 200, description = "Prometheus text format.", body = String, content_type = "text/plain")))]
pub(crate) async fn federate(ctx: Ctx) -> Result<Response, ApiError> {
    let query = ctx.parts.uri.query().unwrap_or_default();
    let mut selectors = Vec::new();
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        if name != "match[]" {
            return Err(ApiError::bad_request(format!("query: unknown parameter `{}`", name.chars().take(40).collect::<String>())));
        }
        if selectors.len() >= SELECTORS_MAX {
            return Err(ApiError::bad_request(format!("query: at most {SELECTORS_MAX} selectors")));
        }
        selectors.push(Selector::parse(&value).map_err(|error| ApiError::bad_request(format!("query: match[]: {error}")))?);
    }
    if selectors.is_empty() {
        return Err(ApiError::bad_request("query: match[] is required").hint(r#"all of it: match[]={__name__=~"optimus_.*"}"#));
    }
    // What this server knows: a scrape must not depend on a leader.
    let state = ctx.read(Freshness { consistency: Some(Consistency::Stale), ..Freshness::default() }).await?;
    let usages = ctx.shared.deps.agents.usages(false);
    let now = ctx.store().env.clock.monotonic();
    let body = federation::render(&state, &usages, now, &selectors).map_err(|error| ApiError::bad_request(error.to_string()))?;
    let mut response = Response::new(Body::from(body));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(prometheus::TEXT_FORMAT));
    Ok(response)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const NOW: Timestamp = Timestamp(1_800_000_000_000);

    fn query(metrics: Option<&str>, from: Option<&str>, step: Option<u64>) -> HistoryQuery {
        HistoryQuery { metrics: metrics.map(str::to_owned), from: from.map(str::to_owned), to: None, step: step.map(Span) }
    }

    #[test]
    fn what_is_not_said_has_a_default() {
        let (request, metrics) = query(None, None, None).request(None, NOW).unwrap();
        assert_eq!(metrics, [Metric::Cpu, Metric::MemoryWorking]);
        assert_eq!((request.from, request.to, request.step), (NOW - BACK_DEFAULT, NOW, Span::secs(5)));
        let (request, _) = query(Some("fds"), Some("10s"), None).request(None, NOW).unwrap();
        assert_eq!(request.step, Span::secs(1), "never finer than is measured");
    }

    #[test]
    fn a_bad_question_says_what_is_wrong() {
        for (query, why) in [
            (query(Some("cpu,cpux"), None, None), "there is no metric `cpux`"),
            (query(Some("cpu,cpu"), None, None), "named twice"),
            (query(None, Some("yesterday"), None), "neither a time nor a duration"),
            (query(None, Some("2100-01-01T00:00:00Z"), None), "not before"),
            (query(None, Some("6h"), Some(1000)), "21600 points; at most 2000"),
            (query(None, None, Some(10)), "less than 1s"),
        ] {
            let error = query.request(None, NOW).unwrap_err();
            assert!(error.problem("r").detail.contains(why), "{why}: {}", error.problem("r").detail);
        }
    }
}
