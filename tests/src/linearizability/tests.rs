//! Known good and known bad histories, and generated ones.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

fn op(client: u32, call: u64, end: impl Into<Option<u64>>, kind: Kind) -> Op {
    Op { client, key: "x".to_owned(), call, end: end.into(), kind }
}

fn write(client: u32, call: u64, end: impl Into<Option<u64>>, value: u64) -> Op {
    op(client, call, end, Kind::Write(value))
}

fn read(client: u32, call: u64, end: impl Into<Option<u64>>, value: impl Into<Value>) -> Op {
    op(client, call, end, Kind::Read(value.into()))
}

fn cas(client: u32, call: u64, end: impl Into<Option<u64>>, expected: u64, new: u64, done: bool) -> Op {
    op(client, call, end, Kind::CompareAndSet { expected: Some(expected), new, done })
}

#[track_caller]
fn good(history: &[Op]) {
    if let Err(violation) = check(history) {
        panic!("refused a good history: {violation}");
    }
}

/// The operations a violation names.
#[track_caller]
fn bad(history: &[Op]) -> Vec<Op> {
    match check(history) {
        Err(Violation::NotLinearizable { operations, .. }) => operations,
        other => panic!("a bad history gave {other:?}"),
    }
}

#[test]
fn nothing_and_one_after_the_other_are_good() {
    good(&[]);
    good(&[read(1, 0, 1, None), write(1, 2, 3, 1), read(2, 4, 5, 1), write(2, 6, 7, 2), read(1, 8, 9, 2)]);
}

#[test]
fn concurrent_operations_may_take_effect_in_any_order() {
    let writes = [write(1, 0, 10, 1), write(2, 0, 10, 2)];
    for last in [1, 2] {
        let mut history = writes.to_vec();
        history.push(read(3, 11, 12, last));
        good(&history);
    }
    // A read inside sees either state.
    good(&[write(1, 0, 1, 1), write(1, 2, 10, 2), read(2, 3, 4, 1), read(2, 5, 6, 2)]);
    // Touching at one moment is concurrent.
    good(&[write(1, 0, 5, 1), read(2, 5, 6, None)]);
}

#[test]
fn a_stale_read_is_bad_and_only_its_cause_is_told() {
    let mut history = vec![write(1, 0, 1, 1), write(1, 2, 3, 2), read(2, 4, 5, 1)];
    for n in 0..50 {
        history.push(write(3, 10 + n * 4, 11 + n * 4, 100 + n));
        history.push(read(4, 12 + n * 4, 13 + n * 4, 100 + n));
    }
    assert_eq!(bad(&history), [write(1, 0, 1, 1), write(1, 2, 3, 2), read(2, 4, 5, 1)]);
}

#[test]
fn a_lost_write_is_bad() {
    assert_eq!(bad(&[write(1, 0, 1, 1), read(2, 2, 3, None)]).len(), 2);
}

#[test]
fn a_split_brain_is_bad() {
    // Two leaders acknowledge, and each answers reads with its own.
    let history = [write(1, 0, 1, 1), write(2, 2, 3, 2), read(3, 4, 5, 1), read(4, 4, 5, 2), read(3, 6, 7, 1), read(4, 6, 7, 2)];
    let told = bad(&history);
    assert!(told.len() <= 3, "{told:?}");
}

#[test]
fn a_value_never_written_is_bad() {
    assert_eq!(bad(&[write(1, 0, 1, 1), read(2, 2, 3, 7), read(2, 4, 5, 1)]), [read(2, 2, 3, 7)]);
}

#[test]
fn a_value_read_before_it_was_written_is_bad() {
    assert_eq!(bad(&[read(2, 0, 1, 7), write(1, 2, 3, 7)]), [read(2, 0, 1, 7)]);
}

#[test]
fn reads_that_go_back_are_bad_even_while_the_write_is_under_way() {
    let history = [write(1, 0, 1, 1), write(1, 2, 100, 2), read(2, 10, 11, 2), read(3, 20, 21, 1)];
    assert_eq!(bad(&history).len(), 4);
    let unknown = [write(1, 0, 1, 1), write(1, 2, None, 2), read(2, 10, 11, 2), read(3, 20, 21, 1)];
    assert_eq!(bad(&unknown).len(), 4);
}

