//! Devices are given to the copy that asked and to no other, as the kernel sees it. Needs root.
//!
//! Device files made here stand in: what opens `c 1:7` under another path is refused as a GPU would be.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use optimus_agent::isolation::DeviceNode;
use optimus_agent::isolation::devices::attach;
use optimus_agent::testing::desired;
use optimus_common::protocol::Phase;
use optimus_common::reason::Reason;
use optimus_common::spec::{GivenDevice, WorkloadSpec};
use support::{Node, shell, until};

/// A device file with the numbers of `/dev/full` or `/dev/zero`.
fn make_node(path: &Path, minor: u32) {
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: a path and numbers.
    let made = unsafe { libc::mknod(name.as_ptr(), libc::S_IFCHR | 0o666, libc::makedev(1, minor)) };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
}

/// A node whose plug-in offers two devices, `a` and `b`.
fn node_with_devices() -> (Node, PathBuf) {
    let mut dir = PathBuf::new();
    let node = Node::with(|config| {
        fs::create_dir_all(&config.data_dir).unwrap();
        dir = config.data_dir.parent().unwrap().join("dev");
        fs::create_dir(&dir).unwrap();
        make_node(&dir.join("acme0"), 7);
        make_node(&dir.join("acme1"), 5);
        let paths = serde_json::json!({"a": [dir.join("acme0")], "b": [dir.join("acme1")]});
        let groups = serde_json::json!([{"vendor": "acme", "type": "fpga", "name": "x1", "ids": ["a", "b"], "paths": paths}]);
        let said = dir.join("groups.json");
        fs::write(&said, groups.to_string()).unwrap();
        fs::write(config.data_dir.join("node.toml"), format!("devices = [[\"cat\", {said:?}]]\n")).unwrap();
    });
    (node, dir)
}

fn given(id: &str, spec: WorkloadSpec) -> WorkloadSpec {
    let mut spec = spec;
    spec.placement.given = vec![GivenDevice { kind: "acme/fpga/x1".into(), id: id.into() }];
    spec
}

/// Says of each device whether it can be opened, and which it was told of.
fn opener(dir: &Path) -> WorkloadSpec {
    let opens = |name: &str| {
        let path = dir.join(name);
        format!("if (exec 3<{p}) 2>/dev/null; then echo {name} opens; else echo {name} refused; fi", p = path.display())
    };
    shell(&format!("{}; {}; echo told $OPTIMUS_DEVICE_FPGA; exec sleep 600", opens("acme0"), opens("acme1")))
}

#[test]
fn a_device_is_opened_by_who_was_given_it_and_by_nobody_else() {
    let (mut node, dir) = node_with_devices();
    let offered = node.workloads().facts().devices;
    assert_eq!((offered.len(), offered[0].ids.len()), (1, 2));
    let (with_a, with_b, without) =
        (desired(1, &given("a", opener(&dir))), desired(2, &given("b", opener(&dir))), desired(3, &opener(&dir)));
    node.want([with_a.clone(), with_b.clone(), without.clone()]);
    for (alloc, wanted) in [
        (&with_a, vec!["acme0 opens".to_owned(), "acme1 refused".into(), format!("told {}", dir.join("acme0").display())]),
        (&with_b, vec!["acme0 refused".into(), "acme1 opens".into(), format!("told {}", dir.join("acme1").display())]),
        (&without, vec!["acme0 refused".into(), "acme1 refused".into(), "told".into()]),
    ] {
        node.until(alloc.id, "running", |s| s.phase == Phase::Running);
        let said = until("it says all", || Some(node.logs(alloc.id, None)).filter(|lines| lines.len() >= 3));
        assert_eq!(said.iter().map(|line| line.trim().to_owned()).collect::<Vec<_>>(), wanted);
    }
}

#[test]
fn a_new_agent_leaves_devices_as_they_were_given() {
    let (mut node, dir) = node_with_devices();
    let line = format!("while sleep 0.05; do (exec 3<{}) 2>/dev/null && echo opens || echo refused; done", dir.join("acme1").display());
    let alloc = desired(1, &given("a", shell(&line)));
    node.want([alloc.clone()]);
    node.until(alloc.id, "running", |s| s.phase == Phase::Running);
    node.die();
    node.start();
    let before = node.logs(alloc.id, None).len();
    let said = until("it goes on", || Some(node.logs(alloc.id, None)).filter(|lines| lines.len() > before + 2));
    assert!(said.iter().all(|line| line == "refused"), "{said:?}");
}

#[test]
fn a_device_that_is_not_there_refuses_the_start_and_says_so() {
    let (mut node, dir) = node_with_devices();
    let alloc = desired(1, &given("z", opener(&dir)));
    node.want([alloc.clone()]);
    let status = node.until(alloc.id, "refused", |s| s.reason.as_ref().is_some_and(|r| matches!(r.root(), Reason::StartFailed { .. })));
    assert!(status.reason.unwrap().to_string().contains("acme/fpga/x1 z"));
}

/// The way of v2, on whatever v2 tree this host has: a hybrid one will do.
#[test]
fn the_device_program_of_v2_refuses_what_it_was_made_for() {
    let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from);
    let root = roots.into_iter().find(|root| root.join("cgroup.procs").exists() && root.join("cgroup.controllers").exists());
    let group = root.expect("a v2 tree: this host has none").join(format!("optimus-test-devices-{}", std::process::id()));
    fs::create_dir(&group).unwrap();
    let files = tempfile::tempdir().unwrap();
    make_node(&files.path().join("full"), 7);
    make_node(&files.path().join("zero"), 5);
    let attached = attach(&group, &[DeviceNode { block: false, major: 1, minor: 7 }]);
    let opens = |name: &str| {
        let procs = std::ffi::CString::new(group.join("cgroup.procs").to_str().unwrap()).unwrap();
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg("exec 3<\"$0\"").arg(files.path().join(name)).stderr(std::process::Stdio::null());
        // SAFETY: plain system calls on memory made before the fork.
        unsafe {
            command.pre_exec(move || {
                let fd = libc::open(procs.as_ptr(), libc::O_WRONLY);
                if fd < 0 || libc::write(fd, c"0".as_ptr().cast(), 1) != 1 {
                    return Err(std::io::Error::last_os_error());
                }
                libc::close(fd);
                Ok(())
            });
        }
        command.status().map(|status| status.success())
    };
    let answers = (opens("full").ok(), opens("zero").ok());
    until("the group is empty", || fs::remove_dir(&group).ok());
    attached.unwrap();
    assert_eq!(answers, (Some(false), Some(true)));
    // Outside of the group nothing has changed.
    let mut one = [1u8];
    fs::File::open(files.path().join("full")).unwrap().read_exact(&mut one).unwrap();
    assert_eq!(one, [0]);
}
