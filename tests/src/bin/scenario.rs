//! Plays scenarios and shows what each line did: `scenario FILE...`; see tests/scenarios/README.md.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::Path;
use std::process::ExitCode;
use std::{env, fs};

use optimus_tests::scenario;

const USAGE: &str = "usage: scenario [--trace] [--quiet] FILE|DIRECTORY...   plays scenarios, shows what each line changed
       scenario --words                                lists the sentences

  --trace   every command on the way, not only what a line changed in all
  --quiet   only what failed, and a count

exit code: 0 all passed, 1 one failed, 2 wrong usage";

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let (options, paths): (Vec<&String>, Vec<&String>) = args.iter().partition(|a| a.starts_with("--"));
    let has = |option: &str| options.iter().any(|o| *o == option);
    if has("--help") {
        println!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    if has("--words") {
        println!("{}", scenario::list_words());
        return ExitCode::SUCCESS;
    }
    if paths.is_empty() || options.iter().any(|o| !["--trace", "--quiet"].contains(&o.as_str())) {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    }
    match play(&paths, has("--trace"), has("--quiet")) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("scenario: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// True: all passed.
fn play(paths: &[&String], trace: bool, quiet: bool) -> anyhow::Result<bool> {
    let mut files = vec![];
    for path in paths {
        let path = Path::new(path);
        if path.is_dir() { files.extend(scenario::files(path)?) } else { files.push(path.to_owned()) }
    }
    let mut failed = vec![];
    for file in &files {
        let text = fs::read_to_string(file).map_err(|e| anyhow::anyhow!("failed to read {}: {e}", file.display()))?;
        let played = scenario::play(&text, trace);
        if played.failure.is_some() {
            failed.push(file.display().to_string());
        }
        if !quiet || played.failure.is_some() {
            println!("{}", scenario::print(&file.display().to_string(), &text, &played));
        }
    }
    if files.len() > 1 {
        println!("{} of {} scenarios passed", files.len() - failed.len(), files.len());
        for file in &failed {
            println!("  failed: {file}");
        }
    }
    Ok(failed.is_empty())
}
