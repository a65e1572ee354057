//! Tells quickly that nothing is to be done for a service: most services, most of the time.

use optimus_common::spec::Kind;

use crate::state::{State, Workload};

/// True: it is a service, every slot holds one copy of the release on a node that answers, nothing is on its way, and
/// no record is to be dropped. False says nothing. One pass over the copies, which come by slot and age; nothing is
/// allocated.
pub(super) fn is_at_rest(state: &State, workload: &Workload) -> bool {
    let newest = workload.deployment.and_then(|id| state.deployments.get(&id));
    if workload.stopped || workload.removing || newest.is_some_and(|d| !d.phase.is_final()) {
        return false;
    }
    // The runs of a job have their own times, and a daemon follows the nodes.
    if state.release(&workload.key, workload.release).is_none_or(|r| r.spec.kind != Kind::Service) {
        return false;
    }
    let (mut next_slot, mut ended) = (0, (0, 0));
    for alloc in state.allocs_of(&workload.key) {
        if alloc.has_ended() {
            ended = if ended.0 == alloc.index { (alloc.index, ended.1 + 1) } else { (alloc.index, 1) };
            if ended.1 > super::ENDED_KEPT || (alloc.index >= workload.copies && !alloc.is_release_step()) {
                return false;
            }
            continue;
        }
        let good = alloc.run
            && alloc.index == next_slot
            && alloc.release == workload.release
            && !alloc.is_leaving()
            && !alloc.phase().is_terminal()
            && state.nodes.get(&alloc.node).is_some_and(|n| n.up);
        if !good {
            return false;
        }
        next_slot += 1;
    }
    next_slot == workload.copies
}
