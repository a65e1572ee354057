//! Log matching: two logs that hold the same entry hold the same entry before it. Checked for each pair of neighbours, so
//! by induction it holds for whole logs.

use optimus_control_plane::raft::runtime::Stored;

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct LogMatching;

impl Invariant for LogMatching {
    fn name(&self) -> &'static str {
        "log matching"
    }

    fn on(&mut self, event: &Event<'_>, model: &Model) -> Result<(), String> {
        let (server, entries, mut before) = match *event {
            Event::Stored { server, what: Stored::Appended(entries) } => {
                let known = model.server(server);
                (server, entries, entries.first().and_then(|e| known.log.get(&e.index.checked_sub(1)?).copied()))
            }
            // What a crash left.
            Event::Stored { server, what: Stored::Opened { entries, purged, .. } } => (server, entries, purged.as_ref().map(|p| p.leader)),
            _ => return Ok(()),
        };
        for entry in entries {
            let seen = model.before.get(&(entry.index, entry.leader));
            if let (Some(here), Some(seen)) = (before, seen)
                && here != *seen
            {
                return Err(format!(
                    "entry {} of {:?} follows one of {here:?} on server {server}, of {seen:?} elsewhere",
                    entry.index, entry.leader
                ));
            }
            before = Some(entry.leader);
        }
        Ok(())
    }
}
