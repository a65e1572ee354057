//! What can go wrong, in words for a person.

use std::io;
use std::sync::Arc;

use super::record::Damage;

/// What to do about a damaged record; part of the message, because whoever reads it has no time to search.
const ADVICE: &str = "do not delete the file: replace this server (remove it from the cluster, wipe its directory, join it under a new id), \
                      or restore a single server from its newest backup";

/// Free space a server asks for after its disk was full, in bytes: room for the log to grow by some snapshots' worth.
const ROOM: u64 = 256 << 20;

/// The durable store failed or is damaged.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// A record is not what was written.
    #[error("damaged record in file {file}, table {table}, key {key}: {reason}; {ADVICE}")]
    Damaged {
        /// File below the data directory.
        file: String,
        /// Table or part of the file.
        table: &'static str,
        /// Key of the record.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The disk refused.
    #[error("failed to {operation} {file}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// File below the data directory.
        file: String,
        /// The cause.
        #[source]
        source: Arc<dyn std::error::Error + Send + Sync>,
    },
    /// The disk is full.
    #[error(
        "no space left on the disk to {operation} {file}: nothing acknowledged is lost; free at least {} MiB on the file system of the data directory, then start this server again",
        ROOM >> 20
    )]
    Full {
        /// What was tried.
        operation: &'static str,
        /// File below the data directory.
        file: String,
    },
    /// The store belongs to another server.
    #[error("{file} belongs to server {owner}, this is server {asked}; give each server its own directory and never reuse a server id")]
    WrongOwner {
        /// File below the data directory.
        file: String,
        /// Server that created it.
        owner: u64,
        /// Server that opens it.
        asked: u64,
    },
    /// There are snapshots or a journal but no log: without the vote this server could vote twice in one term.
    #[error(
        "{file} is missing although there are snapshots or a journal beside it: without its vote this server could vote twice; {ADVICE}"
    )]
    Missing {
        /// File below the data directory.
        file: String,
    },
    /// A restore or recovery into this store did not finish.
    #[error("a restore into this directory did not finish ({file} is still there): remove the directory and restore again")]
    HalfSeeded {
        /// The mark it left.
        file: String,
    },
    /// A store must not be made where there is one.
    #[error("there is a store already: {file} exists")]
    NotEmpty {
        /// What was found.
        file: String,
    },
    /// An earlier failure stopped the store.
    #[error("the store has stopped: {0}")]
    Stopped(String),
}

impl StoreError {
    pub(crate) fn io(operation: &'static str, file: &str, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        let cause: &dyn std::any::Any = &source;
        let kind = match cause.downcast_ref::<redb::Error>() {
            Some(redb::Error::Io(e)) => Some(e.kind()),
            _ => cause.downcast_ref::<io::Error>().map(io::Error::kind),
        };
        if matches!(kind, Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)) {
            return Self::Full { operation, file: file.to_owned() };
        }
        Self::Io { operation, file: file.to_owned(), source: Arc::new(source) }
    }

    pub(crate) fn damaged(file: &str, table: &'static str, key: impl ToString, damage: Damage) -> Self {
        Self::Damaged { file: file.to_owned(), table, key: key.to_string(), reason: damage.to_string() }
    }

    /// What redb says, told apart: damage is not the same as a disk that refuses.
    pub(crate) fn redb(operation: &'static str, file: &str, source: impl Into<redb::Error>) -> Self {
        match source.into() {
            redb::Error::Corrupted(reason) => {
                Self::Damaged { file: file.to_owned(), table: "(pages)", key: "(unknown)".to_owned(), reason }
            }
            other => Self::io(operation, file, other),
        }
    }

    /// The whole chain of causes in one line, for places that keep only text.
    pub(crate) fn chain(&self) -> String {
        chain(self)
    }
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        text.push_str(": ");
        text.push_str(&e.to_string());
        cause = e.source();
    }
    text
}

/// Why a server could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The settings contradict each other.
    #[error("invalid raft settings: {0}")]
    Settings(String),
    /// The store could not be opened.
    #[error("failed to open the raft store")]
    Store(#[from] StoreError),
    /// The newest snapshot is older than what was purged from the log: the state in between is nowhere.
    #[error(
        "the log is purged up to {purged}, the newest snapshot reaches {snapshot}: snapshot files are missing; restore them, or replace this server"
    )]
    SnapshotMissing {
        /// Last purged index.
        purged: u64,
        /// Index of the newest snapshot, 0 without any.
        snapshot: u64,
    },
    /// The state machine refused the newest snapshot.
    #[error("the state refuses snapshot {id}: {reason}")]
    Restore {
        /// Name of the snapshot.
        id: String,
        /// What the machine said.
        reason: String,
    },
    /// openraft did not start.
    #[error("raft did not start: {0}")]
    Raft(String),
}

