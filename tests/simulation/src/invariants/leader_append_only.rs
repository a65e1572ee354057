//! Leader append-only, and no holes: a leader never removes entries of its log, and every log grows at its end.

use optimus_control_plane::raft::runtime::Stored;

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct LeaderAppendOnly;

impl Invariant for LeaderAppendOnly {
    fn name(&self) -> &'static str {
        "leader append-only"
    }

    fn on(&mut self, event: &Event<'_>, model: &Model) -> Result<(), String> {
        match *event {
            Event::Stored { server, what: Stored::Truncating(from) } => {
                let known = model.server(server);
                // Its own vote being the newest says that it has not yet heard of another leader.
                let own = known.vote.is_some_and(|(_, of, granted)| of == server && granted);
                if known.leads && own && known.log.keys().next_back().is_some_and(|last| last >= from) {
                    return Err(format!("server {server} leads and removes its entries from {from} on"));
                }
            }
            Event::Stored { server, what: Stored::Appended(entries) } => {
                let mut next = model.server(server).log.keys().next_back().map(|last| last + 1);
                for entry in entries {
                    if next.is_some_and(|next| next != entry.index) {
                        return Err(format!("server {server} appended entry {}, expected {}", entry.index, next.unwrap_or(0)));
                    }
                    next = Some(entry.index + 1);
                }
            }
            _ => {}
        }
        Ok(())
    }
}
