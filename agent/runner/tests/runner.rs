//! The runner with real processes: ends, killing, records, what the program is started with. See `output.rs` for logs.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use optimus_runner::{End, ExitRecord, Request, SOCKET, StartFile, Status, Step, User, start_time};
use support::{Run, code_of, command, descendants, gone, leak_descriptors, proc_number, program, runner_command, shell, signal_of, until};

#[test]
fn a_program_that_ignores_the_stop_is_killed_after_the_grace_with_all_it_has_started() {
    let mut run = Run::start(&program("stubborn 5"));
    run.says("escaped");
    // The program, a child, five that left its session; those between are dying.
    let pids = until("all are there", || {
        let pids = descendants(run.runner.id());
        (pids.iter().filter(|&&pid| !gone(pid)).count() == 7).then_some(pids)
    });
    let begun = Instant::now();
    run.stop(Duration::from_millis(300));
    let exit = run.ended();
    assert!(begun.elapsed() >= Duration::from_millis(300), "not before the grace is over");
    assert_eq!((signal_of(&exit), code_of(&exit)), (Some(libc::SIGKILL), None));
    assert!(pids.iter().all(|&pid| gone(pid)), "{pids:?}");
}

#[test]
fn a_program_that_obeys_leaves_at_once_and_its_detached_children_with_it() {
    let mut run = Run::start(&program("escape 5"));
    run.says("escaped");
    let pids = descendants(run.runner.id());
    let begun = Instant::now();
    run.stop(Duration::from_secs(50));
    let exit = run.ended();
    assert!(begun.elapsed() < Duration::from_secs(40));
    assert_eq!(signal_of(&exit), Some(libc::SIGTERM));
    assert!(pids.iter().all(|&pid| gone(pid)), "found as descendants, without cgroups");
}

#[test]
fn a_later_stop_brings_the_end_nearer_only() {
    let mut run = Run::start(&program("stubborn 0"));
    run.says("escaped");
    run.stop(Duration::from_millis(400));
    run.stop(Duration::from_secs(3600));
    run.stop(Duration::from_millis(u64::MAX));
    assert_eq!(signal_of(&run.ended()), Some(libc::SIGKILL));
}

#[test]
fn a_program_whose_first_thread_has_left_is_killed_all_the_same() {
    let mut run = Run::start(&program("headless"));
    run.says("headless");
    let pid = run.pid();
    until("its first thread is gone", || start_time(pid).filter(|(_, state)| *state == 'Z'));
    assert_eq!(run.ask(Request::Kill), "ok");
    assert_eq!(signal_of(&run.ended()), Some(libc::SIGKILL));
    assert_eq!(start_time(pid), None);
}

#[test]
fn a_stop_that_comes_while_it_starts_is_not_lost() {
    let mut run = Run::spawn(&program("stubborn 0"));
    let socket = run.dir.join(SOCKET);
    until("the socket", || socket.exists().then_some(()));
    // The socket is there before the program is; the answer comes when there is something to stop.
    until("it listens", || std::os::unix::net::UnixStream::connect(&socket).ok());
    assert_eq!(run.ask(Request::Kill), "ok");
    assert_eq!(run.word(), "started");
    assert_eq!(signal_of(&run.ended()), Some(libc::SIGKILL));
}

#[test]
fn the_program_dies_with_its_runner_also_under_another_user() {
    for user in [None, Some(User { uid: 65534, gid: 65534, groups: vec![] })] {
        let dir = tempfile::tempdir().unwrap();
        let me = dir.path().join("sleep");
        fs::copy("/bin/sleep", &me).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mut run = Run::start(&StartFile { user, ..command(&[me.to_str().unwrap(), "1000"]) });
        let pid = run.pid();
        assert!(!gone(pid));
        run.kill_runner();
        until("it dies", || gone(pid).then_some(()));
        assert_eq!(ExitRecord::read(&run.dir).unwrap(), None);
    }
}

#[test]
fn the_exit_is_kept_when_nobody_listens_and_tells_code_and_signal() {
    let mut run = Run::start(&shell("exit 7"));
    let exit = run.ended();
    assert_eq!((code_of(&exit), signal_of(&exit)), (Some(7), None));
    assert!(!run.dir.join(SOCKET).exists());
    // 137 is only a number.
    let mut run = Run::start(&shell("exit 137"));
    let exit = run.ended();
    assert!(matches!(exit.end, End::Exited { code: Some(137), signal: None, oom_kills: 0, .. }), "{exit:?}");
    let mut run = Run::start(&shell("kill -SEGV $$"));
    assert_eq!(signal_of(&run.ended()), Some(libc::SIGSEGV));
}

