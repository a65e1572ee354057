//! The shell of the control plane: consensus, leader loops, agent gateway, HTTP API.
//!
//! Decisions are in `optimus-core`; here they are acted on.

pub mod agent_calls;
pub mod announce;
pub mod api;
pub mod auth;
pub mod cluster_admin;
pub mod consensus;
pub mod federation;
pub mod gateway;
pub mod identity;
pub mod join_tokens;
pub mod leader;
pub mod membership;
pub mod memory_store;
pub mod metrics;
pub mod peer_link;
pub mod peers;
pub mod raft;
pub mod rescue;
pub mod rotation;
pub mod server;
pub mod server_clock;
pub mod store;
