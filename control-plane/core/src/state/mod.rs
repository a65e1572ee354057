//! The replicated state: tables over persistent maps, so a reader's snapshot is one clone.

pub mod command;
pub mod tables;

pub use command::{Applied, Command, Proposal};
pub use tables::*;
