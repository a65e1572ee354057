//! Every file of `tests/bad-specs` is wrong in its own way; the whole message a user sees stands beside it.
//!
//! A first line `# env: NAME` chooses the environment. `UPDATE_EXPECT=1` rewrites the messages: read them.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use optimus_common::Name;
use optimus_common::spec::{self, Context};
use optimus_tests::harness::repo_root;

/// Fewer than this means that files went missing.
const FILES_MIN: usize = 200;

fn message(text: &str) -> String {
    let environment = text.lines().next().and_then(|l| l.strip_prefix("# env: ")).map(|n| Name::new(n.trim()).unwrap());
    let context = Context { default_project: Name::new("shop").ok(), base_dir: PathBuf::from("/srv/shop"), environment };
    match spec::parse_toml("optimus.toml", text, &context) {
        Err(errors) => errors.to_string(),
        Ok(parsed) => spec::not_available(&parsed.spec).iter().map(|e| format!("{}: {}\n", e.pointer, e.message)).collect(),
    }
}

#[test]
fn every_bad_spec_says_what_is_wrong_and_where() {
    let dir = repo_root().join("tests/bad-specs");
    let update = std::env::var_os("UPDATE_EXPECT").is_some();
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    let mut wrong = Vec::new();
    let mut files: Vec<PathBuf> =
        fs::read_dir(&dir).unwrap().map(|e| e.unwrap().path()).filter(|p| p.extension().is_some_and(|e| e == "toml")).collect();
    files.sort();
    for file in &files {
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        let found = message(&fs::read_to_string(file).unwrap());
        let expected_file = file.with_extension("txt");
        if update {
            fs::write(&expected_file, &found).unwrap();
        }
        let expected = fs::read_to_string(&expected_file).unwrap_or_default();
        if found.is_empty() {
            wrong.push(format!("{name}: nothing is wrong with it"));
        } else if found != expected {
            wrong.push(format!("{name}: expected\n{expected}\nfound\n{found}"));
        }
        if let Some(other) = seen.insert(found, name.clone()) {
            wrong.push(format!("{name}: has the same message as {other}"));
        }
    }
    assert!(files.len() >= FILES_MIN, "{} files; at least {FILES_MIN} are wanted", files.len());
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), files.len(), wrong.join("\n"));
}

#[test]
fn a_file_beyond_the_limit_is_refused_unread() {
    let text = format!("name = \"web\"\nrun = \"x\"\n#{}", "x".repeat(spec::FILE_MAX));
    assert!(message(&text).contains("at most 262144 are read"));
}

#[test]
fn deep_nesting_is_an_error_not_a_crash() {
    for (open, close) in [("[", "]"), ("{a=", "}")] {
        let text = format!("name = \"web\"\nrun = {}{}\n", open.repeat(20_000), close.repeat(20_000));
        assert!(message(&text).starts_with("error[OPT-1001]"));
    }
}
