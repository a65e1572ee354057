//! Quotas, rules, devices and volumes as a user meets them: the real binary and real processes. Needs root and cgroups.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use optimus_tests::harness::*;

/// A sandbox whose node has a label and two devices, of which a file with the numbers of `/dev/full` is one.
fn with_devices() -> Sandbox {
    let mut sandbox = Sandbox::new();
    fs::set_permissions(sandbox.dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
    let dir = sandbox.path("devices");
    fs::create_dir(&dir).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
    for (name, minor) in [("acme0", 7), ("acme1", 5)] {
        let path = std::ffi::CString::new(dir.join(name).to_str().unwrap()).unwrap();
        // SAFETY: a path and numbers.
        let made = unsafe { libc::mknod(path.as_ptr(), libc::S_IFCHR | 0o666, libc::makedev(1, minor)) };
        assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o666)).unwrap();
    }
    let paths = serde_json::json!({"0": [dir.join("acme0")], "1": [dir.join("acme1")]});
    let groups = serde_json::json!([{"vendor": "acme", "type": "fpga", "name": "x1", "ids": ["0", "1"], "paths": paths}]);
    fs::write(dir.join("groups.json"), groups.to_string()).unwrap();
    let agent = sandbox.path("dev/agent");
    fs::create_dir_all(&agent).unwrap();
    let said = dir.join("groups.json");
    fs::write(agent.join("node.toml"), format!("labels = {{ zone = \"a\" }}\ndevices = [[\"cat\", {said:?}]]\n")).unwrap();
    dev(&mut sandbox);
    sandbox
}

/// Starts the cluster, and waits until its servers have agreed on what they all understand.
fn dev(sandbox: &mut Sandbox) {
    sandbox.dev(&[]);
    wait_for("the cluster takes quotas", || (sandbox.run(&["quota", "set", "other", "--copies", "1"]).code == 0).then_some(()));
}

fn deploy(sandbox: &Sandbox, name: &str, lines: &str, more: &[&str]) -> Said {
    let file = format!("name = {name:?}\nproject = \"shop\"\nmemory = \"16M..32M\"\ncpu = 0.1\n{lines}\n");
    let dir = sandbox.project(name, &[("optimus.toml", &file)]).display().to_string();
    let mut args = vec!["deploy", &dir, "--env", "prod"];
    args.extend_from_slice(more);
    sandbox.run(&args)
}

fn opener(device: &Path) -> String {
    let opens = format!("if (exec 3<{}) 2>/dev/null; then echo it opens; else echo it is refused; fi", device.display());
    format!("run = {:?}", format!("{opens}; echo told ${{OPTIMUS_DEVICE_FPGA:-nothing}}; exec sleep 600"))
}

fn logs_with(sandbox: &Sandbox, workload: &str, wanted: &str) -> String {
    wait_for(&format!("{wanted:?} of {workload}"), || {
        let logs = sandbox.run(&["logs", workload]).stdout;
        logs.contains(wanted).then_some(logs)
    })
}

#[test]
fn a_copy_over_its_quota_waits_and_is_told_by_how_much() {
    let mut sandbox = Sandbox::new();
    dev(&mut sandbox);
    sandbox.run(&["quota", "set", "shop/prod", "--copies", "2", "--memory", "1G"]).expect(0);
    deploy(&sandbox, "web", "run = \"exec sleep 600\"\ncopies = 3", &["--no-wait"]).expect(0);
    let explain = wait_for("the reason", || {
        let said = sandbox.run(&["explain", "web"]).all();
        said.contains("quota of shop/prod").then_some(said)
    });
    assert!(explain.contains("1 copies asked") || explain.contains("0 left") || explain.contains("copies"), "{explain}");
    wait_for("two copies run", || (sandbox.copies("web").len() == 2).then_some(()));
    let quota = sandbox.run(&["quota", "show", "shop/prod"]).expect(0).stdout;
    assert!(quota.contains("2 of 2 reserved") && quota.contains("32 MiB of 1 GiB reserved"), "{quota}");
    sandbox.run(&["quota", "set", "shop/prod", "--copies", "3"]).expect(0);
    sandbox.ready_copies("web", 3);
}

