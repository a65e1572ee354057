//! Logs and events: streams, merging, taking up again.

use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use optimus_common::Timestamp;
use optimus_common::api::v1::{Event, LogRecord};
use serde_json::Value;

use crate::fake::{Fake, Reply, Seen};
use crate::world::*;

fn record(at: u64, copy: &str, text: &str) -> String {
    let record = LogRecord { at: Timestamp(1_700_000_000_000 + at), copy: copy.into(), stream: "stdout".into(), text: text.into() };
    serde_json::to_string(&record).unwrap()
}

fn event(index: u64, n: u32) -> String {
    let at = Timestamp(1_700_000_000_000);
    let event = Event {
        index,
        n,
        at,
        kind: "copy_ready".into(),
        subject: "shop/dev/web-0".into(),
        message: format!("event {index}.{n}"),
        reason: None,
    };
    serde_json::to_string(&event).unwrap()
}

fn logs_of(workload: &str) -> String {
    format!("/v1/projects/shop/envs/dev/workloads/{workload}/logs")
}

fn workloads(names: &[&str]) -> Reply {
    Reply::json(page(names.iter().map(|name| workload(&format!("shop/dev/{name}"))).collect()))
}

/// Kills the process when the test is over, however it ends.
struct Running(std::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn lines_carry_the_prefix_of_their_copy() {
    let fake = Fake::start(|seen| match seen.path() {
        "/v1/workloads" => workloads(&["web"]),
        path if path == logs_of("web") => {
            Reply::lines(&[&record(1, "web-0", "first"), "", &record(2, "web-1", "second \x1b[2J"), "", &record(3, "web-0", "third")])
        }
        _ => Reply::problem(404, "OPT-1104", &seen.target),
    });
    let world = World::with(&fake);
    let ran = world.run(&["logs", "web"]).expect(0);
    assert_eq!(ran.out, "web-0 | first\nweb-1 | second \x1b[2J\nweb-0 | third\n");
    assert!(fake.seen_of("GET", &logs_of("web"))[0].target.contains("tail=100"));
    let terminal = world.run_on_a_terminal(&["logs", "web"], "").expect(0);
    assert!(terminal.out.contains("\x1b[36mweb-0 |\x1b[0m first") && terminal.out.contains("\x1b[33mweb-1 |\x1b[0m"), "{:?}", terminal.out);
    assert!(!terminal.out.contains("\x1b[2J"), "{:?}", terminal.out);
    let json: Vec<Value> = world
        .run(&["logs", "web-0", "--json", "--since", "5m"])
        .expect(0)
        .out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(json[1]["text"], "second \x1b[2J");
    let asked = fake.seen_of("GET", &logs_of("web")).pop().unwrap().target;
    assert!(asked.contains("copy=web-0") && asked.contains("since=5m") && !asked.contains("tail"), "{asked}");
}

#[test]
fn several_workloads_are_merged_by_time() {
    let fake = Fake::start(|seen| match seen.path() {
        "/v1/workloads" => workloads(&["web", "api"]),
        path if path == logs_of("web") => Reply::lines(&[&record(1, "web-0", "a"), &record(4, "web-0", "d")]),
        path if path == logs_of("api") => Reply::lines(&[&record(2, "api-0", "b"), &record(3, "api-0", "c"), &record(5, "api-0", "e")]),
        _ => Reply::problem(404, "OPT-1104", &seen.target),
    });
    let ran = World::with(&fake).run(&["logs"]).expect(0);
    assert_eq!(ran.out, "dev/web-0 | a\ndev/api-0 | b\ndev/api-0 | c\ndev/web-0 | d\ndev/api-0 | e\n");
}

#[test]
fn following_takes_up_a_broken_stream_where_it_ended() {
    static OPENED: AtomicUsize = AtomicUsize::new(0);
    let fake = Fake::start(|seen| match seen.path() {
        "/v1/workloads" => workloads(&["web"]),
        _ if OPENED.fetch_add(1, Ordering::SeqCst) == 0 => Reply::lines(&[&record(1, "web-0", "one"), &record(2, "web-0", "two")]),
        _ => Reply::lines(&[&record(2, "web-0", "two"), &record(3, "web-0", "three")]).hanging(),
    });
    let world = World::with(&fake);
    let mut child = Running(world.command(&["logs", "-f", "web"]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    let mut read = std::io::BufReader::new(child.0.stdout.take().unwrap());
    let mut text = String::new();
    while !text.contains("three") {
        assert!(std::io::BufRead::read_line(&mut read, &mut text).unwrap() > 0, "ended early: {text}");
    }
    assert_eq!(text, "web-0 | one\nweb-0 | two\nweb-0 | three\n");
    let again: Vec<Seen> = fake.seen_of("GET", &logs_of("web"));
    assert!(again[1].target.contains("since=2023-11-14T22") && !again[1].target.contains("tail="), "{}", again[1].target);
    interrupt(&child.0);
    assert_eq!(wait(&mut child.0), 130);
}

pub fn interrupt(child: &std::process::Child) {
    // SAFETY: a signal to a process of ours that has not been waited for.
    let sent = unsafe { libc::kill(i32::try_from(child.id()).unwrap(), libc::SIGINT) };
    assert_eq!(sent, 0);
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let long = record(1, "web-0", &"x".repeat(1000));
    let fake = Fake::start(move |seen| match seen.path() {
        "/v1/workloads" => workloads(&["web"]),
        _ => Reply::lines(&vec![long.as_str(); 2000]),
    });
    let world = World::with(&fake);
    let mut child = Running(world.command(&["logs", "web"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    drop(child.0.stdout.take());
    assert_eq!(wait(&mut child.0), 0);
    let mut err = String::new();
    std::io::Read::read_to_string(&mut child.0.stderr.take().unwrap(), &mut err).unwrap();
    assert!(err.is_empty(), "{err}");
}

#[test]
fn a_copy_that_is_not_there_is_exit_code_3() {
    let fake = Fake::start(|seen| match seen.path() {
        "/v1/workloads" => workloads(&["web"]),
        _ => Reply::problem(404, "OPT-1104", "workload shop/dev/web has no copy `web-9`"),
    });
    let ran = World::with(&fake).run(&["logs", "web-9"]).expect(3);
    assert!(ran.err.contains("has no copy `web-9`"), "{}", ran.err);
}

#[test]
fn events_are_lines_and_follow_without_doubles() {
    static OPENED: AtomicUsize = AtomicUsize::new(0);
    let fake = Fake::start(|seen| match seen.target.contains("follow=true") {
        false => Reply::lines(&[&event(3, 0), &event(4, 0)]),
        true if OPENED.fetch_add(1, Ordering::SeqCst) == 0 => Reply::lines(&[&event(5, 0), "", &event(6, 0)]),
        true => Reply::lines(&[&event(6, 0), &event(6, 1), &event(7, 0)]).hanging(),
    });
    let world = World::with(&fake);
    let ran = world.run(&["events", "--since", "2"]).expect(0);
    assert!(ran.out.contains("shop/dev/web-0") && ran.out.contains("event 4.0") && ran.out.lines().count() == 2, "{}", ran.out);
    let asked = &fake.seen_of("GET", "/v1/events")[0];
    assert!(asked.target.contains("since=2") && asked.header("accept") == Some("application/x-ndjson"), "{asked:?}");
    let mut child = Running(world.command(&["events", "-f", "--json"]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    let mut read = std::io::BufReader::new(child.0.stdout.take().unwrap());
    let mut places = Vec::new();
    while places.last() != Some(&(7, 0)) {
        let mut line = String::new();
        assert!(std::io::BufRead::read_line(&mut read, &mut line).unwrap() > 0, "ended early: {places:?}");
        let event: Event = serde_json::from_str(&line).unwrap();
        places.push((event.index, event.n));
    }
    assert_eq!(places, [(5, 0), (6, 0), (6, 1), (7, 0)]);
    assert!(fake.seen_of("GET", "/v1/events").pop().unwrap().target.contains("since=5"));
    let started = Instant::now();
    interrupt(&child.0);
    assert_eq!(wait(&mut child.0), 130);
    assert!(started.elapsed() < Duration::from_secs(5));
}

#[test]
fn events_no_longer_kept_are_an_error() {
    let fake = Fake::start(|_| Reply::problem(410, "OPT-1104", "events after index 1 are no longer all kept"));
    let ran = World::with(&fake).run(&["events", "-f", "--since", "1"]).expect(3);
    assert!(ran.err.contains("no longer all kept"), "{}", ran.err);
}
