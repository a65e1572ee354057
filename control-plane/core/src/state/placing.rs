//! Rows that steer placement: quotas, pools, volumes.

use std::fmt;
use std::sync::Arc;

use optimus_common::{Bytes, Millicores, Name, NodeId, WorkloadKey};
use serde::{Deserialize, Serialize};

use super::{Alloc, State, Workload};

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

impl State {
    /// Workloads of an environment, in the order of their names. Costs what there are of them.
    pub(crate) fn workloads_in<'s>(&'s self, project: &'s Name, environment: &'s Name) -> impl Iterator<Item = &'s Arc<Workload>> + 's {
        // No name is shorter than this one, so none comes before it.
        let first =
            Name::new("a").ok().map(|workload| WorkloadKey { project: project.clone(), environment: environment.clone(), workload });
        let rows = first.map(|first| self.workloads.range(first..)).into_iter().flatten();
        rows.map(|(_, row)| row).take_while(move |row| row.key.project == *project && row.key.environment == *environment)
    }

    fn workloads_beside<'s>(&'s self, key: &'s VolumeKey) -> impl Iterator<Item = &'s Arc<Workload>> + 's {
        self.workloads_in(&key.project, &key.environment)
    }

    /// Copies that have not ended and use a volume.
    pub fn volume_holders<'s>(&'s self, key: &'s VolumeKey) -> impl Iterator<Item = &'s Arc<Alloc>> + 's {
        let uses = |alloc: &&Arc<Alloc>| {
            !alloc.has_ended() && self.release(&alloc.key, alloc.release).is_some_and(|r| r.spec.placement.volumes.contains(&key.name))
        };
        self.workloads_beside(key).flat_map(|row| self.allocs_of(&row.key)).filter(uses)
    }

    /// Workloads whose present release asks for a volume.
    pub fn volume_workloads<'s>(&'s self, key: &'s VolumeKey) -> impl Iterator<Item = &'s Arc<Workload>> + 's {
        let asks = |row: &&Arc<Workload>| {
            !row.removing && self.release(&row.key, row.release).is_some_and(|r| r.spec.placement.volumes.contains(&key.name))
        };
        self.workloads_beside(key).filter(asks)
    }

    /// Somebody who uses a volume: a copy that runs says more than a workload that could.
    pub fn volume_user(&self, key: &VolumeKey) -> Option<String> {
        let holder = self.volume_holders(key).next().map(|alloc| alloc.subject());
        holder.or_else(|| self.volume_workloads(key).next().map(|row| row.key.to_string()))
    }
}
