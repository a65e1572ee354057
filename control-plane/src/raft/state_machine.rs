//! Between openraft and a [`Machine`]: decodes commands, applies them, builds and installs snapshots.
//!
//! The state lives in memory. After a restart it is the newest snapshot plus the log that follows, so nothing here is
//! flushed on the apply path, and [`applied_state`](RaftStateMachine::applied_state) never reports more than snapshots and log hold.

use std::sync::{Arc, Mutex, PoisonError};

use openraft::storage::{RaftStateMachine, Snapshot};
use openraft::{EntryPayload, ErrorSubject, ErrorVerb, OptionalSend, RaftSnapshotBuilder, StorageIOError};
use optimus_common::planted::planted;
use optimus_host::failpoint;
use tokio::sync::watch;

use super::IoMode;
use super::error::StoreError;
use super::fatal::Fatal;
use super::machine::{Capture, Machine};
use super::runtime::{Mark, Stored, stored};
use super::snapshots::{Held, Loaded, RECEIVING, SnapshotFile, SnapshotStore};
use super::types::{Answers, Batch, Entry, LogId, SnapshotMeta, StorageError, StoredMembership, Types};

/// The replicated state and where it stands in the log.
pub(crate) struct StateMachine<M: Machine> {
    machine: M,
    last: Option<LogId>,
    membership: StoredMembership,
    snapshots: Arc<SnapshotStore>,
    applied: watch::Sender<u64>,
    fatal: Fatal,
    io: IoMode,
    /// Makes snapshot ids unique within this run; the log id in them does the rest.
    built: u64,
}

impl<M: Machine> StateMachine<M> {
    /// A state machine at `newest`, or at the beginning.
    ///
    /// # Errors
    /// What the machine said about the snapshot.
    pub(crate) fn new(
        machine: M,
        newest: Option<Loaded>,
        snapshots: Arc<SnapshotStore>,
        applied: watch::Sender<u64>,
        fatal: Fatal,
        io: IoMode,
    ) -> Result<Self, String> {
        let mut this = Self { machine, last: None, membership: StoredMembership::default(), snapshots, applied, fatal, io, built: 0 };
        if let Some(loaded) = newest {
            guarded("restore a snapshot", || this.machine.restore(&loaded.content))?;
            this.restored(&loaded.meta);
        }
        Ok(this)
    }

    fn restored(&mut self, meta: &SnapshotMeta) {
        self.last = meta.last_log_id;
        if let Some(last) = self.last.as_mut().filter(|_| planted("skip-after-snapshot")) {
            last.index += 1;
        }
        self.membership = meta.last_membership.clone();
        self.publish();
    }

    fn publish(&mut self) {
        let index = self.last.map_or(0, |id| id.index);
        self.machine.published(index);
        self.applied.send_replace(index);
    }

    /// Decodes all before applying any: a batch is applied whole or not at all.
    // The size of the error is openraft's choice; every method of its traits returns it.
    #[allow(clippy::result_large_err)]
    fn apply_batch(&mut self, id: LogId, batch: &Batch) -> Result<Answers, StorageError> {
        let mut commands = Vec::with_capacity(batch.0.len());
        for (n, bytes) in batch.0.iter().enumerate() {
            match rmp_serde::from_slice::<M::Command>(&bytes.0) {
                Ok(command) => commands.push(command),
                // Skipping it would give this server another history than its peers.
                Err(e) => {
                    let reason = format!(
                        "command {n} of log entry {} does not decode: {e}; this binary is older than the command or the \
                         command is damaged: install the version the other servers run",
                        id.index
                    );
                    return Err(self.fail(ErrorSubject::Apply(id), ErrorVerb::Write, reason));
                }
            }
        }
        if planted("half-batch") && commands.len() > 1 {
            commands.pop();
        }
        // openraft 0.9.25 does not notice a panic here until the next command, and the proposer would wait in vain.
        let applied = guarded("apply a command", || Ok(commands.into_iter().map(|c| self.machine.apply(id.index, c)).collect()));
        let answers: Vec<M::Answer> = applied.map_err(|reason| {
            self.fail(ErrorSubject::Apply(id), ErrorVerb::Write, format!("log entry {} was not applied: {reason}", id.index))
        })?;
        Ok(Answers(Some(Box::new(answers))))
    }

    fn fail(&self, subject: ErrorSubject<u64>, verb: ErrorVerb, reason: String) -> StorageError {
        self.fatal.raise(reason.clone());
        StorageIOError::new(subject, verb, openraft::AnyError::error(reason)).into()
    }
}

/// Runs the machine's code, turning a panic in it into a reason to stop: the state may be half changed.
fn guarded<T>(what: &str, work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(format!("the state machine panicked while asked to {what}: {}", said.unwrap_or("no message")))
    })
}

fn snapshot_error(fatal: &Fatal, verb: ErrorVerb, e: &StoreError) -> StorageError {
    fatal.raise(e.chain());
    StorageIOError::new(ErrorSubject::Snapshot(None), verb, openraft::AnyError::error(e.chain())).into()
}

