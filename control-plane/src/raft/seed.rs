//! A store while no server runs on it: making one from a state, and reading one whose cluster is gone.
//!
//! Restore and recover stand on these two. Neither takes part in Raft: what they write is a log that begins behind a
//! snapshot, with this one server as the only voter.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use openraft::{CommittedLeaderId, EntryPayload};
use optimus_common::disk::Disk;

use super::error::StoreError;
use super::log_store::Offline;
use super::machine::Machine;
use super::snapshots::SnapshotStore;
use super::types::{Entry, LogId, Membership, SnapshotMeta, StoredMembership, Vote};

/// Says that a store is being made; a server does not start beside it.
const MARK: &str = "seeding";
/// Entries held in memory at once while a log is read.
const READ_BYTES: usize = 4 << 20;

/// A committed entry as others than openraft see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogEntry {
    /// Term it was proposed in.
    pub term: u64,
    /// Its place in the log.
    pub index: u64,
    /// Encoded commands of the [`Machine`], in order. None: an entry of Raft's own, which changes no state.
    pub commands: Vec<Bytes>,
}

impl From<Entry> for LogEntry {
    fn from(entry: Entry) -> Self {
        let commands = match entry.payload {
            EntryPayload::Normal(batch) => batch.0.iter().map(|b| b.0.clone()).collect(),
            EntryPayload::Blank | EntryPayload::Membership(_) => Vec::new(),
        };
        Self { term: entry.log_id.leader_id.term, index: entry.log_id.index, commands }
    }
}

/// What a new store begins with.
#[derive(Clone, Debug)]
pub struct Seed {
    /// Id of the one server of the new membership. Never one that was in use before.
    pub node_id: u64,
    /// Its address for other servers.
    pub addr: String,
    /// Term of the last entry the state holds; above every term of the servers that are gone.
    pub term: u64,
    /// Index of the last entry the state holds.
    pub index: u64,
    /// The state, as [`Machine::restore`] takes it.
    pub content: Vec<u8>,
}

/// Makes a store on an empty disk. Durable when this returns; a server refuses to start on one that was left half made.
///
/// # Errors
/// [`StoreError::NotEmpty`] when there is a store already; otherwise what the disk says.
pub fn seed(disk: Arc<dyn Disk>, seed: &Seed) -> Result<(), StoreError> {
    let Seed { node_id, addr, term, index, content } = seed;
    let names = disk.list().map_err(|e| StoreError::io("list", "the store", e))?;
    if let Some(file) = names.into_iter().next() {
        return Err(StoreError::NotEmpty { file });
    }
    let marked = disk.open(MARK).and_then(|f| f.sync_data()).and_then(|()| disk.sync_dir());
    marked.map_err(|e| StoreError::io("create", MARK, e))?;

    let last = LogId::new(CommittedLeaderId::new(*term, *node_id), *index);
    let node = openraft::BasicNode { addr: addr.clone() };
    let members = Membership::new(vec![BTreeSet::from([*node_id])], BTreeMap::from([(*node_id, node)]));
    let meta = SnapshotMeta {
        last_log_id: Some(last),
        last_membership: StoredMembership::new(Some(last), members),
        snapshot_id: format!("seed-{index}"),
    };
    let (snapshots, _) = SnapshotStore::open(disk.clone())?;
    snapshots.save(&meta, content)?;
    // The vote of the last entry: the server stands for election in the next term, as after any restart.
    Offline::create(&*disk, *node_id, Vote::new(*term, *node_id), last)?;
    disk.remove(MARK).and_then(|()| disk.sync_dir()).map_err(|e| StoreError::io("remove", MARK, e))
}

/// Refuses a store whose making was cut short.
pub(crate) fn refuse_half_seeded(disk: &dyn Disk) -> Result<(), StoreError> {
    match disk.exists(MARK) {
        Ok(false) => Ok(()),
        Ok(true) => Err(StoreError::HalfSeeded { file: MARK.to_owned() }),
        Err(e) => Err(StoreError::io("look for", MARK, e)),
    }
}

/// The server a store belongs to; `None` where there is no store yet.
///
/// # Errors
/// A damaged or half-made store.
pub fn owner(disk: &dyn Disk) -> Result<Option<u64>, StoreError> {
    refuse_half_seeded(disk)?;
    if !Offline::exists(disk)? {
        return Ok(None);
    }
    Offline::open(disk).map(|store| Some(store.owner))
}

