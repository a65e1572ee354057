//! Requests and answers between servers as bytes.
//!
//! Each is a sealed record (versioned, checksummed). Entries travel exactly as they are stored. A request names the
//! server it is meant for, so that a stale address cannot deliver it to another member.

use bytes::Bytes;
use openraft::raft::{AppendEntriesResponse, VoteRequest, VoteResponse};
use serde::{Deserialize, Serialize};

use super::super::record::{Damage, Kind};
use super::super::stored::{EntryV1, LogIdV1, VoteV1, decode, encode};
use super::super::types::{AppendRequest, Blob, LogId, Vote};
use super::{PeerError, PeerRpc};

#[derive(Serialize, Deserialize)]
struct AppendV1 {
    to: u64,
    vote: VoteV1,
    prev: Option<LogIdV1>,
    entries: Vec<EntryV1>,
    commit: Option<LogIdV1>,
}

#[derive(Serialize, Deserialize)]
struct VoteRequestV1 {
    to: u64,
    vote: VoteV1,
    last: Option<LogIdV1>,
}

/// Consecutive bytes of a snapshot file. The checksum over all of it is the one of the record.
#[derive(Serialize, Deserialize)]
struct SnapshotPartV1 {
    to: u64,
    vote: VoteV1,
    id: String,
    last: Option<LogIdV1>,
    hash: [u8; 32],
    total: u64,
    offset: u64,
    bytes: Blob,
}

/// Which snapshot a part belongs to; equal in all parts of one transfer, also over an interruption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SnapshotKey {
    pub id: String,
    pub last: Option<LogId>,
    /// BLAKE3 of the content.
    pub hash: [u8; 32],
    /// Length of the file, head and content.
    pub total: u64,
}

/// Bytes of a snapshot file and where they belong. Without bytes, at the end, it asks whether all is installed.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotPart {
    pub key: SnapshotKey,
    pub offset: u64,
    pub bytes: Bytes,
}

/// What the receiver says to a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SnapshotProgress {
    /// Its vote; one above the sender's says that the sender leads no more.
    pub vote: Vote,
    /// The byte it wants next.
    pub wants: u64,
    /// Whether the snapshot is installed, or was not needed.
    pub done: bool,
}

/// A decoded request.
#[derive(Debug)]
pub(crate) enum Request {
    Append(AppendRequest),
    Vote(VoteRequest<u64>),
    Snapshot { vote: Vote, part: SnapshotPart },
}

impl Request {
    /// The vote of the leader this comes from, if it is a leader's.
    pub(crate) fn leader(&self) -> Option<Vote> {
        match self {
            Self::Append(request) => Some(request.vote),
            Self::Snapshot { vote, .. } => Some(*vote),
            Self::Vote(_) => None,
        }
    }

    pub(crate) fn encode_append(to: u64, r: &AppendRequest) -> Bytes {
        let entries = r.entries.iter().map(EntryV1::from).collect();
        let (prev, commit) = (r.prev_log_id.map(Into::into), r.leader_commit.map(Into::into));
        encode(Kind::Request, PeerRpc::Append as u64, &AppendV1 { to, vote: r.vote.into(), prev, entries, commit }).into()
    }

    pub(crate) fn encode_vote(to: u64, r: &VoteRequest<u64>) -> Bytes {
        let request = VoteRequestV1 { to, vote: r.vote.into(), last: r.last_log_id.map(Into::into) };
        encode(Kind::Request, PeerRpc::Vote as u64, &request).into()
    }

    pub(crate) fn encode_snapshot(to: u64, vote: Vote, part: &SnapshotPart) -> Bytes {
        let SnapshotPart { key, offset, bytes } = part;
        let (id, last, bytes) = (key.id.clone(), key.last.map(Into::into), Blob(bytes.clone()));
        let part = SnapshotPartV1 { to, vote: vote.into(), id, last, hash: key.hash, total: key.total, offset: *offset, bytes };
        encode(Kind::Request, PeerRpc::Snapshot as u64, &part).into()
    }

