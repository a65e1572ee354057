//! What a user asks to run: the workload spec, after parsing and with every default filled in.
//!
//! `optimus.toml` and JSON of the same shape are read by [`parse_toml`] and [`parse_json`]: unknown keys are
//! refused with the nearest known one, and each error has its place. [`types`] are what comes out, what the control
//! plane stores and what agents receive; they carry no default that depends on the reader. [`check`] holds what must
//! be true of a spec wherever it comes from; the server runs it again on what clients send.
//! [`fields`] documents every field once, for the reader, `optimus explain` and the template.

mod check;
mod command;
mod container;
mod cron;
mod error;
pub mod fields;
pub mod job;
mod job_fields;
mod node;
pub mod placement;
mod read;
mod read_placement;
mod suggest;
mod template;
#[cfg(test)]
mod tests;
pub mod types;
mod update;
mod values;

pub use check::{bad_secret_name, check, not_available};
pub use command::parse_line;
pub use container::{Container, Mount, Network, Pull, Source};
pub use cron::{CronError, Instance, Timetable};
pub use error::{SpecError, SpecErrors};
pub use fields::{explain_field, field, field_names};
pub use job::{Missed, Overlap, PayloadRule, RunInput, RunOn, Runs, Schedule};
pub use placement::{Affinity, Attribute, Constraint, DeviceAsk, GivenDevice, NodeField, Placement, Spread, VolumeMount};
pub use template::{Detected, template, template_for};
pub use types::*;
pub use update::after_circle;

use std::path::PathBuf;

use crate::ids::Name;

/// Longest project file.
pub const FILE_MAX: usize = 256 << 10;
/// Most errors told of one file.
pub const ERRORS_MAX: usize = 20;

/// What a reader knows beside the text.
#[derive(Debug, Clone)]
pub struct Context {
    /// The project of a file that names none; usually its directory's name.
    pub default_project: Option<Name>,
    /// Absolute directory relative paths start from.
    pub base_dir: PathBuf,
    /// The environment asked for; unset: `dev`.
    pub environment: Option<Name>,
}

/// A file that was read.
#[derive(Debug, Clone, PartialEq)]
pub struct Parsed {
    pub spec: ProjectSpec,
    /// Odd but allowed.
    pub warnings: Vec<String>,
    /// Environments the file has overlays for.
    pub environments: Vec<Name>,
}

/// Reads an `optimus.toml`. Never panics, whatever the text.
pub fn parse_toml(file_name: &str, text: &str, context: &Context) -> Result<Parsed, SpecErrors> {
    let failed = |errors| SpecErrors::new(file_name, text, errors);
    if text.len() > FILE_MAX {
        return Err(failed(vec![SpecError::new(None, format!("the file is {} bytes long; at most {FILE_MAX} are read", text.len()))]));
    }
    let root = node::from_toml(text).map_err(failed)?;
    read::project(&root, context).map_err(failed)
}

/// Reads JSON of the same shape as `optimus.toml`; errors carry JSON pointers instead of lines.
pub fn parse_json(value: &serde_json::Value, context: &Context) -> Result<Parsed, SpecErrors> {
    let failed = |errors| SpecErrors::new("", "", errors);
    read::project(&node::from_json(value).map_err(failed)?, context).map_err(failed)
}
