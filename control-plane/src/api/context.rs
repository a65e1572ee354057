//! What a handler gets, and how it answers.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Query;
use axum::response::Response;
use http::header::{CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use http::request::Parts;
use http::{HeaderName, HeaderValue, Request, StatusCode};
use optimus_common::{Name, Span, WorkloadKey};
use optimus_core::state::State;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::OwnedSemaphorePermit;
use utoipa::ToSchema;

use super::Shared;
use super::gate::Trace;
use super::problem::ApiError;
use crate::auth::Principal;
use crate::store::Store;

pub const OPTIMUS_INDEX: HeaderName = HeaderName::from_static("optimus-index");
/// How long ago this server heard the leader, on answers to stale reads: a span, or `unknown` if never since its start.
pub const OPTIMUS_STALENESS: HeaderName = HeaderName::from_static("optimus-staleness");
pub const OPTIMUS_LEADER: HeaderName = HeaderName::from_static("optimus-leader");

/// How fresh a read must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// Not older than any write acknowledged before the request. The default; needs a leader.
    #[default]
    Linearizable,
    /// What this server knows, leader or not.
    Stale,
}

/// What a read asks of the state it is answered from.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Freshness {
    pub consistency: Option<Consistency>,
    pub min_index: Option<u64>,
    pub max_staleness: Option<Span>,
}

/// Longest wait for `min_index`; a linearizable read takes no longer either.
pub const CATCH_UP_MAX: Duration = Duration::from_secs(5);

/// One request whose permission has been checked.
pub(crate) struct Ctx {
    pub shared: Arc<Shared>,
    pub trace: Arc<Trace>,
    pub principal: Principal,
    params: Vec<(String, String)>,
    pub parts: Parts,
    /// In a mutex only because a body is not `Sync`, and a handler's future must be `Send`.
    body: Mutex<Option<Body>>,
    /// Age of a stale read's state; empty for others.
    staleness: OnceLock<Option<Span>>,
}

impl Ctx {
    pub fn new(
        shared: Arc<Shared>,
        trace: Arc<Trace>,
        principal: Principal,
        params: Vec<(String, String)>,
        request: Request<Body>,
    ) -> Self {
        let (parts, body) = request.into_parts();
        Ctx { shared, trace, principal, params, parts, body: Mutex::new(Some(body)), staleness: OnceLock::new() }
    }

    pub fn store(&self) -> &Store {
        &self.shared.deps.store
    }

