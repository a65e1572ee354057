//! The routes, as data.
//!
//! A route's method, path and documentation come from one annotation (`#[utoipa::path]`) on its
//! handler, and it cannot be listed without naming the [`Permission`] it needs. The router, the
//! OpenAPI document and the tests are all made from this one table.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::RawPathParams;
use axum::response::Response;
use axum::{RequestExt, Router};
use http::{Method, Request};
use utoipa::openapi::RefOr;
use utoipa::openapi::path::{HttpMethod, Operation};
use utoipa::openapi::schema::Schema;

use super::Shared;
use super::context::Ctx;
use super::gate::Trace;
use super::problem::ApiError;
use super::{console, logs, v1};
use crate::auth::{Attempt, Permission};

/// A handler runs after its permission was checked.
pub(crate) type Handler = fn(Ctx) -> Pin<Box<dyn Future<Output = Result<Response, ApiError>> + Send>>;

/// How long a handler may take to begin its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// [`REQUEST_TIMEOUT`].
    Plain,
    /// May wait for a change on request: up to [`super::watch::WAIT_MAX`] more.
    Waits,
}

/// A request must begin its answer by then.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

impl Patience {
    fn limit(self, request: Duration) -> Duration {
        match self {
            Patience::Plain => request,
            Patience::Waits => request + super::watch::WAIT_MAX,
        }
    }
}

/// One operation of the API.
pub struct Route {
    pub method: Method,
    /// As documented: `/v1/projects/{project}/envs/{env}/workloads/{workload}:scale`.
    pub path: &'static str,
    pub permission: Permission,
    pub patience: Patience,
    pub(crate) handler: Handler,
    pub(crate) operation: Operation,
    pub(crate) schemas: Vec<(String, RefOr<Schema>)>,
}

macro_rules! route {
    ($($module:ident)::+ => $handler:ident, $permission:ident, $patience:ident) => {
        utoipa_axum::paste! {{
            type Documented = $($module)::+::[<__path_ $handler>];
            let mut schemas = Vec::new();
            <Documented as utoipa::__dev::SchemaReferences>::schemas(&mut schemas);
            Route {
                method: method(&<Documented as utoipa::Path>::methods()),
                path: <Documented as utoipa::Path>::path().leak(),
                permission: Permission::$permission,
                patience: Patience::$patience,
                handler: |ctx| Box::pin($($module)::+::$handler(ctx)),
                operation: <Documented as utoipa::Path>::operation(),
                schemas,
            }
        }}
    };
}

fn method(methods: &[HttpMethod]) -> Method {
    match methods {
        [HttpMethod::Get] => Method::GET,
        [HttpMethod::Post] => Method::POST,
        [HttpMethod::Delete] => Method::DELETE,
        [HttpMethod::Put] => Method::PUT,
        other => unreachable!("a handler is annotated with one method of GET, POST, PUT and DELETE, not {}", other.len()),
    }
}

