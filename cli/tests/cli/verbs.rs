//! Verbs that ask once and show the answer.

use std::net::TcpListener;
use std::sync::atomic::{AtomicUsize, Ordering};

use optimus_common::api::v1::*;
use optimus_common::protocol::Phase;
use optimus_common::reason::Reason;
use optimus_common::{Bytes, ClusterId, Millicores, NodeId, Timestamp};
use serde_json::{Value, json};

use crate::fake::{Fake, Reply, Seen, TOKEN};
use crate::world::*;

fn status() -> ClusterStatus {
    ClusterStatus {
        cluster: ClusterId(id(5)),
        index: 7,
        leader: Some(1),
        term: 1,
        servers: 1,
        nodes_up: 2,
        nodes_down: 1,
        workloads: 1,
        copies_wanted: 2,
        copies_ready: 2,
        summary: "all 2 copies of 1 workload are ready".into(),
    }
}

fn not_found(seen: &Seen) -> Reply {
    Reply::problem(404, "OPT-1104", &format!("no route {} {}", seen.method, seen.target))
}

/// An API with two projects, one of them called `web` twice.
fn shop(seen: &Seen) -> Reply {
    let all = [workload("shop/dev/web"), workload("shop/prod/web"), workload("shop/prod/api")];
    match seen.path() {
        "/v1/status" => Reply::json(status()),
        "/v1/workloads" => {
            let asked =
                |name: &str, value: &str| !seen.target.contains(&format!("{name}=")) || seen.target.contains(&format!("{name}={value}"));
            let items =
                all.into_iter().filter(|w| asked("project", w.key.project.as_str()) && asked("environment", w.key.environment.as_str()));
            Reply::json(page(items.collect()))
        }
        _ => not_found(seen),
    }
}

fn action(changed: bool) -> ActionAnswer {
    ActionAnswer { index: 9, deployment: None, changed }
}

#[test]
fn status_is_a_sentence_and_a_table() {
    let fake = Fake::start(shop);
    let world = World::with(&fake);
    let ran = world.run(&["status"]).expect(0);
    assert!(ran.out.starts_with("all 2 copies of 1 workload are ready\nservers 1 (leader 1)   nodes 2 up, 1 down"), "{}", ran.out);
    assert!(ran.out.contains("shop/dev/web"), "{}", ran.out);
    assert!(ran.out.contains("http://127.0.0.1:20000 +1"), "{}", ran.out);
    assert!(!ran.out.contains('\x1b') && ran.err.is_empty(), "{ran:?}");
    let json = world.run(&["status", "--json", "--env", "prod"]).expect(0).json();
    assert_eq!(json["status"]["nodes_up"], 2);
    assert_eq!(json["workloads"].as_array().unwrap().len(), 2);
    assert_eq!(json["workloads"][0], serde_json::to_value(workload("shop/prod/web")).unwrap());
}

#[test]
fn colour_follows_the_flag_and_the_environment() {
    let fake = Fake::start(shop);
    let world = World::with(&fake);
    assert!(world.run(&["status", "--color", "always"]).expect(0).out.contains('\x1b'));
    let with = |name: &str| {
        let mut command = world.command(&["status"]);
        command.env("CLICOLOR_FORCE", "1").env(name, "1");
        finish(command).expect(0).out.contains('\x1b')
    };
    assert!(with("CLICOLOR_FORCE"));
    assert!(!with("NO_COLOR"));
    let terminal = world.run_on_a_terminal(&["status"], "").expect(0);
    assert!(terminal.out.contains('\x1b'), "{}", terminal.out);
}

#[test]
fn lists_are_read_page_by_page() {
    let fake = Fake::start(|seen| match seen.target.contains("page_token=next") {
        false if seen.path() == "/v1/allocations" => {
            Reply::json(json!({"items": [copy("shop/dev/web", 1, Phase::Running, true)], "next_page_token": "next", "index": 7}))
        }
        true => Reply::json(page(vec![copy("shop/dev/web", 0, Phase::Running, true)])),
        false => shop(seen),
    });
    let world = World::with(&fake);
    let ran = world.run(&["ps"]).expect(0);
    let lines: Vec<&str> = ran.out.lines().collect();
    assert!(
        lines.len() == 3 && lines[0].starts_with("COPY") && lines[1].starts_with("web-0") && lines[2].starts_with("web-1"),
        "{}",
        ran.out
    );
    let json = world.run(&["ps", "--json"]).expect(0).json();
    assert_eq!(json["items"][0]["name"], "web-0");
    assert_eq!(json["items"].as_array().unwrap().len(), 2);
}