/// Why a proposal has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// The queue of proposals is full; nothing was appended. Retry later.
    #[error("too many proposals are waiting")]
    Overloaded,
    /// The command does not fit one log entry; nothing was appended.
    #[error("proposal of {commands} commands and {bytes} bytes is too large, at most {max_commands} commands and {max_bytes} bytes fit")]
    TooLarge {
        /// Commands in the proposal.
        commands: usize,
        /// Their encoded size.
        bytes: usize,
        /// Most commands in one proposal.
        max_commands: usize,
        /// Most bytes in one proposal.
        max_bytes: usize,
    },
    /// The command could not be encoded; nothing was appended.
    #[error("command does not encode: {0}")]
    Encode(String),
    /// No leader took the command: none is known, or the one asked does not lead. Nothing was appended.
    #[error("this server is not the leader (leader: {leader:?})")]
    NoLeader {
        /// The leader, when known.
        leader: Option<u64>,
    },
    /// No quorum confirmed the entry in time. The outcome is unknown: retry under the same request id.
    #[error("no quorum confirmed the proposal in time, its outcome is unknown")]
    Timeout,
    /// The leader was lost while the proposal was under way. The outcome is unknown: retry under the same request id.
    #[error("the leader was lost while the proposal was under way, its outcome is unknown")]
    Unknown,
    /// The leader does not understand or allow the command; nothing was appended.
    #[error("the leader refused the proposal: {0}")]
    Refused(String),
    /// The command was committed at `index`, but its answer does not decode: the leader runs a newer version.
    #[error("the proposal was committed as entry {index}, its answer does not decode: {reason}")]
    Answer {
        /// Where it was committed.
        index: u64,
        /// Why the answer does not decode.
        reason: String,
    },
    /// The node is shutting down. The outcome of a proposal already taken is unknown.
    #[error("the raft node is stopping")]
    Stopped,
    /// The node must stop; see the reason.
    #[error("the raft node failed: {0}")]
    Fatal(String),
}

/// Why a read could not be confirmed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// This server does not lead, or cannot reach a quorum to prove it.
    #[error("this server cannot confirm that it leads (leader: {leader:?})")]
    NoLeader {
        /// The leader, when known.
        leader: Option<u64>,
    },
    /// Too many reads wait already.
    #[error("too many reads are waiting")]
    Overloaded,
    /// Not confirmed or not applied in time.
    #[error("the read was not confirmed in time")]
    Timeout,
    /// The node is shutting down.
    #[error("the raft node is stopping")]
    Stopped,
    /// The node must stop; see the reason.
    #[error("the raft node failed: {0}")]
    Fatal(String),
}

/// Why an administrative request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdminError {
    /// Only the leader can do this.
    #[error("this server is not the leader (leader: {leader:?})")]
    NoLeader {
        /// The leader, when known.
        leader: Option<u64>,
    },
    /// Refused, with the reason.
    #[error("refused: {0}")]
    Refused(String),
    /// Not done in time; it may still happen.
    #[error("not done in time, it may still happen")]
    Timeout,
    /// The node must stop; see the reason.
    #[error("the raft node failed: {0}")]
    Fatal(String),
}

/// Why leadership was not handed over. Unless said otherwise the old leader goes on leading.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// Only the leader can hand over.
    #[error("this server is not the leader (leader: {leader:?})")]
    NoLeader {
        /// The leader, when known.
        leader: Option<u64>,
    },
    /// Another hand-over or a membership change is under way.
    #[error("another hand-over or a membership change is under way")]
    Busy,
    /// The target has no vote in this cluster.
    #[error("server {0} has no vote, so it cannot lead")]
    NotVoter(u64),
    /// There is no other voter.
    #[error("there is no other server with a vote")]
    NoOther,
    /// The target did not hold the whole log in time.
    #[error("server {target} holds the log up to {held} of {last}, too far behind to lead")]
    Behind {
        /// The server that was to lead.
        target: u64,
        /// Last entry it is known to hold.
        held: u64,
        /// Last entry of the leader.
        last: u64,
    },
    /// The target, or too many of the others, did not agree.
    #[error("server {target} cannot take over: {reason}")]
    Refused {
        /// The server that was to lead.
        target: u64,
        /// What it or the others said.
        reason: String,
    },
    /// The target did not win in time. Another election may be under way; proposals are taken again by whoever leads.
    #[error("server {target} did not take over in time")]
    Timeout {
        /// The server that was to lead.
        target: u64,
    },
    /// The node must stop; see the reason.
    #[error("the raft node failed: {0}")]
    Fatal(String),
}

pub(crate) fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}
