//! Control groups: one directory of ours, a group per run, hard limits that are read back from the kernel.
//!
//! v2 and v1 alike; a **hybrid** host (v1 controllers with an empty v2 beside them) is driven as v1. `cgroups-rs`
//! makes groups and writes limits; because it ignores some write errors, every limit is read back, and what it
//! lacks (`memory.oom.group`, `memory.events`, the kill file) is done here.

mod detect;
pub mod devices;
mod group;
mod root;

pub use devices::DeviceNode;

pub use detect::{Detected, Hierarchy, Version, detect};
pub use group::Group;
pub use root::{CgroupRoot, OpenError, group_of};

use std::path::PathBuf;

/// What a run may use. `None`: no limit of ours.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Hard quota in thousandths of a core; also the weight against its neighbours.
    pub cpu_millicores: Option<u32>,
    /// Bytes above which the kernel kills.
    pub memory_limit: Option<u64>,
    /// Bytes the kernel takes last when the host is short.
    pub memory_request: Option<u64>,
    /// Most processes and threads.
    pub pids: Option<u32>,
}

/// What a group has used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub cpu_usec: u64,
    /// Time the group wanted to run and was held back by its quota.
    pub throttled_usec: u64,
    /// Periods in which it was held back.
    pub throttled: u64,
    pub memory_current: u64,
    pub memory_peak: u64,
    /// Processes the kernel killed for want of memory.
    pub oom_kills: u64,
    pub pids: u64,
}

/// Why a limit is not in force.
#[derive(Debug, thiserror::Error)]
pub enum SetLimitError {
    #[error("this host has no `{controller}` controller")]
    ControllerMissing { controller: &'static str },
    #[error("failed to create cgroup {}", path.display())]
    Create {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("failed to write {wanted} to {}, which is {actual}", path.display())]
    Write {
        path: PathBuf,
        wanted: String,
        actual: String,
        #[source]
        source: std::io::Error,
    },
    #[error("{} is {actual} after {wanted} was written", path.display())]
    NotTaken { path: PathBuf, wanted: String, actual: String },
    #[error("{} cannot become {wanted}: {used} bytes are in use", path.display())]
    InUse { path: PathBuf, wanted: u64, used: u64 },
}

impl SetLimitError {
    /// The limit, in the words of the spec.
    pub fn what(&self) -> String {
        match self {
            SetLimitError::ControllerMissing { controller } => format!("the {controller} limit"),
            SetLimitError::Create { .. } => "its limits".into(),
            SetLimitError::Write { path, .. } | SetLimitError::NotTaken { path, .. } | SetLimitError::InUse { path, .. } => {
                let file = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
                format!("the {} limit", file.split('.').next().unwrap_or(file))
            }
        }
    }
}
