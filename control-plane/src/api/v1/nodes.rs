//! Looking at nodes.

use std::ops::Bound;
use std::sync::Arc;

use axum::response::Response;
use optimus_common::api::v1::{ActionAnswer, Node, Page};
use optimus_common::{NodeId, Span};
use optimus_core::state::{self, Command, State};
use optimus_core::view;
use serde::Deserialize;
use utoipa::IntoParams;

use super::{ReadQuery, actions};
use crate::api::context::{Consistency, Ctx, Freshness};
use crate::api::idempotency::ChangeQuery;
use crate::api::paging::PageRequest;
use crate::api::problem::ApiError;

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct NodesQuery {
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

/// The nodes, in the order they joined.
#[utoipa::path(get, path = "/v1/nodes", tag = "nodes", operation_id = "list_nodes", params(NodesQuery),
    responses((status = 200, body = Page<Node>)))]
pub(crate) async fn list_nodes(ctx: Ctx) -> Result<Response, ApiError> {
    let query: NodesQuery = ctx.query()?;
    let request = PageRequest::new(query.page_size, query.page_token.as_deref(), "nodes".into())?;
    let after: Option<NodeId> = request.after()?;
    let state =
        ctx.read(Freshness { consistency: query.consistency, min_index: query.min_index, max_staleness: query.max_staleness }).await?;
    let from = after.map_or(Bound::Unbounded, Bound::Excluded);
    let rows = state.nodes.range((from, Bound::Unbounded)).map(|(_, row)| row);
    let (rows, next_page_token) = request.cut(rows, |row: &&Arc<state::Node>| row.id.to_string());
    let now = ctx.store().env.clock.now();
    let items: Vec<Node> = rows.into_iter().map(|row| view::node(&state, row, now)).collect();
    ctx.json(state.index, &Page { items, next_page_token, index: state.index })
}

/// A node by id or name. Of several of one name, the one that is up, then the newest.
pub(crate) fn find(state: &State, wanted: &str) -> Result<Arc<state::Node>, ApiError> {
    let by_id = wanted.parse::<NodeId>().ok().and_then(|id| state.nodes.get(&id));
    let by_name = || state.nodes.values().filter(|node| node.facts.name == wanted).max_by_key(|node| (node.up, node.id));
    by_id.or_else(by_name).cloned().ok_or_else(|| {
        let shown: String = wanted.chars().take(80).collect();
        ApiError::not_found(format!("there is no node `{shown}`")).hint("`optimus nodes` lists the nodes")
    })
}

/// One node, by id or name.
#[utoipa::path(get, path = "/v1/nodes/{node}", tag = "nodes", operation_id = "get_node", params(ReadQuery),
    responses((status = 200, body = Node)))]
pub(crate) async fn get_node(ctx: Ctx) -> Result<Response, ApiError> {
    let query: ReadQuery = ctx.query()?;
    let state =
        ctx.read(Freshness { consistency: query.consistency, min_index: query.min_index, max_staleness: query.max_staleness }).await?;
    let node = find(&state, ctx.param("node")?)?;
    ctx.object(state.index, &view::node(&state, &node, ctx.store().env.clock.now()))
}

/// Remove a node for good: its certificate is revoked, its sessions end, and its copies start elsewhere.
#[utoipa::path(delete, path = "/v1/nodes/{node}", tag = "nodes", operation_id = "remove_node", params(ChangeQuery),
    responses((status = 200, body = ActionAnswer)))]
pub(crate) async fn remove_node(mut ctx: Ctx) -> Result<Response, ApiError> {
    let bytes = actions::no_body(&mut ctx).await?;
    let node = find(&ctx.read(Freshness::default()).await?, ctx.param("node")?)?.id;
    actions::act(ctx, &bytes, Command::RemoveNode { node }).await
}
