//! Text scenarios: the control plane's decisions against a model of agents, as sentences.
//!
//! A scenario is a file of lines under `given`, `when` and `then`, which may repeat; `tests/scenarios/README.md` describes
//! the language, `scenario --words` lists its sentences. A new sentence is a [`Word`] in a table of `words/`; nothing else
//! needs to know of it. Time stands still but for `advance`, which lets everybody act once a second. After each line no node
//! may hold more than it has and every standing rule holds; at the end the log is replayed, and once more with a snapshot
//! after every entry, and must give the same state.
//!
//! ```text
//!   parse ── lines ──► words (which sentence is it?) ── run ──► world (state, log, clock) ── asks ──► agents (what copies do)
//!                                                                 │
//!                                            print (what changed, the table of a failure)
//! ```

mod agents;
mod parse;
mod print;
mod words;
mod world;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};

pub use parse::{Args, Mismatch, Section};
pub use print::print;
pub use words::{Setting, Vocabulary, Word, list as list_words};
pub use world::World;

/// What one line of a scenario did.
pub struct Step {
    pub line: usize,
    pub section: Option<Section>,
    pub text: String,
    /// What is different in the state now, a line each.
    pub changes: Vec<String>,
    /// Every command on the way, with its changes; only kept when asked for.
    pub trace: Vec<String>,
}

/// A scenario that ran, to its end or to the line that failed.
pub struct Played {
    pub steps: Vec<Step>,
    pub failure: Option<Failure>,
    /// The world as it was then.
    pub world: World,
}

pub struct Failure {
    /// Unset: it is about the whole (a replay that gave another state).
    pub line: Option<(usize, String)>,
    pub error: anyhow::Error,
}

/// Runs a scenario; an error names the line.
pub fn run(text: &str) -> anyhow::Result<()> {
    match play(text, false).failure {
        None => Ok(()),
        Some(Failure { line: Some((number, line)), error }) => Err(error.context(format!("line {number}: {line}"))),
        Some(Failure { line: None, error }) => Err(error),
    }
}

/// Runs a scenario and keeps what each line did.
pub fn play(text: &str, trace: bool) -> Played {
    let mut played = Played { steps: vec![], failure: None, world: World::new(trace) };
    if let Err(failure) = play_lines(&mut played, text) {
        played.failure = Some(failure);
    }
    played
}

fn play_lines(played: &mut Played, text: &str) -> Result<(), Failure> {
    let mut section = None;
    for (number, line) in parse::lines(text) {
        if let Some(heading) = Section::of(line) {
            if heading == Section::When {
                played.world.mark();
            }
            section = Some(heading);
            continue;
        }
        let before = played.world.state.clone();
        let done = words::run(&mut played.world, section, line).and_then(|()| played.world.check_always());
        played.steps.push(Step {
            line: number,
            section,
            text: line.to_owned(),
            changes: print::changes(&before, &played.world.state),
            trace: std::mem::take(&mut played.world.trace),
        });
        done.map_err(|error| Failure { line: Some((number, line.to_owned())), error })?;
    }
    let whole = || -> anyhow::Result<()> {
        ensure!(played.steps.len() > 1, "a scenario without lines proves nothing");
        played.world.check_replay()
    };
    whole().map_err(|error| Failure { line: None, error })
}

/// The scenarios below a directory, in order. Those under `pending/` wait for what they need and are left out.
pub fn files(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    const DEPTH_MAX: usize = 8;
    fn walk(dir: &Path, depth: usize, found: &mut Vec<PathBuf>) -> anyhow::Result<()> {
        ensure!(depth < DEPTH_MAX, "{} is too deep", dir.display());
        for entry in fs::read_dir(dir).with_context(|| format!("failed to list {}", dir.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                if path.file_name().is_none_or(|name| name != "pending") {
                    walk(&path, depth + 1, found)?;
                }
            } else if path.extension().is_some_and(|e| e == "txt") {
                found.push(path);
            }
        }
        Ok(())
    }
    let mut found = vec![];
    walk(dir, 0, &mut found)?;
    found.sort();
    if found.is_empty() {
        bail!("no scenarios below {}", dir.display());
    }
    Ok(found)
}
