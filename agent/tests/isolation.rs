//! Control groups and the runner as the kernel sees them, on v1 or v2, whichever this host has. `scripts/v2-guest`
//! runs this same binary in a guest with v2. Needs root; no files but itself and the runner.
#![allow(clippy::unwrap_used)]

mod program;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use optimus_agent::isolation::{CgroupRoot, Group, Limits, Version, detect};
use optimus_runner::{End, ExitRecord, Request, RunRecord, SOCKET, StartFile};

const MIB: u64 = 1 << 20;
/// Nothing here takes near so long; the machine may be busy, or emulated.
const DEADLINE: Duration = Duration::from_secs(60);

/// An owner directory of our own; gone with all in it at the end, also after a panic.
struct Owner {
    name: String,
    root: CgroupRoot,
}

impl Owner {
    fn new() -> Owner {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("optimus-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let root = CgroupRoot::open(&name).unwrap();
        Owner { name, root }
    }
    fn version(&self) -> Version {
        if self.root.name() == "v2" { Version::V2 } else { Version::V1 }
    }
    /// The directories of the owner that exist, in all trees.
    fn dirs(&self) -> Vec<PathBuf> {
        let mut roots = vec![PathBuf::from("/sys/fs/cgroup")];
        roots.extend(fs::read_dir("/sys/fs/cgroup").unwrap().map(|e| e.unwrap().path()));
        roots.into_iter().map(|r| r.join(&self.name)).filter(|d| d.is_dir()).collect()
    }
    /// Names of groups in any tree.
    fn groups(&self) -> BTreeSet<String> {
        let entries = self.dirs().into_iter().flat_map(|d| fs::read_dir(d).unwrap()).map(Result::unwrap);
        entries.filter(|e| e.path().is_dir()).map(|e| e.file_name().into_string().unwrap()).collect()
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.root.sweep(&BTreeSet::new());
        let removed = self.root.clone().remove();
        if !std::thread::panicking() {
            removed.unwrap();
            assert_eq!(self.dirs(), Vec::<PathBuf>::new());
        }
    }
}

/// A program under a runner in a group.
struct Run {
    dir: tempfile::TempDir,
    runner: Child,
}

impl Run {
    fn start(group: &Group, what: &str, memory_limit: Option<u64>) -> Run {
        let dir = tempfile::tempdir().unwrap();
        let start = StartFile {
            attempt: 1,
            argv: vec![std::env::current_exe().unwrap().to_str().unwrap().to_owned()],
            env: vec![(program::VARIABLE.into(), what.into())],
            cwd: "/".into(),
            cgroup_procs: group.procs_files(),
            cgroup_kill: group.kill_file(),
            cgroup_freezer: group.freezer_file(),
            oom_file: group.oom_file(),
            peak_file: group.peak_file(),
            memory_limit,
            log_segment: MIB,
            log_segments: 2,
            umask: 0o22,
            ..StartFile::default()
        };
        start.write(dir.path()).unwrap();
        let runner = Command::new(runner()).arg(dir.path()).stdout(Stdio::null()).spawn().unwrap();
        Run { dir, runner }
    }
    fn pid(&self) -> u32 {
        until("it runs", || RunRecord::read(self.dir.path()).unwrap()).pid
    }
    fn exit(&self) -> ExitRecord {
        until("it ends", || ExitRecord::read(self.dir.path()).unwrap())
    }
    fn ask(&self, request: Request) {
        UnixStream::connect(self.dir.path().join(SOCKET)).unwrap().write_all(request.encode().as_bytes()).unwrap();
    }
    fn output(&self) -> String {
        fs::read_to_string(self.dir.path().join("log.0")).unwrap_or_default()
    }
    fn says(&self, text: &str) {
        until(text, || self.output().contains(text).then_some(()));
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.runner.kill();
        let _ = self.runner.wait();
    }
}

fn runner() -> PathBuf {
    let path = std::env::var_os("OPTIMUS_RUNNER")
        .map(PathBuf::from)
        .unwrap_or_else(|| std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("optimus-runner"));
    assert!(path.exists(), "{} is missing: build the workspace first", path.display());
    path
}

/// Polls until there is an answer, with a deadline.
fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What a file of the group says, by its name on either version.
fn kernel(group: &Group, v1: &str, v2: &str) -> String {
    let found = group.procs_files().iter().find_map(|procs| {
        let dir = procs.parent().unwrap();
        [v1, v2].iter().filter(|n| !n.is_empty()).find_map(|name| fs::read_to_string(dir.join(name)).ok())
    });
    found.unwrap_or_else(|| panic!("neither {v1} nor {v2}")).trim().to_owned()
}

fn gone(pid: u32) -> bool {
    optimus_runner::start_time(pid).is_none_or(|(_, state)| state == 'Z' || state == 'X')
}

#[test]
fn this_host_has_control_groups_and_says_which() {
    let owner = Owner::new();
    println!("cgroups: {} ({:?})", owner.root.name(), detect());
    assert_eq!(owner.root.missing(), Vec::<String>::new());
    if let Ok(expected) = std::env::var("OPTIMUS_EXPECT_CGROUP") {
        assert_eq!(owner.root.name(), expected);
    }
}

#[test]
fn limits_are_in_the_kernel_and_follow_a_resize_up_and_down() {
    let owner = Owner::new();
    let limits = |cpu, limit, request, pids| Limits {
        cpu_millicores: Some(cpu),
        memory_limit: Some(limit),
        memory_request: Some(request),
        pids: Some(pids),
    };
    let first = limits(500, 64 * MIB, 32 * MIB, 100);
    let group = owner.root.create("resized", &first).unwrap();
    let run = Run::start(&group, "sleep", None);
    let pid = run.pid();
    for wanted in [first, limits(1500, 256 * MIB, 64 * MIB, 300), limits(100, 32 * MIB, 16 * MIB, 20)] {
        group.resize(&wanted).unwrap();
        assert_eq!(group.read_back(), wanted);
        // And not only by our own reading.
        let Limits { cpu_millicores: Some(cpu), memory_limit: Some(limit), memory_request: Some(request), pids: Some(pids) } = wanted
        else {
            unreachable!()
        };
        let quota = cpu * 100;
        match owner.version() {
            Version::V1 => {
                assert_eq!(kernel(&group, "cpu.cfs_quota_us", ""), quota.to_string());
                assert_eq!(kernel(&group, "cpu.cfs_period_us", ""), "100000");
                assert_eq!(kernel(&group, "cpu.shares", ""), (cpu * 1024 / 1000).to_string());
            }
            Version::V2 => {
                assert_eq!(kernel(&group, "", "cpu.max"), format!("{quota} 100000"));
                assert_eq!(kernel(&group, "", "cpu.weight"), (cpu / 10).to_string());
                assert_eq!(kernel(&group, "", "memory.oom.group"), "1");
            }
        }
        assert_eq!(kernel(&group, "memory.limit_in_bytes", "memory.max"), limit.to_string());
        assert_eq!(kernel(&group, "memory.soft_limit_in_bytes", "memory.low"), request.to_string());
        assert_eq!(kernel(&group, "pids.max", "pids.max"), pids.to_string());
    }
    assert_eq!(run.pid(), pid);
    assert!(!gone(pid), "a resize leaves the process alone");
    assert!(group.pids().contains(&pid));
}

#[test]
fn a_limit_below_what_is_in_use_is_refused_and_the_old_one_stays() {
    let owner = Owner::new();
    let before = Limits { memory_limit: Some(128 * MIB), ..Limits::default() };
    let group = owner.root.create("in-use", &before).unwrap();
    let run = Run::start(&group, "hog 67108864", None);
    run.says("holding 64 MiB");
    let error = group.resize(&Limits { memory_limit: Some(16 * MIB), ..Limits::default() }).unwrap_err();
    println!("{error}");
    let file = if owner.version() == Version::V1 { "memory.limit_in_bytes" } else { "memory.max" };
    assert!(error.to_string().contains(file) && error.to_string().contains("16777216"), "{error}");
    assert_eq!(group.read_back().memory_limit, Some(128 * MIB));
    if owner.version() == Version::V2 {
        assert_eq!(kernel(&group, "", "memory.high"), "max");
    }
    assert!(!gone(run.pid()), "the process lives on");
    assert_eq!(group.usage().unwrap().oom_kills, 0);
    // All or nothing: the memory would have been taken, the pids are not.
    let limits = Limits { memory_limit: Some(256 * MIB), pids: Some(5_000_000), ..Limits::default() };
    group.resize(&limits).unwrap_err();
    assert_eq!(group.read_back().memory_limit, Some(128 * MIB));
}

#[test]
fn a_limit_the_kernel_refuses_is_an_error_that_names_it_and_leaves_nothing() {
    let owner = Owner::new();
    let limits = Limits { cpu_millicores: Some(500), memory_limit: Some(64 * MIB), memory_request: None, pids: Some(5_000_000) };
    let error = owner.root.create("refused", &limits).unwrap_err();
    let text = error.to_string();
    println!("{text}");
    for part in ["pids.max", "5000000", " max"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(error.what(), "the pids limit");
    assert_eq!(owner.groups(), BTreeSet::new());
    // More than a signed number holds is no limit at all; it must not become "unlimited".
    let error = owner.root.create("huge", &Limits { memory_limit: Some(u64::MAX), ..Limits::default() }).unwrap_err();
    println!("{error}");
    assert_eq!(owner.groups(), BTreeSet::new());
}

#[test]
fn a_memory_hog_is_killed_and_told_as_out_of_memory() {
    let owner = Owner::new();
    let limit = 64 * MIB;
    let group = owner.root.create("hog", &Limits { memory_limit: Some(limit), ..Limits::default() }).unwrap();
    let run = Run::start(&group, "hog 1073741824", Some(limit));
    let exit = run.exit();
    let End::Exited { code: None, signal: Some(libc::SIGKILL), oom_kills: 1, peak: Some(peak), limit: Some(told), .. } = exit.end else {
        panic!("{exit:?}")
    };
    println!("killed at a peak of {peak} of {told}");
    assert_eq!(told, limit);
    assert!((limit * 9 / 10..=limit).contains(&peak), "{peak}");
    let usage = group.usage().unwrap();
    assert_eq!((usage.oom_kills, usage.memory_peak), (1, peak));
    // Killed by somebody is not out of memory, in the same group.
    let run = Run::start(&group, "sleep", Some(limit));
    run.pid();
    run.ask(Request::Kill);
    let exit = run.exit();
    assert!(matches!(exit.end, End::Exited { signal: Some(libc::SIGKILL), oom_kills: 0, .. }), "{exit:?}");
}

#[test]
fn out_of_memory_in_a_child_is_counted_and_ends_what_the_version_ends() {
    let owner = Owner::new();
    let limit = 64 * MIB;
    let group = owner.root.create("child", &Limits { memory_limit: Some(limit), ..Limits::default() }).unwrap();
    let run = Run::start(&group, "child-hog 1073741824", Some(limit));
    let exit = run.exit();
    match (owner.version(), &exit.end) {
        // v1 kills the child alone; the main process has the last word.
        (Version::V1, End::Exited { code: Some(0), signal: None, oom_kills: 1, .. }) => {
            assert!(run.output().contains("child ended by signal 9"), "{}", run.output());
        }
        // v2 is told to kill the group as a whole: each process is counted.
        (Version::V2, End::Exited { code: None, signal: Some(libc::SIGKILL), oom_kills: 2, .. }) => {}
        _ => panic!("{exit:?}"),
    }
}

#[test]
fn half_a_core_is_half_a_core() {
    let owner = Owner::new();
    let group = owner.root.create("burner", &Limits { cpu_millicores: Some(500), ..Limits::default() }).unwrap();
    // The quota is measured here, not the weight: nobody else on this machine shall hold it back.
    for dir in owner.dirs().into_iter().flat_map(|d| [d.join("burner"), d]) {
        for (file, most) in [("cpu.shares", "262144"), ("cpu.weight", "10000")] {
            if dir.join(file).exists() {
                fs::write(dir.join(file), most).unwrap();
            }
        }
    }
    let run = Run::start(&group, "burn 2", None);
    run.pid();
    until("it burns", || (group.usage().unwrap().cpu_usec > 200_000).then_some(()));
    let (before, begun) = (group.usage().unwrap(), Instant::now());
    // A measurement, not a wait for something.
    std::thread::sleep(Duration::from_secs(10));
    let (after, elapsed) = (group.usage().unwrap(), begun.elapsed());
    let cores = (after.cpu_usec - before.cpu_usec) as f64 / elapsed.as_micros() as f64;
    let periods = after.throttled - before.throttled;
    println!(
        "cpu 0.5: {cores:.4} cores over {elapsed:?}, throttled in {periods} periods for {} ms",
        (after.throttled_usec - before.throttled_usec) / 1000
    );
    assert!((0.45..=0.55).contains(&cores), "{cores}");
    assert!(periods >= 80, "two threads want more in nearly all of 100 periods: {periods}");
    assert!(after.throttled_usec > before.throttled_usec);
}

#[test]
fn a_fork_bomb_is_contained_and_killed() {
    let owner = Owner::new();
    let group = owner.root.create("bomb", &Limits { cpu_millicores: Some(1000), pids: Some(64), ..Limits::default() }).unwrap();
    let run = Run::start(&group, "bomb", None);
    run.says("fork refused");
    until("it is full", || (group.usage().unwrap().pids == 64).then_some(()));
    for _ in 0..50 {
        assert!(group.usage().unwrap().pids <= 64);
    }
    let begun = Instant::now();
    run.ask(Request::Kill);
    let exit = run.exit();
    println!("64 processes that fork were gone after {:?}", begun.elapsed());
    assert!(matches!(exit.end, End::Exited { signal: Some(libc::SIGKILL), oom_kills: 0, .. }), "{exit:?}");
    assert_eq!(group.pids(), Vec::<u32>::new());
    group.delete().unwrap();
}

#[test]
fn killing_a_group_reaches_who_left_its_session() {
    let owner = Owner::new();
    let group = owner.root.create("escape", &Limits { pids: Some(100), ..Limits::default() }).unwrap();
    let run = Run::start(&group, "escape 10", None);
    run.says("escaped");
    let pids = until("all are there", || Some(group.pids()).filter(|p| p.len() == 11));
    let begun = Instant::now();
    assert!(group.kill_all());
    println!("11 processes gone after {:?}", begun.elapsed());
    assert!(pids.iter().all(|&pid| gone(pid)), "{pids:?}");
    group.delete().unwrap();
    assert_eq!(owner.groups(), BTreeSet::new());
    run.exit();
}

#[test]
fn killing_a_group_reaches_a_fork_bomb_a_comet_and_who_lost_its_first_thread() {
    for (what, says) in [("bomb", "fork refused"), ("comet 1000000", "flying"), ("headless", "headless")] {
        let owner = Owner::new();
        let group = owner.root.create("stubborn", &Limits { pids: Some(50), ..Limits::default() }).unwrap();
        let run = Run::start(&group, what, None);
        run.says(says);
        assert!(group.kill_all(), "{what}: {:?}", group.pids());
        // The dead are counted until their parent has looked.
        until("the last is buried", || (group.usage().unwrap().pids == 0).then_some(()));
        group.delete().unwrap();
        run.exit();
    }
}

#[test]
fn the_end_of_the_main_process_is_the_end_of_its_group() {
    let owner = Owner::new();
    let group = owner.root.create("orphans", &Limits { pids: Some(100), ..Limits::default() }).unwrap();
    let run = Run::start(&group, "escape 5", None);
    run.says("escaped");
    let pids = until("all are there", || Some(group.pids()).filter(|p| p.len() == 6));
    rustix::process::kill_process(rustix::process::Pid::from_raw(run.pid() as i32).unwrap(), rustix::process::Signal::TERM).unwrap();
    let exit = run.exit();
    assert!(matches!(exit.end, End::Exited { signal: Some(libc::SIGTERM), .. }), "{exit:?}");
    assert!(pids.iter().all(|&pid| gone(pid)), "when the exit is told, all of them are gone");
    group.delete().unwrap();
}

#[test]
fn groups_made_below_a_group_are_killed_and_removed_with_it() {
    let owner = Owner::new();
    let group = owner.root.create("outer", &Limits { pids: Some(100), ..Limits::default() }).unwrap();
    let run = Run::start(&group, "sleep", None);
    let pid = run.pid();
    // What a workload that is root may do: a group of its own below ours, and it moves there.
    for procs in group.procs_files() {
        let inner = procs.parent().unwrap().join("inner/most");
        fs::create_dir_all(&inner).unwrap();
        fs::write(inner.join("cgroup.procs"), pid.to_string()).unwrap();
    }
    assert!(group.pids().contains(&pid));
    run.ask(Request::Kill);
    run.exit();
    assert!(gone(pid));
    assert!(group.kill_all());
    group.delete().unwrap();
    assert_eq!(owner.groups(), BTreeSet::new());
}

#[test]
fn a_sweep_removes_what_is_not_kept_and_nothing_else() {
    let owner = Owner::new();
    let create = |name: &str| owner.root.create(name, &Limits { pids: Some(10), ..Limits::default() }).unwrap();
    let groups: Vec<Group> = ["kept", "leaked", "empty"].map(create).into();
    let runs: Vec<Run> = groups[..2].iter().map(|group| Run::start(group, "sleep", None)).collect();
    let pids: Vec<u32> = runs.iter().map(Run::pid).collect();
    let keep = BTreeSet::from(["kept".to_owned()]);
    assert_eq!(owner.root.sweep(&keep), ["empty", "leaked"]);
    assert_eq!(owner.groups(), keep);
    assert!(gone(pids[1]) && !gone(pids[0]));
    assert!(owner.root.open_group("kept").is_some() && owner.root.open_group("leaked").is_none());
    assert_eq!(owner.root.sweep(&keep), Vec::<String>::new());
}

#[test]
fn a_frozen_group_stands_still_and_goes_on() {
    let owner = Owner::new();
    let group = owner.root.create("frozen", &Limits { cpu_millicores: Some(500), ..Limits::default() }).unwrap();
    let run = Run::start(&group, "burn 1", None);
    run.pid();
    let used = |group: &Group| group.usage().unwrap().cpu_usec;
    until("it burns", || (used(&group) > 20_000).then_some(()));
    group.freeze(true);
    until("it is frozen", || {
        let state = kernel(&group, "freezer.state", "cgroup.events");
        (state == "FROZEN" || state.contains("frozen 1")).then_some(())
    });
    let before = used(&group);
    // A measurement: it would burn 100 ms of this.
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(used(&group), before);
    group.freeze(false);
    until("it burns again", || (used(&group) > before + 20_000).then_some(()));
    // Frozen is no shelter.
    group.freeze(true);
    assert!(group.kill_all());
    group.delete().unwrap();
    run.exit();
}

#[test]
fn a_group_that_is_not_there_enters_nobody() {
    let owner = Owner::new();
    let group = owner.root.create("deleted", &Limits::default()).unwrap();
    let first = group.procs_files()[0].clone();
    let dir = Path::new(&first).parent().unwrap().to_owned();
    group.delete().unwrap();
    assert!(!dir.exists());
    let run = Run::start(&group, "sleep", None);
    let exit = run.exit();
    let End::NotStarted { step: optimus_runner::Step::Cgroup, errno: libc::ENOENT, detail } = exit.end else { panic!("{exit:?}") };
    assert_eq!(Path::new(&detail), first);
}
