//! Losing the cluster and getting it back, with the real binary. The first test needs root and cgroups, as e2e does.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use age::secrecy::ExposeSecret as _;
use optimus_tests::harness::*;

/// A fresh age identity: its recipient, and a file that holds it.
fn identity(sandbox: &Sandbox, name: &str) -> (String, String) {
    let identity = age::x25519::Identity::generate();
    let path = sandbox.path(name);
    fs::write(&path, identity.to_string().expose_secret()).unwrap();
    (identity.to_public().to_string(), path.display().to_string())
}

fn text(path: PathBuf) -> String {
    path.display().to_string()
}

/// `optimus server` with further flags, ready to answer.
fn server_with(sandbox: &mut Sandbox, more: &[&str]) -> usize {
    let (api, agent) = (format!("127.0.0.1:{}", sandbox.api_port), format!("127.0.0.1:{}", sandbox.agent_port));
    let data = text(sandbox.path("server"));
    let mut args = vec!["server", "--data-dir", &data, "--api-listen", &api, "--agent-listen", &agent];
    args.extend_from_slice(more);
    let index = sandbox.start("server", &args);
    wait_for("the server to be ready", || {
        assert!(sandbox.process(index).is_running(), "the server ended:\n{}", sandbox.process(index).output());
        (sandbox.run(&["status", "--json"]).code == 0).then_some(())
    });
    index
}

fn end(sandbox: &mut Sandbox, process: usize) {
    sandbox.process(process).signal(libc::SIGTERM);
    assert_eq!(sandbox.process(process).wait(), Some(0), "{}", sandbox.process(process).output());
}

/// Deploys a workload that waits for a node.
fn deploy(sandbox: &Sandbox, name: &str) -> u64 {
    let toml = format!("name = \"{name}\"\nrun = \"/bin/sleep 1000\"\n");
    let dir = text(sandbox.project(name, &[("optimus.toml", &toml)]));
    sandbox.run(&["deploy", &dir, "--no-wait", "--json"]).expect(0);
    sandbox.run(&["status", "--json"]).expect(0).json()["status"]["index"].as_u64().unwrap()
}

fn workloads(sandbox: &Sandbox) -> Vec<String> {
    let status = sandbox.run(&["events", "--json"]).expect(0).stdout;
    let mut names: Vec<String> =
        ["one", "two", "three", "four"].iter().filter(|n| status.contains(&format!("/{n}\""))).map(|n| n.to_string()).collect();
    names.sort();
    names
}

#[test]
fn a_lost_server_comes_back_from_its_export_and_its_agent_with_it() {
    let mut sandbox = Sandbox::new();
    let (recipient, key) = identity(&sandbox, "key.txt");
    let server = sandbox.server();
    sandbox.agent();
    let example = text(repo_root().join("examples/python-web"));
    sandbox.run(&["deploy", &example]).expect(0);
    let before = sandbox.ready_copies("web", 3);

    let data = text(sandbox.path("server"));
    let (root, export) = (text(sandbox.path("root.key.age")), text(sandbox.path("state.age")));
    sandbox.run(&["cluster", "root-key", "export", "--data-dir", &data, "--to", &root, "--recipient", &recipient]).expect(0);
    sandbox.run(&["cluster", "snapshot", "--to", &export, "--recipient", &recipient]).expect(0);
    let verified =
        sandbox.run(&["cluster", "snapshot", "verify", &export, "--identity", &key, "--root-key", &root, "--json"]).expect(0).json();
    assert_eq!((verified["workloads"].as_u64(), verified["nodes"].as_u64()), (Some(1), Some(1)), "{verified}");
    assert_eq!((verified["copies"].as_u64(), verified["root_key_fits"].as_bool()), (Some(3), Some(true)), "{verified}");

    // What comes after the export is lost with the server; the agent has seen it.
    sandbox.run(&["scale", "web", "2"]).expect(0);
    sandbox.process(server).kill();
    fs::remove_dir_all(sandbox.path("server")).unwrap();

    let said = sandbox.run(&["cluster", "restore", &export, "--data-dir", &data, "--identity", &key, "--root-key", &root]).expect(0);
    assert!(said.stdout.contains("1 workloads, 1 nodes") && said.stdout.contains("lost"), "{}", said.all());
    let server = sandbox.server();
    // The agent comes back without a human, and takes the older wish for the newer: three copies, two of them untouched.
    let after = sandbox.ready_copies("web", 3);
    let (before, after): (Vec<i32>, Vec<i32>) = (before.iter().map(pid_of).collect(), after.iter().map(pid_of).collect());
    assert_eq!(after[..2], before[..2], "copies must not care");
    // And writes go on.
    sandbox.run(&["scale", "web", "1"]).expect(0);
    sandbox.ready_copies("web", 1);
    sandbox.process(server).kill();
    sandbox.server();
    assert_eq!(sandbox.ready_copies("web", 1).len(), 1);
    sandbox.run(&["rm", "web", "--yes"]).expect(0);
    wait_for("the copies to end", || sandbox.run(&["ps", "--json"]).json()["items"].as_array().is_some_and(Vec::is_empty).then_some(()));
}

