//! Who has a vote: the loop that makes Raft's membership follow the servers of the replicated state.
//!
//! Only the leader acts, one step at a time; each look decides anew from what is. A server that joins first receives the
//! log without a vote, and gets one once it has caught up. A server that leaves loses its vote before its key.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use optimus_common::Timestamp;
use optimus_core::state::{Applied, Command, State};
use tokio_util::sync::CancellationToken;

use crate::raft::{Machine, RaftNode, Status};
use crate::store::Store;

/// How often the leader looks when nothing calls it.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Voters at most: more make writes slower and no safer in practice. Further servers stand by without a vote.
pub const VOTERS_MAX: usize = 5;
/// A learner this close to the end of the log has caught up.
const CAUGHT_UP: u64 = 64;
/// A server that answered this recently is alive.
const ALIVE: Duration = Duration::from_secs(3);
/// A voter that has not answered for so long is removed when a server that joined later can take its place.
const REPLACED_AFTER: Duration = Duration::from_secs(10);
/// Without a replacement it is removed only after this, and only while enough others live.
const DEAD_AFTER: Duration = Duration::from_secs(24 * 3600);
/// Never shrink below this many living voters without being asked.
const LIVING_MIN: usize = 3;

/// What the leader knows.
#[derive(Debug, Clone, Default)]
struct View {
    me: u64,
    now: Timestamp,
    /// Servers of the state: leaving or not, and when they joined.
    servers: BTreeMap<u64, (bool, Timestamp)>,
    voters: BTreeSet<u64>,
    /// Members without a vote.
    learners: BTreeSet<u64>,
    /// Entries each member is behind; unset when not known.
    behind: BTreeMap<u64, u64>,
    /// How long ago each other member answered; unset: never since this server leads.
    silent: BTreeMap<u64, Duration>,
    /// Since when this server leads.
    leading: Duration,
    /// Cluster version, and the highest all servers understand.
    version: (u32, u32),
}

/// One step towards the membership that should be.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    AddLearner(u64),
    RemoveLearner(u64),
    SetVoters(BTreeSet<u64>),
    /// This server is leaving and must not lead while it does.
    HandOver,
    RaiseVersion(u32),
    RemoveServer(u64),
    ForgetServer(u64),
}

impl View {
    fn silent_for(&self, id: u64) -> Duration {
        if id == self.me { Duration::ZERO } else { self.silent.get(&id).copied().unwrap_or(self.leading) }
    }

    fn alive(&self, id: u64) -> bool {
        id == self.me || self.silent.get(&id).is_some_and(|s| *s <= ALIVE)
    }
}

/// The next step, if any.
fn decide(v: &View) -> Option<Step> {
    if v.version.0 < v.version.1 {
        return Some(Step::RaiseVersion(v.version.1));
    }
    let member = |id: &u64| v.voters.contains(id) || v.learners.contains(id);
    let leaving = |id: &u64| v.servers.get(id).is_none_or(|(leaving, _)| *leaving);

    // Out: first the vote, then the row. Not while the state is empty, as at the very start.
    if !v.servers.is_empty() {
        if let Some(id) = v.learners.iter().find(|id| leaving(id)) {
            return Some(Step::RemoveLearner(*id));
        }
        let stay: BTreeSet<u64> = v.voters.iter().copied().filter(|id| !leaving(id)).collect();
        if stay.len() < v.voters.len() && !stay.is_empty() {
            // A majority of those who stay must be there to take the change.
            let living = stay.iter().filter(|id| v.alive(**id)).count();
            if living * 2 > stay.len() {
                return Some(if stay.contains(&v.me) { Step::SetVoters(stay) } else { Step::HandOver });
            }
        }
    }
    if let Some(id) = v.servers.iter().find(|(id, (leaving, _))| *leaving && !member(id)).map(|(id, _)| *id) {
        return Some(Step::ForgetServer(id));
    }

    // In.
    if let Some(id) = v.servers.iter().find(|(id, (leaving, _))| !*leaving && !member(id)).map(|(id, _)| *id) {
        return Some(Step::AddLearner(id));
    }
    let ready = |id: &&u64| v.alive(**id) && v.behind.get(id).is_some_and(|b| *b <= CAUGHT_UP);
    if v.voters.len() < VOTERS_MAX
        && let Some(id) = v.learners.iter().find(ready)
    {
        let mut voters = v.voters.clone();
        voters.insert(*id);
        return Some(Step::SetVoters(voters));
    }

    // Dead: gone when replaced, or gone for very long. The living must be enough without it.
    let living = v.voters.iter().filter(|id| v.alive(**id)).count();
    if living >= LIVING_MIN {
        let replaced = |id: u64, silent: Duration| {
            let last = Timestamp(v.now.0.saturating_sub(u64::try_from(silent.as_millis()).unwrap_or(u64::MAX)));
            let newer = |other: &u64| *other != id && v.alive(*other) && v.servers.get(other).is_some_and(|(_, joined)| *joined > last);
            v.voters.iter().chain(&v.learners).any(newer)
        };
        let dead = v.voters.iter().copied().find(|id| {
            let silent = v.silent_for(*id);
            !v.alive(*id) && (silent > DEAD_AFTER || (silent > REPLACED_AFTER && replaced(*id, silent)))
        });
        if let Some(id) = dead {
            return Some(Step::RemoveServer(id));
        }
    }
    None
}

