//! Deploying and waiting.

use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use optimus_common::api::v1::*;
use optimus_common::protocol::Phase;
use optimus_common::reason::{Exit, Reason};
use optimus_common::{Span, Timestamp};
use serde_json::json;

use crate::fake::{Fake, Reply, Seen};
use crate::streams::interrupt;
use crate::world::*;

const FILE: &str = "project = \"shop\"\nname = \"web\"\nrun = \"python3 app.py\"\ncopies = 2\nport = \"auto\"\n";
const ID: &str = "00000000-0000-0000-0000-000000000001";

fn world(fake: &Fake) -> World {
    let world = World::with(fake);
    world.write("work/optimus.toml", FILE);
    world
}

/// An API whose deployment of `shop/dev/web` is as `now` says at each look (counted from 0).
fn api(
    now: impl Fn(usize) -> Deployment + Send + Sync + 'static,
    copies: impl Fn(usize) -> Vec<Allocation> + Send + Sync + 'static,
) -> Fake {
    let looks = AtomicUsize::new(0);
    Fake::start(move |seen| match (seen.method.as_str(), seen.path()) {
        ("POST", "/v1/deploy") => Reply::json(DeployAnswer {
            deployments: vec![deployment(1, "shop/dev/web", DeploymentPhase::Starting, 0)],
            unchanged: vec![],
            index: 10,
        }),
        ("GET", path) if path == format!("/v1/deployments/{ID}") => {
            let look = looks.fetch_add(1, Ordering::SeqCst);
            Reply::json(now(look)).header("optimus-index", 11 + look)
        }
        ("GET", path) if path.ends_with("/allocations") => Reply::json(page(copies(looks.load(Ordering::SeqCst)))),
        ("GET", path) if path.ends_with("/logs") => {
            let record = |text: &str| {
                serde_json::to_string(&LogRecord { at: Timestamp(1), copy: "web-0".into(), stream: "stderr".into(), text: text.into() })
                    .unwrap()
            };
            Reply::lines(&[&record("reading the settings"), &record("fatal: no database")])
        }
        ("GET", path) if path.ends_with("/workloads/web") => Reply::json(workload("shop/dev/web")),
        _ => Reply::problem(404, "OPT-1104", &seen.target),
    })
}

fn succeeding() -> Fake {
    api(
        |look| match look {
            0 => deployment(1, "shop/dev/web", DeploymentPhase::Starting, 1),
            _ => deployment(1, "shop/dev/web", DeploymentPhase::Succeeded, 2),
        },
        |look| {
            vec![
                copy("shop/dev/web", 0, Phase::Running, true),
                copy("shop/dev/web", 1, if look < 2 { Phase::Starting } else { Phase::Running }, look >= 2),
            ]
        },
    )
}

fn not_ready() -> Reason {
    Reason::NotReady { probe: "GET /healthz".into(), last: "status 500".into(), listening: vec![8000], port: Some(20000) }
}

fn failed(phase: DeploymentPhase, from: Option<u64>) -> Deployment {
    let mut failed = deployment(1, "shop/dev/web", phase, 0);
    failed.from_release = from;
    failed.reason =
        reason(&Reason::DeadlinePassed { deadline: Span::secs(30), copy: Some("web-0".into()), last: Some(Box::new(not_ready())) });
    failed
}

fn broken_copy() -> Allocation {
    let mut copy = copy("shop/dev/web", 0, Phase::Running, false);
    copy.reason = reason(&not_ready());
    copy
}