#[test]
fn out_of_memory_is_what_the_kernel_counted_in_this_run() {
    let dir = tempfile::tempdir().unwrap();
    let (events, peak) = (dir.path().join("memory.events"), dir.path().join("memory.peak"));
    fs::write(&events, "low 0\noom_kill_group 9\noom_kill 3\n").unwrap();
    fs::write(&peak, "12345\n").unwrap();
    let counted = format!("echo 'oom_kill 5' > {}; kill -9 $$", events.display());
    let start = StartFile { oom_file: Some(events), peak_file: Some(peak), memory_limit: Some(99), ..shell(&counted) };
    let exit = Run::start(&start).ended();
    let End::Exited { signal: Some(9), oom_kills: 2, peak: Some(12345), limit: Some(99), .. } = exit.end else { panic!("{exit:?}") };
}

#[test]
fn a_client_that_stays_is_told_of_the_end_after_it_is_written() {
    let mut run = Run::start(&shell("read x; sleep 0.05"));
    let mut client = run.connect();
    client.send(b"status\n");
    let status = Status::decode(&client.line()).unwrap();
    assert_eq!(status, Status { pid: run.pid(), attempt: 1, dropped_lines: 0 });
    assert_eq!(client.line(), "exit");
    assert!(ExitRecord::read(&run.dir).unwrap().is_some());
    assert_eq!(client.line(), "");
    run.ended();
}

#[test]
fn a_second_runner_on_the_same_directory_is_refused() {
    let mut run = Run::start(&program("sleep"));
    let second = runner_command(&run.dir).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(second.stdout.is_empty());
    assert!(String::from_utf8_lossy(&second.stderr).contains("another runner holds"), "{second:?}");
    assert!(!gone(run.pid()), "the first goes on");
    assert!(run.ask(Request::Status).starts_with("status "), "and its socket is still its own");
    run.ask(Request::Kill);
    run.ended();
    let third = runner_command(&run.dir).output().unwrap();
    assert!(String::from_utf8_lossy(&third.stderr).contains("has ended already"), "{third:?}");
}

#[test]
fn a_socket_of_a_runner_that_died_is_no_obstacle() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path().to_owned();
    drop(UnixListener::bind(dir.join(SOCKET)).unwrap());
    let mut run = Run::spawn_in(&program("sleep"), temporary, dir, |_| {});
    assert_eq!(run.word(), "started");
    assert!(run.ask(Request::Status).starts_with("status "));
}

#[test]
fn what_goes_wrong_before_the_program_is_said_on_stderr() {
    let dir = tempfile::tempdir().unwrap();
    let said = |expected: &str| {
        let out = runner_command(dir.path()).output().unwrap();
        assert_eq!((out.status.code(), out.stdout.as_slice()), (Some(1), &b""[..]));
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(text.contains(expected), "{expected}: {text}");
    };
    said("no start file");
    fs::write(dir.path().join("start"), "garbage").unwrap();
    said("no head");
    fs::write(dir.path().join("start"), StartFile::default().encode()).unwrap();
    said("no command");
    command(&["true"]).write(dir.path()).unwrap();
    fs::create_dir_all(dir.path().join(SOCKET).join("in the way")).unwrap();
    said("directory");
}

