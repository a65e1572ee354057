//! The clock a server judges the leader's silence by, and how it follows the speed of the disk.
//!
//! It never decides anything Raft's safety rests on: a wrong clock costs an election or a wait, never a write.
//!
//! - It runs only while this server runs: a tick that comes late (a paused process, a starved machine) counts as
//!   [`TICKS_AT_ONCE`] ticks at most. Whoever was away did not hear the leader because it did not listen.
//! - It stretches with the disk: every election timer is multiplied by [`Clock::scale`], which follows the p99 of this
//!   server's own flushes, since a heartbeat waits behind a flush on the leader and again on the follower.
//! - While an append of the leader is being written here, the leader counts as heard.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::tuning::Tuning;
use super::types::Vote;

/// Most ticks that one late tick counts as.
const TICKS_AT_ONCE: u32 = 2;
/// Ticks in one heartbeat interval.
const TICKS_PER_HEARTBEAT: u32 = 2;
/// Timers grow at most this much; beyond it a disk is unfit for consensus and an election is the smaller harm.
pub(crate) const SCALE_MAX: u32 = 8;
/// The election timeout stays above this many slow flushes: "an order of magnitude" (Raft paper, 5.6).
const FLUSHES_PER_TIMEOUT: u32 = 10;
/// One, in the fixed point of the scale and of the draws.
const ONE: u32 = 1000;

/// How long flushes take: a histogram of powers of the square root of two that forgets.
#[derive(Debug, Default)]
pub(crate) struct Latency(Mutex<Buckets>);

/// Half powers of two from 16 us to beyond 60 s.
const BUCKETS: usize = 48;
/// Weight of the histogram at which everything in it is halved, so that a minute of trouble is forgotten in the next.
const FORGET_AT: u32 = 1024;

#[derive(Debug)]
struct Buckets {
    counts: [u32; BUCKETS],
    total: u32,
}

impl Default for Buckets {
    fn default() -> Self {
        Self { counts: [0; BUCKETS], total: 0 }
    }
}

/// Upper end of a bucket.
fn bound(bucket: usize) -> Duration {
    let whole = 16u64 << (bucket / 2);
    Duration::from_micros(if bucket.is_multiple_of(2) { whole } else { whole + whole * 2 / 5 })
}

impl Latency {
    /// Notes one flush.
    pub(crate) fn record(&self, took: Duration) {
        let bucket = (0..BUCKETS - 1).find(|b| took <= bound(*b)).unwrap_or(BUCKETS - 1);
        let mut b = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        b.counts[bucket] += 1;
        b.total += 1;
        if b.total >= FORGET_AT {
            for c in &mut b.counts {
                *c /= 2;
            }
            b.total = b.counts.iter().sum();
        }
    }

    /// The time 99 of 100 recent flushes stayed below (up to the width of a bucket); zero before the first.
    pub(crate) fn p99(&self) -> Duration {
        let b = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // With fewer than a hundred this is the slowest but one, so that the one flush that creates the file does not count.
        let mut left = (b.total / 100).max(1);
        for bucket in (0..BUCKETS).rev() {
            if b.counts[bucket] > left {
                return bound(bucket);
            }
            left -= b.counts[bucket];
        }
        Duration::ZERO
    }
}

/// One server's election clock. Shared by what hears the leader, what answers votes and the election driver.
#[derive(Debug)]
pub(crate) struct Clock {
    tick: Duration,
    min: Duration,
    max: Duration,
    pub latency: Arc<Latency>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Time this server has been running, as far as it counts.
    now: Duration,
    /// The leader last heard and when.
    heard: Option<(Vote, Duration)>,
    /// When the wait for an election began: the last word of a leader, a vote given, or an own attempt.
    since: Duration,
    /// When this server last gave its vote.
    voted: Option<Duration>,
    /// Where between the shortest and the longest timeout this server waits, in thousandths. `None`: to be drawn.
    draw: Option<u32>,
    /// An election is due no sooner than this, whatever the draw.
    not_before: Duration,
    /// Appends of the leader being written.
    writing: u32,
    /// In thousandths, beyond one.
    stretch: u32,
}

