//! The servers of the control plane.

use axum::response::Response;
use optimus_common::api::v1::{ActionAnswer, ClusterView, FieldError, RotateCaRequest, StateDigest, TransferAnswer, TransferRequest};
use optimus_common::reason::code;
use optimus_core::state::{Command, OVERLAP, OVERLAP_DEFAULT, State, explain_rotation};

use super::actions;
use crate::api::context::Ctx;
use crate::api::idempotency::ChangeQuery;
use crate::api::json;
use crate::api::problem::{ApiError, RETRY_DEFAULT};
use crate::cluster_admin::{self, AdminError};

impl From<AdminError> for ApiError {
    fn from(error: AdminError) -> Self {
        match error {
            AdminError::NoLeader(_) => crate::store::ProposeError::NoLeader { retry_after: RETRY_DEFAULT.into() }.into(),
            AdminError::Refused(why) => ApiError::conflict(why),
        }
    }
}

/// The servers, their parts in the cluster, and what a person should know of it. Also answered without a leader.
#[utoipa::path(get, path = "/v1/cluster", tag = "cluster", operation_id = "get_cluster", responses((status = 200, body = ClusterView)))]
pub(crate) async fn get_cluster(ctx: Ctx) -> Result<Response, ApiError> {
    let report = ctx.shared.deps.cluster.report().await?;
    let state = ctx.store().state();
    let view = cluster_admin::view(&state, &report);
    let view = view.ok_or_else(|| match report.leader {
        // A server that has just begun to join knows of no cluster; others do.
        0 => AdminError::NoLeader("this server has not heard of the cluster yet".into()).into(),
        _ => ApiError::not_found("the cluster has not been created yet").retry(RETRY_DEFAULT),
    })?;
    ctx.json(state.index, &view)
}

/// The digest of this server's own state, for comparing servers. It costs a pass over the whole state.
#[utoipa::path(get, path = "/v1/cluster/digest", tag = "cluster", operation_id = "get_state_digest",
    responses((status = 200, body = StateDigest)))]
pub(crate) async fn state_digest(ctx: Ctx) -> Result<Response, ApiError> {
    let (server, state) = (ctx.store().status().server, ctx.store().state());
    let index = state.index;
    // Off the runtime: large states take a while.
    let digest = tokio::task::spawn_blocking(move || state.digest()).await;
    let digest = digest.map_err(|_| ApiError::internal("the digest was not finished"))?;
    let digest = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    ctx.json(index, &StateDigest { server, index, digest })
}

/// Hand leadership to another server. Writes pause for some milliseconds.
#[utoipa::path(post, path = "/v1/cluster:transfer-leader", tag = "cluster", operation_id = "transfer_leader",
    request_body = TransferRequest, responses((status = 200, body = TransferAnswer)))]
pub(crate) async fn transfer_leader(mut ctx: Ctx) -> Result<Response, ApiError> {
    let body = ctx.take_body();
    let request: TransferRequest = match json::body_bytes(&ctx.parts.headers, body, true).await?.as_slice() {
        [] => TransferRequest::default(),
        bytes => json::parse(bytes)?,
    };
    let leader = ctx.shared.deps.cluster.transfer(request.to).await?;
    ctx.json(ctx.store().state().index, &TransferAnswer { leader })
}

/// Replace the cluster's CA, with an overlap in which both are trusted; `GET /v1/cluster` tells how far it is.
#[utoipa::path(post, path = "/v1/cluster:rotate-ca", tag = "cluster", operation_id = "rotate_ca", params(ChangeQuery),
    request_body = RotateCaRequest, responses((status = 200, body = ActionAnswer)))]
pub(crate) async fn rotate_ca(mut ctx: Ctx) -> Result<Response, ApiError> {
    let body = ctx.take_body();
    let bytes = json::body_bytes(&ctx.parts.headers, body, true).await?;
    let request: RotateCaRequest = if bytes.is_empty() { RotateCaRequest::default() } else { json::parse(&bytes)? };
    let RotateCaRequest { force, abort, overlap } = request;
    if u8::from(force) + u8::from(abort) + u8::from(overlap.is_some()) > 1 {
        return Err(ApiError::bad_request("`force`, `abort` and `overlap` exclude each other"));
    }
    if let Some(overlap) = overlap.filter(|span| *span < OVERLAP.0 || *span > OVERLAP.1) {
        let error = FieldError { pointer: "/overlap".into(), message: format!("{} to {}", OVERLAP.0, OVERLAP.1) };
        return Err(ApiError::invalid(code::BAD_REQUEST, format!("an overlap of {overlap} is not possible"), vec![error]));
    }
    let joins = ctx.shared.deps.joins.clone();
    // Decided on the newest state, and not again for a request that is repeated: a new CA is made only once.
    let command = move |state: &State| {
        let under_way = state.cluster.as_ref().and_then(|c| c.authorities.rotation.as_ref());
        match (under_way, explain_rotation(state)) {
            (Some(_), _) if force => Ok(Command::ForceRotation),
            (Some(rotation), _) if abort => Ok(Command::AbortRotation { number: rotation.number }),
            (_, Some(how_far)) => Err(ApiError::conflict(format!("one is under way already: {how_far}"))),
            _ if force || abort => Err(ApiError::conflict("no CA rotation is under way")),
            _ => joins.next_ca(overlap.unwrap_or(OVERLAP_DEFAULT)).map_err(|e| ApiError::conflict(e.to_string())),
        }
    };
    actions::act_on(ctx, &bytes, command).await
}

/// Replace the root key, which seals the key of the CA. Every server must be there to take it.
#[utoipa::path(post, path = "/v1/cluster:rotate-root-key", tag = "cluster", operation_id = "rotate_root_key", params(ChangeQuery),
    responses((status = 200, body = ActionAnswer)))]
pub(crate) async fn rotate_root_key(mut ctx: Ctx) -> Result<Response, ApiError> {
    let bytes = actions::no_body(&mut ctx).await?;
    let rewrap = ctx.shared.deps.cluster.next_root_key().await?;
    actions::act(ctx, &bytes, Command::Rewrap(rewrap)).await
}

/// Let a server leave: it loses its vote, then its place. A dead one is removed the same way.
#[utoipa::path(delete, path = "/v1/cluster/servers/{server}", tag = "cluster", operation_id = "remove_server",
    params(("server" = u64, Path, description = "Raft id."), ChangeQuery), responses((status = 200, body = ActionAnswer)))]
pub(crate) async fn remove_server(mut ctx: Ctx) -> Result<Response, ApiError> {
    let id: u64 = ctx.param("server")?.parse().map_err(|_| ApiError::bad_request("the server's id must be a number"))?;
    let bytes = actions::no_body(&mut ctx).await?;
    actions::act(ctx, &bytes, Command::RemoveServer { id }).await
}
