//! From the whole state to the next batch of changes. Level-triggered: called at any time, it gives what is
//! still to do, and nothing when nothing is.
//!
//! A workload has slots `0..copies`. Each owns at most one **current** copy (of the release that ran before, or any
//! other) and one **next** copy (of the release that should run):
//!
//! ```text
//!   Empty ── place ──► Starting ── ready for min_ready ──► Settled (all other copies of the slot are stopped)
//!   Old ── place next beside it ──► Starting
//!   Old ── no room beside it, or its fixed port: stop it first ──► Empty
//!   any ── its node is lost ──► Empty (the lost copy stays, until another one has settled)
//! ```
//!
//! At most `update.parallel` slots are between two states at a time.

mod aim;
mod daemons;
mod desired;
mod job_copies;
mod moves;
mod rest;
mod rollout;
mod silent;
mod slot;

pub(crate) use aim::{keeps_before, wanted_now};
pub use daemons::{moves_at_a_time, nodes_wanted};
pub use desired::{OpenSecret, desired_allocs, desired_for};
pub use job_copies::JOB_ENDED_KEPT;

use std::collections::BTreeMap;
use std::sync::Arc;

use optimus_common::protocol::RELEASE_SLOT;
use optimus_common::spec::Kind;
use optimus_common::{AllocId, Reason, Span, Timestamp, WorkloadKey};

use crate::deployments::{Findings, Gate, ROUTERS_MAX_WAIT, Verdict, gate, is_shut, preflight};
use crate::drain;
use crate::endpoints;
use crate::scheduler::{self, Ask, Room, View};
use crate::state::{Alloc, Command, Deployment, Placement, Plan, SlotFailures, State, Workload};
use aim::Aim;
use moves::Move;
use rollout::Rollout;
use slot::{Slot, Stage};

/// Most placements in one batch; the rest follow in the next.
pub const PLACEMENTS_MAX: usize = 500;
/// Most changes of every kind in one batch.
pub const CHANGES_MAX: usize = 2000;
/// Ended copies whose records are kept for people, of each slot.
pub const ENDED_KEPT: usize = 2;
/// Pause before the second copy of a slot after one gave up on its node; doubles each time. The first follows at once.
const RETRY_DELAY: Span = Span::secs(1);
const RETRY_DELAY_MAX: Span = Span::secs(60);
/// A time in the state that lies further ahead than this comes from a leader whose clock was wrong.
const AHEAD_MAX: Span = Span::secs(30);

/// What to propose now, and when to look again if nothing else changes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outcome {
    pub plan: Plan,
    /// What else to propose, before the plan.
    pub commands: Vec<Command>,
    pub wake_at: Option<Timestamp>,
}

/// Decides the next batch.
pub fn reconcile(state: &State, now: Timestamp, new_id: &mut dyn FnMut() -> AllocId) -> Outcome {
    reconcile_with(state, &Findings::default(), now, new_id)
}

/// [`reconcile`] with what the leader knows beside the state.
pub fn reconcile_with(state: &State, findings: &Findings, now: Timestamp, new_id: &mut dyn FnMut() -> AllocId) -> Outcome {
    let mut pass = Pass { state, findings, now, new_id, view: None, outcome: Outcome::default() };
    for workload in in_order(state) {
        if pass.is_full() {
            pass.wake(now);
            break;
        }
        pass.any(workload);
    }
    pass.nodes();
    if let Some(cluster) = &state.cluster {
        pass.outcome.plan.cut_to(cluster.version);
    }
    pass.outcome
}

/// The workloads there may be something to do for, those of higher priority first: they choose before the others do.
fn in_order(state: &State) -> Vec<&Arc<Workload>> {
    let priority = |w: &Workload| state.release(&w.key, w.release).map_or(0, |r| r.spec.placement.priority);
    let busy = state.workloads.values().filter(|w| !rest::is_at_rest(state, w));
    let mut workloads: Vec<_> = busy.map(|w| (std::cmp::Reverse(priority(w)), w)).collect();
    workloads.sort_by_key(|(priority, _)| *priority); // stable: by key within
    workloads.into_iter().map(|(_, workload)| workload).collect()
}

/// [`reconcile`] of some workloads only. For those who want to know what would become of them.
pub fn reconcile_some(state: &State, keys: &[WorkloadKey], now: Timestamp, new_id: &mut dyn FnMut() -> AllocId) -> Outcome {
    let findings = Findings::default();
    let mut pass = Pass { state, findings: &findings, now, new_id, view: None, outcome: Outcome::default() };
    for workload in keys.iter().filter_map(|key| state.workload(key)) {
        if pass.is_full() {
            break;
        }
        pass.any(workload);
    }
    pass.outcome
}

