//! The container driver: Docker Engine, or what speaks its API, through its socket.
//!
//! [`engine`] knows whether it is there, [`create`] what it is asked for, [`images`] fetches and deletes, [`run`] is the
//! live container, [`output`] its log. One container for each attempt, `optimus-<alloc>-<attempt>`, labelled with this
//! agent's own id: nothing without that label is ever touched. Where the engine lets us say (cgroupfs), it is below a
//! group of ours, `<owner>-containers/<alloc>.<attempt>`, which holds the limits, counts and kills as for processes.
//!
//! The engine may be away at any time. What is known then stands in the run directory ([`record`]), and what could not
//! be removed is removed later ([`sweep`]). An OCI runtime without an engine would be another driver beside this one.

mod create;
mod ending;
pub mod engine;
mod exec;
pub mod images;
mod login;
mod output;
mod record;
mod resize;
mod run;
mod start;
mod sweep;

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bollard::models::ContainerInspectResponse;
use optimus_common::AllocId;
use optimus_common::env::Env;
use optimus_common::reason::Reason;
use optimus_common::spec::Resources;
use optimus_common::units::Bytes;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::engine::{CALL_MAX, Engine, EngineError, State};
use self::images::{Images, Marks};
use self::output::Store;
use self::record::{CONTAINER_FILE, ContainerRecord, END_FILE, EndRecord, container_name};
use self::run::{ContainerRun, Handle, off_thread};
use super::process::limits::Enforcer;
use super::{Boxed, Driver, Ended, Fingerprint, Recovered, Run, StartError, StartRequest};
use crate::alloc::worker::alloc_dir;
use crate::isolation::{Group, group_of};
use crate::logs::segments;

/// Most containers made at a time: the engine does not get faster by more.
const STARTS_MAX: usize = 16;
/// How often the disk is looked at for images that may go.
const IMAGES_EVERY: Duration = Duration::from_secs(600);
/// Longest wait for our own tasks at the end.
const CLOSE_MAX: Duration = Duration::from_secs(5);

/// What the driver is told of its node.
#[derive(Debug, Clone)]
pub struct ContainerConfig {
    /// The engine's socket; unset: the usual places.
    pub socket: Option<PathBuf>,
    /// The agent's own directory: ledger of images, logins, this agent's id.
    pub data_dir: PathBuf,
    /// Holds `<alloc>/<attempt>/`; an absolute path.
    pub allocs_dir: PathBuf,
    pub allow_unenforced: bool,
    /// The node's name, for `OPTIMUS_NODE`.
    pub node: String,
    /// Name of the agent's cgroup directory; that of containers stands beside it.
    pub cgroup_owner: String,
    /// What the node offers.
    pub devices: crate::devices::Devices,
    /// Holds the volumes; an absolute path.
    pub volumes_dir: PathBuf,
}

/// Runs containers. Cheap to clone.
#[derive(Clone)]
pub struct ContainerDriver {
    shared: Arc<Shared>,
}

struct Shared {
    config: ContainerConfig,
    /// This agent, on labels.
    owner: String,
    engine: Arc<Engine>,
    images: Images,
    enforcer: Enforcer,
    env: Env,
    starts: Semaphore,
    close: CancellationToken,
    tasks: TaskTracker,
    leftovers: Mutex<sweep::Leftovers>,
}

