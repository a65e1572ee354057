//! Where copies are reached, for routers, and what routers have taken on. The protocol is in `docs/endpoints.md`.

use std::ops::Bound;
use std::sync::Arc;

use axum::response::Response;
use optimus_common::api::v1::{ActionAnswer, CopyTraffic, EndpointAck, EndpointSet, FieldError, Page};
use optimus_common::reason::code;
use optimus_core::deployments::analysis::{LATENCY_BUCKETS, Sample};
use optimus_core::endpoints;
use optimus_core::state::{self, Command, State};

use super::actions::act;
use super::workloads::{WorkloadsQuery, parse_key};
use crate::api::context::{Ctx, Freshness, to_json};
use crate::api::idempotency::ChangeQuery;
use crate::api::json;
use crate::api::paging::PageRequest;
use crate::api::problem::ApiError;
use crate::api::watch;

/// Longest name of a router.
const ROUTER_NAME_MAX: usize = 100;
/// Most copies whose requests are counted in one acknowledgement.
const COPIES_COUNTED_MAX: usize = 1000;

/// The endpoints of the workloads, by their name. With `index` and `wait`: as soon as they changed.
#[utoipa::path(get, path = "/v1/endpoints", tag = "endpoints", operation_id = "list_endpoints", params(WorkloadsQuery),
    responses((status = 200, body = Page<EndpointSet>)))]
pub(crate) async fn list_endpoints(ctx: Ctx) -> Result<Response, ApiError> {
    let query: WorkloadsQuery = ctx.query()?;
    let scope = format!("endpoints {:?} {:?}", query.project, query.environment);
    let request = PageRequest::new(query.page_size, query.page_token.as_deref(), scope)?;
    let after = request.after.as_deref().map(parse_key).transpose()?;
    let page = |state: &State| {
        let from = after.clone().map_or(Bound::Unbounded, Bound::Excluded);
        let rows = state.workloads.range((from, Bound::Unbounded)).map(|(_, row)| row).filter(|row| query.matches(&row.key));
        let (rows, next_page_token) = request.cut(rows, |row: &&Arc<state::Workload>| row.key.to_string());
        let items: Vec<EndpointSet> = rows.into_iter().filter_map(|row| endpoints::set(state, &row.key)).collect();
        Page { items, next_page_token, index: state.index }
    };
    let mut state =
        ctx.read(Freshness { consistency: query.consistency, min_index: query.min_index, max_staleness: query.max_staleness }).await?;
    if let Some(mut wait) = watch::wanted(query.index, query.wait, &ctx.parts.headers)? {
        let newer = |state: &State| query.index.is_some_and(|index| page(state).items.iter().any(|set| set.generation > index));
        // A set says itself when it changed; events know nothing of shares of the traffic.
        if !newer(&state) {
            wait.index = wait.index.map(|_| state.index);
            let render = |state: &State| to_json(&page(state).items);
            state = watch::changed(&ctx, state, wait, |_| false, render).await?;
        }
    }
    ctx.json(state.index, &page(&state))
}

/// Say that a router has taken on all endpoints up to a generation. At least once a minute, so that it is waited for.
#[utoipa::path(post, path = "/v1/endpoints/acks", tag = "endpoints", operation_id = "ack_endpoints", params(ChangeQuery),
    request_body = EndpointAck, responses((status = 200, body = ActionAnswer)))]
pub(crate) async fn ack_endpoints(mut ctx: Ctx) -> Result<Response, ApiError> {
    let body = ctx.take_body();
    let bytes = json::body_bytes(&ctx.parts.headers, body, false).await?;
    let EndpointAck { router, generation, traffic } = json::parse(&bytes)?;
    if router.is_empty() || router.len() > ROUTER_NAME_MAX || router.contains(char::is_control) {
        let message = format!("a router's name has 1 to {ROUTER_NAME_MAX} bytes and no control characters");
        let error = FieldError { pointer: "/router".into(), message: message.clone() };
        return Err(ApiError::invalid(code::INVALID_SPEC, message, vec![error]));
    }
    if traffic.len() > COPIES_COUNTED_MAX || traffic.iter().any(|copy| copy.latency.len() > LATENCY_BUCKETS) {
        let message = format!("at most {COPIES_COUNTED_MAX} copies are counted at once, with {LATENCY_BUCKETS} numbers each");
        let error = FieldError { pointer: "/traffic".into(), message: message.clone() };
        return Err(ApiError::invalid(code::INVALID_SPEC, message, vec![error]));
    }
    let counts: Vec<_> = traffic
        .into_iter()
        .map(|CopyTraffic { alloc, requests, errors, latency }| (alloc, Sample { requests, errors: errors.min(requests), latency }))
        .collect();
    let command = match counts.is_empty() {
        true => Command::AckEndpoints { router, generation },
        false => Command::CountTraffic { router, generation, counts },
    };
    act(ctx, &bytes, command).await
}
