//! Quotas, pools and volumes; what a node holds.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::{Name, NodeId, WorkloadKey};
use crate::units::{Bytes, Millicores};

/// `PUT /v1/projects/{project}/quota`, and the same of one environment: the most that may be reserved together.
/// What is left out has no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct QuotaLimits {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Millicores>,
    /// Memory requests, not limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Bytes>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Bytes>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copies: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devices: Option<u32>,
}

/// What copies that have not ended reserve together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct QuotaUsed {
    pub cpu: Millicores,
    pub memory: Bytes,
    pub disk: Bytes,
    pub copies: u64,
    pub devices: u64,
}

/// The quota of a project, or of one of its environments.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Quota {
    pub project: Name,
    /// Unset: the whole project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub environment: Option<Name>,
    pub limits: QuotaLimits,
    pub used: QuotaUsed,
}

/// How copies are laid out over the nodes of a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PoolLayout {
    /// The node with the most room.
    #[default]
    Spread,
    /// The fullest node that still has room, so that whole nodes stay free.
    BinPack,
}

/// `PUT /v1/pools/{pool}`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolSettings {
    pub layout: PoolLayout,
}

/// Nodes that workloads ask for by one name. A pool is there once a node is in it, or something was set for it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Pool {
    pub name: String,
    pub layout: PoolLayout,
    /// False: nothing was set, the layout is the usual one.
    pub set: bool,
    pub nodes: u32,
    pub nodes_up: u32,
    /// Names of its nodes, at most 100.
    pub node_names: Vec<String>,
    pub copies: u32,
    /// What its nodes have for copies, and what of it is reserved.
    pub cpu: Millicores,
    pub cpu_reserved: Millicores,
    pub memory: Bytes,
    pub memory_reserved: Bytes,
}

/// `PUT /v1/projects/{project}/envs/{env}/volumes/{volume}`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeRequest {
    /// Name or id of the node it lives on.
    pub node: String,
}

/// A named directory on one node. It outlives copies and releases; nothing but a request deletes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    pub project: Name,
    pub environment: Name,
    pub name: Name,
    pub node: NodeId,
    pub node_name: String,
    /// Its node answers.
    pub node_up: bool,
    /// Names of the copies that hold it, at most 100.
    pub holders: Vec<String>,
    /// Workloads whose present release asks for it, at most 100.
    pub workloads: Vec<WorkloadKey>,
    /// Nobody holds it or asks for it.
    pub orphan: bool,
}

/// Answer to removing a quota, a pool's settings or a volume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RemoveAnswer {
    pub index: u64,
    /// False for a dry run.
    pub changed: bool,
}

/// A device of a node, and who has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NodeDevice {
    /// `nvidia/gpu/a100`
    pub kind: String,
    pub id: String,
    /// Device files of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<String>,
    /// The copy it was given to: `shop/prod/web-0`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<String>,
}

/// A device of a copy's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AllocationDevice {
    /// `nvidia/gpu/a100`
    pub kind: String,
    pub id: String,
}

/// What of a node is kept for the host itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeReserve {
    pub cpu: Millicores,
    pub memory: Bytes,
    pub disk: Bytes,
}
