//! Replays the corpus of every fuzz target: what the fuzzer once found stays mended.
#![allow(clippy::unwrap_used)]

use std::fs;

use optimus_tests::fuzz_targets::TARGETS;
use optimus_tests::harness::repo_root;

#[test]
fn the_corpus_of_every_target_passes() {
    for (name, target) in TARGETS {
        let dir = repo_root().join("fuzz/corpus").join(name);
        let mut files: Vec<_> =
            fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())).map(|e| e.unwrap().path()).collect();
        files.sort();
        assert!(!files.is_empty(), "{name} has no corpus");
        for file in files {
            let bytes = fs::read(&file).unwrap();
            let ran = std::panic::catch_unwind(|| target(&bytes));
            assert!(ran.is_ok(), "{name}: {} panics", file.display());
        }
    }
}

#[test]
fn the_fuzzer_has_a_binary_for_every_target() {
    let manifest = fs::read_to_string(repo_root().join("fuzz/Cargo.toml")).unwrap();
    for (name, _) in TARGETS {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "fuzz/Cargo.toml lacks {name}");
    }
}
