//! Every file of `bad-specs/` is refused, with exactly the message beside it.
//!
//! `UPDATE_EXPECT=1` rewrites the messages; read them before they are committed: they are what a user sees.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use optimus_common::Name;
use optimus_common::spec::{self, Context};

/// The files of a directory with this ending, by name.
fn files(dir: &str, ending: &str) -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(dir);
    let mut found: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.extension().is_some_and(|e| e == ending));
    found.sort();
    found
}

#[test]
fn each_bad_spec_is_refused_with_its_message() {
    let context = Context { default_project: Name::new("shop").ok(), base_dir: "/srv/shop".into(), environment: None };
    let update = std::env::var_os("UPDATE_EXPECT").is_some();
    let mut seen: BTreeMap<String, PathBuf> = BTreeMap::new();
    let mut wrong = Vec::new();
    let specs = files("bad-specs", "toml");
    for path in &specs {
        let text = fs::read_to_string(path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        let shown = match spec::parse_toml("optimus.toml", &text, &context) {
            Ok(parsed) => {
                wrong.push(format!("{name} is read: {:?}", parsed.spec));
                continue;
            }
            Err(errors) => errors.to_string(),
        };
        if let Some(other) = seen.insert(shown.clone(), path.clone()) {
            wrong.push(format!("{name} shows the same as {}", other.display()));
        }
        let expected = path.with_extension("txt");
        if update {
            fs::write(&expected, &shown).unwrap();
        }
        let before = fs::read_to_string(&expected).unwrap_or_default();
        if before != shown {
            wrong.push(format!("{name} shows\n{shown}\ninstead of\n{before}"));
        }
    }
    for path in files("bad-specs", "txt") {
        if !path.with_extension("toml").exists() {
            wrong.push(format!("{} has no spec", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{}\n{} wrong; UPDATE_EXPECT=1 rewrites them", wrong.join("\n"), wrong.len());
    assert!(specs.len() >= 200, "{} bad specs", specs.len());
}
