//! The loop that moves a CA rotation on: only the leader acts, and what it proposes is judged again when applied.

use std::time::Duration;

use optimus_core::state::{Command, RotationVerdict, explain_rotation, judge_rotation};
use tokio_util::sync::CancellationToken;

use crate::store::Store;

/// Longest time between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Shortest: reports of a thousand nodes come in one after the other.
const PAUSE: Duration = Duration::from_millis(50);

/// Runs until `shutdown`.
pub async fn run(store: Store, shutdown: CancellationToken) {
    let mut applied = store.applied();
    let mut said = None;
    loop {
        applied.mark_unchanged();
        let under_way = store.status().is_leader && step(&store, &mut said).await;
        let wait = async {
            if under_way {
                store.env.clock.sleep(PAUSE).await;
            }
            tokio::select! {
                // Without a rotation, what begins one brings the next look.
                changed = applied.changed() => changed.is_ok(),
                () = store.env.clock.sleep(LOOK_EVERY) => true,
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => return,
            more = wait => if !more { return },
        }
    }
}

/// One look; tells whether a rotation is under way. `said` is what the log says of it already.
async fn step(store: &Store, said: &mut Option<String>) -> bool {
    let state = store.state();
    let Some(rotation) = state.cluster.as_ref().and_then(|c| c.authorities.rotation.as_ref()) else {
        *said = None;
        return false;
    };
    let now = store.env.clock.now();
    if let RotationVerdict::Advance(_) | RotationVerdict::GiveUp(_) = judge_rotation(&state, now) {
        let command = Command::StepRotation { number: rotation.number, from: rotation.phase };
        match store.propose(command).await {
            Ok(applied) => tracing::info!(number = rotation.number, from = ?rotation.phase, ?applied, "CA rotation"),
            Err(error) => tracing::warn!(%error, "step of the CA rotation not committed; trying again"),
        }
        return true;
    }
    let why = explain_rotation(&state, now);
    if *said != why {
        if let Some(why) = &why {
            tracing::info!("{why}");
        }
        *said = why;
    }
    true
}
