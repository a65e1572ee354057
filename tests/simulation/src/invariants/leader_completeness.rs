//! Leader completeness: who is elected holds every entry that was committed before.

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct LeaderCompleteness;

impl Invariant for LeaderCompleteness {
    fn name(&self) -> &'static str {
        "leader completeness"
    }

    fn on(&mut self, event: &Event<'_>, model: &Model) -> Result<(), String> {
        let Event::Leads { server, term } = *event else { return Ok(()) };
        let known = model.server(server);
        match model.committed.iter().find(|(index, leader)| leader.0 < term && !known.holds(**index, **leader)) {
            Some((index, leader)) => {
                Err(format!("server {server} leads term {term} without entry {index} of {leader:?}, which is committed"))
            }
            None => Ok(()),
        }
    }
}