    /// Decodes a request meant for server `me`, sent by the authenticated server `from`.
    pub(crate) fn decode(me: u64, from: u64, kind: PeerRpc, body: &[u8]) -> Result<Self, PeerError> {
        let damaged = |d: Damage| PeerError::Refused(format!("{kind:?} request from server {from}: {d}"));
        let place = kind as u64;
        let (to, vote, request) = match kind {
            PeerRpc::Append => {
                let r: AppendV1 = decode(Kind::Request, place, body).map_err(damaged)?;
                let request = AppendRequest {
                    vote: r.vote.into(),
                    prev_log_id: r.prev.map(Into::into),
                    entries: r.entries.into_iter().map(Into::into).collect(),
                    leader_commit: r.commit.map(Into::into),
                };
                (r.to, r.vote, Self::Append(request))
            }
            PeerRpc::Vote => {
                let r: VoteRequestV1 = decode(Kind::Request, place, body).map_err(damaged)?;
                (r.to, r.vote, Self::Vote(VoteRequest::new(r.vote.into(), r.last.map(Into::into))))
            }
            PeerRpc::Snapshot => {
                let r: SnapshotPartV1 = decode(Kind::Request, place, body).map_err(damaged)?;
                if !r.vote.committed {
                    return Err(PeerError::Refused(format!("server {from} sent a snapshot without leading")));
                }
                let key = SnapshotKey { id: r.id, last: r.last.map(Into::into), hash: r.hash, total: r.total };
                let part = SnapshotPart { key, offset: r.offset, bytes: r.bytes.0 };
                (r.to, r.vote, Self::Snapshot { vote: r.vote.into(), part })
            }
            other => return Err(PeerError::Refused(format!("{other:?} requests are not served yet"))),
        };
        if to != me {
            return Err(PeerError::Refused(format!("{kind:?} request for server {to} reached server {me}")));
        }
        // All three are sent by the candidate or leader the vote names; anything else is a forgery.
        if vote.node != from {
            return Err(PeerError::Refused(format!("server {from} sent a {kind:?} request in the name of server {}", vote.node)));
        }
        Ok(request)
    }
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AppendReplyV1 {
    Success,
    Partial(Option<LogIdV1>),
    Conflict,
    HigherVote(VoteV1),
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct VoteReplyV1 {
    vote: VoteV1,
    granted: bool,
    last: Option<LogIdV1>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct SnapshotReplyV1 {
    vote: VoteV1,
    wants: u64,
    done: bool,
}

/// Answers, each under the number of its request.
pub(crate) struct Reply;

impl Reply {
    pub(crate) fn encode_append(r: &AppendEntriesResponse<u64>) -> Bytes {
        let reply = match r {
            AppendEntriesResponse::Success => AppendReplyV1::Success,
            AppendEntriesResponse::PartialSuccess(upto) => AppendReplyV1::Partial(upto.map(Into::into)),
            AppendEntriesResponse::Conflict => AppendReplyV1::Conflict,
            AppendEntriesResponse::HigherVote(vote) => AppendReplyV1::HigherVote((*vote).into()),
        };
        encode(Kind::Reply, PeerRpc::Append as u64, &reply).into()
    }

    pub(crate) fn decode_append(body: &[u8]) -> Result<AppendEntriesResponse<u64>, PeerError> {
        Ok(match decode(Kind::Reply, PeerRpc::Append as u64, body).map_err(bad_reply)? {
            AppendReplyV1::Success => AppendEntriesResponse::Success,
            AppendReplyV1::Partial(upto) => AppendEntriesResponse::PartialSuccess(upto.map(Into::into)),
            AppendReplyV1::Conflict => AppendEntriesResponse::Conflict,
            AppendReplyV1::HigherVote(vote) => AppendEntriesResponse::HigherVote(vote.into()),
        })
    }

    pub(crate) fn encode_vote(r: &VoteResponse<u64>) -> Bytes {
        let reply = VoteReplyV1 { vote: r.vote.into(), granted: r.vote_granted, last: r.last_log_id.map(Into::into) };
        encode(Kind::Reply, PeerRpc::Vote as u64, &reply).into()
    }

    pub(crate) fn decode_vote(body: &[u8]) -> Result<VoteResponse<u64>, PeerError> {
        let r: VoteReplyV1 = decode(Kind::Reply, PeerRpc::Vote as u64, body).map_err(bad_reply)?;
        Ok(VoteResponse { vote: r.vote.into(), vote_granted: r.granted, last_log_id: r.last.map(Into::into) })
    }

    pub(crate) fn encode_snapshot(p: &SnapshotProgress) -> Bytes {
        let reply = SnapshotReplyV1 { vote: p.vote.into(), wants: p.wants, done: p.done };
        encode(Kind::Reply, PeerRpc::Snapshot as u64, &reply).into()
    }

    pub(crate) fn decode_snapshot(body: &[u8]) -> Result<SnapshotProgress, PeerError> {
        let r: SnapshotReplyV1 = decode(Kind::Reply, PeerRpc::Snapshot as u64, body).map_err(bad_reply)?;
        Ok(SnapshotProgress { vote: r.vote.into(), wants: r.wants, done: r.done })
    }
}

fn bad_reply(damage: Damage) -> PeerError {
    PeerError::Refused(format!("answer of the peer: {damage}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use openraft::{CommittedLeaderId, EntryPayload};
    use proptest::prelude::*;

    use super::super::super::types::{Batch, Entry, LogId};
    use super::*;

    fn sample() -> AppendRequest {
        let id = |i| LogId::new(CommittedLeaderId::new(4, 2), i);
        let batch = Batch(std::sync::Arc::new(vec![Blob(Bytes::from_static(b"one")), Blob(Bytes::from_static(&[0, 255]))]));
        AppendRequest {
            vote: Vote::new_committed(4, 2),
            prev_log_id: Some(id(6)),
            entries: vec![
                Entry { log_id: id(7), payload: EntryPayload::Normal(batch) },
                Entry { log_id: id(8), payload: EntryPayload::Blank },
            ],
            leader_commit: Some(id(6)),
        }
    }

    #[test]
    fn an_append_request_survives_the_wire() {
        let body = Request::encode_append(1, &sample());
        let Request::Append(back) = Request::decode(1, 2, PeerRpc::Append, &body).unwrap() else { panic!("another kind") };
        assert_eq!(back.entries, sample().entries);
        assert_eq!((back.vote, back.prev_log_id, back.leader_commit), (sample().vote, sample().prev_log_id, sample().leader_commit));
    }

    #[test]
    fn a_request_for_another_server_or_in_anothers_name_is_refused() {
        let body = Request::encode_append(1, &sample());
        assert!(Request::decode(3, 2, PeerRpc::Append, &body).is_err(), "meant for server 1");
        assert!(Request::decode(1, 3, PeerRpc::Append, &body).is_err(), "the vote is server 2's");
        assert!(Request::decode(1, 2, PeerRpc::Vote, &body).is_err(), "another kind");
    }

    #[test]
    fn all_append_answers_survive_the_wire() {
        use AppendEntriesResponse::*;
        let id = LogId::new(CommittedLeaderId::new(4, 2), 9);
        for reply in [Success, PartialSuccess(None), PartialSuccess(Some(id)), Conflict, HigherVote(Vote::new(7, 3))] {
            assert_eq!(Reply::decode_append(&Reply::encode_append(&reply)).unwrap(), reply);
        }
    }

    proptest! {
        #[test]
        fn damaged_requests_are_refused_without_a_panic(at: prop::sample::Index, mask in 1u8.., cut: prop::sample::Index) {
            let body = Request::encode_append(1, &sample());
            let mut bad = body.to_vec();
            let at = at.index(bad.len());
            bad[at] ^= mask;
            prop_assert!(Request::decode(1, 2, PeerRpc::Append, &bad).is_err());
            prop_assert!(Request::decode(1, 2, PeerRpc::Append, &body[..cut.index(body.len())]).is_err());
        }

        /// A peer with a valid certificate may still send nonsense in an intact envelope.
        #[test]
        fn intact_envelopes_of_nonsense_are_refused_without_a_panic(payload in proptest::collection::vec(any::<u8>(), 0..200)) {
            for kind in [PeerRpc::Append, PeerRpc::Vote, PeerRpc::Snapshot] {
                let body = super::super::super::record::seal(Kind::Request, 1, kind as u64, &payload);
                let _ = Request::decode(1, 2, kind, &body);
            }
        }
    }
}
