//! The shell of the control plane: consensus, leader loops, agent gateway, HTTP API.
//!
//! Decisions are in `optimus-core`; here they are acted on.

pub mod agent_calls;
pub mod api;
pub mod auth;
pub mod consensus;
pub mod gateway;
pub mod identity;
pub mod join_tokens;
pub mod leader;
pub mod memory_store;
pub mod metrics;
pub mod raft;
pub mod rescue;
pub mod server;
pub mod store;
