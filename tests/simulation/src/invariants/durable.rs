//! What a store said is durable is there after a crash: entries, vote and snapshot.

use optimus_control_plane::raft::runtime::Stored;

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct Durable;

impl Invariant for Durable {
    fn name(&self) -> &'static str {
        "durable"
    }

    fn on(&mut self, event: &Event<'_>, model: &Model) -> Result<(), String> {
        let Event::Stored { server, what: Stored::Opened { vote, purged, entries, snapshot, .. } } = *event else { return Ok(()) };
        let known = model.server(server);
        if known.damaged {
            return Ok(());
        }
        let purged = purged.as_ref().map_or(0, |p| p.index);
        let lost = known
            .log
            .iter()
            .find(|(index, leader)| **index > purged && !entries.iter().any(|e| e.index == **index && e.leader == **leader));
        if let Some((index, leader)) = lost {
            return Err(format!("server {server} lost entry {index} of {leader:?}, which it had stored"));
        }
        if known.vote.map(|v| (v.0, v.1)) > vote.map(|v| (v.0, v.1)) {
            return Err(format!("server {server} lost its vote {:?}, it has {vote:?}", known.vote));
        }
        if known.snapshot > snapshot.as_ref().map(|s| s.index) {
            return Err(format!("server {server} lost its snapshot of {:?}, it has {snapshot:?}", known.snapshot));
        }
        Ok(())
    }
}