#[test]
fn ps_says_why_a_copy_is_not_ready() {
    let fake = Fake::start(|seen| match seen.path() {
        "/v1/workloads" | "/v1/status" => shop(seen),
        "/v1/allocations" => {
            let mut broken = copy("shop/prod/api", 0, Phase::Backoff, false);
            broken.reason = reason(&Reason::CommandNotFound { command: "pyhton3".into() });
            Reply::json(page(vec![broken, copy("shop/prod/api", 1, Phase::Running, true)]))
        }
        _ => not_found(seen),
    });
    let world = World::with(&fake);
    let ran = world.run(&["ps", "api", "--all"]).expect(0);
    assert!(ran.out.contains("restarting") && ran.out.contains("command `pyhton3` not found on the node"), "{}", ran.out);
    let asked = fake.seen_of("GET", "/v1/allocations").pop().unwrap().target;
    for part in ["project=shop", "environment=prod", "workload=api", "all=true"] {
        assert!(asked.contains(part), "{asked}");
    }
    let one = world.run(&["ps", "api-1", "--json"]).expect(0).json();
    assert_eq!(one["items"].as_array().unwrap().len(), 1);
}

#[test]
fn names_are_resolved_or_refused_with_candidates() {
    let fake = Fake::start(|seen| match seen.method.as_str() {
        "POST" => Reply::json(action(true)),
        _ => shop(seen),
    });
    let world = World::with(&fake);
    let ran = world.run(&["restart", "web"]).expect(2);
    assert!(
        ran.err.contains("may mean 2 workloads") && ran.err.contains("shop/dev/web") && ran.err.contains("shop/prod/web"),
        "{}",
        ran.err
    );
    world.run(&["restart", "api"]).expect(0);
    world.run(&["restart", "dev/web"]).expect(0);
    world.run(&["restart", "web", "--env", "prod"]).expect(0);
    let posted: Vec<String> = fake.seen().iter().filter(|seen| seen.method == "POST").map(|seen| seen.target.clone()).collect();
    let path = |env: &str, workload: &str| format!("/v1/projects/shop/envs/{env}/workloads/{workload}:restart");
    assert_eq!(posted, [path("prod", "api"), path("dev", "web"), path("prod", "web")]);
    let ran = world.run(&["restart", "wbe"]).expect(3);
    assert!(ran.err.contains("did you mean `web`?"), "{}", ran.err);
    let ran = world.run(&["restart", "api-0"]).expect(2);
    assert!(ran.err.contains("optimus restart shop/prod/api"), "{}", ran.err);
}

#[test]
fn scale_sends_the_number_and_waits_for_the_copies() {
    static LOOKS: AtomicUsize = AtomicUsize::new(0);
    let fake = Fake::start(|seen| match (seen.method.as_str(), seen.path()) {
        ("POST", "/v1/projects/shop/envs/prod/workloads/api:scale") => Reply::json(action(true)),
        ("GET", "/v1/projects/shop/envs/prod/workloads/api/allocations") => {
            // The second copy is ready at the third look.
            let ready = LOOKS.fetch_add(1, Ordering::SeqCst) >= 2;
            Reply::json(page(vec![copy("shop/prod/api", 0, Phase::Running, true), copy("shop/prod/api", 1, Phase::Running, ready)]))
        }
        _ => shop(seen),
    });
    let world = World::with(&fake);
    let ran = world.run(&["scale", "api", "2"]).expect(0);
    assert!(ran.err.contains("shop/prod/api is set to 2 copies"), "{}", ran.err);
    assert!(LOOKS.load(Ordering::SeqCst) >= 3);
    let post = fake.seen().into_iter().find(|seen| seen.method == "POST").unwrap();
    assert_eq!(post.body, json!({"copies": 2}));
    assert!(post.header("idempotency-key").is_some_and(|key| key.len() == 36));
    let ran = world.run(&["scale", "api", "5", "--timeout", "1s"]).expect(7);
    assert!(ran.err.contains("2 of 5 ready") && ran.err.contains("optimus ps shop/prod/api"), "{}", ran.err);
    let answer = world.run(&["scale", "api", "2", "--no-wait", "--json"]).expect(0).json();
    assert_eq!(answer["changed"], true);
}

