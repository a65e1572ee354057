//! One live container: the task that follows its output and waits for its end, and the orders to it.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bollard::query_parameters::{KillContainerOptionsBuilder, LogsOptionsBuilder, WaitContainerOptionsBuilder};
use futures_util::StreamExt;
use optimus_common::AllocId;
use optimus_common::env::Env;
use optimus_common::reason::Reason;
use optimus_common::time::{Span, Timestamp};
use optimus_common::units::Bytes;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::engine::{CALL_MAX, Engine, EngineError, State};
use super::output::Store;
use super::record::{self, END_FILE, EndRecord};
use super::{ending, exec};
use crate::driver::{Boxed, Ended, ExecOutput, Run, RunError, Stats};
use crate::isolation::Group;

/// Pieces of output written together.
const BATCH: usize = 64;
/// Pause before a broken stream is taken up again.
const AGAIN: Duration = Duration::from_millis(200);
/// Longest time for the rest of the output after the end.
const REST_MAX: Duration = Duration::from_secs(20);
/// Pause before output that found no room on the disk is tried again.
const FULL_PAUSE: Duration = Duration::from_secs(1);
/// A container none of whose processes is left counts as ended so long after the engine has gone.
const GONE_AFTER: Duration = Duration::from_secs(20);
const GONE_LOOK: Duration = Duration::from_secs(1);

pub(super) struct ContainerRun {
    pub env: Env,
    pub engine: Arc<Engine>,
    pub alloc: AllocId,
    pub attempt: u32,
    pub name: String,
    pub run_dir: PathBuf,
    /// Unset: the engine keeps its containers where we cannot look.
    pub group: Option<Arc<Group>>,
    pub memory_limit: Bytes,
    pub pid: u32,
    pub started_at: Timestamp,
    /// On our monotonic clock.
    pub started: Duration,
    pub unenforced: Vec<String>,
    pub ended: watch::Sender<Option<Ended>>,
    pub dropped: AtomicU64,
    /// Why nothing is known of it at the moment.
    pub trouble: Mutex<Option<Reason>>,
    /// The driver ends.
    pub close: CancellationToken,
}

impl ContainerRun {
    /// Follows it to its end. `store` is where its output goes.
    pub async fn watch(self: Arc<Self>, store: Store) {
        let mut store = store;
        let ended = loop {
            let lost = tokio::select! {
                () = self.close.cancelled() => return,
                _ = self.engine.until_up() => None,
                ended = self.gone_without_engine() => Some(ended),
            };
            if let Some(ended) = lost {
                break ended;
            }
            self.set_trouble(None);
            store = match self.follow_and_wait(store).await {
                Some(store) => store,
                None => return, // closing
            };
            match self.look().await {
                Ok(Some(ended)) => {
                    store = match self.rest(store).await {
                        Some(store) => store,
                        None => return,
                    };
                    drop(store);
                    break ended;
                }
                Ok(None) => {}
                Err(error) => tracing::debug!(alloc = %self.alloc, %error, "failed to look at a container"),
            }
            if let State::Down(why) = self.engine.state() {
                self.set_trouble(Some(Reason::EngineDown { error: why }));
            }
            tokio::select! {
                () = self.close.cancelled() => return,
                () = self.env.clock.sleep(AGAIN) => {}
            }
        };
        let (run_dir, end) = (self.run_dir.clone(), EndRecord { reason: ended.reason.clone() });
        let written = off_thread(move || record::write(&run_dir, END_FILE, &end)).await;
        if let Err(error) = written {
            tracing::warn!(alloc = %self.alloc, %error, "failed to record the end of a container");
        }
        self.ended.send_replace(Some(ended));
    }

    /// Until it is over, or the engine is gone, or its output broke off.
    async fn follow_and_wait(&self, store: Store) -> Option<Store> {
        let Ok(up) = self.engine.up() else { return Some(store) };
        let stop = self.close.child_token();
        let over = async {
            let options = WaitContainerOptionsBuilder::default().condition("not-running").build();
            let mut wait = std::pin::pin!(up.docker.wait_container(&self.name, Some(options)));
            tokio::select! {
                _ = wait.next() => {} // whatever it says: looked at afterwards
                () = self.engine.until_down() => {}
                () = stop.cancelled() => {}
            }
            stop.cancel();
        };
        let follow = async {
            let mut store = store;
            loop {
                store = self.take_output(store, true, &stop).await?;
                tokio::select! {
                    () = self.env.clock.sleep(AGAIN) => {}
                    () = stop.cancelled() => return Some(store),
                }
            }
        };
        let ((), store) = tokio::join!(over, follow);
        store.filter(|_| !self.close.is_cancelled())
    }

