//! What operators do with nodes: labels, pools, cordons, drains, rebalancing.

use axum::response::Response;
use optimus_common::api::v1::{
    DrainPreview, DrainRequest, FieldError, LabelRequest, Node, PoolRequest, RebalanceAnswer, RebalanceRequest, RebalanceSettings,
};
use optimus_common::reason::code;
use optimus_common::{NodeId, Span};
use optimus_core::state::{Applied, Command, NODE_LABELS_MAX, NodeChange, State};
use optimus_core::{drain, view};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use utoipa::IntoParams;

use super::{ReadQuery, actions, nodes};
use crate::api::context::{Consistency, Ctx, Freshness};
use crate::api::idempotency::{self, ChangeQuery, Identity, mark_replayed};
use crate::api::json;
use crate::api::problem::ApiError;

/// Longest value of a label, as of those of workloads.
const LABEL_MAX: usize = 255;
const EVERY: (Span, Span) = (Span::secs(60), Span::secs(30 * 86_400));
const MOVES_MAX: u32 = 1000;

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct PreviewQuery {
    /// Daemons stay.
    #[serde(default)]
    pub keep_daemons: bool,
    pub consistency: Option<Consistency>,
    /// Answer from no older a state than this index (`Optimus-Index` of an earlier answer): wait for it, up to 5 s.
    pub min_index: Option<u64>,
    /// With `consistency=stale`: refuse (503) if this server has not heard the leader for longer.
    pub max_staleness: Option<Span>,
}

async fn body<T: DeserializeOwned + serde::Serialize>(ctx: &mut Ctx) -> Result<(Vec<u8>, T), ApiError> {
    let body = ctx.take_body();
    let bytes = json::body_bytes(&ctx.parts.headers, body, true).await?;
    let value = if bytes.is_empty() { json::parse(b"{}")? } else { json::parse(&bytes)? };
    Ok((bytes, value))
}

async fn change(ctx: Ctx, bytes: &[u8], change: NodeChange) -> Result<Response, ApiError> {
    let query: ChangeQuery = ctx.query()?;
    let node = found(&ctx, &ctx.read(Freshness::default()).await?)?;
    let identity = Identity::of(&ctx, bytes)?;
    let committed = idempotency::commit(&ctx, identity, &query, |_| Ok(Command::ChangeNode { node, change })).await?;
    let state = &committed.state;
    let row = state.nodes.get(&node).ok_or_else(|| ApiError::not_found(format!("there is no node {node}")))?;
    let index = idempotency::index_of(&committed.applied).unwrap_or(state.index);
    let mut response = ctx.json(index, &view::node(state, row, ctx.store().env.clock.now()))?;
    mark_replayed(&mut response, committed.replayed);
    Ok(response)
}

fn found(ctx: &Ctx, state: &State) -> Result<NodeId, ApiError> {
    Ok(nodes::find(state, ctx.param("node")?)?.id)
}

/// Set labels of a node, over those of its agent; null takes one away.
#[utoipa::path(post, path = "/v1/nodes/{node}:label", tag = "nodes", operation_id = "label_node", params(ChangeQuery),
    request_body = LabelRequest, responses((status = 200, body = Node)))]
pub(crate) async fn label_node(mut ctx: Ctx) -> Result<Response, ApiError> {
    let (bytes, LabelRequest { labels }) = body(&mut ctx).await?;
    let good_key = |k: &str| (1..=63).contains(&k.len()) && k.chars().all(|c| c.is_ascii_alphanumeric() || "_.-/".contains(c));
    let good = |v: &Option<String>| v.as_ref().is_none_or(|v| v.len() <= LABEL_MAX && !v.contains(char::is_control));
    if labels.len() > NODE_LABELS_MAX {
        return Err(ApiError::bad_request(format!("at most {NODE_LABELS_MAX} labels")));
    }
    if let Some((key, _)) = labels.iter().find(|(k, v)| !good_key(k) || !good(v)) {
        let key: String = key.chars().take(64).collect();
        let message =
            format!("{key:?}: a label is 1 to 63 of a-z A-Z 0-9 _ . - /, its value at most {LABEL_MAX} bytes without control characters");
        let error = FieldError { pointer: "/labels".into(), message: message.clone() };
        return Err(ApiError::invalid(code::BAD_REQUEST, message, vec![error]));
    }
    change(ctx, &bytes, NodeChange::Labels(labels)).await
}

