//! What goes wrong: the nemesis, driven by the seed.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use optimus_common::disk::Disk;
use optimus_common::disk::sim::Crash;
use optimus_control_plane::raft::Role;
use tokio::time::{Instant, sleep};

use crate::agents::ask;
use crate::entropy::Rng;
use crate::invariants::Event;
use crate::server::Server;
use crate::world::World;

/// Longest an administrator waits for one step of a membership change.
const ADMIN_PATIENCE: Duration = Duration::from_secs(3);
/// Voters at most.
const VOTERS_MAX: usize = 5;

/// Injects faults until `end`.
pub struct Nemesis {
    pub world: Arc<World>,
    pub rng: Rng,
    /// A disk is damaged once a run at most: two damaged of three may be a lost quorum, which nothing survives.
    pub damaged: bool,
    /// A change of the voters was begun and nobody knows whether it is done: a disk damaged now may cost a quorum too.
    pub unresolved: bool,
}

impl Nemesis {
    /// Runs until `end`.
    pub async fn run(mut self, end: Instant) {
        while Instant::now() < end {
            sleep(Duration::from_millis(self.rng.range(50..900))).await;
            self.step().await;
        }
    }

    fn how(&mut self, pending: usize) -> Crash {
        match self.rng.range(0..4) {
            0 => Crash::LoseAll,
            1 => Crash::KeepAll,
            2 => Crash::Prefix { keep: self.rng.range(0..pending as u64 + 1) as usize, tear: self.rng.chance(50.0) },
            _ => Crash::Scattered { seed: self.rng.u64() },
        }
    }

    fn pick(&mut self, fits: impl Fn(&Server) -> bool) -> Option<Arc<Server>> {
        let fitting: Vec<_> = self.world.servers().into_iter().filter(|s| fits(s)).collect();
        self.rng.pick(&fitting).cloned()
    }

    /// Where faults hurt most.
    fn leader_or_any(&mut self) -> Option<Arc<Server>> {
        let leader = self.rng.chance(40.0);
        let found = if leader { self.pick(|s| s.process().is_some_and(|p| p.node.status().role == Role::Leader)) } else { None };
        found.or_else(|| self.pick(Server::is_up))
    }

    async fn step(&mut self) {
        let down = self.world.servers().iter().filter(|s| !s.is_up()).count();
        // Most of the time most servers are up, or nothing else would ever be tested.
        if down > 0 && self.rng.chance(35.0) {
            return self.restart();
        }
        match self.rng.range(0..100) {
            0..22 => self.crash(),
            22..30 => self.restart(),
            30..32 => self.blackout(),
            32..48 => self.partition(),
            48..58 => {
                self.world.net.mend();
                self.world.say("network mended");
            }
            58..66 => self.pause(),
            66..71 => self.disk_fault(),
            71..73 => self.damage(),
            73..80 => self.clock(),
            80..88 => self.membership().await,
            88..92 => self.host(),
            92..96 => self.cut_host(),
            96..97 => self.snapshot().await,
            _ => self.transfer().await,
        }
    }

    /// Ends a server now, in the middle of its next steps, or in the middle of its next writes.
    fn crash(&mut self) {
        let up = self.world.servers().iter().filter(|s| s.is_up()).count();
        let all = self.world.servers().len();
        if up * 2 <= all + 1 && !self.rng.chance(15.0) {
            return;
        }
        let Some(server) = self.leader_or_any() else { return };
        let Some(hooks) = server.hooks() else { return };
        let how = self.how(server.disk.pending());
        match self.rng.range(0..3) {
            0 => {
                self.world.fault("crash", format!("s{}", server.id));
                hooks.end(&self.world, how, "crashes");
            }
            1 => {
                let steps = self.rng.range(1..400);
                self.world.fault("crash at a step", format!("s{} in {steps}", server.id));
                hooks.crash_after(steps, how);
            }
            _ => {
                let writes = self.rng.range(0..40);
                self.world.fault("crash at a write", format!("s{} in {writes}", server.id));
                server.excuse();
                hooks.on_power_loss(how);
                server.disk.power_off_after(writes);
            }
        }
    }

    fn restart(&mut self) {
        if let Some(server) = self.pick(|s| !s.is_up() && !s.is_refused()) {
            server.start(&self.world);
        }
    }

