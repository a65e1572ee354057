//! The shell of the control plane: consensus, leader loops, agent gateway, HTTP API.
//!
//! Decisions are in `optimus-core`; here they are acted on.

pub mod leader;
pub mod memory_store;
pub mod store;
//! The control plane: replicated state, the loops that drive it, and the gateways in front of it.
pub mod raft;
