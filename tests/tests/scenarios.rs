//! Every file in `tests/scenarios`.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;

use optimus_tests::harness::repo_root;
use optimus_tests::scenario;

#[test]
fn scenarios() {
    let mut files: Vec<PathBuf> = fs::read_dir(repo_root().join("tests/scenarios")).unwrap().map(|f| f.unwrap().path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "txt"));
    files.sort();
    assert!(files.len() >= 30, "only {} scenarios found", files.len());
    let mut failed = Vec::new();
    for file in &files {
        if let Err(error) = scenario::run(&fs::read_to_string(file).unwrap()) {
            failed.push(format!("{}: {error:#}", file.file_name().unwrap().to_string_lossy()));
        }
    }
    assert!(failed.is_empty(), "{} of {} scenarios failed:\n{}", failed.len(), files.len(), failed.join("\n"));
}

#[test]
fn a_scenario_that_is_wrong_fails() {
    for (text, says) in [
        ("node a\ndeploy web\nsettle\nweb has 2 of 1 ready", "expected `2 of 1`"),
        ("node a\ndeploy web\nwhatever", "no such line"),
        ("# nothing", "proves nothing"),
    ] {
        let error = scenario::run(text).unwrap_err();
        assert!(format!("{error:#}").contains(says), "{error:#}");
    }
}
