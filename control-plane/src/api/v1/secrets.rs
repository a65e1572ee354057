//! Secrets: set, listed without their values, removed.

use axum::response::Response;
use optimus_common::api::v1::{self, Page, RemoveAnswer, SecretAnswer, SecretRequest};
use optimus_common::secret::SecretValue;
use optimus_common::{DeploymentId, Name};
use optimus_core::state::{Applied, Command, Refusal, SecretKey, State, VaultKey};
use optimus_core::view;
use zeroize::Zeroizing;

use super::ReadQuery;
use super::actions;
use super::placing::ScopedQuery;
use crate::api::context::{Ctx, Freshness};
use crate::api::idempotency::{self, ChangeQuery, Identity, mark_replayed};
use crate::api::json;
use crate::api::paging::PageRequest;
use crate::api::problem::ApiError;

fn key(ctx: &Ctx) -> Result<SecretKey, ApiError> {
    let vault = VaultKey { project: ctx.name("project")?, environment: ctx.name("env")? };
    let name = ctx.param("secret")?.to_owned();
    match optimus_common::spec::bad_secret_name(&name) {
        None => Ok(SecretKey { vault, name }),
        Some(why) => Err(ApiError::bad_request(why)),
    }
}

fn shown(state: &State, key: &SecretKey) -> Result<v1::Secret, ApiError> {
    let row = state.secrets.get(key).ok_or_else(|| ApiError::from(Refusal::NoSuchSecret(key.clone())))?;
    Ok(view::secret(state, key, row))
}

/// The secrets by project, environment and name: their versions and who reads them, never a value.
#[utoipa::path(get, path = "/v1/secrets", tag = "secrets", operation_id = "list_secrets", params(ScopedQuery),
    responses((status = 200, body = Page<v1::Secret>)))]
pub(crate) async fn list_secrets(ctx: Ctx) -> Result<Response, ApiError> {
    let ScopedQuery { project, environment, page_size, page_token, consistency, min_index, max_staleness } = ctx.query()?;
    let request = PageRequest::new(page_size, page_token.as_deref(), format!("secrets {project:?} {environment:?}"))?;
    let bad = || ApiError::bad_request("query: page_token is not one of ours");
    let parse = |text: &str| {
        let mut parts = text.splitn(3, '/');
        let mut name = || parts.next().and_then(|part| Name::new(part).ok()).ok_or_else(bad);
        let vault = VaultKey { project: name()?, environment: name()? };
        Ok::<_, ApiError>(SecretKey { vault, name: parts.next().ok_or_else(bad)?.to_owned() })
    };
    let after = request.after.as_deref().map(parse).transpose()?;
    let state = ctx.read(Freshness { consistency, min_index, max_staleness }).await?;
    let from = after.map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
    let wanted = |key: &SecretKey| {
        project.as_ref().is_none_or(|name| *name == key.vault.project)
            && environment.as_ref().is_none_or(|name| *name == key.vault.environment)
    };
    let rows = state.secrets.range((from, std::ops::Bound::Unbounded)).filter(|(key, _)| wanted(key));
    let (rows, next_page_token) = request.cut(rows, |(key, _)| format!("{}/{}", key.vault, key.name));
    let items: Vec<v1::Secret> = rows.into_iter().map(|(key, row)| view::secret(&state, key, row)).collect();
    ctx.json(state.index, &Page { items, next_page_token, index: state.index })
}

/// One secret, without its value.
#[utoipa::path(get, path = "/v1/projects/{project}/envs/{env}/secrets/{secret}", tag = "secrets", operation_id = "get_secret",
    params(ReadQuery), responses((status = 200, body = v1::Secret)))]
pub(crate) async fn get_secret(ctx: Ctx) -> Result<Response, ApiError> {
    let ReadQuery { consistency, min_index, max_staleness } = ctx.query()?;
    let key = key(&ctx)?;
    let state = ctx.read(Freshness { consistency, min_index, max_staleness }).await?;
    ctx.object(state.index, &shown(&state, &key)?)
}

