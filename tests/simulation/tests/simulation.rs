//! The bounded selection that CI runs: seeds, equal traces of equal seeds, and the seeds that once found a bug of ours.
//!
//! The planted bugs need a build of their own; `scripts/test simulation` makes it and replays their recorded seeds.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

use optimus_simulation::invariants::Checks;
use optimus_simulation::planted::{BUGS, recorded, regressions};
use optimus_simulation::runner::Runner;

/// Seeds of the selection; `SIMULATE_SEEDS` sets another number.
const SEEDS: u64 = 300;
/// No seed is begun after so long.
const TIME_LIMIT: Duration = Duration::from_secs(300);

fn runner() -> Runner {
    let jobs = std::thread::available_parallelism().map_or(2, usize::from);
    Runner::new(Path::new(env!("CARGO_BIN_EXE_simulate")), jobs)
}

#[test]
fn no_seed_violates_an_invariant() {
    let seeds = std::env::var("SIMULATE_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(SEEDS);
    let runner = Runner { time_limit: Some(TIME_LIMIT), ..runner() };
    let sum = runner.many(1..seeds + 1, |_| ()).unwrap();
    println!("{} of {seeds} seeds in {:?}, faults {:?}", sum.seeds, sum.took, sum.faults);
    for bad in &sum.bad {
        println!("seed {}: {:?}\n  replay: {}", bad.seed, bad.violations, bad.replay(None));
        bad.tail.iter().for_each(|line| println!("    {line}"));
    }
    assert!(sum.bad.is_empty(), "seeds {:?} violate an invariant", sum.bad.iter().map(|o| o.seed).collect::<Vec<_>>());
    assert!(sum.seeds > 0, "no seed was run");
    // Each kind of fault happened, or the selection proves less than it says.
    let kinds = [
        "agent cut off",
        "blackout",
        "clock jump",
        "crash",
        "crash at a step",
        "crash at a write",
        "damaged record",
        "disk full",
        "failed flush",
        "host power cycle",
        "leader transfer",
        "message doubled",
        "message lost",
        "one-way partition",
        "partition",
        "pause",
        "server added",
        "server removed",
    ];
    if sum.seeds >= 30 {
        for kind in kinds {
            assert!(sum.faults.contains_key(kind), "no `{kind}` in {} seeds", sum.seeds);
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in [1, 2, 3, 5, 8, 13] {
        let (one, two) = (runner().one(seed).unwrap(), runner().one(seed).unwrap());
        assert!(one.events > 100, "seed {seed} did next to nothing: {one:?}");
        assert_eq!((one.hash, one.events), (two.hash, two.events), "seed {seed}");
    }
}

#[test]
fn seeds_that_once_found_a_bug_hold() {
    for (seed, why) in regressions() {
        let outcome = runner().one(seed).unwrap();
        assert_eq!(outcome.violations, Vec::<String>::new(), "seed {seed} ({why})");
    }
}

#[test]
fn every_planted_bug_has_a_recorded_seed() {
    assert!(BUGS.len() >= 15);
    for (name, _) in BUGS {
        let seed = recorded().into_iter().find(|(known, _)| known == name);
        assert!(seed.is_some_and(|(_, seed)| (1..=500).contains(&seed)), "{name} has no seed in planted.txt");
    }
}

#[test]
fn invariants_have_names_of_their_own() {
    let names = Checks::default().names();
    let mut distinct = names.clone();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(names.len(), distinct.len());
}