    /// A parameter of the path, decoded. Names are those of the route's template.
    pub fn param(&self, name: &str) -> Result<&str, ApiError> {
        let found = self.params.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.as_str()).ok_or_else(|| ApiError::internal(format!("the route has no parameter {name}")))
    }

    /// A name in the path.
    pub fn name(&self, param: &str) -> Result<Name, ApiError> {
        Name::new(self.param(param)?).map_err(|error| ApiError::bad_request(format!("{param}: {error}")))
    }

    /// The workload of `/v1/projects/{project}/envs/{env}/workloads/{workload}…`.
    pub fn workload_key(&self) -> Result<WorkloadKey, ApiError> {
        Ok(WorkloadKey { project: self.name("project")?, environment: self.name("env")?, workload: self.name("workload")? })
    }

    /// The query parameters; unknown, doubled or malformed ones are refused.
    pub fn query<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        Query::<T>::try_from_uri(&self.parts.uri)
            .map(|Query(query)| query)
            .map_err(|rejection| ApiError::bad_request(format!("query: {}", deepest(&rejection))))
    }

    /// The body, for [`super::json`]. Taken once.
    pub fn take_body(&mut self) -> Body {
        self.body.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner()).take().unwrap_or_else(Body::empty)
    }

    /// A snapshot to answer from.
    pub async fn read(&self, fresh: Freshness) -> Result<State, ApiError> {
        let confirmed = async {
            match fresh.consistency.unwrap_or_default() {
                Consistency::Linearizable => Ok(self.store().confirm().await?),
                Consistency::Stale => Ok(()),
            }
        };
        let reached = async {
            match fresh.min_index {
                Some(index) => self.reach(index).await,
                None => Ok(()),
            }
        };
        tokio::try_join!(confirmed, reached)?;
        if fresh.consistency == Some(Consistency::Stale) {
            let age = self.store().status().leader_age.map(Span::from);
            if let Some(most) = fresh.max_staleness.filter(|most| age.is_none_or(|age| age > *most)) {
                let age = age.map_or_else(|| "not at all since its start".to_owned(), |age| format!("{age} ago"));
                return Err(ApiError::behind(format!("this server last heard the leader {age}, at most {most} was asked for")));
            }
            let _ = self.staleness.set(age); // a request reads once; of two the first is the older
        }
        Ok(self.store().state())
    }

    /// Waits until this server's state has `index`.
    async fn reach(&self, index: u64) -> Result<(), ApiError> {
        let mut applied = self.store().applied();
        let reached = applied.wait_for(|at| *at >= index);
        match tokio::time::timeout(CATCH_UP_MAX, reached).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(crate::store::ProposeError::Stopping.into()),
            Err(_) => {
                let at = *self.store().applied().borrow();
                Err(ApiError::behind(format!("this server's state is of index {at}, index {index} was asked for")))
            }
        }
    }

    /// Turns a request into one that waits: it leaves the requests in flight and takes a place among
    /// the waiters, which the permit keeps.
    pub fn begin_wait(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        let permit = self.shared.waiters.clone().try_acquire_owned();
        let permit = permit.map_err(|_| ApiError::overloaded("the server has its fill of long polls and streams"))?;
        drop(self.trace.in_flight.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take());
        Ok(permit)
    }

    /// 200 with a JSON body, read at `index`.
    pub fn json<T: Serialize>(&self, index: u64, value: &T) -> Result<Response, ApiError> {
        Ok(self.json_bytes(index, to_json(value)?))
    }

    fn json_bytes(&self, index: u64, body: Vec<u8>) -> Response {
        let mut response = Response::new(Body::from(body));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.mark(&mut response, index);
        response
    }

    /// One object: with an ETag, and 304 if the client has it already.
    ///
    /// The tag is of the answer's bytes, not of the object's revision: what is shown of a workload
    /// also holds observed values (ready copies), which change without a new revision.
    pub fn object<T: Serialize>(&self, index: u64, value: &T) -> Result<Response, ApiError> {
        let body = to_json(value)?;
        let tag = etag(&body);
        let mut response = if self.has(&tag) {
            let mut response = Response::new(Body::empty());
            *response.status_mut() = StatusCode::NOT_MODIFIED;
            self.mark(&mut response, index);
            response
        } else {
            self.json_bytes(index, body)
        };
        response.headers_mut().insert(ETAG, HeaderValue::try_from(tag).expect("a quoted hex string is a header value"));
        Ok(response)
    }

    /// Whether `If-None-Match` names this tag.
    pub fn has(&self, tag: &str) -> bool {
        self.if_none_match().is_some_and(|tags| tags.split(',').map(str::trim).any(|t| t == "*" || t.trim_start_matches("W/") == tag))
    }

    pub fn if_none_match(&self) -> Option<&str> {
        self.parts.headers.get(IF_NONE_MATCH)?.to_str().ok()
    }

    /// Index and leader, on every answer that was read from the state.
    pub fn mark(&self, response: &mut Response, index: u64) {
        let headers = response.headers_mut();
        headers.insert(OPTIMUS_INDEX, HeaderValue::from(index));
        if let Some(age) = self.staleness.get() {
            let age = age.map_or_else(|| "unknown".to_owned(), |age| age.to_string());
            headers.insert(OPTIMUS_STALENESS, HeaderValue::try_from(age).expect("a span is digits and letters"));
        }
        if let Some(leader) = self.store().status().leader {
            headers.insert(OPTIMUS_LEADER, HeaderValue::from(leader));
        }
    }
}

pub(crate) fn to_json<T: Serialize>(value: &T) -> Result<Vec<u8>, ApiError> {
    serde_json::to_vec(value).map_err(ApiError::internal)
}

/// A strong tag of an answer's bytes.
pub(crate) fn etag(body: &[u8]) -> String {
    let digest = Sha256::digest(body);
    let hex: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    format!("\"{hex}\"")
}

/// The cause at the bottom, which says what is wrong without the library's own words around it.
fn deepest(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
