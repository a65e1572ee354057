//! Quotas of projects and environments, pools of nodes, volumes.

use std::ops::Bound;
use std::sync::Arc;

use axum::response::Response;
use optimus_common::api::v1::{Page, Pool, PoolSettings, Quota, QuotaLimits, RemoveAnswer, Volume, VolumeRequest};
use optimus_common::{Name, Span};
use optimus_core::state::{self, Applied, Command, QuotaKey, VolumeKey};
use optimus_core::view;
use serde::Deserialize;
use utoipa::IntoParams;

use super::{ReadQuery, actions, nodes};
use crate::api::context::{Consistency, Ctx, Freshness};
use crate::api::idempotency::{self, ChangeQuery, Identity, mark_replayed};
use crate::api::json;
use crate::api::paging::PageRequest;
use crate::api::problem::ApiError;

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ScopedQuery {
    /// Only this project.
    pub project: Option<Name>,
    /// Only environments of this name.
    pub environment: Option<Name>,
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

fn fresh(query: &ReadQuery) -> Freshness {
    Freshness { consistency: query.consistency, min_index: query.min_index, max_staleness: query.max_staleness }
}

/// Commits a removal.
async fn remove(mut ctx: Ctx, command: Command) -> Result<Response, ApiError> {
    let bytes = actions::no_body(&mut ctx).await?;
    let query: ChangeQuery = ctx.query()?;
    let identity = Identity::of(&ctx, &bytes)?;
    let committed = idempotency::commit(&ctx, identity, &query, |_| Ok(command)).await?;
    let index = idempotency::index_of(&committed.applied).unwrap_or(committed.state.index);
    let changed = matches!(committed.applied, Applied::Done { .. }) && !query.dry_run;
    let mut response = ctx.json(index, &RemoveAnswer { index, changed })?;
    mark_replayed(&mut response, committed.replayed);
    Ok(response)
}

/// Commits a change and answers with what it made.
async fn set<T: serde::Serialize>(
    ctx: Ctx,
    bytes: &[u8],
    command: Command,
    show: impl FnOnce(&state::State) -> Option<T>,
) -> Result<Response, ApiError> {
    let query: ChangeQuery = ctx.query()?;
    let identity = Identity::of(&ctx, bytes)?;
    let committed = idempotency::commit(&ctx, identity, &query, |_| Ok(command)).await?;
    // Somebody removed it meanwhile.
    let shown = show(&committed.state).ok_or_else(|| ApiError::conflict("it was removed by another request meanwhile"))?;
    let index = idempotency::index_of(&committed.applied).unwrap_or(committed.state.index);
    let mut response = ctx.json(index, &shown)?;
    mark_replayed(&mut response, committed.replayed);
    Ok(response)
}

async fn body<T: serde::de::DeserializeOwned + serde::Serialize>(ctx: &mut Ctx) -> Result<(Vec<u8>, T), ApiError> {
    let body = ctx.take_body();
    let bytes = json::body_bytes(&ctx.parts.headers, body, false).await?;
    let value = json::parse(&bytes)?;
    Ok((bytes, value))
}

// ---- quotas ----

fn quota_key(ctx: &Ctx, environment: bool) -> Result<QuotaKey, ApiError> {
    let environment = if environment { Some(ctx.name("env")?) } else { None };
    Ok(QuotaKey { project: ctx.name("project")?, environment })
}

/// `shop` or `shop/prod`, as in page tokens.
fn parse_scope(text: &str) -> Result<QuotaKey, ApiError> {
    let bad = |_| ApiError::bad_request("query: page_token is not one of ours");
    let (project, environment) = match text.split_once('/') {
        Some((project, environment)) => (project, Some(Name::new(environment).map_err(bad)?)),
        None => (text, None),
    };
    Ok(QuotaKey { project: Name::new(project).map_err(bad)?, environment })
}

/// The quotas, by project and environment, each with what is used of it.
#[utoipa::path(get, path = "/v1/quotas", tag = "placement", operation_id = "list_quotas", params(ScopedQuery),
    responses((status = 200, body = Page<Quota>)))]
