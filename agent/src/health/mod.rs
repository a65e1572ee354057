//! Health checks: is a copy ready for traffic, is it stuck.
//!
//! [`probe_state`] turns single answers into a verdict (thresholds, grace) and decides when to ask next; it
//! is pure. [`check`] asks once, bounded in time and bytes. [`prober`] is the loop between the two.

pub mod check;
pub mod probe_state;
pub mod prober;
