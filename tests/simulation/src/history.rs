//! What clients asked and were told, and whether one order of it all explains it.
//!
//! A Wing-Gong-Lowe search per key with a cache of the states seen. A key is a register; a write whose outcome nobody
//! knows may have taken effect at any time after it was asked, or never.

use std::collections::{BTreeMap, BTreeSet};

/// One operation of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Op {
    /// The register.
    pub key: String,
    /// Whether it writes `value`; else it read `value`. 0 is what a register holds before its first write.
    pub write: bool,
    pub value: u64,
    /// When it was asked.
    pub called: u64,
    /// When it was answered; unset: nobody knows whether it took effect.
    pub returned: Option<u64>,
}

/// A key whose history no order explains.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("no order explains the {ops} operations on {key}; the first {explained} of them can be, the next is {next:?}")]
pub struct Violation {
    pub key: String,
    pub ops: usize,
    /// Most operations that any order got to.
    pub explained: usize,
    pub next: Option<Op>,
}

/// Checks every key by itself.
///
/// # Errors
/// The first key that is not linearizable.
pub fn check(history: &[Op]) -> Result<(), Violation> {
    let mut keys: BTreeMap<&str, Vec<&Op>> = BTreeMap::new();
    for op in history {
        keys.entry(&op.key).or_default().push(op);
    }
    for (key, mut ops) in keys {
        // An unknown write whose value nobody read explains nothing and hides nothing.
        let read: BTreeSet<u64> = ops.iter().filter(|o| !o.write).map(|o| o.value).collect();
        ops.retain(|o| if o.write { o.returned.is_some() || read.contains(&o.value) } else { o.returned.is_some() });
        ops.sort_by_key(|o| o.called);
        Search::new(&ops).run().map_err(|explained| Violation {
            key: key.to_owned(),
            ops: ops.len(),
            explained,
            next: ops.get(explained).map(|o| (*o).clone()),
        })?;
    }
    Ok(())
}

struct Search<'a> {
    ops: &'a [&'a Op],
    done: Vec<u64>,
    value: u64,
    seen: BTreeSet<(Vec<u64>, u64)>,
    /// Operations put in order, to take them back.
    order: Vec<(usize, u64)>,
    furthest: usize,
}