#[test]
fn a_rule_that_no_node_meets_is_told_node_by_node() {
    let sandbox = with_devices();
    deploy(&sandbox, "web", "run = \"exec sleep 600\"\nconstraints = [\"label.zone = b\"]", &["--no-wait"]).expect(0);
    let node = sandbox.run(&["nodes", "--json"]).expect(0).json()["items"][0]["name"].as_str().unwrap().to_owned();
    let explain = wait_for("the reason", || {
        let said = sandbox.run(&["explain", "web"]).all();
        said.contains("label.zone = b").then_some(said)
    });
    assert!(explain.contains(&format!("could not run on {node}")), "{explain}");
    sandbox.run(&["nodes", "label", &node, "zone=b"]).expect(0);
    sandbox.ready_copies("web", 1);
}

#[test]
fn a_device_is_given_to_who_asks_and_kept_from_who_does_not() {
    let sandbox = with_devices();
    let device = sandbox.path("devices/acme0");
    deploy(&sandbox, "with", &format!("{}\ndevices = [\"acme/fpga\"]", opener(&device)), &[]).expect(0);
    deploy(&sandbox, "without", &opener(&device), &[]).expect(0);
    let with = logs_with(&sandbox, "with", "told");
    assert!(with.contains("it opens") && with.contains(&format!("told {}", device.display())), "{with}");
    let without = logs_with(&sandbox, "without", "told");
    assert!(without.contains("it is refused") && without.contains("told nothing"), "{without}");
    let node = sandbox.run(&["nodes", "--json"]).expect(0).json()["items"][0]["name"].as_str().unwrap().to_owned();
    let shown = sandbox.run(&["node", "show", &node]).expect(0).stdout;
    assert!(shown.contains("acme/fpga/x1 0 held by shop/prod/with-0") && shown.contains("acme/fpga/x1 1 free"), "{shown}");
    let third = deploy(&sandbox, "greedy", "run = \"exec sleep 600\"\ndevices = [\"2 acme/fpga\"]", &["--no-wait"]).expect(0);
    drop(third);
    wait_for("why it waits", || {
        let said = sandbox.run(&["explain", "greedy"]).all();
        said.contains("acme/fpga").then_some(said)
    });
}

#[test]
fn a_volume_outlives_its_copies_and_is_removed_only_by_hand() {
    let sandbox = with_devices();
    let node = sandbox.run(&["nodes", "--json"]).expect(0).json()["items"][0]["name"].as_str().unwrap().to_owned();
    sandbox.run(&["volume", "create", "shop/prod/data", "--node", &node]).expect(0);
    let target = sandbox.path("seen");
    let lines = format!(
        "run = {:?}\nvolumes = [\"data at {}\"]",
        format!("echo x >> {t}/runs; echo runs $(wc -l < {t}/runs); exec sleep 600", t = target.display()),
        target.display()
    );
    deploy(&sandbox, "db", &lines, &[]).expect(0);
    logs_with(&sandbox, "db", "runs 1");
    let refused = sandbox.run(&["volume", "rm", "shop/prod/data", "--yes"]);
    assert!(refused.code != 0 && refused.stderr.contains("used by shop/prod/db-0"), "{}", refused.stderr);
    sandbox.run(&["rm", "db", "--yes"]).expect(0);
    wait_for("the copy to end", || sandbox.copies("db").is_empty().then_some(()));
    assert!(sandbox.run(&["volume", "ls", "--orphans"]).expect(0).stdout.contains("shop/prod/data"));
    deploy(&sandbox, "db", &lines, &[]).expect(0);
    logs_with(&sandbox, "db", "runs 2");
    sandbox.run(&["rm", "db", "--yes"]).expect(0);
    wait_for("the volume to be removed", || (sandbox.run(&["volume", "rm", "shop/prod/data", "--yes"]).code == 0).then_some(()));
    assert!(sandbox.path("dev/agent/volumes/shop/prod/data/runs").exists(), "its files stay");
}
