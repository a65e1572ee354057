//! Looking at copies.

use std::ops::Bound;
use std::sync::Arc;

use axum::response::Response;
use optimus_common::api::v1::{Allocation, Explanation, Page};
use optimus_common::protocol::RELEASE_SLOT;
use optimus_common::{AllocId, Name, NodeId, Span, WorkloadKey};
use optimus_core::state::{Alloc, State};
use optimus_core::view;
use serde::Deserialize;
use utoipa::IntoParams;

use super::{ReadQuery, workloads};
use crate::api::context::{Consistency, Ctx, Freshness};
use crate::api::paging::PageRequest;
use crate::api::problem::ApiError;

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct CopiesQuery {
    /// Ended copies too.
    #[serde(default)]
    pub all: bool,
    /// Items of a page: default 50, at most 1000.
    #[param(minimum = 1)]
    pub page_size: Option<u32>,
    /// `next_page_token` of the page before.
    pub page_token: Option<String>,
    pub consistency: Option<Consistency>,
    /// Answer from no older a state than this index (`Optimus-Index` of an earlier answer): wait for it, up to 5 s.
    pub min_index: Option<u64>,
    /// With `consistency=stale`: refuse (503) if this server has not heard the leader for longer.
    pub max_staleness: Option<Span>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct AllocationsQuery {
    /// Only this project.
    pub project: Option<Name>,
    /// Only environments of this name.
    pub environment: Option<Name>,
    /// Only workloads of this name.
    pub workload: Option<Name>,
    /// Only copies on this node (id or name).
    pub node: Option<String>,
    /// Ended copies too.
    #[serde(default)]
    pub all: bool,
    /// Items of a page: default 50, at most 1000.
    #[param(minimum = 1)]
    pub page_size: Option<u32>,
    /// `next_page_token` of the page before.
    pub page_token: Option<String>,
    pub consistency: Option<Consistency>,
    /// Answer from no older a state than this index (`Optimus-Index` of an earlier answer): wait for it, up to 5 s.
    pub min_index: Option<u64>,
    /// With `consistency=stale`: refuse (503) if this server has not heard the leader for longer.
    pub max_staleness: Option<Span>,
}

/// Copies of one workload, by slot and age.
pub(crate) fn of_workload(state: &State, key: &WorkloadKey) -> Vec<Arc<Alloc>> {
    let mut allocs: Vec<Arc<Alloc>> = state.allocs_of(key).cloned().collect();
    allocs.sort_by_key(|alloc| (alloc.index, alloc.id));
    allocs
}

/// The copies of a workload.
#[utoipa::path(get, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}/allocations", tag = "allocations",
    operation_id = "list_workload_allocations", params(CopiesQuery), responses((status = 200, body = Page<Allocation>)))]
pub(crate) async fn list_workload_allocations(ctx: Ctx) -> Result<Response, ApiError> {
    let query: CopiesQuery = ctx.query()?;
    let key = ctx.workload_key()?;
    let scope = format!("allocations {key} {}", query.all);
    let request = PageRequest::new(query.page_size, query.page_token.as_deref(), scope)?;
    let after = request.after.as_deref().map(parse_place).transpose()?;
    let state =
        ctx.read(Freshness { consistency: query.consistency, min_index: query.min_index, max_staleness: query.max_staleness }).await?;
    workloads::row(&state, &key)?;
    let rows = of_workload(&state, &key).into_iter();
    let rows = rows.filter(|alloc| (query.all || !alloc.has_ended()) && after.is_none_or(|after| (alloc.index, alloc.id) > after));
    let (rows, next_page_token) = request.cut(rows, |alloc| format!("{}/{}", alloc.index, alloc.id));
    let items: Vec<Allocation> = rows.iter().map(|alloc| view::allocation(&state, alloc)).collect();
    ctx.json(state.index, &Page { items, next_page_token, index: state.index })
}

fn parse_place(text: &str) -> Result<(u32, AllocId), ApiError> {
    let parsed = text.split_once('/').and_then(|(index, id)| Some((index.parse().ok()?, id.parse().ok()?)));
    parsed.ok_or_else(|| ApiError::bad_request("query: page_token is not one of ours"))
}

/// The copies of all workloads, oldest first.
#[utoipa::path(get, path = "/v1/allocations", tag = "allocations", operation_id = "list_allocations", params(AllocationsQuery),
    responses((status = 200, body = Page<Allocation>)))]
