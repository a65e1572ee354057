//! I3: after everything is healed, what runs is what should run, in bounded time.

use std::collections::BTreeSet;

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct DesiredIsActual;

impl Invariant for DesiredIsActual {
    fn name(&self) -> &'static str {
        "desired is actual (I3)"
    }

    fn on(&mut self, event: &Event<'_>, model: &Model) -> Result<(), String> {
        let Event::End(end) = event else { return Ok(()) };
        if !end.writable {
            return Err("no write was accepted in time after the heal".to_owned());
        }
        if let Some(what) = &end.unsettled {
            return Err(format!("not settled in time after the heal: {what}"));
        }
        let Some(state) = model.newest() else { return Err("nothing was ever applied".to_owned()) };
        let wanted: BTreeSet<_> = state.allocs.values().filter(|a| a.run).map(|a| (a.node, a.id)).collect();
        let actual: BTreeSet<_> = end.processes.iter().copied().collect();
        match wanted.symmetric_difference(&actual).next() {
            Some((node, alloc)) => Err(format!("copy {alloc} on {node}: wanted and running differ")),
            None => Ok(()),
        }
    }
}
