//! DESIGN 3.1: replaying the log from its beginning gives the state the servers hold; so does a snapshot and its tail.

use optimus_core::state::State;

use super::{Event, Invariant};
use crate::model::Model;

#[derive(Default)]
pub struct Digest;

impl Invariant for Digest {
    fn name(&self) -> &'static str {
        "digest"
    }

    fn on(&mut self, event: &Event<'_>, model: &Model) -> Result<(), String> {
        let Event::End(end) = event else { return Ok(()) };
        let half = model.canon.len() / 2;
        let mut replayed = State::default();
        for (at, (index, canon)) in model.canon.iter().enumerate() {
            for proposal in &canon.proposals {
                replayed.apply(*index, proposal.clone());
            }
            if at == half {
                // From here on it is a restored one.
                replayed = State::from_bytes(&replayed.to_bytes()).map_err(|e| format!("a snapshot of {index} cannot be read: {e}"))?;
            }
        }
        let newest = model.newest().map(State::digest);
        if newest.is_some_and(|digest| digest != replayed.digest()) {
            return Err(format!("replaying the log to {} gives another state than the servers hold", replayed.index));
        }
        for (server, state) in &end.states {
            if state.index == replayed.index && state.digest() != replayed.digest() {
                return Err(format!("server {server} ended with another digest at {}", state.index));
            }
        }
        Ok(())
    }
}
