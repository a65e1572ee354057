//! Election safety: a leader id (term and server) is led by one process only. openraft's leader ids carry the server, so
//! what can go wrong is a server that leads again, after a restart, without a new election.

use std::collections::BTreeMap;

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct ElectionSafety {
    /// The life in which a server led in a term.
    led: BTreeMap<(u64, u64), u64>,
}

impl Invariant for ElectionSafety {
    fn name(&self) -> &'static str {
        "election safety"
    }

    fn on(&mut self, event: &Event<'_>, model: &Model) -> Result<(), String> {
        let Event::Leads { server, term } = *event else { return Ok(()) };
        let life = model.server(server).life;
        let first = *self.led.entry((term, server)).or_insert(life);
        if first != life {
            return Err(format!("server {server} leads term {term} in its lives {first} and {life}, without an election between"));
        }
        Ok(())
    }
}
