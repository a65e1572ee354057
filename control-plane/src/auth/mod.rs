//! Who may do what.
//!
//! One question, asked in one place: [`Auth::authorise`] turns the headers of a request into a
//! [`Principal`], or refuses. The API asks it for every route before any of the route's code runs.

pub mod session;
pub mod throttle;
mod token;

use std::fmt;
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::Duration;

use http::header::{AUTHORIZATION, ORIGIN};
use http::{HeaderMap, Method};
use optimus_common::Timestamp;
use optimus_common::env::Entropy;
use serde::Serialize;

pub use throttle::{FAILURES_BURST, FAILURES_PER_SECOND, THROTTLED_ADDRESSES_MAX};
pub use token::{AdminToken, TokenFileError, load_or_create};

use session::Sessions;
use throttle::Throttle;
use token::TokenHash;

/// Name of the administrator's token's file in a server's data directory.
pub const TOKEN_FILE: &str = "admin.token";

/// What a route does, as far as access goes. Every route names exactly one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Permission {
    /// Answered without a credential: health and version, nothing else.
    Public,
    /// Look at workloads, copies, deployments and the cluster.
    View,
    Deploy,
    Scale,
    Restart,
    Stop,
    Remove,
    /// Say, as a router, which endpoints it has taken on.
    Route,
    /// Start and cancel runs of jobs.
    Run,
    /// Read what workloads print, which may hold anything.
    Logs,
    /// Look at the hosts.
    Nodes,
    /// Label, cordon, drain and remove hosts, and move copies between them.
    NodesAdmin,
    /// Limit what projects and environments may reserve.
    Quotas,
    /// Create volumes and forget them.
    Volumes,
    /// Set secrets and remove them. Nobody reads them.
    Secrets,
    /// Let new hosts in.
    Tokens,
    Metrics,
    Events,
    /// Look at the servers of the control plane.
    Cluster,
    /// Change who they are and which of them leads.
    ClusterAdmin,
    /// Take everything the cluster knows away in a file.
    Admin,
}

impl Permission {
    pub const ALL: [Permission; 21] = [
        Permission::Public,
        Permission::View,
        Permission::Deploy,
        Permission::Scale,
        Permission::Restart,
        Permission::Stop,
        Permission::Remove,
        Permission::Route,
        Permission::Run,
        Permission::Logs,
        Permission::Nodes,
        Permission::NodesAdmin,
        Permission::Quotas,
        Permission::Volumes,
        Permission::Secrets,
        Permission::Tokens,
        Permission::Metrics,
        Permission::Events,
        Permission::Cluster,
        Permission::ClusterAdmin,
        Permission::Admin,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Permission::Public => "public",
            Permission::View => "view",
            Permission::Deploy => "deploy",
            Permission::Scale => "scale",
            Permission::Restart => "restart",
            Permission::Stop => "stop",
            Permission::Remove => "remove",
            Permission::Route => "route",
            Permission::Run => "run",
            Permission::Logs => "logs",
            Permission::Nodes => "nodes",
            Permission::NodesAdmin => "nodes:admin",
            Permission::Quotas => "quotas:admin",
            Permission::Volumes => "volumes",
            Permission::Secrets => "secrets",
            Permission::Tokens => "tokens",
            Permission::Metrics => "metrics:view",
            Permission::Events => "events",
            Permission::Cluster => "cluster:view",
            Permission::ClusterAdmin => "cluster:admin",
            Permission::Admin => "admin",
        }
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Who sent a request. Its name goes into logs; it holds nothing secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Principal {
    /// Nobody in particular: a public route.
    Anonymous,
    /// The holder of a server's admin token.
    Admin,
}

impl Principal {
    pub fn name(&self) -> &'static str {
        match self {
            Principal::Anonymous => "anonymous",
            Principal::Admin => "admin",
        }
    }

    pub fn may(&self, permission: Permission) -> bool {
        match self {
            Principal::Anonymous => permission == Permission::Public,
            Principal::Admin => true,
        }
    }
}

/// Why a request was turned away.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    #[error("the request carries no credential")]
    Missing,
    #[error("the credential is not valid")]
    Invalid,
    #[error("`{0}` is not allowed with this credential")]
    Forbidden(Permission),
    #[error("a change with a browser's session must come from a page of this server")]
    ForeignPage,
    /// Too many wrong credentials from one address. A right one is still taken.
    #[error("too many wrong credentials from this address")]
    Throttled { retry_after: Duration },
}

/// A request, as far as access goes.
#[derive(Debug, Clone, Copy)]
pub struct Attempt<'a> {
    pub method: &'a Method,
    pub headers: &'a HeaderMap,
    pub address: IpAddr,
    /// Monotonic.
    pub now: Duration,
    /// By the wall clock, which sessions end by.
    pub at: Timestamp,
}

/// Checks credentials. Knows the hash of the admin token, and a key made from it.
pub struct Auth {
    admin: TokenHash,
    sessions: Sessions,
    failures: Mutex<Throttle>,
}

impl Auth {
    pub fn new(admin: &AdminToken) -> Self {
        Auth { admin: admin.hash(), sessions: Sessions::new(admin), failures: Mutex::new(Throttle::new()) }
    }

