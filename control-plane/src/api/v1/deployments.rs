//! Looking at deployments.

use std::ops::Bound;
use std::sync::Arc;

use axum::response::Response;
use optimus_common::api::v1::{Deployment, Page};
use optimus_common::{DeploymentId, Name, Span};
use optimus_core::state::{self, State};
use optimus_core::view;
use serde::Deserialize;
use utoipa::IntoParams;

use super::workloads::WatchQuery;
use crate::api::context::{Consistency, Ctx, Freshness, to_json};
use crate::api::paging::PageRequest;
use crate::api::problem::ApiError;
use crate::api::watch;

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct DeploymentsQuery {
    /// Only this project.
    pub project: Option<Name>,
    /// Only environments of this name.
    pub environment: Option<Name>,
    /// Only workloads of this name.
    pub workload: Option<Name>,
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

/// The deployments, newest first.
#[utoipa::path(get, path = "/v1/deployments", tag = "deployments", operation_id = "list_deployments", params(DeploymentsQuery),
    responses((status = 200, body = Page<Deployment>)))]
pub(crate) async fn list_deployments(ctx: Ctx) -> Result<Response, ApiError> {
    let query: DeploymentsQuery = ctx.query()?;
    let DeploymentsQuery { project, environment, workload, page_size, page_token, consistency, min_index, max_staleness } = query;
    let scope = format!("deployments {project:?} {environment:?} {workload:?}");
    let request = PageRequest::new(page_size, page_token.as_deref(), scope)?;
    let after: Option<DeploymentId> = request.after()?;
    let state = ctx.read(Freshness { consistency, min_index, max_staleness }).await?;
    let until = after.map_or(Bound::Unbounded, Bound::Excluded);
    let rows = state.deployments.range((Bound::Unbounded, until)).rev().map(|(_, row)| row).filter(|row| {
        project.as_ref().is_none_or(|name| *name == row.key.project)
            && environment.as_ref().is_none_or(|name| *name == row.key.environment)
            && workload.as_ref().is_none_or(|name| *name == row.key.workload)
    });
    let (rows, next_page_token) = request.cut(rows, |row: &&Arc<state::Deployment>| row.id.to_string());
    let items: Vec<Deployment> = rows.into_iter().map(|row| view::deployment(&state, row)).collect();
    ctx.json(state.index, &Page { items, next_page_token, index: state.index })
}

/// One deployment. With `index` or If-None-Match, and `wait`: as soon as it or its copies changed.
#[utoipa::path(get, path = "/v1/deployments/{id}", tag = "deployments", operation_id = "get_deployment", params(WatchQuery),
    responses((status = 200, body = Deployment)))]
pub(crate) async fn get_deployment(ctx: Ctx) -> Result<Response, ApiError> {
    let query: WatchQuery = ctx.query()?;
    let wanted = ctx.param("id")?;
    let id: DeploymentId =
        wanted.parse().map_err(|_| ApiError::bad_request("a deployment's id is a UUID, such as those of GET /v1/deployments"))?;
    let row = |state: &State| {
        let row = state.deployments.get(&id).cloned();
        row.ok_or_else(|| ApiError::not_found(format!("there is no deployment {id}; ended ones are kept for a while only")))
    };
    let mut state =
        ctx.read(Freshness { consistency: query.consistency, min_index: query.min_index, max_staleness: query.max_staleness }).await?;
    if let Some(wait) = watch::wanted(query.index, query.wait, &ctx.parts.headers)? {
        let key = row(&state)?.key.clone();
        // What the copies are doing is not in the deployment, but is what people watch one for.
        let render = |state: &State| {
            let copies: Vec<_> = super::allocations::of_workload(state, &key).iter().map(|alloc| view::allocation(state, alloc)).collect();
            to_json(&(view::deployment(state, &*row(state)?), copies))
        };
        state = match ctx.if_none_match() {
            // The client's tag is of the deployment alone.
            Some(_) => {
                let render = |state: &State| to_json(&view::deployment(state, &*row(state)?));
                watch::changed(&ctx, state, wait, |subject| watch::is_about(subject, &key), render).await?
            }
            None => watch::changed(&ctx, state, wait, |subject| watch::is_about(subject, &key), render).await?,
        };
    }
    ctx.object(state.index, &view::deployment(&state, &*row(&state)?))
}