#[test]
fn an_unknown_outcome_may_show_late_or_never_but_not_undo_itself() {
    good(&[write(1, 0, 1, 1), write(1, 2, None, 2), read(2, 10, 11, 1), read(2, 20, 21, 1)]);
    good(&[write(1, 0, 1, 1), write(1, 2, None, 2), read(2, 10, 11, 1), read(2, 20, 21, 2)]);
    good(&[read(1, 0, None, 99), write(1, 1, 2, 1)]);
    let applied_twice = [write(1, 0, None, 2), read(2, 3, 4, 2), write(3, 5, 6, 3), read(2, 7, 8, 3), read(2, 9, 10, 2)];
    assert!(!bad(&applied_twice).is_empty());
}

#[test]
fn compare_and_set_is_exclusive_and_its_refusal_counts() {
    good(&[write(1, 0, 1, 1), cas(1, 2, 9, 1, 2, true), cas(2, 2, 9, 1, 3, false), read(1, 10, 11, 2)]);
    assert_eq!(bad(&[write(1, 0, 1, 1), cas(1, 2, 9, 1, 2, true), cas(2, 2, 9, 1, 3, true)]).len(), 3);
    assert_eq!(bad(&[write(1, 0, 1, 1), cas(1, 2, 3, 1, 2, false)]).len(), 2);
    // A refusal can be the only sign that a write of unknown outcome took effect.
    good(&[write(1, 0, 1, 1), write(2, 2, None, 5), cas(1, 3, 4, 1, 2, false)]);
    good(&[write(1, 0, 1, 1), cas(2, 2, None, 1, 5, true), cas(1, 3, 4, 1, 2, false)]);
}

