//! Token buckets per address, in a table of bounded size.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

/// Wrong credentials an address may send at once.
pub const FAILURES_BURST: f64 = 60.0;
/// Wrong credentials an address may send in the long run.
pub const FAILURES_PER_SECOND: f64 = 1.0;
/// Addresses remembered. When full, those whose bucket is full again go; if there are none, the one
/// unused for longest, which at worst gives an attacker with thousands of addresses their burst again.
pub const THROTTLED_ADDRESSES_MAX: usize = 4096;

#[derive(Debug, Clone, Copy)]
struct Bucket {
    left: f64,
    updated: Duration,
}

impl Bucket {
    fn refilled(self, now: Duration) -> f64 {
        let passed = now.saturating_sub(self.updated).as_secs_f64();
        (self.left + passed * FAILURES_PER_SECOND).min(FAILURES_BURST)
    }
}

/// Time comes in as an argument: monotonic, since any start.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    buckets: BTreeMap<IpAddr, Bucket>,
}

impl Throttle {
    pub fn new() -> Self {
        Throttle::default()
    }

    /// Takes one; `Err` with the pause until there is one again.
    pub fn take(&mut self, address: IpAddr, now: Duration) -> Result<(), Duration> {
        let address = network(address);
        if !self.buckets.contains_key(&address) && self.buckets.len() >= THROTTLED_ADDRESSES_MAX {
            self.make_room(now);
        }
        let bucket = self.buckets.entry(address).or_insert(Bucket { left: FAILURES_BURST, updated: now });
        bucket.left = bucket.refilled(now);
        bucket.updated = bucket.updated.max(now);
        if bucket.left < 1.0 {
            return Err(Duration::from_secs_f64((1.0 - bucket.left) / FAILURES_PER_SECOND));
        }
        bucket.left -= 1.0;
        Ok(())
    }

    fn make_room(&mut self, now: Duration) {
        self.buckets.retain(|_, bucket| bucket.refilled(now) < FAILURES_BURST);
        if self.buckets.len() >= THROTTLED_ADDRESSES_MAX
            && let Some(oldest) = self.buckets.iter().min_by_key(|(_, bucket)| bucket.updated).map(|(address, _)| *address)
        {
            self.buckets.remove(&oldest);
        }
    }
}

/// The /64 of an IPv6 address, since whoever has one address has the whole of it.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1000);

    #[test]
    fn a_bucket_empties_and_refills() {
        let mut throttle = Throttle::new();
        let address = IpAddr::from([192, 0, 2, 1]);
        let taken = (0..1000).take_while(|_| throttle.take(address, NOW).is_ok()).count();
        assert_eq!(taken, FAILURES_BURST as usize);
        assert!(throttle.take(address, NOW + Duration::from_secs(2)).is_ok());
        assert!(throttle.take(address, NOW).is_err() || throttle.take(address, NOW).is_err(), "time that goes back refills nothing");
    }

    #[test]
    fn one_ipv6_network_is_one_address() {
        let mut throttle = Throttle::new();
        for n in 0..FAILURES_BURST as u16 {
            assert!(throttle.take(IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, n]), NOW).is_ok());
        }
        assert!(throttle.take(IpAddr::from([0x2001, 0xdb8, 0, 0, 9, 9, 9, 9]), NOW).is_err());
        assert!(throttle.take(IpAddr::from([0x2001, 0xdb8, 0, 1, 0, 0, 0, 0]), NOW).is_ok());
    }

    #[test]
    fn the_table_stays_bounded() {
        let mut throttle = Throttle::new();
        for n in 0..3 * THROTTLED_ADDRESSES_MAX as u32 {
            let _ = throttle.take(IpAddr::from(n.to_be_bytes()), NOW);
        }
        assert!(throttle.buckets.len() <= THROTTLED_ADDRESSES_MAX);
    }
}
