//! The shell of the control plane: consensus, leader loops, agent gateway, HTTP API.
//!
//! Decisions are in `optimus-core`; here they are acted on.

pub mod agent_calls;
pub mod api;
pub mod auth;
pub mod join_tokens;
pub mod metrics;
pub mod store;
