//! State ordering: purged <= durable snapshot, and applied <= committed <= last entry held, on each server.

use optimus_control_plane::raft::runtime::Stored;

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct StateOrdering;

impl Invariant for StateOrdering {
    fn name(&self) -> &'static str {
        "state ordering"
    }

    fn on(&mut self, event: &Event<'_>, model: &Model) -> Result<(), String> {
        let at_most = |server: u64, low: &str, a: u64, high: &str, b: u64| {
            if a > b { Err(format!("server {server}: {low} {a} is beyond {high} {b}")) } else { Ok(()) }
        };
        match *event {
            Event::Stored { server, what: Stored::Purging(upto) } => {
                at_most(server, "purged", upto.index, "its durable snapshot", model.server(server).snapshot.unwrap_or(0))
            }
            Event::Stored { server, what: Stored::Committed(upto) } => {
                at_most(server, "committed", upto.index, "its last entry", model.server(server).last())
            }
            Event::Applied { server, index, .. } => {
                let known = model.server(server);
                at_most(server, "applied", index, "committed", known.committed.max(known.snapshot.unwrap_or(0)))
            }
            Event::Stored { server, what: Stored::Opened { purged, snapshot, .. } } if !model.server(server).damaged => {
                let index = |mark: &Option<_>| mark.as_ref().map_or(0, |m: &optimus_control_plane::raft::runtime::Mark| m.index);
                at_most(server, "purged on disk", index(purged), "the snapshot on disk", index(snapshot))
            }
            _ => Ok(()),
        }
    }
}
