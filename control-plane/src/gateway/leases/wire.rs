//! What servers and leader say to each other about leases: [`PeerRpc::Leases`](crate::raft::PeerRpc::Leases) bodies.
//!
//! Frames as everywhere on the wire (kind, version, bincode), so that a server of another release is refused instead of
//! misread. All times are ages on the sender's monotonic clock, in milliseconds: clocks of two servers are never compared.

use optimus_common::NodeId;
use optimus_common::codec::{self, DecodeError, FRAME_HEAD};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

const REPORT: (u16, u16) = (601, 1);
const ANSWER: (u16, u16) = (602, 1);

/// Most nodes in one report; beyond it a report is refused. 20 bytes a node.
pub const NODES_MAX: usize = 100_000;

/// Of a server to the leader: which nodes it hears. A beat without changes and without silent nodes is some 40 bytes,
/// however many nodes there are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseReport {
    /// Who reports; must be the server the transport has proven.
    pub server: u64,
    /// Random, made when the server starts.
    pub incarnation: u64,
    /// Grows with each report of an incarnation; a late one is ignored.
    pub seq: u64,
    /// For how long the server has been open to agents without a break.
    pub serving: u64,
    /// The set after `content`: its version, count and [`hash`](hash_of).
    pub version: u64,
    pub count: u32,
    pub hash: u64,
    /// Every node of the set that is not in `silent` was heard within so long.
    pub within: u32,
    /// Nodes of the set that were not, each with its true age.
    pub silent: Vec<(NodeId, u32)>,
    pub content: Content,
}

/// What changed in the set of connected nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// The whole set, each node with the age of its session, and the nodes that left lately with the age of their last word.
    Full { nodes: Vec<(NodeId, u32)>, left: Vec<(NodeId, u32)> },
    /// What differs from version `base`.
    Changes { base: u64, joined: Vec<(NodeId, u32)>, left: Vec<(NodeId, u32)> },
}

/// Of the leader.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum LeaseAnswer {
    /// Taken. `replaced`: nodes whose session at another server is younger than so many milliseconds; older ones here end.
    Taken { version: u64, replaced: Vec<(NodeId, u32)> },
    /// The leader does not hold the version these changes start from: send the whole set.
    SendFull,
    /// The server asked does not lead, or has lost its quorum.
    NotLeading,
}

/// A digest of a set that changes in constant time: the xor over all members.
pub fn hash_of(node: NodeId) -> u64 {
    // splitmix64 over both halves: ids are time-ordered, so their plain xor would collide.
    let (high, low) = node.0.as_u64_pair();
    mix(mix(high) ^ low)
}

fn mix(value: u64) -> u64 {
    let z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl LeaseReport {
    pub fn encode(&self) -> Vec<u8> {
        codec::frame(REPORT.0, REPORT.1, self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let report: Self = open(REPORT, bytes)?;
        let (Content::Full { nodes: a, left: b } | Content::Changes { base: _, joined: a, left: b }) = &report.content;
        let longest = report.silent.len().max(a.len()).max(b.len());
        if longest > NODES_MAX {
            return Err(DecodeError::TooLong { length: longest });
        }
        Ok(report)
    }
}

impl LeaseAnswer {
    pub fn encode(&self) -> Vec<u8> {
        codec::frame(ANSWER.0, ANSWER.1, self)
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        open(ANSWER, bytes)
    }
}

fn open<T: DeserializeOwned>(wanted: (u16, u16), bytes: &[u8]) -> Result<T, DecodeError> {
    let head: [u8; FRAME_HEAD] = bytes
        .get(..FRAME_HEAD)
        .and_then(|head| head.try_into().ok())
        .ok_or(DecodeError::Truncated { found: bytes.len(), needed: FRAME_HEAD })?;
    let (kind, version, length) = codec::frame_head(head)?;
    let payload = &bytes[FRAME_HEAD..];
    if (kind, version) != wanted {
        return Err(DecodeError::Unknown { kind, version });
    }
    if length != payload.len() {
        return Err(DecodeError::Truncated { found: payload.len(), needed: length });
    }
    codec::from_wire(payload)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn report(nodes: u128) -> LeaseReport {
        let nodes = (0..nodes).map(|n| (NodeId(uuid::Uuid::from_u128(n)), 70_000)).collect();
        LeaseReport {
            server: 3,
            incarnation: u64::MAX,
            seq: 1_000_000,
            serving: 100_000_000,
            version: 70_000,
            count: 10_000,
            hash: u64::MAX,
            within: 1400,
            silent: vec![],
            content: Content::Full { nodes, left: vec![] },
        }
    }

    #[test]
    fn a_node_costs_at_most_24_bytes_and_a_beat_next_to_nothing() {
        assert!(report(0).encode().len() <= 64, "{}", report(0).encode().len());
        let ten_thousand = report(10_000);
        assert!(ten_thousand.encode().len() <= 64 + 24 * 10_000);
        assert_eq!(LeaseReport::decode(&ten_thousand.encode()).unwrap(), ten_thousand);
    }

    #[test]
    fn damage_is_an_error_and_no_panic() {
        let bytes = report(2).encode();
        for cut in 0..bytes.len() {
            assert!(LeaseReport::decode(&bytes[..cut]).is_err(), "cut at {cut}");
        }
        assert!(LeaseAnswer::decode(&bytes).is_err(), "a report is no answer");
        for answer in [LeaseAnswer::SendFull, LeaseAnswer::NotLeading, LeaseAnswer::Taken { version: 7, replaced: vec![] }] {
            assert_eq!(LeaseAnswer::decode(&answer.encode()).unwrap(), answer);
        }
    }

    /// As release 0.1 writes it; servers of two releases talk during an upgrade.
    #[test]
    fn the_bytes_of_version_1_still_decode() {
        let beat = LeaseReport {
            server: 2,
            incarnation: 9,
            seq: 5,
            serving: 300,
            version: 4,
            count: 1,
            hash: 8,
            within: 900,
            silent: vec![],
            content: Content::Changes { base: 4, joined: vec![], left: vec![] },
        };
        let bytes = [23, 0, 0, 0, 89, 2, 1, 0, 2, 9, 5, 251, 44, 1, 4, 1, 8, 251, 132, 3, 0, 1, 4, 0, 0];
        assert_eq!(beat.encode()[4..], bytes[4..]);
        assert_eq!(LeaseReport::decode(&beat.encode()).unwrap(), beat);
    }
}
