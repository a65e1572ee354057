//! The loop that only the leader runs: reads the whole state, decides, proposes one batch.

use std::time::Duration;

use optimus_common::{AllocId, Timestamp};
use optimus_core::reconciler;
use optimus_core::state::{Applied, Command};
use tokio_util::sync::CancellationToken;

use crate::store::{ProposeError, Store};

/// Longest time between two looks. A lost wake-up costs this much, never correctness.
const LOOK_AT_LEAST_EVERY: Duration = Duration::from_secs(1);
/// Pause after a proposal that failed, so that a stuck disk is not asked in a tight loop.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(100);

/// A look that takes longer than this is followed by a pause as long: the loop takes at most half a core.
const LONG_LOOK: Duration = Duration::from_millis(5);

/// Plans in a row without any effect before a pause. Planning and applying ask the same judge, so more than one or
/// two are a fault of ours, which must not fill the log.
const IN_VAIN_MAX: u32 = 3;

/// Runs until `shutdown`.
pub async fn run(store: Store, shutdown: CancellationToken) {
    let mut applied = store.applied();
    let mut in_vain = 0;
    loop {
        applied.mark_unchanged();
        let wait = match step(&store).await {
            Ok(Next::At(wake_at)) => {
                in_vain = 0;
                until(store.env.clock.now(), wake_at)
            }
            Ok(Next::Again) => {
                in_vain += 1;
                if in_vain < IN_VAIN_MAX {
                    continue; // the state had moved on
                }
                tracing::error!(plans = in_vain, "plans have no effect when they are applied; pausing");
                if shutdown.run_until_cancelled(store.env.clock.sleep(LOOK_AT_LEAST_EVERY)).await.is_none() {
                    return;
                }
                continue;
            }
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

/// What a look came to.
enum Next {
    /// Look again at a change, or at this time.
    At(Option<Timestamp>),
    /// Nothing of the plan took effect.
    Again,
}

async fn step(store: &Store) -> Result<Next, ProposeError> {
    if !store.status().is_leader {
        return Ok(Next::At(None));
    }
    let state = store.state();
    let env = &store.env;
    let began = env.clock.monotonic();
    let outcome = reconciler::reconcile(&state, env.clock.now(), &mut || AllocId(env.new_id()));
    let mut acted = false;
    let took = env.clock.monotonic().saturating_sub(began);
    for command in outcome.commands {
        acted |= matches!(store.propose_leading(command).await?, Applied::Done { .. });
    }
    if !outcome.plan.is_empty() {
        // Its effect moves the applied index, which is what brings the next look.
        if let Applied::Unchanged { .. } = store.propose_leading(Command::Plan(outcome.plan)).await?
            && !acted
        {
            return Ok(Next::Again);
        }
    } else if took > LONG_LOOK {
        // Many changes cost one look; a small cluster never waits here.
        env.clock.sleep(took).await;
    }
    Ok(Next::At(outcome.wake_at))
}

fn until(now: Timestamp, wake_at: Option<Timestamp>) -> Duration {
    wake_at.map_or(LOOK_AT_LEAST_EVERY, |at| at.since(now).as_duration().max(Duration::from_millis(1)).min(LOOK_AT_LEAST_EVERY))
}
