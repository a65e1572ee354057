//! Tests that see all crates, and what they share.

pub mod api_client;
pub mod chaos_proxy;
pub mod cluster;
pub mod dice;
pub mod edge;
pub mod event_stream;
pub mod fuzz_targets;
pub mod harness;
pub mod ledger;
pub mod ledger_process;
pub mod linearizability;
pub mod load;
pub mod loop_image;
pub mod netns;
pub mod router;
pub mod scenario;
pub mod sim_agents;
