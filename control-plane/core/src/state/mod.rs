//! The replicated state: tables over persistent maps, so a reader's snapshot is one clone.

mod alloc;
pub mod apply;
pub mod command;
mod indexes;
mod operations;
pub mod snapshot;
pub mod tables;

pub use command::{
    Applied, Command, DeployItem, DeploymentStep, LEVEL, NodeChange, Placement, Plan, Proposal, Refusal, RunOrder, RunStep, ServerFacts,
};
pub use tables::*;