#[test]
fn stop_waits_until_nothing_runs() {
    static LOOKS: AtomicUsize = AtomicUsize::new(0);
    let fake = Fake::start(|seen| match (seen.method.as_str(), seen.path()) {
        ("POST", "/v1/projects/shop/envs/prod/workloads/api:stop") => Reply::json(action(true)),
        ("GET", "/v1/projects/shop/envs/prod/workloads/api/allocations") => {
            let phase = if LOOKS.fetch_add(1, Ordering::SeqCst) == 0 { Phase::Stopping } else { Phase::Stopped };
            Reply::json(page(vec![copy("shop/prod/api", 0, phase, false)]))
        }
        _ => shop(seen),
    });
    let ran = World::with(&fake).run(&["stop", "api"]).expect(0);
    assert!(ran.err.contains("shop/prod/api is stopped"), "{}", ran.err);
    assert_eq!(LOOKS.load(Ordering::SeqCst), 2);
}

#[test]
fn rm_asks_on_a_terminal_and_refuses_without_one() {
    let fake = Fake::start(|seen| match seen.method.as_str() {
        "DELETE" => Reply::json(action(true)),
        _ => shop(seen),
    });
    let world = World::with(&fake);
    let path = "/v1/projects/shop/envs/prod/workloads/api";
    let ran = world.run(&["rm", "api"]).expect(2);
    assert!(ran.err.contains("optimus rm api --yes") && fake.seen().is_empty(), "{}", ran.err);
    let ran = world.run_on_a_terminal(&["rm", "api"], "yes\n").expect(1);
    assert!(ran.out.contains("was not removed"), "{}", ran.out);
    assert!(fake.seen_of("DELETE", path).is_empty());
    world.run_on_a_terminal(&["rm", "api"], "api\n").expect(0);
    assert_eq!(fake.seen_of("DELETE", path).len(), 1);
    let ran = world.run(&["rm", "api", "--yes", "--json"]).expect(0);
    assert_eq!(ran.json()["changed"], true);
    assert_eq!(fake.seen_of("DELETE", path).len(), 2);
}

#[test]
fn explain_shows_cause_evidence_and_what_to_do() {
    let explanation = || {
        let mut broken = copy("shop/prod/api", 0, Phase::Backoff, false);
        broken.last_lines = vec!["Traceback".into(), "KeyError: \x1b[2J".into()];
        broken.reason = reason(&Reason::CommandNotFound { command: "pyhton3".into() });
        Explanation {
            summary: "api-0 cannot start: command `pyhton3` not found".into(),
            allocation: Some(broken),
            workload: workload("shop/prod/api"),
            evidence: vec!["placed on host-1".into(), "looked in /usr/bin".into()],
            events: vec![Event {
                index: 3,
                n: 0,
                at: Timestamp(1_700_000_000_000),
                kind: "copy_exited".into(),
                subject: "shop/prod/api-0".into(),
                message: "it ended".into(),
                reason: None,
            }],
            hint: Some("correct `run`".into()),
        }
    };
    let fake = Fake::start(move |seen| match seen.path() {
        "/v1/projects/shop/envs/prod/workloads/api/allocations/api-0:explain" => Reply::json(explanation()),
        "/v1/projects/shop/envs/prod/workloads/api:explain" => Reply::json(Explanation { allocation: None, ..explanation() }),
        _ => shop(seen),
    });
    let world = World::with(&fake);
    let ran = world.run(&["explain", "api-0"]).expect(0);
    let parts = [
        "api-0 cannot start",
        "Evidence\n  placed on host-1\n  looked in /usr/bin",
        "Events\n",
        "Last lines\n  Traceback\n  KeyError: \\u{1b}[2J",
        "What to do\n  correct `run`",
        "optimus explain OPT-2101",
    ];
    let mut rest = ran.out.as_str();
    for part in parts {
        let at = rest.find(part).unwrap_or_else(|| panic!("no `{part}` in order: {}", ran.out));
        rest = &rest[at..];
    }
    assert_eq!(world.run(&["explain", "api", "--json"]).expect(0).json()["hint"], "correct `run`");
}

