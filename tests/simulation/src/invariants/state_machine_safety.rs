//! State machine safety: what one server applies at an index, every server applies there, with the same state after it.

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct StateMachineSafety;

impl Invariant for StateMachineSafety {
    fn name(&self) -> &'static str {
        "state machine safety"
    }

    fn on(&mut self, event: &Event<'_>, model: &Model) -> Result<(), String> {
        match *event {
            Event::Applied { server, index, n, proposal, after, .. } => {
                let Some(canon) = model.canon.get(&index) else { return Ok(()) };
                if let Some(other) = canon.proposals.get(n).filter(|other| *other != proposal) {
                    return Err(format!("server {server} applied another command {n} at {index}: {proposal:?}, others {other:?}"));
                }
                if let Some(other) = canon.states.get(n).filter(|other| *other != after) {
                    return Err(format!("server {server} has another state after command {n} at {index}; {}", difference(other, after)));
                }
            }
            Event::Restored { server, state } if state.index > 0 => {
                let Some(canon) = model.canon.get(&state.index).and_then(|c| c.states.last()) else { return Ok(()) };
                if canon != state {
                    return Err(format!("server {server} restored another state at {}; {}", state.index, difference(canon, state)));
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// The first table that differs.
fn difference(a: &optimus_core::state::State, b: &optimus_core::state::State) -> String {
    let tables = [
        ("nodes", a.nodes == b.nodes),
        ("workloads", a.workloads == b.workloads),
        ("releases", a.releases == b.releases),
        ("allocs", a.allocs == b.allocs),
        ("deployments", a.deployments == b.deployments),
        ("events", a.events == b.events),
        ("requests", a.requests == b.requests),
        ("failures", a.failures == b.failures),
    ];
    let differ: Vec<&str> = tables.iter().filter(|(_, same)| !same).map(|(name, _)| *name).collect();
    format!("tables that differ: {differ:?}")
}