/// Every operation of the API. Made once per process: paths are leaked.
pub fn table() -> &'static [Route] {
    static TABLE: std::sync::OnceLock<Vec<Route>> = std::sync::OnceLock::new();
    TABLE.get_or_init(|| {
        vec![
            route!(v1::system => healthz, Public, Plain),
            route!(v1::system => readyz, Public, Plain),
            route!(v1::system => version, Public, Plain),
            route!(v1::system => metrics, Metrics, Plain),
            route!(v1::system => openapi, View, Plain),
            route!(v1::system => status, View, Plain),
            route!(v1::deploy => deploy, Deploy, Plain),
            route!(v1::plan => plan, Deploy, Plain),
            route!(v1::workloads => list_workloads, View, Waits),
            route!(v1::workloads => get_workload, View, Waits),
            route!(v1::workloads => explain_workload, View, Plain),
            route!(v1::actions => remove_workload, Remove, Plain),
            route!(v1::actions => scale_workload, Scale, Plain),
            route!(v1::actions => restart_workload, Restart, Plain),
            route!(v1::actions => stop_workload, Stop, Plain),
            route!(v1::steering => promote, Deploy, Plain),
            route!(v1::steering => pause, Deploy, Plain),
            route!(v1::steering => resume, Deploy, Plain),
            route!(v1::steering => abort, Deploy, Plain),
            route!(v1::steering => retry, Deploy, Plain),
            route!(v1::steering => rollback, Deploy, Plain),
            route!(v1::allocations => list_workload_allocations, View, Plain),
            route!(v1::allocations => list_allocations, View, Plain),
            route!(v1::allocations => get_allocation, View, Plain),
            route!(v1::allocations => explain_allocation, View, Plain),
            route!(logs => workload_logs, Logs, Plain),
            route!(v1::deployments => list_deployments, View, Plain),
            route!(v1::deployments => get_deployment, View, Waits),
            route!(v1::endpoints => list_endpoints, View, Waits),
            route!(v1::endpoints => ack_endpoints, Route, Plain),
            route!(v1::nodes => list_nodes, Nodes, Plain),
            route!(v1::nodes => get_node, Nodes, Plain),
            route!(v1::nodes => remove_node, NodesAdmin, Plain),
            route!(v1::usage => get_usage, View, Plain),
            route!(v1::usage => node_metrics, Nodes, Plain),
            route!(v1::usage => allocation_metrics, View, Plain),
            route!(v1::usage => federate, Metrics, Plain),
            route!(v1::operate => label_node, NodesAdmin, Plain),
            route!(v1::operate => set_node_pool, NodesAdmin, Plain),
            route!(v1::operate => cordon_node, NodesAdmin, Plain),
            route!(v1::operate => uncordon_node, NodesAdmin, Plain),
            route!(v1::operate => drain_node, NodesAdmin, Plain),
            route!(v1::operate => cancel_drain, NodesAdmin, Plain),
            route!(v1::operate => preview_drain, Nodes, Plain),
            route!(v1::operate => get_rebalance, Nodes, Plain),
            route!(v1::operate => set_rebalance, NodesAdmin, Plain),
            route!(v1::operate => rebalance, NodesAdmin, Plain),
            route!(v1::placing => list_quotas, View, Plain),
            route!(v1::placing => get_project_quota, View, Plain),
            route!(v1::placing => set_project_quota, Quotas, Plain),
            route!(v1::placing => remove_project_quota, Quotas, Plain),
            route!(v1::placing => get_environment_quota, View, Plain),
            route!(v1::placing => set_environment_quota, Quotas, Plain),
            route!(v1::placing => remove_environment_quota, Quotas, Plain),
            route!(v1::placing => list_pools, Nodes, Plain),
            route!(v1::placing => get_pool, Nodes, Plain),
            route!(v1::placing => set_pool, NodesAdmin, Plain),
            route!(v1::placing => remove_pool, NodesAdmin, Plain),
            route!(v1::placing => list_volumes, View, Plain),
            route!(v1::placing => get_volume, View, Plain),
            route!(v1::placing => set_volume, Volumes, Plain),
            route!(v1::placing => remove_volume, Volumes, Plain),
            route!(v1::secrets => list_secrets, View, Plain),
            route!(v1::secrets => get_secret, View, Plain),
            route!(v1::secrets => set_secret, Secrets, Plain),
            route!(v1::secrets => remove_secret, Secrets, Plain),
            route!(v1::jobs => list_jobs, View, Plain),
            route!(v1::jobs => get_job, View, Plain),
            route!(v1::jobs => list_runs, View, Plain),
            route!(v1::jobs => get_run, View, Waits),
            route!(v1::jobs => start_run, Run, Plain),
            route!(v1::jobs => cancel_run, Run, Plain),
            route!(v1::tokens => create_join_token, Tokens, Plain),
            route!(v1::sessions => create_login_code, Admin, Plain),
            route!(v1::sessions => log_in, Public, Plain),
            route!(v1::sessions => log_out, View, Plain),
            route!(v1::export => snapshot, Admin, Plain),
            route!(v1::events => list_events, Events, Plain),
            route!(v1::cluster => get_cluster, Cluster, Plain),
            route!(v1::cluster => state_digest, ClusterAdmin, Plain),
            route!(v1::cluster => transfer_leader, ClusterAdmin, Plain),
            route!(v1::cluster => rotate_ca, ClusterAdmin, Plain),
            route!(v1::cluster => rotate_root_key, ClusterAdmin, Plain),
            route!(v1::cluster => remove_server, ClusterAdmin, Plain),
        ]
    })
}

/// Splits `…/{workload}:scale` into what the router matches and the verb.
pub(crate) fn split_verb(path: &str) -> (&str, Option<&str>) {
    match path.rsplit_once("}:") {
        Some((head, verb)) => (&path[..head.len() + 1], Some(verb)),
        None => (path, None),
    }
}

