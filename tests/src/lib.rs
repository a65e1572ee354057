//! Tests that see all crates, and what they share.

pub mod fuzz_targets;
pub mod harness;
pub mod scenario;
