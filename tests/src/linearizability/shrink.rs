//! Makes a violation readable: the shortest history that still cannot be explained, without the operations it can do without.

use super::search::{Outcome, search};
use super::{Op, Seen, relevant};

/// Steps of one attempt; one that is not decided within them leaves the operations in.
const STEPS: u64 = 200_000;
/// Attempts in all.
const ATTEMPTS: usize = 4_000;

fn refused(ops: &[Op]) -> bool {
    search(ops, STEPS) == Outcome::Refused
}

/// `ops` must not be linearizable, nor is what is returned. In order of calls.
pub(super) fn shrink(mut ops: Vec<Op>) -> Vec<Op> {
    ops.sort_by_key(|op| op.call);
    let mut ops = shortest_prefix(ops);
    let mut attempts = 0;
    let mut chunk = ops.len().div_ceil(2);
    while chunk > 0 {
        let mut from = 0;
        while from < ops.len() && attempts < ATTEMPTS {
            attempts += 1;
            let upto = (from + chunk).min(ops.len());
            match without(&ops, from, upto) {
                Some(fewer) => ops = fewer,
                None => from = upto,
            }
        }
        // A write can go once the reads of it are gone, so the last round is repeated while it helps.
        chunk = if chunk > 1 { chunk / 2 } else { 0 };
    }
    while attempts < ATTEMPTS {
        let fewer = (0..ops.len()).find_map(|n| {
            attempts += 1;
            without(&ops, n, n + 1)
        });
        match fewer {
            Some(fewer) => ops = fewer,
            None => break,
        }
    }
    ops
}

/// What was known at the earliest moment at which it could not be explained any more: later answers are unknown.
fn shortest_prefix(ops: Vec<Op>) -> Vec<Op> {
    let cut = |at: u64| -> Vec<Op> {
        let called = ops.iter().filter(|op| op.call <= at).cloned();
        relevant(called.map(|op| Op { end: op.end.filter(|end| *end <= at), ..op }).collect())
    };
    let mut ends: Vec<u64> = ops.iter().filter_map(|op| op.end).collect();
    ends.sort_unstable();
    let first = ends.partition_point(|at| !refused(&cut(*at)));
    match ends.get(first) {
        Some(at) => cut(*at),
        None => ops,
    }
}

/// The history without `from..upto`, if it is still refused. Only what nobody depends on may go: without a write that
/// somebody read, every history is refused, and that would prove nothing.
fn without(ops: &[Op], from: usize, upto: usize) -> Option<Vec<Op>> {
    let fewer: Vec<Op> = ops[..from].iter().chain(&ops[upto..]).cloned().collect();
    let seen = Seen::of(&fewer);
    let harmless = ops[from..upto].iter().all(|op| seen.unobserved(op));
    (harmless && refused(&fewer)).then_some(fewer)
}
