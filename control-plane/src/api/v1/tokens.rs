//! Join tokens.

use axum::response::Response;
use http::StatusCode;
use optimus_common::Span;
use optimus_common::api::v1::{FieldError, JoinTokenAnswer, JoinTokenRequest};
use optimus_common::join_token::Role;
use optimus_common::reason::code;

use crate::api::context::Ctx;
use crate::api::json;
use crate::api::problem::ApiError;
use crate::join_tokens::JoinTokenError;

pub const TTL_DEFAULT: Span = Span::secs(3600);
pub const TTL_MIN: Span = Span::secs(1);
pub const TTL_MAX: Span = Span::secs(30 * 24 * 3600);
pub const USES_MAX: u32 = 10_000;

/// Make a join token. Its text is in this answer and nowhere else.
///
/// A repeated request makes another token: the text is never stored, so it cannot be given again.
#[utoipa::path(post, path = "/v1/join-tokens", tag = "nodes", operation_id = "create_join_token", request_body = JoinTokenRequest,
    responses((status = 201, body = JoinTokenAnswer)))]
pub(crate) async fn create_join_token(mut ctx: Ctx) -> Result<Response, ApiError> {
    let body = ctx.take_body();
    let bytes = json::body_bytes(&ctx.parts.headers, body, true).await?;
    let request = match bytes.as_slice() {
        [] => JoinTokenRequest { ttl: None, uses: None, role: Role::Agent },
        bytes => json::parse(bytes)?,
    };
    let ttl = request.ttl.unwrap_or(TTL_DEFAULT);
    let uses = request.uses.unwrap_or(1);
    let mut errors = Vec::new();
    if ttl < TTL_MIN || ttl > TTL_MAX {
        errors.push(FieldError { pointer: "/ttl".into(), message: format!("`{ttl}` is not between {TTL_MIN} and {TTL_MAX}") });
    }
    if uses == 0 || uses > USES_MAX {
        errors.push(FieldError { pointer: "/uses".into(), message: format!("{uses} is not between 1 and {USES_MAX}") });
    }
    if let Some(first) = errors.first() {
        let detail = format!("`{}`: {}", first.pointer, first.message);
        return Err(ApiError::invalid(code::BAD_REQUEST, detail, errors));
    }
    let answer = ctx.shared.deps.joins.create(request.role, ttl, uses).await.map_err(|error| match error {
        JoinTokenError::Refused(why) => ApiError::conflict(why),
        JoinTokenError::Propose(error) => error.into(),
    })?;
    let mut response = ctx.json(ctx.store().state().index, &answer)?;
    *response.status_mut() = StatusCode::CREATED;
    Ok(response)
}
