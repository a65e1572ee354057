//! The handlers of `/v1`, a file per resource.

pub(crate) mod actions;
pub(crate) mod allocations;
pub(crate) mod cluster;
pub(crate) mod deploy;
pub(crate) mod deployments;
pub(crate) mod events;
pub(crate) mod export;
pub(crate) mod nodes;
pub(crate) mod system;
pub(crate) mod tokens;
pub(crate) mod workloads;

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
}
