//! Secrets: sealed values by version, and the keys that open them, themselves sealed with the root key, which is never here.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use optimus_common::api::v1::DeploymentPhase;
use optimus_common::spec::WorkloadSpec;
use optimus_common::{Name, Timestamp, WorkloadKey};
use serde::{Deserialize, Serialize};

use super::{Release, State, Workload};

pub const SECRETS_MAX: usize = 10_000;
/// Versions kept of a secret, beside those that a release which is kept was deployed with.
pub const VERSIONS_KEPT: usize = 10;
/// Longest sealed value: the longest value and what sealing adds.
pub const SEALED_MAX: usize = optimus_common::secret::SECRET_MAX + 64;

/// One environment of a project. It has a key of its own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct VaultKey {
    pub project: Name,
    pub environment: Name,
}

impl fmt::Display for VaultKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.project, self.environment)
    }
}

/// The key of an environment's secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vault {
    /// Tells it from others, and nothing of it.
    pub id: Vec<u8>,
    /// Sealed with the root key.
    pub key_sealed: Vec<u8>,
}

/// A secret's name is unique in its environment, and a variable's.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SecretKey {
    pub vault: VaultKey,
    pub name: String,
}

impl fmt::Display for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.name, self.vault)
    }
}

impl SecretKey {
    /// The secret that `name` means in the spec of a workload.
    pub fn of(workload: &WorkloadKey, name: &str) -> Self {
        let vault = VaultKey { project: workload.project.clone(), environment: workload.environment.clone() };
        SecretKey { vault, name: name.to_owned() }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret {
    /// Number of the newest version; none is used twice.
    pub newest: u64,
    /// Oldest first.
    pub versions: Vec<Arc<SecretVersion>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretVersion {
    pub number: u64,
    /// Sealed with the key of the environment.
    pub sealed: Vec<u8>,
    pub created_at: Timestamp,
}

impl State {
    /// The versions of its secrets a release of `spec` would be deployed with now. Those that do not exist are not there.
    pub(crate) fn secret_versions(&self, key: &WorkloadKey, spec: &WorkloadSpec) -> BTreeMap<String, u64> {
        let newest = |name: &String| Some((name.clone(), self.secrets.get(&SecretKey::of(key, name))?.newest));
        spec.secrets.iter().filter_map(newest).collect()
    }

    /// The version of a secret that the copies of a release are given.
    pub fn secret_of(&self, release: &Release, name: &str) -> Option<(SecretKey, &Arc<SecretVersion>)> {
        let (key, number) = (SecretKey::of(&release.key, name), release.secrets.get(name)?);
        let version = self.secrets.get(&key)?.versions.iter().find(|v| v.number == *number)?;
        Some((key, version))
    }

    /// Workloads of the environment whose present release asks for the secret.
    pub fn secret_readers<'s>(&'s self, key: &'s SecretKey) -> impl Iterator<Item = &'s Arc<Workload>> + 's {
        let workloads = self.workloads_in(&key.vault.project, &key.vault.environment);
        workloads.filter(move |row| !row.removing && self.asks_for(key, row, row.release))
    }

    fn asks_for(&self, key: &SecretKey, row: &Workload, release: u64) -> bool {
        self.release(&row.key, release).is_some_and(|r| r.spec.secrets.contains(&key.name))
    }

    /// A workload that may be given the secret: by the release it wants, the one that was good last, or the one it would go
    /// back to.
    pub fn secret_user<'s>(&'s self, key: &'s SecretKey) -> Option<&'s Arc<Workload>> {
        self.workloads_in(&key.vault.project, &key.vault.environment).filter(|row| !row.removing).find(|row| {
            let deployment = row.deployment.and_then(|id| self.deployments.get(&id)).filter(|d| d.phase != DeploymentPhase::Succeeded);
            let releases = [Some(row.release), row.stable, deployment.and_then(|d| d.from_release)];
            releases.into_iter().flatten().any(|release| self.asks_for(key, row, release))
        })
    }
}
