//! Which workload or copy a word means: `web`, `staging/web`, `shop/staging/web`, `web-0`.
//!
//! A full address is taken as it is. A short one is looked up among the workloads there are; the
//! project file here and the context decide between several, and what remains in doubt is refused
//! with the candidates.

use optimus_common::api::v1::Workload;
use optimus_common::reason::code;
use optimus_common::{Name, WorkloadKey};

use crate::client::Client;
use crate::error::{Exit, Failure, nearest};

/// Most candidates listed in an error.
const CANDIDATES_MAX: usize = 10;

/// Project and environment as far as they are known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scope {
    pub project: Option<Name>,
    pub environment: Option<Name>,
}

impl Scope {
    pub fn holds(&self, key: &WorkloadKey) -> bool {
        self.project.as_ref().is_none_or(|project| *project == key.project)
            && self.environment.as_ref().is_none_or(|environment| *environment == key.environment)
    }

    /// The query that narrows a list to this scope.
    pub fn query(&self) -> Vec<(&'static str, String)> {
        let mut query = Vec::new();
        if let Some(project) = &self.project {
            query.push(("project", project.to_string()));
        }
        if let Some(environment) = &self.environment {
            query.push(("environment", environment.to_string()));
        }
        query
    }

    /// What `self` leaves open, taken from `other`.
    #[must_use]
    pub fn or(&self, other: &Scope) -> Scope {
        Scope {
            project: self.project.clone().or_else(|| other.project.clone()),
            environment: self.environment.clone().or_else(|| other.environment.clone()),
        }
    }
}

/// A word that names a workload or a copy, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    pub scope: Scope,
    /// Workload or copy.
    pub name: Name,
}

/// What an address turned out to mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub key: WorkloadKey,
    /// `web-0`, when a copy was named.
    pub copy: Option<Name>,
}

impl Address {
    /// # Errors
    /// Exit code 2 when a part is not a name, or there are more than three.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        let parts: Vec<&str> = text.split('/').collect();
        let name = |part: &str| {
            Name::new(part).map_err(|error| {
                Failure::usage(format!("`{text}` is not a workload or a copy"))
                    .because(error.to_string())
                    .hint("write `web`, `env/web`, `project/env/web`, or `web-0` for a copy")
            })
        };
        let (project, environment, last) = match parts.as_slice() {
            [last] => (None, None, last),
            [environment, last] => (None, Some(name(environment)?), last),
            [project, environment, last] => (Some(name(project)?), Some(name(environment)?), last),
            _ => {
                return Err(Failure::usage(format!("`{text}` is not a workload or a copy"))
                    .because("it has more than three parts")
                    .hint("write `web`, `env/web`, `project/env/web`, or `web-0` for a copy"));
            }
        };
        Ok(Address { scope: Scope { project, environment }, name: name(last)? })
    }

    /// `web` when the name could be that of copy `web-0`, or of its release command, `web-release`.
    fn workload_of_copy(&self) -> Option<Name> {
        let (workload, index) = self.name.as_str().rsplit_once('-')?;
        if index == "release" {
            return Name::new(workload).ok(); // its release command
        }
        let canonical = index == "0" || !index.starts_with('0');
        index.parse::<u32>().ok().filter(|_| canonical)?;
        Name::new(workload).ok()
    }
}

/// What an address means among the workloads there are.
#[derive(Debug, PartialEq, Eq)]
enum Choice {
    One(Found),
    Several(Vec<WorkloadKey>),
    None,
}

/// `defaults` only decides between several.
fn choose(address: &Address, scope: &Scope, defaults: &Scope, keys: &[WorkloadKey]) -> Choice {
    let named = |name: &Name| -> Vec<&WorkloadKey> { keys.iter().filter(|key| key.workload == *name && scope.holds(key)).collect() };
    // A workload may itself be called `web-0`: the exact name comes first.
    let (mut matches, mut copy) = (named(&address.name), None);
    if matches.is_empty()
        && let Some(workload) = address.workload_of_copy()
    {
        (matches, copy) = (named(&workload), Some(address.name.clone()));
    }
    for narrower in [defaults.clone(), Scope { environment: None, ..defaults.clone() }] {
        let narrowed: Vec<&WorkloadKey> = matches.iter().copied().filter(|key| narrower.holds(key)).collect();
        if matches.len() > 1 && !narrowed.is_empty() {
            matches = narrowed;
        }
    }
    match matches.as_slice() {
        [] => Choice::None,
        [key] => Choice::One(Found { key: (*key).clone(), copy }),
        several => Choice::Several(several.iter().map(|key| (*key).clone()).collect()),
    }
}

