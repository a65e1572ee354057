//! Where the copies of a workload are reached, for whoever routes requests to them, and what routers have to say.
//!
//! A set is a function of the state. Its **generation** is the index at which it last changed; a router that says it has
//! taken on a generation has taken on all up to it. A copy that serves is stopped only after every router that is
//! heard of has taken on a set without it, or two seconds passed. `docs/endpoints.md` is the protocol.

use optimus_common::api::v1::{Endpoint, EndpointSet};
use optimus_common::{Span, Timestamp, WorkloadKey};

use crate::state::{Alloc, RouterRow, State};

/// A router that says nothing for so long is not waited for, and forgotten.
pub const ROUTER_SILENT: Span = Span::secs(300);
/// Weight of a copy where nothing is to be weighed.
pub const WEIGHT_PLAIN: u32 = 100;

/// The endpoints of a workload. None: there is no such workload.
pub fn set(state: &State, key: &WorkloadKey) -> Option<EndpointSet> {
    let workload = state.workload(key)?;
    let answers = |a: &Alloc| state.nodes.get(&a.node).is_some_and(|n| n.up);
    let serves = |a: &&std::sync::Arc<Alloc>| a.run && a.is_ready() && a.draining_since.is_none() && !a.ports.is_empty();
    let mut copies: Vec<&Alloc> = state.allocs_of(key).filter(serves).map(|a| &**a).collect();
    // Control plane and node may not see each other while clients see both: better one that may be there than none.
    if copies.iter().any(|a| answers(a)) {
        copies.retain(|a| answers(a));
    }
    let deployment = workload.deployment.and_then(|id| state.deployments.get(&id)).filter(|d| !d.phase.is_final());
    let share = deployment.and_then(|d| Some((d.release, d.weight?)));
    let (new, old) = weights(share.map(|(_, weight)| weight), || {
        let new = copies.iter().filter(|a| share.is_some_and(|(release, _)| a.release == release)).count() as u32;
        (new, copies.len() as u32 - new)
    });
    let shown = |a: &&Alloc| Endpoint {
        alloc: a.id,
        name: a.name(),
        release: a.release,
        address: state.nodes.get(&a.node).map(|n| n.facts.address.clone()).unwrap_or_default(),
        ports: a.ports.iter().cloned().collect(),
        weight: if share.is_some_and(|(release, _)| a.release == release) { new } else { old },
    };
    let generation = state.routes.get(key).copied().unwrap_or(0);
    Some(EndpointSet { key: key.clone(), generation, endpoints: copies.iter().map(shown).collect() })
}

/// The weights of a copy of the new and of the old release, so that all copies of the new one together get `percent`.
fn weights(percent: Option<u32>, count: impl Fn() -> (u32, u32)) -> (u32, u32) {
    let (Some(percent), (new, old)) = (percent, count()) else { return (WEIGHT_PLAIN, WEIGHT_PLAIN) };
    // Who is alone gets all of it.
    if new == 0 || old == 0 {
        return (WEIGHT_PLAIN, WEIGHT_PLAIN);
    }
    let percent = percent.min(100);
    let (new, old) = (percent * old, (100 - percent) * new);
    let divisor = gcd(new, old).max(1);
    (new / divisor, old / divisor)
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Routers that are heard of.
fn routers(state: &State, now: Timestamp) -> impl Iterator<Item = &RouterRow> {
    state.routers.values().filter(move |row| now.since(row.heard_at) < ROUTER_SILENT)
}

/// Whether every router has taken on the present endpoints of a workload.
pub(crate) fn acknowledged(state: &State, key: &WorkloadKey, now: Timestamp) -> bool {
    let generation = state.routes.get(key).copied().unwrap_or(0);
    routers(state, now).all(|row| row.generation >= generation)
}

/// Whether routers may be sending requests to a copy.
pub(crate) fn is_routed(state: &State, alloc: &Alloc, now: Timestamp) -> bool {
    let serves = alloc.run && alloc.is_ready() && !alloc.ports.is_empty();
    serves && state.nodes.get(&alloc.node).is_some_and(|n| n.up) && routers(state, now).next().is_some()
}

/// Whether every router knows that a copy gets no more requests.
pub(crate) fn is_released(state: &State, alloc: &Alloc, now: Timestamp) -> bool {
    alloc.unrouted_at.is_none_or(|generation| routers(state, now).all(|row| row.generation >= generation))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_make_the_share_whatever_the_numbers() {
        for (percent, new, old) in [(10, 2, 10), (50, 1, 9), (1, 3, 7), (0, 2, 2), (100, 4, 4), (33, 10_000, 9_999)] {
            let (for_new, for_old) = weights(Some(percent), || (new, old));
            let (all_new, all_old) = (u64::from(for_new) * u64::from(new), u64::from(for_old) * u64::from(old));
            assert_eq!(all_new * 100, (all_new + all_old) * u64::from(percent), "{percent} % of {new} and {old}");
        }
        assert_eq!(weights(Some(0), || (3, 0)), (WEIGHT_PLAIN, WEIGHT_PLAIN), "nobody else is there");
        assert_eq!(weights(None, || (3, 3)), (WEIGHT_PLAIN, WEIGHT_PLAIN));
    }
}
