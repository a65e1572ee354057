//! Monotonic applied index: a server applies entries in order while it runs, and none twice.

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct AppliedMonotonic;

impl Invariant for AppliedMonotonic {
    fn name(&self) -> &'static str {
        "monotonic applied index"
    }

    fn on(&mut self, event: &Event<'_>, model: &Model) -> Result<(), String> {
        let (server, index, first) = match *event {
            Event::Applied { server, index, n, .. } => (server, index, n == 0),
            Event::Restored { server, state } => (server, state.index, false),
            _ => return Ok(()),
        };
        let before = model.server(server).applied;
        if index < before || (first && index == before) {
            return Err(format!("server {server} applied {index} after {before}"));
        }
        Ok(())
    }
}
