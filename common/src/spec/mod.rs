//! What a user asks to run: the workload spec, after parsing and with every default filled in.
//!
//! `optimus.toml` and the API's JSON are read by [`parse`] (unknown keys refused, errors with a
//! place); these types are what comes out, what the control plane stores and what agents receive.
//! They carry no default that depends on the reader: a stored spec means the same for ever.

pub mod types;

pub use types::*;