#[test]
fn a_deploy_waits_and_prints_the_endpoints() {
    let fake = succeeding();
    let ran = world(&fake).run(&["deploy"]).expect(0);
    assert_eq!(ran.out, "shop/dev/web http://127.0.0.1:20000\nshop/dev/web http://127.0.0.1:20001\n");
    assert!(
        ran.err.contains("web-0 ready on host-1") && ran.err.contains("deployed shop/dev/web release 2: 2 copies ready in 2.1s"),
        "{}",
        ran.err
    );
    // Timestamped lines, nothing redrawn.
    assert!(!ran.err.contains('\x1b') && !ran.err.contains('\r'), "{:?}", ran.err);
    let post = &fake.seen_of("POST", "/v1/deploy")[0];
    assert_eq!(post.body["project"], "shop");
    assert_eq!(post.body["source"], FILE);
    assert_eq!(post.body["workloads"]["web"]["copies"], 2);
    assert!(post.header("idempotency-key").is_some());
    let polls = fake.seen_of("GET", &format!("/v1/deployments/{ID}"));
    assert!(polls[0].target.contains("index=10") && polls[0].target.contains("wait=30s"), "{}", polls[0].target);
    assert!(polls[1].target.contains("index=11"), "{}", polls[1].target);
}

#[test]
fn a_terminal_shows_a_line_for_each_copy() {
    let fake = succeeding();
    let ran = world(&fake).run_on_a_terminal(&["deploy"], "").expect(0);
    assert!(ran.out.contains("shop/dev/web release 2: succeeded, 2/2 ready"), "{:?}", ran.out);
    assert!(
        ran.out.contains("web-0") && ran.out.contains("web-1") && ran.out.contains("on host-1") && ran.out.contains('\x1b'),
        "{:?}",
        ran.out
    );
}

#[test]
fn json_is_the_answer_with_its_end() {
    let fake = succeeding();
    let answer = world(&fake).run(&["deploy", "--json"]).expect(0).json();
    let answer: DeployAnswer = serde_json::from_value(answer).unwrap();
    assert_eq!(answer.deployments[0].phase, DeploymentPhase::Succeeded);
}

#[test]
fn a_failed_first_deployment_is_told_in_full() {
    let fake = api(|_| failed(DeploymentPhase::Failed, None), |_| vec![broken_copy()]);
    let ran = world(&fake).run(&["deploy"]).expect(6);
    assert!(ran.out.is_empty(), "{}", ran.out);
    let error = &ran.err[ran.err.find("error[").unwrap()..];
    assert!(error.starts_with("error[OPT-2201]: deployment of shop/dev/web release 2 failed\n  why: no progress for 30s; web-0: GET /healthz not passing: status 500; it listens on 8000, PORT is 20000\n"), "{error}");
    assert!(error.contains("last lines of web-0:\n    web-0 | reading the settings\n    web-0 | fatal: no database\n"), "{error}");
    assert!(error.contains("hint: The process runs but its readiness check does not pass"), "{error}");
    assert!(error.contains("optimus explain OPT-2201  (request req-42)"), "{error}");
    assert!(
        fake.seen()
            .iter()
            .any(|seen| seen.path().ends_with("/logs") && seen.target.contains("copy=web-0") && seen.target.contains("tail=20"))
    );
}

#[test]
fn a_rolled_back_deployment_is_exit_code_6_with_the_lines_of_the_failed_copy() {
    // The failed copy is seen while it runs, and gone at the end.
    let fake = api(
        |look| match look {
            0 => failed(DeploymentPhase::RollingBack, Some(1)),
            _ => failed(DeploymentPhase::RolledBack, Some(1)),
        },
        |look| {
            let mut broken = broken_copy();
            broken.last_lines = (0..30).map(|n| format!("line {n}")).collect();
            if look < 2 { vec![broken] } else { vec![] }
        },
    );
    let ran = world(&fake).run(&["deploy"]).expect(6);
    assert!(ran.err.contains("failed and was rolled back to release 1"), "{}", ran.err);
    assert!(!ran.err.contains("line 9\n") && ran.err.contains("web-0 | line 10\n") && ran.err.contains("web-0 | line 29\n"), "{}", ran.err);
    // Its name belongs to the old release's copy again.
    assert!(!fake.seen().iter().any(|seen| seen.path().ends_with("/logs")));
}