#[test]
fn nodes_are_listed_and_let_in() {
    let node = Node {
        id: NodeId(id(1)),
        name: "host-1".into(),
        phase: NodePhase::Down,
        address: "10.0.0.1".into(),
        version: "0.1.0".into(),
        arch: "x86_64".into(),
        kernel: "6.1".into(),
        cgroup: "v2".into(),
        unenforced: vec!["memory".into()],
        drivers: vec!["process".into()],
        cpu: Millicores(4000),
        cpu_reserved: Millicores(500),
        memory: Bytes::mib(1024),
        memory_reserved: Bytes::mib(64),
        copies: 3,
        joined_at: Timestamp(0),
        last_seen: Timestamp(0),
        certificate_expires_at: Timestamp(0),
        clock_skew_ms: Some(14_200),
        labels: Default::default(),
        pool: "default".into(),
        cordoned: false,
        drain: None,
        disk: Bytes::mib(4096),
        disk_reserved: Bytes(0),
        disk_free: Bytes::mib(2048),
        host_reserve: Default::default(),
        attributes: Default::default(),
        devices: vec![],
        volumes: vec![],
    };
    let fake = Fake::start(move |seen| match (seen.method.as_str(), seen.path()) {
        ("GET", "/v1/nodes") => Reply::json(page(vec![node.clone()])),
        ("GET", "/v1/status") => shop(seen),
        ("POST", "/v1/join-tokens") => {
            Reply::json(JoinTokenAnswer { token: "opt_join_x".into(), id: "t1".into(), expires_at: Timestamp(1_700_000_000_000), uses: 10 })
        }
        _ => not_found(seen),
    });
    let world = World::with(&fake);
    let ran = world.run(&["nodes"]).expect(0);
    assert!(
        ran.out.contains("host-1") && ran.out.contains("down") && ran.out.contains("0.5/4") && ran.out.contains("64 MiB/1 GiB"),
        "{}",
        ran.out
    );
    assert!(ran.err.contains("host-1 cannot enforce: memory"), "{}", ran.err);
    assert!(ran.err.contains("the clock of host-1 is 14 s ahead"), "{}", ran.err);
    assert_eq!(world.run(&["nodes", "ls", "--json"]).expect(0).json()["items"][0]["name"], "host-1");
    let ran = world.run(&["nodes", "join-token", "--uses", "10", "--ttl", "1d"]).expect(0);
    assert_eq!(ran.out, "opt_join_x\n");
    assert!(ran.err.contains("10 agents"), "{}", ran.err);
    assert_eq!(fake.seen_of("POST", "/v1/join-tokens")[0].body, json!({"ttl": "1d", "uses": 10}));
}

#[test]
fn version_names_both_sides_and_never_fails() {
    let fake = Fake::start(|_| Reply::json(Version { version: "9.9.9".into(), api: vec!["v1".into()], cluster: None }));
    let world = World::with(&fake);
    let ran = world.run(&["version"]).expect(0);
    assert_eq!(ran.out, format!("optimus {}\nserver  9.9.9 (api v1)\n", env!("CARGO_PKG_VERSION")));
    assert_eq!(world.run(&["version", "--json"]).expect(0).json()["server"]["version"], "9.9.9");
    let alone = World::new();
    assert_eq!(alone.run(&["version"]).expect(0).out, format!("optimus {}\n", env!("CARGO_PKG_VERSION")));
    assert_eq!(alone.run(&["version", "--json"]).expect(0).json()["server"], Value::Null);
    assert_eq!(alone.run(&["--version"]).expect(0).out, format!("optimus {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn each_refusal_has_its_exit_code_and_four_parts() {
    for (status, code, exit) in
        [(404, "OPT-1104", 3), (403, "OPT-1103", 4), (409, "OPT-1109", 5), (500, "OPT-1111", 1), (503, "OPT-1110", 8), (422, "OPT-1001", 2)]
    {
        let fake = Fake::start(move |_| Reply::problem(status, code, "the detail"));
        let ran = World::with(&fake).run(&["status"]).expect(exit);
        assert!(ran.out.is_empty());
        let lines: Vec<&str> = ran.err.lines().collect();
        assert_eq!(lines[0], format!("error[{code}]: cannot read the status"), "{}", ran.err);
        assert_eq!(lines[1], "  why: the detail");
        assert!(lines[2].starts_with("  hint: "), "{}", ran.err);
        assert_eq!(lines[3], format!("  more: optimus explain {code}  (request req-42)"));
        assert_eq!(lines.len(), 4, "{}", ran.err);
    }
}

#[test]
fn a_wrong_token_is_exit_code_4() {
    let fake = Fake::start(shop);
    let world = World::new();
    world.context("fake", &fake.url(), &fake.ca_pem, "wrong");
    let ran = world.run(&["status"]).expect(4);
    assert!(ran.err.contains("error[OPT-1102]"), "{}", ran.err);
    let mut command = world.command(&["status"]);
    command.env("OPTIMUS_TOKEN", TOKEN);
    finish(command).expect(0);
}

#[test]
fn nobody_there_is_exit_code_8() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let fake = Fake::start(shop);
    let world = World::new();
    world.context("gone", &format!("https://{address}"), &fake.ca_pem, TOKEN);
    let ran = world.run(&["status"]).expect(8);
    assert!(
        ran.err.contains("error[OPT-1301]") && ran.err.contains(&address.to_string()) && ran.err.contains("optimus dev"),
        "{}",
        ran.err
    );
}

#[test]
fn only_the_clusters_ca_is_trusted() {
    let (fake, other) = (Fake::start(shop), Fake::start(shop));
    let world = World::new();
    world.context("mixed", &fake.url(), &other.ca_pem, TOKEN);
    let ran = world.run(&["status"]).expect(8);
    assert!(ran.err.contains("certificate") && ran.err.contains("--context"), "{}", ran.err);
    assert!(fake.seen().is_empty());
    world.context("mixed", "http://127.0.0.1:1", &other.ca_pem, TOKEN);
    world.run(&["status"]).expect(2);
}

#[test]
fn the_environment_can_say_it_all() {
    let fake = Fake::start(shop);
    let world = World::new();
    let ca = world.write("ca.pem", &fake.ca_pem);
    let mut command = world.command(&["status"]);
    command.env("OPTIMUS_URL", fake.url()).env("OPTIMUS_TOKEN", TOKEN).env("OPTIMUS_CA_FILE", &ca);
    // A proxy of the environment is not used.
    command.env("HTTPS_PROXY", "http://127.0.0.1:1");
    finish(command).expect(0);
    let ran = world.command(&["status", "--context", "none"]).env("OPTIMUS_URL", fake.url()).output().unwrap();
    assert_eq!(ran.status.code(), Some(3));
}

#[test]
fn a_context_others_may_read_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let fake = Fake::start(shop);
    let world = World::with(&fake);
    let file = world.dir.path().join("config/optimus/contexts/fake.json");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    let ran = world.run(&["status"]).expect(4);
    assert!(ran.err.contains("chmod 600"), "{}", ran.err);
    assert!(fake.seen().is_empty());
}

