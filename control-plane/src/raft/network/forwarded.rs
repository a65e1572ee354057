//! What a server asks of the leader in its clients' name, as bytes: proposals and read indexes.
//!
//! Both carry a hop mark. Only a request that comes from its first server is served, so a request goes from one server
//! to one other and never on from there, whatever the servers believe about who leads.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::super::record::{Damage, Kind};
use super::super::stored::{decode, encode};
use super::super::types::Blob;
use super::{PeerError, PeerRpc};

/// The mark of a request that comes from the server its client asked.
const FIRST: u8 = 1;

#[derive(Serialize, Deserialize)]
struct ProposeV1 {
    to: u64,
    hop: u8,
    /// Each proposer's commands, encoded as they will stand in the log.
    groups: Vec<Vec<Blob>>,
}

#[derive(Serialize, Deserialize)]
struct ReadIndexV1 {
    to: u64,
    hop: u8,
}

/// What became of one proposer's commands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Taken {
    /// Committed and applied at `index`, with the encoded answers.
    Done { index: u64, answers: Vec<Blob> },
    /// Not taken: this server does not lead.
    NotLeader { leader: Option<u64> },
    /// Not taken: its queue is full.
    Overloaded,
    /// Not taken: this server does not understand or allow it.
    Refused(String),
    /// Taken, but what became of it is not known.
    Unknown,
}

/// The leader's word on a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ReadAt {
    /// A read that sees everything up to here is linearizable.
    Index(u64),
    /// This server does not lead, or could not prove it.
    NotLeader { leader: Option<u64> },
}

#[derive(Serialize, Deserialize)]
struct ProposeReplyV1 {
    groups: Vec<Taken>,
}

pub(crate) fn encode_propose(to: u64, groups: Vec<Vec<Blob>>) -> Bytes {
    encode(Kind::Request, PeerRpc::Propose as u64, &ProposeV1 { to, hop: FIRST, groups }).into()
}

/// The groups of a request meant for server `me`.
pub(crate) fn decode_propose(me: u64, from: u64, body: &[u8]) -> Result<Vec<Vec<Blob>>, PeerError> {
    let kind = PeerRpc::Propose;
    let r: ProposeV1 = decode(Kind::Request, kind as u64, body).map_err(|d| damaged(kind, from, &d))?;
    addressed(kind, me, r.to, r.hop)?;
    Ok(r.groups)
}

pub(crate) fn encode_read_index(to: u64) -> Bytes {
    encode(Kind::Request, PeerRpc::ReadIndex as u64, &ReadIndexV1 { to, hop: FIRST }).into()
}

/// Checks a request meant for server `me`.
pub(crate) fn decode_read_index(me: u64, from: u64, body: &[u8]) -> Result<(), PeerError> {
    let kind = PeerRpc::ReadIndex;
    let r: ReadIndexV1 = decode(Kind::Request, kind as u64, body).map_err(|d| damaged(kind, from, &d))?;
    addressed(kind, me, r.to, r.hop)
}

fn damaged(kind: PeerRpc, from: u64, damage: &Damage) -> PeerError {
    PeerError::Refused(format!("{kind:?} request from server {from}: {damage}"))
}

fn addressed(kind: PeerRpc, me: u64, to: u64, hop: u8) -> Result<(), PeerError> {
    if to != me {
        return Err(PeerError::Refused(format!("{kind:?} request for server {to} reached server {me}")));
    }
    if hop != FIRST {
        return Err(PeerError::Refused(format!("{kind:?} request has gone through {hop} servers, at most {FIRST} is allowed")));
    }
    Ok(())
}

pub(crate) fn encode_taken(groups: Vec<Taken>) -> Bytes {
    encode(Kind::Reply, PeerRpc::Propose as u64, &ProposeReplyV1 { groups }).into()
}

/// `None` when the answer is not one: the request may have been served all the same.
pub(crate) fn decode_taken(body: &[u8]) -> Option<Vec<Taken>> {
    decode::<ProposeReplyV1>(Kind::Reply, PeerRpc::Propose as u64, body).ok().map(|r| r.groups)
}

pub(crate) fn encode_read_at(at: ReadAt) -> Bytes {
    encode(Kind::Reply, PeerRpc::ReadIndex as u64, &at).into()
}

pub(crate) fn decode_read_at(body: &[u8]) -> Option<ReadAt> {
    decode(Kind::Reply, PeerRpc::ReadIndex as u64, body).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::super::super::record::seal;
    use super::*;

    fn blob(bytes: &'static [u8]) -> Blob {
        Blob(Bytes::from_static(bytes))
    }

    #[test]
    fn requests_and_answers_survive_the_wire() {
        let groups = vec![vec![blob(b"one"), blob(&[0, 255])], vec![blob(b"two")]];
        assert_eq!(decode_propose(3, 1, &encode_propose(3, groups.clone())).unwrap(), groups);
        decode_read_index(3, 1, &encode_read_index(3)).unwrap();
        let taken = vec![
            Taken::Done { index: 9, answers: vec![blob(b"a")] },
            Taken::NotLeader { leader: Some(2) },
            Taken::Overloaded,
            Taken::Refused("no".to_owned()),
            Taken::Unknown,
        ];
        assert_eq!(decode_taken(&encode_taken(taken.clone())).unwrap(), taken);
        for at in [ReadAt::Index(u64::MAX), ReadAt::NotLeader { leader: None }] {
            assert_eq!(decode_read_at(&encode_read_at(at)), Some(at));
        }
    }

    #[test]
    fn a_request_for_another_server_or_on_its_second_hop_is_refused() {
        assert!(decode_propose(1, 2, &encode_propose(3, vec![])).is_err());
        assert!(decode_read_index(1, 2, &encode_read_index(3)).is_err());
        for hop in [0, 2, 255] {
            let second = encode(Kind::Request, PeerRpc::Propose as u64, &ProposeV1 { to: 1, hop, groups: vec![] });
            assert!(decode_propose(1, 2, &second).is_err(), "hop {hop}");
            let second = encode(Kind::Request, PeerRpc::ReadIndex as u64, &ReadIndexV1 { to: 1, hop });
            assert!(decode_read_index(1, 2, &second).is_err(), "hop {hop}");
        }
    }

    proptest! {
        /// A peer with a valid certificate may still send nonsense in an intact envelope.
        #[test]
        fn nonsense_is_refused_without_a_panic(payload in proptest::collection::vec(any::<u8>(), 0..200)) {
            for kind in [PeerRpc::Propose, PeerRpc::ReadIndex] {
                let request = seal(Kind::Request, 1, kind as u64, &payload);
                let reply = seal(Kind::Reply, 1, kind as u64, &payload);
                let _ = (decode_propose(1, 2, &request), decode_read_index(1, 2, &request), decode_taken(&reply), decode_read_at(&reply));
                prop_assert!(decode_propose(1, 2, &payload).is_err());
            }
        }
    }
}