#[test]
fn a_failing_command_is_named_by_its_exit() {
    let exit = Exit { code: Some(1), signal: None, oom: None, at: Timestamp(1), ran_for: Span::secs(2) };
    let fake = api(
        move |_| {
            let last = Reason::CrashLoop {
                restarts: 4,
                next_start: Timestamp(1_700_000_000_000),
                last: Box::new(Reason::Exited { exit: exit.clone() }),
            };
            let mut failed = deployment(1, "shop/dev/web", DeploymentPhase::Failed, 0);
            failed.reason =
                reason(&Reason::DeadlinePassed { deadline: Span::secs(30), copy: Some("web-0".into()), last: Some(Box::new(last)) });
            failed
        },
        |_| vec![broken_copy()],
    );
    let ran = world(&fake).run(&["deploy"]).expect(6);
    assert!(ran.err.contains("crash loop: 4 restarts") && ran.err.contains("exited with status 1 after 2s"), "{}", ran.err);
}

#[test]
fn a_superseded_deployment_is_a_conflict() {
    let fake = api(|_| deployment(1, "shop/dev/web", DeploymentPhase::Superseded, 0), |_| vec![]);
    let ran = world(&fake).run(&["deploy"]).expect(5);
    assert!(ran.err.contains("was superseded"), "{}", ran.err);
}

#[test]
fn the_timeout_ends_the_waiting_only() {
    let fake = api(|_| deployment(1, "shop/dev/web", DeploymentPhase::Starting, 1), |_| vec![]);
    let ran = world(&fake).run(&["deploy", "--timeout", "1s"]).expect(7);
    assert!(ran.err.contains("not finished after 1 s; the deployment goes on"), "{}", ran.err);
    assert!(ran.err.contains(&format!("optimus deploy --resume {ID}")), "{}", ran.err);
}

#[test]
fn resume_follows_without_deploying() {
    let fake = succeeding();
    let ran = World::with(&fake).run(&["deploy", "--resume", ID]).expect(0);
    assert!(ran.out.contains("shop/dev/web http://127.0.0.1:20000"), "{ran:?}");
    assert!(fake.seen().iter().all(|seen| seen.method == "GET"));
    World::with(&fake).run(&["deploy", "--resume", "not-an-id"]).expect(2);
    World::with(&fake).run(&["deploy", "--resume", "00000000-0000-0000-0000-000000000002"]).expect(3);
}

