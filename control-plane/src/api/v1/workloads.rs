//! Looking at workloads.

use std::ops::Bound;
use std::sync::Arc;

use axum::response::Response;
use optimus_common::api::v1::{Explanation, Page, Workload};
use optimus_common::{Name, Span, WorkloadKey};
use optimus_core::state::{self, State};
use optimus_core::view;
use serde::Deserialize;
use utoipa::IntoParams;

use super::ReadQuery;
use crate::api::context::{Consistency, Ctx, Freshness, to_json};
use crate::api::paging::PageRequest;
use crate::api::problem::ApiError;
use crate::api::watch;

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct WorkloadsQuery {
    /// Only this project.
    pub project: Option<Name>,
    /// Only environments of this name.
    pub environment: Option<Name>,
    /// Items of a page: default 50, at most 1000.
    #[param(minimum = 1)]
    pub page_size: Option<u32>,
    /// `next_page_token` of the page before.
    pub page_token: Option<String>,
    /// Answer when something changed after this state index.
    pub index: Option<u64>,
    /// How long to wait for it: default 30 s, at most 60 s.
    pub wait: Option<Span>,
    pub consistency: Option<Consistency>,
    /// Answer from no older a state than this index (`Optimus-Index` of an earlier answer): wait for it, up to 5 s.
    pub min_index: Option<u64>,
    /// With `consistency=stale`: refuse (503) if this server has not heard the leader for longer.
    pub max_staleness: Option<Span>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct WatchQuery {
    /// Answer when it changed after this state index.
    pub index: Option<u64>,
    /// How long to wait for it: default 30 s, at most 60 s.
    pub wait: Option<Span>,
    pub consistency: Option<Consistency>,
    /// Answer from no older a state than this index (`Optimus-Index` of an earlier answer): wait for it, up to 5 s.
    pub min_index: Option<u64>,
    /// With `consistency=stale`: refuse (503) if this server has not heard the leader for longer.
    pub max_staleness: Option<Span>,
}

/// The workloads, by project, environment and name.
#[utoipa::path(get, path = "/v1/workloads", tag = "workloads", operation_id = "list_workloads", params(WorkloadsQuery),
    responses((status = 200, body = Page<Workload>)))]
pub(crate) async fn list_workloads(ctx: Ctx) -> Result<Response, ApiError> {
    let query: WorkloadsQuery = ctx.query()?;
    let shown = |name: &Option<Name>| name.as_ref().map_or("*", Name::as_str).to_owned();
    let scope = format!("workloads {} {}", shown(&query.project), shown(&query.environment));
    let request = PageRequest::new(query.page_size, query.page_token.as_deref(), scope)?;
    let after = request.after.as_deref().map(parse_key).transpose()?;
    let now = ctx.store().env.clock.now();
    let page = |state: &State| {
        let from = match &after {
            Some(key) => Bound::Excluded(key.clone()),
            None => Bound::Unbounded,
        };
        let rows = state.workloads.range((from, Bound::Unbounded)).map(|(_, row)| row).filter(|row| query.matches(&row.key));
        let (rows, next_page_token) = request.cut(rows, |row: &&Arc<state::Workload>| row.key.to_string());
        Page { items: rows.into_iter().map(|row| view::workload(state, row, now)).collect::<Vec<_>>(), next_page_token, index: state.index }
    };
    let mut state =
        ctx.read(Freshness { consistency: query.consistency, min_index: query.min_index, max_staleness: query.max_staleness }).await?;
    if let Some(wait) = watch::wanted(query.index, query.wait, &ctx.parts.headers)? {
        // The index is in the page and always grows: compare what is in it besides.
        let render = |state: &State| to_json(&page(state).items);
        state = watch::changed(&ctx, state, wait, |subject| query.matches_subject(subject), render).await?;
    }
    ctx.json(state.index, &page(&state))
}

impl WorkloadsQuery {
    pub(crate) fn matches(&self, key: &WorkloadKey) -> bool {
        self.project.as_ref().is_none_or(|project| *project == key.project)
            && self.environment.as_ref().is_none_or(|environment| *environment == key.environment)
    }

    /// `shop/prod/web-0` is about something the filter lets through.
    fn matches_subject(&self, subject: &str) -> bool {
        let mut parts = subject.split('/');
        let (Some(project), Some(environment), Some(_)) = (parts.next(), parts.next(), parts.next()) else { return false };
        self.project.as_ref().is_none_or(|p| p.as_str() == project) && self.environment.as_ref().is_none_or(|e| e.as_str() == environment)
    }
}

pub(crate) fn parse_key(text: &str) -> Result<WorkloadKey, ApiError> {
    let mut names = text.split('/').map(|name| Name::new(name).ok());
    match (names.next().flatten(), names.next().flatten(), names.next().flatten(), names.next()) {
        (Some(project), Some(environment), Some(workload), None) => Ok(WorkloadKey { project, environment, workload }),
        _ => Err(ApiError::bad_request("query: page_token is not one of ours")),
    }
}

/// The row of a workload, or 404.
pub(crate) fn row<'a>(state: &'a State, key: &WorkloadKey) -> Result<&'a Arc<state::Workload>, ApiError> {
    state.workloads.get(key).ok_or_else(|| {
        ApiError::not_found(format!("there is no workload {key}"))
            .hint("`optimus ps` lists the workloads; names are project/environment/workload")
    })
}

/// One workload. With `index` or If-None-Match, and `wait`: as soon as it or its copies changed.
#[utoipa::path(get, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}", tag = "workloads",
    operation_id = "get_workload", params(WatchQuery), responses((status = 200, body = Workload)))]
pub(crate) async fn get_workload(ctx: Ctx) -> Result<Response, ApiError> {
    let query: WatchQuery = ctx.query()?;
    let key = ctx.workload_key()?;
    let now = ctx.store().env.clock.now();
    let show = |state: &State| Ok::<_, ApiError>(view::workload(state, row(state, &key)?, now));
    let mut state =
        ctx.read(Freshness { consistency: query.consistency, min_index: query.min_index, max_staleness: query.max_staleness }).await?;
    if let Some(wait) = watch::wanted(query.index, query.wait, &ctx.parts.headers)? {
        let render = |state: &State| to_json(&show(state)?);
        state = watch::changed(&ctx, state, wait, |subject| watch::is_about(subject, &key), render).await?;
    }
    ctx.object(state.index, &show(&state)?)
}

/// Why a workload is as it is.
#[utoipa::path(get, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}:explain", tag = "workloads",
    operation_id = "explain_workload", params(ReadQuery), responses((status = 200, body = Explanation)))]
pub(crate) async fn explain_workload(ctx: Ctx) -> Result<Response, ApiError> {
    let query: ReadQuery = ctx.query()?;
    let key = ctx.workload_key()?;
    let state =
        ctx.read(Freshness { consistency: query.consistency, min_index: query.min_index, max_staleness: query.max_staleness }).await?;
    let workload = row(&state, &key)?;
    ctx.object(state.index, &view::explain_workload(&state, workload, ctx.store().env.clock.now()))
}