/// Why a slot has no copy, computed when somebody asks. Unset when it has one or should have none.
pub fn unplaced(state: &State, workload: &Workload, index: u32, now: Timestamp) -> Option<Reason> {
    if workload.stopped || index >= workload.copies || state.allocs_in(&workload.key, index).any(|a| a.run) {
        return None;
    }
    let release = state.release(&workload.key, workload.release)?;
    let newest = workload.deployment.and_then(|id| state.deployments.get(&id));
    let begins = newest.filter(|d| !d.prepared && d.phase.is_forward() && d.release_step.is_none());
    if let Some(lacks) = begins.and_then(|_| preflight(state, workload, release, &Findings::default(), now)) {
        return Some(lacks);
    }
    if let Some(shut) = newest.filter(|d| is_shut(state, workload, d) && d.reason.is_some()) {
        return shut.reason.clone();
    }
    let failures = state.failures.get(&(workload.key.clone(), index)).filter(|f| f.release == release.number);
    if failures.is_some_and(|f| now < retry_at(f, now)) {
        let last = state.allocs_in(&workload.key, index).filter(|a| a.has_ended()).last();
        return Some(last.and_then(|a| a.status.as_ref()?.reason.clone()).unwrap_or(Reason::Starting));
    }
    Some(scheduler::why_nowhere(state, &workload.key, &release.spec, now).unwrap_or(Reason::Starting))
}

/// The slots of a workload without a copy and why, in their order, at most `most` of them.
pub fn unplaced_slots(state: &State, workload: &Workload, now: Timestamp, most: usize) -> Vec<(u32, Reason)> {
    match state.release(&workload.key, workload.release).map(|r| r.spec.kind) {
        _ if workload.stopped => return vec![],
        Some(Kind::Daemon) => return daemons::unplaced(state, workload, now, most),
        Some(Kind::Job) => return job_copies::unplaced(state, workload, now, most),
        _ => {}
    }
    (0..workload.copies).filter_map(|index| Some((index, unplaced(state, workload, index, now)?))).take(most).collect()
}

/// When a wait that began at `since` is over. The time of a clock that was wrong may be hours away; nobody waits for it.
pub(crate) fn over_at(since: Timestamp, wait: Span, now: Timestamp) -> Timestamp {
    if since > now + AHEAD_MAX { now } else { since + wait }
}

/// When the slot may be given another copy.
fn retry_at(failures: &SlotFailures, now: Timestamp) -> Timestamp {
    let doublings = failures.count.saturating_sub(2).min(16);
    let delay = if failures.count < 2 { Span(0) } else { Span((RETRY_DELAY.0 << doublings).min(RETRY_DELAY_MAX.0)) };
    over_at(failures.last_at, delay, now)
}

/// Whether the copy's node answers.
pub(crate) fn answers(state: &State, alloc: &Alloc) -> bool {
    slot::answers(state, alloc)
}

struct Pass<'a> {
    state: &'a State,
    findings: &'a Findings,
    now: Timestamp,
    new_id: &'a mut dyn FnMut() -> AllocId,
    /// Made when the first copy is placed: most passes place none.
    view: Option<View<'a>>,
    outcome: Outcome,
}

impl<'a> Pass<'a> {
    fn any(&mut self, workload: &'a Workload) {
        match self.state.release(&workload.key, workload.release).map(|r| (r, r.spec.kind)) {
            Some((release, Kind::Daemon)) => self.daemon(workload, release),
            Some((_, Kind::Job)) => self.job(workload),
            _ => self.service(workload),
        }
    }

    fn service(&mut self, workload: &'a Workload) {
        self.forget(workload);
        if workload.stopped {
            self.stop_all(workload);
            return;
        }
        let newest = workload.deployment.and_then(|id| self.state.deployments.get(&id));
        let deployment = newest.filter(|d| !d.phase.is_final());
        let begins = deployment.filter(|d| !d.prepared && d.phase.is_forward());
        let target = self.state.release(&workload.key, workload.release);
        // Once its release command was placed it has begun.
        let lacks = begins.zip(target).filter(|(d, _)| d.release_step.is_none());
        let lacks = lacks.and_then(|(_, release)| preflight(self.state, workload, release, self.findings, self.now));
        let gate = deployment.filter(|_| lacks.is_none()).map_or(Gate::Open, |d| gate(self.state, workload, d, self.now));
        let Some(aim) = Aim::of(self.state, workload, newest.map(|d| &**d), lacks.is_some() || gate != Gate::Open) else { return };
        let (slots, beyond) = slot::slots(self.state, workload, workload.copies.max(aim.before_slots));
        let min_ready = aim.target.spec.update.min_ready;
        let slots: Vec<(Slot, Stage)> = slots
            .into_iter()
            .map(|slot| {
                let stage = slot.stage(self.state, self.now, min_ready);
                (slot, stage)
            })
            .collect();
        for alloc in beyond.iter().filter(|a| a.run) {
            self.stop(alloc, Reason::StopRequested); // scaled down
        }
        for (slot, _) in &slots {
            self.give_up_unknown(slot);
        }
        self.release_step(workload, deployment.map(|d| &**d), &gate);
        let moves = Move { pass: self, workload, aim: &aim, room: [true, true], moving: 0, placed: 0, left: None };
        let placed = moves.slots(&slots, &beyond);
        let Some(deployment) = deployment else { return };
        let (state, now) = (self.state, self.now);
        let rollout = Rollout { state, workload, deployment, aim: &aim, slots: &slots, beyond: &beyond, placed, lacks, gate: &gate, now };
        match rollout.judge() {
            Verdict::Steps(steps) => self.outcome.plan.deployments.extend(steps),
            Verdict::Wait(Some(until)) => self.wake(until),
            Verdict::Wait(None) => {}
        }
    }

