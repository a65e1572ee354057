//! Tests that see all crates, and what they share.

pub mod chaos_proxy;
pub mod event_stream;
pub mod fuzz_targets;
pub mod harness;
pub mod linearizability;
pub mod scenario;
