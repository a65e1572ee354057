//! Clients: people and scripts that deploy, scale, restart and read through any server, and retry under one request id.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use optimus_common::ids::RequestId;
use optimus_common::spec::*;
use optimus_common::{Bytes, DeploymentId, Millicores, Name, Span, WorkloadKey};
use optimus_core::state::{Applied, Command, DeployItem, State};
use tokio::time::{Instant, sleep, timeout};

use crate::agents::ask;
use crate::entropy::Rng;
use crate::history::Op;
use crate::invariants::Event;
use crate::world::World;

/// Workloads with copies.
pub const WORKLOADS: [&str; 3] = ["api", "db", "web"];
/// Workloads without copies: registers, whose value is a word in the environment of their release.
pub const REGISTERS: [&str; 3] = ["reg-a", "reg-b", "reg-c"];
/// Copies each workload starts with.
pub const COPIES: u32 = 2;
/// Where a release keeps its value.
const VALUE: &str = "VALUE";
/// Longest a client tries one request.
pub const PATIENCE: Duration = Duration::from_secs(8);
/// Longest it waits for one answer.
const ONE_TRY: Duration = Duration::from_millis(2500);

/// The full name of a workload of the simulator.
pub fn key(workload: &str) -> WorkloadKey {
    let name = |text: &str| Name::new(text).expect("the simulator's names are DNS labels");
    WorkloadKey { project: name("sim"), environment: name("dev"), workload: name(workload) }
}

/// A spec that says `value`. Registers have no copies; `db` has a fixed port, so that its old copy stops first.
pub fn spec(workload: &str, value: u64, copies: Option<u32>) -> WorkloadSpec {
    let register = REGISTERS.contains(&workload);
    let name = || Name::new("http").expect("a DNS label");
    let ports = match workload {
        "db" => vec![Port { name: name(), fixed: Some(5432) }],
        _ if register => vec![],
        _ => vec![Port { name: name(), fixed: None }],
    };
    WorkloadSpec {
        kind: Kind::Service,
        driver: Driver::Process,
        run: Run::Argv(vec!["app".into()]),
        dir: None,
        env: BTreeMap::from([(VALUE.to_owned(), value.to_string())]),
        user: None,
        copies: if register { Some(0) } else { copies },
        ports,
        resources: Resources { cpu: Millicores(300), memory_request: Bytes::mib(150), memory_limit: Bytes::mib(200), pids: 100 },
        health: Health { readiness: None, liveness: None },
        restart: Restart { delay: Span::millis(200), delay_max: Span::secs(2), reset_after: Span::secs(5) },
        stop: Stop { signal: "TERM".into(), grace: Span::secs(2) },
        update: Update { deadline: Span::secs(10), ..Update::default() },
        logs: Logs { size: Bytes::mib(1) },
        secrets: vec![],
        secret_values: Default::default(),
        labels: BTreeMap::new(),
        placement: Default::default(),
        schedule: None,
        timeout: None,
        disconnect: None,
        runs: None,
    }
}

/// What a register holds in a state; 0 before its first write.
fn value_of(state: &State, key: &WorkloadKey) -> u64 {
    let release = state.workload(key).and_then(|w| state.release(key, w.newest));
    let value = release.and_then(|r| r.spec.env.get(VALUE).map(|v| v.to_string()));
    value.and_then(|v| v.parse().ok()).unwrap_or(0)
}

/// One client.
pub struct Client {
    pub world: Arc<World>,
    pub rng: Rng,
    pub number: u64,
    /// Values it has written, so that each is new.
    pub written: u64,
}

impl Client {
    pub fn uuid(&mut self) -> uuid::Uuid {
        uuid::Uuid::from_u64_pair(self.rng.u64(), self.rng.u64())
    }

    fn deploy(&mut self, workload: &str, value: u64, copies: Option<u32>) -> Command {
        let deployment = DeploymentId(self.uuid());
        Self::deploy_spec(workload, spec(workload, value, copies), deployment)
    }

    pub fn deploy_spec(workload: &str, spec: WorkloadSpec, deployment: DeploymentId) -> Command {
        Command::Deploy { items: vec![DeployItem { key: key(workload), spec: Arc::new(spec), source: None, deployment }] }
    }

    /// Sends one command until it is answered or the patience is over. `None`: nobody knows whether it took effect.
    pub async fn send(&mut self, command: Command, patience: Duration) -> Option<Applied> {
        let request = RequestId(self.uuid());
        let digest = request.0.as_bytes().to_vec();
        let deadline = Instant::now() + patience;
        let mut answer = None;
        let mut at = self.rng.u64() as usize;
        while answer.is_none() && Instant::now() < deadline {
            answer = self.try_once(at, request, digest.clone(), command.clone()).await;
            at += 1;
            if answer.is_none() {
                sleep(Duration::from_millis(self.rng.range(5..120))).await;
            }
        }
        let answer = answer?;
        self.world.see(&Event::Acked { request, answer: &answer });
        // A client that missed the answer asks again, maybe much later.
        if self.rng.chance(15.0) {
            let at = self.rng.u64() as usize;
            if let Some(again) = self.try_once(at, request, digest, command).await {
                self.world.count("request repeated");
                self.world.see(&Event::Acked { request, answer: &again });
            }
        }
        Some(answer)
    }

