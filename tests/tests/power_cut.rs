//! The power goes while a server writes; no acknowledged write may be lost, and the store must open.
//!
//! A consensus node writes on a file system of its own, on a loop image. At a seeded moment it freezes: after so many
//! acknowledgements, or exactly at a failpoint of a flush, a vote, a snapshot or a purge. What the disk holds then is
//! copied, mounted (the journal is replayed) and opened. `OPTIMUS_POWER_CUTS=100` sets how many, `OPTIMUS_POWER_SEED` repeats.
//! It needs root and loop devices.

use std::path::Path;
use std::time::Duration;

use optimus_tests::dice::{Dice, number_from_env, seed_from_env};
use optimus_tests::ledger_process::{Writer, read};
use optimus_tests::loop_image::{LoopImage, sweep};

/// Cuts without further word.
const CUTS: u64 = 10;

/// When to cut.
#[derive(Debug)]
enum When {
    /// After that many acknowledgements, and a moment.
    Acknowledged(usize, Duration),
    /// At that pass of a failpoint.
    Point(&'static str, u64),
}

/// Every sixth cut hits any moment; the others hit one kind of work each.
fn plan(n: u64, dice: &mut Dice) -> When {
    match n % 6 {
        0 => When::Acknowledged(1 + dice.below(2500) as usize, Duration::from_micros(dice.below(5000))),
        1 => When::Point(dice.pick(&["log.before_sync", "log.after_sync"]), 20 + dice.below(500)),
        2 => When::Point(dice.pick(&["vote.before_sync", "vote.after_sync"]), 2 + dice.below(4)),
        3 => {
            let points = ["snapshot.before_sync", "snapshot.before_rename", "snapshot.after_rename", "snapshot.durable"];
            When::Point(dice.pick(&points), 1 + dice.below(10))
        }
        4 => When::Point(dice.pick(&["compact.before_rename", "compact.after_rename", "compact.durable"]), 1),
        _ => When::Point(dice.pick(&["purge.before_sync", "purge.after_sync"]), 1 + dice.below(15)),
    }
}

/// One cut: gives how many writes were acknowledged, and what came back or why nothing did.
fn cut(seed: u64, when: &When, syncs: Option<u64>) -> (usize, Result<usize, Vec<String>>) {
    let program = Path::new(env!("CARGO_BIN_EXE_optimus-test-ledger"));
    let image = LoopImage::new().expect("a loop image");
    let failpoints = match when {
        When::Acknowledged(..) => String::new(),
        When::Point(point, pass) => format!("{point}=stop@{pass}"),
    };
    let mut writer = Writer::start(program, &image.path().join("raft"), seed, syncs, &failpoints);
    match when {
        When::Acknowledged(n, moment) => {
            writer.wait_acknowledged(*n);
            std::thread::sleep(*moment);
            writer.stop();
        }
        When::Point(..) => writer.wait_stopped(),
    }
    let after = image.cut().expect("a copy of the disk");
    let acknowledged = writer.kill();
    let verdict = match read(program, &after.path().join("raft")) {
        Err(reason) => Err(vec![reason]),
        Ok(ledger) => match ledger.faults_against(&acknowledged) {
            faults if faults.is_empty() => Ok(ledger.history.len()),
            faults => Err(faults),
        },
    };
    (acknowledged.len(), verdict)
}

#[test]
fn no_acknowledged_write_is_lost_when_the_power_goes() {
    sweep();
    let (cuts, seed) = (number_from_env("OPTIMUS_POWER_CUTS", CUTS), seed_from_env("OPTIMUS_POWER_SEED"));
    println!("{cuts} power cuts; again: OPTIMUS_POWER_SEED={seed} OPTIMUS_POWER_CUTS={cuts}");
    let mut dice = Dice(seed);
    let mut total = 0;
    for n in 0..cuts {
        let when = plan(n, &mut dice);
        let (acknowledged, verdict) = cut(dice.draw(), &when, None);
        println!("cut {n}: {when:?}, {acknowledged} acknowledged, recovered {verdict:?}");
        assert!(verdict.is_ok(), "cut {n} of OPTIMUS_POWER_SEED={seed}, {when:?}: {verdict:?}");
        total += acknowledged;
    }
    assert!(total > 50 * cuts as usize, "only {total} writes were acknowledged in {cuts} cuts: nothing was proven");
}

/// The proof that the test above can fail.
#[test]
fn a_disk_that_only_says_it_synced_loses_writes() {
    sweep();
    let lost = (0..3u64)
        .filter(|n| {
            let when = When::Acknowledged(600 + 100 * *n as usize, Duration::ZERO);
            let (acknowledged, verdict) = cut(*n, &when, Some(60));
            println!("lying disk {n}: {acknowledged} acknowledged, {verdict:?}");
            verdict.is_err()
        })
        .count();
    assert!(lost > 0, "three power cuts of a disk that does not sync lost nothing: the harness sees nothing");
}
