//! Is there one order of all operations, in agreement with real time, in which every answer makes sense?
//!
//! The checker of Wing and Gong with Lowe's cache of visited configurations, one register per key: linearizability is
//! local, so keys are judged one by one. Clients record what they asked, when they asked and when the answer came; an
//! operation without an answer (a lost connection, a time-out) may have taken effect at any later time, or never.
//!
//! It never passes what it could not decide: a search beyond [`MAX_STEPS`] is an error of its own.

mod search;
mod shrink;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Most steps of one search. A history of some thousand operations by a dozen clients takes a few times its length; only a
/// key with many operations of unknown outcome, each of them seen by a read, comes near.
pub const MAX_STEPS: u64 = 5_000_000;

/// What a register holds; none before the first write.
pub type Value = Option<u64>;

/// What a client asked, and what it was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Set the register.
    Write(u64),
    /// The value that was answered. Ignored when the operation has no end.
    Read(Value),
    /// Set the register to `new` if it holds `expected`; `done` says whether it did (ignored without an end).
    CompareAndSet { expected: Value, new: u64, done: bool },
}

/// One operation of one client. Times are of one clock for all clients, in any unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Op {
    /// Who asked; one client asks one thing at a time.
    pub client: u32,
    /// The register.
    pub key: String,
    /// When it was asked.
    pub call: u64,
    /// When the answer came; none when the outcome is unknown.
    pub end: Option<u64>,
    /// What was asked.
    pub kind: Kind,
}

impl Op {
    /// The value this operation leaves behind if it takes effect.
    fn sets(&self) -> Option<u64> {
        match self.kind {
            Kind::Write(value) | Kind::CompareAndSet { new: value, .. } => Some(value),
            Kind::Read(_) => None,
        }
    }

    fn failed_cas(&self) -> bool {
        self.end.is_some() && matches!(self.kind, Kind::CompareAndSet { done: false, .. })
    }

    /// The state after this operation in `state`, or none when its answer does not fit that state.
    fn step(&self, state: Value) -> Option<Value> {
        match self.kind {
            Kind::Write(value) => Some(Some(value)),
            Kind::Read(seen) => (seen == state).then_some(state),
            Kind::CompareAndSet { expected, new, done } => match (expected == state, self.end.is_none() || done) {
                (true, true) => Some(Some(new)),
                (false, false) => Some(state),
                // Of unknown outcome: where it does not fit, it is as if it had never arrived.
                (true, false) | (false, true) => None,
            },
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let show = |v: Value| v.map_or("nothing".to_owned(), |v| v.to_string());
        match self.end {
            Some(end) => write!(f, "[{:>10} .. {:>10}] client {} {}: ", self.call, end, self.client, self.key)?,
            None => write!(f, "[{:>10} .. {:>10}] client {} {}: ", self.call, "?", self.client, self.key)?,
        }
        match self.kind {
            Kind::Write(value) => write!(f, "write {value}"),
            Kind::Read(seen) => write!(f, "read {}", show(seen)),
            Kind::CompareAndSet { expected, new, done } => {
                write!(f, "{} -> {new} {}", show(expected), if done { "done" } else { "refused" })
            }
        }
    }
}

/// Why a history is not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// No order explains these operations: they are all it takes, in order of their calls.
    NotLinearizable { key: String, operations: Vec<Op> },
    /// The search was given up; nothing is proven.
    Undecided { key: String, operations: usize, steps: u64 },
    /// An operation that ends before it starts: the recorder is at fault.
    Malformed { operation: Op },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::NotLinearizable { key, operations } => {
                writeln!(f, "no order explains these {} operations on {key}:", operations.len())?;
                operations.iter().try_for_each(|op| writeln!(f, "  {op}"))
            }
            Violation::Undecided { key, operations, steps } => {
                write!(f, "{operations} operations on {key} not decided within {steps} steps")
            }
            Violation::Malformed { operation } => write!(f, "ends before it starts: {operation}"),
        }
    }
}

impl std::error::Error for Violation {}

/// Judges a history. Registers hold nothing before their first write.
///
/// # Errors
/// The first [`Violation`], by key; of a violation only the operations that it takes.
pub fn check(history: &[Op]) -> Result<(), Violation> {
    if let Some(operation) = history.iter().find(|op| op.end.is_some_and(|end| end < op.call)) {
        return Err(Violation::Malformed { operation: operation.clone() });
    }
    let mut keys: BTreeMap<&str, Vec<Op>> = BTreeMap::new();
    for op in history {
        keys.entry(&op.key).or_default().push(op.clone());
    }
    for (key, ops) in keys {
        let ops = relevant(ops);
        match search::search(&ops, MAX_STEPS) {
            search::Outcome::Linearizable => {}
            search::Outcome::Undecided => {
                return Err(Violation::Undecided { key: key.to_owned(), operations: ops.len(), steps: MAX_STEPS });
            }
            search::Outcome::Refused => {
                return Err(Violation::NotLinearizable { key: key.to_owned(), operations: shrink::shrink(ops) });
            }
        }
    }
    Ok(())
}

/// Leaves out what constrains nothing: reads without an answer, and changes of unknown outcome that nobody can have seen.
/// Without the latter every time-out would double the search.
fn relevant(mut ops: Vec<Op>) -> Vec<Op> {
    ops.retain(|op| op.end.is_some() || op.sets().is_some());
    loop {
        let seen = Seen::of(&ops);
        let before = ops.len();
        ops.retain(|op| op.end.is_some() || !seen.unobserved(op));
        if ops.len() == before {
            return ops;
        }
    }
}

/// Which values anybody depends on.
struct Seen {
    values: BTreeSet<u64>,
    /// Somebody was told that the register did *not* hold a value; any change may be the reason.
    refusals: bool,
}

impl Seen {
    fn of(ops: &[Op]) -> Self {
        let values = ops.iter().filter_map(|op| match op.kind {
            Kind::Read(seen) => seen,
            Kind::CompareAndSet { expected, .. } => expected,
            Kind::Write(_) => None,
        });
        Self { values: values.collect(), refusals: ops.iter().any(Op::failed_cas) }
    }

    /// Whether no answer depends on `op` having taken effect: a history that can be explained with it can be without.
    fn unobserved(&self, op: &Op) -> bool {
        match op.sets() {
            None => true,
            Some(_) if op.failed_cas() => true,
            Some(value) => !self.refusals && !self.values.contains(&value),
        }
    }
}

#[cfg(test)]
mod tests;