pub(crate) async fn list_quotas(ctx: Ctx) -> Result<Response, ApiError> {
    let ScopedQuery { project, environment, page_size, page_token, consistency, min_index, max_staleness } = ctx.query()?;
    let request = PageRequest::new(page_size, page_token.as_deref(), format!("quotas {project:?} {environment:?}"))?;
    let after = request.after.as_deref().map(parse_scope).transpose()?;
    let state = ctx.read(Freshness { consistency, min_index, max_staleness }).await?;
    let from = after.map_or(Bound::Unbounded, Bound::Excluded);
    let wanted = |key: &QuotaKey| {
        project.as_ref().is_none_or(|name| *name == key.project) && (environment.is_none() || environment == key.environment)
    };
    let rows = state.quotas.range((from, Bound::Unbounded)).filter(|(key, _)| wanted(key));
    let (rows, next_page_token) = request.cut(rows, |(key, _)| key.to_string());
    let items: Vec<Quota> = rows.into_iter().map(|(key, row)| view::quota(&state, key, row)).collect();
    ctx.json(state.index, &Page { items, next_page_token, index: state.index })
}

async fn show_quota(ctx: Ctx, environment: bool) -> Result<Response, ApiError> {
    let query: ReadQuery = ctx.query()?;
    let key = quota_key(&ctx, environment)?;
    let state = ctx.read(fresh(&query)).await?;
    let row = state.quotas.get(&key).ok_or_else(|| ApiError::from(state::Refusal::NoSuchQuota(key.clone())))?;
    ctx.object(state.index, &view::quota(&state, &key, row))
}

async fn put_quota(mut ctx: Ctx, environment: bool) -> Result<Response, ApiError> {
    let key = quota_key(&ctx, environment)?;
    let (bytes, QuotaLimits { cpu, memory, disk, copies, devices }) = body(&mut ctx).await?;
    let quota = state::Quota { cpu, memory, disk, copies, devices };
    if quota == state::Quota::default() {
        return Err(ApiError::bad_request("the quota limits nothing").hint("give one of cpu, memory, disk, copies, devices, or delete it"));
    }
    let command = Command::SetQuota { key: key.clone(), quota };
    set(ctx, &bytes, command, |state| state.quotas.get(&key).map(|row| view::quota(state, &key, row))).await
}

async fn delete_quota(ctx: Ctx, environment: bool) -> Result<Response, ApiError> {
    let key = quota_key(&ctx, environment)?;
    remove(ctx, Command::RemoveQuota { key }).await
}

/// The quota of a project, with what is used of it.
#[utoipa::path(get, path = "/v1/projects/{project}/quota", tag = "placement", operation_id = "get_project_quota", params(ReadQuery),
    responses((status = 200, body = Quota)))]
pub(crate) async fn get_project_quota(ctx: Ctx) -> Result<Response, ApiError> {
    show_quota(ctx, false).await
}

/// Set the most that a project may reserve together, over all its environments. Copies that run stay.
#[utoipa::path(put, path = "/v1/projects/{project}/quota", tag = "placement", operation_id = "set_project_quota", params(ChangeQuery),
    request_body = QuotaLimits, responses((status = 200, body = Quota)))]
pub(crate) async fn set_project_quota(ctx: Ctx) -> Result<Response, ApiError> {
    put_quota(ctx, false).await
}

/// Remove the quota of a project.
#[utoipa::path(delete, path = "/v1/projects/{project}/quota", tag = "placement", operation_id = "remove_project_quota",
    params(ChangeQuery), responses((status = 200, body = RemoveAnswer)))]
pub(crate) async fn remove_project_quota(ctx: Ctx) -> Result<Response, ApiError> {
    delete_quota(ctx, false).await
}

/// The quota of one environment of a project, with what is used of it.
#[utoipa::path(get, path = "/v1/projects/{project}/envs/{env}/quota", tag = "placement", operation_id = "get_environment_quota",
    params(ReadQuery), responses((status = 200, body = Quota)))]
