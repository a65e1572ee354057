//! What can be asked of a workload's deployment: promote, pause, resume, abort, retry, roll back.

use axum::response::Response;
use optimus_common::DeploymentId;
use optimus_common::api::v1::{ActionAnswer, FieldError, SteerRequest};
use optimus_common::reason::code;
use optimus_core::state::{Command, Steering};

use super::actions::act;
use crate::api::context::Ctx;
use crate::api::idempotency::ChangeQuery;
use crate::api::json;
use crate::api::problem::ApiError;

/// Longest reason a person may give.
pub const WHY_MAX: usize = 500;

/// Let what proved itself take over: canaries, or the second set.
#[utoipa::path(post, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}:promote", tag = "deployments",
    operation_id = "promote", params(ChangeQuery), request_body = SteerRequest, responses((status = 200, body = ActionAnswer)))]
pub(crate) async fn promote(ctx: Ctx) -> Result<Response, ApiError> {
    steer(ctx, |_| Steering::Promote).await
}

/// Move nothing more for now; what dies is replaced. Deadlines stand still.
#[utoipa::path(post, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}:pause", tag = "deployments",
    operation_id = "pause", params(ChangeQuery), request_body = SteerRequest, responses((status = 200, body = ActionAnswer)))]
pub(crate) async fn pause(ctx: Ctx) -> Result<Response, ApiError> {
    steer(ctx, |_| Steering::Pause).await
}

/// Go on with a paused deployment.
#[utoipa::path(post, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}:resume", tag = "deployments",
    operation_id = "resume", params(ChangeQuery), request_body = SteerRequest, responses((status = 200, body = ActionAnswer)))]
pub(crate) async fn resume(ctx: Ctx) -> Result<Response, ApiError> {
    steer(ctx, |_| Steering::Resume).await
}

/// Call the deployment off: the release before stays, or comes back.
#[utoipa::path(post, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}:abort", tag = "deployments",
    operation_id = "abort", params(ChangeQuery), request_body = SteerRequest, responses((status = 200, body = ActionAnswer)))]
pub(crate) async fn abort(ctx: Ctx) -> Result<Response, ApiError> {
    steer(ctx, |_| Steering::Abort).await
}

/// Try the release once more whose deployment failed.
#[utoipa::path(post, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}:retry", tag = "deployments",
    operation_id = "retry", params(ChangeQuery), request_body = SteerRequest, responses((status = 200, body = ActionAnswer)))]
pub(crate) async fn retry(ctx: Ctx) -> Result<Response, ApiError> {
    steer(ctx, |_| Steering::Retry).await
}

/// Go back to the release that ran before, or to another that is still kept.
#[utoipa::path(post, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}:rollback", tag = "deployments",
    operation_id = "rollback", params(ChangeQuery), request_body = SteerRequest, responses((status = 200, body = ActionAnswer)))]
pub(crate) async fn rollback(ctx: Ctx) -> Result<Response, ApiError> {
    steer(ctx, |to| Steering::RollBack { to: to.take() }).await
}

async fn steer(mut ctx: Ctx, how: impl FnOnce(&mut Option<u64>) -> Steering) -> Result<Response, ApiError> {
    let key = ctx.workload_key()?;
    let body = ctx.take_body();
    let bytes = json::body_bytes(&ctx.parts.headers, body, true).await?;
    let SteerRequest { reason: why, mut to } = if bytes.is_empty() { SteerRequest::default() } else { json::parse(&bytes)? };
    let refuse = |pointer: &str, message: String| {
        let error = FieldError { pointer: pointer.into(), message: message.clone() };
        ApiError::invalid(code::INVALID_SPEC, message, vec![error])
    };
    if why.as_ref().is_some_and(|why| why.len() > WHY_MAX || why.contains(char::is_control)) {
        return Err(refuse("/reason", format!("a reason is one line of at most {WHY_MAX} bytes")));
    }
    let steering = how(&mut to);
    if to.is_some() {
        return Err(refuse("/to", "only a rollback goes to a release".into()));
    }
    let deployment = DeploymentId(ctx.store().env.new_id());
    act(ctx, &bytes, Command::Steer { key, act: steering, why, deployment }).await
}
