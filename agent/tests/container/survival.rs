//! Agents that die and engines that go, in the middle of everything.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use optimus_agent::agent::{Agent, AgentConfig};
use optimus_agent::testing::test_env;
use optimus_common::protocol::{AllocStatus, Desired, Phase};
use optimus_common::reason::Reason;
use optimus_common::units::Bytes;

use crate::engine::{Engine, IMAGE};
use crate::support::{runner, until};
use crate::{contained, copy, groups, name, node, web};

const LINES: usize = 30_000;

/// Not a test but the agent process of those below: one copy that prints numbered lines is wanted until it is killed.
#[test]
fn agent_process() {
    let Ok(dir) = std::env::var("OPTIMUS_TEST_DIR") else { return };
    let config = AgentConfig {
        data_dir: Path::new(&dir).join("agent"),
        runner: runner(),
        ports: (18_000, 18_009),
        allow_unenforced: false,
        workload_user: None,
        address: "127.0.0.1".into(),
        name: None,
        cgroup_owner: std::env::var("OPTIMUS_TEST_OWNER").unwrap(),
        labels: Default::default(),
        mock: false,
        container_engine: Some(std::env::var("OPTIMUS_TEST_ENGINE").unwrap().into()),
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let agent = Agent::start(config, test_env()).await.unwrap();
        let workloads = agent.workloads();
        workloads.accept(Desired { generation: 1, allocs: vec![copy(77, &talker(), None)] }).await.unwrap();
        let closed = tokio::task::spawn_blocking(|| std::io::stdin().lines().count());
        let report = async {
            let mut report = workloads.full_report();
            loop {
                for status in &report.statuses {
                    println!("status {}", serde_json::to_string(&status.open::<AllocStatus>().unwrap()).unwrap());
                }
                report = workloads.next_report().await;
            }
        };
        tokio::select! {
            _ = closed => {}
            () = report => {}
        }
        assert!(agent.stop_all(Duration::from_secs(10)).await);
    });
}

/// Numbered lines on both streams, with pauses; then it stays.
fn talker() -> optimus_common::spec::WorkloadSpec {
    let line = format!(
        "i=0; while [ $i -lt {LINES} ]; do echo line $i; [ $((i % 100)) = 0 ] && echo err $i >&2; \
         [ $((i % 1000)) = 0 ] && sleep 0.1; i=$((i+1)); done; echo end; exec sleep 1000"
    );
    let mut spec = contained(&line);
    spec.logs.size = Bytes::mib(64);
    spec
}

fn agent(engine: &Engine, dir: &Path, owner: &str) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "survival::agent_process", "--nocapture"]).env("OPTIMUS_TEST_DIR", dir);
    command.env("OPTIMUS_TEST_OWNER", owner).env("OPTIMUS_TEST_ENGINE", engine.socket());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

fn lines_of(dir: &Path) -> Vec<String> {
    let id = copy(77, &talker(), None).id;
    let segments = optimus_agent::logs::segments::list(&dir.join("agent/allocs").join(id.to_string())).unwrap();
    let text: String = segments.iter().map(|s| std::fs::read_to_string(&s.path).unwrap()).collect();
    text.lines().map(|l| l.split_once(' ').unwrap().1.to_owned()).collect()
}

#[test]
fn an_agent_killed_again_and_again_starts_nothing_twice_and_no_line_is_lost_or_doubled() {
    let engine = Engine::new();
    let dir = tempfile::tempdir().unwrap();
    let owner = format!("optimus-test-{}-ckill", std::process::id());
    // Killed ever later: before anything is there, while the container is made, started, and while its lines are taken.
    for round in 0..24u64 {
        let mut process = agent(&engine, dir.path(), &owner);
        std::thread::sleep(Duration::from_millis(20 + round * 25)); // a moment to be killed at, not a wait
        process.kill().unwrap();
        process.wait().unwrap();
    }
    assert!(engine.containers().len() <= 1, "{:?}", engine.containers());
    let mut last = agent(&engine, dir.path(), &owner);
    let mut statuses = BufReader::new(last.stdout.take().unwrap()).lines();
    let status = statuses.find_map(|line| {
        let status: AllocStatus = serde_json::from_str(line.unwrap().strip_prefix("status ")?).unwrap();
        (status.phase == Phase::Running).then_some(status)
    });
    let status = status.unwrap();
    let all = until("every line is there", || Some(lines_of(dir.path())).filter(|l| l.iter().any(|l| l == "O end")));
    let of = |stream: &str| all.iter().filter_map(|l| l.strip_prefix(stream)).map(str::to_owned).collect::<Vec<_>>();
    let wanted: Vec<String> = (0..LINES).map(|n| format!("line {n}")).chain(["end".to_owned()]).collect();
    let (got, errors) = (of("O "), of("E "));
    let first_wrong = got.iter().zip(&wanted).find(|(a, b)| a != b);
    assert!(got == wanted, "{} lines, first wrong {first_wrong:?}; {status:?}", got.len());
    assert_eq!(errors, (0..LINES).step_by(100).map(|n| format!("err {n}")).collect::<Vec<_>>());
    assert_eq!((engine.containers().len(), status.restarts), (1, 0));
    drop(last.stdin.take());
    for line in statuses {
        drop(line);
    }
    assert!(last.wait().unwrap().success());
    assert!(engine.containers().is_empty() && groups(&owner).is_empty(), "{:?}", groups(&owner));
}