/// The router over the whole table: one entry per path, in which verb and method choose the route.
pub(crate) fn router(shared: Arc<Shared>) -> Router {
    let mut paths: BTreeMap<&'static str, Vec<&'static Route>> = BTreeMap::new();
    for route in table() {
        paths.entry(split_verb(route.path).0).or_default().push(route);
    }
    let mut router = Router::new();
    for (path, routes) in paths {
        let routes: Arc<[&'static Route]> = routes.into();
        let shared = shared.clone();
        router = router.route(
            path,
            axum::routing::any(move |request: Request<Body>| {
                let (shared, routes) = (shared.clone(), routes.clone());
                async move {
                    let trace = trace(&request);
                    match dispatch(shared, &routes, request).await {
                        Ok(response) => response,
                        Err(error) => error.into_response(&trace.request_id),
                    }
                }
            }),
        );
    }
    router.fallback(|request: Request<Body>| async move {
        let trace = trace(&request);
        if let Some(page) = console::page(&request) {
            let _ = trace.route.set("console");
            return page;
        }
        ApiError::not_found(format!("there is no {}", shown(request.uri().path())))
            .hint("GET /v1/openapi.json lists every path")
            .into_response(&trace.request_id)
    })
}

fn trace(request: &Request<Body>) -> Arc<Trace> {
    request.extensions().get::<Arc<Trace>>().expect("the gate puts a trace into every request").clone()
}

/// Paths come from anybody and may be long.
fn shown(path: &str) -> &str {
    const SHOWN_MAX: usize = 200;
    let end = path.char_indices().nth(SHOWN_MAX).map_or(path.len(), |(at, _)| at);
    &path[..end]
}

/// Chooses the route, checks its permission, runs its handler within its time.
async fn dispatch(shared: Arc<Shared>, routes: &[&'static Route], mut request: Request<Body>) -> Result<Response, ApiError> {
    let trace = trace(&request);
    let params = request
        .extract_parts::<RawPathParams>()
        .await
        .map_err(|rejection| ApiError::bad_request(format!("the path is malformed: {}", rejection.body_text().to_lowercase())))?;
    let mut params: Vec<(String, String)> = params.iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();

    let route = choose(routes, request.method(), &mut params)?;
    let _ = trace.route.set(route.path);
    let clock = &shared.deps.store.env.clock;
    let (address, now, at) = (trace.peer.ip(), clock.monotonic(), clock.now());
    let attempt = Attempt { method: request.method(), headers: request.headers(), address, now, at };
    let principal = shared.deps.auth.authorise(attempt, route.permission)?;
    let _ = trace.principal.set(principal.name());

    let limit = route.patience.limit(shared.limits.request);
    let ctx = Ctx::new(shared, trace, principal, params, request);
    match tokio::time::timeout(limit, (route.handler)(ctx)).await {
        Ok(answer) => answer,
        Err(_) => Err(ApiError::timed_out(limit)),
    }
}

/// The route among those of one path: by the verb, which is cut off the last parameter, and the method.
fn choose(routes: &[&'static Route], method: &Method, params: &mut [(String, String)]) -> Result<&'static Route, ApiError> {
    // A verb follows the last parameter; names hold no colon.
    let has_verbs = routes.iter().any(|route| split_verb(route.path).1.is_some());
    let ends_in_parameter = routes.iter().any(|route| split_verb(route.path).0.ends_with('}'));
    let verb = match params.last_mut().filter(|_| has_verbs && ends_in_parameter) {
        Some((_, value)) => value.rsplit_once(':').map(|(name, verb)| (name.to_owned(), verb.to_owned())).map(|(name, verb)| {
            *value = name;
            verb
        }),
        None => None,
    };
    let mut candidates = routes.iter().filter(|route| split_verb(route.path).1 == verb.as_deref()).peekable();
    if candidates.peek().is_none() {
        return Err(ApiError::not_found(match verb {
            Some(verb) => format!("there is no action `:{}` here", shown(&verb)),
            None => "there is only an action here, no object".into(),
        }));
    }
    // HEAD is GET without the body, which the gate drops.
    let wanted = if method == Method::HEAD { &Method::GET } else { method };
    let allow = candidates.clone().map(|route| route.method.as_str()).collect::<Vec<_>>();
    let Some(route) = candidates.find(|route| route.method == wanted) else {
        let mut allow = allow.join(", ");
        if allow.contains("GET") {
            allow.push_str(", HEAD");
        }
        return Err(ApiError::method_not_allowed(method, allow));
    };
    Ok(route)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbs_split_off() {
        assert_eq!(split_verb("/a/{b}:scale"), ("/a/{b}", Some("scale")));
        assert_eq!(split_verb("/a/{b}"), ("/a/{b}", None));
        assert_eq!(split_verb("/healthz"), ("/healthz", None));
    }

    #[test]
    fn no_two_routes_are_the_same() {
        let mut seen = std::collections::BTreeSet::new();
        for route in table() {
            assert!(seen.insert((route.path, route.method.as_str())), "{} {} is listed twice", route.method, route.path);
        }
    }

    #[test]
    fn only_health_version_and_the_way_in_are_public() {
        let public: Vec<_> = table().iter().filter(|r| r.permission == Permission::Public).map(|r| r.path).collect();
        assert_eq!(public, ["/healthz", "/readyz", "/v1/version", "/v1/sessions"]);
    }
}