#[test]
fn a_503_is_tried_again_with_the_same_key() {
    static POSTS: AtomicUsize = AtomicUsize::new(0);
    let fake = Fake::start(|seen| match seen.method.as_str() {
        "POST" if POSTS.fetch_add(1, Ordering::SeqCst) < 2 => Reply::problem(503, "OPT-1110", "no leader").header("retry-after", 0),
        "POST" => Reply::json(action(true)),
        _ => shop(seen),
    });
    World::with(&fake).run(&["restart", "api"]).expect(0);
    let posts: Vec<Seen> = fake.seen().into_iter().filter(|seen| seen.method == "POST").collect();
    assert_eq!(posts.len(), 3);
    let keys: Vec<Option<&str>> = posts.iter().map(|post| post.header("idempotency-key")).collect();
    assert!(keys[0].is_some() && keys.iter().all(|key| *key == keys[0]), "{keys:?}");
}

#[test]
fn retries_end() {
    let fake = Fake::start(|_| Reply::problem(503, "OPT-1110", "no leader").header("retry-after", 0));
    World::with(&fake).run(&["jobs"]).expect(8);
    assert_eq!(fake.seen().len(), 6);
    // Without Retry-After a refusal is final.
    let fake = Fake::start(|_| Reply::problem(503, "OPT-1110", "no leader"));
    World::with(&fake).run(&["jobs"]).expect(8);
    assert_eq!(fake.seen().len(), 1);
}

#[test]
fn without_a_leader_looking_shows_what_the_server_knows() {
    let fake = Fake::start(|seen| match seen.target.contains("consistency=stale") {
        true => shop(seen).header("optimus-staleness", "12s"),
        false => Reply::problem(503, "OPT-1110", "no leader"),
    });
    let world = World::with(&fake);
    let ran = world.run(&["status"]).expect(0);
    assert!(ran.out.contains("shop/dev/web"), "{}", ran.out);
    assert!(ran.err.contains("no server leads") && ran.err.contains("12s old") && ran.err.contains("optimus cluster"), "{}", ran.err);
    // What would change something is not tried on a state of before.
    world.run(&["restart", "api"]).expect(8);
    // Another refusal is told, not hidden behind an old state.
    let fake = Fake::start(|_| Reply::problem(403, "OPT-1102", "forbidden"));
    World::with(&fake).run(&["status"]).expect(4);
    assert_eq!(fake.seen().len(), 1);
}

#[test]
fn an_answer_of_another_version_is_no_panic() {
    let fake = Fake::start(|_| Reply::json(json!({"something": "else"})));
    let ran = World::with(&fake).run(&["status"]).expect(1);
    assert!(ran.err.contains("optimus version"), "{}", ran.err);
    let fake = Fake::start(|_| Reply::json(()).with(json!("<html>")));
    World::with(&fake).run(&["nodes"]).expect(1);
}
