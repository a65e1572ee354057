//! The handlers of `/v1`, a file per resource.

pub(crate) mod actions;
pub(crate) mod allocations;
pub(crate) mod cluster;
pub(crate) mod deploy;
pub(crate) mod deployments;
pub(crate) mod endpoints;
pub(crate) mod events;
pub(crate) mod export;
pub(crate) mod jobs;
pub(crate) mod nodes;
pub(crate) mod operate;
pub(crate) mod placing;
pub(crate) mod plan;
pub(crate) mod secrets;
pub(crate) mod sessions;
pub(crate) mod steering;
pub(crate) mod system;
pub(crate) mod tokens;
pub(crate) mod usage;
pub(crate) mod workloads;

use optimus_common::Span;
use serde::Deserialize;
use utoipa::IntoParams;

use super::context::Consistency;

/// Parameters of a read of one object.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct ReadQuery {
    /// `linearizable` (default) or `stale`.
    pub consistency: Option<Consistency>,
    /// Answer from no older a state than this index (`Optimus-Index` of an earlier answer): wait for it, up to 5 s.
    pub min_index: Option<u64>,
    /// With `consistency=stale`: refuse (503) if this server has not heard the leader for longer.
    pub max_staleness: Option<Span>,
}
