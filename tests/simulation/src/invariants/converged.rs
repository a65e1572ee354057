//! After the heal all servers hold the same state.

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct Converged;

impl Invariant for Converged {
    fn name(&self) -> &'static str {
        "converged"
    }

    fn on(&mut self, event: &Event<'_>, _: &Model) -> Result<(), String> {
        let Event::End(end) = event else { return Ok(()) };
        let mut states = end.states.iter();
        let Some((first, state)) = states.next() else { return Err("no server runs at the end".to_owned()) };
        match states.find(|(_, other)| *other != state) {
            Some((other, its)) => Err(format!("servers {first} (at {}) and {other} (at {}) differ", state.index, its.index)),
            None => Ok(()),
        }
    }
}
