//! The types of a workload spec.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::container::Container;
use super::job::{Runs, Schedule};
use super::placement::Placement;
pub use super::update::{Amount, CanaryStep, Disconnect, Keep, ReleaseStep, Strategy, Update};
use crate::ids::Name;
use crate::secret::SecretValue;
use crate::time::Span;
use crate::units::{Bytes, Millicores};

/// One workload, resolved for one environment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WorkloadSpec {
    pub kind: Kind,
    pub driver: Driver,
    /// What to start.
    pub run: Run,
    /// Working directory: an absolute path on the node, or in the container. Unset: the image's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dir: Option<String>,
    /// Environment of the process, beside what the agent sets (`PORT`, `OPTIMUS_*`).
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Host user to run as; in a container, one of its users or `UID:GID`. Unset: the node's default for workloads, or the
    /// image's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// How many copies. Unset: the number the server holds stays (1 at the first deploy).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copies: Option<u32>,
    /// Ports by name, in the order of the file; the first is `PORT`.
    #[serde(default)]
    pub ports: Vec<Port>,
    pub resources: Resources,
    pub health: Health,
    pub restart: Restart,
    pub stop: Stop,
    pub update: Update,
    pub logs: Logs,
    /// Names of secrets given to the process as environment variables.
    #[serde(default)]
    pub secrets: Vec<String>,
    /// Their values, in what the agent of a copy receives. Nobody else is told; what a file says here is refused.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(ignore)]
    pub secret_values: BTreeMap<String, SecretValue>,
    /// Free labels, for people and filters.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Where it may run, and where it would rather.
    #[serde(default, skip_serializing_if = "Placement::is_default")]
    pub placement: Placement,
    /// When a job runs by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<Schedule>,
    /// Longest run of a job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Span>,
    /// What happens to copies whose node does not answer. Unset: they are replaced at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disconnect: Option<Disconnect>,
    /// How a job's runs are admitted, retried and remembered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runs: Option<Runs>,
}

impl WorkloadSpec {
    /// What a job says of its runs, or what stands when it says nothing.
    pub fn job_runs(&self) -> Runs {
        self.runs.clone().unwrap_or_else(|| Runs::of(self.schedule.as_ref()))
    }
}

/// Service stays up, job runs to completion, daemon runs once on every matching node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Service,
    Job,
    Daemon,
}

impl Kind {
    /// As it is written in a project file: `service`, `job`, `daemon`.
    pub fn word(self) -> &'static str {
        match self {
            Kind::Service => "service",
            Kind::Job => "job",
            Kind::Daemon => "daemon",
        }
    }
}

/// What runs the workload on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// A plain process in its own cgroup.
    Process,
    /// A container of an image.
    Container(Box<Container>),
}

/// The command. We never splice values into a shell line: a shell sees the user's own text only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Run {
    /// Started directly, found through the workload's `PATH`.
    Argv(Vec<String>),
    /// The user's line, run as `/bin/sh -c LINE` inside the workload's sandbox. Chosen when the
    /// line uses shell syntax (`$`, `|`, `;`, `&`, `<`, `>`, `*`, `` ` ``, ...).
    Shell(String),
}

impl Run {
    /// The argument list to execute.
    pub fn argv(&self) -> Vec<String> {
        match self {
            Run::Argv(argv) => argv.clone(),
            Run::Shell(line) => vec!["/bin/sh".into(), "-c".into(), line.clone()],
        }
    }
}

/// A port of the workload on its host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Port {
    pub name: Name,
    /// The fixed host port; unset: one from the node's dynamic range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fixed: Option<u16>,
}

/// CPU, memory and process limits. Limits are hard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Resources {
    /// Reserved when placing, and the hard quota while running.
    pub cpu: Millicores,
    /// Reserved when placing; the kernel protects it from reclaim where it can.
    pub memory_request: Bytes,
    /// The process is killed above this (out of memory).
    pub memory_limit: Bytes,
    /// Most processes and threads.
    pub pids: u32,
}

/// When a copy counts as ready, and when it is restarted for being stuck.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// Decides whether the copy is ready (gets traffic, counts in a deployment). Unset: ready while running.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub readiness: Option<Probe>,
    /// Restarts the copy when it fails. Unset: never restarted while running.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub liveness: Option<Probe>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Probe {
    pub check: Check,
    /// Name of the port to ask; unset: the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<Name>,
    pub interval: Span,
    pub timeout: Span,
    /// Failures in this time after the start do not count.
    pub grace: Span,
    /// Successes in a row that make it good.
    pub healthy_after: u32,
    /// Failures in a row that make it bad.
    pub unhealthy_after: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Check {
    /// `GET path` answers 200 to 399. Redirects are not followed.
    Http { path: String },
    /// The port accepts a connection.
    Tcp,
    /// The gRPC health protocol answers SERVING.
    Grpc { service: String },
    /// A command inside the workload exits 0.
    Command { argv: Vec<String> },
}

/// What happens after an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Restart {
    /// Pause before the second restart in a row; doubles each time (the first is at once).
    pub delay: Span,
    pub delay_max: Span,
    /// Up for this long: the back-off starts afresh.
    pub reset_after: Span,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stop {
    /// Signal that asks the process to stop: `TERM`, `INT`, `QUIT`, `HUP`, `USR1`, `USR2`.
    pub signal: String,
    /// Time between the signal and SIGKILL for the whole group.
    pub grace: Span,
}

/// How much of a copy's output is kept on its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Logs {
    /// Budget of one copy; the oldest segment goes first.
    pub size: Bytes,
}

/// A project file after parsing: several workloads of one project, resolved for one environment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ProjectSpec {
    pub project: Name,
    pub environment: Name,
    pub workloads: BTreeMap<Name, WorkloadSpec>,
}
