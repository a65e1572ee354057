//! Dependencies point one way.
#![allow(clippy::unwrap_used)]

use std::process::Command;

use optimus_tests::harness::repo_root;

/// Names of all crates a crate of ours stands on.
fn tree(package: &str) -> Vec<String> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let args = ["tree", "--offline", "--package", package, "--edges", "normal", "--prefix", "none", "--format", "{p}"];
    let output = Command::new(cargo).args(args).current_dir(repo_root()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let names: Vec<String> = text.lines().filter_map(|l| l.split(' ').next()).map(str::to_owned).collect();
    assert!(names.len() > 1, "{package} stands on nothing?");
    names
}

fn holds_none(package: &str, banned: &[&str]) {
    let names = tree(package);
    let found: Vec<&&str> = banned.iter().filter(|b| names.iter().any(|n| n == **b)).collect();
    assert!(found.is_empty(), "{package} stands on {found:?}");
}

#[test]
fn core_cannot_touch_the_world() {
    holds_none("optimus-core", &["tokio", "quinn", "rustls", "redb", "sled", "openraft", "axum", "rustix", "optimus-host"]);
}

#[test]
fn the_agent_knows_nothing_of_the_control_plane() {
    holds_none("optimus-agent", &["optimus-core", "optimus-control-plane", "openraft", "axum"]);
}

#[test]
fn a_runner_stays_small() {
    assert_eq!(tree("optimus-runner"), ["optimus-runner", "libc"]);
}