pub(crate) async fn get_environment_quota(ctx: Ctx) -> Result<Response, ApiError> {
    show_quota(ctx, true).await
}

/// Set the most that one environment of a project may reserve together. Copies that run stay.
#[utoipa::path(put, path = "/v1/projects/{project}/envs/{env}/quota", tag = "placement", operation_id = "set_environment_quota",
    params(ChangeQuery), request_body = QuotaLimits, responses((status = 200, body = Quota)))]
pub(crate) async fn set_environment_quota(ctx: Ctx) -> Result<Response, ApiError> {
    put_quota(ctx, true).await
}

/// Remove the quota of one environment of a project.
#[utoipa::path(delete, path = "/v1/projects/{project}/envs/{env}/quota", tag = "placement", operation_id = "remove_environment_quota",
    params(ChangeQuery), responses((status = 200, body = RemoveAnswer)))]
pub(crate) async fn remove_environment_quota(ctx: Ctx) -> Result<Response, ApiError> {
    delete_quota(ctx, true).await
}

// ---- pools ----

/// The pools of nodes, by name.
#[utoipa::path(get, path = "/v1/pools", tag = "placement", operation_id = "list_pools", params(nodes::NodesQuery),
    responses((status = 200, body = Page<Pool>)))]
pub(crate) async fn list_pools(ctx: Ctx) -> Result<Response, ApiError> {
    let query: nodes::NodesQuery = ctx.query()?;
    let request = PageRequest::new(query.page_size, query.page_token.as_deref(), "pools".into())?;
    let after = request.after.clone();
    let state =
        ctx.read(Freshness { consistency: query.consistency, min_index: query.min_index, max_staleness: query.max_staleness }).await?;
    let names = view::pool_names(&state).into_iter().filter(|name| after.as_ref().is_none_or(|after| name > after));
    let (names, next_page_token) = request.cut(names, String::clone);
    let items: Vec<Pool> = names.iter().filter_map(|name| view::pool(&state, name)).collect();
    ctx.json(state.index, &Page { items, next_page_token, index: state.index })
}

/// One pool: its layout, its nodes and what is reserved of them.
#[utoipa::path(get, path = "/v1/pools/{pool}", tag = "placement", operation_id = "get_pool", params(ReadQuery),
    responses((status = 200, body = Pool)))]
pub(crate) async fn get_pool(ctx: Ctx) -> Result<Response, ApiError> {
    let query: ReadQuery = ctx.query()?;
    let name = ctx.name("pool")?;
    let state = ctx.read(fresh(&query)).await?;
    let pool = view::pool(&state, name.as_str()).ok_or_else(|| ApiError::from(state::Refusal::NoSuchPool(name)))?;
    ctx.object(state.index, &pool)
}

/// Set how copies are laid out over the nodes of a pool. Copies that run stay where they are.
#[utoipa::path(put, path = "/v1/pools/{pool}", tag = "placement", operation_id = "set_pool", params(ChangeQuery),
    request_body = PoolSettings, responses((status = 200, body = Pool)))]
pub(crate) async fn set_pool(mut ctx: Ctx) -> Result<Response, ApiError> {
    let name = ctx.name("pool")?;
    let (bytes, settings) = body(&mut ctx).await?;
    let command = Command::SetPool { pool: view::pool_row(name.clone(), settings) };
    set(ctx, &bytes, command, |state| view::pool(state, name.as_str())).await
}

/// Forget what was set for a pool; its nodes stay in it.
#[utoipa::path(delete, path = "/v1/pools/{pool}", tag = "placement", operation_id = "remove_pool", params(ChangeQuery),
    responses((status = 200, body = RemoveAnswer)))]
pub(crate) async fn remove_pool(ctx: Ctx) -> Result<Response, ApiError> {
    let name = ctx.name("pool")?;
    remove(ctx, Command::RemovePool { name }).await
}

// ---- volumes ----

fn volume_key(ctx: &Ctx) -> Result<VolumeKey, ApiError> {
    Ok(VolumeKey { project: ctx.name("project")?, environment: ctx.name("env")?, name: ctx.name("volume")? })
}

