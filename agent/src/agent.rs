//! One agent: what it is configured with, how it starts and how it ends.
//!
//! Start-up order: lock the data directory, key, ledger, cgroups and drivers, facts, manager (which takes up what
//! runs). Ending is the reverse. An agent that just ends, however, leaves every workload running.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use optimus_common::env::Env;
use optimus_common::{Bytes, Span};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::alloc::worker::Context;
use crate::devices::Devices;
use crate::driver::Driver;
use crate::driver::container::images::Marks;
use crate::driver::container::{ContainerConfig, ContainerDriver};
use crate::driver::mock::Mock;
use crate::driver::process::{ProcessConfig, ProcessDriver};
use crate::facts::{self, Stated};
use crate::ledger::{self, LedgerError, Sealer};
use crate::manager::Manager;
use crate::manager::reports::Reports;
use crate::metrics::collector::{Collector, SAMPLE_EVERY};
use crate::metrics::history::HistoryConfig;
use crate::placing;
use crate::workloads::Workloads;

/// Longest time a detaching agent waits for its own tasks: a start under way is finished first.
const DETACH_DEADLINE: Duration = Duration::from_secs(35);

/// How far back the history of metrics reaches, and what it may take on disk.
const METRICS_KEPT: Span = Span::secs(6 * 3600);
const METRICS_BYTES_MAX: Bytes = Bytes::mib(256);

/// Directory of volumes, in the agent's data directory.
const VOLUMES: &str = "volumes";

/// What an agent is started with. Checked by [`Agent::start`].
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// Everything the agent keeps; made if missing. One agent at a time.
    pub data_dir: PathBuf,
    /// The `optimus-runner` binary.
    pub runner: PathBuf,
    /// First and last port of the dynamic range.
    pub ports: (u16, u16),
    /// Start workloads even if a limit they ask for cannot be enforced, and say so in their status (`dev` without
    /// root). Otherwise they are refused.
    pub allow_unenforced: bool,
    /// Host user of workloads that name none. Unset: the agent's own user.
    pub workload_user: Option<String>,
    /// Address users and other hosts reach this node's workloads at.
    pub address: String,
    /// Unset: the host's name.
    pub name: Option<String>,
    /// Name of the cgroup directory that holds the workloads' groups. Two agents on a host need two.
    pub cgroup_owner: String,
    /// Free labels of the node.
    pub labels: BTreeMap<String, String>,
    /// Play workloads instead of running them: no process is ever started, each does what the variable `MOCK` of its
    /// spec says ([`crate::driver::script`]).
    pub mock: bool,
    /// Socket of the container engine. Unset: Docker's or Podman's usual one, if there is one.
    pub container_engine: Option<PathBuf>,
}