fn view(state: &State, status: &Status, leading: Duration, now: Timestamp) -> View {
    let voters: BTreeSet<u64> = status.voters.iter().copied().collect();
    let end = status.last_log.unwrap_or(0);
    View {
        me: status.node_id,
        now,
        servers: state.servers.iter().map(|(id, row)| (*id, (row.leaving, row.joined_at))).collect(),
        learners: status.members.keys().copied().filter(|id| !voters.contains(id)).collect(),
        voters,
        behind: status.replicated.iter().filter_map(|(id, at)| Some((*id, end.saturating_sub((*at)?)))).collect(),
        silent: status.contact_age_ms.iter().map(|(id, ms)| (*id, Duration::from_millis(*ms))).collect(),
        leading,
        version: (state.cluster.as_ref().map_or(u32::MAX, |c| c.version), state.servers.values().map(|s| s.level).min().unwrap_or(0)),
    }
}

/// Runs until `shutdown`.
pub async fn run<M: Machine>(store: Store, node: RaftNode<M>, shutdown: CancellationToken) {
    let clock = store.env.clock.clone();
    let mut since = None;
    let mut failed = None;
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = clock.sleep(LOOK_EVERY) => {}
        }
        if !*node.is_leader().borrow() {
            since = None;
            continue;
        }
        let leading = clock.monotonic().saturating_sub(*since.get_or_insert_with(|| clock.monotonic()));
        let (state, status) = (store.state(), node.status());
        let Some(next) = decide(&view(&state, &status, leading, clock.now())) else {
            failed = None;
            continue;
        };
        let done = tokio::select! {
            () = shutdown.cancelled() => return,
            done = act(&store, &node, &state, &next) => done,
        };
        match done {
            Ok(()) => tracing::info!(step = ?next, "cluster membership"),
            // Said once; it is tried at every look.
            Err(error) if failed.as_ref() != Some(&error) => {
                tracing::warn!(step = ?next, error, "cluster membership not changed yet");
                failed = Some(error);
            }
            Err(_) => {}
        }
    }
}

async fn act<M: Machine>(store: &Store, node: &RaftNode<M>, state: &State, step: &Step) -> Result<(), String> {
    let text = |e: crate::raft::AdminError| e.to_string();
    match step {
        Step::AddLearner(id) => {
            let row = state.servers.get(id).ok_or("the server is gone")?;
            node.start_learner(*id, &row.address).await.map(drop).map_err(text)
        }
        Step::RemoveLearner(id) => node.remove_learner(*id).await.map(drop).map_err(text),
        Step::SetVoters(voters) => node.change_voters(voters.clone()).await.map(drop).map_err(text),
        Step::HandOver => node.transfer_leader(None).await.map(drop).map_err(|e| e.to_string()),
        Step::RaiseVersion(to) => propose(store, Command::RaiseVersion { to: *to }).await,
        Step::RemoveServer(id) => propose(store, Command::RemoveServer { id: *id }).await,
        Step::ForgetServer(id) => propose(store, Command::ForgetServer { id: *id }).await,
    }
}

