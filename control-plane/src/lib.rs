//! The shell of the control plane: consensus, leader loops, agent gateway, HTTP API.
//!
//! Decisions are in `optimus-core`; here they are acted on.

pub mod leader;
pub mod memory_store;
pub mod store;
