//! Measures this server's clock against the leader's, so that people hear of one that is off. Nothing is decided by it.

use std::time::Duration;

use optimus_common::clock_skew::{ClockSkew, in_words};
use optimus_core::state::{Command, Member};
use tokio_util::sync::CancellationToken;

use crate::cluster_admin::RaftAdmin;
use crate::raft::Machine;
use crate::store::Store;

const LOOK_EVERY: Duration = Duration::from_secs(10);
/// A round trip that takes longer says little.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// Runs until `shutdown` for server `me`.
pub async fn run<M: Machine>(store: Store, admin: RaftAdmin<M>, me: u64, shutdown: CancellationToken) {
    let clock = store.env.clock.clone();
    let (mut skew, mut of) = (ClockSkew::default(), None);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = look(&store, &admin, me, &mut skew, &mut of) => {}
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = clock.sleep(LOOK_EVERY) => {}
        }
    }
}

async fn look<M: Machine>(store: &Store, admin: &RaftAdmin<M>, me: u64, skew: &mut ClockSkew, of: &mut Option<u64>) {
    let (state, status) = (store.state(), store.status());
    let Some(row) = state.servers.get(&me) else { return };
    let Some(leader) = status.leader else { return };
    if *of != Some(leader) {
        (*skew, *of) = (ClockSkew::default(), Some(leader)); // another clock to compare with
    }
    let clock = &store.env.clock;
    let began = clock.monotonic();
    // The leader's clock is the measure, so it is right by definition.
    let theirs = if leader == me { Ok(clock.now()) } else { admin.leaders_clock(ANSWER_WITHIN).await };
    let rtt = clock.monotonic().saturating_sub(began);
    let Ok(theirs) = theirs else { return };
    // Here it is our clock that is judged: the leader's answer is half a round trip old.
    let rtt = u64::try_from(rtt.as_millis()).unwrap_or(u64::MAX);
    skew.sample(rtt, theirs.0.saturating_add(rtt / 2).saturating_add(rtt / 2), clock.now().0);
    let Some(skew_ms) = skew.news(row.clock_skew_ms) else { return };
    let command = Command::MemberClock { member: Member::Server(me), skew_ms };
    if state.cluster.as_ref().is_none_or(|c| c.version < command.level()) {
        return;
    }
    match skew_ms {
        Some(ms) => tracing::warn!(leader, "this server's clock is {} of the leader's", in_words(ms)),
        None => tracing::info!(leader, "this server's clock agrees with the leader's again"),
    }
    if let Err(error) = store.propose(command).await {
        tracing::debug!(%error, "not told yet how this server's clock stands");
    }
}
