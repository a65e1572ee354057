//! The shell of the control plane: consensus, leader loops, agent gateway, HTTP API.
//!
//! Decisions are in `optimus-core`; here they are acted on.

pub mod agent_calls;
pub mod consensus;
pub mod gateway;
pub mod identity;
pub mod join_tokens;
pub mod leader;
pub mod memory_store;
pub mod raft;
pub mod store;
