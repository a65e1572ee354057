//! What agents tell of the use of resources: newest figures as a stream of changes, and history on request.

use serde::{Deserialize, Serialize};

use crate::figures::Change;
use crate::ids::AllocId;
use crate::time::{Span, Timestamp};

/// Time between two [`Usage`] frames when nobody watches.
pub const USAGE_EVERY: Span = Span::secs(10);
/// And while somebody does.
pub const USAGE_WATCHED: Span = Span::secs(1);
/// Most points of one metric in an answer.
pub const POINTS_MAX: u64 = 2000;

/// What a node and its copies use, on a stream of the agent's own: what changed since the frame before, all of it in the
/// first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// The agent's clock.
    pub at: Timestamp,
    pub host: Vec<Change>,
    pub allocs: Vec<AllocUsage>,
    /// No longer measured.
    pub gone: Vec<AllocId>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllocUsage {
    pub alloc: AllocId,
    pub changes: Vec<Change>,
}

/// How often the server wants [`Usage`] from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageEvery {
    pub every: Span,
}

/// Asks an agent for the history of one subject, on a stream of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryRequest {
    /// Unset: the host.
    pub alloc: Option<AllocId>,
    /// Numbers of [`Metric`](crate::Metric)s, those of the answer's columns.
    pub metrics: Vec<u8>,
    /// Inclusive.
    pub from: Timestamp,
    /// Exclusive.
    pub to: Timestamp,
    pub step: Span,
}

/// For each metric asked for, a point for each step; unset where nothing was measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryAnswer {
    pub series: Vec<Vec<Option<Point>>>,
}

/// A metric over the time of one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Point {
    pub mean: u64,
    pub max: u64,
}
