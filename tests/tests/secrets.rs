//! Secrets as a user meets them: the real binary and real processes. Needs root and cgroups.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::Path;
use std::process::Stdio;

use optimus_tests::harness::*;

fn set(sandbox: &Sandbox, name: &str, value: &str, more: &[&str]) -> String {
    let mut args = vec!["secret", "set", name];
    args.extend_from_slice(more);
    let mut child = sandbox.command(&args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(value.as_bytes()).unwrap();
    let said = child.wait_with_output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    assert!(said.status.success(), "{text}");
    assert!(!text.contains(value), "{text}");
    text
}

fn deploy(sandbox: &Sandbox, more: &[&str]) -> Said {
    let file = "name = \"web\"\nproject = \"shop\"\nrun = \"exec sleep 600\"\nmemory = \"16M..32M\"\ncpu = 0.1\nsecrets = [\"API_KEY\"]\n";
    let dir = sandbox.project("web", &[("optimus.toml", file)]).display().to_string();
    let mut args = vec!["deploy", &dir, "--env", "prod"];
    args.extend_from_slice(more);
    sandbox.run(&args)
}

/// What the process of the one copy was given.
fn given(sandbox: &Sandbox) -> String {
    wait_for("the process and its environment", || {
        let copies = sandbox.copies("web");
        let [copy] = copies.as_slice() else { return None };
        let bytes = std::fs::read(format!("/proc/{}/environ", pid_of(copy))).ok()?;
        let own = bytes.split(|b| *b == 0).find_map(|line| line.strip_prefix(b"API_KEY="));
        own.map(|value| String::from_utf8_lossy(value).into_owned())
    })
}

/// The files below a directory that hold `text`.
fn holding(dir: &Path, text: &str, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => holding(&path, text, found),
            Ok(kind) if kind.is_file() => {
                let bytes = std::fs::read(&path).unwrap_or_default();
                if bytes.windows(text.len()).any(|w| w == text.as_bytes()) {
                    found.push(path.display().to_string());
                }
            }
            _ => {}
        }
    }
}

#[test]
fn a_deployment_waits_for_its_secret_and_no_file_log_or_process_list_shows_it() {
    let mut sandbox = Sandbox::new();
    sandbox.dev(&[]);
    wait_for("the cluster takes secrets", || (deploy(&sandbox, &["--no-wait"]).code == 0).then_some(()));
    wait_for("the name of what is missing", || {
        sandbox.run(&["explain", "web"]).all().contains("there is no secret API_KEY in shop/prod").then_some(())
    });
    assert!(sandbox.copies("web").is_empty());
    set(&sandbox, "shop/prod/API_KEY", "zebra-first-4711", &[]);
    sandbox.ready_copies("web", 1);
    assert_eq!(given(&sandbox), "zebra-first-4711");

    // A new version is for what is deployed from then on.
    let said = set(&sandbox, "shop/prod/API_KEY", "zebra-second-4712\n", &[]);
    assert!(said.contains("version 2") && said.contains("web still has an older version"), "{said}");
    assert_eq!(given(&sandbox), "zebra-first-4711");
    let said = set(&sandbox, "shop/prod/API_KEY", "zebra-second-4712\n", &["--restart"]);
    assert!(said.contains("this value already") && said.contains("restarting web"), "{said}");
    wait_for("the second version", || (given(&sandbox) == "zebra-second-4712").then_some(()));
    // And back, together with the release.
    sandbox.run(&["rollback", "web", "--to", "1"]).expect(0);
    wait_for("the first version", || (given(&sandbox) == "zebra-first-4711").then_some(()));

    let mut found = Vec::new();
    holding(sandbox.dir.path(), "zebra-", &mut found);
    assert!(found.is_empty(), "in the clear: {found:?}");
    let shows = |pid: &i32| String::from_utf8_lossy(&std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default()).contains("zebra-");
    assert!(!pids_with("zebra-").iter().any(shows), "in the arguments of a process");
    for args in [&["secret", "--json"][..], &["secret", "show", "shop/prod/API_KEY", "--json"], &["explain", "web", "--json"], &["events"]]
    {
        let said = sandbox.run(args).all();
        assert!(!said.contains("zebra-"), "{args:?}: {said}");
    }
    let refused = sandbox.run(&["secret", "rm", "shop/prod/API_KEY"]);
    assert!(refused.code != 0 && refused.all().contains("used by shop/prod/web"), "{}", refused.all());
}

#[test]
fn an_agent_goes_on_with_secrets_after_it_was_killed_and_no_server_is_there() {
    let mut sandbox = Sandbox::new();
    let server = sandbox.server();
    let agent = sandbox.agent();
    wait_for("the cluster takes secrets", || (deploy(&sandbox, &["--no-wait"]).code == 0).then_some(()));
    set(&sandbox, "shop/prod/API_KEY", "zebra-third-4713", &[]);
    let before = pid_of(&sandbox.ready_copies("web", 1)[0]);
    sandbox.process(server).kill();
    sandbox.process(agent).kill();
    sandbox.agent_alone();
    // SAFETY: a signal to a process of ours.
    assert_eq!(unsafe { libc::kill(before, libc::SIGKILL) }, 0);
    wait_for("another process with the secret", || {
        pids_with("API_KEY=zebra-third-4713").into_iter().any(|pid| pid != before).then_some(())
    });
    let mut found = Vec::new();
    holding(sandbox.dir.path(), "zebra-", &mut found);
    assert!(found.is_empty(), "in the clear: {found:?}");
}
