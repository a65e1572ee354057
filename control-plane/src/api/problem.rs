//! The one place where errors meet HTTP: every error is `application/problem+json` (RFC 9457).

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::header::{ALLOW, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderValue, StatusCode};
use optimus_common::Span;
use optimus_common::api::v1::{FieldError, Problem};
use optimus_common::reason::{Code, code};
use optimus_core::state::command::Refusal;

use crate::agent_calls::AgentCallError;
use crate::auth::AuthError;
use crate::store::ProposeError;

pub const PROBLEM_JSON: &str = "application/problem+json";
/// Where the documentation of a code lives.
const ERRORS_URI: &str = "https://optimus.dev/errors/";
/// Most faults of one body that are listed; more are counted in the detail.
pub const FIELD_ERRORS_MAX: usize = 50;
/// Pause suggested when the server does not know better.
pub const RETRY_DEFAULT: Duration = Duration::from_secs(1);

/// An error on its way to becoming a [`Problem`]. The request id is added at the gate.
#[derive(Debug, Clone)]
pub struct ApiError(Box<Fault>);

/// What an [`ApiError`] says. Boxed, so that results stay small where all goes well.
#[derive(Debug, Clone)]
pub struct Fault {
    pub status: StatusCode,
    pub code: Code,
    pub detail: String,
    /// Replaces the code's own text.
    pub hint: Option<String>,
    pub errors: Vec<FieldError>,
    pub retry_after: Option<Duration>,
    /// For 405.
    pub allow: Option<String>,
}

impl ApiError {
    pub fn new(status: StatusCode, code: Code, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        ApiError(Box::new(Fault { status, code, detail, hint: None, errors: Vec::new(), retry_after: None, allow: None }))
    }

    pub fn bad_request(detail: impl Into<String>) -> Self {
        ApiError::new(StatusCode::BAD_REQUEST, code::BAD_REQUEST, detail)
    }
    pub fn not_found(detail: impl Into<String>) -> Self {
        ApiError::new(StatusCode::NOT_FOUND, code::NOT_FOUND, detail)
    }
    pub fn method_not_allowed(method: &http::Method, allow: String) -> Self {
        let mut error =
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, code::METHOD_NOT_ALLOWED, format!("{method} is not possible here; {allow} is"));
        error.allow = Some(allow);
        error
    }
    pub fn unsupported_media(found: Option<&str>) -> Self {
        let detail = match found {
            Some(found) => format!("the body is `{found}`; only application/json is read"),
            None => "the body has no Content-Type; only application/json is read".into(),
        };
        ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, code::UNSUPPORTED_MEDIA, detail)
    }
    pub fn too_large(limit: usize) -> Self {
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, code::TOO_LARGE, format!("the body is larger than {limit} bytes"))
    }
    pub fn timed_out(limit: Duration) -> Self {
        ApiError::new(StatusCode::GATEWAY_TIMEOUT, code::TIMED_OUT, format!("no answer within {}", Span::from(limit)))
    }
    pub fn conflict(detail: impl Into<String>) -> Self {
        ApiError::new(StatusCode::CONFLICT, code::CONFLICT, detail)
    }
    pub fn gone(detail: impl Into<String>) -> Self {
        ApiError::new(StatusCode::GONE, code::GONE, detail)
    }
    /// A body that was read but breaks a rule; the faults by JSON pointer.
    pub fn invalid(code: Code, detail: impl Into<String>, mut errors: Vec<FieldError>) -> Self {
        let mut error = ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, code, detail);
        if errors.len() > FIELD_ERRORS_MAX {
            let counted = format!("{} ({} faults, the first {FIELD_ERRORS_MAX} are listed)", error.detail, errors.len());
            error.detail = counted;
            errors.truncate(FIELD_ERRORS_MAX);
        }
        error.errors = errors;
        error
    }
    pub fn overloaded(detail: impl Into<String>) -> Self {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, code::OVERLOADED, detail).retry(RETRY_DEFAULT)
    }
    pub fn behind(detail: impl Into<String>) -> Self {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, code::BEHIND, detail).retry(RETRY_DEFAULT)
    }
    pub fn host_not_allowed(detail: impl Into<String>) -> Self {
        ApiError::new(StatusCode::FORBIDDEN, code::HOST_NOT_ALLOWED, detail)
    }
    /// A fault of ours: the cause goes to the log, not to the client.
    pub fn internal(cause: impl std::fmt::Display) -> Self {
        tracing::error!(error = %cause, "request failed");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, code::INTERNAL, "the server failed to answer")
    }
    pub fn retry(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The error as clients see it.
    pub fn problem(&self, request_id: &str) -> Problem {
        let retryable = matches!(self.status.as_u16(), 429 | 502 | 503 | 504);
        Problem {
            kind: format!("{ERRORS_URI}{}", self.code.code),
            title: self.code.title.into(),
            status: self.status.as_u16(),
            detail: self.detail.clone(),
            code: self.code.code.into(),
            request_id: request_id.into(),
            hint: Some(self.hint.clone().unwrap_or_else(|| self.code.about.into())),
            errors: self.errors.clone(),
            retryable,
        }
    }

    pub fn into_response(self, request_id: &str) -> Response {
        let body = serde_json::to_vec(&self.problem(request_id)).expect("a problem holds only strings and numbers");
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        if let Some(after) = self.retry_after {
            // Whole seconds, rounded up: too early a retry is worse than a late one.
            headers.insert(RETRY_AFTER, HeaderValue::from(after.as_millis().div_ceil(1000).clamp(1, 3600) as u64));
        }
        if let Some(allow) = self.allow.as_deref().and_then(|allow| HeaderValue::try_from(allow).ok()) {
            headers.insert(ALLOW, allow);
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"optimus\""));
        }
        response
    }
}