/// What is wrong with the body, without a word of what is in it.
fn parsed(bytes: &[u8]) -> Result<SecretRequest, ApiError> {
    serde_json::from_slice(bytes).map_err(|_| {
        let value = serde_json::from_slice::<serde_json::Value>(bytes).ok().and_then(|body| body.get("value")?.as_str().map(str::to_owned));
        match value.map(SecretValue::new) {
            Some(Err(bad)) => ApiError::bad_request(bad.to_string()),
            _ => ApiError::bad_request("the body is {\"value\": TEXT} and, if wanted, \"restart\": true"),
        }
    })
}

/// Set a secret. The same value again makes no new version. What runs keeps the version it was deployed with until it is
/// deployed or restarted.
#[utoipa::path(put, path = "/v1/projects/{project}/envs/{env}/secrets/{secret}", tag = "secrets", operation_id = "set_secret",
    params(ChangeQuery), request_body = SecretRequest, responses((status = 200, body = SecretAnswer)))]
pub(crate) async fn set_secret(mut ctx: Ctx) -> Result<Response, ApiError> {
    let key = key(&ctx)?;
    let body = ctx.take_body();
    let bytes = Zeroizing::new(json::body_bytes(&ctx.parts.headers, body, false).await?);
    let SecretRequest { value, restart } = parsed(&bytes)?;
    let query: ChangeQuery = ctx.query()?;
    let secrets = ctx.shared.deps.secrets.clone();
    // What is kept to know the request again must say nothing of the value.
    let identity = Identity::of(&ctx, &secrets.blind(&bytes))?;
    let before = ctx.store().read().await?;
    let newest = before.secrets.get(&key).and_then(|row| row.versions.last());
    let same = newest.is_some_and(|version| secrets.open(&before, &key, version).is_ok_and(|held| held == value));
    let (state, index, replayed) = if same {
        (before.clone(), before.index, false)
    } else {
        let sealed = |state: &State| {
            let (sealed, vault) = secrets.seal(state, &key, &value).map_err(|e| ApiError::conflict(e.to_string()))?;
            Ok(Command::SetSecret { key: key.clone(), sealed, vault })
        };
        let committed = idempotency::commit(&ctx, identity, &query, sealed).await?;
        let index = idempotency::index_of(&committed.applied).unwrap_or(committed.state.index);
        (committed.state, index, committed.replayed)
    };
    let secret = shown(&state, &key)?;
    let mut restarted = Vec::new();
    let behind = secret.readers.iter().filter(|reader| restart && !query.dry_run && reader.version.is_some_and(|v| v < secret.version));
    for reader in behind {
        let (project, environment) = (key.vault.project.clone(), key.vault.environment.clone());
        let workload = optimus_common::WorkloadKey { project, environment, workload: reader.workload.clone() };
        let command = Command::Restart { key: workload, deployment: DeploymentId(ctx.store().env.new_id()) };
        match ctx.store().propose(command).await? {
            // It was stopped or removed meanwhile, or is a job, whose next run has the new version anyway.
            Applied::Refused(_) => {}
            _ => restarted.push(reader.workload.clone()),
        }
    }
    let mut response = ctx.json(index, &SecretAnswer { index, changed: !same, secret, restarted })?;
    mark_replayed(&mut response, replayed);
    Ok(response)
}

/// Remove a secret that no workload uses, with all its versions.
#[utoipa::path(delete, path = "/v1/projects/{project}/envs/{env}/secrets/{secret}", tag = "secrets", operation_id = "remove_secret",
    params(ChangeQuery), responses((status = 200, body = RemoveAnswer)))]
pub(crate) async fn remove_secret(mut ctx: Ctx) -> Result<Response, ApiError> {
    let key = key(&ctx)?;
    let bytes = actions::no_body(&mut ctx).await?;
    let query: ChangeQuery = ctx.query()?;
    let identity = Identity::of(&ctx, &bytes)?;
    let committed = idempotency::commit(&ctx, identity, &query, |_| Ok(Command::RemoveSecret { key })).await?;
    let index = idempotency::index_of(&committed.applied).unwrap_or(committed.state.index);
    let changed = matches!(committed.applied, Applied::Done { .. }) && !query.dry_run;
    let mut response = ctx.json(index, &RemoveAnswer { index, changed })?;
    mark_replayed(&mut response, committed.replayed);
    Ok(response)
}
