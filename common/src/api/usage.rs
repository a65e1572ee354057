//! What hosts and copies used, over time.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::ids::{AllocId, NodeId, WorkloadKey};
use crate::metric::{Metric, Unit};
use crate::time::{Span, Timestamp};
use crate::units::{Bytes, Millicores};

/// Series over one range of time. Values have three significant digits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MetricHistory {
    /// Start of the first point.
    pub from: Timestamp,
    /// End of the last point.
    pub to: Timestamp,
    /// Time of one point.
    pub step: Span,
    /// In the order asked for.
    pub series: Vec<MetricSeries>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MetricSeries {
    pub metric: Metric,
    pub unit: Unit,
    /// A value a step; null where nothing was measured.
    pub mean: Vec<Option<u64>>,
    /// The largest sample of each step.
    pub max: Vec<Option<u64>>,
}

/// What hosts, or copies, use now: those that use most.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct UsageList {
    pub items: Vec<UsageRow>,
    /// How many there are, of which `items` are the first.
    pub total: u64,
    /// Names of hosts whose figures are missing: they do not answer, or are connected to another server. At most 100.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
    /// State index the names were read at.
    pub index: u64,
}

/// One host, or one copy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct UsageRow {
    pub node: NodeId,
    pub node_name: String,
    /// Unset: the host itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocation: Option<UsageCopy>,
    /// How old the figures are.
    pub age: Span,
    /// Since the figures before; unset for the first ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Millicores>,
    /// Of the host, or the copy's limit.
    pub cpu_limit: Millicores,
    /// Memory that cannot be taken back without harm.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Bytes>,
    /// Of the host, or the copy's limit.
    pub memory_limit: Bytes,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pids: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct UsageCopy {
    pub id: AllocId,
    /// `web-0`
    pub name: String,
    #[serde(flatten)]
    pub key: WorkloadKey,
}