#[test]
fn every_failure_to_start_has_its_step_and_errno() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str, mode: u32| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let plain = file("plain", "#!/bin/sh\n", 0o644);
    let no_format = file("no-format", "echo I am no script\n", 0o755);
    let no_interpreter = file("no-interpreter", "#!/no/such/interpreter\n", 0o755);
    let path = |dirs: &str, name: &str| StartFile { env: vec![("PATH".into(), dirs.into())], ..command(&[name]) };
    let here = dir.path().to_str().unwrap();
    for (start, step, errno, detail) in [
        (command(&["/no/such/program"]), Step::Exec, libc::ENOENT, "/no/such/program"),
        (command(&["no-such-program"]), Step::Exec, libc::ENOENT, "no-such-program"),
        (command(&[""]), Step::Exec, libc::ENOENT, ""),
        (command(&[&plain]), Step::Exec, libc::EACCES, &*plain),
        (command(&[here]), Step::Exec, libc::EACCES, here),
        (command(&[&no_format]), Step::Exec, libc::ENOEXEC, &*no_format),
        (command(&[&no_interpreter]), Step::Exec, libc::ENOENT, &*no_interpreter),
        // One that may not be executed does not hide that it was found, nor one further on in PATH.
        (path(&format!("/no:{here}:/nowhere"), "plain"), Step::Exec, libc::EACCES, "plain"),
        (StartFile { cwd: "/no/such/dir".into(), ..command(&["true"]) }, Step::Directory, libc::ENOENT, "/no/such/dir"),
        (StartFile { cwd: plain.clone(), ..command(&["true"]) }, Step::Directory, libc::ENOTDIR, &*plain),
        (StartFile { cgroup_procs: vec!["/no/cgroup.procs".into()], ..command(&["true"]) }, Step::Cgroup, libc::ENOENT, "/no/cgroup.procs"),
        (StartFile { nofile: Some(u64::MAX - 1), ..command(&["true"]) }, Step::Limits, libc::EPERM, "open files 18446744073709551614"),
    ] {
        let mut run = Run::spawn(&start);
        assert_eq!(run.word(), "failed", "{detail}");
        let exit = run.ended();
        assert_eq!(exit.end, End::NotStarted { step, errno, detail: detail.to_owned() });
        assert_eq!(descendants(std::process::id()).iter().filter(|&&p| p == run.runner.id()).count(), 0);
    }
    let mut run = Run::spawn(&path(&format!("{here}:/usr/bin:/bin"), "true"));
    assert_eq!(run.word(), "started");
    run.ended();
}

#[test]
fn the_program_is_started_with_exactly_what_was_said() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path().to_owned();
    let mut start = program("look");
    start.argv.extend(["", "a b", "\u{e9}\u{1f600}", "x=\"y\nz", "--"].map(str::to_owned));
    start.env.extend([("EMPTY", ""), ("UNI\u{e9}", "\u{1f600} \"$x\""), ("EQ", "a=b=c")].map(|(k, v)| (k.to_owned(), v.to_owned())));
    start.umask = 0o27;
    start.nofile = Some(77);
    start.cwd = "/usr".into();
    let mut run = Run::spawn_in(&start, temporary, dir, |command| {
        // What a careless agent might leave open, next to the lock and the starter's pipe and far away.
        leak_descriptors(command, 3, 9);
        leak_descriptors(command, 200, 203);
        // SAFETY: signal(2) and sigprocmask(2) in the child before exec: what must not be inherited.
        unsafe {
            use std::os::unix::process::CommandExt;
            command.pre_exec(|| {
                libc::signal(libc::SIGUSR1, libc::SIG_IGN);
                libc::signal(libc::SIGCHLD, libc::SIG_IGN);
                // One that the C library keeps for itself, past which it does not let us: SIG_IGN is 1.
                let ignore = [1u64, 0, 0, 0, 0, 0, 0, 0];
                libc::syscall(libc::SYS_rt_sigaction, 32, ignore.as_ptr(), std::ptr::null_mut::<u64>(), 8usize);
                let mut set: libc::sigset_t = std::mem::zeroed();
                libc::sigemptyset(&mut set);
                libc::sigaddset(&mut set, libc::SIGTERM);
                libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
                Ok(())
            });
        }
    });
    assert_eq!(run.word(), "started");
    assert_eq!(code_of(&run.ended()), Some(0), "{:?}", run.lines());
    let texts: Vec<String> = run.lines().into_iter().map(|(_, text)| text).collect();
    let text = texts.join("\n");
    println!("{text}");
    let exe = &start.argv[0];
    assert!(text.contains(&format!("cmdline {exe}||a b|\u{e9}\u{1f600}|x=\"y\nz|--|\n")));
    assert!(text.contains("environ OPTIMUS_TEST_PROGRAM=look|EMPTY=|UNI\u{e9}=\u{1f600} \"$x\"|EQ=a=b=c|\n"), "and nothing else");
    for line in [
        "fds [0, 1, 2]",
        "stdin /dev/null",
        "SigBlk: 0000000000000000",
        "SigIgn: 0000000000000000",
        "NoNewPrivs: 1",
        "Umask: 0027",
        "oom_score_adj 0",
        "death signal 9",
        "leads its session true",
        "Max core file size 0 0 bytes",
        "Max open files 77 77 files",
        "cwd /usr",
    ] {
        assert!(texts.iter().any(|t| t == line), "{line}");
    }
}