impl Deref for ApiError {
    type Target = Fault;
    fn deref(&self) -> &Fault {
        &self.0
    }
}
impl DerefMut for ApiError {
    fn deref_mut(&mut self) -> &mut Fault {
        &mut self.0
    }
}

impl From<ProposeError> for ApiError {
    fn from(error: ProposeError) -> Self {
        let detail = error.to_string();
        match error {
            ProposeError::NoLeader { retry_after } => {
                ApiError::new(StatusCode::SERVICE_UNAVAILABLE, code::NO_LEADER, detail).retry(retry_after.as_duration())
            }
            ProposeError::Overloaded { retry_after } => ApiError::overloaded(detail).retry(retry_after.as_duration()),
            ProposeError::Unknown { retry_after } => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, code::NO_LEADER, detail)
                .retry(retry_after.as_duration())
                .hint("repeat the request with the same Idempotency-Key, or read before you repeat it without one"),
            ProposeError::TimedOut(_) => ApiError::new(StatusCode::GATEWAY_TIMEOUT, code::TIMED_OUT, detail),
            ProposeError::Stopping => ApiError::overloaded(detail).hint("ask another server, or this one once it is up again"),
        }
    }
}

impl From<AuthError> for ApiError {
    fn from(error: AuthError) -> Self {
        let detail = error.to_string();
        match error {
            AuthError::Missing | AuthError::Invalid => ApiError::new(StatusCode::UNAUTHORIZED, code::UNAUTHENTICATED, detail),
            AuthError::Forbidden(_) | AuthError::ForeignPage => ApiError::new(StatusCode::FORBIDDEN, code::FORBIDDEN, detail),
            AuthError::Throttled { retry_after } => {
                ApiError::new(StatusCode::TOO_MANY_REQUESTS, code::UNAUTHENTICATED, detail).retry(retry_after)
            }
        }
    }
}

impl From<AgentCallError> for ApiError {
    fn from(error: AgentCallError) -> Self {
        let detail = error.to_string();
        match error {
            AgentCallError::NotConnected => ApiError::new(StatusCode::SERVICE_UNAVAILABLE, code::NODE_DOWN, detail).retry(RETRY_DEFAULT),
            AgentCallError::TimedOut => ApiError::new(StatusCode::GATEWAY_TIMEOUT, code::TIMED_OUT, detail),
            AgentCallError::Refused(_) => ApiError::conflict(detail),
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let detail = refusal.to_string();
        match refusal {
            Refusal::NoSuchWorkload(_)
            | Refusal::NoSuchNode(_)
            | Refusal::NoSuchRelease { .. }
            | Refusal::NoSuchQuota(_)
            | Refusal::NoSuchPool(_)
            | Refusal::NoSuchVolume(_)
            | Refusal::NoSuchSecret(_) => ApiError::not_found(detail),
            Refusal::RequestReused => ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, code::CONFLICT, detail)
                .hint("an Idempotency-Key belongs to one request; take a new key for another"),
            Refusal::TokenUnknown | Refusal::TokenExpired | Refusal::TokenUsedUp => {
                ApiError::new(StatusCode::FORBIDDEN, code::TOKEN_REFUSED, detail)
            }
            Refusal::TokenRole { .. } => ApiError::new(StatusCode::FORBIDDEN, code::TOKEN_REFUSED, detail),
            Refusal::NoSuchServer(_) | Refusal::NoSuchRun(..) => ApiError::not_found(detail),
            Refusal::RunsFull { .. } => ApiError::new(StatusCode::TOO_MANY_REQUESTS, code::OVERLOADED, detail).retry(RETRY_DEFAULT),
            Refusal::RunInput(_) => ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, code::BAD_REQUEST, detail),
            Refusal::BeingRemoved(_)
            | Refusal::CannotSteer { .. }
            | Refusal::ChangedSince { .. }
            | Refusal::TooMany { .. }
            | Refusal::ClusterExists
            | Refusal::TooOld { .. }
            | Refusal::LastServer(_)
            | Refusal::NoCluster
            | Refusal::RotationUnderWay
            | Refusal::NoRotation
            | Refusal::RootKeyNotHeld(_)
            | Refusal::RotationPastAbort
            | Refusal::NotYet { .. }
            | Refusal::SecretInUse { .. }
            | Refusal::OtherVault(_)
            | Refusal::NotAJob(_)
            | Refusal::Stopped(_)
            | Refusal::RunOver(..)
            | Refusal::NoCopies(_)
            | Refusal::AfterCircle { .. }
            | Refusal::VolumeInUse { .. }
            | Refusal::KindChanged { .. } => ApiError::conflict(detail),
        }
    }
}