#[test]
fn keys_are_judged_apart_and_the_bad_one_is_named() {
    let mut history = vec![write(1, 0, 1, 1), read(1, 2, 3, 1)];
    history.extend([write(1, 4, 5, 9), read(1, 6, 7, 1)].map(|op| Op { key: "y".to_owned(), ..op }));
    match check(&history) {
        Err(violation @ Violation::NotLinearizable { .. }) => {
            let text = violation.to_string();
            assert!(text.contains("on y") && !text.contains(" x:"), "{text}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_ends_before_it_starts_is_a_fault_of_the_recorder() {
    assert!(matches!(check(&[write(1, 5, 4, 1)]), Err(Violation::Malformed { .. })));
}

#[test]
fn time_outs_that_nobody_saw_cost_nothing() {
    let mut history = Vec::new();
    for n in 0..2_000u64 {
        history.push(write(n as u32, n * 10, None, 1_000_000 + n));
        history.push(write(1, n * 10 + 1, n * 10 + 2, n));
        history.push(read(2, n * 10 + 3, n * 10 + 4, n));
    }
    good(&history);
}

#[test]
fn a_search_that_is_given_up_is_not_a_pass() {
    // Forty writes of unknown outcome, all seen, and an impossible end: every subset is a configuration of its own.
    let mut history: Vec<Op> = (0..40).map(|n| write(n as u32, 0, None, n)).collect();
    for n in 0..40 {
        history.push(read(100 + n as u32, 1, 1_000, n));
        history.push(read(200 + n as u32, 1, 1_000, n));
    }
    history.push(read(300, 2_000, 2_001, 77));
    assert_eq!(search::search(&history, 10_000), search::Outcome::Undecided);
}

/// A step of a generated history: who, what, and how its times are spread around the moment it takes effect.
#[derive(Clone, Debug)]
struct Choice {
    client: u32,
    what: u8,
    before: u64,
    after: u64,
    lost: bool,
}

fn choice() -> impl Strategy<Value = Choice> {
    (0..6u32, 0..10u8, 0..40u64, 0..40u64, proptest::bool::weighted(0.05)).prop_map(|(client, what, before, after, lost)| Choice {
        client,
        what,
        before,
        after,
        lost,
    })
}

/// Applies the choices one after the other, `SPACING` apart, to a real register, and gives what clients would record.
fn generate(choices: &[Choice]) -> Vec<Op> {
    const SPACING: u64 = 10;
    let mut state: Value = None;
    let mut free = [0u64; 6];
    let mut history = Vec::new();
    for (n, choice) in choices.iter().enumerate() {
        let at = 100 + n as u64 * SPACING;
        let Choice { client, what, before, after, lost } = choice.clone();
        let value = n as u64;
        let call = at.saturating_sub(before).max(free[client as usize]);
        if call > at {
            continue; // This client still waits for its answer.
        }
        let kind = match what {
            0..=3 => Kind::Write(value),
            4..=7 => Kind::Read(state),
            8 => Kind::CompareAndSet { expected: state, new: value, done: true },
            _ => Kind::CompareAndSet { expected: Some(u64::MAX), new: value, done: false },
        };
        let end = (!lost).then_some(at + after);
        free[client as usize] = at + after + 1;
        if let Kind::Write(value) | Kind::CompareAndSet { new: value, done: true, .. } = kind {
            state = Some(value);
        }
        history.push(op(client, call, end, kind));
    }
    history
}

proptest! {
    #[test]
    fn property_histories_of_a_real_register_are_accepted(choices in proptest::collection::vec(choice(), 0..150)) {
        let history = generate(&choices);
        prop_assert_eq!(check(&history), Ok(()));
    }

    #[test]
    fn property_a_read_of_a_value_long_gone_is_refused(choices in proptest::collection::vec(choice(), 20..120), pick in any::<usize>()) {
        let mut history = generate(&choices);
        let last = history.iter().map(|op| op.end.unwrap_or(op.call)).max().unwrap_or(0);
        // Two acknowledged writes after everything, then a read of something older.
        let olds: Vec<u64> = history.iter().filter_map(Op::sets).collect();
        prop_assume!(!olds.is_empty());
        let old = olds[pick % olds.len()];
        // Whatever of it is still on its way gets here first: seen by nobody, it could not show any more.
        history.iter_mut().for_each(|op| op.end = op.end.or(Some(last.max(op.call))));
        history.extend([write(7, last + 1, last + 2, 5_000), read(8, last + 3, last + 4, old)]);
        let told = bad(&history);
        prop_assert!(told.iter().any(|op| op.client == 8) && check(&told).is_err(), "{told:?}");
    }

    #[test]
    fn property_what_is_told_is_bad_by_itself(choices in proptest::collection::vec(choice(), 20..80), pick in any::<usize>(), other in any::<usize>()) {
        // A read gets the answer of another one; often that is still fine, else it must be told in a few operations.
        let mut history = generate(&choices);
        let reads: Vec<usize> = (0..history.len()).filter(|n| matches!(history[*n].kind, Kind::Read(_))).collect();
        prop_assume!(reads.len() > 1);
        history[reads[pick % reads.len()]].kind = history[reads[other % reads.len()]].kind.clone();
        if let Err(violation) = check(&history) {
            let Violation::NotLinearizable { operations, .. } = violation else { panic!("{violation}") };
            prop_assert!(check(&operations).is_err());
            prop_assert!(operations.len() <= 12, "{} operations told", operations.len());
        }
    }

    #[test]
    fn property_the_search_agrees_with_trying_every_order(choices in proptest::collection::vec(choice(), 1..8), mutate in any::<usize>(), to in 0..8u64) {
        let mut history = generate(&choices);
        if !history.is_empty() {
            let n = mutate % history.len();
            if let Kind::Read(seen) = &mut history[n].kind {
                *seen = Some(to);
            }
        }
        prop_assert_eq!(check(&history).is_ok(), any_order(&history, &mut vec![false; history.len()], None));
    }
}

/// The definition, without any cleverness.
fn any_order(ops: &[Op], done: &mut Vec<bool>, state: Value) -> bool {
    if (0..ops.len()).all(|n| done[n] || ops[n].end.is_none()) {
        return true;
    }
    let first_end = (0..ops.len()).filter(|n| !done[*n]).filter_map(|n| ops[n].end).min().unwrap_or(u64::MAX);
    (0..ops.len()).any(|n| {
        if done[n] || ops[n].call > first_end {
            return false;
        }
        let after = match ops[n].end {
            None if matches!(ops[n].kind, Kind::Read(_)) => Some(state),
            _ => ops[n].step(state),
        };
        let Some(after) = after else { return false };
        done[n] = true;
        let found = any_order(ops, done, after);
        done[n] = false;
        found
    })
}