#[test]
fn a_passphrase_opens_an_export_and_without_a_lock_there_is_none() {
    let mut sandbox = Sandbox::new();
    sandbox.server();
    deploy(&sandbox, "one");
    let (export, pass, bad) = (text(sandbox.path("state.age")), text(sandbox.path("pass")), text(sandbox.path("bad")));
    fs::write(&pass, "a long and secret phrase\n").unwrap();
    fs::write(&bad, "a long and other phrase\n").unwrap();

    let refused = sandbox.run(&["cluster", "snapshot", "--to", &export]).expect(2);
    assert!(refused.stderr.contains("neither a recipient nor a passphrase"), "{}", refused.stderr);
    let refused = sandbox.run(&["cluster", "snapshot", "--to", &export, "--recipient", "age1nonsense"]).expect(2);
    assert!(refused.stderr.contains("no age recipient"), "{}", refused.stderr);
    assert!(!Path::new(&export).exists());
    sandbox.run(&["cluster", "snapshot", "--to", &export, "--passphrase-file", &pass]).expect(0);
    let left: Vec<_> =
        fs::read_dir(sandbox.dir.path()).unwrap().flatten().filter(|e| e.file_name().to_string_lossy().contains(".tmp")).collect();
    assert!(left.is_empty(), "{left:?}");
    sandbox.run(&["cluster", "snapshot", "verify", &export, "--passphrase-file", &pass]).expect(0);
    let wrong = sandbox.run(&["cluster", "snapshot", "verify", &export, "--passphrase-file", &bad]).expect(1);
    assert!(wrong.stderr.contains("passphrase is wrong"), "{}", wrong.stderr);
    // No terminal to ask on.
    sandbox.run(&["cluster", "snapshot", "verify", &export]).expect(2);
}

#[test]
fn whatever_is_wrong_is_named_and_nothing_is_written() {
    let mut sandbox = Sandbox::new();
    let (recipient, key) = identity(&sandbox, "key.txt");
    let (_, other_key) = identity(&sandbox, "other.txt");
    let server = sandbox.server();
    deploy(&sandbox, "one");
    let (data, target) = (text(sandbox.path("server")), text(sandbox.path("target")));
    let (root, export, bad) = (text(sandbox.path("server/root.key")), text(sandbox.path("state.age")), text(sandbox.path("bad.age")));
    sandbox.run(&["cluster", "snapshot", "--to", &export, "-r", &recipient]).expect(0);
    let restore = |sandbox: &Sandbox, file: &str, key: &str, root: &str, dir: &str| {
        sandbox.run(&["cluster", "restore", file, "--data-dir", dir, "--identity", key, "--root-key", root])
    };
    let refused = |sandbox: &Sandbox, said: Said, words: &str| {
        assert!(said.code != 0 && said.stderr.contains(words), "{words}: {}", said.all());
        assert!(!sandbox.path("target").exists(), "{words}: something was written");
    };

    let whole = fs::read(&export).unwrap();
    refused(&sandbox, restore(&sandbox, &export, &other_key, &root, &target), "none of the given age identities opens the file");
    for cut in [0, 10, whole.len() / 2, whole.len() - 1] {
        fs::write(&bad, &whole[..cut]).unwrap();
        refused(&sandbox, restore(&sandbox, &bad, &key, &root, &target), "nothing was restored");
    }
    for at in [0, 60, 150, whole.len() / 2, whole.len() - 1] {
        let mut flipped = whole.clone();
        flipped[at] ^= 1;
        fs::write(&bad, &flipped).unwrap();
        refused(&sandbox, restore(&sandbox, &bad, &key, &root, &target), "damaged");
    }
    fs::write(&bad, format!("optimus-root-key-1:{}\n", "5a".repeat(32))).unwrap();
    refused(&sandbox, restore(&sandbox, &export, &key, &bad, &target), "root key does not open");
    sandbox.run(&["cluster", "snapshot", "verify", &export, "-i", &key, "--root-key", &bad]).expect(1);

    // Not over a server, running or stopped.
    let said = restore(&sandbox, &export, &key, &root, &data);
    assert!(said.code != 0 && said.stderr.contains("is not empty"), "{}", said.all());
    // A server that is alone has nothing to recover from; one that runs is left alone.
    let said = sandbox.run(&["cluster", "recover", "--data-dir", &data, "--yes"]);
    assert!(said.code != 0 && said.stderr.contains("already runs"), "{}", said.all());
    end(&mut sandbox, server);
    let said = sandbox.run(&["cluster", "recover", "--data-dir", &data, "--yes"]);
    assert!(said.code != 0 && said.stderr.contains("only one with a vote"), "{}", said.all());
    let said = restore(&sandbox, &export, &key, &root, &target).expect(0);
    assert!(said.stdout.contains("1 workloads"), "{}", said.all());
}

