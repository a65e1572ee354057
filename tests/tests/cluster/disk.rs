//! A server whose disk is full, or whose file was changed under it: it says so, ends, and loses nothing.

use std::fs;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use optimus_tests::api_client::ApiClient;
use optimus_tests::harness::{Sandbox, wait_for};
use optimus_tests::loop_image::{LoopImage, sweep};
use serde_json::{Value, json};

use crate::ONE;

const ANSWER: Duration = Duration::from_secs(10);
/// Bytes of the text that goes with each write, so that a disk fills soon.
const BULK: usize = 200 << 10;
/// Writes until the disk must be full.
const WRITES_MAX: u64 = 2_000;

fn start(sandbox: &mut Sandbox, data: &Path) -> usize {
    let (api, agents) = (format!("127.0.0.1:{}", sandbox.api_port), format!("127.0.0.1:{}", sandbox.agent_port));
    let data = data.display().to_string();
    sandbox.start("server", &["server", "--data-dir", &data, "--api-listen", &api, "--agent-listen", &agents])
}

fn ready(sandbox: &mut Sandbox, server: usize) -> ApiClient {
    wait_for("the server to be ready", || {
        assert!(sandbox.process(server).is_running(), "the server ended:\n{}", sandbox.process(server).output());
        (sandbox.run(&["status", "--json"]).code == 0).then_some(())
    });
    ApiClient::new(&sandbox.path("config"), vec![SocketAddr::from(([127, 0, 0, 1], sandbox.api_port))]).expect("credentials")
}

fn deploy(value: u64, source: &str) -> Value {
    let spec = optimus_common::spec::parse_toml(
        "disk",
        &format!("project = \"disk\"\n[service.register]\nrun = \"true\"\ncopies = 0\nenv = {{ VALUE = \"{value}\" }}\n"),
        &optimus_common::spec::Context { default_project: None, base_dir: "/".into(), environment: None },
    );
    let mut body = json!(spec.unwrap_or_else(|e| panic!("{e:?}")).spec);
    body["source"] = json!(source);
    body
}

async fn write(api: &ApiClient, value: u64, source: &str) -> bool {
    let answer = api.post(0, "/v1/deploy", &format!("write-{value}"), &deploy(value, source), ANSWER).await;
    answer.is_ok_and(|answer| answer.is_success())
}

async fn read(api: &ApiClient) -> u64 {
    let answer = api.get(0, "/v1/projects/disk/envs/dev/workloads/register", ANSWER).await.expect("an answer");
    answer.body["spec"]["env"]["VALUE"].as_str().and_then(|v| v.parse().ok()).unwrap_or_else(|| panic!("{}", answer.body))
}

/// Takes all but about `leave` bytes of a file system.
fn fill(dir: &Path, leave: u64) {
    let path = dir.join("ballast");
    let mut file = fs::File::create(&path).expect("a file");
    let block = vec![7u8; 1 << 20];
    while file.write_all(&block).is_ok() {}
    let length = file.metadata().expect("its length").len();
    file.set_len(length - leave).expect("it can be cut");
    file.sync_all().expect("it is on the disk");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_ends_the_server_with_words_and_space_brings_everything_back() {
    let _one = ONE.lock().await;
    sweep();
    let disk = LoopImage::new().expect("a loop image");
    let data = disk.path().join("server");
    let mut sandbox = Sandbox::new();
    let server = start(&mut sandbox, &data);
    let api = ready(&mut sandbox, server);
    assert!(write(&api, 1, "").await, "an empty disk takes writes");
    fill(&disk.path(), 12 << 20);
    let bulk: String = "x".repeat(BULK);
    let mut last = 1;
    while write(&api, last + 1, &bulk).await {
        last += 1;
        assert!(last < WRITES_MAX, "the disk never fills");
    }
    let code = sandbox.process(server).wait();
    let said = sandbox.process(server).output();
    println!("after {last} writes, exit code {code:?}: {}", said.lines().last().unwrap_or_default());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("no space left on the disk") && said.contains("raft.redb"), "{said}");

    // With space it comes back, and everything acknowledged is there.
    fs::remove_file(disk.path().join("ballast")).expect("the ballast goes");
    let server = start(&mut sandbox, &data);
    let api = ready(&mut sandbox, server);
    let held = read(&api).await;
    assert!(held == last || held == last + 1, "{last} was acknowledged, {held} is there");
    assert!(write(&api, last + 2, "").await, "it takes writes again");
    assert_eq!(read(&api).await, last + 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_byte_is_refused_with_file_place_and_advice() {
    let _one = ONE.lock().await;
    let mut sandbox = Sandbox::new();
    let data = sandbox.path("server");
    let server = start(&mut sandbox, &data);
    let api = ready(&mut sandbox, server);
    let marker = "a text that is easy to find again";
    assert!(write(&api, 1, marker).await && write(&api, 2, "").await);
    sandbox.process(server).signal(libc::SIGTERM);
    assert_eq!(sandbox.process(server).wait(), Some(0));

    let file = data.join("raft/raft.redb");
    let good = fs::read(&file).expect("the log");
    let mut bad = good.clone();
    let places: Vec<usize> = good.windows(marker.len()).enumerate().filter(|(_, w)| *w == marker.as_bytes()).map(|(at, _)| at).collect();
    assert!(!places.is_empty(), "the marker is in the log");
    places.iter().for_each(|at| bad[*at] ^= 0x20);
    fs::write(&file, &bad).expect("the log can be changed");

    let server = start(&mut sandbox, &data);
    let code = sandbox.process(server).wait();
    let said = sandbox.process(server).output();
    println!("exit code {code:?}: {}", said.lines().last().unwrap_or_default());
    assert_eq!(code, Some(1), "{said}");
    for word in ["damaged record in file raft.redb", "table ", "key ", "replace this server"] {
        assert!(said.contains(word), "`{word}` is missing in: {said}");
    }
    assert_eq!(fs::read(&file).expect("the log"), bad, "it is left as it was found");

    fs::write(&file, &good).expect("the log is put back");
    let server = start(&mut sandbox, &data);
    let api = ready(&mut sandbox, server);
    assert_eq!(read(&api).await, 2);
}
