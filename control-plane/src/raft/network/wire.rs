//! Requests and answers between servers as bytes.
//!
//! Each is a sealed record (versioned, checksummed). Entries travel exactly as they are stored. A request names the
//! server it is meant for, so that a stale address cannot deliver it to another member.

use bytes::Bytes;
use openraft::raft::{AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse};
use serde::{Deserialize, Serialize};

use super::super::record::{Damage, Kind};
use super::super::snapshots;
use super::super::stored::{EntryV1, LogIdV1, VoteV1, decode, encode};
use super::super::types::{AppendRequest, Blob, SnapshotMeta, Vote};
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

#[derive(Serialize, Deserialize)]
struct SnapshotV1 {
    to: u64,
    vote: VoteV1,
    /// A packed snapshot: head and content, with its own checksum.
    packed: Blob,
}

/// A decoded request.
#[derive(Debug)]
pub(crate) enum Request {
    Append(AppendRequest),
    Vote(VoteRequest<u64>),
    Snapshot { vote: Vote, snapshot: snapshots::Loaded },
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

    pub(crate) fn encode_snapshot(to: u64, vote: Vote, meta: &SnapshotMeta, content: &[u8]) -> Bytes {
        let packed = Blob(snapshots::pack(meta, content).into());
        encode(Kind::Request, PeerRpc::Snapshot as u64, &SnapshotV1 { to, vote: vote.into(), packed }).into()
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
                let r: SnapshotV1 = decode(Kind::Request, place, body).map_err(damaged)?;
                let snapshot = snapshots::unpack(&r.packed.0).map_err(damaged)?;
                (r.to, r.vote, Self::Snapshot { vote: r.vote.into(), snapshot })
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

    pub(crate) fn encode_snapshot(r: &SnapshotResponse<u64>) -> Bytes {
        encode(Kind::Reply, PeerRpc::Snapshot as u64, &SnapshotReplyV1 { vote: r.vote.into() }).into()
    }

    pub(crate) fn decode_snapshot(body: &[u8]) -> Result<SnapshotResponse<u64>, PeerError> {
        let r: SnapshotReplyV1 = decode(Kind::Reply, PeerRpc::Snapshot as u64, body).map_err(bad_reply)?;
        Ok(SnapshotResponse { vote: r.vote.into() })
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