impl ContainerDriver {
    /// Looks for the engine, at most some seconds. Without one, starts are refused until it comes.
    pub async fn new(config: ContainerConfig, env: Env) -> io::Result<Self> {
        let owner = owner_id(&config.data_dir, &env)?;
        let engine = Arc::new(Engine::open(config.socket.clone(), env.clone()).await);
        let images = Images::open(Arc::clone(&engine), &config.data_dir, env.clone());
        let enforcer = Enforcer::open(&cgroup_owner(&config), config.allow_unenforced);
        let driver = ContainerDriver {
            shared: Arc::new(Shared {
                owner,
                engine,
                images,
                enforcer,
                env,
                starts: Semaphore::new(STARTS_MAX),
                close: CancellationToken::new(),
                tasks: TaskTracker::new(),
                leftovers: Mutex::default(),
                config,
            }),
        };
        let shared = Arc::clone(&driver.shared);
        driver.shared.spawn("container-engine", async move { shared.engine.watch(shared.close.clone()).await });
        let shared = Arc::clone(&driver.shared);
        driver.shared.spawn("container-leftovers", async move { shared.tidy().await });
        let shared = Arc::clone(&driver.shared);
        driver.shared.spawn("container-images", async move {
            loop {
                tokio::select! {
                    () = shared.env.clock.sleep(IMAGES_EVERY) => {}
                    () = shared.close.cancelled() => return,
                }
                shared.images.collect(Marks::default()).await;
            }
        });
        Ok(driver)
    }

    /// Told when the engine comes or goes.
    pub fn changes(&self) -> watch::Receiver<State> {
        self.shared.engine.changes()
    }

    /// Deletes images of ours as the marks say; how many.
    pub async fn collect_images(&self, marks: Marks) -> usize {
        self.shared.images.collect(marks).await
    }

    /// Ends everything of the driver but the containers.
    pub async fn close(&self) {
        self.shared.close.cancel();
        self.shared.tasks.close();
        tokio::select! {
            () = self.shared.tasks.wait() => {}
            () = self.shared.env.clock.sleep(CLOSE_MAX) => tracing::warn!("tasks of the container driver did not end in time"),
        }
    }

    /// Removes every container of ours and the cgroup directory.
    pub async fn remove_all(&self) {
        self.shared.remove_everything().await;
        let shared = Arc::clone(&self.shared);
        let removed = off_thread(move || {
            shared.enforcer.remove_all(&cgroup_owner(&shared.config));
            sweep::remove_cgroup_dirs(&cgroup_owner(&shared.config));
            Ok(())
        });
        if let Err(error) = removed.await {
            tracing::error!(%error, "failed to remove the cgroups of containers");
        }
    }
}

fn cgroup_owner(config: &ContainerConfig) -> String {
    format!("{}-containers", config.cgroup_owner)
}

/// The id of this agent on labels, made once for each data directory.
fn owner_id(data_dir: &Path, env: &Env) -> io::Result<String> {
    const FILE: &str = "container-owner";
    match record::read::<String>(data_dir, FILE) {
        Ok(Some(owner)) => return Ok(owner),
        Ok(None) => {}
        Err(error) => tracing::error!(%error, "this agent's id on containers is damaged: those made under it are not found again"),
    }
    let owner = env.new_id().to_string();
    record::write(data_dir, FILE, &owner)?;
    Ok(owner)
}