/// Why an agent does not start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("invalid `{field}`: {why}")]
    Config { field: &'static str, why: String },
    #[error("failed to {step} {}", path.display())]
    File {
        step: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("another agent uses {}", .0.display())]
    InUse(PathBuf),
    #[error("failed to open the ledger")]
    Ledger(#[from] LedgerError),
}

/// A running agent.
pub struct Agent {
    manager: Arc<Manager>,
    ctx: Arc<Context>,
    process: Arc<ProcessDriver>,
    container: Arc<ContainerDriver>,
    /// Held for the agent's life.
    _lock: File,
}

impl Agent {
    /// Starts the agent: what its ledger says runs or is found running before this returns.
    pub async fn start(config: AgentConfig, env: Env) -> Result<Agent, AgentError> {
        let AgentConfig {
            data_dir,
            runner,
            ports,
            allow_unenforced,
            workload_user,
            address,
            name,
            cgroup_owner,
            labels,
            mock,
            container_engine,
        } = config;
        check(&runner, ports, &cgroup_owner)?;
        let allocs_dir = prepare(&data_dir)?;
        let lock = lock(&data_dir)?;

        let key = data_dir.join("ledger.key");
        let sealer = match Sealer::from_file(&key, Arc::clone(&env.entropy)) {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                let aside = data_dir.join(format!("ledger.key.damaged-{}", env.clock.now().0));
                tracing::error!(%error, moved_to = %aside.display(), "the ledger's key is damaged: starting a new one");
                fs::rename(&key, &aside).and_then(|()| Sealer::from_file(&key, Arc::clone(&env.entropy)))
            }
            other => other,
        };
        let sealer = sealer.map_err(|source| AgentError::File { step: "open", path: key, source })?;
        let (writer, held) = ledger::open(&data_dir, &sealer, &env)?;

        let placing =
            placing::read(&data_dir).await.map_err(|source| AgentError::File { step: "read", path: data_dir.join("node.toml"), source })?;
        let volumes_dir = data_dir.join(VOLUMES);
        let devices = Devices::new(placing.devices.clone());
        let stated = Stated { name, address, ports, labels, data_dir: data_dir.clone(), placing };
        let node = stated.name.clone().unwrap_or_else(|| rustix::system::uname().nodename().to_string_lossy().into_owned());
        let container = ContainerConfig {
            socket: container_engine,
            data_dir: data_dir.clone(),
            allocs_dir: allocs_dir.clone(),
            allow_unenforced,
            node: node.clone(),
            cgroup_owner: cgroup_owner.clone(),
            devices: devices.clone(),
            volumes_dir: volumes_dir.clone(),
        };
        let container = ContainerDriver::new(container, env.clone()).await;
        let container = Arc::new(container.map_err(|source| AgentError::File { step: "write to", path: data_dir.clone(), source })?);
        let process = ProcessConfig {
            runner,
            allocs_dir: allocs_dir.clone(),
            allow_unenforced,
            workload_user,
            node,
            cgroup_owner,
            devices,
            volumes_dir,
        };
        let process = Arc::new(ProcessDriver::new(process, env.clone()));
        let facts = facts::gather(&stated, process.cgroup(), &[process.fingerprint(), container.fingerprint()]);

        let history = HistoryConfig { dir: data_dir.join("metrics"), keep: METRICS_KEPT, bytes_max: METRICS_BYTES_MAX };
        // Workloads run without being measured rather than not at all.
        let metrics = Collector::start(history, SAMPLE_EVERY, Arc::clone(&env.clock))
            .inspect_err(|error| tracing::error!(%error, "nothing will be measured on this node"))
            .ok();
        let ctx = Arc::new(Context {
            env,
            reports: Arc::new(Reports::new(held.epoch)),
            ledger: Arc::new(writer),
            allocs_dir,
            detach: CancellationToken::new(),
            leave: CancellationToken::new(),
            tasks: TaskTracker::new(),
            worker_ended: Notify::new(),
            metrics,
        });
        // It stands in for processes: which nodes play is decided where they are started, never by a spec.
        let runs: Arc<dyn Driver> = if mock { Arc::new(Mock::new(ctx.env.clone())) } else { Arc::clone(&process) as _ };
        let drivers = BTreeMap::from([(process.name(), runs), (container.name(), Arc::clone(&container) as Arc<dyn Driver>)]);
        let manager = Manager::start(Arc::clone(&ctx), drivers, sealer, facts, held).await;
        let agent = Agent { manager, ctx, process, container, _lock: lock };
        agent.keep_facts(stated);
        Ok(agent)
    }

    /// Tells the control plane when the container engine comes or goes.
    fn keep_facts(&self, stated: Stated) {
        let (manager, process, container) = (Arc::clone(&self.manager), Arc::clone(&self.process), Arc::clone(&self.container));
        let (detach, leave, mut changes) = (self.ctx.detach.clone(), self.ctx.leave.clone(), self.container.changes());
        self.ctx.spawn("facts", async move {
            loop {
                manager.set_facts(facts::gather(&stated, process.cgroup(), &[process.fingerprint(), container.fingerprint()]));
                tokio::select! {
                    changed = changes.changed() => if changed.is_err() { return },
                    () = detach.cancelled() => return,
                    () = leave.cancelled() => return,
                }
            }
        });
    }

    /// What the link drives.
    pub fn workloads(&self) -> Arc<dyn Workloads> {
        Arc::clone(&self.manager) as Arc<dyn Workloads>
    }

    /// Deletes container images that were fetched for workloads and are not used, as the marks say; how many. It is
    /// also done from time to time.
    pub async fn collect_images(&self, marks: Marks) -> usize {
        self.container.collect_images(marks).await
    }

    /// Stops every workload, each with its own grace, kills what is left at `deadline`, and removes the cgroups.
    /// They are wanted again at the next start. True if all ended by themselves in time.
    pub async fn stop_all(self, deadline: Duration) -> bool {
        self.ctx.leave.cancel();
        let in_time = self.joined(deadline).await;
        self.ctx.detach.cancel();
        self.process.remove_all().await;
        self.container.remove_all().await;
        self.container.close().await;
        self.joined(DETACH_DEADLINE).await && in_time
    }

    /// Ends the agent and leaves every workload as it is; the next agent finds them.
    pub async fn detach(self) {
        self.ctx.detach.cancel();
        if !self.joined(DETACH_DEADLINE).await {
            tracing::error!(tasks = self.ctx.tasks.len(), "tasks of the agent did not end in time");
        }
        self.container.close().await;
    }

    async fn joined(&self, deadline: Duration) -> bool {
        self.ctx.tasks.close();
        tokio::select! {
            () = self.ctx.tasks.wait() => true,
            () = self.ctx.env.clock.sleep(deadline) => false,
        }
    }
}

fn check(runner: &Path, ports: (u16, u16), cgroup_owner: &str) -> Result<(), AgentError> {
    let invalid = |field, why: String| Err(AgentError::Config { field, why });
    if ports.0 == 0 || ports.0 > ports.1 {
        return invalid("ports", format!("{}-{} is not a range of ports", ports.0, ports.1));
    }
    let simple = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if cgroup_owner.is_empty() || cgroup_owner.starts_with('.') || !cgroup_owner.chars().all(simple) {
        return invalid("cgroup_owner", format!("{cgroup_owner:?} is not a plain directory name"));
    }
    match fs::metadata(runner) {
        Ok(meta) if meta.is_file() && meta.permissions().mode() & 0o111 != 0 => Ok(()),
        Ok(_) => invalid("runner", format!("{} is not an executable file", runner.display())),
        Err(error) => invalid("runner", format!("{}: {error}", runner.display())),
    }
}

/// Makes the directories. Workloads of other users pass through them to their private ones, so they may be entered,
/// not listed.
fn prepare(data_dir: &Path) -> Result<PathBuf, AgentError> {
    let file = |step, path: &Path| {
        let path = path.to_owned();
        move |source| AgentError::File { step, path, source }
    };
    if let Some(parent) = data_dir.parent() {
        fs::create_dir_all(parent).map_err(file("create", parent))?;
    }
    let allocs_dir = data_dir.join("allocs");
    for dir in [data_dir, &allocs_dir] {
        crate::manager::make_dir(dir).map_err(file("create", dir))?;
    }
    // Workloads see paths below it, from directories of their own.
    fs::canonicalize(&allocs_dir).map_err(file("find", &allocs_dir))
}

fn lock(data_dir: &Path) -> Result<File, AgentError> {
    let path = data_dir.join("lock");
    let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = opened.map_err(|source| AgentError::File { step: "open", path: path.clone(), source })?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(AgentError::InUse(data_dir.to_owned())),
        Err(error) => Err(AgentError::File { step: "lock", path, source: error.into() }),
    }
}
