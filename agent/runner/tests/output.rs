//! What becomes of a workload's output: lines, segments, a flood, a full disk.
#![allow(clippy::unwrap_used)]

mod support;

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use optimus_runner::{LINE_MAX, Request, StartFile, Status};
use support::{Run, code_of, gone, program, shell, signal_of, until};

fn texts(run: &Run, letter: char) -> Vec<String> {
    run.lines().into_iter().filter(|(l, _)| *l == letter).map(|(_, text)| text).collect()
}

#[test]
fn stdout_and_stderr_are_told_apart_and_each_keeps_its_order() {
    let mut run = Run::start(&shell("for i in $(seq 200); do echo out $i; echo err $i >&2; done"));
    run.ended();
    for (letter, word) in [('O', "out"), ('E', "err")] {
        let expected: Vec<String> = (1..=200).map(|i| format!("{word} {i}")).collect();
        assert_eq!(texts(&run, letter), expected);
    }
}

#[test]
fn lines_in_pieces_empty_lines_and_a_last_line_without_an_end_are_kept() {
    let mut run = Run::start(&shell(
        "printf 'one '; sleep 0.05; printf 'line\\n\\n'; printf 'err' >&2; sleep 0.05; printf ' too\\nrest' >&2; printf 'the end'",
    ));
    run.ended();
    assert_eq!(texts(&run, 'O'), ["one line", "", "the end"]);
    assert_eq!(texts(&run, 'E'), ["err too", "rest"]);
}

#[test]
fn a_line_of_a_mebibyte_becomes_pieces_and_loses_nothing() {
    let mut run =
        Run::start(&StartFile { log_segment: 4 << 20, ..shell("head -c 1048576 /dev/zero | tr '\\0' x; sleep 0.05; echo; echo next") });
    run.ended();
    let lines = texts(&run, 'O');
    let pieces = (1 << 20) / LINE_MAX;
    assert_eq!(lines.len(), pieces + 1, "its end is no empty line more");
    assert!(lines[..pieces].iter().all(|l| l.len() == LINE_MAX && l.bytes().all(|b| b == b'x')));
    assert_eq!(lines[pieces], "next");
    // One byte more is a piece of its own; two ends are an empty line.
    let mut run =
        Run::start(&shell("head -c 16385 /dev/zero | tr '\\0' y; echo; head -c 16384 /dev/zero | tr '\\0' z; echo; echo; echo end"));
    run.ended();
    let lengths: Vec<usize> = texts(&run, 'O').iter().map(String::len).collect();
    assert_eq!(lengths, [LINE_MAX, 1, LINE_MAX, 0, 3]);
}

#[test]
fn what_is_no_text_is_kept_as_it_is() {
    let mut run = Run::start(&shell("printf 'a\\000b\\377c\\r\\n'"));
    run.ended();
    let bytes = &run.segments()[0].1;
    assert!(bytes.ends_with(b" O a\0b\xffc\r\n"), "{bytes:?}");
}