fn parse_volume(text: &str) -> Result<VolumeKey, ApiError> {
    let names: Vec<Name> = text.split('/').filter_map(|part| Name::new(part).ok()).collect();
    match <[Name; 3]>::try_from(names) {
        Ok([project, environment, name]) => Ok(VolumeKey { project, environment, name }),
        Err(_) => Err(ApiError::bad_request("query: page_token is not one of ours")),
    }
}

/// The volumes, by project, environment and name, with who holds them. Nobody holds or asks for an orphan.
#[utoipa::path(get, path = "/v1/volumes", tag = "placement", operation_id = "list_volumes", params(ScopedQuery),
    responses((status = 200, body = Page<Volume>)))]
pub(crate) async fn list_volumes(ctx: Ctx) -> Result<Response, ApiError> {
    let ScopedQuery { project, environment, page_size, page_token, consistency, min_index, max_staleness } = ctx.query()?;
    let request = PageRequest::new(page_size, page_token.as_deref(), format!("volumes {project:?} {environment:?}"))?;
    let after = request.after.as_deref().map(parse_volume).transpose()?;
    let state = ctx.read(Freshness { consistency, min_index, max_staleness }).await?;
    let from = after.map_or(Bound::Unbounded, Bound::Excluded);
    let wanted = |key: &VolumeKey| {
        project.as_ref().is_none_or(|name| *name == key.project) && environment.as_ref().is_none_or(|name| *name == key.environment)
    };
    let rows = state.volumes.range((from, Bound::Unbounded)).filter(|(key, _)| wanted(key)).map(|(_, row)| row);
    let (rows, next_page_token) = request.cut(rows, |row: &&Arc<state::Volume>| row.key.to_string());
    let items: Vec<Volume> = rows.into_iter().map(|row| view::volume(&state, row)).collect();
    ctx.json(state.index, &Page { items, next_page_token, index: state.index })
}

/// One volume, with who holds it.
#[utoipa::path(get, path = "/v1/projects/{project}/envs/{env}/volumes/{volume}", tag = "placement", operation_id = "get_volume",
    params(ReadQuery), responses((status = 200, body = Volume)))]
pub(crate) async fn get_volume(ctx: Ctx) -> Result<Response, ApiError> {
    let query: ReadQuery = ctx.query()?;
    let key = volume_key(&ctx)?;
    let state = ctx.read(fresh(&query)).await?;
    let row = state.volumes.get(&key).ok_or_else(|| ApiError::from(state::Refusal::NoSuchVolume(key.clone())))?;
    ctx.object(state.index, &view::volume(&state, row))
}

/// Say on which node a volume lives: copies that ask for it run there. One that is used does not move.
#[utoipa::path(put, path = "/v1/projects/{project}/envs/{env}/volumes/{volume}", tag = "placement", operation_id = "set_volume",
    params(ChangeQuery), request_body = VolumeRequest, responses((status = 200, body = Volume)))]
pub(crate) async fn set_volume(mut ctx: Ctx) -> Result<Response, ApiError> {
    let key = volume_key(&ctx)?;
    let (bytes, VolumeRequest { node }) = body(&mut ctx).await?;
    let node = nodes::find(&ctx.read(Freshness::default()).await?, &node)?.id;
    let command = Command::SetVolume { volume: state::Volume { key: key.clone(), node } };
    set(ctx, &bytes, command, |state| state.volumes.get(&key).map(|row| view::volume(state, row))).await
}

/// Forget a volume. Refused while a copy holds it or a workload asks for it. Its files stay on its node.
#[utoipa::path(delete, path = "/v1/projects/{project}/envs/{env}/volumes/{volume}", tag = "placement", operation_id = "remove_volume",
    params(ChangeQuery), responses((status = 200, body = RemoveAnswer)))]
pub(crate) async fn remove_volume(ctx: Ctx) -> Result<Response, ApiError> {
    let key = volume_key(&ctx)?;
    remove(ctx, Command::RemoveVolume { key }).await
}
