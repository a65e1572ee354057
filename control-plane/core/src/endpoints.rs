//! Where the copies of a workload are reached, for whoever routes requests to them.

use optimus_common::WorkloadKey;

use crate::state::{Alloc, State};

/// Whether every router has taken on the present endpoints of a workload.
pub fn acknowledged(_state: &State, _key: &WorkloadKey) -> bool {
    true
}

/// Whether routers may be sending requests to a copy.
pub(crate) fn is_routed(_state: &State, _alloc: &Alloc) -> bool {
    false
}

/// Whether every router knows that a copy gets no more requests.
pub(crate) fn is_released(_state: &State, _alloc: &Alloc) -> bool {
    true
}
