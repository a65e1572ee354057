//! Deploying a project file.

use std::sync::Arc;

use axum::response::Response;
use optimus_common::api::v1::{DeployAnswer, DeployRequest, FieldError};
use optimus_common::reason::{Code, code};
use optimus_common::spec::{self, ProjectSpec};
use optimus_common::{DeploymentId, WorkloadKey};
use optimus_core::state::command::DeployItem;
use optimus_core::state::{Applied, Command};
use optimus_core::view;

use super::plan::planned;
use crate::api::context::Ctx;
use crate::api::idempotency::{self, ChangeQuery, Identity, mark_replayed};
use crate::api::json;
use crate::api::problem::ApiError;

/// Longest text of the project file kept with a release.
pub const SOURCE_MAX: usize = 256 * 1024;
/// Most workloads of one deploy.
pub const WORKLOADS_PER_DEPLOY_MAX: usize = 500;

/// Set the workloads of a project file; a deployment starts for each that changed.
///
/// All or none. With the same Idempotency-Key and body a retry has one effect and gets the same deployments.
#[utoipa::path(post, path = "/v1/deploy", tag = "workloads", operation_id = "deploy", params(ChangeQuery),
    request_body = DeployRequest, responses((status = 200, body = DeployAnswer)))]
pub(crate) async fn deploy(mut ctx: Ctx) -> Result<Response, ApiError> {
    let query: ChangeQuery = ctx.query()?;
    let body = ctx.take_body();
    let bytes = json::body_bytes(&ctx.parts.headers, body, false).await?;
    let request: DeployRequest = json::parse(&bytes)?;
    check(&request)?;
    let identity = Identity::of(&ctx, &bytes)?;
    let DeployRequest { spec, source, if_revision, if_plan } = request;
    let source: Option<Arc<str>> = source.map(Into::into);
    let env = ctx.store().env.clone();
    let now = env.clock.now();
    let committed = idempotency::commit(&ctx, identity, &query, |state| {
        // Bound to a plan: it must come to the same now, and nothing may come between this look and the log.
        let mut revision = if_revision;
        if let Some(digest) = &if_plan {
            if planned(state, &spec, source.as_deref(), now)?.digest != *digest {
                return Err(ApiError::conflict("the deploy would no longer do what was planned").hint("plan again: `optimus plan`"));
            }
            revision = Some(revision.map_or(state.index, |asked| asked.min(state.index)));
        }
        let ProjectSpec { project, environment, workloads } = spec;
        let items = workloads.into_iter().map(|(workload, spec)| DeployItem {
            key: WorkloadKey { project: project.clone(), environment: environment.clone(), workload },
            spec: Arc::new(spec),
            source: source.clone(),
            deployment: DeploymentId(env.new_id()),
        });
        let items = items.collect();
        Ok(match revision {
            Some(revision) => Command::DeployIf { items, revision },
            None => Command::Deploy { items },
        })
    })
    .await?;
    let Applied::Deployed { index, deployments, unchanged } = committed.applied else {
        return Err(ApiError::internal("a deploy was answered with something else"));
    };
    // Deployments may have moved on, or gone, since an earlier request was answered: each is shown as it is now.
    let state = &committed.state;
    let deployments = deployments.iter().filter_map(|id| state.deployments.get(id)).map(|row| view::deployment(state, row)).collect();
    let mut response = ctx.json(index, &DeployAnswer { deployments, unchanged, index })?;
    mark_replayed(&mut response, committed.replayed);
    Ok(response)
}

/// Everything wrong with a request, found before anything is proposed.
pub(crate) fn check(request: &DeployRequest) -> Result<(), ApiError> {
    if request.source.as_ref().is_some_and(|source| source.len() > SOURCE_MAX) {
        let error = FieldError { pointer: "/source".into(), message: format!("longer than {SOURCE_MAX} bytes") };
        return Err(ApiError::invalid(code::INVALID_SPEC, "the project file is too long", vec![error]));
    }
    let workloads = request.spec.workloads.len();
    if workloads == 0 || workloads > WORKLOADS_PER_DEPLOY_MAX {
        let message = format!("{workloads} workloads; at least 1 and at most {WORKLOADS_PER_DEPLOY_MAX} can be deployed at once");
        let error = FieldError { pointer: "/workloads".into(), message };
        return Err(ApiError::invalid(code::INVALID_SPEC, "the number of workloads is out of range", vec![error]));
    }
    refuse(code::INVALID_SPEC, "breaks a rule", spec::check(&request.spec))?;
    refuse(code::NOT_AVAILABLE_YET, "not available yet", spec::not_available(&request.spec))
}

fn refuse(code: Code, what: &str, errors: Vec<FieldError>) -> Result<(), ApiError> {
    let detail = match errors.as_slice() {
        [] => return Ok(()),
        [one] => format!("`{}`: {}", one.pointer, one.message),
        more => format!("{} fields: {what}", more.len()),
    };
    Err(ApiError::invalid(code, detail, errors))
}