    /// Starts the release command, and stops what nobody waits for any more.
    fn release_step(&mut self, workload: &'a Workload, deployment: Option<&'a Deployment>, gate: &Gate) {
        let waited_for = deployment.filter(|d| d.phase.is_forward() && !d.prepared).and_then(|d| d.release_step);
        for alloc in self.state.allocs_in(&workload.key, RELEASE_SLOT).filter(|a| a.run && Some(a.id) != waited_for) {
            self.outcome.plan.stop.push((alloc.id, Reason::StopRequested));
        }
        let Some(deployment) = deployment.filter(|d| *gate == Gate::Place && d.paused.is_none()) else { return };
        let Some(spec) = self.state.release(&workload.key, deployment.release).and_then(|r| r.spec.release_step()) else { return };
        let (alloc, state, now) = ((self.new_id)(), self.state, self.now);
        let ask = Ask { key: &workload.key, spec: &spec, alloc, troubled: &[] };
        if let Some((node, ports)) = self.view.get_or_insert_with(|| View::of(state, now)).place(ask) {
            let (key, release) = (workload.key.clone(), deployment.release);
            self.outcome.plan.place.push(Placement { alloc, key, index: RELEASE_SLOT, release, node, ports });
        }
    }

    fn stop_all(&mut self, workload: &Workload) {
        let mut left = false;
        for alloc in self.state.allocs_of(&workload.key).filter(|a| !a.has_ended()) {
            // A node that does not answer cannot keep a workload from being removed; it stops the copy when it is back.
            left |= slot::answers(self.state, alloc);
            if alloc.run {
                self.stop(alloc, Reason::StopRequested);
            }
        }
        if workload.removing && !left {
            self.outcome.plan.remove.push(workload.key.clone());
        }
    }

    /// Drops the records of copies that ended, but for the newest few of each slot.
    fn forget(&mut self, workload: &Workload) {
        let mut ended: BTreeMap<u32, Vec<AllocId>> = BTreeMap::new();
        for alloc in self.state.allocs_of(&workload.key).filter(|a| a.has_ended()) {
            ended.entry(alloc.index).or_default().push(alloc.id);
        }
        for (index, oldest_first) in ended {
            let kept = if index < workload.copies || index == RELEASE_SLOT { ENDED_KEPT } else { 0 };
            self.outcome.plan.forget.extend(oldest_first.iter().rev().skip(kept));
        }
    }

    /// Drains, and rebalancing if it was asked to go on by itself.
    fn nodes(&mut self) {
        let drain::Outcome { migrate, stop, commands, wake_at } = drain::decide(self.state, self.now);
        self.outcome.plan.migrate.extend(migrate);
        self.outcome.plan.stop.extend(stop);
        self.outcome.commands.extend(commands);
        self.outcome.commands.extend(drain::by_itself(self.state, self.now));
        if let Some(at) = wake_at {
            self.wake(at);
        }
    }

    /// Stops what gives way to a copy of `workload`. False: nothing will.
    fn displace(&mut self, room: Room, workload: &Workload) -> bool {
        let victims = match room {
            Room::None => return false,
            Room::Coming => return true,
            Room::Displace(victims) => victims,
        };
        let reason = Reason::Preempted { by: workload.key.to_string() };
        for victim in victims.iter().filter_map(|id| self.state.allocs.get(id)) {
            self.stop(victim, reason.clone());
        }
        true
    }

    fn is_full(&self) -> bool {
        let Plan { place, stop, forget, deployments, remove, adopt, drain, migrate } = &self.outcome.plan;
        let all = place.len() + stop.len() + forget.len() + deployments.len() + remove.len() + adopt.len() + drain.len() + migrate.len();
        place.len() >= PLACEMENTS_MAX || all >= CHANGES_MAX
    }

    fn wake(&mut self, at: Timestamp) {
        self.outcome.wake_at = Some(self.outcome.wake_at.map_or(at, |before| before.min(at)));
    }

    /// A copy that routers send requests to is stopped once they know better, or take too long to.
    fn stop(&mut self, alloc: &Alloc, reason: Reason) {
        match alloc.draining_since {
            None if endpoints::is_routed(self.state, alloc, self.now) => self.outcome.plan.drain.push(alloc.id),
            Some(since)
                if !endpoints::is_released(self.state, alloc, self.now) && self.now < over_at(since, ROUTERS_MAX_WAIT, self.now) =>
            {
                self.wake(since + ROUTERS_MAX_WAIT);
            }
            _ => self.outcome.plan.stop.push((alloc.id, reason)),
        }
    }
}
