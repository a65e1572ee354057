//! Logging in with a browser.

use axum::response::Response;
use http::header::SET_COOKIE;
use http::{HeaderValue, StatusCode};
use optimus_common::api::v1::{LoginCodeAnswer, LoginRequest, SessionAnswer};

use crate::api::context::Ctx;
use crate::api::json;
use crate::api::problem::ApiError;
use crate::auth::Attempt;
use crate::auth::session::{COOKIE_NAME, SESSION_TTL};

/// Make a code that opens one session of a browser on this server. It is good for five minutes, and is in this answer only.
#[utoipa::path(post, path = "/v1/login-codes", tag = "access", operation_id = "create_login_code",
    responses((status = 201, body = LoginCodeAnswer)))]
pub(crate) async fn create_login_code(ctx: Ctx) -> Result<Response, ApiError> {
    let env = &ctx.store().env;
    let (code, expires_at) = ctx.shared.deps.auth.login_code(env.clock.now(), &*env.entropy);
    let mut response = ctx.json(ctx.store().state().index, &LoginCodeAnswer { code, expires_at })?;
    *response.status_mut() = StatusCode::CREATED;
    Ok(response)
}

/// Log in with a code. The session is a cookie that scripts cannot read; every server of the cluster takes it.
#[utoipa::path(post, path = "/v1/sessions", tag = "access", operation_id = "log_in", request_body = LoginRequest,
    responses((status = 201, body = SessionAnswer)))]
pub(crate) async fn log_in(mut ctx: Ctx) -> Result<Response, ApiError> {
    let body = ctx.take_body();
    let LoginRequest { code } = json::parse(&json::body_bytes(&ctx.parts.headers, body, false).await?)?;
    let (env, auth) = (&ctx.store().env, &ctx.shared.deps.auth);
    let (address, now, at) = (ctx.trace.peer.ip(), env.clock.monotonic(), env.clock.now());
    let attempt = Attempt { method: &ctx.parts.method, headers: &ctx.parts.headers, address, now, at };
    let (cookie, expires_at) = auth.log_in(&code, attempt, &*env.entropy)?;
    let mut response = ctx.json(ctx.store().state().index, &SessionAnswer { expires_at })?;
    *response.status_mut() = StatusCode::CREATED;
    set_cookie(&mut response, &cookie, SESSION_TTL.as_secs());
    Ok(response)
}

/// End the session whose cookie comes with the request.
#[utoipa::path(delete, path = "/v1/sessions", tag = "access", operation_id = "log_out",
    responses((status = 204, description = "The cookie is taken back.")))]
pub(crate) async fn log_out(ctx: Ctx) -> Result<Response, ApiError> {
    ctx.shared.deps.auth.log_out(&ctx.parts.headers, ctx.store().env.clock.now());
    let mut response = Response::default();
    *response.status_mut() = StatusCode::NO_CONTENT;
    set_cookie(&mut response, "", 0);
    Ok(response)
}

fn set_cookie(response: &mut Response, value: &str, max_age: u64) {
    let text = format!("{COOKIE_NAME}={value}; Path=/; Max-Age={max_age}; Secure; HttpOnly; SameSite=Strict");
    response.headers_mut().insert(SET_COOKIE, HeaderValue::try_from(text).expect("base64url and digits fit a header"));
}