#[test]
fn the_archive_brings_back_any_point_and_a_missing_segment_is_noticed() {
    let mut sandbox = Sandbox::new();
    let (recipient, key) = identity(&sandbox, "key.txt");
    let (archive, exports) = (text(sandbox.path("archive")), text(sandbox.path("exports")));
    let flags = [
        "--archive-dir",
        &archive,
        "--archive-recipient",
        &recipient,
        "--snapshot-dir",
        &exports,
        "--snapshot-every",
        "10s",
        "--snapshot-keep",
        "2",
        "--snapshot-recipient",
        &recipient,
    ];
    // Each stop ends a segment.
    let mut indexes = Vec::new();
    for name in ["one", "two", "three"] {
        let server = server_with(&mut sandbox, &flags);
        indexes.push(deploy(&sandbox, name));
        wait_for("a scheduled export", || (!files(&sandbox.path("exports/server-1"), "export-").is_empty()).then_some(()));
        end(&mut sandbox, server);
    }
    let segments = files(&sandbox.path("archive/server-1"), "segment-");
    let bases = files(&sandbox.path("archive/server-1"), "base-");
    assert!(segments.len() >= 3 && bases.len() == 1, "{segments:?} {bases:?}");
    assert!(files(&sandbox.path("exports/server-1"), "export-").len() <= 2);

    let root = text(sandbox.path("server/root.key"));
    let base = text(bases[0].clone());
    let said = sandbox.run(&["cluster", "archive", &archive, "--from", &base, "-i", &key]).expect(0);
    assert!(said.stdout.contains("whole and in order"), "{}", said.all());
    let restore = |sandbox: &Sandbox, dir: &str, more: &[&str]| {
        let dir = text(sandbox.path(dir));
        let mut args =
            vec!["cluster", "restore", &base, "--data-dir", &dir, "-i", &key, "--root-key", &root, "--archive", &archive, "--json"];
        args.extend_from_slice(more);
        sandbox.run(&args)
    };
    let all = restore(&sandbox, "all", &[]).expect(0).json();
    assert_eq!(all["workloads"], 3, "{all}");
    let second = restore(&sandbox, "second", &["--index", &indexes[1].to_string()]).expect(0).json();
    assert_eq!((second["workloads"].as_u64(), second["restored_index"].as_u64()), (Some(2), Some(indexes[1])), "{second}");
    assert!(second["left_out"].as_u64().unwrap() > 0);
    let then = second["restored_to"].as_str().unwrap().to_owned();
    let timed = restore(&sandbox, "timed", &["--at", &then]).expect(0).json();
    assert_eq!(timed["workloads"], 2, "{timed}");
    let beyond = restore(&sandbox, "beyond", &["--index", "99999999"]);
    assert!(beyond.code != 0 && beyond.stderr.contains("the archive ends at index"), "{}", beyond.all());
    assert!(!sandbox.path("beyond").exists());

    // A restored server serves what it says, under another id, and archives beside the old chain.
    fs::rename(sandbox.path("server"), sandbox.path("lost")).unwrap();
    fs::rename(sandbox.path("second"), sandbox.path("server")).unwrap();
    let server = server_with(&mut sandbox, &flags);
    assert_eq!(workloads(&sandbox), ["one", "two"]);
    end(&mut sandbox, server);
    let dirs = fs::read_dir(sandbox.path("archive")).unwrap().count();
    assert_eq!(dirs, 2, "a directory for each server");
    fs::rename(sandbox.path("archive"), sandbox.path("both")).unwrap();
    fs::create_dir(sandbox.path("archive")).unwrap();
    fs::rename(sandbox.path("both/server-1"), sandbox.path("archive/server-1")).unwrap();

    // One segment in the middle is missing, then damaged, then replaced by another.
    let middle = &segments[1];
    let kept = fs::read(middle).unwrap();
    fs::remove_file(middle).unwrap();
    let gap = restore(&sandbox, "gap", &[]);
    assert!(gap.code != 0 && gap.stderr.contains("has a gap: entries"), "{}", gap.all());
    let mut flipped = kept.clone();
    flipped[kept.len() - 20] ^= 1;
    fs::write(middle, &flipped).unwrap();
    let damaged = restore(&sandbox, "gap", &[]);
    assert!(damaged.code != 0 && damaged.stderr.contains("damaged or cut short"), "{}", damaged.all());
    fs::write(middle, fs::read(&segments[0]).unwrap()).unwrap();
    let swapped = restore(&sandbox, "gap", &[]);
    assert!(swapped.code != 0 && swapped.stderr.contains("which is not its name"), "{}", swapped.all());
    assert!(!sandbox.path("gap").exists(), "something was written");
    fs::write(middle, &kept).unwrap();
    restore(&sandbox, "gap", &[]).expect(0);
}

/// Files of a directory with a prefix, sorted.
fn files(dir: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().starts_with(prefix) && e.file_name().to_string_lossy().ends_with(".age"))
        .map(|e| e.path())
        .collect();
    found.sort();
    found
}
