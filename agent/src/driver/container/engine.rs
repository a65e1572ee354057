//! The container engine behind its socket: is it there, what is it, and every call to it with a deadline.
//!
//! ```text
//!  Down --(socket answers ping, version, info)--> Up --(a ping or a call finds nobody)--> Down
//! ```
//!
//! A probe looks every few seconds, and at once when a call found nobody. An engine that is not there is a state that
//! is told, never an error that hangs something.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bollard::Docker;
use bollard::errors::Error;
use bollard::models::SystemInfoCgroupDriverEnum as CgroupDriver;
use optimus_common::env::Env;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::ledger::chain;

/// Where engines listen when nobody says: Docker, then Podman.
const SOCKETS: [&str; 3] = ["/run/docker.sock", "/var/run/docker.sock", "/run/podman/podman.sock"];
/// How often the engine is asked whether it is there.
const PROBE_EVERY: Duration = Duration::from_secs(3);
/// Longest wait for the answer of a probe.
const PROBE_MAX: Duration = Duration::from_secs(3);
/// Longest wait for the answer of an ordinary call.
pub const CALL_MAX: Duration = Duration::from_secs(15);
/// Longest text of the engine in an error.
const TEXT_MAX: usize = 400;

/// What the engine says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineFacts {
    /// `20.10.24`.
    pub version: String,
    /// Version of the API that is spoken.
    pub api: String,
    /// Whether containers can be put into cgroups of ours.
    pub cgroupfs: bool,
    /// Where it keeps images.
    pub root_dir: PathBuf,
    /// Limits it says it cannot set, each with why.
    pub unenforced: Vec<String>,
}

/// An engine that answered.
#[derive(Clone)]
pub struct Up {
    pub docker: Docker,
    pub facts: Arc<EngineFacts>,
}

/// Whether it is there.
#[derive(Clone)]
pub enum State {
    Up(Up),
    /// Why not, for people.
    Down(String),
}

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    #[error("the container engine does not answer: {0}")]
    Down(String),
    #[error("the container engine gave no answer within {0:?}")]
    Late(Duration),
    /// It answered, and refused.
    #[error("{message}")]
    Refused { status: u16, message: String },
}

impl EngineError {
    pub fn is_not_found(&self) -> bool {
        matches!(self, EngineError::Refused { status: 404, .. })
    }
    /// It says nothing of the thing asked for, only of the engine.
    pub fn is_absence(&self) -> bool {
        matches!(self, EngineError::Down(_) | EngineError::Late(_))
    }
}

/// The engine. Shared by everything of the driver.
pub struct Engine {
    /// Told by the configuration; unset: the usual places.
    socket: Option<PathBuf>,
    state: watch::Sender<State>,
    doubt: Notify,
    env: Env,
}