#[test]
fn what_happened_while_no_agent_was_there_is_known_to_the_next() {
    let engine = Engine::new();
    let mut node = node(&engine);
    let lives = copy(1, &web(), Some(node.ports.0));
    let mut ends = contained("while [ ! -e /tmp/end ]; do sleep 0.05; done; echo last words; exit 42");
    ends.restart.delay = optimus_common::time::Span::secs(20);
    let ends = copy(2, &ends, None);
    node.want([lives.clone(), ends.clone()]);
    let before = node.ready(lives.id);
    node.until(ends.id, "running", |s| s.phase == Phase::Running);
    node.die();
    engine.docker(&["exec", &name(ends.id, 1), "touch", "/tmp/end"]);
    until("it ended", || (engine.docker(&["inspect", "--format", "{{.State.Running}}", &name(ends.id, 1)]) == "false").then_some(()));
    // A container with our label of an allocation nobody knows, and a stranger's.
    let label = engine.docker(&["inspect", "--format", "{{index .Config.Labels \"optimus.owner\"}}", &name(lives.id, 1)]);
    engine.docker(&["run", "--detach", "--name", "leaked", "--label", &format!("optimus.owner={label}"), IMAGE, "sleep", "1000"]);
    engine.docker(&["run", "--detach", "--name", "stranger", "--label", "optimus.owner=another", IMAGE, "sleep", "1000"]);
    node.start();
    let after = node.ready(lives.id);
    assert_eq!((after.pid, after.restarts, after.started_at), (before.pid, 0, before.started_at));
    let status = node.until(ends.id, "restarted with its end known", |s| s.last_exit.is_some());
    assert_eq!(status.last_exit.unwrap().code, Some(42));
    assert_eq!(node.logs(ends.id, None).iter().filter(|l| *l == "last words").count(), 1);
    assert!(!engine.containers().contains(&"leaked".to_owned()) && engine.containers().contains(&"stranger".to_owned()));
}

#[test]
fn an_engine_that_goes_is_told_and_its_copies_are_back_when_it_returns() {
    let mut engine = Engine::new();
    let mut node = node(&engine);
    let (web, plain) = (copy(1, &web(), Some(node.ports.0)), copy(2, &crate::support::shell("sleep 1000"), None));
    node.want([web.clone(), plain.clone()]);
    node.ready(web.id);
    let process = node.until(plain.id, "running", |s| s.phase == Phase::Running);
    let has_driver = |node: &crate::support::Node| node.workloads().facts().drivers.contains(&"container".to_owned());
    assert!(has_driver(&node));
    engine.stop();
    {
        let workloads = node.workloads();
        node.block_on(async { workloads.facts_changed().await });
    }
    assert!(!has_driver(&node));
    assert!(node.workloads().facts().unenforced.iter().any(|u| u.starts_with("container: ")), "{:?}", node.workloads().facts());
    // Whether it ended with the engine or is only not known of: its engine is named, and nothing hangs.
    let down = |s: &AllocStatus| matches!(s.reason.as_ref().map(Reason::root), Some(Reason::EngineDown { .. }));
    node.until(web.id, "of a stopped engine", down);
    let late = copy(3, &contained("sleep 1000"), None);
    node.want([late.clone()]);
    node.until(late.id, "waiting for the engine", down);
    // An agent that starts without the engine does not take its copies for gone, nor start them twice.
    node.die();
    let begun = Instant::now();
    node.start();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    engine.start();
    node.ready(web.id);
    node.until(late.id, "running", |s| s.phase == Phase::Running);
    assert!(has_driver(&node));
    assert_eq!(node.until(plain.id, "running", |s| s.phase == Phase::Running).pid, process.pid, "processes do not notice");
    until("one container each", || (engine.containers().len() == 2).then_some(()));
}

#[test]
fn a_container_somebody_removed_is_made_again() {
    let engine = Engine::new();
    let mut node = node(&engine);
    let web = copy(1, &web(), Some(node.ports.0));
    node.want([web.clone()]);
    node.ready(web.id);
    engine.docker(&["rm", "--force", &name(web.id, 1)]);
    let status = node.until(web.id, "made again", |s| s.ready && s.restarts == 1);
    assert_eq!(status.phase, Phase::Running);
    assert!(engine.containers().contains(&name(web.id, 2)));
}
