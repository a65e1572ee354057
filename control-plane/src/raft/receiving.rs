//! Receiving a snapshot: its parts gather in one file, which is checked, flushed and then given to openraft.
//!
//! ```text
//! idle --first part--> receiving --last byte, hash right, flushed--> finishing --openraft has taken it--> done
//!  ^                       | newer snapshot: begins anew                 | failed
//!  +---- QUIET seconds ----+<--------------------------------------------+
//! ```
//! One snapshot at a time: only the leader sends them, and one of a newer leader replaces what an older one began. A part
//! counts only where the bytes so far end, so lost, doubled and reordered parts change nothing but the answer, which
//! always says which byte comes next. Nothing here survives a restart; the sender is then told to begin anew.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use openraft::AsyncRuntime;
use openraft::storage::Snapshot;
use optimus_common::disk::{Disk, DiskFile};

use super::error::{StoreError, chain};
use super::fatal::Fatal;
use super::network::{PART, PeerError, Reply, SnapshotKey, SnapshotPart, SnapshotProgress};
use super::record::HEADER;
use super::runtime::Runtime;
use super::snapshots::{Held, RECEIVING, SnapshotFile};
use super::tuning::IoMode;
use super::types::{LogId, Raft, Vote};

/// Largest snapshot file accepted, in bytes. It must be held in memory once, to be restored.
const MAX_TOTAL: u64 = 4 << 30;
/// Seconds without a part after which a transfer is given up and its file removed.
const QUIET: u32 = 60;
/// Bytes written between two flushes, as when a snapshot is written here.
const FLUSH_EVERY: u64 = 8 << 20;

/// The receiving end of one server.
pub(crate) struct Receiver {
    disk: Arc<dyn Disk>,
    state: Mutex<State>,
    fatal: Fatal,
    io: IoMode,
}

#[derive(Debug)]
enum State {
    Idle,
    Receiving(Incoming),
    Finishing(SnapshotKey),
    Done(SnapshotKey),
}

#[derive(Debug)]
struct Incoming {
    key: SnapshotKey,
    vote: Vote,
    file: Box<dyn DiskFile>,
    /// Bytes written so far.
    at: u64,
    unflushed: u64,
    /// Seconds since the last part.
    quiet: u32,
}

/// What a part led to.
#[derive(Debug)]
enum Outcome {
    Wants(u64),
    /// All bytes are there, checked and flushed: to be installed.
    Whole(Box<Held>),
    Done,
}

#[derive(Debug)]
enum Failure {
    /// The sender's affair, or for want of space; this server goes on.
    Refused(String),
    Disk(StoreError),
}

fn disk_failure(operation: &'static str, e: std::io::Error) -> Failure {
    match e.kind() {
        std::io::ErrorKind::StorageFull => Failure::Refused(format!("no space left on the disk to {operation} {RECEIVING}")),
        _ => Failure::Disk(StoreError::io(operation, RECEIVING, e)),
    }
}

impl Receiver {
    pub(crate) fn new(disk: Arc<dyn Disk>, fatal: Fatal, io: IoMode) -> Self {
        Self { disk, state: Mutex::new(State::Idle), fatal, io }
    }