    async fn try_once(&mut self, at: usize, request: RequestId, digest: Vec<u8>, command: Command) -> Option<Applied> {
        let servers = self.world.servers();
        let server = servers.get(at % servers.len().max(1))?.clone();
        let asked =
            ask(
                &self.world,
                &server,
                ONE_TRY,
                move |process| async move { process.store.propose_for(request, digest, command).await.ok() },
            );
        asked.await.flatten()
    }

    /// Writes a register and records it.
    async fn write(&mut self, register: String, value: u64, command: Command) {
        let called = self.world.now();
        let answer = self.send(command, PATIENCE).await;
        if matches!(answer, Some(Applied::Refused(_))) {
            return; // no effect
        }
        let returned = answer.map(|_| self.world.now());
        self.world.record(Op { key: register, write: true, value, called, returned });
    }

    /// A linearizable read of everything through one server.
    async fn read(&mut self) {
        let servers = self.world.servers();
        let Some(server) = self.rng.pick(&servers).cloned() else { return };
        let called = self.world.now();
        let asked = ask(&self.world, &server, ONE_TRY, |process| async move {
            let reached = process.store.read().await.ok();
            reached.map(|state| {
                let mut found: Vec<(String, u64)> = REGISTERS.iter().map(|r| ((*r).to_owned(), value_of(&state, &key(r)))).collect();
                let copies = |w: &str| state.workload(&key(w)).map_or(0, |w| u64::from(w.copies));
                found.extend(WORKLOADS.iter().map(|w| (format!("{w} copies"), copies(w))));
                found
            })
        });
        let Some(Some(found)) = asked.await else { return };
        let returned = self.world.now();
        for (key, value) in found {
            self.world.record(Op { key, write: false, value, called, returned: Some(returned) });
        }
    }

    /// Works until the faults end.
    pub async fn live(mut self) {
        while !self.world.is_calm() {
            sleep(Duration::from_millis(self.rng.range(1..200))).await;
            let workload = *self.rng.pick(&WORKLOADS).unwrap_or(&"web");
            match self.rng.range(0..100) {
                0..30 => {
                    self.written += 1;
                    let value = self.number * 100_000 + self.written;
                    let register = *self.rng.pick(&REGISTERS).unwrap_or(&"reg-a");
                    let command = self.deploy(register, value, None);
                    self.write(register.to_owned(), value, command).await;
                }
                30..38 => {
                    let value = self.rng.u64() % 1_000_000;
                    let command = self.deploy(workload, value, None);
                    self.send(command, PATIENCE).await;
                }
                38..46 => {
                    // A fixed port takes a host for each copy, and there are two hosts at least.
                    let copies = self.rng.range(1..if workload == "db" { 3 } else { 4 });
                    let deployment = DeploymentId(self.uuid());
                    let command = Command::Scale { key: key(workload), copies: copies as u32, deployment };
                    self.write(format!("{workload} copies"), copies, command).await;
                }
                46..49 => {
                    let command = Command::Restart { key: key(workload), deployment: DeploymentId(self.uuid()) };
                    self.send(command, PATIENCE).await;
                }
                49..51 => {
                    self.send(Command::StopWorkload { key: key(workload) }, PATIENCE).await;
                }
                51..66 => self.operate().await,
                _ => self.read().await,
            }
        }
    }

    /// Deploys everything once, and records the first values.
    pub async fn found(&mut self, patience: Duration) -> Result<(), String> {
        for workload in WORKLOADS {
            let called = self.world.now();
            let command = self.deploy(workload, 1, Some(COPIES));
            self.send(command, patience).await.ok_or_else(|| format!("{workload} could not be deployed"))?;
            let returned = Some(self.world.now());
            self.world.record(Op { key: format!("{workload} copies"), write: true, value: u64::from(COPIES), called, returned });
        }
        Ok(())
    }
}

/// Follows the event stream from server to server, as one who was cut off resumes at another.
pub async fn follow(world: Arc<World>, reader: u64, mut rng: Rng) {
    let mut after = (0, 0);
    while !world.is_done() {
        sleep(Duration::from_millis(rng.range(50..600))).await;
        let servers = world.servers();
        let Some(server) = rng.pick(&servers).cloned() else { continue };
        let from = after;
        let asked = ask(&world, &server, ONE_TRY, move |process| async move {
            let state = process.store.state();
            let window = (std::ops::Bound::Excluded(from), std::ops::Bound::Unbounded);
            let places: Vec<(u64, u32)> = state.events.range(window).map(|(place, _)| *place).collect();
            (places, state.index)
        });
        if let Ok(Some((places, upto))) = timeout(ONE_TRY, asked).await {
            world.see(&Event::Streamed { reader, after, places: &places, upto });
            after = places.last().copied().unwrap_or(after);
        }
    }
}
