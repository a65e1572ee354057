//! Secrets: what can be told of them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::Name;
use crate::secret::SecretValue;
use crate::time::Timestamp;

/// `PUT /v1/projects/{project}/envs/{env}/secrets/{secret}`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SecretRequest {
    /// Text of 1 to 65536 bytes without NUL. No answer ever holds it.
    #[schema(value_type = String, min_length = 1, write_only, format = Password)]
    pub value: SecretValue,
    /// Restart what uses it, a few copies at a time, so that all of it has the new version.
    #[serde(default)]
    pub restart: bool,
}

/// A secret without its value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Secret {
    pub project: Name,
    pub environment: Name,
    pub name: String,
    /// The newest version.
    pub version: u64,
    pub created_at: Timestamp,
    /// All versions kept, oldest first.
    pub versions: Vec<SecretVersion>,
    pub readers: Vec<SecretReader>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SecretVersion {
    pub version: u64,
    pub created_at: Timestamp,
}

/// A workload that asks for a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SecretReader {
    pub workload: Name,
    /// The version its present release was deployed with; unset: it waits for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u64>,
}

/// Answer to `PUT`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SecretAnswer {
    pub index: u64,
    /// Unset: the newest version has this value already.
    pub changed: bool,
    pub secret: Secret,
    /// Workloads that are being restarted for it.
    pub restarted: Vec<Name>,
}
