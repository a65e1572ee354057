//! The loop that only the leader runs: reads the whole state, decides, proposes one batch.

use std::time::Duration;

use optimus_common::{AllocId, Timestamp};
use optimus_core::reconciler;
use optimus_core::state::Command;
use tokio_util::sync::CancellationToken;

use crate::store::Store;

/// Longest time between two looks. A lost wake-up costs this much, never correctness.
const LOOK_AT_LEAST_EVERY: Duration = Duration::from_secs(1);
/// Pause after a proposal that failed, so that a stuck disk is not asked in a tight loop.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(100);

/// Runs until `shutdown`.
pub async fn run(store: Store, shutdown: CancellationToken) {
    let mut applied = store.applied();
    loop {
        applied.mark_unchanged();
        let wait = match step(&store).await {
            Ok(wake_at) => until(store.env.clock.now(), wake_at),
            Err(error) => {
                tracing::warn!(%error, "plan not committed");
                PAUSE_AFTER_FAILURE
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = applied.changed() => if changed.is_err() { return },
            () = store.env.clock.sleep(wait) => {}
        }
    }
}

async fn step(store: &Store) -> Result<Option<Timestamp>, crate::store::ProposeError> {
    if !store.status().is_leader {
        return Ok(None);
    }
    let state = store.state();
    let env = &store.env;
    let outcome = reconciler::reconcile(&state, env.clock.now(), &mut || AllocId(env.new_id()));
    if !outcome.plan.is_empty() {
        // Its effect moves the applied index, which is what brings the next look.
        store.propose(Command::Plan(outcome.plan)).await?;
    }
    Ok(outcome.wake_at)
}

fn until(now: Timestamp, wake_at: Option<Timestamp>) -> Duration {
    wake_at.map_or(LOOK_AT_LEAST_EVERY, |at| at.since(now).as_duration().max(Duration::from_millis(1)).min(LOOK_AT_LEAST_EVERY))
}