async fn propose(store: &Store, command: Command) -> Result<(), String> {
    match store.propose(command).await {
        Ok(Applied::Refused(refusal)) => Err(refusal.to_string()),
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Servers with a vote, all alive, leader 1, joined at their id in seconds.
    fn cluster(voters: &[u64]) -> View {
        View {
            me: 1,
            now: Timestamp(1_000_000),
            servers: voters.iter().map(|id| (*id, (false, Timestamp(id * 1000)))).collect(),
            voters: voters.iter().copied().collect(),
            silent: voters.iter().filter(|id| **id != 1).map(|id| (*id, Duration::ZERO)).collect(),
            leading: Duration::from_secs(60),
            version: (2, 2),
            ..View::default()
        }
    }

    fn voters(of: &[u64]) -> Option<Step> {
        Some(Step::SetVoters(of.iter().copied().collect()))
    }

    #[test]
    fn a_server_that_joined_learns_first_and_votes_when_it_has_caught_up() {
        let mut v = cluster(&[1]);
        assert_eq!(decide(&v), None);
        v.servers.insert(5, (false, v.now));
        assert_eq!(decide(&v), Some(Step::AddLearner(5)));
        v.learners.insert(5);
        assert_eq!(decide(&v), None, "not heard of yet");
        v.silent.insert(5, Duration::ZERO);
        v.behind.insert(5, CAUGHT_UP + 1);
        assert_eq!(decide(&v), None, "behind");
        v.behind.insert(5, CAUGHT_UP);
        assert_eq!(decide(&v), voters(&[1, 5]));
        v.silent.insert(5, ALIVE + Duration::from_millis(1));
        assert_eq!(decide(&v), None, "silent again");
    }

    #[test]
    fn a_sixth_server_stands_by() {
        let mut v = cluster(&[1, 2, 3, 4, 5]);
        v.servers.insert(6, (false, v.now));
        v.learners.insert(6);
        v.silent.insert(6, Duration::ZERO);
        v.behind.insert(6, 0);
        assert_eq!(decide(&v), None);
        v.servers.insert(2, (true, Timestamp(2000)));
        assert_eq!(decide(&v), voters(&[1, 3, 4, 5]));
        v.voters.remove(&2);
        assert_eq!(decide(&v), Some(Step::ForgetServer(2)));
        v.servers.remove(&2);
        assert_eq!(decide(&v), voters(&[1, 3, 4, 5, 6]));
    }

    #[test]
    fn a_leader_that_leaves_hands_over_first() {
        let mut v = cluster(&[1, 2, 3]);
        v.servers.insert(1, (true, Timestamp(1000)));
        assert_eq!(decide(&v), Some(Step::HandOver));
    }

    #[test]
    fn a_vote_is_not_taken_while_too_few_of_the_others_live() {
        let mut v = cluster(&[1, 2, 3]);
        v.servers.insert(2, (true, Timestamp(2000)));
        v.silent.insert(3, Duration::from_secs(60));
        assert_eq!(decide(&v), None, "1 alone of 1 and 3 is no majority");
        v.silent.insert(3, Duration::ZERO);
        assert_eq!(decide(&v), voters(&[1, 3]));
    }

    #[test]
    fn a_dead_server_goes_when_another_has_taken_its_place_and_never_below_three() {
        let mut v = cluster(&[1, 2, 3]);
        v.silent.insert(2, DEAD_AFTER + Duration::from_secs(1));
        assert_eq!(decide(&v), None, "two living are too few");
        // A replacement joins.
        let mut v = cluster(&[1, 2, 3, 9]);
        v.silent.insert(2, REPLACED_AFTER + Duration::from_secs(1));
        assert_eq!(decide(&v), None, "9 joined long before 2 died");
        v.servers.insert(9, (false, Timestamp(v.now.0 - 1000)));
        assert_eq!(decide(&v), Some(Step::RemoveServer(2)));
        v.silent.insert(2, ALIVE);
        assert_eq!(decide(&v), None);
        let mut five = cluster(&[1, 2, 3, 4, 5]);
        five.silent.insert(2, REPLACED_AFTER * 2);
        assert_eq!(decide(&five), None, "it may come back");
        five.silent.insert(2, DEAD_AFTER * 2);
        assert_eq!(decide(&five), Some(Step::RemoveServer(2)));
    }

    #[test]
    fn the_version_rises_when_all_understand_it() {
        let mut v = cluster(&[1]);
        v.version = (1, 2);
        assert_eq!(decide(&v), Some(Step::RaiseVersion(2)));
        v.version = (2, 1);
        assert_eq!(decide(&v), None);
    }
}