    /// What is left of the output of a container that has ended.
    async fn rest(&self, store: Store) -> Option<Store> {
        let stop = self.close.child_token();
        let taken = self.take_output(store, false, &stop);
        let late = async {
            self.env.clock.sleep(REST_MAX).await;
            stop.cancel();
            std::future::pending::<()>().await;
        };
        tokio::select! {
            store = taken => store,
            () = late => None, // never: `taken` ends first
        }
    }

    /// Reads the engine's buffer from where the store stands. Ends with the stream or when told to, never in the middle
    /// of a batch. Unset: the runtime ends.
    async fn take_output(&self, mut store: Store, follow: bool, stop: &CancellationToken) -> Option<Store> {
        let Ok(up) = self.engine.up() else { return Some(store) };
        let since = store.resume();
        let options = LogsOptionsBuilder::default().follow(follow).stdout(true).stderr(true).timestamps(true).since(since).build();
        let mut pieces = std::pin::pin!(up.docker.logs(&self.name, Some(options)).ready_chunks(BATCH));
        loop {
            let batch = tokio::select! {
                biased;
                () = stop.cancelled() => return Some(store),
                batch = pieces.next() => batch,
            };
            let Some(batch) = batch else { return Some(store) };
            let mut broken = false;
            for piece in batch {
                match piece {
                    Ok(piece) if !broken => store.take(&piece),
                    Ok(_) => {}
                    Err(error) => {
                        tracing::debug!(alloc = %self.alloc, %error, "the output of a container broke off");
                        broken = true;
                    }
                }
            }
            store = self.flush(store, stop).await?;
            if broken {
                return Some(store);
            }
        }
    }

    /// Waits for room if the disk is full: the engine keeps what is not taken.
    async fn flush(&self, mut store: Store, stop: &CancellationToken) -> Option<Store> {
        let mut full = false;
        loop {
            let written = off_thread(move || {
                let result = store.flush();
                Ok((store, result))
            });
            let (back, result) = written.await.ok()?;
            store = back;
            let Err(error) = result else {
                if full {
                    tracing::info!(alloc = %self.alloc, "output of a container is written again");
                }
                return Some(store);
            };
            if !full {
                full = true;
                tracing::warn!(alloc = %self.alloc, %error, "failed to write the output of a container; trying again");
            }
            tokio::select! {
                () = self.env.clock.sleep(FULL_PAUSE) => {}
                () = stop.cancelled() => {
                    self.dropped.fetch_add(store.pending_lines(), Ordering::Relaxed);
                    return Some(store);
                }
            }
        }
    }

    /// How it ended; unset while it runs.
    async fn look(&self) -> Result<Option<Ended>, EngineError> {
        let name = self.name.clone();
        match self.engine.call(CALL_MAX, |docker| async move { docker.inspect_container(&name, None).await }).await {
            Ok(found) => Ok(ending::of(&found, self.group.as_deref(), self.memory_limit).map(|reason| Ended { reason })),
            Err(error) if error.is_not_found() => {
                let what = "its container was removed, and not by Optimus".to_owned();
                Ok(Some(Ended { reason: Reason::ExitUnknown { what } }))
            }
            Err(error) => Err(error),
        }
    }

    /// While no engine is there: tells so, and resolves once none of its processes is left for some time.
    async fn gone_without_engine(&self) -> Ended {
        self.env.clock.sleep(AGAIN).await; // most often it is there
        let mut empty_since = None;
        loop {
            if let State::Down(error) = self.engine.state() {
                let down = Reason::EngineDown { error };
                self.set_trouble(Some(down.clone()));
                let now = self.env.clock.monotonic();
                match self.is_empty().await {
                    true => {
                        let since = *empty_since.get_or_insert(now);
                        if now.saturating_sub(since) >= GONE_AFTER {
                            return Ended { reason: down };
                        }
                    }
                    false => empty_since = None,
                }
            }
            self.env.clock.sleep(GONE_LOOK).await;
        }
    }

    async fn is_empty(&self) -> bool {
        let (group, pid) = (self.group.clone(), self.pid);
        let looked = off_thread(move || {
            Ok(match group {
                Some(group) => group.pids().is_empty(),
                None => !std::path::Path::new(&format!("/proc/{pid}")).exists(),
            })
        });
        looked.await.unwrap_or(false)
    }