    /// All servers lose power at once.
    fn blackout(&mut self) {
        self.world.fault("blackout", "");
        for server in self.world.servers() {
            if let Some(hooks) = server.hooks() {
                let how = self.how(server.disk.pending());
                hooks.end(&self.world, how, "loses power with all others");
            }
        }
        self.world.servers().iter().filter(|s| !s.is_refused()).for_each(|s| s.start(&self.world));
    }

    fn partition(&mut self) {
        let servers: Vec<u64> = self.world.servers().iter().map(|s| s.id).collect();
        self.world.net.mend();
        let one_way = self.rng.chance(30.0);
        let side: BTreeSet<u64> = servers.iter().copied().filter(|_| self.rng.chance(50.0)).collect();
        for a in servers.iter().filter(|id| side.contains(id)) {
            for b in servers.iter().filter(|id| !side.contains(id)) {
                self.world.net.cut(*a, *b);
                if !one_way {
                    self.world.net.cut(*b, *a);
                }
            }
        }
        if !side.is_empty() && side.len() < servers.len() {
            self.world.fault(if one_way { "one-way partition" } else { "partition" }, format!("{side:?}"));
        }
    }

    /// Freezes a server, as SIGSTOP or a suspended machine does.
    fn pause(&mut self) {
        let Some(server) = self.leader_or_any() else { return };
        let Some(hooks) = server.hooks() else { return };
        let ms = self.rng.range(50..3000);
        self.world.fault("pause", format!("s{} for {ms} ms", server.id));
        hooks.pause(true);
        let world = self.world.clone();
        tokio::spawn(async move {
            sleep(Duration::from_millis(ms)).await;
            hooks.pause(false);
            world.say(format!("s{} runs on", server.id));
        });
    }

    fn disk_fault(&mut self) {
        let Some(server) = self.pick(Server::is_up) else { return };
        server.excuse();
        if self.rng.chance(50.0) {
            let nth = self.rng.range(1..10);
            self.world.fault("failed flush", format!("s{} at its {nth}. flush", server.id));
            server.disk.fail_sync(nth);
        } else {
            self.world.fault("disk full", format!("s{}", server.id));
            server.disk.set_capacity(Some(0));
            let world = self.world.clone();
            let ms = self.rng.range(100..3000);
            tokio::spawn(async move {
                sleep(Duration::from_millis(ms)).await;
                server.disk.set_capacity(None);
                world.say(format!("s{} has room again", server.id));
            });
        }
    }

    /// One bit of a stopped server's disk decays. It must refuse, and is then replaced.
    fn damage(&mut self) {
        let Some((_, voters)) = leader(&self.world) else { return };
        if self.damaged || self.unresolved || voters.len() < 3 || self.world.servers().iter().any(|s| !s.is_up()) {
            return;
        }
        let Some(server) = self.pick(|s| voters.contains(&s.id)) else { return };
        let names: Vec<String> = server.disk.list().unwrap_or_default();
        let Some(name) = self.rng.pick(&names).cloned() else { return };
        let length = server.disk.open(&name).and_then(|f| f.len()).unwrap_or(0);
        if length == 0 {
            return;
        }
        if let Some(hooks) = server.hooks() {
            hooks.end(&self.world, Crash::KeepAll, "is stopped");
        }
        let (at, bit) = (self.rng.range(0..length), self.rng.range(0..8));
        if server.disk.corrupt(&name, at, 1 << bit).is_ok() {
            self.damaged = true;
            self.world.fault("damaged record", format!("s{} {name} byte {at} of {length}, bit {bit}", server.id));
            self.world.see(&Event::Damaged { server: server.id });
            server.start(&self.world);
        }
    }

    fn clock(&mut self) {
        let Some(server) = self.pick(|_| true) else { return };
        let by = match self.rng.range(0..3) {
            0 => self.rng.range(0..2_000) as i64 - 1_000,
            1 => self.rng.range(0..60_000) as i64 - 30_000,
            _ => self.rng.range(0..7_200_000) as i64 - 3_600_000,
        };
        self.world.fault("clock jump", format!("s{} by {by} ms", server.id));
        server.clock.jump(by);
    }

    fn host(&mut self) {
        let hosts = self.world.hosts();
        if let Some(host) = self.rng.pick(&hosts) {
            self.world.fault("host power cycle", &host.name);
            host.power_cycle(&self.world);
        }
    }

    fn cut_host(&mut self) {
        let hosts = self.world.hosts();
        let Some(host) = self.rng.pick(&hosts).cloned() else { return };
        let ms = self.rng.range(500..9000);
        self.world.fault("agent cut off", format!("{} for {ms} ms", host.name));
        host.cut_off(true);
        tokio::spawn(async move {
            sleep(Duration::from_millis(ms)).await;
            host.cut_off(false);
        });
    }

