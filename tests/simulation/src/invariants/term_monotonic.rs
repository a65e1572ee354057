//! Monotonic term: the term of a server never goes back, also not over a restart.

use optimus_control_plane::raft::runtime::Stored;

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct TermMonotonic;

impl Invariant for TermMonotonic {
    fn name(&self) -> &'static str {
        "monotonic term"
    }

    fn on(&mut self, event: &Event<'_>, model: &Model) -> Result<(), String> {
        let (server, now) = match *event {
            Event::Stored { server, what: Stored::Vote(term, ..) } => (server, *term),
            Event::Stored { server, what: Stored::Opened { vote, .. } } => (server, vote.map_or(0, |v| v.0)),
            _ => return Ok(()),
        };
        let known = model.server(server);
        match known.vote {
            Some((term, ..)) if term > now && !known.damaged => Err(format!("server {server} went from term {term} to {now}")),
            _ => Ok(()),
        }
    }
}