impl<'a> Search<'a> {
    fn new(ops: &'a [&'a Op]) -> Self {
        Self { ops, done: vec![0; ops.len() / 64 + 1], value: 0, seen: BTreeSet::new(), order: Vec::new(), furthest: 0 }
    }

    fn is_done(&self, at: usize) -> bool {
        self.done[at / 64] >> (at % 64) & 1 == 1
    }

    fn put(&mut self, at: usize) {
        self.order.push((at, self.value));
        self.done[at / 64] |= 1 << (at % 64);
        if self.ops[at].write {
            self.value = self.ops[at].value;
        }
    }

    fn take_back(&mut self) -> Option<usize> {
        let (at, value) = self.order.pop()?;
        self.done[at / 64] &= !(1 << (at % 64));
        self.value = value;
        Some(at)
    }

    /// Those that may come next: asked before any other one left was answered.
    fn candidates(&self) -> Vec<usize> {
        let left = || (0..self.ops.len()).filter(|at| !self.is_done(*at));
        let first_return = left().filter_map(|at| self.ops[at].returned).min().unwrap_or(u64::MAX);
        left().take_while(|at| self.ops[*at].called <= first_return).collect()
    }

    fn complete(&self) -> bool {
        (0..self.ops.len()).all(|at| self.is_done(at) || self.ops[at].returned.is_none())
    }

    /// `Err`: the most operations any order explained.
    fn run(mut self) -> Result<(), usize> {
        // Each level: the candidates not tried yet, and how many operations were put when it began.
        let mut levels: Vec<(Vec<usize>, usize)> = vec![(self.candidates(), 0)];
        loop {
            self.furthest = self.furthest.max(self.order.len());
            if self.complete() {
                return Ok(());
            }
            let Some((open, base)) = levels.last_mut() else { return Err(self.furthest) };
            let base = *base;
            // A read of the present value changes nothing, so putting it first is never wrong, and no other choice is needed.
            let fits = open.iter().position(|at| !self.ops[*at].write && self.ops[*at].value == self.value);
            let next = match fits {
                Some(found) => {
                    let at = open[found];
                    open.clear();
                    Some(at)
                }
                None => open.iter().position(|at| self.ops[*at].write).map(|found| open.remove(found)),
            };
            match next {
                Some(at) => {
                    self.put(at);
                    if self.seen.insert((self.done.clone(), self.value)) {
                        let candidates = self.candidates();
                        levels.push((candidates, self.order.len()));
                    } else {
                        self.take_back();
                    }
                }
                None => {
                    levels.pop();
                    while self.order.len() >= base && self.order.len() > levels.last().map_or(0, |l| l.1) {
                        self.take_back();
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(write: bool, value: u64, called: u64, returned: u64) -> Op {
        Op { key: "k".into(), write, value, called, returned: (returned > 0).then_some(returned) }
    }

    #[test]
    fn good_histories_pass() {
        for history in [
            vec![op(true, 1, 1, 2), op(false, 1, 3, 4)],
            vec![op(false, 0, 1, 2), op(true, 1, 3, 9), op(false, 0, 4, 5), op(false, 1, 6, 7)],
            // An unknown write may take effect late.
            vec![op(true, 1, 1, 2), op(true, 2, 3, 0), op(false, 1, 4, 5), op(false, 2, 6, 7)],
            vec![op(true, 1, 1, 10), op(true, 2, 1, 10), op(false, 2, 2, 3), op(false, 1, 4, 5)],
            vec![op(true, 1, 1, 0), op(false, 0, 4, 5)],
        ] {
            assert_eq!(check(&history), Ok(()), "{history:?}");
        }
    }

    #[test]
    fn bad_histories_are_found() {
        for history in [
            // A stale read.
            vec![op(true, 1, 1, 2), op(true, 2, 3, 4), op(false, 1, 5, 6)],
            // A lost write.
            vec![op(true, 1, 1, 2), op(false, 0, 3, 4)],
            // Two readers see two writes in different orders.
            vec![op(true, 1, 1, 20), op(true, 2, 1, 20), op(false, 1, 2, 3), op(false, 2, 4, 5), op(false, 1, 6, 7)],
            // A value out of thin air.
            vec![op(false, 7, 1, 2)],
            // Read before it was written.
            vec![op(false, 1, 1, 2), op(true, 1, 3, 4)],
            // An unknown write that took effect cannot be undone.
            vec![op(true, 1, 1, 2), op(true, 2, 3, 0), op(false, 2, 4, 5), op(false, 1, 6, 7)],
        ] {
            assert!(check(&history).is_err(), "{history:?}");
        }
    }

    #[test]
    fn keys_are_apart() {
        let mut other = op(false, 0, 5, 6);
        other.key = "other".into();
        assert_eq!(check(&[op(true, 1, 1, 2), other]), Ok(()));
    }

    /// Against trying every order, on all small random histories.
    #[test]
    fn agrees_with_trying_every_order() {
        let mut rng = crate::entropy::Rng::new(7, 7);
        let (mut good, mut bad) = (0, 0);
        for _ in 0..3000 {
            let ops: Vec<Op> = (0..5)
                .map(|_| {
                    let called = rng.range(1..12);
                    let returned = called + rng.range(1..6);
                    let write = rng.chance(50.0);
                    op(write, rng.range(if write { 1 } else { 0 }..3), called, if write && rng.chance(20.0) { 0 } else { returned })
                })
                .collect();
            let brute = explains(&ops, &mut vec![false; ops.len()], 0);
            assert_eq!(check(&ops).is_ok(), brute, "{ops:?}");
            if brute { good += 1 } else { bad += 1 }
        }
        assert!(good > 200 && bad > 200, "{good} good, {bad} bad");
    }

    fn explains(ops: &[Op], done: &mut Vec<bool>, value: u64) -> bool {
        if ops.iter().zip(done.iter()).all(|(o, d)| *d || o.returned.is_none()) {
            return true;
        }
        for at in 0..ops.len() {
            let o = &ops[at];
            let too_late = ops.iter().zip(done.iter()).any(|(p, d)| !d && p.returned.is_some_and(|r| r < o.called));
            if done[at] || too_late || (!o.write && o.value != value) {
                continue;
            }
            done[at] = true;
            if explains(ops, done, if o.write { o.value } else { value }) {
                done[at] = false;
                return true;
            }
            done[at] = false;
        }
        false
    }
}