/// Put a node into a pool.
#[utoipa::path(post, path = "/v1/nodes/{node}:pool", tag = "nodes", operation_id = "set_node_pool", params(ChangeQuery),
    request_body = PoolRequest, responses((status = 200, body = Node)))]
pub(crate) async fn set_node_pool(mut ctx: Ctx) -> Result<Response, ApiError> {
    let (bytes, PoolRequest { pool }) = body(&mut ctx).await?;
    change(ctx, &bytes, NodeChange::Pool(pool)).await
}

/// Give a node no new copies; those it has stay.
#[utoipa::path(post, path = "/v1/nodes/{node}:cordon", tag = "nodes", operation_id = "cordon_node", params(ChangeQuery),
    responses((status = 200, body = Node)))]
pub(crate) async fn cordon_node(mut ctx: Ctx) -> Result<Response, ApiError> {
    let bytes = actions::no_body(&mut ctx).await?;
    change(ctx, &bytes, NodeChange::Cordon).await
}

/// Let a node take copies again; also ends a drain.
#[utoipa::path(post, path = "/v1/nodes/{node}:uncordon", tag = "nodes", operation_id = "uncordon_node", params(ChangeQuery),
    responses((status = 200, body = Node)))]
pub(crate) async fn uncordon_node(mut ctx: Ctx) -> Result<Response, ApiError> {
    let bytes = actions::no_body(&mut ctx).await?;
    change(ctx, &bytes, NodeChange::Uncordon).await
}

/// Empty a node: its copies are replaced elsewhere, as many at a time as may be missing of their workload.
#[utoipa::path(post, path = "/v1/nodes/{node}:drain", tag = "nodes", operation_id = "drain_node", params(ChangeQuery),
    request_body = DrainRequest, responses((status = 200, body = Node)))]
pub(crate) async fn drain_node(mut ctx: Ctx) -> Result<Response, ApiError> {
    let (bytes, DrainRequest { deadline, force, keep_daemons }) = body(&mut ctx).await?;
    let now = ctx.store().env.clock.now();
    let deadline = if force { Some(now) } else { deadline.map(|after| now + after) };
    change(ctx, &bytes, NodeChange::Drain { deadline, keep_daemons }).await
}

/// Stop emptying a node: what still runs there stays, and it is cordoned only if it was before.
#[utoipa::path(post, path = "/v1/nodes/{node}:cancel-drain", tag = "nodes", operation_id = "cancel_drain", params(ChangeQuery),
    responses((status = 200, body = Node)))]
pub(crate) async fn cancel_drain(mut ctx: Ctx) -> Result<Response, ApiError> {
    let bytes = actions::no_body(&mut ctx).await?;
    change(ctx, &bytes, NodeChange::CancelDrain).await
}

/// Say what a drain would do, copy by copy: where each goes, and what would wait and why.
#[utoipa::path(get, path = "/v1/nodes/{node}:preview-drain", tag = "nodes", operation_id = "preview_drain", params(PreviewQuery),
    responses((status = 200, body = DrainPreview)))]
pub(crate) async fn preview_drain(ctx: Ctx) -> Result<Response, ApiError> {
    let PreviewQuery { keep_daemons, consistency, min_index, max_staleness } = ctx.query()?;
    let state = ctx.read(Freshness { consistency, min_index, max_staleness }).await?;
    let node = found(&ctx, &state)?;
    ctx.json(state.index, &view::drain_preview(&state, node, keep_daemons, ctx.store().env.clock.now()))
}

