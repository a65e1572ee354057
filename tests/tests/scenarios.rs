//! Every scenario below `tests/scenarios`.
#![allow(clippy::unwrap_used)]

use std::fs;

use optimus_tests::harness::repo_root;
use optimus_tests::scenario;

#[test]
fn scenarios() {
    let root = repo_root().join("tests/scenarios");
    let files = scenario::files(&root).unwrap();
    assert!(files.len() >= 180, "only {} scenarios found", files.len());
    let mut failed = Vec::new();
    for file in &files {
        if let Err(error) = scenario::run(&fs::read_to_string(file).unwrap()) {
            failed.push(format!("{}: {error:#}", file.strip_prefix(&root).unwrap().display()));
        }
    }
    assert!(failed.is_empty(), "{} of {} scenarios failed:\n{}", failed.len(), files.len(), failed.join("\n"));
}

#[test]
fn a_scenario_that_is_wrong_fails() {
    for (text, says) in [
        ("node a\ndeploy web\nsettle\nweb has 2 of 1 ready", "expected `2 of 1`"),
        ("node a\ndeploy web\nwhatever", "no such line"),
        ("node a\ndeploy web copies", "written key=value"),
        ("node a\ndeploy web colour=red", "a workload has no `colour`"),
        ("node a\nstatus says \"nothing", "the quote does not end"),
        ("given\n  node a\nthen\n  deploy web", "nothing is done under `then`"),
        ("given\n  node a\n  web is gone", "belongs under `then`"),
        ("node a\ndeploy web copies=2\nnever more than 1 copies of web\nsettle", "web has 2 copies, never more than 1 are allowed"),
        ("node a\ndeploy web\nnever fewer than 1 ready copies of web\nsettle", "web has 0 ready copies"),
        ("# nothing", "proves nothing"),
    ] {
        let error = scenario::run(text).unwrap_err();
        assert!(format!("{error:#}").contains(says), "{text}: {error:#}");
    }
}

#[test]
fn a_failure_is_shown_with_its_line_both_values_and_the_state() {
    let text = "# One copy\ngiven\n  node a\nwhen\n  deploy web\n  settle\nthen\n  web has 2 of 1 ready\n";
    let shown = scenario::print("one", text, &scenario::play(text, false));
    for part in [
        "one: One copy",
        "+ web-0 r1 on a",
        "FAILED    8  web has 2 of 1 ready",
        "expected            2 of 1",
        "found               1 of 1",
        "should run, running, ready",
    ] {
        assert!(shown.contains(part), "no `{part}` in:\n{shown}");
    }
}
