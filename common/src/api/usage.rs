//! What hosts and copies used, over time.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::metric::{Metric, Unit};
use crate::time::{Span, Timestamp};

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