/// How much rebalancing may move, and what it would move now.
#[utoipa::path(get, path = "/v1/rebalance", tag = "nodes", operation_id = "get_rebalance", params(ReadQuery),
    responses((status = 200, body = RebalanceAnswer)))]
pub(crate) async fn get_rebalance(ctx: Ctx) -> Result<Response, ApiError> {
    let ReadQuery { consistency, min_index, max_staleness } = ctx.query()?;
    let state = ctx.read(Freshness { consistency, min_index, max_staleness }).await?;
    ctx.json(state.index, &proposed(&ctx, &state))
}

fn proposed(ctx: &Ctx, state: &State) -> RebalanceAnswer {
    let settings = view::rebalance_settings(state);
    let moves = drain::rebalance(state, ctx.store().env.clock.now(), settings.moves as usize);
    RebalanceAnswer { index: state.index, moves: view::rebalance_moves(state, &moves), changed: false, settings }
}

/// Set how much rebalancing may move in each interval, and whether it also runs by itself.
#[utoipa::path(put, path = "/v1/rebalance", tag = "nodes", operation_id = "set_rebalance", params(ChangeQuery),
    request_body = RebalanceSettings, responses((status = 200, body = RebalanceAnswer)))]
pub(crate) async fn set_rebalance(mut ctx: Ctx) -> Result<Response, ApiError> {
    let (bytes, RebalanceSettings { automatic, moves, every }) = body(&mut ctx).await?;
    if !(1..=MOVES_MAX).contains(&moves) || every < EVERY.0 || every > EVERY.1 {
        let message = format!("`moves` is from 1 to {MOVES_MAX}, `every` from {} to {}", EVERY.0, EVERY.1);
        return Err(ApiError::bad_request(message));
    }
    let query: ChangeQuery = ctx.query()?;
    let identity = Identity::of(&ctx, &bytes)?;
    let command = Command::SetRebalance { automatic, moves, every };
    let committed = idempotency::commit(&ctx, identity, &query, |_| Ok(command)).await?;
    let changed = matches!(committed.applied, Applied::Done { .. });
    let mut response = ctx.json(committed.state.index, &RebalanceAnswer { changed, ..proposed(&ctx, &committed.state) })?;
    mark_replayed(&mut response, committed.replayed);
    Ok(response)
}

/// Move copies to even out the nodes, within the budget; with `dry_run` only say which.
#[utoipa::path(post, path = "/v1/rebalance", tag = "nodes", operation_id = "rebalance", params(ChangeQuery),
    request_body = RebalanceRequest, responses((status = 200, body = RebalanceAnswer)))]
pub(crate) async fn rebalance(mut ctx: Ctx) -> Result<Response, ApiError> {
    let (bytes, RebalanceRequest { dry_run }) = body(&mut ctx).await?;
    let query: ChangeQuery = ctx.query()?;
    if dry_run || query.dry_run {
        let state = ctx.read(Freshness::default()).await?;
        return ctx.json(state.index, &proposed(&ctx, &state));
    }
    let identity = Identity::of(&ctx, &bytes)?;
    let now = ctx.store().env.clock.now();
    let mut planned = Vec::new();
    let committed = idempotency::commit(&ctx, identity, &query, |state| {
        planned = drain::rebalance(state, now, view::rebalance_settings(state).moves as usize);
        Ok(Command::Rebalance { moves: planned.iter().map(|m| m.alloc).collect() })
    })
    .await?;
    let state = &committed.state;
    // What the budget left out was not flagged.
    planned.retain(|m| state.allocs.get(&m.alloc).is_some_and(|a| a.migrate));
    let changed = matches!(committed.applied, Applied::Done { .. });
    let answer = RebalanceAnswer {
        index: state.index,
        moves: view::rebalance_moves(state, &planned),
        changed,
        settings: view::rebalance_settings(state),
    };
    let mut response = ctx.json(state.index, &answer)?;
    mark_replayed(&mut response, committed.replayed);
    Ok(response)
}