    fn set_trouble(&self, trouble: Option<Reason>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    async fn signal(&self, signal: i32) -> Result<(), EngineError> {
        let name = self.name.clone();
        let options = KillContainerOptionsBuilder::default().signal(&signal.to_string()).build();
        match self.engine.call(CALL_MAX, |docker| async move { docker.kill_container(&name, Some(options)).await }).await {
            // It is not running (any more), or not there.
            Err(EngineError::Refused { status: 404 | 409, .. }) => Ok(()),
            other => other,
        }
    }

    /// The engine's way, or by its group if the engine is away.
    async fn kill_all(&self) -> Result<(), RunError> {
        let failed = |source| RunError { step: "kill its container", source };
        match (self.signal(libc::SIGKILL).await, self.group.clone()) {
            (Ok(()), _) => Ok(()),
            (Err(_), Some(group)) => match off_thread(move || Ok(group.kill_all())).await.map_err(failed)? {
                true => Ok(()),
                false => Err(failed(io::Error::other("some of its processes outlive SIGKILL"))),
            },
            (Err(error), None) => Err(failed(io::Error::other(error))),
        }
    }
}

pub(super) async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        // The runtime ends and the agent with it: this says nothing of the run, and nobody is there to be told.
        Err(cut_off) if cut_off.is_cancelled() => std::future::pending().await,
        Err(panicked) => Err(io::Error::other(panicked)),
    }
}

/// The run as the agent holds it.
pub(super) struct Handle(pub Arc<ContainerRun>);

impl Run for Handle {
    fn attempt(&self) -> u32 {
        self.0.attempt
    }
    fn pid(&self) -> u32 {
        self.0.pid
    }
    fn started_at(&self) -> Timestamp {
        self.0.started_at
    }
    fn up(&self) -> Duration {
        self.0.env.clock.monotonic().saturating_sub(self.0.started)
    }
    fn unenforced(&self) -> Vec<String> {
        self.0.unenforced.clone()
    }
    fn wait(&self) -> Boxed<'_, Ended> {
        let mut ended = self.0.ended.subscribe();
        Box::pin(async move {
            match ended.wait_for(Option::is_some).await.map(|e| e.clone()) {
                Ok(Some(ended)) => ended,
                _ => std::future::pending().await, // the sender is in the run that is borrowed
            }
        })
    }
    fn stop(&self, signal: i32, grace: Span) -> Boxed<'_, Result<(), RunError>> {
        Box::pin(async move {
            let asked = self.0.signal(signal).await;
            asked.map_err(|e| RunError { step: "ask the container to stop", source: io::Error::other(e) })?;
            let (run, mut ended) = (Arc::clone(&self.0), self.0.ended.subscribe());
            let env = self.0.env.clone();
            env.spawn.spawn(
                "container-grace",
                Box::pin(async move {
                    tokio::select! {
                        _ = ended.wait_for(Option::is_some) => return,
                        () = run.close.cancelled() => return,
                        () = run.env.clock.sleep(grace.as_duration()) => {}
                    }
                    if let Err(error) = run.kill_all().await {
                        tracing::warn!(alloc = %run.alloc, error = %crate::ledger::chain(&error), "failed to kill a container after its grace");
                    }
                }),
            );
            Ok(())
        })
    }
    fn kill(&self) -> Boxed<'_, Result<(), RunError>> {
        Box::pin(self.0.kill_all())
    }
    fn pids(&self) -> Vec<u32> {
        self.0.group.as_ref().map_or_else(|| vec![self.0.pid], |g| g.pids())
    }
    fn stats(&self) -> Result<Stats, RunError> {
        let failed = |source| RunError { step: "read its use of resources", source };
        let group = self.0.group.as_ref().ok_or_else(|| failed(io::ErrorKind::Unsupported.into()))?;
        let usage = group.usage().map_err(failed)?;
        Ok(Stats {
            cpu: Duration::from_micros(usage.cpu_usec),
            memory: Bytes(usage.memory_current),
            memory_peak: Bytes(usage.memory_peak),
            processes: u32::try_from(usage.pids).unwrap_or(u32::MAX),
        })
    }
    fn dropped_lines(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }
    fn trouble(&self) -> Option<Reason> {
        self.0.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
    fn exec(&self, argv: Vec<String>, longest: Duration) -> Boxed<'_, Result<ExecOutput, String>> {
        let Handle(run) = self;
        Box::pin(async move { exec::run(&run.engine, &run.name, run.group.as_deref(), argv, longest).await })
    }
}
