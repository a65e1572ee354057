//! The replicated state: tables over persistent maps, so a reader's snapshot is one clone.

mod alloc;
pub mod apply;
pub mod authority;
pub mod command;
mod indexes;
mod operations;
mod placing;
mod secrets;
pub mod snapshot;
pub mod tables;

pub use authority::{
    Authorities, Left, Member, OVERLAP, OVERLAP_DEFAULT, Rewrap, Rotation, RotationPhase, RotationVerdict, explain_rotation,
    judge_rotation, rotation_waits_for,
};
pub use command::{
    Applied, Command, DeployItem, DeploymentStep, LEVEL, NewLimits, NodeChange, Placement, Plan, Proposal, Refusal, RunOrder, RunStep,
    ServerFacts, Steering,
};
pub use placing::*;
pub use secrets::*;
pub use tables::*;
