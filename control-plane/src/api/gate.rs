//! What every request passes, whatever its route: a request id, a bound on requests at once, the
//! host check, a net under panics, the log line, the figures and the security headers.

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::response::Response;
use futures_util::FutureExt;
use http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request};
use tokio::sync::OwnedSemaphorePermit;
use tower::ServiceExt;

use super::Shared;
use super::problem::ApiError;

pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest request id taken from a client.
pub const REQUEST_ID_MAX: usize = 64;

/// One request's way through the server: made at the gate, filled in by the routes, read by the log.
#[derive(Debug)]
pub(crate) struct Trace {
    pub request_id: String,
    pub peer: SocketAddr,
    pub route: OnceLock<&'static str>,
    pub principal: OnceLock<&'static str>,
    /// The place among the requests in flight. A handler that waits long gives it back.
    pub in_flight: std::sync::Mutex<Option<OwnedSemaphorePermit>>,
}

/// Answers one request. Never fails, never panics.
pub(crate) async fn answer(shared: Arc<Shared>, router: Router, peer: SocketAddr, mut request: Request<Body>) -> Response {
    let started = Instant::now();
    let method = request.method().clone();
    let trace = Arc::new(Trace {
        request_id: request_id(&shared, request.headers()),
        peer,
        route: OnceLock::new(),
        principal: OnceLock::new(),
        in_flight: std::sync::Mutex::new(None),
    });
    let admitted = admit(&shared, &trace, &request);
    let mut response = match admitted {
        Err(error) => error.into_response(&trace.request_id),
        Ok(()) => {
            request.extensions_mut().insert(trace.clone());
            match AssertUnwindSafe(router.oneshot(request)).catch_unwind().await {
                Ok(Ok(response)) => response,
                Ok(Err(never)) => match never {},
                Err(panic) => {
                    let what = panic_text(panic.as_ref());
                    ApiError::internal(format!("panic: {what}")).into_response(&trace.request_id)
                }
            }
        }
    };
    // The permit ends with the answer's head: a stream has a bound of its own.
    drop(trace.in_flight.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take());
    if method == Method::HEAD {
        // The router has done so for answers of routes, and given their length; errors made here are left.
        *response.body_mut() = Body::empty();
    }
    dress(response.headers_mut(), &trace.request_id);
    let route = trace.route.get().copied().unwrap_or("unmatched");
    let status = response.status();
    let took = started.elapsed();
    shared.deps.metrics.observe_request(&method, route, status, took);
    let principal = trace.principal.get().copied().unwrap_or("-");
    let millis = took.as_secs_f64() * 1000.0;
    if status.is_server_error() {
        tracing::warn!(target: "optimus::request", %method, route, status = status.as_u16(), millis, principal, request_id = trace.request_id, peer = %peer, "request");
    } else if method.is_safe() {
        tracing::debug!(target: "optimus::request", %method, route, status = status.as_u16(), millis, principal, request_id = trace.request_id, peer = %peer, "request");
    } else {
        tracing::info!(target: "optimus::request", %method, route, status = status.as_u16(), millis, principal, request_id = trace.request_id, peer = %peer, "request");
    }
    response
}

fn admit(shared: &Shared, trace: &Trace, request: &Request<Body>) -> Result<(), ApiError> {
    let permit = shared.in_flight.clone().try_acquire_owned().map_err(|_| ApiError::overloaded("the server has its fill of requests"))?;
    *trace.in_flight.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(permit);
    shared.hosts.check(request.uri(), request.headers())
}

/// The client's id if it is fit for logs and headers, else one of ours.
fn request_id(shared: &Shared, headers: &HeaderMap) -> String {
    headers
        .get(REQUEST_ID)
        .and_then(|value| value.to_str().ok())
        .filter(|id| is_sane(id))
        .map_or_else(|| shared.deps.store.env.new_id().to_string(), str::to_owned)
}

fn is_sane(id: &str) -> bool {
    (1..=REQUEST_ID_MAX).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("unknown")
}

fn dress(headers: &mut HeaderMap, request_id: &str) {
    let id = HeaderValue::from_str(request_id).unwrap_or_else(|_| HeaderValue::from_static("unknown"));
    headers.insert(REQUEST_ID, id);
    for (name, value) in [
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (CACHE_CONTROL, "no-store"),
        (CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
        (X_FRAME_OPTIONS, "DENY"),
        (REFERRER_POLICY, "no-referrer"),
    ] {
        // The console's pages have a policy of their own.
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_harmless_request_ids_are_taken() {
        assert!(is_sane("ci-42_a.b"));
        for bad in ["", "a b", "a\nb", "é", "<script>", &"a".repeat(REQUEST_ID_MAX + 1)] {
            assert!(!is_sane(bad), "{bad}");
        }
    }
}
