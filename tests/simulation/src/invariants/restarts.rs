//! A server starts again after any crash; only a damaged disk is refused, and then with the file and what to do.

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct Restarts;

impl Invariant for Restarts {
    fn name(&self) -> &'static str {
        "restarts"
    }

    fn on(&mut self, event: &Event<'_>, model: &Model) -> Result<(), String> {
        let Event::Refused { server, reason, expected } = *event else { return Ok(()) };
        if model.server(server).damaged {
            let names_file = reason.contains("raft.redb") || reason.contains("raft.journal") || reason.contains("snapshot-");
            return if names_file {
                Ok(())
            } else {
                Err(format!("server {server} refuses its damaged disk without naming the file: {reason}"))
            };
        }
        if expected { Ok(()) } else { Err(format!("server {server} cannot start: {reason}")) }
    }
}