impl Clock {
    pub(crate) fn new(tuning: &Tuning, latency: Arc<Latency>) -> Self {
        Self {
            tick: (tuning.heartbeat / TICKS_PER_HEARTBEAT).max(Duration::from_millis(1)),
            min: tuning.election_min,
            max: tuning.election_max,
            latency,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pause between two ticks.
    pub(crate) fn tick(&self) -> Duration {
        self.tick
    }

    /// Lets time pass. The scale grows within a few ticks and shrinks within a few hundred.
    pub(crate) fn advance(&self, elapsed: Duration) {
        let wanted = self.latency.p99() * FLUSHES_PER_TIMEOUT;
        let wanted = (wanted.as_micros() * u128::from(ONE) / self.min.as_micros().max(1)).min(u128::from(SCALE_MAX * ONE));
        let wanted = (wanted as u32).saturating_sub(ONE); // below SCALE_MAX * ONE, see the line before
        let mut s = self.state();
        s.now += elapsed.min(self.tick * TICKS_AT_ONCE);
        if wanted > s.stretch {
            s.stretch += (wanted - s.stretch).div_ceil(4);
        } else {
            s.stretch -= (s.stretch - wanted).div_ceil(100);
        }
        if s.writing > 0 {
            s.since = s.now;
            let now = s.now;
            if let Some((_, at)) = &mut s.heard {
                *at = now;
            }
        }
    }

    fn scaled(&self, d: Duration) -> Duration {
        d * (ONE + self.state().stretch) / ONE
    }

    /// Raft time: how long this server has been running, as far as it counts.
    pub(crate) fn now(&self) -> Duration {
        self.state().now
    }

    /// A message of the leader with this vote has come. An older leader than the one already heard does not count.
    pub(crate) fn heard(&self, leader: Vote) {
        let mut s = self.state();
        let now = s.now;
        match &mut s.heard {
            Some((known, _)) if leader.leader_id < known.leader_id => return,
            Some((known, at)) if leader.leader_id == known.leader_id => *at = now,
            other => {
                *other = Some((leader, now));
                // Each term has its own draw, so that two servers that once drew alike do not go on colliding.
                s.draw = None;
            }
        }
        s.since = now;
        s.not_before = Duration::ZERO;
    }

    /// Counts an append of the leader as being written until the guard is dropped.
    pub(crate) fn writing(&self) -> Writing<'_> {
        self.state().writing += 1;
        Writing(self)
    }

    /// This server has given its vote to another one.
    pub(crate) fn voted(&self) {
        self.restart();
        let mut s = self.state();
        s.voted = Some(s.now);
    }

    /// Whether the server voted for last may still be about to say that it leads.
    pub(crate) fn voted_lately(&self) -> bool {
        let lease = self.lease();
        let s = self.state();
        s.voted.is_some_and(|at| s.now.saturating_sub(at) < lease)
    }

    /// Four fifths of the shortest timeout, because clocks tick.
    fn lease(&self) -> Duration {
        self.scaled(self.min) * 4 / 5
    }

    /// Begins the wait for an election anew: a vote was given, or an own attempt was started.
    pub(crate) fn restart(&self) {
        let mut s = self.state();
        s.since = s.now;
        s.draw = None;
    }

    /// Puts the next attempt off: the others do not miss the leader, or hold more of the log.
    pub(crate) fn put_off(&self, by: Duration) {
        let mut s = self.state();
        s.not_before = s.now + by;
    }

    /// How long until an election is due; `random` is asked when a new draw is needed.
    pub(crate) fn due_in(&self, random: impl FnOnce() -> u64) -> Duration {
        let mut s = self.state();
        let draw = *s.draw.get_or_insert_with(|| (random() % u64::from(ONE)) as u32);
        let timeout = self.min + (self.max - self.min) * draw / ONE;
        let due = s.since + timeout * (ONE + s.stretch) / ONE;
        due.max(s.not_before).saturating_sub(s.now)
    }

    /// Whether a leader was heard so recently that no other server may have missed it for an election timeout.
    pub(crate) fn lease_holds(&self, leader: Vote) -> bool {
        let lease = self.lease();
        let s = self.state();
        s.heard.is_some_and(|(by, at)| by.leader_id == leader.leader_id && s.now.saturating_sub(at) < lease)
    }

    /// The longest election timeout, as the disk has it now. A leader that has not reached a quorum for that long has
    /// probably been replaced.
    pub(crate) fn timeout_max(&self) -> Duration {
        self.scaled(self.max)
    }

    /// Longest wait for a peer's answer to an append or a vote. Half of the shortest timeout, so that one lost message
    /// is sent again before the peer misses its leader.
    pub(crate) fn call_ttl(&self) -> Duration {
        self.scaled(self.min) / 2
    }
}

/// See [`Clock::writing`].
pub(crate) struct Writing<'a>(&'a Clock);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.state().writing -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock() -> Clock {
        let ms = Duration::from_millis;
        Clock::new(&Tuning { heartbeat: ms(50), election_min: ms(200), election_max: ms(400), ..Tuning::default() }, Arc::default())
    }

    fn pass(clock: &Clock, ms: u64) {
        for _ in 0..ms / 25 {
            clock.advance(Duration::from_millis(25));
        }
    }

    #[test]
    fn an_election_is_due_between_the_two_timeouts_after_the_last_word() {
        for random in [0, 400, 999] {
            let clock = clock();
            clock.heard(Vote::new_committed(3, 1));
            pass(&clock, 150);
            clock.heard(Vote::new_committed(3, 1));
            let due = clock.due_in(|| random);
            assert_eq!(due, Duration::from_millis(200) + Duration::from_micros(200 * random));
            pass(&clock, 400);
            assert_eq!(clock.due_in(|| 0), Duration::ZERO);
        }
    }

    #[test]
    fn a_deposed_leader_does_not_put_the_election_off() {
        let clock = clock();
        clock.heard(Vote::new_committed(3, 1));
        pass(&clock, 200);
        clock.heard(Vote::new_committed(2, 2));
        assert_eq!(clock.due_in(|| 0), Duration::ZERO);
        assert!(!clock.lease_holds(Vote::new_committed(3, 1)));
    }

    /// SIGSTOP, a suspended machine, a starved runtime: the silence was ours.
    #[test]
    fn a_server_that_was_away_waits_for_the_leader_before_it_stands() {
        let clock = clock();
        clock.heard(Vote::new_committed(3, 1));
        clock.advance(Duration::from_secs(3600));
        assert!(clock.due_in(|| 0) >= Duration::from_millis(150));
        assert!(clock.lease_holds(Vote::new_committed(3, 1)));
    }

    #[test]
    fn a_leader_whose_append_is_being_written_is_not_silent() {
        let clock = clock();
        clock.heard(Vote::new_committed(3, 1));
        let writing = clock.writing();
        pass(&clock, 2000);
        assert!(clock.lease_holds(Vote::new_committed(3, 1)));
        drop(writing);
        pass(&clock, 200);
        assert_eq!(clock.due_in(|| 0), Duration::ZERO);
    }

    #[test]
    fn timers_follow_the_disk_within_bounds_and_come_back() {
        let clock = clock();
        pass(&clock, 1000);
        assert_eq!(clock.timeout_max(), Duration::from_millis(400));
        for _ in 0..200 {
            clock.latency.record(Duration::from_millis(50));
        }
        let mut before = clock.timeout_max();
        for _ in 0..100 {
            pass(&clock, 25);
            assert!(clock.timeout_max() >= before && clock.timeout_max() <= before * 2, "it jumped");
            before = clock.timeout_max();
        }
        assert!((Duration::from_millis(1000)..Duration::from_millis(1500)).contains(&before), "{before:?}");
        for _ in 0..200 {
            clock.latency.record(Duration::from_secs(30));
        }
        pass(&clock, 10_000);
        assert_eq!(clock.timeout_max(), Duration::from_millis(400) * SCALE_MAX);
        for _ in 0..20_000 {
            clock.latency.record(Duration::from_millis(1));
        }
        pass(&clock, 60_000);
        assert_eq!(clock.timeout_max(), Duration::from_millis(400));
    }

    #[test]
    fn the_p99_is_within_a_bucket_of_the_truth() {
        let latency = Latency::default();
        assert_eq!(latency.p99(), Duration::ZERO);
        for i in 1..=1000u64 {
            latency.record(Duration::from_micros(if i % 50 == 0 { 80_000 } else { 2_000 }));
        }
        let p99 = latency.p99();
        assert!((Duration::from_millis(80)..Duration::from_millis(120)).contains(&p99), "{p99:?}");
        let one = Latency::default();
        one.record(Duration::from_secs(1));
        one.record(Duration::from_millis(1));
        assert!(one.p99() < Duration::from_millis(2), "a single slow flush counts for nothing");
    }
}