impl Shared {
    fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.env.spawn.spawn(name, Box::pin(self.tasks.track_future(task)));
    }
    fn leftovers(&self) -> MutexGuard<'_, sweep::Leftovers> {
        self.leftovers.lock().unwrap_or_else(PoisonError::into_inner)
    }
    fn run_dir(&self, alloc: AllocId, attempt: u32) -> PathBuf {
        alloc_dir(&self.config.allocs_dir, alloc).join(attempt.to_string())
    }

    async fn inspect(&self, name: &str) -> Result<ContainerInspectResponse, EngineError> {
        let name = name.to_owned();
        self.engine.call(CALL_MAX, |docker| async move { docker.inspect_container(&name, None).await }).await
    }

    /// Whether a container carries this agent's label.
    fn is_ours(&self, found: &ContainerInspectResponse) -> bool {
        let labels = found.config.as_ref().and_then(|c| c.labels.as_ref());
        labels.and_then(|l| l.get(create::OWNER_LABEL)).is_some_and(|owner| *owner == self.owner)
    }

    /// Takes charge of a container that runs.
    fn live(self: &Arc<Self>, run: Live, store: Store) -> Arc<dyn Run> {
        let Live { alloc, attempt, record, group, memory_limit, up } = run;
        let started = self.env.clock.monotonic().saturating_sub(up);
        let run = Arc::new(ContainerRun {
            env: self.env.clone(),
            engine: Arc::clone(&self.engine),
            alloc,
            attempt,
            name: record.name,
            run_dir: self.run_dir(alloc, attempt),
            group,
            memory_limit,
            pid: record.pid,
            started_at: record.started_at,
            started,
            unenforced: record.unenforced,
            ended: watch::Sender::new(None),
            dropped: AtomicU64::new(0),
            trouble: Mutex::new(None),
            close: self.close.child_token(),
        });
        self.spawn("container", Arc::clone(&run).watch(store));
        Arc::new(Handle(run))
    }

    /// The newest attempt that has something to tell.
    async fn recover(self: Arc<Self>, alloc: AllocId) -> Option<Recovered> {
        let dir = alloc_dir(&self.config.allocs_dir, alloc);
        let attempts = segments::attempts(&dir).unwrap_or_default();
        let newest = attempts.last().copied()?;
        for attempt in attempts.into_iter().rev() {
            match self.recover_attempt(alloc, attempt).await {
                Found::Nothing => {}
                Found::Alive(run) => return Some(Recovered::Alive(run)),
                Found::Ended(reason) => return Some(Recovered::Ended { attempt, newest, ended: Ended { reason } }),
            }
        }
        None
    }

    async fn recover_attempt(self: &Arc<Self>, alloc: AllocId, attempt: u32) -> Found {
        let run_dir = self.run_dir(alloc, attempt);
        let dir = run_dir.clone();
        let read =
            off_thread(move || Ok((record::read::<ContainerRecord>(&dir, CONTAINER_FILE), record::read::<EndRecord>(&dir, END_FILE))));
        let Ok((record, end)) = read.await else { return Found::Nothing };
        if let Ok(Some(EndRecord { reason })) = end {
            return Found::Ended(reason);
        }
        let record = match record {
            Ok(Some(record)) => record,
            Ok(None) => return Found::Nothing,
            Err(error) => {
                tracing::warn!(%alloc, attempt, %error, "the record of a container is damaged");
                let (pid, started_at) = (0, self.env.clock.now());
                let (name, memory_limit, logs) = (container_name(alloc, attempt), Bytes(0), Bytes::mib(32));
                ContainerRecord { name, started: true, pid, started_at, memory_limit, logs, unenforced: vec![] }
            }
        };
        self.leftovers().known.insert(record.name.clone());
        match self.inspect(&record.name).await {
            Ok(found) if self.is_ours(&found) => self.take_up(alloc, attempt, record, found).await,
            Ok(_) => {
                tracing::error!(%alloc, container = record.name, "a container has the name of ours and not our label: it is left alone");
                Found::Ended(Reason::ExitUnknown { what: "another container has taken its name".to_owned() })
            }
            // Cut off before the engine made it. Not one that ran: its end would stand there, or the container.
            Err(error) if error.is_not_found() && !record.started => Found::Nothing,
            Err(error) if error.is_not_found() => {
                Found::Ended(Reason::ExitUnknown { what: "its container was removed, and not by Optimus".to_owned() })
            }
            // Nothing can be known now. That it runs is what must be supposed: a second one would be worse.
            Err(error) => {
                tracing::warn!(%alloc, attempt, %error, "the engine cannot be asked for a container; it counts as running until it can");
                self.suppose_alive(alloc, attempt, record).await
            }
        }
    }

    async fn take_up(self: &Arc<Self>, alloc: AllocId, attempt: u32, record: ContainerRecord, found: ContainerInspectResponse) -> Found {
        let state = found.state.clone().unwrap_or_default();
        if state.status == Some(bollard::models::ContainerStateStatusEnum::CREATED) {
            // Cut off between making and starting it.
            self.remove_attempt(alloc, attempt).await;
            return Found::Nothing;
        }
        let pid = state.pid.and_then(|p| u32::try_from(p).ok()).unwrap_or(0);
        let started_at = ending::time(state.started_at.as_deref()).unwrap_or(record.started_at);
        self.suppose_alive(alloc, attempt, ContainerRecord { pid: if pid == 0 { record.pid } else { pid }, started_at, ..record }).await
    }

    /// A run whose task finds out by itself whether it has ended: its output is taken to the end in any case.
    async fn suppose_alive(self: &Arc<Self>, alloc: AllocId, attempt: u32, record: ContainerRecord) -> Found {
        let (run_dir, logs) = (self.run_dir(alloc, attempt), record.logs);
        let store = match off_thread(move || Store::open(&run_dir, logs)).await {
            Ok(store) => store,
            Err(error) => {
                tracing::error!(%alloc, %error, "the output of a container cannot be taken up");
                self.remove_attempt(alloc, attempt).await;
                return Found::Ended(Reason::ExitUnknown { what: format!("its output could not be taken up: {error}") });
            }
        };
        let (group, memory_limit) = (self.group(alloc, attempt, record.pid), record.memory_limit);
        let up = Duration::from_millis(self.env.clock.now().0.saturating_sub(record.started_at.0));
        let run = self.live(Live { alloc, attempt, record, group, memory_limit, up }, store);
        // Most often it can be told at once whether it lives.
        let mut ended = None;
        if matches!(self.inspect(&container_name(alloc, attempt)).await, Ok(found) if ending::of(&found, None, memory_limit).is_some()) {
            ended = tokio::select! {
                ended = run.wait() => Some(ended),
                () = self.env.clock.sleep(2 * CALL_MAX) => None,
            };
        }
        match ended {
            Some(Ended { reason }) => Found::Ended(reason),
            None => Found::Alive(run),
        }
    }

    /// Our group of an attempt, or that of its process where the engine chose.
    fn group(&self, alloc: AllocId, attempt: u32, pid: u32) -> Option<Arc<Group>> {
        self.enforcer.group(alloc, attempt).or_else(|| group_of(pid).map(Arc::new))
    }
}

