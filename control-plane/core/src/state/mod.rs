//! The replicated state: tables over persistent maps, so a reader's snapshot is one clone.

mod alloc;
pub mod apply;
pub mod command;
mod indexes;
mod placing;
pub mod snapshot;
pub mod tables;

pub use command::{Applied, Command, DeployItem, DeploymentStep, LEVEL, Placement, Plan, Proposal, Refusal, ServerFacts};
pub use placing::*;
pub use tables::*;