    async fn snapshot(&mut self) {
        if let Some(process) = self.pick(Server::is_up).and_then(|s| s.process()) {
            self.world.say(format!("s{} is asked for a snapshot", process.node.id()));
            let _ = tokio::time::timeout(Duration::from_millis(1), process.node.trigger_snapshot()).await;
        }
    }

    /// Asks the leader to hand over, to anybody or to one server.
    async fn transfer(&mut self) {
        let Some((leader, voters)) = leader(&self.world) else { return };
        let ids: Vec<u64> = voters.iter().copied().filter(|id| *id != leader.id).collect();
        let to = if self.rng.chance(50.0) { None } else { self.rng.pick(&ids).copied() };
        self.world.fault("leader transfer", format!("from s{} to {to:?}", leader.id));
        let done = admin(&self.world, &leader, move |p| async move { p.node.transfer_leader(to).await.is_ok() }).await;
        self.world.say(format!("transfer: {}", if done { "done" } else { "not done" }));
    }

    /// Adds, removes or replaces a server, as an administrator does.
    async fn membership(&mut self) {
        let Some((leader, voters)) = leader(&self.world) else { return };
        let refused = self.world.servers().into_iter().find(|s| s.is_refused() && voters.contains(&s.id));
        let broken = self.world.servers().iter().any(|s| s.is_refused());
        if broken && refused.is_none() {
            return; // taken out already, or about to be; taking another out besides could cost the quorum
        }
        let grow = refused.is_some() || voters.len() < 3 || (voters.len() < VOTERS_MAX && self.rng.chance(50.0));
        if grow {
            let id = self.world.next_server_id();
            self.world.fault("server added", format!("s{id}, voters {voters:?}"));
            let server = Server::new(&self.world, id, self.rng.range(0..400) as i64 - 200, self.rng.range(0..20_000) as i64 - 10_000);
            self.world.add_server(server.clone());
            server.start(&self.world);
            let joined =
                admin(&self.world, &leader, move |p| async move { p.node.add_learner(id, &format!("s{id}:1")).await.is_ok() }).await;
            if !joined {
                return; // it stays outside, or a learner; the end sorts it out
            }
            let mut next: BTreeSet<u64> = voters;
            next.insert(id);
            if let Some(refused) = &refused {
                next.remove(&refused.id);
            }
            self.vote(&leader, next).await;
        } else if voters.len() > 1 {
            let ids: Vec<u64> = voters.iter().copied().collect();
            let Some(gone) = self.rng.pick(&ids).copied() else { return };
            self.world.fault("server removed", format!("s{gone}, voters {voters:?}"));
            let mut next = voters;
            next.remove(&gone);
            if self.vote(&leader, next).await
                && let Some(server) = self.world.server(gone)
            {
                retire(&self.world, &server);
            }
        }
    }

    async fn vote(&mut self, leader: &Arc<Server>, next: BTreeSet<u64>) -> bool {
        let shown = format!("{next:?}");
        self.unresolved = true;
        let done = admin(&self.world, leader, move |p| async move { p.node.change_voters(next).await.is_ok() }).await;
        self.unresolved = !done;
        self.world.say(format!("voters {shown}: {}", if done { "done" } else { "not known to be done" }));
        done
    }
}

/// The server that leads as far as it knows, and its voters.
pub fn leader(world: &World) -> Option<(Arc<Server>, BTreeSet<u64>)> {
    let leads = |s: &Arc<Server>| {
        let status = s.process()?.node.status();
        (status.role == Role::Leader).then(|| (status.term, s.clone(), status.voters.into_iter().collect()))
    };
    world.servers().iter().filter_map(leads).max_by_key(|(term, ..)| *term).map(|(_, server, voters)| (server, voters))
}

async fn admin<F: Future<Output = bool> + Send + 'static>(
    world: &Arc<World>,
    server: &Arc<Server>,
    step: impl FnOnce(crate::server::Process) -> F,
) -> bool {
    ask(world, server, ADMIN_PATIENCE, step).await.unwrap_or(false)
}

/// Switches a server that is no member any more off for good.
pub fn retire(world: &Arc<World>, server: &Arc<Server>) {
    server.retire();
    if let Some(hooks) = server.hooks() {
        hooks.end(world, Crash::KeepAll, "is retired");
    }
}