/// The mark of a snapshot: its last entry and the membership it carries.
pub(crate) fn mark(meta: &SnapshotMeta) -> Option<Mark> {
    let voters = Some(meta.last_membership.membership().get_joint_config().clone());
    meta.last_log_id.map(|id| Mark { voters, ..id.into() })
}

fn tell_snapshot(meta: &SnapshotMeta, installed: bool) {
    if let Some(last) = mark(meta) {
        stored(|| Stored::Snapshot { last, installed });
    }
}

impl<M: Machine> RaftStateMachine<Types> for StateMachine<M> {
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), StorageError> {
        Ok((self.last, self.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Answers>, StorageError>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut all = Vec::new();
        failpoint::hit("apply.before");
        for entry in entries {
            let answers = match entry.payload {
                EntryPayload::Blank => Answers::default(),
                EntryPayload::Normal(batch) => self.apply_batch(entry.log_id, &batch)?,
                EntryPayload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(entry.log_id), membership);
                    Answers::default()
                }
            };
            self.last = Some(entry.log_id);
            all.push(answers);
        }
        self.publish();
        failpoint::hit("apply.after");
        Ok(all)
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        self.built += 1;
        let at = self.last.map_or_else(|| "start".to_owned(), |id| id.to_string());
        let meta =
            SnapshotMeta { last_log_id: self.last, last_membership: self.membership.clone(), snapshot_id: format!("{at}-{}", self.built) };
        SnapshotBuilder {
            meta,
            capture: Mutex::new(Some(self.machine.snapshot())),
            snapshots: self.snapshots.clone(),
            fatal: self.fatal.clone(),
            io: self.io,
        }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<SnapshotFile>, StorageError> {
        Ok(Box::default())
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: Box<SnapshotFile>) -> Result<(), StorageError> {
        if self.last > meta.last_log_id {
            // Installing it would take back what was applied and answered.
            tracing::warn!(snapshot = %meta, "ignored a snapshot older than the applied state");
            return Ok(());
        }
        let Some(held) = snapshot.0 else {
            return Err(self.fail(ErrorSubject::Snapshot(None), ErrorVerb::Read, format!("snapshot {} has no file", meta.snapshot_id)));
        };
        let received = held.name() == RECEIVING;
        let loaded = self.io.run(move || held.load()).await.map_err(|e| snapshot_error(&self.fatal, ErrorVerb::Read, &e))?;
        // The machine checks the content first: a snapshot it refuses must not become the one a restart begins with.
        if let Err(reason) = guarded("restore a snapshot", || self.machine.restore(&loaded.content)) {
            let reason = format!("the state refuses snapshot {}: {reason}", meta.snapshot_id);
            return Err(self.fail(ErrorSubject::Snapshot(None), ErrorVerb::Write, reason));
        }
        let (snapshots, copy) = (self.snapshots.clone(), meta.clone());
        let saved = self.io.run(move || if received { snapshots.adopt(&copy) } else { snapshots.save(&copy, &loaded.content) }).await;
        saved.map_err(|e| snapshot_error(&self.fatal, ErrorVerb::Write, &e))?;
        // Readers see it only now: what they saw must not be gone after a restart.
        self.restored(meta);
        tell_snapshot(meta, true);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<Types>>, StorageError> {
        let snapshots = self.snapshots.clone();
        let newest = self.io.run(move || snapshots.newest()).await;
        let newest = newest.map_err(|e| snapshot_error(&self.fatal, ErrorVerb::Read, &e))?;
        Ok(newest.map(handle))
    }
}

fn handle(held: Arc<Held>) -> Snapshot<Types> {
    Snapshot { meta: held.meta(), snapshot: Box::new(SnapshotFile(Some(held))) }
}

/// A state captured at one moment, written out while newer entries are applied.
pub(crate) struct SnapshotBuilder {
    meta: SnapshotMeta,
    /// In a mutex only because openraft wants the builder to be `Sync`.
    capture: Mutex<Option<Capture>>,
    snapshots: Arc<SnapshotStore>,
    fatal: Fatal,
    io: IoMode,
}

impl RaftSnapshotBuilder<Types> for SnapshotBuilder {
    async fn build_snapshot(&mut self) -> Result<Snapshot<Types>, StorageError> {
        let capture = self.capture.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(capture) = capture else {
            let e = StoreError::Stopped("a snapshot builder was used twice".to_owned());
            return Err(snapshot_error(&self.fatal, ErrorVerb::Write, &e));
        };
        let (snapshots, meta) = (self.snapshots.clone(), self.meta.clone());
        let built = self.io.run(move || {
            let content = guarded("write a snapshot", || Ok(capture())).map_err(StoreError::Stopped)?;
            snapshots.save(&meta, &content)?;
            snapshots.newest()
        });
        let newest = built.await.map_err(|e| snapshot_error(&self.fatal, ErrorVerb::Write, &e))?;
        tell_snapshot(&self.meta, false);
        // Of what was built only the id matters to openraft; one received meanwhile may be newer.
        Ok(Snapshot { meta: self.meta.clone(), snapshot: Box::new(SnapshotFile(newest)) })
    }
}
