//! Who may do what.
//!
//! One question, asked in one place: [`Auth::authorise`] turns the headers of a request into a
//! [`Principal`], or refuses. The API asks it for every route before any of the route's code runs.

pub mod throttle;
mod token;

use std::fmt;
use std::net::IpAddr;
use std::sync::Mutex;
use std::time::Duration;

use http::HeaderMap;
use http::header::AUTHORIZATION;
use serde::Serialize;

pub use throttle::{FAILURES_BURST, FAILURES_PER_SECOND, THROTTLED_ADDRESSES_MAX};
pub use token::{AdminToken, TokenFileError, load_or_create};

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
    /// Too many wrong credentials from one address. A right one is still taken.
    #[error("too many wrong credentials from this address")]
    Throttled { retry_after: Duration },
}

/// Checks credentials. Knows the hash of the admin token only.
pub struct Auth {
    admin: TokenHash,
    failures: Mutex<Throttle>,
}

impl Auth {
    pub fn new(admin: &AdminToken) -> Self {
        Auth { admin: admin.hash(), failures: Mutex::new(Throttle::new()) }
    }

    /// Who sent a request with these headers, if they may do `permission`.
    ///
    /// `now` is monotonic. A wrong credential counts against `address`; a right one passes however
    /// many wrong ones came from there before, so that nobody can lock another out.
    pub fn authorise(&self, headers: &HeaderMap, permission: Permission, address: IpAddr, now: Duration) -> Result<Principal, AuthError> {
        if permission == Permission::Public {
            return Ok(Principal::Anonymous);
        }
        let mut given = headers.get_all(AUTHORIZATION).iter();
        let principal = match (given.next(), given.next()) {
            (None, _) => return Err(AuthError::Missing),
            (Some(value), None) => value.to_str().ok().and_then(bearer).and_then(|text| self.identify(text)),
            (Some(_), Some(_)) => None, // two credentials: which one would count is anybody's guess
        };
        let Some(principal) = principal else {
            let mut failures = self.failures.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            return Err(match failures.take(address, now) {
                Ok(()) => AuthError::Invalid,
                Err(retry_after) => AuthError::Throttled { retry_after },
            });
        };
        if !principal.may(permission) {
            return Err(AuthError::Forbidden(permission));
        }
        Ok(principal)
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
    const NOW: Duration = Duration::from_secs(100);

    #[test]
    fn only_the_right_token_gets_in() {
        let token = AdminToken::generate(&Fixed(7));
        let other = AdminToken::generate(&Fixed(8));
        let auth = Auth::new(&token);
        let ask = |value: &str| auth.authorise(&headers(value), Permission::View, HERE, NOW);
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
        assert_eq!(auth.authorise(&HeaderMap::new(), Permission::View, HERE, NOW), Err(AuthError::Missing));
        assert_eq!(auth.authorise(&HeaderMap::new(), Permission::Public, HERE, NOW), Ok(Principal::Anonymous));
    }

    #[test]
    fn two_credentials_are_refused() {
        let token = AdminToken::generate(&Fixed(7));
        let mut two = headers(&format!("Bearer {}", token.expose()));
        two.append(AUTHORIZATION, "Bearer x".parse().unwrap());
        assert_eq!(Auth::new(&token).authorise(&two, Permission::View, HERE, NOW), Err(AuthError::Invalid));
    }

    #[test]
    fn guessing_is_slowed_down_but_locks_nobody_out() {
        let token = AdminToken::generate(&Fixed(7));
        let auth = Auth::new(&token);
        let wrong = headers("Bearer nope");
        for _ in 0..FAILURES_BURST as usize {
            assert_eq!(auth.authorise(&wrong, Permission::View, HERE, NOW), Err(AuthError::Invalid));
        }
        assert!(matches!(auth.authorise(&wrong, Permission::View, HERE, NOW), Err(AuthError::Throttled { .. })));
        let right = headers(&format!("Bearer {}", token.expose()));
        assert_eq!(auth.authorise(&right, Permission::View, HERE, NOW), Ok(Principal::Admin));
        let elsewhere = IpAddr::from([10, 0, 0, 1]);
        assert_eq!(auth.authorise(&wrong, Permission::View, elsewhere, NOW), Err(AuthError::Invalid));
    }

    #[test]
    fn permissions_have_distinct_names() {
        let names: std::collections::BTreeSet<_> = Permission::ALL.iter().map(|p| p.as_str()).collect();
        assert_eq!(names.len(), Permission::ALL.len());
    }
}
