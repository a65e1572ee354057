//! The agent: makes what the control plane decided true on one host.
//!
//! It never decides placement, and never needs the control plane to keep what runs running.

pub mod agent;
pub mod alloc;
pub mod devices;
pub mod driver;
pub mod facts;
pub mod health;
pub mod isolation;
pub mod ledger;
pub mod link;
pub mod logs;
pub mod manager;
pub mod metrics;
mod nvml;
pub mod placing;
pub mod ports;
#[doc(hidden)]
pub mod testing;
pub mod volumes;
pub mod workloads;
