//! `simulate`: runs seeds of the simulator.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand};
use optimus_simulation::planted::{BUGS, recorded, regressions};
use optimus_simulation::run::{self, Outcome};
use optimus_simulation::runner::{Runner, Sum};

/// Most seeds a planted bug may take to be found.
const PLANTED_SEEDS: u64 = 500;

#[derive(Parser)]
#[command(about = "A deterministic simulator of the Optimus control plane")]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run many seeds, one process each.
    Run {
        /// First and last seed, `1..300`.
        #[arg(long)]
        seeds: String,
        /// Processes at once.
        #[arg(long, default_value_t = 2)]
        jobs: usize,
        /// Begin no seed after so many seconds.
        #[arg(long)]
        time_limit: Option<u64>,
        /// Plant this bug (in a build with planted bugs).
        #[arg(long)]
        planted: Option<String>,
        /// Stop at the first violation.
        #[arg(long)]
        until_found: bool,
    },
    /// Run one seed in this process.
    Seed {
        seed: u64,
        /// Print every event.
        #[arg(long)]
        trace: bool,
        /// Print the outcome as one line of JSON.
        #[arg(long)]
        json: bool,
        #[arg(long)]
        planted: Option<String>,
    },
    /// Find the first seed that finds a planted bug, or all of them.
    Planted {
        name: Option<String>,
        #[arg(long, default_value_t = 2)]
        jobs: usize,
        /// Only run the recorded seeds, and fail unless each finds its bug.
        #[arg(long)]
        recorded: bool,
    },
    /// Run the seeds that once found a bug.
    ReplayRegressions {
        #[arg(long, default_value_t = 2)]
        jobs: usize,
    },
}

fn main() -> anyhow::Result<ExitCode> {
    let own = std::env::current_exe().context("failed to find this program")?;
    let good = match Cli::parse().command {
        Verb::Run { seeds, jobs, time_limit, planted, until_found } => {
            let (first, last) = seeds
                .split_once("..")
                .and_then(|(a, b)| Some((a.parse().ok()?, b.parse::<u64>().ok()?)))
                .context("--seeds is not of the form A..B")?;
            let runner = Runner { time_limit: time_limit.map(Duration::from_secs), planted, until_found, ..Runner::new(own, jobs) };
            let sum = runner.many(first..last + 1, |o| show_bad(o, runner.planted.as_deref()))?;
            show_sum(&sum);
            sum.bad.is_empty()
        }
        Verb::Seed { seed, trace, json, planted } => {
            plant(planted.as_deref())?;
            let outcome = run::run(seed, trace)?;
            if json {
                println!("{}", serde_json::to_string(&outcome)?);
            } else {
                show_bad(&outcome, planted.as_deref());
                println!(
                    "seed {seed}: trace {} of {} events, {} virtual ms, {} operations, faults {:?}",
                    outcome.hash, outcome.events, outcome.virtual_ms, outcome.operations, outcome.faults
                );
            }
            outcome.violations.is_empty()
        }
        Verb::Planted { name, jobs, recorded: true } => replay_planted(own, name, jobs)?,
        Verb::Planted { name, jobs, recorded: false } => find_planted(own, name, jobs)?,
        Verb::ReplayRegressions { jobs } => {
            let runner = Runner::new(own, jobs);
            let mut good = true;
            for (seed, why) in regressions() {
                let outcome = runner.one(seed)?;
                println!("seed {seed} ({why}): {}", if outcome.violations.is_empty() { "holds" } else { "FAILS" });
                show_bad(&outcome, None);
                good &= outcome.violations.is_empty();
            }
            good
        }
    };
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn plant(name: Option<&str>) -> anyhow::Result<()> {
    let Some(name) = name else { return Ok(()) };
    if !BUGS.iter().any(|(known, _)| *known == name) {
        bail!("no planted bug is called `{name}`; there are: {}", BUGS.iter().map(|(n, _)| *n).collect::<Vec<_>>().join(", "));
    }
    if !optimus_common::planted::choose(name) {
        bail!("this build has no planted bugs; build with OPTIMUS_PLANTED=1 in the environment");
    }
    Ok(())
}

/// The first violation by which `seed` finds the bug: there is none in the same seed without it.
fn finds(runner: &Runner, seed: u64) -> anyhow::Result<Option<String>> {
    let Some(violation) = runner.one(seed)?.violations.into_iter().next() else { return Ok(None) };
    let clean = Runner { planted: None, ..runner.clone() }.one(seed)?;
    Ok(clean.violations.is_empty().then_some(violation))
}

fn find_planted(own: PathBuf, name: Option<String>, jobs: usize) -> anyhow::Result<bool> {
    let mut good = true;
    for (bug, what) in BUGS.iter().filter(|(bug, _)| name.as_deref().is_none_or(|n| n == *bug)) {
        let runner = Runner { planted: Some((*bug).to_owned()), until_found: true, ..Runner::new(own.clone(), jobs) };
        let (mut next, mut found) = (1, None);
        while found.is_none() && next <= PLANTED_SEEDS {
            let sum = runner.many(next..PLANTED_SEEDS + 1, |_| ())?;
            let Some(bad) = sum.bad.first() else { break };
            next = bad.seed + 1;
            found = finds(&runner, bad.seed)?.map(|violation| (bad.seed, violation));
        }
        match found {
            Some((seed, violation)) => println!("{bug} {seed}\n#   {what}: {}", violation.chars().take(160).collect::<String>()),
            None => {
                println!("# {bug}: NOT FOUND in {PLANTED_SEEDS} seeds ({what})");
                good = false;
            }
        }
    }
    Ok(good)
}

fn replay_planted(own: PathBuf, name: Option<String>, jobs: usize) -> anyhow::Result<bool> {
    let recorded = recorded();
    let mut good = true;
    for (bug, _) in BUGS.iter().filter(|(bug, _)| name.as_deref().is_none_or(|n| n == *bug)) {
        let Some((_, seed)) = recorded.iter().find(|(known, _)| known == bug) else {
            println!("{bug}: no seed is recorded");
            good = false;
            continue;
        };
        let runner = Runner { planted: Some((*bug).to_owned()), ..Runner::new(own.clone(), jobs) };
        let found = finds(&runner, *seed)?;
        println!("{bug} by seed {seed}: {}", found.as_deref().unwrap_or("NOT FOUND"));
        good &= found.is_some();
    }
    Ok(good)
}

fn show_bad(outcome: &Outcome, planted: Option<&str>) {
    if outcome.violations.is_empty() {
        return;
    }
    println!("seed {}: {} violations", outcome.seed, outcome.violations.len());
    for violation in &outcome.violations {
        println!("  {}", violation.chars().take(600).collect::<String>());
    }
    for line in outcome.tail.iter().rev().take(12).rev() {
        println!("    {line}");
    }
    println!("  replay: {}", outcome.replay(planted));
}

fn show_sum(sum: &Sum) {
    let secs = sum.took.as_secs_f64();
    println!(
        "{} seeds, {} with violations; {} events, {} operations, {} virtual s in {secs:.1} s ({:.3} s a seed)",
        sum.seeds,
        sum.bad.len(),
        sum.events,
        sum.operations,
        sum.virtual_ms / 1000,
        secs / sum.seeds.max(1) as f64,
    );
    println!("faults: {:?}", sum.faults);
}
