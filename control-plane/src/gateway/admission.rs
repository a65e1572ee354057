//! Limits on peers that have not shown who they are.
//!
//! A place is held from the first packet until the peer has proved itself (or gone). Nothing an
//! unproven peer sends changes anything else.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// Unproven peers at once, in all and from one address (many agents may share one behind a NAT).
pub const PLACES: usize = 256;
pub const PLACES_PER_ADDRESS: usize = 64;
/// With this many places taken, peers must prove their address first (one more round trip).
const BUSY: usize = 32;

/// Failed joins from one address within [`FAILURE_WINDOW`] before it must wait.
pub const FAILURES_MAX: u32 = 10;
pub const FAILURE_WINDOW: Duration = Duration::from_secs(60);
/// Addresses remembered for failed joins; the oldest gives way.
const FAILURE_ADDRESSES: usize = 4096;

#[derive(Default)]
struct Inner {
    taken: usize,
    by_address: BTreeMap<IpAddr, usize>,
    /// Start of the window and failures in it.
    failures: BTreeMap<IpAddr, (Duration, u32)>,
}

/// Counts places and failures.
#[derive(Default)]
pub struct Admission(Mutex<Inner>);

/// One unproven peer; given back when dropped.
pub struct Place {
    admission: Arc<Admission>,
    address: IpAddr,
}

impl Admission {
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(|e| e.into_inner()) // counts stay right: no code panics in between
    }

    pub fn busy(&self) -> bool {
        self.inner().taken >= BUSY
    }

    /// A place for a peer, or `None` when all are taken.
    pub fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let mut inner = self.inner();
        if inner.taken >= PLACES {
            return None;
        }
        let from_here = inner.by_address.entry(address).or_default();
        if *from_here >= PLACES_PER_ADDRESS {
            return None;
        }
        *from_here += 1;
        inner.taken += 1;
        Some(Place { admission: self.clone(), address })
    }

    /// How long `address` must wait before its next try to join; `None`: it may try.
    pub fn must_wait(&self, address: IpAddr, now: Duration) -> Option<Duration> {
        let inner = self.inner();
        let &(since, count) = inner.failures.get(&address)?;
        let end = since + FAILURE_WINDOW;
        (count >= FAILURES_MAX && now < end).then(|| end - now)
    }

    /// Notes a failed join.
    pub fn failed(&self, address: IpAddr, now: Duration) {
        let mut inner = self.inner();
        if !inner.failures.contains_key(&address) && inner.failures.len() >= FAILURE_ADDRESSES {
            let oldest = inner.failures.iter().min_by_key(|(_, (since, _))| *since).map(|(a, _)| *a);
            if let Some(oldest) = oldest {
                inner.failures.remove(&oldest);
            }
        }
        let entry = inner.failures.entry(address).or_insert((now, 0));
        if now.saturating_sub(entry.0) >= FAILURE_WINDOW {
            *entry = (now, 0);
        }
        entry.1 += 1;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inner = self.admission.inner();
        inner.taken -= 1;
        if let Some(count) = inner.by_address.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                inner.by_address.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn address(n: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, n])
    }

    #[test]
    fn places_are_bounded_and_given_back() {
        let admission = Admission::new();
        let held: Vec<Place> = (0..PLACES_PER_ADDRESS).map(|_| admission.enter(address(1)).unwrap()).collect();
        assert!(admission.enter(address(1)).is_none(), "one address cannot take more");
        assert!(admission.busy());
        let rest: Vec<Place> = (2..=4).flat_map(|n| [n; PLACES_PER_ADDRESS]).filter_map(|n| admission.enter(address(n))).collect();
        assert_eq!(held.len() + rest.len(), PLACES);
        assert!(admission.enter(address(9)).is_none(), "all are taken");
        drop((held, rest));
        assert!(!admission.busy());
        assert!(admission.enter(address(1)).is_some());
    }

    #[test]
    fn an_address_that_fails_too_often_waits() {
        let admission = Admission::new();
        let start = Duration::from_secs(100);
        for _ in 0..FAILURES_MAX {
            assert_eq!(admission.must_wait(address(1), start), None);
            admission.failed(address(1), start);
        }
        assert_eq!(admission.must_wait(address(1), start), Some(FAILURE_WINDOW));
        assert_eq!(admission.must_wait(address(2), start), None);
        assert_eq!(admission.must_wait(address(1), start + FAILURE_WINDOW), None);
        for n in 0..FAILURE_ADDRESSES + 10 {
            admission.failed(IpAddr::from(u32::try_from(n).unwrap().to_be_bytes()), start);
        }
        assert!(admission.inner().failures.len() <= FAILURE_ADDRESSES);
    }
}