    /// Takes one part sent under `vote`, and installs the snapshot when it was the last one.
    ///
    /// # Errors
    /// [`PeerError::Refused`] when the part makes no sense or the content is not what it should be;
    /// [`PeerError::Stopped`] when this server's disk or Raft has failed.
    pub(crate) async fn take(self: &Arc<Self>, raft: &Raft, vote: Vote, part: SnapshotPart) -> Result<Bytes, PeerError> {
        let stopped = |e: openraft::error::Fatal<u64>| PeerError::Stopped(self.fatal.get().unwrap_or_else(|| e.to_string()));
        let own = raft.with_raft_state(|state| *state.vote_ref()).await.map_err(stopped)?;
        if own > vote {
            return Ok(Reply::encode_snapshot(&SnapshotProgress { vote: own, wants: 0, done: false }));
        }
        let (this, key) = (self.clone(), part.key.clone());
        // Outside the runtime's threads, and to the end also when the caller has gone away.
        let taken = self.io.run(move || Ok(this.accept(vote, &part))).await;
        let outcome = match taken.unwrap_or_else(|e| Err(Failure::Disk(e))) {
            Ok(outcome) => outcome,
            Err(Failure::Refused(why)) => return Err(PeerError::Refused(why)),
            Err(Failure::Disk(e)) => {
                self.fatal.raise(chain(&e));
                return Err(PeerError::Stopped(chain(&e)));
            }
        };
        let answer = match outcome {
            Outcome::Wants(wants) => SnapshotProgress { vote, wants, done: false },
            Outcome::Done => SnapshotProgress { vote, wants: key.total, done: true },
            Outcome::Whole(held) => {
                // A task of its own: half an installation must not be left behind by a caller that goes away.
                let task = Runtime::spawn(self.clone().install(raft.clone(), vote, key.clone(), *held));
                let own = task.await.map_err(|e| PeerError::Stopped(format!("the installation did not finish: {e}")))?;
                let own = own.map_err(stopped)?;
                SnapshotProgress { vote: own, wants: key.total, done: own <= vote }
            }
        };
        Ok(Reply::encode_snapshot(&answer))
    }

    async fn install(self: Arc<Self>, raft: Raft, vote: Vote, key: SnapshotKey, held: Held) -> Result<Vote, openraft::error::Fatal<u64>> {
        let snapshot = Snapshot { meta: held.meta(), snapshot: Box::new(SnapshotFile(Some(Arc::new(held)))) };
        let installed = raft.install_full_snapshot(vote, snapshot).await;
        let next = match &installed {
            Ok(answer) if answer.vote <= vote => State::Done(key),
            _ => State::Idle,
        };
        let this = self.clone();
        let cleaned = self.io.run(move || this.reset(next)).await;
        if let Err(e) = cleaned {
            self.fatal.raise(chain(&e));
        }
        installed.map(|answer| answer.vote)
    }

