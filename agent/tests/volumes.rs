//! Volumes as processes see them: at their path, their own, and still there for the next copy. Needs root.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use optimus_agent::testing::desired;
use optimus_common::protocol::Phase;
use optimus_common::reason::Reason;
use optimus_common::spec::{VolumeMount, WorkloadSpec};
use support::{Node, shell, until};

/// A workload that sees volume `data` at `target`.
fn with_volume(line: &str, target: &Path) -> WorkloadSpec {
    let mut spec = shell(line);
    spec.placement.volumes = vec!["data".parse().unwrap()];
    spec.placement.mounts = vec![VolumeMount { volume: "data".parse().unwrap(), path: target.display().to_string() }];
    spec
}

#[test]
fn what_one_copy_wrote_the_next_one_finds_at_its_path() {
    let mut node = Node::new();
    let target = node.dir.path().join("seen/here");
    let line = format!("echo at $OPTIMUS_VOLUME_DATA; echo $$ >> {t}/runs; wc -l < {t}/runs; exec sleep 600", t = target.display());
    for run in 1..=2u128 {
        // Another copy, of another release.
        let alloc = optimus_common::protocol::DesiredAlloc { release: run as u64, ..desired(run, &with_volume(&line, &target)) };
        node.want([alloc.clone()]);
        node.until(alloc.id, "running", |s| s.phase == Phase::Running);
        let said = until("it says both", || Some(node.logs(alloc.id, None)).filter(|lines| lines.len() >= 2));
        assert_eq!(said, [format!("at {}", target.display()), run.to_string()]);
        node.stop(alloc.id);
        node.until(alloc.id, "stopped", |s| s.phase.is_terminal());
        node.drop_all();
    }
    // The files are in the node's volume; where the copies saw them is an empty directory for everybody else.
    let kept = node.config.data_dir.join("volumes/p/dev/data");
    assert_eq!(fs::read_to_string(kept.join("runs")).unwrap().lines().count(), 2);
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(target.to_str().unwrap()), "the host does not see the mount");
}

#[test]
fn a_volume_belongs_to_the_user_of_its_workload() {
    let mut node = Node::with(|config| config.workload_user = Some("nobody".into()));
    // Its user must be able to pass through.
    for dir in [node.dir.path().to_owned(), node.config.data_dir.clone(), node.config.data_dir.join("allocs")] {
        fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    }
    let target = node.dir.path().join("seen");
    let alloc = desired(1, &with_volume(&format!("cd {t} && id -un > who && echo done; exec sleep 600", t = target.display()), &target));
    node.want([alloc.clone()]);
    until("it has written", || node.logs(alloc.id, None).iter().any(|line| line == "done").then_some(()));
    let kept = node.config.data_dir.join("volumes/p/dev/data");
    assert_eq!(fs::read_to_string(kept.join("who")).unwrap(), "nobody\n");
    let (dir, file) = (fs::metadata(&kept).unwrap(), fs::metadata(kept.join("who")).unwrap());
    assert_eq!((dir.uid(), dir.mode() & 0o777), (file.uid(), 0o700));
    assert_ne!(dir.uid(), 0);
}

#[test]
fn a_path_that_cannot_be_mounted_on_refuses_the_start() {
    let mut node = Node::new();
    let target = node.dir.path().join("file");
    fs::write(&target, "").unwrap();
    let alloc = desired(1, &with_volume("exec sleep 600", &target));
    node.want([alloc.clone()]);
    let status = node.until(alloc.id, "refused", |s| s.reason.as_ref().is_some_and(|r| matches!(r.root(), Reason::StartFailed { .. })));
    let why = status.reason.unwrap().to_string();
    assert!(why.contains("it is no directory") && why.contains(target.to_str().unwrap()), "{why}");
}
