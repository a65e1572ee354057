//! The clocks of a simulated machine: virtual time, with a skew, a drift and jumps of its own.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use optimus_common::Timestamp;
use optimus_common::env::{Clock, Entropy};
use tokio::time::Instant;

use crate::entropy::Rng;

/// Wall time at which every run starts.
pub const EPOCH_MS: i64 = 1_800_000_000_000;

/// The time on a clock that is right.
pub fn wall(world: &crate::world::World) -> Timestamp {
    Timestamp(EPOCH_MS as u64 + world.now() / 1000)
}

/// One machine's clocks.
#[derive(Clone, Debug)]
pub struct SimClock {
    start: Instant,
    wrong: Arc<Mutex<Wrong>>,
}

#[derive(Debug, Default)]
struct Wrong {
    /// Wall clock ahead of true time, in milliseconds.
    offset_ms: i64,
    /// Parts per million by which both clocks run fast.
    drift_ppm: i64,
}

impl SimClock {
    /// A clock of a run that began at `start`.
    pub fn new(start: Instant, offset_ms: i64, drift_ppm: i64) -> Self {
        Self { start, wrong: Arc::new(Mutex::new(Wrong { offset_ms, drift_ppm })) }
    }

    fn wrong(&self) -> MutexGuard<'_, Wrong> {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves the wall clock.
    pub fn jump(&self, by_ms: i64) {
        self.wrong().offset_ms += by_ms;
    }

    /// Sets the wall clock right, within `off_ms`.
    pub fn set_right(&self, off_ms: i64) {
        self.wrong().offset_ms = off_ms;
    }

    fn stretched(&self, d: Duration, inverse: bool) -> Duration {
        let ppm = self.wrong().drift_ppm * if inverse { -1 } else { 1 };
        Duration::from_secs_f64(d.as_secs_f64() * (1.0 + ppm as f64 / 1e6))
    }
}

impl Clock for SimClock {
    fn now(&self) -> Timestamp {
        let elapsed = self.monotonic().as_millis() as i64;
        Timestamp((EPOCH_MS + elapsed + self.wrong().offset_ms).max(0) as u64)
    }

    fn monotonic(&self) -> Duration {
        self.stretched(self.start.elapsed(), false)
    }

    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(tokio::time::sleep(self.stretched(duration, true)))
    }
}

/// Randomness of one machine.
#[derive(Debug)]
pub struct SimEntropy(Mutex<Rng>);

impl SimEntropy {
    pub fn new(rng: Rng) -> Self {
        Self(Mutex::new(rng))
    }
}

impl Entropy for SimEntropy {
    fn fill(&self, bytes: &mut [u8]) {
        let mut rng = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.iter_mut().for_each(|b| *b = rng.u64() as u8);
    }
}
