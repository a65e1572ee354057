//! What is known of every server from the outside: what its disk has promised, and the one true log.

use std::collections::{BTreeMap, BTreeSet};

use optimus_control_plane::raft::runtime::{Mark, Stored};
use optimus_core::state::{Proposal, State};

/// Term and server of a leader.
pub type Leader = (u64, u64);
/// Sets of voters: two while a change is under way.
pub type Voters = Vec<BTreeSet<u64>>;

/// What one server's disk has promised.
#[derive(Clone, Debug, Default)]
pub struct ServerModel {
    /// Counts starts.
    pub life: u64,
    pub up: bool,
    /// Its disk was damaged on purpose: it need not keep its promises, only refuse.
    pub damaged: bool,
    pub vote: Option<(u64, u64, bool)>,
    pub log: BTreeMap<u64, Leader>,
    pub purged: Option<(u64, Leader)>,
    pub snapshot: Option<u64>,
    /// Every membership its log or snapshot ever had, by index.
    pub memberships: BTreeMap<u64, Voters>,
    /// In this life.
    pub committed: u64,
    /// In this life.
    pub applied: u64,
    pub leads: bool,
}

impl ServerModel {
    /// Index of the last entry it holds, in log or snapshot.
    pub fn last(&self) -> u64 {
        let log = self.log.keys().next_back().copied().unwrap_or(0);
        log.max(self.snapshot.unwrap_or(0)).max(self.purged.map_or(0, |p| p.0))
    }

    /// Whether it durably holds the entry, or a snapshot of what it led to.
    pub fn holds(&self, index: u64, leader: Leader) -> bool {
        self.log.get(&index) == Some(&leader) || self.snapshot.is_some_and(|s| s >= index) || self.purged.is_some_and(|p| p.0 >= index)
    }

    fn keep(&mut self, mark: &Mark) {
        self.log.insert(mark.index, mark.leader);
        if let Some(voters) = &mark.voters {
            self.memberships.insert(mark.index, voters.clone());
        }
    }

    /// Takes over what the store says it did.
    pub fn take(&mut self, what: &Stored) {
        match what {
            Stored::Opened { vote, purged, entries, committed, snapshot } => {
                self.vote = *vote;
                self.purged = purged.as_ref().map(|p| (p.index, p.leader));
                self.log.clear();
                entries.iter().for_each(|e| self.keep(e));
                self.snapshot = snapshot.as_ref().map(|s| s.index);
                let last = self.last();
                self.memberships.retain(|index, _| *index <= last);
                if let Some(Mark { index, voters: Some(voters), .. }) = snapshot {
                    self.memberships.insert(*index, voters.clone());
                }
                (self.committed, self.applied) = (committed.as_ref().map_or(0, |c| c.index), 0);
            }
            Stored::Vote(term, server, committed) => self.vote = Some((*term, *server, *committed)),
            Stored::Appended(entries) => entries.iter().for_each(|e| self.keep(e)),
            Stored::Truncating(from) => {
                self.log.split_off(from);
                self.memberships.split_off(from);
            }
            Stored::Purging(upto) => {
                self.purged = Some((upto.index, upto.leader));
                self.log = self.log.split_off(&(upto.index + 1));
            }
            Stored::Committed(upto) => self.committed = upto.index,
            Stored::Snapshot { last, .. } => {
                self.snapshot = self.snapshot.max(Some(last.index));
                if let Some(voters) = &last.voters {
                    self.memberships.insert(last.index, voters.clone());
                }
            }
        }
    }
}

/// One committed log index as the first server applied it.
#[derive(Clone, Debug)]
pub struct Canon {
    /// The commands of the entry, in order.
    pub proposals: Vec<Proposal>,
    /// The state after each of them.
    pub states: Vec<State>,
}

/// Everything known.
#[derive(Default)]
pub struct Model {
    pub servers: BTreeMap<u64, ServerModel>,
    /// Leader of each committed entry, as first told by any server.
    pub committed: BTreeMap<u64, Leader>,
    /// What was applied at each index, as first told by any server.
    pub canon: BTreeMap<u64, Canon>,
    /// For each entry the leader of the entry before it.
    pub before: BTreeMap<(u64, Leader), Leader>,
}

impl Model {
    pub fn server(&self, id: u64) -> ServerModel {
        self.servers.get(&id).cloned().unwrap_or_default()
    }

    /// The newest state anybody has applied.
    pub fn newest(&self) -> Option<&State> {
        self.canon.values().next_back()?.states.last()
    }
}
