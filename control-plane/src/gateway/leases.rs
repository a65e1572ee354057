//! Declares nodes down that have not been heard for a lease. Only the leader does, and only after a
//! grace in which the nodes of the leader before could come back.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use optimus_common::NodeId;
use optimus_core::state::{Applied, Command};

use super::{GRACE, LEASE, Shared};

/// How often silence is looked for; part of the time from a lost node to its replacement.
const CHECK: Duration = Duration::from_millis(250);
/// Nodes declared down in one round; the rest follow in the next.
const DOWN_PER_ROUND: usize = 256;

/// What is known of a node that the state has as up.
struct Watched {
    node: NodeId,
    /// When it was last heard here, if ever.
    heard: Option<Duration>,
}

/// The nodes to declare down. `since`: when this server began to watch.
fn judge(watched: impl Iterator<Item = Watched>, since: Duration, now: Duration) -> Vec<NodeId> {
    watched
        .filter(|w| match w.heard {
            Some(heard) if heard >= since => now.saturating_sub(heard) > LEASE,
            // Not heard since we watch: its session may have been another leader's.
            _ => now.saturating_sub(since) > GRACE,
        })
        .map(|w| w.node)
        .collect()
}

pub async fn run(shared: Arc<Shared>) {
    let clock = shared.store.env.clock.clone();
    let mut last = clock.monotonic();
    // From before the first session, so that those of the first moments count as heard.
    let mut since = shared.store.status().is_leader.then_some(last);
    loop {
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = clock.sleep(CHECK) => {}
        }
        let now = clock.monotonic();
        // On every server, leader or not: a revoked node is out within a look.
        shared.sessions.prune(&shared.store.state());
        if now.saturating_sub(last) > LEASE {
            // We slept (a suspended host, a stopped process), so everyone seems silent.
            tracing::warn!(for_ms = (now - last).as_millis() as u64, "this server did not run for a while; nodes get time to come back");
            since = None;
        }
        last = now;
        if !shared.store.status().is_leader {
            since = None;
            continue;
        }
        let since = *since.get_or_insert(now);
        let state = shared.store.state();
        let up = state.nodes.values().filter(|n| n.up).map(|n| Watched { node: n.id, heard: shared.sessions.last_heard(n.id) });
        let mut down = judge(up, since, now);
        down.truncate(DOWN_PER_ROUND);
        let proposals = down.into_iter().map(|node| {
            let shared = &shared;
            async move {
                match shared.store.propose(Command::NodeDown { node }).await {
                    Ok(Applied::Refused(refusal)) => tracing::warn!(%node, %refusal, "node not declared down"),
                    Ok(_) => tracing::warn!(%node, lease = ?LEASE, "node not heard for longer than its lease: declared down"),
                    Err(error) => tracing::warn!(%node, %error, "failed to declare a node down; trying again"),
                }
            }
        });
        tokio::select! {
            () = shared.stop.cancelled() => return,
            _ = join_all(proposals) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_counts_from_the_last_word_and_only_after_the_grace() {
        let node = |n: u128| NodeId(uuid::Uuid::from_u128(n));
        let secs = Duration::from_secs;
        let since = secs(1000);
        let judge_at = |now: u64| {
            let watched = [(1, None), (2, Some(secs(990))), (3, Some(secs(1002))), (4, Some(secs(1011)))];
            judge(watched.into_iter().map(|(n, heard)| Watched { node: node(n), heard }), since, secs(now))
        };
        assert_eq!(judge_at(1007), vec![]);
        assert_eq!(judge_at(1008), vec![node(3)], "heard since we watch, then silent for a lease");
        assert_eq!(judge_at(1011), vec![node(1), node(2), node(3)], "the grace is over for those never heard");
        assert_eq!(judge_at(1017).len(), 4);
    }
}