#[test]
fn two_hundred_megabytes_at_once_take_bounded_room_and_the_last_lines_are_there() {
    let start = StartFile { log_segment: 256 << 10, log_segments: 3, ..program("flood 200") };
    let begun = Instant::now();
    let mut run = Run::start(&start);
    let most = {
        let mut most = 0;
        while run.runner.try_wait().unwrap().is_none() {
            let sizes = fs::read_dir(&run.dir).unwrap().flatten().filter(|e| e.file_name().as_encoded_bytes().starts_with(b"log."));
            most = most.max(sizes.filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum());
            assert!(begun.elapsed() < support::DEADLINE * 2, "200 MiB take too long");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        most
    };
    println!("200 MiB of output in {:?}, {most} bytes kept at most", begun.elapsed());
    let exit = run.exit();
    assert_eq!((code_of(&exit), exit.dropped_lines), (Some(0), 0));
    assert!(most <= 3 * (256 << 10), "{most}");
    let segments = run.segments();
    assert_eq!(segments.len(), 3);
    assert!(segments.windows(2).all(|w| w[1].0 == w[0].0 + 1));
    let numbers: Vec<u64> = run.lines().iter().map(|(_, text)| text.parse().unwrap()).collect();
    assert!(numbers.len() > 5000);
    assert!(numbers.windows(2).all(|w| w[1] == w[0] + 1), "none is missing within");
    assert_eq!(*numbers.last().unwrap(), (200 << 20) / 64 - 1);
}

#[test]
fn empty_lines_do_not_outgrow_a_segment() {
    // Each becomes a line of its own with its time: seventeen times as much.
    let start = StartFile { log_segment: 8192, log_segments: 2, ..shell("yes '' | head -n 200000; echo last") };
    let mut run = Run::start(&start);
    run.ended();
    let segments = run.segments();
    assert!(segments.iter().all(|(_, bytes)| bytes.len() <= 8192), "{:?}", segments.iter().map(|s| s.1.len()).collect::<Vec<_>>());
    assert_eq!(segments.len(), 2);
    assert_eq!(texts(&run, 'O').last().unwrap(), "last");
}

/// A small disk of its own.
struct SmallDisk {
    dir: PathBuf,
    _below: tempfile::TempDir,
}

impl SmallDisk {
    fn new(bytes: u64) -> SmallDisk {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("disk");
        fs::create_dir(&dir).unwrap();
        let (at, options) = (c_string(&dir), CString::new(format!("size={bytes}")).unwrap());
        // SAFETY: all strings end with a NUL and outlive the call.
        let mounted = unsafe { libc::mount(c"tmpfs".as_ptr(), at.as_ptr(), c"tmpfs".as_ptr(), 0, options.as_ptr().cast()) };
        assert_eq!(mounted, 0, "mount: {}", std::io::Error::last_os_error());
        SmallDisk { dir, _below: temporary }
    }
    /// Takes all the room there is.
    fn fill(&self) -> PathBuf {
        let path = self.dir.join("filler");
        let mut file = fs::File::create(&path).unwrap();
        while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
        path
    }
    fn run(&self, start: &StartFile) -> Run {
        let dir = self.dir.join("run");
        fs::create_dir(&dir).unwrap();
        Run::spawn_in(start, tempfile::tempdir().unwrap(), dir, |_| {})
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // SAFETY: the string ends with a NUL and outlives the call.
        unsafe { libc::umount2(c_string(&self.dir).as_ptr(), libc::MNT_DETACH) };
    }
}

fn c_string(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

fn dropped(run: &Run) -> u64 {
    Status::decode(&run.ask(Request::Status)).unwrap().dropped_lines
}

#[test]
fn a_full_disk_costs_lines_that_are_counted_and_told_of_and_nothing_else() {
    let disk = SmallDisk::new(1 << 20);
    // Prints a numbered line for every one it is sent a signal for.
    let mut run = disk.run(&shell("n=0; trap 'n=$((n+1)); echo line $n' USR1; echo begin; while :; do sleep 0.01; done"));
    assert_eq!(run.word(), "started");
    run.says("begin");
    let filler = disk.fill();
    let print = || assert_eq!(run.ask(Request::Signal { signal: libc::SIGUSR1 }), "ok");
    // What is left of the last page takes some lines yet.
    let lost = until("a line is lost", || {
        print();
        Some(dropped(&run)).filter(|&n| n >= 3)
    });
    assert!(!gone(run.pid()), "the workload goes on");
    fs::remove_file(filler).unwrap();
    run.says("lines dropped, the disk was full]");
    let before = run.lines().len();
    until("lines are kept again", || {
        print();
        (run.lines().len() > before).then_some(())
    });
    let lines = run.lines();
    let told = lines.iter().position(|(_, text)| text.starts_with("[optimus: ")).unwrap();
    let count: u64 = lines[told].1.trim_start_matches("[optimus: ").split(' ').next().unwrap().parse().unwrap();
    assert!(count >= lost);
    // What was told is exactly what is missing at that place.
    let number = |(_, text): &(char, String)| text.strip_prefix("line ").map_or(0, |n| n.parse::<u64>().unwrap());
    assert_eq!(number(&lines[told + 1]) - number(&lines[told - 1]) - 1, count, "{lines:#?}");
    assert_eq!(dropped(&run), count);
    run.ask(Request::Kill);
    let exit = run.exit();
    assert_eq!((signal_of(&exit), exit.dropped_lines), (Some(libc::SIGKILL), count));
    run.ended();
}

#[test]
fn the_end_is_recorded_on_a_disk_that_somebody_else_has_filled() {
    let disk = SmallDisk::new(1 << 20);
    // It has no line of its own to give up, and no byte is free.
    let mut run = disk.run(&program("sleep"));
    assert_eq!(run.word(), "started");
    disk.fill();
    run.ask(Request::Kill);
    assert_eq!(signal_of(&run.ended()), Some(libc::SIGKILL));
    assert!(!run.dir.join(".exit.new").exists());
}

#[test]
fn a_start_on_a_full_disk_fails_with_words_and_leaves_no_process() {
    let disk = SmallDisk::new(256 << 10);
    let dir = disk.dir.join("run");
    fs::create_dir(&dir).unwrap();
    program("sleep").write(&dir).unwrap();
    disk.fill();
    let out = support::runner_command(&dir).output().unwrap();
    assert_eq!((out.status.code(), out.stdout.as_slice()), (Some(1), &b""[..]), "{out:?}");
    assert!(String::from_utf8_lossy(&out.stderr).contains("No space left"), "{out:?}");
    assert_eq!(optimus_runner::RunRecord::read(&dir).unwrap(), None);
}

#[test]
fn a_run_that_cannot_be_recorded_is_no_run() {
    let disk = SmallDisk::new(256 << 10);
    let dir = disk.dir.join("run");
    fs::create_dir(&dir).unwrap();
    // Just this name cannot be written; the room for the exit is there.
    fs::create_dir(dir.join(".run.new")).unwrap();
    let mark = disk.dir.join("pid");
    let start = shell(&format!("echo $$ > {}; exec sleep 1000", mark.display()));
    let mut run = Run::spawn_in(&start, tempfile::tempdir().unwrap(), dir, |_| {});
    assert_eq!(run.word(), "failed");
    let exit = run.ended();
    assert!(
        matches!(&exit.end, optimus_runner::End::NotStarted { step: optimus_runner::Step::Prepare, errno: libc::EISDIR, .. }),
        "{exit:?}"
    );
    if let Ok(pid) = fs::read_to_string(mark) {
        assert!(pid.trim().is_empty() || gone(pid.trim().parse().unwrap()));
    }
}
