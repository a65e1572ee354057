//! The frozen shapes of what is stored and sent: MessagePack with field names inside a [`record`](super::record).
//!
//! They are ours and not openraft's, so that a new openraft cannot change what is on disk. Fields may be added with
//! `#[serde(default)]`; anything else is a new version next to the old one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use openraft::{BasicNode, CommittedLeaderId, EntryPayload};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::record::{self, Damage, Kind};
use super::types::{Batch, Blob, Entry, LogId, Membership, StoredMembership, Vote};

/// The only version of every shape so far.
const V1: u16 = 1;

/// Encodes into a sealed record.
pub(crate) fn encode<T: Serialize>(kind: Kind, place: u64, value: &T) -> Vec<u8> {
    let payload = rmp_serde::to_vec_named(value).expect("our own shapes have no map key or type MessagePack refuses");
    record::seal(kind, V1, place, &payload)
}

/// Opens and decodes a sealed record.
pub(crate) fn decode<T: DeserializeOwned>(kind: Kind, place: u64, bytes: &[u8]) -> Result<T, Damage> {
    match record::open(kind, place, bytes)? {
        (V1, payload) => rmp_serde::from_slice(payload).map_err(|e| Damage::Content(e.to_string())),
        (version, _) => Err(Damage::Version(version)),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LogIdV1 {
    pub term: u64,
    pub node: u64,
    pub index: u64,
}

impl From<LogId> for LogIdV1 {
    fn from(id: LogId) -> Self {
        Self { term: id.leader_id.term, node: id.leader_id.node_id, index: id.index }
    }
}

impl From<LogIdV1> for LogId {
    fn from(id: LogIdV1) -> Self {
        LogId::new(CommittedLeaderId::new(id.term, id.node), id.index)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VoteV1 {
    pub term: u64,
    pub node: u64,
    pub committed: bool,
}

impl From<Vote> for VoteV1 {
    fn from(v: Vote) -> Self {
        Self { term: v.leader_id.term, node: v.leader_id.node_id, committed: v.committed }
    }
}

impl From<VoteV1> for Vote {
    fn from(v: VoteV1) -> Self {
        if v.committed { Vote::new_committed(v.term, v.node) } else { Vote::new(v.term, v.node) }
    }
}

/// Whose store this is; a store moved to another server must not vote there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OwnerV1 {
    pub node: u64,
}

/// The number of a commit to the log's file; each is one higher than the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GenerationV1 {
    pub number: u64,
}

/// The head of the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JournalHeadV1 {
    /// Whose journal it is.
    pub node: u64,
    /// What the numbers of its records are combined with.
    pub salt: u64,
}

/// One record of the journal: what one flush made durable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JournalV1 {
    /// The vote given, if one was.
    pub vote: Option<VoteV1>,
    /// The newest commit mark, if there is a new one.
    pub committed: Option<LogIdV1>,
    /// Entries that follow the last one, in order.
    pub entries: Vec<JournalEntryV1>,
}

/// An entry as it is stored in the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JournalEntryV1 {
    /// Its index.
    pub index: u64,
    /// The sealed record of kind `Entry`.
    pub record: Blob,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MembershipV1 {
    /// One set of voters, two while a change is under way.
    pub voters: Vec<BTreeSet<u64>>,
    /// Address of every member, learners included.
    pub addrs: BTreeMap<u64, String>,
}

impl From<&Membership> for MembershipV1 {
    fn from(m: &Membership) -> Self {
        Self { voters: m.get_joint_config().clone(), addrs: m.nodes().map(|(id, n)| (*id, n.addr.clone())).collect() }
    }
}

impl From<MembershipV1> for Membership {
    fn from(m: MembershipV1) -> Self {
        let nodes: BTreeMap<u64, BasicNode> = m.addrs.into_iter().map(|(id, addr)| (id, BasicNode { addr })).collect();
        Membership::new(m.voters, nodes)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum BodyV1 {
    Blank,
    Commands(Arc<Vec<Blob>>),
    Membership(MembershipV1),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EntryV1 {
    pub id: LogIdV1,
    pub body: BodyV1,
}

impl From<&Entry> for EntryV1 {
    fn from(e: &Entry) -> Self {
        let body = match &e.payload {
            EntryPayload::Blank => BodyV1::Blank,
            EntryPayload::Normal(batch) => BodyV1::Commands(batch.0.clone()),
            EntryPayload::Membership(m) => BodyV1::Membership(m.into()),
        };
        Self { id: e.log_id.into(), body }
    }
}

impl From<EntryV1> for Entry {
    fn from(e: EntryV1) -> Self {
        let payload = match e.body {
            BodyV1::Blank => EntryPayload::Blank,
            BodyV1::Commands(commands) => EntryPayload::Normal(Batch(commands)),
            BodyV1::Membership(m) => EntryPayload::Membership(m.into()),
        };
        Entry { log_id: e.id.into(), payload }
    }
}

/// Decodes an entry found under `index` and checks that it says so itself.
pub(crate) fn decode_entry(index: u64, bytes: &[u8]) -> Result<Entry, Damage> {
    let entry: EntryV1 = decode(Kind::Entry, index, bytes)?;
    if entry.id.index != index {
        return Err(Damage::Content(format!("entry says it has index {}", entry.id.index)));
    }
    Ok(entry.into())
}

/// Membership with the log id it was decided at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct StoredMembershipV1 {
    pub at: Option<LogIdV1>,
    pub membership: MembershipV1,
}

impl From<&StoredMembership> for StoredMembershipV1 {
    fn from(m: &StoredMembership) -> Self {
        Self { at: m.log_id().map(Into::into), membership: m.membership().into() }
    }
}

impl From<StoredMembershipV1> for StoredMembership {
    fn from(m: StoredMembershipV1) -> Self {
        StoredMembership::new(m.at.map(Into::into), m.membership.into())
    }
}

/// The head of a snapshot; the content follows it in the file or message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotHeadV1 {
    pub id: String,
    pub last: Option<LogIdV1>,
    pub membership: StoredMembershipV1,
    /// Length of the content, in bytes.
    pub length: u64,
    /// BLAKE3 of the content.
    pub hash: [u8; 32],
}
