//! What an engine sends, in every way an agent can die while it takes it.
#![allow(clippy::unwrap_used)]

use std::io::Write;

use super::*;

const SIZE: Bytes = Bytes(64 << 10);

fn piece(stderr: bool, ns: u64, text: &str) -> LogOutput {
    let at = jiff::Timestamp::from_nanosecond(i128::from(ns)).unwrap();
    let message = format!("{at:.9} {text}").into_bytes().into();
    if stderr { LogOutput::StdErr { message } } else { LogOutput::StdOut { message } }
}

fn lines(dir: &Path) -> Vec<String> {
    let mut found = vec![];
    for (_, path) in segments::of_attempt_in(dir).unwrap() {
        found.extend(fs::read_to_string(path).unwrap().lines().map(str::to_owned));
    }
    found
}

fn take_all(store: &mut Store, pieces: &[LogOutput]) {
    store.resume();
    for piece in pieces {
        store.take(piece);
    }
    store.flush().unwrap();
}

#[test]
fn lines_keep_the_engines_time_and_stream() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path(), SIZE).unwrap();
    assert_eq!(store.resume(), 0);
    store.take(&piece(false, 1_700_000_000_123_456_789, "hello world\n"));
    store.take(&piece(true, 1_700_000_000_124_000_000, "\n"));
    store.flush().unwrap();
    assert_eq!(lines(dir.path()), ["1700000000123 O hello world", "1700000000124 E "]);
    assert_eq!(store.resume(), 1_699_999_990, "some seconds back, for the other stream");
}

#[test]
fn whatever_is_sent_again_is_taken_once() {
    // Several lines of one time in both streams, the streams not in order among themselves.
    let base = 1_700_000_000_000_000_000;
    let mut pieces = vec![];
    for n in 0..40u64 {
        pieces.push(piece(n % 3 == 0, base + n / 4 * 10 + u64::from(n % 3 == 0), &format!("line {n}\n")));
    }
    let wanted: Vec<String> = (0..40u64).map(|n| format!("{} {} line {n}", base / 1_000_000, if n % 3 == 0 { 'E' } else { 'O' })).collect();
    for first in 0..40 {
        for second in [first, (first + 40) / 2, 40] {
            let dir = tempfile::tempdir().unwrap();
            take_all(&mut Store::open(dir.path(), SIZE).unwrap(), &pieces[..first]);
            // Died after lines were written and before the place was noted: they are cut off and come again.
            let path = dir.path().join("log.0");
            let mut torn = OpenOptions::new().append(true).open(&path).unwrap();
            torn.write_all(b"1700000000000 O li").unwrap();
            fs::write(dir.path().join("log.1"), "1700000000000 O line 99\n").unwrap();
            take_all(&mut Store::open(dir.path(), SIZE).unwrap(), &pieces[..second]);
            let mut store = Store::open(dir.path(), SIZE).unwrap();
            take_all(&mut store, &pieces);
            take_all(&mut store, &pieces);
            assert_eq!(lines(dir.path()), wanted, "{first} {second}");
        }
    }
}

#[test]
fn a_long_line_becomes_several_and_its_bare_end_none() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path(), Bytes::mib(8)).unwrap();
    let long = "x".repeat(16 << 10);
    let at = 1_700_000_000_000_000_000;
    take_all(&mut store, &[piece(false, at, &long), piece(false, at, "\n"), piece(false, at + 1, "next\n"), piece(false, at + 2, "\n")]);
    let lengths: Vec<usize> = lines(dir.path()).iter().map(|l| l.len() - "1700000000000 O ".len()).collect();
    assert_eq!(lengths, [PIECE_MAX, 64, 4, 0]);
}

#[test]
fn segments_stay_within_the_budget_and_go_oldest_first() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::open(dir.path(), SIZE).unwrap();
    store.resume();
    for n in 0..5000u64 {
        store.take(&piece(false, 1_700_000_000_000_000_000 + n, &format!("line {n}\n")));
        if n % 50 == 0 {
            store.flush().unwrap();
        }
    }
    store.flush().unwrap();
    let held = segments::of_attempt_in(dir.path()).unwrap();
    assert_eq!(held.len() as u64, SEGMENTS);
    let bytes: u64 = held.iter().map(|(_, path)| fs::metadata(path).unwrap().len()).sum();
    assert!(bytes <= SIZE.0 / 2, "{bytes}");
    assert!(lines(dir.path()).last().unwrap().ends_with("line 4999"));
}

#[test]
fn a_place_that_cannot_be_read_means_from_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let pieces = [piece(false, 1_700_000_000_000_000_000, "one\n"), piece(false, 1_700_000_000_000_000_001, "two\n")];
    take_all(&mut Store::open(dir.path(), SIZE).unwrap(), &pieces);
    fs::write(dir.path().join(POSITION_FILE), "{").unwrap();
    take_all(&mut Store::open(dir.path(), SIZE).unwrap(), &pieces);
    assert_eq!(lines(dir.path()).len(), 2);
}
