//! A real clock, real randomness and the runtime's spawn, for tests of this crate.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use optimus_common::env::{Clock, Entropy, Env, Spawn};
use optimus_common::time::Timestamp;

struct Real(Instant);

impl Clock for Real {
    fn now(&self) -> Timestamp {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }
    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(tokio::time::sleep(duration))
    }
}

impl Entropy for Real {
    fn fill(&self, bytes: &mut [u8]) {
        rand::fill(bytes);
    }
}

impl Spawn for Real {
    fn spawn(&self, _name: &'static str, task: Pin<Box<dyn Future<Output = ()> + Send>>) {
        tokio::spawn(task);
    }
}

/// An environment of the real host.
pub fn test_env() -> Env {
    let real = Arc::new(Real(Instant::now()));
    Env { clock: Arc::clone(&real) as _, entropy: Arc::clone(&real) as _, spawn: real }
}
