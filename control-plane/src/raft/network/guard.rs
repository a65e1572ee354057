//! Guard G3: an AppendEntries that would tear a hole into a log is refused.
//!
//! openraft 0.9 lets the replication tasks of a deposed leader run on for a moment. They keep reading the local log, which
//! the new leader is already changing, and can send entries that do not follow `prev_log_id`, or entries newer than the
//! vote they are sent under. Only a debug assertion in openraft looks at that; in a release build the hole reaches the
//! disk and the server never starts again. Both the sender and the receiver check, so that either end may be older.

use super::super::types::AppendRequest;

/// What is wrong with an AppendEntries request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// An entry does not directly follow the one before it (or `prev_log_id`).
    #[error("entry {found} does not follow, expected {expected}")]
    Hole {
        /// Index that should come.
        expected: u64,
        /// Index that came.
        found: u64,
    },
    /// An entry was made by a later leader than the one that sends it.
    #[error("entry {index} of term {entry_term} is newer than the vote of term {vote_term} it is sent under")]
    NewerThanVote {
        /// The entry.
        index: u64,
        /// Its term.
        entry_term: u64,
        /// The sender's term.
        vote_term: u64,
    },
    /// An entry is older than the one before it.
    #[error("entry {index} of term {entry_term} follows one of term {before}")]
    OlderThanBefore {
        /// The entry.
        index: u64,
        /// Its term.
        entry_term: u64,
        /// Term of the entry before.
        before: u64,
    },
}

/// Checks that the entries are consecutive, start right after `prev_log_id` and are not newer than the vote.
///
/// # Errors
/// The first [`Refusal`].
pub fn check_append(request: &AppendRequest) -> Result<(), Refusal> {
    let mut before = request.prev_log_id;
    for entry in &request.entries {
        let id = entry.log_id;
        let expected = before.map_or(0, |b| b.index + 1);
        if id.index != expected {
            return Err(Refusal::Hole { expected, found: id.index });
        }
        if id.leader_id > request.vote.leader_id {
            let (entry_term, vote_term) = (id.leader_id.term, request.vote.leader_id.term);
            return Err(Refusal::NewerThanVote { index: id.index, entry_term, vote_term });
        }
        if let Some(b) = before.filter(|b| id.leader_id < b.leader_id) {
            return Err(Refusal::OlderThanBefore { index: id.index, entry_term: id.leader_id.term, before: b.leader_id.term });
        }
        before = Some(id);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use openraft::{CommittedLeaderId, EntryPayload};

    use super::super::super::types::{Entry, LogId, Vote};
    use super::*;

    fn id(term: u64, index: u64) -> LogId {
        LogId::new(CommittedLeaderId::new(term, 1), index)
    }

    fn request(prev: Option<LogId>, entries: &[(u64, u64)]) -> AppendRequest {
        let entries = entries.iter().map(|&(t, i)| Entry { log_id: id(t, i), payload: EntryPayload::Blank }).collect();
        AppendRequest { vote: Vote::new_committed(3, 1), prev_log_id: prev, entries, leader_commit: None }
    }

    #[test]
    fn consecutive_entries_of_known_leaders_pass() {
        assert_eq!(check_append(&request(None, &[])), Ok(()));
        assert_eq!(check_append(&request(None, &[(1, 0), (1, 1), (3, 2)])), Ok(()));
        assert_eq!(check_append(&request(Some(id(2, 9)), &[(2, 10), (3, 11)])), Ok(()));
    }

    #[test]
    fn a_hole_is_refused_wherever_it_is() {
        assert_eq!(check_append(&request(None, &[(1, 1)])), Err(Refusal::Hole { expected: 0, found: 1 }));
        assert_eq!(check_append(&request(Some(id(2, 9)), &[(2, 11)])), Err(Refusal::Hole { expected: 10, found: 11 }));
        assert_eq!(check_append(&request(Some(id(2, 9)), &[(2, 9)])), Err(Refusal::Hole { expected: 10, found: 9 }));
        assert_eq!(check_append(&request(None, &[(1, 0), (1, 2)])), Err(Refusal::Hole { expected: 1, found: 2 }));
    }

    #[test]
    fn an_entry_of_a_later_leader_is_refused() {
        let refused = check_append(&request(None, &[(3, 0), (4, 1)]));
        assert_eq!(refused, Err(Refusal::NewerThanVote { index: 1, entry_term: 4, vote_term: 3 }));
    }

    #[test]
    fn an_entry_older_than_the_one_before_is_refused() {
        let refused = check_append(&request(Some(id(2, 9)), &[(1, 10)]));
        assert_eq!(refused, Err(Refusal::OlderThanBefore { index: 10, entry_term: 1, before: 2 }));
    }
}
