//! Tests that see all crates, and what they share.

pub mod harness;
pub mod scenario;
