//! Two hundred simulated agents over real QUIC against a real server: 5,000 copies, a lost host, hosts that come back,
//! copies that crash. Larger: `scripts/bench nodes`.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::time::Duration;

use optimus_common::{Bytes, Millicores};
use optimus_host::env::HostEnv;
use optimus_tests::harness::Sandbox;
use optimus_tests::sim_agents::{Fleet, FleetConfig, raise_file_limit};

const AGENTS: usize = 200;
const COPIES: usize = 5000;
/// Generous: the machine may be busy, and the server is not optimised.
const PATIENCE: Duration = Duration::from_secs(300);

async fn fleet(sandbox: &Sandbox, agents: usize) -> Fleet {
    raise_file_limit().unwrap();
    let uses = agents.to_string();
    let token = sandbox.run(&["nodes", "join-token", "--uses", &uses, "--json"]).expect(0).json()["token"].as_str().unwrap().to_owned();
    let config = FleetConfig {
        token,
        agents,
        prefix: "sim".into(),
        dir: sandbox.path("agents"),
        at_once: 16,
        cpu: Millicores(8000),
        memory: Bytes(32 << 30),
        zones: 0,
    };
    let fleet = Fleet::start(&config, &HostEnv::new()).await.unwrap();
    fleet.wait_connected(agents, PATIENCE).await.unwrap();
    fleet
}

fn deploy(sandbox: &Sandbox, name: &str, copies: usize, script: &str) {
    let text = format!(
        "project = \"load\"\nname = \"{name}\"\nrun = [\"sleep\", \"100000\"]\ncopies = {copies}\ncpu = 0.01\nmemory = \"1M\"\n\
         [env]\nMOCK = \"{script}\"\n[update]\ndeadline = \"30m\"\n"
    );
    let dir = sandbox.project(name, &[("optimus.toml", &text)]);
    sandbox.run(&["deploy", dir.to_str().unwrap(), "--no-wait"]).expect(0);
}

/// What the server says of a workload.
fn ready(sandbox: &Sandbox) -> u64 {
    let said = sandbox.run(&["status", "--json"]);
    if said.code == 0 { said.json()["copies_ready"].as_u64().unwrap_or(0) } else { 0 }
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(std::time::Instant::now() < end, "gave up waiting for {what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Each slot runs exactly once among hosts that are connected.
fn every_slot_runs_once(fleet: &Fleet, copies: usize) -> bool {
    let mut slots: BTreeMap<(String, u32), u32> = BTreeMap::new();
    for agent in fleet.agents.iter().filter(|a| a.connected()) {
        for copy in agent.host().copies().into_iter().filter(|c| c.running) {
            *slots.entry((copy.key.to_string(), copy.index)).or_default() += 1;
        }
    }
    slots.len() == copies && slots.values().all(|n| *n == 1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_copies_of_a_lost_host_start_elsewhere() {
    let mut sandbox = Sandbox::new();
    sandbox.server();
    let mut fleet = fleet(&sandbox, AGENTS).await;
    deploy(&sandbox, "web", COPIES, "");
    fleet.wait(PATIENCE, |t| t.running >= COPIES).await.unwrap();
    until("the server to know all of them", || ready(&sandbox) == COPIES as u64).await;
    assert!(fleet.totals().sets <= 3 * COPIES as u64, "{:?}", fleet.totals());

    // A host loses power.
    let lost = fleet.lose(7, PATIENCE).await.unwrap();
    println!("the {} copies of a lost host ran elsewhere after {:?} to {:?}", lost.copies, lost.first, lost.last);
    assert!(lost.copies >= COPIES / AGENTS / 2, "{lost:?}");
    assert!(lost.first >= Duration::from_secs(3), "a node is not given up before its lease is over: {lost:?}");

    // Another is only cut off: its copies run on, unseen, and are replaced; back again it gives up what was replaced.
    let cut = fleet.agents[9].host().count().running;
    fleet.disconnect(9);
    until("the cut-off host to be missed", || !fleet.agents[9].connected() && ready(&sandbox) == COPIES as u64).await;
    assert_eq!(fleet.agents[9].host().count().running, cut, "a host that is cut off keeps what it runs");
    fleet.reconnect(9);
    fleet.restart(7);
    fleet.wait_connected(AGENTS, PATIENCE).await.unwrap();
    until("each slot to run once", || every_slot_runs_once(&fleet, COPIES)).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scripts_are_played() {
    let mut sandbox = Sandbox::new();
    sandbox.server();
    let mut fleet = fleet(&sandbox, 3).await;
    deploy(&sandbox, "slow", 2, "start=300ms ready=500ms");
    deploy(&sandbox, "crashes", 1, "crash=200ms code=7 crashes=1");
    deploy(&sandbox, "never", 1, "ready=never");
    let copies = sandbox.ready_copies("slow", 2);
    assert!(copies.iter().all(|c| c["restarts"] == 0), "{copies:?}");
    let copies = optimus_tests::harness::wait_for("a copy that crashed once to be up again", || {
        let copies = sandbox.copies("crashes");
        (copies.len() == 1 && copies[0]["ready"] == true && copies[0]["restarts"] == 1).then_some(copies)
    });
    assert_eq!(copies[0]["last_exit"]["code"], 7, "{copies:?}");
    optimus_tests::harness::wait_for("a copy that is never ready to run", || {
        let copies = sandbox.copies("never");
        (copies.len() == 1 && copies[0]["phase"] == "running" && copies[0]["ready"] == false).then_some(())
    });
    // A frozen host is lost like a dead one.
    let host = fleet.agents.iter().position(|a| a.host().count().ready > 0).unwrap();
    fleet.freeze(host);
    until("the frozen host to be down", || {
        sandbox.run(&["nodes", "--json"]).json()["items"].as_array().unwrap().iter().filter(|n| n["phase"] == "down").count() == 1
    })
    .await;
    fleet.thaw(host);
    fleet.wait_connected(3, PATIENCE).await.unwrap();
    sandbox.ready_copies("slow", 2);
    fleet.stop().await;
}
