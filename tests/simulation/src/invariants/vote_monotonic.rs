//! Monotonic vote: a server's vote never goes back: not to a lower term, not to another candidate that does not
//! supersede it, and not from granted to not granted except by our own guard at start.

use optimus_control_plane::raft::runtime::Stored;

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct VoteMonotonic;

impl Invariant for VoteMonotonic {
    fn name(&self) -> &'static str {
        "monotonic vote"
    }

    fn on(&mut self, event: &Event<'_>, model: &Model) -> Result<(), String> {
        let (server, now) = match *event {
            Event::Stored { server, what: Stored::Vote(term, of, _) } => (server, Some((*term, *of))),
            Event::Stored { server, what: Stored::Opened { vote, .. } } => (server, vote.map(|v| (v.0, v.1))),
            _ => return Ok(()),
        };
        let known = model.server(server);
        let held = known.vote.map(|v| (v.0, v.1));
        if held > now && !known.damaged {
            return Err(format!("server {server} had voted for {held:?}, now {now:?}"));
        }
        Ok(())
    }
}
