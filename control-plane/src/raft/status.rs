//! Where a node stands, for people and for metrics.

use std::collections::BTreeMap;

use openraft::{RaftMetrics, ServerState};
use serde::Serialize;

use super::clock::Clock;

/// The part a server plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Receives the log, has no vote.
    Learner,
    /// Follows a leader.
    Follower,
    /// Stands for election.
    Candidate,
    /// Leads.
    Leader,
    /// Has stopped.
    Stopped,
}

/// A moment of one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Status {
    /// This server.
    pub node_id: u64,
    /// Its part.
    pub role: Role,
    /// The term it is in.
    pub term: u64,
    /// The leader it follows, when known.
    pub leader: Option<u64>,
    /// Last entry in its log.
    pub last_log: Option<u64>,
    /// Last entry applied to its state.
    pub applied: Option<u64>,
    /// Last entry covered by its newest snapshot.
    pub snapshot: Option<u64>,
    /// Last entry purged from its log.
    pub purged: Option<u64>,
    /// Servers with a vote; of both configurations while a change is under way.
    pub voters: Vec<u64>,
    /// Address of every member, learners included.
    pub members: BTreeMap<u64, String>,
    /// On the leader: the last entry each server is known to hold.
    pub replicated: BTreeMap<u64, Option<u64>>,
    /// On the leader: milliseconds since a quorum last confirmed it.
    pub quorum_age_ms: Option<u64>,
    /// The longest silence of a leader, in milliseconds, before this server stands for election; follows `append_p99_ms`.
    pub election_timeout_ms: u64,
    /// 99 of 100 recent flushes of this server's log took at most this many milliseconds.
    pub append_p99_ms: u64,
    /// Milliseconds since this server last heard the leader; on the leader, since a quorum last confirmed it. At most this
    /// old is what a read without confirmation sees, but for what this server has received and not yet applied.
    pub leader_age_ms: Option<u64>,
    /// Milliseconds since each other member last answered this server. Only the leader asks them all.
    pub contact_age_ms: BTreeMap<u64, u64>,
    /// Why this server must stop, if it must.
    pub fatal: Option<String>,
}

impl Status {
    pub(crate) fn new(
        m: &RaftMetrics<u64, openraft::BasicNode>,
        heard_ms: Option<u64>,
        contact_age_ms: BTreeMap<u64, u64>,
        clock: &Clock,
        fatal: Option<String>,
    ) -> Self {
        let membership = m.membership_config.membership();
        let role = match m.state {
            ServerState::Learner => Role::Learner,
            ServerState::Follower => Role::Follower,
            ServerState::Candidate => Role::Candidate,
            ServerState::Leader => Role::Leader,
            ServerState::Shutdown => Role::Stopped,
        };
        let ms = |d: std::time::Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let leader_age_ms = if m.current_leader != Some(m.id) {
            heard_ms
        } else if membership.voter_ids().eq([m.id]) {
            Some(0)
        } else {
            m.millis_since_quorum_ack
        };
        let index = |id: &openraft::LogId<u64>| id.index;
        Self {
            node_id: m.id,
            role: if m.running_state.is_err() { Role::Stopped } else { role },
            term: m.current_term,
            leader: m.current_leader,
            last_log: m.last_log_index,
            applied: m.last_applied.as_ref().map(index),
            snapshot: m.snapshot.as_ref().map(index),
            purged: m.purged.as_ref().map(index),
            voters: membership.voter_ids().collect(),
            members: membership.nodes().map(|(id, n)| (*id, n.addr.clone())).collect(),
            replicated: m.replication.iter().flatten().map(|(id, at)| (*id, at.as_ref().map(index))).collect(),
            quorum_age_ms: m.millis_since_quorum_ack,
            election_timeout_ms: ms(clock.timeout_max()),
            append_p99_ms: ms(clock.latency.p99()),
            leader_age_ms,
            contact_age_ms,
            fatal,
        }
    }
}
