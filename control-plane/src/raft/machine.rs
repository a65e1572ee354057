//! What the replicated state must offer. The pure core implements this without knowing Raft.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Writes a captured state out; runs later, off the apply path, possibly on another thread.
pub type Capture = Box<dyn FnOnce() -> Vec<u8> + Send>;

/// The replicated state machine.
///
/// Two servers that apply the same commands in the same order must hold the same state, so nothing here may look at a
/// clock, a random source, the environment or the order of a hash map.
pub trait Machine: Send + Sync + 'static {
    /// One user command. Stored as MessagePack with field names, so fields may be added with `#[serde(default)]`;
    /// a command this binary cannot decode stops the server.
    type Command: Serialize + DeserializeOwned + Clone + Debug + Send + Sync + 'static;
    /// What applying a command answers, refusals included.
    type Answer: Serialize + DeserializeOwned + Clone + Debug + Send + Sync + 'static;

    /// Applies one committed command. Deterministic and total.
    ///
    /// Commands that were batched into one log entry share its `index` and are applied in order.
    fn apply(&mut self, index: u64, command: Self::Command) -> Self::Answer;

    /// Whether applying the command twice, with others in between, has the effect of applying it once: because the state
    /// remembers its request id, or by its nature. Only such a command is sent again when it is not known whether the
    /// first one took effect.
    fn retry_safe(_command: &Self::Command) -> bool {
        false
    }

    /// Captures the state now, cheaply (a pointer copy of persistent maps), and returns how to write it out later.
    fn snapshot(&self) -> Capture;

    /// Replaces the state by one written by [`Machine::snapshot`].
    ///
    /// # Errors
    /// Why the bytes are not a state this binary understands; the server stops.
    fn restore(&mut self, bytes: &[u8]) -> Result<(), String>;

    /// Called once after a run of applies, and after a restore: everything up to `index` may now be shown to readers.
    fn published(&mut self, index: u64);
}
