//! The loop that moves a CA rotation on: only the leader acts, and what it proposes is judged again when applied.
//!
//! It also counts how long a phase has lasted, by its monotonic clock, and hands the count on in the replicated state. A
//! leader that goes takes with it what it has not told, at most [`COUNT_EVERY`].

use std::time::Duration;

use optimus_common::Span;
use optimus_core::state::{Command, Rotation, RotationPhase, RotationVerdict, explain_rotation, judge_rotation};
use tokio_util::sync::CancellationToken;

use crate::store::Store;

/// Longest time between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Shortest: reports of a thousand nodes come in one after the other.
const PAUSE: Duration = Duration::from_millis(50);
/// How often the count is told.
const COUNT_EVERY: Duration = Duration::from_secs(60);

/// What this server has seen of a rotation while it leads.
#[derive(Default)]
struct Watched {
    /// What the log says of it already.
    said: Option<String>,
    count: Option<Count>,
}

/// How long the phase under way has lasted.
struct Count {
    of: (u32, RotationPhase),
    /// By the monotonic clock, when the state said `waited`.
    since: Duration,
    waited: Span,
}

/// Runs until `shutdown`.
pub async fn run(store: Store, shutdown: CancellationToken) {
    let mut applied = store.applied();
    let mut watched = Watched::default();
    loop {
        applied.mark_unchanged();
        let under_way = if store.status().is_leader {
            step(&store, &mut watched).await
        } else {
            watched = Watched::default();
            false
        };
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

/// One look; tells whether a rotation is under way.
async fn step(store: &Store, watched: &mut Watched) -> bool {
    let state = store.state();
    let Some(rotation) = state.cluster.as_ref().and_then(|c| c.authorities.rotation.as_ref()) else {
        *watched = Watched::default();
        return false;
    };
    if let RotationVerdict::Advance(_) | RotationVerdict::GiveUp(_) = judge_rotation(&state) {
        propose(store, Command::StepRotation { number: rotation.number, from: rotation.phase }).await;
        return true;
    }
    let why = explain_rotation(&state);
    if watched.said != why {
        if let Some(why) = &why {
            tracing::info!("{why}");
        }
        watched.said = why;
    }
    if let Some(waited) = counted(store.env.clock.monotonic(), rotation, &mut watched.count) {
        propose(store, Command::RotationWaited { number: rotation.number, phase: rotation.phase, waited }).await;
    }
    true
}

async fn propose(store: &Store, command: Command) {
    let step = matches!(command, Command::StepRotation { .. });
    match store.propose(command).await {
        Ok(applied) if step => tracing::info!(?applied, "the CA rotation moves on"),
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "step of the CA rotation not committed; trying again"),
    }
}

/// What to tell of how long the phase has lasted, if it is time to.
fn counted(now: Duration, rotation: &Rotation, count: &mut Option<Count>) -> Option<Span> {
    let of = (rotation.number, rotation.phase);
    let held = match count {
        Some(held) if held.of == of && held.waited == rotation.waited => held,
        _ => {
            *count = Some(Count { of, since: now, waited: rotation.waited });
            return None;
        }
    };
    let more = now.saturating_sub(held.since);
    let due = more >= COUNT_EVERY || Span::from(more) >= rotation.left();
    (due && rotation.left() > Span(0)).then(|| Span(held.waited.0.saturating_add(Span::from(more).0)))
}

#[cfg(test)]
mod tests {
    use optimus_common::Timestamp;

    use super::*;

    #[test]
    fn a_phase_is_counted_by_the_minute_and_to_its_end() {
        let at = |s: u64| Duration::from_secs(1_000_000 + s);
        let mut rotation = Rotation {
            number: 3,
            from: 1,
            phase: RotationPhase::Sign,
            certificate: vec![],
            key_sealed: vec![],
            cross: vec![],
            overlap: Span::secs(150),
            started_at: Timestamp(0),
            phase_at: Timestamp(0),
            waited: Span::secs(20), // by the leader before
            force: false,
        };
        let mut count = None;
        assert_eq!(counted(at(0), &rotation, &mut count), None);
        assert_eq!(counted(at(59), &rotation, &mut count), None);
        assert_eq!(counted(at(61), &rotation, &mut count), Some(Span::secs(81)));
        assert_eq!(counted(at(62), &rotation, &mut count), Some(Span::secs(82)), "the first word was lost");
        rotation.waited = Span::secs(82);
        assert_eq!(counted(at(62), &rotation, &mut count), None);
        assert_eq!(counted(at(121), &rotation, &mut count), None);
        rotation.waited = Span::secs(82 + 60);
        assert_eq!(counted(at(122), &rotation, &mut count), None);
        assert_eq!(counted(at(130), &rotation, &mut count), Some(Span::secs(150)), "not a minute late");
        rotation.phase = RotationPhase::Announce;
        rotation.waited = Span(0);
        assert_eq!(counted(at(500), &rotation, &mut count), None, "another phase begins at nothing");
    }
}