/// What becomes a [`ContainerRun`].
struct Live {
    alloc: AllocId,
    attempt: u32,
    record: ContainerRecord,
    group: Option<Arc<Group>>,
    memory_limit: Bytes,
    up: Duration,
}

enum Found {
    Alive(Arc<dyn Run>),
    Ended(Reason),
    Nothing,
}

impl Driver for ContainerDriver {
    fn name(&self) -> &'static str {
        "container"
    }
    fn fingerprint(&self) -> Fingerprint {
        let shared = &self.shared;
        let (usable, unenforced) = match shared.engine.state() {
            State::Up(up) => (true, up.facts.unenforced.clone()),
            // A host that was never meant to have one lacks nothing.
            State::Down(why) if shared.engine.expected() => (false, vec![format!("container: {why}")]),
            State::Down(_) => (false, vec![]),
        };
        Fingerprint { name: "container", usable, unenforced }
    }
    fn start(&self, request: StartRequest) -> Boxed<'static, Result<Arc<dyn Run>, StartError>> {
        Box::pin(Arc::clone(&self.shared).start(request))
    }
    fn recover(&self, alloc: AllocId) -> Boxed<'static, Option<Recovered>> {
        Box::pin(Arc::clone(&self.shared).recover(alloc))
    }
    fn reap(&self, alloc: AllocId, attempt: u32) -> Boxed<'static, ()> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { shared.remove_attempt(alloc, attempt).await })
    }
    fn sweep(&self, keep: BTreeSet<AllocId>) -> Boxed<'static, ()> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            shared.sweep(keep.clone()).await;
            shared.sweep_groups(keep).await;
        })
    }
    fn resize(&self, alloc: AllocId, attempt: u32, resources: Resources) -> Boxed<'static, Result<(), Reason>> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { shared.resize(alloc, attempt, resources).await })
    }
    fn clean_up(&self, alloc: AllocId, attempt: u32) -> Boxed<'static, ()> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move { shared.remove_attempt(alloc, attempt).await })
    }
}
