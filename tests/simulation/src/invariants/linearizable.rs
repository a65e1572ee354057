//! Reads and writes of clients are linearizable, key by key.

use crate::history::check;

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct Linearizable;

impl Invariant for Linearizable {
    fn name(&self) -> &'static str {
        "linearizable"
    }

    fn on(&mut self, event: &Event<'_>, _: &Model) -> Result<(), String> {
        match event {
            Event::End(end) => check(&end.history).map_err(|e| e.to_string()),
            _ => Ok(()),
        }
    }
}