/// Everything a store holds, applied.
#[derive(Debug)]
pub struct Salvaged<M> {
    /// The state behind every entry of the log.
    pub machine: M,
    /// The server the store belongs to.
    pub node_id: u64,
    /// Highest term the server has seen.
    pub term: u64,
    /// Term and index of the last entry.
    pub last: (u64, u64),
    /// Highest index the server knew to be committed when it last noted it; entries above may or may not have been
    /// acknowledged.
    pub committed: u64,
    /// Servers with a vote; two sets while a change was under way.
    pub voters: Vec<BTreeSet<u64>>,
    /// Address of every member.
    pub members: BTreeMap<u64, String>,
}

/// Why a store cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SalvageError {
    /// The store is damaged or not there.
    #[error("failed to read the raft store")]
    Store(#[from] StoreError),
    /// Entries between snapshot and log are nowhere.
    #[error("the log begins after {purged}, the newest snapshot reaches {snapshot}: the entries between are missing")]
    Gap {
        /// Last purged index.
        purged: u64,
        /// Index of the newest snapshot, 0 without any.
        snapshot: u64,
    },
    /// The machine refused the snapshot.
    #[error("the state refuses snapshot {id}: {reason}")]
    Snapshot {
        /// Name of the snapshot.
        id: String,
        /// What the machine said.
        reason: String,
    },
    /// A command cannot be read.
    #[error("command {n} of log entry {index} does not decode: {reason}; use the version of optimus the servers ran")]
    Command {
        /// Index of the entry.
        index: u64,
        /// Which of its commands.
        n: usize,
        /// What is wrong.
        reason: String,
    },
    /// The store was never used.
    #[error("the store is empty: this server was never part of a cluster")]
    Empty,
}

/// Reads a store offline and applies everything it holds to `machine`: the newest snapshot and the whole log, also the
/// entries this server did not know to be committed. An acknowledged write may be among them, and nobody is left to ask.
///
/// # Errors
/// [`SalvageError`]. Nothing of the store's content is changed.
pub fn salvage<M: Machine>(disk: Arc<dyn Disk>, mut machine: M) -> Result<Salvaged<M>, SalvageError> {
    refuse_half_seeded(&*disk)?;
    let store = Offline::open(&*disk)?;
    let (_, newest) = SnapshotStore::open(disk)?;
    let (mut last, mut membership) = (None, Membership::default());
    if let Some(loaded) = newest {
        let refused = |reason| SalvageError::Snapshot { id: loaded.meta.snapshot_id.clone(), reason };
        machine.restore(&loaded.content).map_err(refused)?;
        last = loaded.meta.last_log_id;
        membership = loaded.meta.last_membership.membership().clone();
    }
    let reached = last.map_or(0, |id: LogId| id.index);
    if let Some(purged) = store.opened.purged.filter(|p| last.is_none_or(|l| l.index < p.index)) {
        return Err(SalvageError::Gap { purged: purged.index, snapshot: reached });
    }
    let end = store.opened.last.map_or(0, |id| id.index);
    let mut next = last.map_or(0, |id| id.index + 1);
    while next <= end {
        let entries = store.read(next..=end, READ_BYTES)?;
        let (Some(first), Some(newest)) = (entries.first(), entries.last().map(|e| e.log_id)) else { break };
        if first.log_id.index != next {
            return Err(SalvageError::Gap { purged: first.log_id.index - 1, snapshot: reached });
        }
        for entry in entries {
            apply(&mut machine, &entry)?;
            if let EntryPayload::Membership(m) = entry.payload {
                membership = m;
            }
        }
        (next, last) = (newest.index + 1, Some(newest));
    }
    let last = last.ok_or(SalvageError::Empty)?;
    machine.published(last.index);
    let seen = store.opened.vote.map_or(0, |v| v.leader_id.term);
    Ok(Salvaged {
        machine,
        node_id: store.owner,
        term: seen.max(last.leader_id.term),
        last: (last.leader_id.term, last.index),
        committed: store.opened.committed.map_or(0, |id| id.index).max(reached),
        voters: membership.get_joint_config().clone(),
        members: membership.nodes().map(|(id, node)| (*id, node.addr.clone())).collect(),
    })
}

fn apply<M: Machine>(machine: &mut M, entry: &Entry) -> Result<(), SalvageError> {
    let EntryPayload::Normal(batch) = &entry.payload else { return Ok(()) };
    let index = entry.log_id.index;
    for (n, bytes) in batch.0.iter().enumerate() {
        let command = rmp_serde::from_slice(&bytes.0).map_err(|e| SalvageError::Command { index, n, reason: e.to_string() })?;
        machine.apply(index, command);
    }
    Ok(())
}
