//! The outside world as traits: clock, randomness and spawning.
//!
//! Production code takes these instead of calling the operating system, so that a simulator can run
//! the same code under a virtual clock and a seed. The real side is in `optimus-host`. Disk and
//! network have modules of their own.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use crate::time::Timestamp;

/// Wall clock and monotonic clock of one node.
pub trait Clock: Send + Sync + 'static {
    /// Wall-clock time. May jump; never use it to measure how long something took.
    fn now(&self) -> Timestamp;
    /// Time since an arbitrary start; never goes back, counts suspend.
    fn monotonic(&self) -> Duration;
    /// Resolves after `duration` of monotonic time.
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// Source of randomness: ids, secrets, jitter.
pub trait Entropy: Send + Sync + 'static {
    /// Fills `bytes` from a cryptographically secure source (a seeded one under simulation).
    fn fill(&self, bytes: &mut [u8]);
}

/// Starts background tasks of one node.
pub trait Spawn: Send + Sync + 'static {
    /// Runs `task` in the background under `name` (for logs). The owner keeps a way to stop and join it.
    fn spawn(&self, name: &'static str, task: Pin<Box<dyn Future<Output = ()> + Send>>);
}

/// Everything a component needs from the outside, handed over once at start.
#[derive(Clone)]
pub struct Env {
    pub clock: Arc<dyn Clock>,
    pub entropy: Arc<dyn Entropy>,
    pub spawn: Arc<dyn Spawn>,
}

impl Env {
    /// A new id: UUID version 7 of this clock and this source of randomness.
    pub fn new_id(&self) -> uuid::Uuid {
        let mut random = [0u8; 10];
        self.entropy.fill(&mut random);
        uuid::Builder::from_unix_timestamp_millis(self.clock.now().0, &random).into_uuid()
    }

    /// A number in `0.0..1.0`, for jitter.
    pub fn fraction(&self) -> f64 {
        let mut bytes = [0u8; 8];
        self.entropy.fill(&mut bytes);
        (u64::from_le_bytes(bytes) >> 11) as f64 / (1u64 << 53) as f64
    }
}