/// Finds what `text` names. `scope` is `--project` and `--env`.
///
/// # Errors
/// Exit code 3 when there is no such workload, 2 when several are meant.
pub async fn resolve(client: &Client, text: &str, scope: &Scope, defaults: &Scope) -> Result<Found, Failure> {
    let address = Address::parse(text)?;
    let scope = address.scope.or(scope);
    let what = format!("cannot find `{text}`");
    let keys: Vec<WorkloadKey> =
        client.list::<Workload>("/v1/workloads", &scope.query(), &what).await?.items.into_iter().map(|workload| workload.key).collect();
    match choose(&address, &scope, defaults, &keys) {
        Choice::One(found) => Ok(found),
        Choice::Several(keys) => Err(ambiguous(text, &keys)),
        Choice::None => {
            let failure = Failure::new(Exit::NotFound, what).because("no workload or copy has that name").with_code(&code::NOT_FOUND);
            let near = nearest(address.name.as_str(), keys.iter().map(|key| key.workload.as_str()));
            Err(match near {
                Some(near) => failure.hint(format!("did you mean `{near}`? `optimus status` lists all")),
                None => failure.hint("`optimus status` lists all workloads"),
            })
        }
    }
}

/// Several workloads fit.
pub fn ambiguous(text: &str, keys: &[WorkloadKey]) -> Failure {
    let mut failure = Failure::usage(format!("`{text}` may mean {} workloads", keys.len()));
    failure.detail = keys.iter().take(CANDIDATES_MAX).map(ToString::to_string).collect();
    if keys.len() > CANDIDATES_MAX {
        failure.detail.push(format!("and {} more", keys.len() - CANDIDATES_MAX));
    }
    failure.hint("write one of them in full, or narrow it with --project and --env")
}

/// The API path of a workload.
pub fn path(key: &WorkloadKey) -> String {
    format!("/v1/projects/{}/envs/{}/workloads/{}", key.project, key.environment, key.workload)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn keys(texts: &[&str]) -> Vec<WorkloadKey> {
        texts
            .iter()
            .map(|text| {
                let address = Address::parse(text).unwrap();
                let Scope { project, environment } = address.scope;
                WorkloadKey { project: project.unwrap(), environment: environment.unwrap(), workload: address.name }
            })
            .collect()
    }

    fn scope(project: Option<&str>, environment: Option<&str>) -> Scope {
        let name = |text: &str| Name::new(text).unwrap();
        Scope { project: project.map(name), environment: environment.map(name) }
    }

    /// What `text` means, in one line.
    fn told(text: &str, defaults: &Scope, all: &[&str]) -> String {
        let address = Address::parse(text).unwrap();
        match choose(&address, &address.scope, defaults, &keys(all)) {
            Choice::One(Found { key, copy: None }) => key.to_string(),
            Choice::One(Found { key, copy: Some(copy) }) => format!("{key} copy {copy}"),
            Choice::Several(keys) => format!("several: {keys:?}"),
            Choice::None => "none".into(),
        }
    }

    #[test]
    fn short_addresses_mean_the_only_match() {
        let all = ["shop/dev/web", "shop/prod/api", "blog/dev/api"];
        let open = Scope::default();
        assert_eq!(told("web", &open, &all), "shop/dev/web");
        assert_eq!(told("web-0", &open, &all), "shop/dev/web copy web-0");
        assert_eq!(told("prod/api", &open, &all), "shop/prod/api");
        assert_eq!(told("blog/dev/api-12", &open, &all), "blog/dev/api copy api-12");
        assert_eq!(told("api", &open, &all), "several: [shop/prod/api, blog/dev/api]");
        assert_eq!(told("wbe", &open, &all), "none");
        assert_eq!(told("web-00", &open, &all), "none");
        assert_eq!(told("shop/prod/web", &open, &all), "none");
    }

    #[test]
    fn defaults_decide_between_several_and_never_hide_the_only_one() {
        let all = ["shop/dev/web", "shop/prod/web", "blog/dev/api"];
        assert_eq!(told("web", &scope(Some("shop"), Some("prod")), &all), "shop/prod/web");
        assert_eq!(told("web", &scope(Some("blog"), Some("prod")), &all), "several: [shop/dev/web, shop/prod/web]");
        assert_eq!(told("api", &scope(Some("shop"), Some("prod")), &all), "blog/dev/api");
        assert_eq!(told("web", &scope(Some("shop"), Some("qa")), &all), "several: [shop/dev/web, shop/prod/web]");
        let two = ["shop/dev/web", "blog/dev/web"];
        assert_eq!(told("web", &scope(Some("blog"), Some("prod")), &two), "blog/dev/web");
    }

    #[test]
    fn a_workload_may_be_called_like_a_copy() {
        assert_eq!(told("web-0", &Scope::default(), &["shop/dev/web", "shop/dev/web-0"]), "shop/dev/web-0");
    }

    #[test]
    fn bad_addresses_are_usage_errors() {
        for bad in ["", "/web", "a/b/c/d", "Web", "a//b", "web/"] {
            assert_eq!(Address::parse(bad).unwrap_err().exit, Exit::Usage, "{bad}");
        }
    }
}