    /// Leaves the present state for `next`; the file goes, unless it was renamed to be the newest snapshot.
    fn reset(&self, next: State) -> Result<(), StoreError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = next;
        self.remove()
    }

    fn remove(&self) -> Result<(), StoreError> {
        match self.disk.exists(RECEIVING).and_then(|there| if there { self.disk.remove(RECEIVING) } else { Ok(()) }) {
            Ok(()) => Ok(()),
            Err(e) => Err(StoreError::io("remove", RECEIVING, e)),
        }
    }

    /// Once a second: gives up a transfer whose sender has gone away.
    pub(crate) async fn tick(self: &Arc<Self>) {
        // Held only while a part is being written: then there is no silence to count.
        let abandoned = match self.state.try_lock().as_deref_mut() {
            Ok(State::Receiving(incoming)) => {
                incoming.quiet += 1;
                incoming.quiet >= QUIET
            }
            _ => false,
        };
        if abandoned {
            let this = self.clone();
            if let Err(e) = self.io.run(move || this.give_up()).await {
                self.fatal.raise(chain(&e));
            }
        }
    }

    fn give_up(&self) -> Result<(), StoreError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &*state {
            State::Receiving(incoming) if incoming.quiet >= QUIET => {
                tracing::info!(snapshot = incoming.key.id, received = incoming.at, "gave up a snapshot whose sender went away");
                *state = State::Idle;
                self.remove()
            }
            _ => Ok(()), // a part has come meanwhile
        }
    }

    fn accept(&self, vote: Vote, part: &SnapshotPart) -> Result<Outcome, Failure> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *state {
            State::Done(key) if *key == part.key => return Ok(Outcome::Done),
            State::Finishing(key) if *key == part.key => return Ok(Outcome::Wants(part.key.total)),
            State::Finishing(key) => {
                return Err(Failure::Refused(format!("snapshot {} is being installed", key.id)));
            }
            State::Receiving(incoming) if incoming.key == part.key => incoming.vote = vote,
            State::Receiving(incoming) if newer((incoming.vote, incoming.key.last), (vote, part.key.last)) => {
                return Err(Failure::Refused(format!("the newer snapshot {} is being received", incoming.key.id)));
            }
            _ if part.offset != 0 => return Ok(Outcome::Wants(0)),
            _ => {
                *state = State::Idle;
                *state = State::Receiving(self.begin(vote, &part.key)?);
            }
        }
        let State::Receiving(incoming) = &mut *state else { return Ok(Outcome::Wants(0)) };
        incoming.quiet = 0;
        let written = incoming.write(part);
        let at = incoming.at;
        if written.is_ok() && at < part.key.total {
            return Ok(Outcome::Wants(at));
        }
        // Either way this transfer is over.
        match written.and_then(|()| self.check(incoming)) {
            Ok(held) => {
                *state = State::Finishing(part.key.clone());
                Ok(Outcome::Whole(Box::new(held)))
            }
            Err(e) => {
                *state = State::Idle;
                self.remove().map_err(Failure::Disk)?;
                Err(e)
            }
        }
    }

    /// Takes a part; whether the snapshot is whole now.
    #[cfg(test)]
    pub(crate) fn accepts_for_test(&self, vote: Vote, part: &SnapshotPart) -> bool {
        matches!(self.accept(vote, part), Ok(Outcome::Whole(_)))
    }

    #[cfg(test)]
    pub(crate) fn installed_for_test(&self) {
        self.reset(State::Idle).expect("the simulated disk removes what is there");
    }

    fn begin(&self, vote: Vote, key: &SnapshotKey) -> Result<Incoming, Failure> {
        if key.total <= HEADER as u64 || key.total > MAX_TOTAL {
            return Err(Failure::Refused(format!("a snapshot of {} bytes, at most {MAX_TOTAL} are accepted", key.total)));
        }
        let file = self.disk.open(RECEIVING).map_err(|e| disk_failure("create", e))?;
        file.set_len(0).map_err(|e| disk_failure("empty", e))?;
        Ok(Incoming { key: key.clone(), vote, file, at: 0, unflushed: 0, quiet: 0 })
    }

    /// Flushes the file and compares it with what was announced.
    fn check(&self, incoming: &Incoming) -> Result<Held, Failure> {
        incoming.file.sync_data().map_err(|e| Failure::Disk(StoreError::io("flush", RECEIVING, e)))?;
        let key = &incoming.key;
        let refused = |e: StoreError| match e {
            StoreError::Damaged { reason, .. } => Failure::Refused(format!("snapshot {} arrived damaged: {reason}", key.id)),
            e => Failure::Disk(e),
        };
        let held = Held::open(&*self.disk, RECEIVING).map_err(refused)?;
        let head = held.head();
        if head.id != key.id || head.hash != key.hash || head.last.map(LogId::from) != key.last {
            return Err(Failure::Refused(format!("snapshot {} was announced, {} arrived", key.id, head.id)));
        }
        held.verify().map_err(refused)?;
        Ok(held)
    }
}

/// Whether `held` is newer than `asked`: of a later leader, or of the same one and further on.
fn newer(held: (Vote, Option<LogId>), asked: (Vote, Option<LogId>)) -> bool {
    held.0 > asked.0 || (held.0 == asked.0 && held.1 > asked.1)
}

impl Incoming {
    fn write(&mut self, part: &SnapshotPart) -> Result<(), Failure> {
        let end = part.offset.saturating_add(part.bytes.len() as u64);
        if end > self.key.total || part.bytes.len() > PART {
            return Err(Failure::Refused(format!("a part up to byte {end} of a snapshot of {} bytes", self.key.total)));
        }
        if part.offset != self.at || part.bytes.is_empty() {
            return Ok(());
        }
        self.file.write_at(self.at, &part.bytes).map_err(|e| disk_failure("write", e))?;
        self.at = end;
        self.unflushed += part.bytes.len() as u64;
        if self.unflushed >= FLUSH_EVERY {
            self.file.sync_data().map_err(|e| Failure::Disk(StoreError::io("flush", RECEIVING, e)))?;
            self.unflushed = 0;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "receiving_tests.rs"]
mod tests;