pub(crate) async fn list_allocations(ctx: Ctx) -> Result<Response, ApiError> {
    let query: AllocationsQuery = ctx.query()?;
    let AllocationsQuery { project, environment, workload, node, all, page_size, page_token, consistency, min_index, max_staleness } =
        query;
    let scope = format!("allocations {project:?} {environment:?} {workload:?} {node:?} {all}");
    let request = PageRequest::new(page_size, page_token.as_deref(), scope)?;
    let after: Option<AllocId> = request.after()?;
    let state = ctx.read(Freshness { consistency, min_index, max_staleness }).await?;
    let node: Option<NodeId> = node.map(|node| super::nodes::find(&state, &node).map(|node| node.id)).transpose()?;
    let from = after.map_or(Bound::Unbounded, Bound::Excluded);
    let rows = state.allocs.range((from, Bound::Unbounded)).map(|(_, alloc)| alloc).filter(|alloc| {
        project.as_ref().is_none_or(|name| *name == alloc.key.project)
            && environment.as_ref().is_none_or(|name| *name == alloc.key.environment)
            && workload.as_ref().is_none_or(|name| *name == alloc.key.workload)
            && node.is_none_or(|node| node == alloc.node)
            && (all || !alloc.has_ended())
    });
    let (rows, next_page_token) = request.cut(rows, |alloc: &&Arc<Alloc>| alloc.id.to_string());
    let items: Vec<Allocation> = rows.into_iter().map(|alloc| view::allocation(&state, alloc)).collect();
    ctx.json(state.index, &Page { items, next_page_token, index: state.index })
}

/// A copy by id, or by name (`web-0`): of several in one slot, the one that should run, newest first.
pub(crate) fn find(state: &State, key: &WorkloadKey, wanted: &str) -> Result<Arc<Alloc>, ApiError> {
    workloads::row(state, key)?;
    if let Ok(id) = wanted.parse::<AllocId>()
        && let Some(alloc) = state.allocs.get(&id).filter(|alloc| alloc.key == *key)
    {
        return Ok(alloc.clone());
    }
    let index: Option<u32> = wanted
        .strip_prefix(key.workload.as_str())
        .and_then(|rest| rest.strip_prefix('-'))
        .and_then(|n| if n == "release" { Some(RELEASE_SLOT) } else { n.parse().ok() });
    let in_slot = state.allocs_of(key).filter(|alloc| Some(alloc.index) == index);
    let best = in_slot.max_by_key(|alloc| (alloc.run, !alloc.has_ended(), alloc.release, alloc.id));
    best.cloned().ok_or_else(|| {
        ApiError::not_found(format!("workload {key} has no copy `{wanted}`"))
            .hint(format!("its copies are named {}-0, {0}-1, ...", key.workload))
    })
}

/// One copy, by id or name.
#[utoipa::path(get, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}/allocations/{allocation}", tag = "allocations",
    operation_id = "get_allocation", params(ReadQuery), responses((status = 200, body = Allocation)))]
pub(crate) async fn get_allocation(ctx: Ctx) -> Result<Response, ApiError> {
    let query: ReadQuery = ctx.query()?;
    let key = ctx.workload_key()?;
    let state =
        ctx.read(Freshness { consistency: query.consistency, min_index: query.min_index, max_staleness: query.max_staleness }).await?;
    let alloc = find(&state, &key, ctx.param("allocation")?)?;
    ctx.object(state.index, &view::allocation(&state, &alloc))
}

/// Why a copy is as it is.
#[utoipa::path(get, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}/allocations/{allocation}:explain",
    tag = "allocations", operation_id = "explain_allocation", params(ReadQuery), responses((status = 200, body = Explanation)))]
pub(crate) async fn explain_allocation(ctx: Ctx) -> Result<Response, ApiError> {
    let query: ReadQuery = ctx.query()?;
    let key = ctx.workload_key()?;
    let state =
        ctx.read(Freshness { consistency: query.consistency, min_index: query.min_index, max_staleness: query.max_staleness }).await?;
    let alloc = find(&state, &key, ctx.param("allocation")?)?;
    ctx.object(state.index, &view::explain_allocation(&state, &alloc, ctx.store().env.clock.now()))
}
