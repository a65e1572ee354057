//! A server is killed exactly around a flush, a vote, a snapshot, a purge or an apply, again and again in one directory.
//!
//! After each kill everything acknowledged so far, over all lives, is there. `OPTIMUS_KILLS=20` sets how often at each point.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use optimus_host::failpoint::POINTS;
use optimus_tests::dice::{Dice, number_from_env, seed_from_env};
use optimus_tests::ledger_process::{Writer, read};

/// Kills at each point without further word.
const KILLS: u64 = 2;

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_optimus-test-ledger"))
}

#[test]
fn a_kill_at_any_point_loses_no_acknowledged_write() {
    let (kills, seed) = (number_from_env("OPTIMUS_KILLS", KILLS), seed_from_env("OPTIMUS_KILL_SEED"));
    println!("{kills} kills at each of {} points; again: OPTIMUS_KILL_SEED={seed} OPTIMUS_KILLS={kills}", POINTS.len());
    let mut dice = Dice(seed);
    for point in POINTS {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut acknowledged = Vec::new();
        for n in 0..kills {
            // Votes are rare: some at a start, then one every some hundred writes. Snapshots and purges come every 60 entries.
            let pass = match point.split('.').next() {
                Some("vote") => 3 + dice.below(3),
                Some("compact") => 1,
                Some("snapshot" | "purge") => 1 + dice.below(8),
                _ => 1 + dice.below(300),
            };
            let mut writer = Writer::start(program(), dir.path(), dice.draw(), None, &format!("{point}=kill@{pass}"));
            let status = writer.wait_ended();
            assert_eq!(status.signal(), Some(libc::SIGKILL), "{point}@{pass}: {status}");
            acknowledged.extend(writer.kill());
            let verdict = read(program(), dir.path()).map(|ledger| (ledger.history.len(), ledger.faults_against(&acknowledged)));
            println!("{point}@{pass} kill {n}: {} acknowledged, recovered {:?}", acknowledged.len(), verdict.as_ref().map(|v| v.0));
            assert!(verdict.as_ref().is_ok_and(|(_, faults)| faults.is_empty()), "{point}@{pass} of OPTIMUS_KILL_SEED={seed}: {verdict:?}");
        }
        assert!(!acknowledged.is_empty(), "{point}: nothing was acknowledged, nothing was proven");
    }
}

#[test]
fn a_failed_flush_ends_the_process_and_loses_nothing() {
    let mut dice = Dice(seed_from_env("OPTIMUS_KILL_SEED"));
    for point in ["log.before_sync", "vote.before_sync", "purge.before_sync", "snapshot.before_sync"] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let pass = 2 + dice.below(3);
        let mut writer = Writer::start(program(), dir.path(), dice.draw(), None, &format!("{point}=error@{pass}"));
        let status = writer.wait_ended();
        assert_eq!(status.code(), Some(1), "{point}@{pass}: {status}");
        let acknowledged = writer.kill();
        let ledger = read(program(), dir.path()).unwrap_or_else(|e| panic!("{point}@{pass}: {e}"));
        assert_eq!(ledger.faults_against(&acknowledged), Vec::<String>::new(), "{point}@{pass}");
    }
}
