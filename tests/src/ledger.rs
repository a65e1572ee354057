//! A replicated machine that notices when anything was lost, doubled, reordered or torn; for tests that kill its host.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use optimus_control_plane::raft::{Capture, Machine};
use serde::{Deserialize, Serialize};

/// Most faults that are kept; one is enough to fail.
const FAULTS_MAX: usize = 10;

/// A client's next write.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Write {
    pub client: u64,
    /// 1, 2, 3, ... of this client.
    pub sequence: u64,
    /// What [`filling`] gives for the two above.
    pub filling: Vec<u8>,
}

impl Write {
    pub fn new(client: u64, sequence: u64) -> Self {
        Self { client, sequence, filling: filling(client, sequence) }
    }
}

/// Clients from here on write [`LARGE`] each time.
pub const LARGE_FROM: u64 = 100;
/// Bytes of a large write.
const LARGE: u64 = 96 << 10;

/// Bytes that only this write has: up to 2 KiB, or [`LARGE`].
fn filling(client: u64, sequence: u64) -> Vec<u8> {
    let mut seed = client.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ sequence.wrapping_mul(0xd6e8_feb8_6659_fd93);
    let length = if (LARGE_FROM..LARGE_FROM * 2).contains(&client) { LARGE } else { (seed >> 7) % 2048 };
    let byte = |_| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 56) as u8
    };
    (0..length).map(byte).collect()
}

/// A write that took effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Done {
    /// Index of the log entry.
    pub index: u64,
    pub client: u64,
    pub sequence: u64,
}

/// The state: every write there was, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    pub history: Vec<Done>,
    pub last: BTreeMap<u64, u64>,
    /// What cannot happen and did.
    pub faults: Vec<String>,
}

impl Ledger {
    /// What is wrong with a recovered ledger, given the acknowledgements clients had before: nothing, if all is well.
    pub fn faults_against(&self, acknowledged: &[Done]) -> Vec<String> {
        let mut faults = self.faults.clone();
        if let Some(pair) = self.history.windows(2).find(|pair| pair[0].index > pair[1].index) {
            faults.push(format!("the order is wrong: {:?} before {:?}", pair[0], pair[1]));
        }
        let mut held: BTreeMap<(u64, u64), u64> = BTreeMap::new();
        for done in &self.history {
            if held.insert((done.client, done.sequence), done.index).is_some() {
                faults.push(format!("{done:?} is there twice"));
            }
        }
        let lost: Vec<&Done> = acknowledged.iter().filter(|done| held.get(&(done.client, done.sequence)) != Some(&done.index)).collect();
        if let Some(first) = lost.first() {
            faults.push(format!("{} of {} acknowledged writes are lost, the first is {first:?}", lost.len(), acknowledged.len()));
        }
        faults
    }
}

/// [`Ledger`] as a replicated machine. Clones share one ledger: one goes into the node, another looks.
#[derive(Clone, Default)]
pub struct LedgerMachine(Arc<Mutex<Ledger>>);

impl LedgerMachine {
    fn state(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is applied now.
    pub fn ledger(&self) -> Ledger {
        self.state().clone()
    }
}

impl Machine for LedgerMachine {
    type Command = Write;
    type Answer = ();

    fn apply(&mut self, index: u64, write: Write) {
        let Write { client, sequence, filling: has } = write;
        let mut state = self.state();
        let last = state.last.insert(client, sequence).unwrap_or(0);
        if sequence != last + 1 && state.faults.len() < FAULTS_MAX {
            state.faults.push(format!("entry {index}: write {sequence} of client {client} after {last}"));
        }
        if has != filling(client, sequence) && state.faults.len() < FAULTS_MAX {
            state.faults.push(format!("entry {index}: write {sequence} of client {client} has another content"));
        }
        state.history.push(Done { index, client, sequence });
    }

    fn snapshot(&self) -> Capture {
        let state = self.ledger();
        Box::new(move || serde_json::to_vec(&state).unwrap_or_default())
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), String> {
        *self.state() = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        Ok(())
    }

    fn published(&mut self, _: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done(index: u64, client: u64, sequence: u64) -> Done {
        Done { index, client, sequence }
    }

    fn applied(writes: &[(u64, Write)]) -> Ledger {
        let mut machine = LedgerMachine::default();
        writes.iter().for_each(|(index, write)| machine.apply(*index, write.clone()));
        machine.ledger()
    }

    #[test]
    fn whole_histories_are_fine_also_with_more_than_was_acknowledged() {
        let ledger = applied(&[(3, Write::new(1, 1)), (3, Write::new(2, 1)), (4, Write::new(1, 2))]);
        assert_eq!(ledger.faults_against(&[done(3, 1, 1), done(3, 2, 1)]), Vec::<String>::new());
    }

    #[test]
    fn lost_doubled_reordered_torn_and_moved_writes_are_named() {
        let lost = applied(&[(3, Write::new(1, 1))]).faults_against(&[done(3, 1, 1), done(4, 1, 2)]);
        assert!(lost[0].contains("1 of 2 acknowledged writes are lost"), "{lost:?}");
        let moved = applied(&[(3, Write::new(1, 1))]).faults_against(&[done(9, 1, 1)]);
        assert!(moved[0].contains("lost"), "{moved:?}");
        for bad in [
            vec![(3, Write::new(1, 1)), (4, Write::new(1, 1))],
            vec![(3, Write::new(1, 2))],
            vec![(4, Write::new(1, 1)), (3, Write::new(1, 2))],
            vec![(3, Write { filling: vec![0; 5000], ..Write::new(1, 1) })],
        ] {
            assert!(!applied(&bad).faults_against(&[]).is_empty(), "{bad:?}");
        }
    }
}
