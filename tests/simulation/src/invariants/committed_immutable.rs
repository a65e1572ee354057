//! Committed immutable: an entry once committed is never another one, on any server.

use optimus_control_plane::raft::runtime::Stored;

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct CommittedImmutable;

impl Invariant for CommittedImmutable {
    fn name(&self) -> &'static str {
        "committed immutable"
    }

    fn on(&mut self, event: &Event<'_>, model: &Model) -> Result<(), String> {
        match *event {
            Event::Stored { server, what: Stored::Committed(upto) } => {
                let known = model.server(server);
                for index in known.committed + 1..=upto.index {
                    let (Some(here), Some(first)) = (known.log.get(&index), model.committed.get(&index)) else { continue };
                    if here != first {
                        return Err(format!("entry {index} is committed as {here:?} on server {server}, it was as {first:?}"));
                    }
                }
                Ok(())
            }
            Event::Stored { server, what: Stored::Truncating(from) } => {
                let known = model.server(server);
                let lost = known.log.range(from..).find(|(index, leader)| model.committed.get(index) == Some(leader));
                match lost {
                    Some((index, leader)) => Err(format!("server {server} removes entry {index} of {leader:?}, which is committed")),
                    None => Ok(()),
                }
            }
            _ => Ok(()),
        }
    }
}