    /// Who sent a request, if they may do `permission`.
    ///
    /// A wrong credential counts against the address; a right one passes however many wrong ones came from there before,
    /// so that nobody can lock another out.
    pub fn authorise(&self, attempt: Attempt<'_>, permission: Permission) -> Result<Principal, AuthError> {
        if permission == Permission::Public {
            return Ok(Principal::Anonymous);
        }
        let mut given = attempt.headers.get_all(AUTHORIZATION).iter();
        let principal = match (given.next(), given.next()) {
            (None, _) => match session::cookie(attempt.headers) {
                None => return Err(AuthError::Missing),
                Some(cookie) => self.sessions.knows(cookie, attempt.at).then_some(Principal::Admin),
            },
            (Some(value), None) => value.to_str().ok().and_then(bearer).and_then(|text| self.identify(text)),
            (Some(_), Some(_)) => None, // two credentials: which one would count is anybody's guess
        };
        let Some(principal) = principal else { return Err(self.wrong(attempt)) };
        // A browser adds the cookie whoever made it send the request. SameSite keeps strangers' pages out; this keeps out
        // those of another port of this host too. An Origin that is not ours was refused before.
        let by_cookie = !attempt.headers.contains_key(AUTHORIZATION);
        if by_cookie && !attempt.method.is_safe() && !attempt.headers.contains_key(ORIGIN) {
            return Err(AuthError::ForeignPage);
        }
        if !principal.may(permission) {
            return Err(AuthError::Forbidden(permission));
        }
        Ok(principal)
    }

    fn wrong(&self, attempt: Attempt<'_>) -> AuthError {
        let mut failures = self.failures.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        match failures.take(attempt.address, attempt.now) {
            Ok(()) => AuthError::Invalid,
            Err(retry_after) => AuthError::Throttled { retry_after },
        }
    }

    /// A code that opens one session, and when it ends.
    pub fn login_code(&self, at: Timestamp, entropy: &dyn Entropy) -> (String, Timestamp) {
        self.sessions.code(at, entropy)
    }

    /// The value of the session's cookie, and when it ends.
    ///
    /// # Errors
    /// A wrong code counts against the address as a wrong credential does.
    pub fn log_in(&self, code: &str, attempt: Attempt<'_>, entropy: &dyn Entropy) -> Result<(String, Timestamp), AuthError> {
        self.sessions.open(code, attempt.at, entropy).ok_or_else(|| self.wrong(attempt))
    }

    /// Ends the session whose cookie the request carries.
    pub fn log_out(&self, headers: &HeaderMap, at: Timestamp) {
        if let Some(cookie) = session::cookie(headers) {
            self.sessions.end(cookie, at);
        }
    }

    fn identify(&self, text: &str) -> Option<Principal> {
        self.admin.matches(text).then_some(Principal::Admin)
    }
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Auth")
    }
}

/// The token of `Bearer TOKEN`; the scheme's case does not matter (RFC 9110).
fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use optimus_common::env::Entropy;

    use super::*;

    struct Fixed(u8);
    impl Entropy for Fixed {
        fn fill(&self, bytes: &mut [u8]) {
            bytes.fill(self.0);
        }
    }

    fn headers(value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, value.parse().unwrap());
        headers
    }

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn from(headers: &HeaderMap, address: IpAddr) -> Attempt<'_> {
        Attempt { method: &Method::GET, headers, address, now: Duration::from_secs(100), at: Timestamp(0) }
    }

    #[test]
    fn only_the_right_token_gets_in() {
        let token = AdminToken::generate(&Fixed(7));
        let other = AdminToken::generate(&Fixed(8));
        let auth = Auth::new(&token);
        let ask = |value: &str| auth.authorise(from(&headers(value), HERE), Permission::View);
        assert_eq!(ask(&format!("Bearer {}", token.expose())), Ok(Principal::Admin));
        assert_eq!(ask(&format!("bearer {}", token.expose())), Ok(Principal::Admin));
        for wrong in [
            format!("Bearer {}", other.expose()),
            format!("Basic {}", token.expose()),
            token.expose().to_owned(),
            "Bearer ".into(),
            "Bearer".into(),
            format!("Bearer {}x", token.expose()),
            format!("Bearer {}", &token.expose()[..token.expose().len() - 1]),
        ] {
            assert_eq!(ask(&wrong), Err(AuthError::Invalid), "{wrong}");
        }
        assert_eq!(auth.authorise(from(&HeaderMap::new(), HERE), Permission::View), Err(AuthError::Missing));
        assert_eq!(auth.authorise(from(&HeaderMap::new(), HERE), Permission::Public), Ok(Principal::Anonymous));
    }

    #[test]
    fn two_credentials_are_refused() {
        let token = AdminToken::generate(&Fixed(7));
        let mut two = headers(&format!("Bearer {}", token.expose()));
        two.append(AUTHORIZATION, "Bearer x".parse().unwrap());
        assert_eq!(Auth::new(&token).authorise(from(&two, HERE), Permission::View), Err(AuthError::Invalid));
    }

    #[test]
    fn guessing_is_slowed_down_but_locks_nobody_out() {
        let token = AdminToken::generate(&Fixed(7));
        let auth = Auth::new(&token);
        let wrong = headers("Bearer nope");
        for _ in 0..FAILURES_BURST as usize {
            assert_eq!(auth.authorise(from(&wrong, HERE), Permission::View), Err(AuthError::Invalid));
        }
        assert!(matches!(auth.authorise(from(&wrong, HERE), Permission::View), Err(AuthError::Throttled { .. })));
        let right = headers(&format!("Bearer {}", token.expose()));
        assert_eq!(auth.authorise(from(&right, HERE), Permission::View), Ok(Principal::Admin));
        let elsewhere = IpAddr::from([10, 0, 0, 1]);
        assert_eq!(auth.authorise(from(&wrong, elsewhere), Permission::View), Err(AuthError::Invalid));
    }

    #[test]
    fn permissions_have_distinct_names() {
        let names: std::collections::BTreeSet<_> = Permission::ALL.iter().map(|p| p.as_str()).collect();
        assert_eq!(names.len(), Permission::ALL.len());
    }
}
