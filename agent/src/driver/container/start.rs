//! Starting a container: what is proven before, the steps at the engine, and undoing them.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bollard::query_parameters::CreateContainerOptionsBuilder;
use optimus_common::reason::Reason;
use optimus_common::spec::{Container, Driver as SpecDriver, Source};
use optimus_common::time::Timestamp;

use super::create::{self, Surroundings};
use super::engine::{CALL_MAX, EngineError, State};
use super::output::Store;
use super::record::{self, CONTAINER_FILE, ContainerRecord, container_name};
use super::run::off_thread;
use super::{Live, Shared, ending};
use crate::alloc::worker::alloc_dir;
use crate::driver::process::limits::Enforced;
use crate::driver::process::prepare::prove_ports;
use crate::driver::{Run, StartError, StartRequest};
use crate::logs::retention;
use crate::manager::make_dir;
use crate::volumes;

/// How long a start waits for an engine that is away: most often it only starts again.
const ENGINE_WAIT: Duration = Duration::from_secs(5);

impl Shared {
    /// Starts a container, or leaves nothing of it.
    pub(super) async fn start(self: Arc<Self>, request: StartRequest) -> Result<Arc<dyn Run>, StartError> {
        let SpecDriver::Container(container) = request.spec.driver.clone() else {
            return Err(StartError::step("read the spec", "it is not of a container"));
        };
        if self.engine.within(ENGINE_WAIT, self.engine.until_up()).await.is_none()
            && let State::Down(error) = self.engine.state()
        {
            return Err(StartError::here(Reason::EngineDown { error }));
        }
        self.images.ensure(&container).await?;
        let _one_of_few = self.starts.acquire().await;
        let (alloc, attempt) = (request.alloc.id, request.attempt);
        let fresh = !self.run_dir(alloc, attempt).exists();
        let started = Box::pin(self.start_steps(&request, &container)).await; // what is asked of the engine is large
        if started.is_err() {
            self.remove_attempt(alloc, attempt).await;
            if fresh {
                // Nothing ran in it: it must not be found as a run.
                match fs::remove_dir_all(self.run_dir(alloc, attempt)) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => {
                        tracing::warn!(%alloc, attempt, %error, "failed to remove the directory of a failed start");
                    }
                    _ => {}
                }
            }
        }
        started
    }

    async fn start_steps(self: &Arc<Self>, request: &StartRequest, container: &Container) -> Result<Arc<dyn Run>, StartError> {
        let (alloc, attempt, spec) = (request.alloc.id, request.attempt, &request.spec);
        let facts = self.engine.up().map_err(refused)?.facts;
        let share = self.config.devices.share(&spec.placement.given);
        let share = share.map_err(|why| StartError::step("give it its devices", why))?;
        if let (Some(first), false) = (facts.unenforced.first(), self.config.allow_unenforced) {
            let (what, why) = first.split_once(": ").unwrap_or(("limits", first));
            return Err(StartError::here(Reason::LimitNotEnforceable { what: what.to_owned(), why: why.to_owned() }));
        }
        let (this, asked, mounts) = (Arc::clone(self), request.clone(), container.mounts.clone());
        let volumes = volumes::of(&self.config.volumes_dir, &request.alloc, spec);
        let (owner, made) = (numeric_user(spec.user.as_deref()), volumes.clone());
        let in_our_group = facts.cgroupfs;
        let prepared = tokio::task::spawn_blocking(move || {
            prove_ports(&asked.alloc, &asked.spec)?;
            for used in &made {
                let failed = |error| StartError::step(&format!("prepare volume {}", used.name), error);
                volumes::prepare(&used.dir, owner).map_err(failed)?;
            }
            for mount in &mounts {
                if let Source::Path(path) = &mount.source {
                    this.may_mount(Path::new(path)).map_err(|why| StartError::step(&format!("mount {path}"), why))?;
                }
            }
            this.prepare(&asked, in_our_group)
        });
        let (record, enforced, store) = match prepared.await {
            Ok(prepared) => prepared?,
            // The runtime ends and with it the agent: that is no failed start, and nobody is there to be told.
            Err(cut_off) if cut_off.is_cancelled() => std::future::pending().await,
            Err(panicked) => return Err(StartError::step("prepare the container", panicked)),
        };
        let cgroup_parent = enforced.group.as_ref().map(|g| format!("/{}", g.path().trim_start_matches('/')));
        let around = Surroundings { owner: &self.owner, node: &self.config.node, cgroup_parent, share, volumes };
        let body = create::body(&request.alloc, spec, container, attempt, &around);
        Box::pin(self.create(&record.name, body)).await?;
        let name = record.name.clone();
        let started = self.engine.call(2 * CALL_MAX, |docker| async move { docker.start_container(&name, None).await }).await;
        started.map_err(|error| start_failed(error, request, container))?;
        let found = self.inspect(&record.name).await.map_err(refused)?;
        let state = found.state.unwrap_or_default();
        let now = self.env.clock.now();
        let record = ContainerRecord {
            started: true,
            pid: state.pid.and_then(|p| u32::try_from(p).ok()).unwrap_or(0),
            started_at: ending::time(state.started_at.as_deref()).unwrap_or(now),
            ..record
        };
        let (run_dir, kept) = (self.run_dir(alloc, attempt), record.clone());
        off_thread(move || record::write(&run_dir, CONTAINER_FILE, &kept))
            .await
            .map_err(|e| StartError::step("record the container", e))?;
        let group = enforced.group.or_else(|| self.group(alloc, attempt, record.pid));
        let memory_limit = spec.resources.memory_limit;
        let up = Duration::from_millis(now.0.saturating_sub(record.started_at.0));
        Ok(self.live(Live { alloc, attempt, record, group, memory_limit, up }, store))
    }

    /// The run directory, its record, the group and the log. Blocking.
    fn prepare(&self, request: &StartRequest, in_our_group: bool) -> Result<(ContainerRecord, Enforced, Store), StartError> {
        let StartRequest { alloc, spec, attempt } = request;
        let dir = alloc_dir(&self.config.allocs_dir, alloc.id);
        make_dir(&dir).map_err(|e| StartError::step("create the run directory", e))?;
        if let Err(error) = retention::trim_attempts(&dir, *attempt, spec.logs.size) {
            tracing::warn!(alloc = %alloc.id, %error, "failed to delete the output of earlier attempts");
        }
        let run_dir = self.run_dir(alloc.id, *attempt);
        make_dir(&run_dir).map_err(|e| StartError::step("create the run directory", e))?;
        let name = container_name(alloc.id, *attempt);
        self.leftovers().known.insert(name.clone());
        let memory_limit = spec.resources.memory_limit;
        let record = ContainerRecord {
            name,
            started: false,
            pid: 0,
            started_at: Timestamp(0),
            memory_limit,
            logs: spec.logs.size,
            unenforced: vec![],
        };
        let enforced = if in_our_group {
            // Which devices it may open, the engine says to the kernel.
            self.enforcer.create(alloc.id, *attempt, &spec.resources, &[]).map_err(StartError::here)?
        } else {
            // The engine's own groups and limits; what it cannot limit it has said.
            Enforced { group: None, unenforced: vec![] }
        };
        let record = ContainerRecord { unenforced: enforced.unenforced.clone(), ..record };
        record::write(&run_dir, CONTAINER_FILE, &record).map_err(|e| StartError::step("record the container", e))?;
        let store = Store::open(&run_dir, spec.logs.size).map_err(|e| StartError::step("open the log", e))?;
        Ok((record, enforced, store))
    }

    /// What holds the agent's own secrets, or the engine, is not for workloads. Blocking.
    fn may_mount(&self, path: &Path) -> Result<(), String> {
        let real = fs::canonicalize(path).map_err(|e| e.to_string())?;
        let data_dir = fs::canonicalize(&self.config.data_dir).map_err(|e| e.to_string())?;
        if real.starts_with(&data_dir) || data_dir.starts_with(&real) {
            return Err("it holds the agent's own data".to_owned());
        }
        let socket = self.engine.socket().and_then(|s| fs::canonicalize(s).ok());
        if socket.is_some_and(|socket| socket.starts_with(&real)) {
            return Err("it holds the container engine's socket, which is as good as root on the node".to_owned());
        }
        Ok(())
    }

    async fn create(&self, name: &str, body: bollard::models::ContainerCreateBody) -> Result<(), StartError> {
        for last in [false, true] {
            let (options, body) = (CreateContainerOptionsBuilder::default().name(name).build(), body.clone());
            let made = self.engine.call(2 * CALL_MAX, |docker| async move { docker.create_container(Some(options), body).await }).await;
            match made {
                Ok(made) => {
                    for warning in made.warnings {
                        tracing::warn!(container = name, warning, "the engine says of a new container");
                    }
                    return Ok(());
                }
                // Left by a try that was cut off.
                Err(EngineError::Refused { status: 409, .. }) if !last => {
                    self.remove(name).await.map_err(refused)?;
                }
                Err(error) if error.is_absence() => return Err(refused(error)),
                Err(error) => return Err(StartError::step("create the container", error)),
            }
        }
        Err(StartError::step("create the container", "its name is taken")) // not reached: the last try returns
    }
}

