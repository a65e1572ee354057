//! Committed on quorum: when a leader takes an entry as committed, a quorum of its voters holds it durably.

use optimus_control_plane::raft::runtime::Stored;

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct CommittedOnQuorum;

impl Invariant for CommittedOnQuorum {
    fn name(&self) -> &'static str {
        "committed on quorum"
    }

    fn on(&mut self, event: &Event<'_>, model: &Model) -> Result<(), String> {
        let Event::Stored { server, what: Stored::Committed(upto) } = *event else { return Ok(()) };
        let known = model.server(server);
        // Only the leader counts; and an entry already known as committed is not its decision.
        if !known.leads || model.committed.contains_key(&upto.index) {
            return Ok(());
        }
        let Some(voters) = known.memberships.values().next_back() else { return Ok(()) };
        for set in voters {
            let holders = set.iter().filter(|id| model.servers.get(id).is_some_and(|s| s.holds(upto.index, upto.leader))).count();
            if holders * 2 <= set.len() {
                return Err(format!("server {server} committed {} with {holders} of {set:?} holding it", upto.index));
            }
        }
        Ok(())
    }
}
