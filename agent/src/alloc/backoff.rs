//! How long a copy waits before its next start.

use std::time::Duration;

use optimus_common::spec::Restart;

/// Shortest pause from the second restart in a row on, whatever the spec says: a copy that ends at
/// once must not keep a core busy.
pub const DELAY_MIN: Duration = Duration::from_millis(100);

/// Part of the pause that is random. Below one half, so that pauses never shrink from one restart to the next.
const JITTER: f64 = 0.2;

/// The pause before the restart after `row` earlier ones in a row. `jitter` is in `0.0..1.0`.
///
/// The first restart is at once; then the spec's delay, doubling, spread by up to a fifth and never
/// above its `delay_max`.
pub fn delay(policy: &Restart, row: u32, jitter: f64) -> Duration {
    let Some(doublings) = row.checked_sub(1) else { return Duration::ZERO };
    let first = policy.delay.as_duration().max(DELAY_MIN);
    let max = policy.delay_max.as_duration().max(DELAY_MIN);
    // 2^20 times the smallest delay is over a day: beyond any limit, and far from overflow.
    let base = first.checked_mul(1 << doublings.min(20)).unwrap_or(max).min(max);
    base.mul_f64(1.0 + JITTER * jitter.clamp(0.0, 1.0)).min(max)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use optimus_common::time::Span;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_first_restart_is_at_once_then_the_pause_doubles_to_its_limit() {
        let policy = Restart { delay: Span::secs(1), delay_max: Span::secs(10), reset_after: Span::secs(60) };
        let seconds: Vec<u64> = (0..7).map(|row| delay(&policy, row, 0.0).as_secs()).collect();
        assert_eq!(seconds, [0, 1, 2, 4, 8, 10, 10]);
    }

    proptest! {
        #[test]
        fn pauses_never_shrink_and_never_pass_their_limit(
            first in 0u64..100_000_000, max in 0u64..100_000_000, jitters in prop::collection::vec(0.0f64..1.0, 1..80),
        ) {
            let policy = Restart { delay: Span(first), delay_max: Span(max), reset_after: Span(0) };
            let mut before = Duration::ZERO;
            for (row, jitter) in jitters.into_iter().enumerate() {
                let pause = delay(&policy, row as u32, jitter);
                prop_assert!(pause >= before, "{pause:?} after {before:?}");
                prop_assert!(pause <= Duration::from_millis(max).max(DELAY_MIN));
                prop_assert!(row == 0 || pause >= DELAY_MIN.min(Duration::from_millis(max).max(DELAY_MIN)));
                before = pause;
            }
        }
    }
}