#[test]
fn the_program_becomes_the_user_that_was_said() {
    let user = User { uid: 12345, gid: 23456, groups: vec![34567, 34568] };
    let mut run = Run::start(&StartFile { user: Some(user), ..shell("exec cat /proc/self/status") });
    run.ended();
    let lines: Vec<String> = run.lines().into_iter().map(|(_, t)| t.split_ascii_whitespace().collect::<Vec<_>>().join(" ")).collect();
    for line in
        ["Uid: 12345 12345 12345 12345", "Gid: 23456 23456 23456 23456", "Groups: 34567 34568", "CapEff: 0000000000000000", "NoNewPrivs: 1"]
    {
        assert!(lines.iter().any(|l| l == line), "{line}: {lines:#?}");
    }
}

#[test]
fn orphans_that_end_are_buried() {
    let run = Run::start(&program("orphans 500"));
    run.says("all orphaned");
    let runner = run.runner.id();
    until("no zombie is left", || (descendants(runner).len() == 1).then_some(()));
    assert!(!gone(run.pid()));
}

#[test]
fn a_runner_is_small_and_idle() {
    let run = Run::start(&shell("echo hello; exec sleep 1000"));
    run.says("hello");
    run.ask(Request::Status);
    let runner = run.runner.id();
    let (dirty, clean) = (proc_number(runner, "smaps_rollup", "Private_Dirty"), proc_number(runner, "smaps_rollup", "Private_Clean"));
    println!("private memory of a runner: {} KiB ({dirty} dirty, {clean} clean)", dirty + clean);
    assert!(dirty + clean < 1024);
    assert_eq!(fs::read_dir(format!("/proc/{runner}/task")).unwrap().count(), 1);
    let wakes = |pid| proc_number(pid, "status", "voluntary_ctxt_switches");
    let ran = || fs::read_to_string(format!("/proc/{runner}/schedstat")).unwrap().split(' ').next().unwrap().parse::<u64>().unwrap();
    let before = (wakes(runner), ran());
    // A measurement, not a wait for something.
    std::thread::sleep(Duration::from_secs(1));
    let (woken, busy) = (wakes(runner) - before.0, Duration::from_nanos(ran() - before.1));
    println!("an idle runner was woken {woken} times in a second and ran for {busy:?}");
    // Once perhaps for the client that has just left.
    assert!(woken <= 1 && busy < Duration::from_millis(5));
}

#[test]
fn garbage_and_many_clients_disturb_nobody() {
    let mut run = Run::start(&program("sleep"));
    let mut client = run.connect();
    for garbage in ["dance\n", "\n", "stop\n", "stop 0 0\n", "signal 65\n", "kill now\n", "status please\n", "\u{e9}\n"] {
        client.send(garbage.as_bytes());
        assert!(client.line().starts_with("error "), "{garbage:?}");
    }
    client.send(b"\xff\xfe\x00\n");
    assert!(client.line().starts_with("error "));
    // In pieces, and several at once.
    client.send(b"sta");
    client.send(b"tus\nstatus\n");
    assert!(client.line().starts_with("status ") && client.line().starts_with("status "));
    // A line without an end is not kept.
    client.try_send(&[b'x'; 4096]);
    while client.line().starts_with("error ") {}
    // Who never reads is not waited for.
    let mut deaf = run.connect();
    let flood = b"status\n".repeat(1000);
    until("the deaf one is dropped", || (!deaf.try_send(&flood)).then_some(()));
    // Many at once: the last is answered, and none costs for ever.
    let mut crowd: Vec<_> = (0..100).map(|_| run.connect()).collect();
    let mut last = run.connect();
    last.send(b"status\n");
    assert!(last.line().starts_with("status "));
    let open = fs::read_dir(format!("/proc/{}/fd", run.runner.id())).unwrap().count();
    assert!(open < 25, "{open} descriptors");
    assert!(crowd.iter_mut().take(50).all(|c| c.line().is_empty()));
    assert!(!gone(run.pid()));
    run.ask(Request::Signal { signal: libc::SIGINT });
    assert_eq!(signal_of(&run.ended()), Some(libc::SIGINT));
}

#[test]
fn how_long_a_start_takes() {
    let mut times: Vec<Duration> = (0..20)
        .map(|_| {
            let start = program("sleep");
            let begun = Instant::now();
            let _run = Run::start(&start);
            begun.elapsed()
        })
        .collect();
    times.sort();
    println!("from starting a runner to its word: median {:?}, most {:?}", times[10], times[19]);
}
