//! What the copies do, as their agents would report it.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::bail;
use optimus_common::protocol::{AllocStatus, Phase};
use optimus_common::reason::Exit;
use optimus_common::{AllocId, NodeId, Reason, Span, Timestamp};
use optimus_core::state::Alloc;

/// What a copy does once it is placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    Ready,
    /// Runs, but its readiness check fails.
    NotReady,
    /// Ends a second after each start.
    Crash,
    /// A stranger holds its port.
    PortTaken,
    /// Cannot be started on its node.
    Broken,
    /// Nothing is ever heard of it.
    Silent,
    /// Ready, but does not end when told to.
    Stubborn,
}

/// The names of the behaviours in scenarios: of several copies, of one, and what it means.
pub const BEHAVIOURS: &[(&str, &str, Behaviour, &str)] = &[
    ("are-ready", "is-ready", Behaviour::Ready, "runs and is ready at once; so is every copy unless told otherwise"),
    ("are-not-ready", "is-not-ready", Behaviour::NotReady, "runs, but its readiness check fails (status 500)"),
    ("crash", "crashes", Behaviour::Crash, "ends with status 1 a second after each start; its agent starts it again"),
    ("find-the-port-taken", "finds-the-port-taken", Behaviour::PortTaken, "fails because a stranger on the host holds its port"),
    ("are-broken", "is-broken", Behaviour::Broken, "cannot be started on its node: its agent gives up at once"),
    ("are-silent", "is-silent", Behaviour::Silent, "nothing is ever heard of it"),
    ("are-stubborn", "is-stubborn", Behaviour::Stubborn, "is ready, but does not end when told to"),
];

impl Behaviour {
    pub fn named(name: &str) -> anyhow::Result<Self> {
        match BEHAVIOURS.iter().find(|(many, one, ..)| *many == name || *one == name) {
            Some((_, _, behaviour, _)) => Ok(*behaviour),
            None => bail!("copies do not `{name}`"),
        }
    }
}

/// The agents of all nodes. The most special thing said of a copy holds.
#[derive(Debug, Default)]
pub struct Agents {
    seq: u64,
    pub of_copy: BTreeMap<AllocId, Behaviour>,
    /// By workload, release and node.
    pub of_release_on: BTreeMap<(String, u64, NodeId), Behaviour>,
    /// By workload and release.
    pub of_release: BTreeMap<(String, u64), Behaviour>,
    /// By node: whatever is placed there.
    pub of_node: BTreeMap<NodeId, Behaviour>,
    /// Connected, but nothing is heard of their copies.
    pub mute: BTreeSet<NodeId>,
    /// By job: how long its copies work, and how they end.
    pub work: BTreeMap<String, (Span, i32)>,
    began: BTreeMap<AllocId, Timestamp>,
}

impl Agents {
    fn behaviour(&self, alloc: &Alloc) -> Behaviour {
        let name = alloc.key.workload.to_string();
        let said = self
            .of_copy
            .get(&alloc.id)
            .or_else(|| self.of_release_on.get(&(name.clone(), alloc.release, alloc.node)))
            .or_else(|| self.of_release.get(&(name, alloc.release)))
            .or_else(|| self.of_node.get(&alloc.node));
        said.copied().unwrap_or(Behaviour::Ready)
    }

    /// The end of a job's copy that has worked long enough.
    fn work_is_done(&mut self, alloc: &Alloc, now: Timestamp) -> Option<AllocStatus> {
        if !alloc.run || alloc.phase().is_terminal() {
            return None;
        }
        let name = if alloc.is_release_step() { alloc.name() } else { alloc.key.workload.to_string() };
        let began = *self.began.entry(alloc.id).or_insert(now);
        let (takes, code) = self.work.get(&name).copied().unwrap_or((Span::secs(5), 0));
        if now < began + takes {
            return None;
        }
        self.seq += 1;
        let exit = Exit { code: Some(code), signal: None, oom: None, at: now, ran_for: takes };
        let old = alloc.status.as_deref().cloned().unwrap_or_else(|| AllocStatus::unknown(alloc.id));
        let phase = if code == 0 { Phase::Stopped } else { Phase::Failed };
        Some(AllocStatus {
            seq: self.seq,
            phase,
            ready: false,
            reason: Some(Reason::Exited { exit: exit.clone() }),
            last_exit: Some(exit),
            ..old
        })
    }

    /// What the copy's agent has to say that is new. `job`: it ends by itself.
    pub fn obey(&mut self, alloc: &Alloc, job: bool, now: Timestamp) -> Option<AllocStatus> {
        use Behaviour::*;
        if self.mute.contains(&alloc.node) {
            return None;
        }
        if job && let Some(end) = self.work_is_done(alloc, now) {
            return Some(end);
        }
        let behaviour = self.behaviour(alloc);
        let old = alloc.status.as_deref();
        let exit = Exit { code: Some(1), signal: None, oom: None, at: now, ran_for: Span::secs(1) };
        let failed = |step: &str| Reason::StartFailed { step: step.into(), error: "no such device".into() };
        let restarts = old.map_or(0, |s| s.restarts);
        let (phase, ready, restarts, reason) = match (alloc.run, behaviour) {
            (_, Silent) => return None,
            (false, Stubborn) => (Phase::Stopping, false, restarts, None),
            (false, _) => (Phase::Stopped, false, restarts, None),
            (true, Ready | Stubborn) => (Phase::Running, true, restarts, None),
            (true, NotReady) => {
                let reason = Reason::NotReady { probe: "GET /healthz".into(), last: "status 500".into(), listening: vec![], port: None };
                (Phase::Running, false, restarts, Some(reason))
            }
            (true, Crash) => (Phase::Backoff, false, old.map_or(0, |s| s.restarts + 1), Some(Reason::Exited { exit: exit.clone() })),
            (true, PortTaken) => {
                let port = alloc.ports.first().map_or(0, |(_, port)| *port);
                (Phase::Failed, false, restarts, Some(Reason::PortTaken { port, holder: Some("nginx (pid 7)".into()) }))
            }
            (true, Broken) => (Phase::Failed, false, restarts, Some(failed("mount the volume"))),
        };
        let crashed_now = old.and_then(|s| s.last_exit.as_ref()).is_some_and(|e| e.at == now);
        let known = old.is_some_and(|s| s.phase == phase && s.ready == ready);
        if known && (behaviour != Crash || crashed_now || !alloc.run) {
            return None;
        }
        self.seq += 1;
        Some(AllocStatus {
            id: alloc.id,
            seq: self.seq,
            phase,
            ready,
            // An agent whose clock is an hour ahead: nothing may hang on it.
            ready_since: ready.then_some(now + Span::secs(3600)),
            reason,
            restarts,
            pid: ready.then_some(7),
            started_at: ready.then_some(now),
            last_exit: (behaviour == Crash && alloc.run).then_some(exit),
            unenforced: vec![],
            last_lines: vec![],
            limits: None,
        })
    }
}
