//! How far another host's clock is off ours, told from round trips, and when that is worth a word.
//!
//! Nothing is decided by such a figure: people are told, so that logs of several hosts can be read side by side.

/// Off by more than this is told.
pub const TOLD_MS: i64 = 1_000;
/// What was told is taken back below this, so that a clock at the threshold does not come and go.
pub const SETTLED_MS: i64 = 500;
/// Round trips of which the shortest counts: the others met a queue.
const WINDOW: usize = 8;

/// The newest round trips to one host.
#[derive(Debug, Clone, Default)]
pub struct ClockSkew {
    /// Round trip and skew, in milliseconds.
    samples: std::collections::VecDeque<(u64, i64)>,
}

impl ClockSkew {
    /// Takes a round trip of `rtt_ms` that ended at `here_ms` by our wall clock and brought `there_ms` of the other.
    pub fn sample(&mut self, rtt_ms: u64, here_ms: u64, there_ms: u64) {
        let half = i64::try_from(rtt_ms / 2).unwrap_or(i64::MAX);
        let skew = signed(there_ms).saturating_sub(signed(here_ms).saturating_sub(half));
        if self.samples.len() == WINDOW {
            self.samples.pop_front();
        }
        self.samples.push_back((rtt_ms, skew));
    }

    /// Milliseconds the other clock is ahead, by the shortest of the newest round trips, the newest of those.
    pub fn estimate(&self) -> Option<i64> {
        self.best().map(|(_, skew)| skew)
    }

    fn best(&self) -> Option<(u64, i64)> {
        self.samples.iter().rev().min_by_key(|(rtt, _)| *rtt).copied()
    }

    /// What should be on record, given what is: `Some(new)` when that has to change.
    ///
    /// Crossings of the threshold and changes by more than half are news, everything else is noise. So is what half a
    /// round trip may have added.
    pub fn news(&self, told: Option<i64>) -> Option<Option<i64>> {
        let (rtt, now) = self.best()?;
        let surely = now.saturating_abs().saturating_sub(i64::try_from(rtt / 2).unwrap_or(i64::MAX));
        match told {
            None => (surely > TOLD_MS).then_some(Some(now)),
            Some(_) if now.saturating_abs() < SETTLED_MS => Some(None),
            Some(told) => {
                let moved = now.saturating_sub(told).saturating_abs();
                (moved > TOLD_MS && moved > told.saturating_abs() / 2).then_some(Some(now))
            }
        }
    }
}

fn signed(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}

/// `14 s ahead`
pub fn in_words(skew_ms: i64) -> String {
    let way = if skew_ms < 0 { "behind" } else { "ahead" };
    let seconds = skew_ms.unsigned_abs().saturating_add(500) / 1000;
    match seconds {
        0..=119 => format!("{seconds} s {way}"),
        120..=7199 => format!("{} min {way}", seconds / 60),
        _ => format!("{} h {way}", seconds / 3600),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_round_trip_is_taken_out_and_the_shortest_counts() {
        let mut clock = ClockSkew::default();
        assert_eq!((clock.estimate(), clock.news(None)), (None, None));
        clock.sample(40, 100_000, 113_980); // the answer was on its way for 20 ms
        assert_eq!(clock.estimate(), Some(14_000));
        clock.sample(4_000, 110_000, 125_500); // a queue on the way there
        assert_eq!(clock.estimate(), Some(14_000));
        for _ in 0..WINDOW {
            clock.sample(100, 200_000, 199_950);
        }
        assert_eq!(clock.estimate(), Some(0), "old round trips are forgotten");
        clock.sample(u64::MAX, u64::MAX, 0);
        clock.sample(0, 0, u64::MAX); // bytes from a network: no panic
    }

    #[test]
    fn only_crossings_and_large_changes_are_news() {
        let at = |skew: i64| {
            let mut clock = ClockSkew::default();
            clock.sample(0, 1_000_000, u64::try_from(1_000_000 + skew).unwrap());
            clock
        };
        assert_eq!(at(999).news(None), None);
        assert_eq!(at(1_001).news(None), Some(Some(1_001)));
        let mut slow = ClockSkew::default();
        slow.sample(1_000, 1_000_000, 1_000_900); // 1.4 s ahead, or 0.9 s
        assert_eq!((slow.estimate(), slow.news(None)), (Some(1_400), None));
        assert_eq!(at(-2_500).news(None), Some(Some(-2_500)));
        assert_eq!(at(-700).news(Some(-800)), None, "not settled yet");
        assert_eq!(at(-499).news(Some(-2_500)), Some(None));
        assert_eq!(at(14_300).news(Some(14_000)), None);
        assert_eq!(at(60_000).news(Some(14_000)), Some(Some(60_000)));
        assert_eq!(at(-14_000).news(Some(14_000)), Some(Some(-14_000)));
        let drift = (1_001..9_000).scan(None, |told, ms| {
            let news = at(ms).news(*told);
            *told = news.unwrap_or(*told);
            Some(news)
        });
        assert!(drift.flatten().count() < 6, "a clock that drifts is told of now and then");
    }

    #[test]
    fn a_skew_reads_as_a_person_would_say_it() {
        assert_eq!(
            [in_words(14_200), in_words(-2_400), in_words(-200_000), in_words(11_000_000)],
            ["14 s ahead", "2 s behind", "3 min behind", "3 h ahead"]
        );
    }
}
