//! This host's clocks.

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use optimus_common::Timestamp;
use optimus_common::env::Clock;

/// Wall clock of the system; monotonic clock that counts suspend.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostClock;

impl Clock for HostClock {
    fn now(&self) -> Timestamp {
        // A clock before 1970 reads as 1970: certificates then fail as not yet valid, which names the cause.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }

    fn monotonic(&self) -> Duration {
        // CLOCK_BOOTTIME: a host that slept for an hour has been silent for an hour.
        let at = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        Duration::new(u64::try_from(at.tv_sec).unwrap_or(0), u32::try_from(at.tv_nsec).unwrap_or(0))
    }

    /// Stands still while the host sleeps (tokio's timer): whoever must know measures with [`Clock::monotonic`].
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(tokio::time::sleep(duration))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clocks_run_forward() {
        let clock = HostClock;
        let (first, then) = (clock.monotonic(), clock.monotonic());
        assert!(then >= first && first > Duration::ZERO);
        assert!(clock.now() > Timestamp(1_700_000_000_000));
    }
}