fn refused(error: EngineError) -> StartError {
    match error {
        EngineError::Down(error) => StartError::here(Reason::EngineDown { error }),
        EngineError::Late(_) => StartError::here(Reason::EngineDown { error: error.to_string() }),
        other => StartError::step("ask the container engine", other),
    }
}

/// The same sentences as for processes where the engine means the same.
fn start_failed(error: EngineError, request: &StartRequest, container: &Container) -> StartError {
    if error.is_absence() {
        return refused(error);
    }
    let text = error.to_string();
    let taken = ["address already in use", "port is already allocated"].iter().any(|t| text.contains(t));
    let port = request.alloc.ports.iter().find(|(_, port)| text.contains(&format!(":{port}")));
    if let (true, Some((name, port))) = (taken, port) {
        let fixed = request.spec.ports.iter().any(|p| p.name.as_str() == name && p.fixed.is_some());
        let holder = crate::ports::holder(*port);
        return StartError { reason: Reason::PortTaken { port: *port, holder }, elsewhere: !fixed };
    }
    let command = || {
        let first = container.entrypoint.clone().unwrap_or_else(|| request.spec.run.argv());
        first.first().cloned().unwrap_or_else(|| container.image.clone())
    };
    if text.contains("executable file not found") || text.contains("no such file or directory: unknown") {
        return StartError::here(Reason::CommandNotFound { command: command() });
    }
    if text.contains("permission denied: unknown") {
        return StartError::here(Reason::NotExecutable { command: command() });
    }
    StartError::step("start the container", text)
}

/// `1000` or `1000:1000`: the only users that are known outside of the image. Others find a volume of root's.
fn numeric_user(user: Option<&str>) -> Option<(u32, u32)> {
    let user = user?;
    let (uid, gid) = user.split_once(':').unwrap_or((user, user));
    Some((uid.parse().ok()?, gid.parse().ok()?))
}
