//! What can be done to a workload that is there: scale, restart, stop, remove.

use axum::response::Response;
use optimus_common::api::v1::{ActionAnswer, FieldError, ScaleRequest};
use optimus_common::reason::code;
use optimus_common::spec::{self, ProjectSpec, WorkloadSpec};
use optimus_common::{DeploymentId, WorkloadKey};
use optimus_core::state::{Applied, COPIES_MAX, Command, NewLimits, State};
use optimus_core::view;

use crate::api::context::Ctx;
use crate::api::idempotency::{self, ChangeQuery, Identity, mark_replayed};
use crate::api::json;
use crate::api::problem::ApiError;

/// Set how many copies of a workload run, or the limits of its copies, which take them on as they run.
#[utoipa::path(post, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}:scale", tag = "workloads",
    operation_id = "scale_workload", params(ChangeQuery), request_body = ScaleRequest, responses((status = 200, body = ActionAnswer)))]
pub(crate) async fn scale_workload(mut ctx: Ctx) -> Result<Response, ApiError> {
    let key = ctx.workload_key()?;
    let body = ctx.take_body();
    let bytes = json::body_bytes(&ctx.parts.headers, body, false).await?;
    let ScaleRequest { copies, cpu, memory_request, memory_limit } = json::parse(&bytes)?;
    if let Some(copies) = copies.filter(|copies| *copies > COPIES_MAX) {
        let error = FieldError { pointer: "/copies".into(), message: format!("at most {COPIES_MAX}") };
        return Err(ApiError::invalid(code::INVALID_SPEC, format!("{copies} copies are more than {COPIES_MAX}"), vec![error]));
    }
    let deployment = DeploymentId(ctx.store().env.new_id());
    let limits = NewLimits { cpu, memory_request, memory_limit };
    if limits != NewLimits::default() {
        let (follows, command) = (Some(key.clone()), Command::Resize { key, limits, copies, deployment });
        return commit(ctx, &bytes, follows, |state| resized(state, command)).await;
    }
    let Some(copies) = copies else {
        let error = FieldError { pointer: "/copies".into(), message: "say copies, cpu or memory".into() };
        return Err(ApiError::invalid(code::INVALID_SPEC, "nothing to change was given", vec![error]));
    };
    act(ctx, &bytes, Command::Scale { key, copies, deployment }).await
}

/// The command, if what it makes of the spec keeps its rules.
fn resized(state: &State, command: Command) -> Result<Command, ApiError> {
    let Command::Resize { key, limits, .. } = &command else { return Ok(command) };
    let Some(release) = state.workload(key).and_then(|w| state.release(key, w.release)) else { return Ok(command) };
    let spec = WorkloadSpec { resources: limits.of(release.spec.resources), ..(*release.spec).clone() };
    let (project, environment) = (key.project.clone(), key.environment.clone());
    let errors = spec::check(&ProjectSpec { project, environment, workloads: [(key.workload.clone(), spec)].into() });
    match errors.first() {
        None => Ok(command),
        Some(first) => Err(ApiError::invalid(code::INVALID_SPEC, first.message.clone(), errors)),
    }
}

/// Restart all copies of a workload, a few at a time.
#[utoipa::path(post, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}:restart", tag = "workloads",
    operation_id = "restart_workload", params(ChangeQuery), responses((status = 200, body = ActionAnswer)))]
pub(crate) async fn restart_workload(mut ctx: Ctx) -> Result<Response, ApiError> {
    let key = ctx.workload_key()?;
    let bytes = no_body(&mut ctx).await?;
    let deployment = DeploymentId(ctx.store().env.new_id());
    act(ctx, &bytes, Command::Restart { key, deployment }).await
}

/// Stop all copies of a workload; deploy or restart start them again.
#[utoipa::path(post, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}:stop", tag = "workloads",
    operation_id = "stop_workload", params(ChangeQuery), responses((status = 200, body = ActionAnswer)))]
pub(crate) async fn stop_workload(mut ctx: Ctx) -> Result<Response, ApiError> {
    let key = ctx.workload_key()?;
    let bytes = no_body(&mut ctx).await?;
    act(ctx, &bytes, Command::StopWorkload { key }).await
}

/// Stop a workload and remove it once its last copy is gone.
#[utoipa::path(delete, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}", tag = "workloads",
    operation_id = "remove_workload", params(ChangeQuery), responses((status = 200, body = ActionAnswer)))]
pub(crate) async fn remove_workload(mut ctx: Ctx) -> Result<Response, ApiError> {
    let key = ctx.workload_key()?;
    let bytes = no_body(&mut ctx).await?;
    act(ctx, &bytes, Command::RemoveWorkload { key }).await
}

/// These take no parameters in a body; `{}` or nothing is fine.
pub(crate) async fn no_body(ctx: &mut Ctx) -> Result<Vec<u8>, ApiError> {
    let body = ctx.take_body();
    let bytes = json::body_bytes(&ctx.parts.headers, body, true).await?;
    if !bytes.is_empty() {
        let given: serde_json::Map<String, serde_json::Value> = json::parse(&bytes)?;
        if let Some(field) = given.keys().next() {
            return Err(ApiError::bad_request(format!("this takes no parameters, found `{field}`")));
        }
    }
    Ok(bytes)
}

pub(crate) async fn act(ctx: Ctx, body: &[u8], command: Command) -> Result<Response, ApiError> {
    let follows = match &command {
        Command::Restart { key, .. } | Command::Scale { key, .. } | Command::Steer { key, .. } => Some(key.clone()),
        _ => None,
    };
    commit(ctx, body, follows, |_| Ok(command)).await
}

/// The same for a command that depends on the state.
pub(crate) async fn act_on(ctx: Ctx, body: &[u8], command: impl FnOnce(&State) -> Result<Command, ApiError>) -> Result<Response, ApiError> {
    commit(ctx, body, None, command).await
}

/// `follows`: a workload whose deployment the command starts, or gives another number to reach.
async fn commit(
    ctx: Ctx,
    body: &[u8],
    follows: Option<WorkloadKey>,
    command: impl FnOnce(&State) -> Result<Command, ApiError>,
) -> Result<Response, ApiError> {
    let query: ChangeQuery = ctx.query()?;
    let identity = Identity::of(&ctx, body)?;
    let committed = idempotency::commit(&ctx, identity, &query, command).await?;
    let state = &committed.state;
    let (index, changed) = match &committed.applied {
        Applied::Done { index } | Applied::Deployed { index, .. } => (*index, true),
        Applied::Unchanged { index } => (*index, false),
        Applied::Refused(refusal) => return Err(refusal.clone().into()),
    };
    let deployment = follows.filter(|_| changed).and_then(|key| state.workload(&key)?.deployment);
    let deployment = deployment.and_then(|id| state.deployments.get(&id)).map(|row| view::deployment(state, row));
    let mut response = ctx.json(index, &ActionAnswer { index, deployment, changed })?;
    mark_replayed(&mut response, committed.replayed);
    Ok(response)
}
