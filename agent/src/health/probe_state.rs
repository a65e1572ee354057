//! From single answers of a check to a verdict. Pure.

use std::time::Duration;

use optimus_common::spec::Probe;

/// First pause between two checks of a copy that has not been good yet.
///
/// Growing by a quarter each time up to the probe's interval, so that a fast starter is seen at once and
/// the wait added to any start stays a fraction of it.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const GROWTH: f64 = 1.25;

/// What the answers so far come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Not known yet: neither threshold was reached since the start.
    Unknown,
    Good,
    Bad,
}

/// Counts the answers of one check of one run.
#[derive(Debug, Clone)]
pub struct ProbeState {
    interval: Duration,
    grace: Duration,
    healthy_after: u32,
    unhealthy_after: u32,
    /// Ask fast until first good.
    eager: bool,
    pause: Duration,
    verdict: Verdict,
    good_in_a_row: u32,
    bad_in_a_row: u32,
}

impl ProbeState {
    /// `eager`: ask in quick succession until it is good for the first time (readiness).
    pub fn new(probe: &Probe, eager: bool) -> Self {
        let interval = probe.interval.as_duration().max(FIRST_PAUSE);
        ProbeState {
            interval,
            grace: probe.grace.as_duration(),
            healthy_after: probe.healthy_after.max(1),
            unhealthy_after: probe.unhealthy_after.max(1),
            eager,
            pause: FIRST_PAUSE,
            verdict: Verdict::Unknown,
            good_in_a_row: 0,
            bad_in_a_row: 0,
        }
    }

    /// One that was good when it was last looked at (by the agent before this one).
    pub fn resumed_good(probe: &Probe) -> Self {
        ProbeState { verdict: Verdict::Good, eager: false, ..ProbeState::new(probe, false) }
    }

    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Takes one answer given `up` after the start of the run.
    pub fn answer(&mut self, good: bool, up: Duration) -> Verdict {
        if good {
            self.good_in_a_row = self.good_in_a_row.saturating_add(1);
            self.bad_in_a_row = 0;
            if self.good_in_a_row >= self.healthy_after {
                self.verdict = Verdict::Good;
                self.eager = false;
            }
        } else {
            self.good_in_a_row = 0;
            // In the grace a copy that has not been good yet is expected to fail; one that was good is not.
            if up >= self.grace || self.verdict == Verdict::Good {
                self.bad_in_a_row = self.bad_in_a_row.saturating_add(1);
            }
            if self.bad_in_a_row >= self.unhealthy_after {
                self.verdict = Verdict::Bad;
            }
        }
        self.verdict
    }

    /// How long to wait before asking again.
    pub fn pause(&mut self) -> Duration {
        if !self.eager {
            return self.interval;
        }
        let pause = self.pause.min(self.interval);
        self.pause = self.pause.mul_f64(GROWTH).min(self.interval);
        pause
    }
}

#[cfg(test)]
mod tests {
    use optimus_common::spec::Check;
    use optimus_common::time::Span;

    use super::*;

    fn probe() -> Probe {
        let (interval, timeout, grace) = (Span::secs(5), Span::secs(1), Span::secs(10));
        Probe { check: Check::Tcp, port: None, interval, timeout, grace, healthy_after: 2, unhealthy_after: 3 }
    }

    const LATE: Duration = Duration::from_secs(60);

    #[test]
    fn it_takes_as_many_answers_in_a_row_as_the_thresholds_say() {
        let mut s = ProbeState::new(&probe(), true);
        assert_eq!(s.answer(true, LATE), Verdict::Unknown);
        assert_eq!(s.answer(false, LATE), Verdict::Unknown);
        assert_eq!(s.answer(true, LATE), Verdict::Unknown);
        assert_eq!(s.answer(true, LATE), Verdict::Good);
        for verdict in [Verdict::Good, Verdict::Good, Verdict::Bad] {
            assert_eq!(s.answer(false, LATE), verdict);
        }
        assert_eq!(s.answer(true, LATE), Verdict::Bad);
        assert_eq!(s.answer(true, LATE), Verdict::Good);
    }

    #[test]
    fn failures_in_the_grace_do_not_count() {
        let mut s = ProbeState::new(&probe(), true);
        for _ in 0..100 {
            assert_eq!(s.answer(false, Duration::from_secs(9)), Verdict::Unknown);
        }
        for verdict in [Verdict::Unknown, Verdict::Unknown, Verdict::Bad] {
            assert_eq!(s.answer(false, Duration::from_secs(10)), verdict);
        }
    }

    #[test]
    fn a_starting_copy_is_asked_often_then_ever_less_and_a_good_one_at_the_interval() {
        let mut s = ProbeState::new(&probe(), true);
        let mut total = Duration::ZERO;
        let mut asked = 0;
        while total < Duration::from_millis(500) {
            total += s.pause();
            asked += 1;
        }
        assert!((5..15).contains(&asked), "{asked}");
        for _ in 0..100 {
            assert!(s.pause() <= Duration::from_secs(5));
        }
        s.answer(true, LATE);
        s.answer(true, LATE);
        assert_eq!(s.pause(), Duration::from_secs(5));
    }
}
