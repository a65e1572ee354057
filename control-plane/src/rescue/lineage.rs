//! A new line of history: what a state becomes when it goes on without the servers it came from.
//!
//! Servers of before must not be able to take part, and nothing that remembers a log index may take a new thing for the
//! old one it knows under that index: agents refuse a desired set with an older generation, and a generation is a log
//! index; clients resume event streams by it; server ids are taken from it. How far the lost history went is not known
//! (its end is what was lost), so the new line begins a whole [`GAP`] further on. Part of the step is random: two
//! restores of the same export are told apart as well.

use optimus_common::env::Env;
use optimus_core::state::State;

/// Least step of the log index. No cluster commits a billion entries between its newest export and its end.
pub const GAP: u64 = 1_000_000_000;
/// Indexes stay below it: JSON numbers are exact up to here.
const INDEX_MAX: u64 = 1 << 53;

/// Why there is no room for another line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("index {0} leaves no room for a new line of history")]
pub struct NoRoom(u64);

/// Where a new line begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beginning {
    /// Id of its first server: the index it begins at, as ids of servers are taken from the log.
    pub server: u64,
    /// Log index of the state.
    pub index: u64,
    pub term: u64,
}

/// Begins a new line behind a history that is known up to `index` and `term`.
///
/// # Errors
/// After a few million recoveries.
pub fn begin(index: u64, term: u64, env: &Env) -> Result<Beginning, NoRoom> {
    let mut random = [0; 8];
    env.entropy.fill(&mut random);
    let step = GAP + u64::from_le_bytes(random) % GAP;
    let next = index.checked_add(step).filter(|next| *next < INDEX_MAX).ok_or(NoRoom(index))?;
    Ok(Beginning { server: next, index: next, term: term.saturating_add(1) })
}

/// Moves `state` to the beginning of the new line.
pub fn enter(state: &mut State, beginning: Beginning) {
    // Certificates of agents name the cluster, which stays: they come back without a human.
    state.index = beginning.index;
    // The servers of before must not get in; the one that goes on enters itself under its new id.
    state.servers = Default::default();
    state.next_server = beginning.server;
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use optimus_host::env::HostEnv;

    #[test]
    fn a_new_line_is_far_away_and_never_the_same_twice() {
        let env = HostEnv::new();
        let (a, b) = (begin(70, 3, &env).unwrap(), begin(70, 3, &env).unwrap());
        assert!(a.index >= 70 + GAP && a.index < 70 + 2 * GAP && a.server == a.index && a.term == 4);
        assert_ne!(a.server, b.server);
        assert_eq!(begin(INDEX_MAX - GAP, 3, &env), Err(NoRoom(INDEX_MAX - GAP)));
    }
}
