//! Monotonic commit index: what a server takes as committed never goes back while it runs.

use optimus_control_plane::raft::runtime::Stored;

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct CommitMonotonic;

impl Invariant for CommitMonotonic {
    fn name(&self) -> &'static str {
        "monotonic commit index"
    }

    fn on(&mut self, event: &Event<'_>, model: &Model) -> Result<(), String> {
        let Event::Stored { server, what: Stored::Committed(upto) } = *event else { return Ok(()) };
        let before = model.server(server).committed;
        if upto.index < before {
            return Err(format!("server {server} went from {before} to {}", upto.index));
        }
        Ok(())
    }
}
