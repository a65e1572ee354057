//! The control plane: replicated state, the loops that drive it, and the gateways in front of it.

pub mod raft;
