//! Every decision of the control plane, pure.
//!
//! Core never reads a clock, draws a random number, opens a file or a socket: what is uncertain is
//! fixed by the proposer and comes in as an argument. `apply` gives the same state on every server.
#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

pub mod deployments;
pub mod drain;
pub mod endpoints;
pub mod jobs;
pub mod reconciler;
pub mod scheduler;
pub mod state;
pub mod view;

#[cfg(test)]
mod tests;
