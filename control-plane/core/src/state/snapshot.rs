//! The state as bytes, and its digest.

use optimus_common::codec::{self, DecodeError};
use optimus_common::planted::planted;

use super::State;

/// Envelope kind and version of a snapshot.
const KIND: u16 = 1;
const VERSION: u16 = 1;

impl State {
    /// The whole state in an envelope.
    pub fn to_bytes(&self) -> Vec<u8> {
        codec::envelope(KIND, VERSION, self)
    }

    pub fn from_bytes(bytes: &[u8]) -> Result<State, DecodeError> {
        let mut state: State = codec::from_envelope(KIND, VERSION, bytes)?;
        if planted("snapshot-forgets-requests") {
            state.requests.clear();
        }
        state.reindex();
        Ok(state)
    }

    /// Equal on every server that applied the same log.
    pub fn digest(&self) -> [u8; 32] {
        *blake3::hash(&codec::to_msgpack(self)).as_bytes()
    }
}
