//! The server itself: health, version, figures, documentation, status.

use axum::body::Body;
use axum::response::Response;
use http::HeaderValue;
use http::header::CONTENT_TYPE;
use optimus_common::api::v1::{ClusterStatus, Version};
use optimus_core::view;

use super::ReadQuery;
use crate::api::context::{Ctx, Freshness};
use crate::api::problem::{ApiError, RETRY_DEFAULT};

fn text(kind: &'static str, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// Whether the process answers.
#[utoipa::path(get, path = "/healthz", tag = "server", operation_id = "healthz",
    responses((status = 200, description = "The process answers.", body = String, content_type = "text/plain")))]
pub(crate) async fn healthz(_ctx: Ctx) -> Result<Response, ApiError> {
    Ok(text("text/plain; charset=utf-8", "ok\n"))
}

/// Whether this server can take writes: it knows a leader.
#[utoipa::path(get, path = "/readyz", tag = "server", operation_id = "readyz",
    responses((status = 200, description = "The control plane has a leader.", body = String, content_type = "text/plain")))]
pub(crate) async fn readyz(ctx: Ctx) -> Result<Response, ApiError> {
    match ctx.store().status().leader {
        Some(_) => Ok(text("text/plain; charset=utf-8", "ready\n")),
        None => Err(crate::store::ProposeError::NoLeader { retry_after: RETRY_DEFAULT.into() }.into()),
    }
}

/// Version of the server and of the API.
#[utoipa::path(get, path = "/v1/version", tag = "server", operation_id = "version", responses((status = 200, body = Version)))]
pub(crate) async fn version(ctx: Ctx) -> Result<Response, ApiError> {
    let state = ctx.store().state();
    let version = Version {
        version: env!("CARGO_PKG_VERSION").into(),
        api: vec!["v1".into()],
        cluster: state.cluster.as_ref().map(|cluster| cluster.id),
    };
    ctx.json(state.index, &version)
}

/// Figures for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "server", operation_id = "metrics",
    responses((status = 200, description = "Prometheus text format.", body = String, content_type = "text/plain")))]
pub(crate) async fn metrics(ctx: Ctx) -> Result<Response, ApiError> {
    let body = ctx.shared.deps.metrics.render(ctx.store()).map_err(ApiError::internal)?;
    Ok(text(prometheus::TEXT_FORMAT, body))
}

/// This document.
#[utoipa::path(get, path = "/v1/openapi.json", tag = "server", operation_id = "openapi",
    responses((status = 200, description = "OpenAPI 3.1.", body = serde_json::Value)))]
pub(crate) async fn openapi(ctx: Ctx) -> Result<Response, ApiError> {
    Ok(text("application/json", ctx.shared.openapi.clone()))
}

/// The fleet in one answer.
#[utoipa::path(get, path = "/v1/status", tag = "server", operation_id = "get_status", params(ReadQuery),
    responses((status = 200, body = ClusterStatus)))]
pub(crate) async fn status(ctx: Ctx) -> Result<Response, ApiError> {
    let query: ReadQuery = ctx.query()?;
    let state =
        ctx.read(Freshness { consistency: query.consistency, min_index: query.min_index, max_staleness: query.max_staleness }).await?;
    let consensus = ctx.store().status();
    let Some(status) = view::status(&state, consensus.leader, consensus.term, consensus.voters) else {
        return Err(ApiError::not_found("the cluster has not been created yet").retry(RETRY_DEFAULT));
    };
    ctx.object(state.index, &status)
}