#[test]
fn ctrl_c_detaches() {
    let fake =
        api(|_| deployment(1, "shop/dev/web", DeploymentPhase::Starting, 1), |_| vec![copy("shop/dev/web", 0, Phase::Starting, false)]);
    let world = world(&fake);
    let mut child = world.command(&["deploy"]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut read = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut text = String::new();
    while !text.contains("web-0 starting") {
        assert!(std::io::BufRead::read_line(&mut read, &mut text).unwrap() > 0, "ended early: {text}");
    }
    interrupt(&child);
    std::io::Read::read_to_string(&mut read, &mut text).unwrap();
    assert_eq!(wait(&mut child), 130);
    assert!(text.contains("detached; the deployment goes on") && text.contains(&format!("--resume {ID}")), "{text}");
}

#[test]
fn no_wait_returns_at_once() {
    let fake = api(|_| deployment(1, "shop/dev/web", DeploymentPhase::Starting, 1), |_| vec![]);
    let ran = world(&fake).run(&["deploy", "--no-wait"]).expect(0);
    assert_eq!(ran.out, format!("shop/dev/web {ID}\n"));
    assert_eq!(fake.seen().len(), 1);
}

#[test]
fn a_server_away_for_a_moment_is_waited_for() {
    static LOOKS: AtomicUsize = AtomicUsize::new(0);
    let fake = Fake::start(|seen: &Seen| match (seen.method.as_str(), seen.path()) {
        ("POST", _) => Reply::json(DeployAnswer {
            deployments: vec![deployment(1, "shop/dev/web", DeploymentPhase::Starting, 0)],
            unchanged: vec![],
            index: 10,
        }),
        ("GET", path) if path.starts_with("/v1/deployments/") => match LOOKS.fetch_add(1, Ordering::SeqCst) {
            0..2 => Reply::problem(503, "OPT-1110", "no leader"),
            _ => Reply::json(deployment(1, "shop/dev/web", DeploymentPhase::Succeeded, 2)),
        },
        ("GET", path) if path.ends_with("/allocations") => Reply::json(page(vec![copy("shop/dev/web", 0, Phase::Running, true)])),
        _ => Reply::json(workload("shop/dev/web")).after(Duration::from_millis(1)),
    });
    let ran = world(&fake).run(&["deploy"]).expect(0);
    assert!(ran.err.contains("the server does not answer, trying again: no leader"), "{}", ran.err);
}

#[test]
fn an_unchanged_file_deploys_nothing_but_follows_what_is_under_way() {
    let fake = Fake::start(|seen| match (seen.method.as_str(), seen.path()) {
        ("POST", _) => Reply::json(DeployAnswer { deployments: vec![], unchanged: vec![key("shop/dev/web")], index: 10 }),
        ("GET", path) if path.starts_with("/v1/deployments/") => Reply::json(deployment(1, "shop/dev/web", DeploymentPhase::Succeeded, 2)),
        ("GET", path) if path.ends_with("/allocations") => Reply::json(page(vec![copy("shop/dev/web", 0, Phase::Running, true)])),
        _ => Reply::json(Workload {
            deployment: Some(deployment(1, "shop/dev/web", DeploymentPhase::Starting, 1)),
            ..workload("shop/dev/web")
        }),
    });
    let ran = world(&fake).run(&["deploy"]).expect(0);
    assert!(ran.err.contains("shop/dev/web: already as the file says") && ran.err.contains("release 2: 2 copies ready"), "{}", ran.err);
}

#[test]
fn a_refused_deploy_lists_every_fault() {
    let fake = Fake::start(|_| {
        let body = json!({"type": "t", "title": "not valid", "status": 422, "detail": "2 fields: breaks a rule", "code": "OPT-1001", "request_id": "req-42",
            "retryable": false, "errors": [{"pointer": "/workloads/web/copies", "message": "at most 1000"}, {"pointer": "/workloads/web/run", "message": "must not be empty"}]});
        Reply::problem(422, "OPT-1001", "").with(body)
    });
    let ran = world(&fake).run(&["deploy"]).expect(2);
    assert!(
        ran.err.contains("why: 2 fields: breaks a rule")
            && ran.err.contains("/workloads/web/copies: at most 1000")
            && ran.err.contains("/workloads/web/run"),
        "{}",
        ran.err
    );
}

#[test]
fn a_dry_run_names_the_differences_and_deploys_nothing() {
    let fake = Fake::start(|seen| match (seen.method.as_str(), seen.path()) {
        ("POST", "/v1/deploy") if seen.target.contains("dry_run=true") => Reply::json(DeployAnswer {
            deployments: vec![deployment(1, "shop/dev/web", DeploymentPhase::Starting, 0)],
            unchanged: vec![],
            index: 10,
        }),
        ("GET", path) if path.ends_with("/workloads/web") => {
            let mut held = serde_json::to_value(workload("shop/dev/web")).unwrap();
            held["copies_wanted"] = json!(5); // scaled since
            held["spec"]["run"] = json!({"argv": ["python3", "old.py"]});
            Reply::json(held)
        }
        _ => Reply::problem(404, "OPT-1104", &seen.target),
    });
    let world = world(&fake);
    let ran = world.run(&["deploy", "--dry-run"]).expect(0);
    assert!(
        ran.out.contains("changed shop/dev/web") && ran.out.contains("run.argv: [\"python3\",\"old.py\"] -> [\"python3\",\"app.py\"]"),
        "{}",
        ran.out
    );
    assert!(ran.out.contains("copies: 5 -> 2"), "{}", ran.out);
    assert!(ran.err.contains("nothing was deployed"), "{}", ran.err);
    let json = world.run(&["deploy", "--dry-run", "--json"]).expect(0).json();
    assert_eq!(json["items"][0]["verdict"], "changed");
    let ran = world.run(&["deploy", "--dry-run", "--project", "blog"]).expect(0);
    assert!(ran.out.contains("blog/"), "{}", ran.out);
}
