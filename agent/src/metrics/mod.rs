//! What this host and its copies use: sampled every second from file handles that stay open, kept here for hours,
//! sent to the control plane every few seconds.
//!
//! ```text
//!   sampler ── Reading (totals as the kernel counts them) ──► rates ──► Row (a value a metric) ──► history (chunks in sled)
//!                        └───────────────────────────────────────────► link: newest readings, as deltas
//! ```
//!
//! A **row** holds all metrics of one subject (the host, or an allocation) at one time, each with three significant
//! digits. Nothing here decides anything, and all of it may be lost: it says how things were, not how they should be.

pub mod bits;
pub mod chunk;
pub mod collector;
pub mod files;
pub mod group;
pub mod history;
pub mod host;
pub mod probed;
pub mod rates;

pub use optimus_common::metric::{Metric, Unit};