impl Engine {
    /// Looks once, so that what comes next knows.
    pub async fn open(socket: Option<PathBuf>, env: Env) -> Self {
        let state = watch::Sender::new(State::Down("not asked yet".to_owned()));
        let engine = Engine { socket, state, doubt: Notify::new(), env };
        engine.probe().await;
        engine
    }

    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }
    pub fn up(&self) -> Result<Up, EngineError> {
        match self.state() {
            State::Up(up) => Ok(up),
            State::Down(why) => Err(EngineError::Down(why)),
        }
    }
    /// Changes of [`Engine::state`].
    pub fn changes(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }
    pub fn socket(&self) -> Option<PathBuf> {
        match &self.socket {
            Some(socket) => Some(socket.clone()),
            None => SOCKETS.iter().map(PathBuf::from).find(|s| s.exists()),
        }
    }
    /// Whether there is any sign that this host is meant to have an engine.
    pub fn expected(&self) -> bool {
        self.socket().is_some()
    }

    /// Waits until it is there.
    pub async fn until_up(&self) -> Up {
        let mut changes = self.changes();
        loop {
            if let State::Up(up) = &*changes.borrow_and_update() {
                return up.clone();
            }
            if changes.changed().await.is_err() {
                std::future::pending::<()>().await; // the sender is in `self`
            }
        }
    }
    /// Waits until it is gone.
    pub async fn until_down(&self) {
        let mut changes = self.changes();
        while matches!(&*changes.borrow_and_update(), State::Up(_)) {
            if changes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// One call, at most `longest`.
    pub async fn call<T, F>(&self, longest: Duration, work: impl FnOnce(Docker) -> F) -> Result<T, EngineError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let up = self.up()?;
        match self.within(longest, work(up.docker)).await {
            Some(Ok(answer)) => Ok(answer),
            Some(Err(error)) => Err(self.judge(error)),
            None => {
                self.doubt.notify_one();
                Err(EngineError::Late(longest))
            }
        }
    }

    /// Tells a refusal from an engine that is not there; the latter is looked into at once.
    pub fn judge(&self, error: Error) -> EngineError {
        match error {
            Error::DockerResponseServerError { status_code, message } => {
                EngineError::Refused { status: status_code, message: short(&message) }
            }
            Error::DockerStreamError { error } => EngineError::Refused { status: 0, message: short(&error) },
            Error::DockerContainerWaitError { error, .. } => EngineError::Refused { status: 0, message: short(&error) },
            Error::RequestTimeoutError => {
                self.doubt.notify_one();
                EngineError::Late(CALL_MAX)
            }
            other => {
                self.doubt.notify_one();
                EngineError::Down(short(&chain(&other)))
            }
        }
    }

    pub async fn within<T>(&self, longest: Duration, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            done = work => Some(done),
            () = self.env.clock.sleep(longest) => None,
        }
    }

    /// Asks for ever whether it is there.
    pub async fn watch(&self, end: CancellationToken) {
        loop {
            tokio::select! {
                () = self.env.clock.sleep(PROBE_EVERY) => {}
                () = self.doubt.notified() => {}
                () = end.cancelled() => return,
            }
            self.probe().await;
        }
    }

    async fn probe(&self) {
        let found = match self.state() {
            State::Up(up) => match self.within(PROBE_MAX, up.docker.ping()).await {
                Some(Ok(_)) => return,
                Some(Err(error)) => Err(short(&chain(&error))),
                None => Err(format!("no answer within {PROBE_MAX:?}")),
            },
            State::Down(_) => match self.socket() {
                None => Err("no container engine is installed: none of its usual sockets is there".to_owned()),
                Some(socket) => match self.within(2 * PROBE_MAX, connect(&socket)).await {
                    Some(Ok(up)) => Ok(up),
                    Some(Err(error)) => Err(format!("{}: {}", socket.display(), short(&chain(&error)))),
                    None => Err(format!("{}: no answer within {:?}", socket.display(), 2 * PROBE_MAX)),
                },
            },
        };
        self.state.send_if_modified(|state| match (state, found) {
            (state, Ok(up)) => {
                tracing::info!(
                    version = up.facts.version,
                    api = up.facts.api,
                    cgroupfs = up.facts.cgroupfs,
                    "the container engine answers"
                );
                *state = State::Up(up);
                true
            }
            (State::Down(before), Err(why)) => {
                *before = why; // no change worth a wake-up
                false
            }
            (state, Err(why)) => {
                tracing::warn!(why, "the container engine does not answer");
                *state = State::Down(why);
                true
            }
        });
    }
}

async fn connect(socket: &Path) -> Result<Up, Error> {
    // Its own limit must not cut a pull short: ours are around every call.
    const CLIENT_MAX_SECS: u64 = 3700;
    let docker = Docker::connect_with_unix(&socket.display().to_string(), CLIENT_MAX_SECS, bollard::API_DEFAULT_VERSION)?;
    let docker = docker.negotiate_version().await?;
    let version = docker.version().await?;
    let info = docker.info().await?;
    let limits = [("memory", info.memory_limit), ("cpu", info.cpu_cfs_quota), ("pids", info.pids_limit)];
    let facts = EngineFacts {
        version: short(&version.version.unwrap_or_default()),
        api: docker.client_version().to_string(),
        cgroupfs: info.cgroup_driver == Some(CgroupDriver::CGROUPFS),
        root_dir: PathBuf::from(info.docker_root_dir.unwrap_or_else(|| "/var/lib/docker".to_owned())),
        unenforced: limits
            .iter()
            .filter(|(_, can)| *can == Some(false))
            .map(|(what, _)| format!("{what}: the engine cannot limit it"))
            .collect(),
    };
    Ok(Up { docker, facts: Arc::new(facts) })
}

/// At most [`TEXT_MAX`] bytes, on one line.
pub fn short(text: &str) -> String {
    let mut text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if text.len() > TEXT_MAX {
        text.truncate(text.floor_char_boundary(TEXT_MAX));
    }
    text
}
