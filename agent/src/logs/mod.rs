//! The output of allocations: reading what the runners wrote, and keeping it within bounds.
//!
//! A runner writes `allocs/<alloc>/<attempt>/log.<n>`, one line as `<unix_ms> <O|E> text`, and starts the
//! next segment when one is full. Runners write whether or not an agent is there; this only ever reads and
//! deletes. [`segments`] finds the files, [`reader`] walks through them, [`retention`] deletes.

pub mod reader;
pub mod retention;
pub mod segments;

pub use reader::{last_lines, stream};
