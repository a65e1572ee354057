//! The search itself, over the operations of one key.
//!
//! Calls and ends stand in one list in order of time. Walking from its head, an operation whose call comes before the first
//! end may be the next one: it is taken out, the state moves on, and the walk begins again. An end that is reached belongs
//! to an operation that must have happened and has not: the last choice is taken back. A set of operations done and the
//! state they led to is tried once.

use std::collections::HashSet;

use super::{Op, Value};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Linearizable,
    Refused,
    Undecided,
}

/// The operations done, a bit each.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Done(Vec<u64>);

impl Done {
    fn flip(&mut self, op: usize) {
        self.0[op / 64] ^= 1 << (op % 64);
    }
}

/// Calls and ends in one doubly linked list, so that taking an operation out and putting it back costs nothing.
struct Events {
    /// Operation, and whether this is its call.
    what: Vec<(usize, bool)>,
    next: Vec<usize>,
    previous: Vec<usize>,
    /// Positions of call and end of an operation.
    call_at: Vec<usize>,
    end_at: Vec<Option<usize>>,
}

/// The head of the list, before every event.
const HEAD: usize = 0;
/// Beyond the last event.
const NONE: usize = usize::MAX;

impl Events {
    fn new(ops: &[Op]) -> Self {
        // At the same moment calls come first: such operations are concurrent.
        let mut order: Vec<(u64, bool, usize)> = Vec::with_capacity(ops.len() * 2);
        for (n, op) in ops.iter().enumerate() {
            order.push((op.call, false, n));
            order.extend(op.end.map(|end| (end, true, n)));
        }
        order.sort_unstable();
        let len = order.len() + 1;
        let (mut call_at, mut end_at) = (vec![NONE; ops.len()], vec![None; ops.len()]);
        let mut what = vec![(NONE, true)];
        for (at, (_, is_end, op)) in order.into_iter().enumerate() {
            match is_end {
                true => end_at[op] = Some(at + 1),
                false => call_at[op] = at + 1,
            }
            what.push((op, !is_end));
        }
        let next = (1..=len).map(|n| if n < len { n } else { NONE }).collect();
        let previous = (0..len).map(|n| n.wrapping_sub(1)).collect();
        Self { what, next, previous, call_at, end_at }
    }

    fn unlink(&mut self, at: usize) {
        let (before, after) = (self.previous[at], self.next[at]);
        self.next[before] = after;
        if after != NONE {
            self.previous[after] = before;
        }
    }

    fn relink(&mut self, at: usize) {
        let (before, after) = (self.previous[at], self.next[at]);
        self.next[before] = at;
        if after != NONE {
            self.previous[after] = at;
        }
    }

    fn take(&mut self, op: usize) {
        self.unlink(self.call_at[op]);
        if let Some(end) = self.end_at[op] {
            self.unlink(end);
        }
    }

    /// Undoes the latest `take`.
    fn put_back(&mut self, op: usize) {
        if let Some(end) = self.end_at[op] {
            self.relink(end);
        }
        self.relink(self.call_at[op]);
    }
}

/// Looks for an order of `ops` that explains every answer, in at most `max_steps` steps.
pub(super) fn search(ops: &[Op], max_steps: u64) -> Outcome {
    let mut events = Events::new(ops);
    let mut missing = ops.iter().filter(|op| op.end.is_some()).count();
    let mut done = Done(vec![0; ops.len().div_ceil(64)]);
    let mut state: Value = None;
    let mut visited: HashSet<(Done, Value)> = HashSet::new();
    let mut chosen: Vec<(usize, Value)> = Vec::new();
    let mut at = events.next[HEAD];
    let mut steps = 0;
    while missing > 0 {
        steps += 1;
        if steps > max_steps {
            return Outcome::Undecided;
        }
        // The end of the list is reached only past operations of unknown outcome; an operation with an end stops before.
        let (op, is_call) = events.what[at];
        if is_call {
            if let Some(after) = ops[op].step(state) {
                done.flip(op);
                if visited.insert((done.clone(), after)) {
                    chosen.push((op, state));
                    state = after;
                    missing -= usize::from(ops[op].end.is_some());
                    events.take(op);
                    at = events.next[HEAD];
                    continue;
                }
                done.flip(op);
            }
            at = events.next[at];
        } else {
            let Some((last, before)) = chosen.pop() else { return Outcome::Refused };
            events.put_back(last);
            done.flip(last);
            state = before;
            missing += usize::from(ops[last].end.is_some());
            at = events.next[events.call_at[last]];
        }
    }
    Outcome::Linearizable
}
