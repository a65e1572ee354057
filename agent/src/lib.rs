//! The agent: makes what the control plane decided true on one host.
//!
//! It never decides placement, and never needs the control plane to keep what runs running.

pub mod isolation;
pub mod link;
pub mod workloads;
