//! Rows that steer placement: quotas, pools, volumes.

use std::fmt;

use optimus_common::{Bytes, Millicores, Name, NodeId};
use serde::{Deserialize, Serialize};

/// Most rows of each kind the state accepts.
pub const QUOTAS_MAX: usize = 10_000;
pub const POOLS_MAX: usize = 1000;
pub const VOLUMES_MAX: usize = 100_000;

/// A project, or one of its environments.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct QuotaKey {
    pub project: Name,
    /// Unset: the whole project.
    #[serde(default)]
    pub environment: Option<Name>,
}

impl fmt::Display for QuotaKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.environment {
            Some(environment) => write!(f, "{}/{environment}", self.project),
            None => write!(f, "{}", self.project),
        }
    }
}

/// The most that may be reserved together; unset: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quota {
    #[serde(default)]
    pub cpu: Option<Millicores>,
    #[serde(default)]
    pub memory: Option<Bytes>,
    #[serde(default)]
    pub disk: Option<Bytes>,
    #[serde(default)]
    pub copies: Option<u32>,
    #[serde(default)]
    pub devices: Option<u32>,
}

/// How copies are laid out over the nodes of a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// The node with the most room.
    #[default]
    Spread,
    /// The fullest node that still has room, so that whole nodes stay free.
    BinPack,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    pub name: Name,
    #[serde(default)]
    pub layout: Layout,
}

/// A volume's name is unique in its environment.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct VolumeKey {
    pub project: Name,
    pub environment: Name,
    pub name: Name,
}

impl fmt::Display for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.project, self.environment, self.name)
    }
}

/// A volume lives on one node; its users run there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    pub key: VolumeKey,
    pub node: NodeId,
}
