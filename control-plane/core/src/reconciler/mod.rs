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

mod desired;
mod rollout;
mod slot;

pub use desired::{desired_allocs, desired_for};
pub use rollout::RESTARTS_MAX;

use std::collections::BTreeMap;
use std::sync::Arc;

use optimus_common::api::v1::DeploymentPhase;
use optimus_common::{AllocId, NodeId, Reason, Span, Timestamp};

use crate::scheduler::{self, Ask, Room, View};
use crate::state::{Alloc, Deployment, Placement, Plan, Release, SlotFailures, State, Workload};
use rollout::{Rollout, Verdict};
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
    pub wake_at: Option<Timestamp>,
}

/// Decides the next batch.
pub fn reconcile(state: &State, now: Timestamp, new_id: &mut dyn FnMut() -> AllocId) -> Outcome {
    let mut pass = Pass { state, now, new_id, view: None, outcome: Outcome::default() };
    for workload in in_order(state) {
        if pass.is_full() {
            pass.wake(now);
            break;
        }
        pass.workload(workload);
    }
    pass.outcome
}

/// The workloads, those of higher priority first: they choose before the others do.
fn in_order(state: &State) -> Vec<&Arc<Workload>> {
    let priority = |w: &Workload| state.release(&w.key, w.release).map_or(0, |r| r.spec.placement.priority);
    let mut workloads: Vec<_> = state.workloads.values().map(|w| (std::cmp::Reverse(priority(w)), w)).collect();
    workloads.sort_by_key(|(priority, _)| *priority); // stable: by key within
    workloads.into_iter().map(|(_, workload)| workload).collect()
}

/// Why a slot has no copy, computed when somebody asks. Unset when it has one or should have none.
pub fn unplaced(state: &State, workload: &Workload, index: u32, now: Timestamp) -> Option<Reason> {
    if workload.stopped || index >= workload.copies || state.allocs_in(&workload.key, index).any(|a| a.run) {
        return None;
    }
    let release = state.release(&workload.key, workload.release)?;
    let failures = state.failures.get(&(workload.key.clone(), index)).filter(|f| f.release == release.number);
    if failures.is_some_and(|f| now < retry_at(f, now)) {
        let last = state.allocs_in(&workload.key, index).filter(|a| a.has_ended()).last();
        return Some(last.and_then(|a| a.status.as_ref()?.reason.clone()).unwrap_or(Reason::Starting));
    }
    Some(scheduler::why_nowhere(state, &workload.key, &release.spec, now).unwrap_or(Reason::Starting))
}

/// The slots of a workload without a copy and why, in their order, at most `most` of them.
pub fn unplaced_slots(state: &State, workload: &Workload, now: Timestamp, most: usize) -> Vec<(u32, Reason)> {
    (0..workload.copies).filter_map(|index| Some((index, unplaced(state, workload, index, now)?))).take(most).collect()
}

/// When a wait that began at `since` is over. The time of a clock that was wrong may be hours away; nobody waits for it.
fn over_at(since: Timestamp, wait: Span, now: Timestamp) -> Timestamp {
    if since > now + AHEAD_MAX { now } else { since + wait }
}

/// When the slot may be given another copy.
fn retry_at(failures: &SlotFailures, now: Timestamp) -> Timestamp {
    let doublings = failures.count.saturating_sub(2).min(16);
    let delay = if failures.count < 2 { Span(0) } else { Span((RETRY_DELAY.0 << doublings).min(RETRY_DELAY_MAX.0)) };
    over_at(failures.last_at, delay, now)
}

struct Pass<'a> {
    state: &'a State,
    now: Timestamp,
    new_id: &'a mut dyn FnMut() -> AllocId,
    /// Made when the first copy is placed: most passes place none.
    view: Option<View<'a>>,
    outcome: Outcome,
}

impl<'a> Pass<'a> {
    fn workload(&mut self, workload: &'a Workload) {
        self.forget(workload);
        if workload.stopped {
            self.stop_all(workload);
            return;
        }
        let Some(release) = self.state.release(&workload.key, workload.release) else { return };
        let (slots, beyond) = slot::slots(self.state, workload);
        let min_ready = release.spec.update.min_ready;
        let slots: Vec<(Slot, Stage)> = slots
            .into_iter()
            .map(|slot| {
                let stage = slot.stage(self.state, self.now, min_ready);
                (slot, stage)
            })
            .collect();
        let deployment = workload.deployment.and_then(|id| self.state.deployments.get(&id)).filter(|d| !d.phase.is_final());
        for alloc in beyond.iter().filter(|a| a.run) {
            self.stop(alloc, Reason::StopRequested); // scaled down
        }
        Move { pass: self, workload, release, rolling_back: deployment.is_some_and(|d| d.phase == DeploymentPhase::RollingBack) }
            .slots(&slots, &beyond);
        if let Some(deployment) = deployment {
            self.deployment(workload, deployment, &slots, &beyond);
        }
    }

    fn deployment(&mut self, workload: &Workload, deployment: &Deployment, slots: &[(Slot, Stage)], beyond: &[Arc<Alloc>]) {
        let rollout = Rollout { state: self.state, workload, deployment, slots, beyond, now: self.now };
        match rollout.judge() {
            Verdict::Step(step) => self.outcome.plan.deployments.push(step),
            Verdict::Wait(until) => self.wake(until),
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
            let kept = if index < workload.copies { ENDED_KEPT } else { 0 };
            self.outcome.plan.forget.extend(oldest_first.iter().rev().skip(kept));
        }
    }

    fn is_full(&self) -> bool {
        let Plan { place, stop, forget, deployments, remove } = &self.outcome.plan;
        place.len() >= PLACEMENTS_MAX || place.len() + stop.len() + forget.len() + deployments.len() + remove.len() >= CHANGES_MAX
    }

    fn wake(&mut self, at: Timestamp) {
        self.outcome.wake_at = Some(self.outcome.wake_at.map_or(at, |before| before.min(at)));
    }

    fn stop(&mut self, alloc: &Alloc, reason: Reason) {
        self.outcome.plan.stop.push((alloc.id, reason));
    }
}

/// Moves the slots of one workload towards its release.
struct Move<'p, 'a> {
    pass: &'p mut Pass<'a>,
    workload: &'a Workload,
    release: &'a Arc<Release>,
    rolling_back: bool,
}

impl Move<'_, '_> {
    fn slots(mut self, slots: &[(Slot, Stage)], beyond: &[Arc<Alloc>]) {
        let parallel = self.release.spec.update.parallel.max(1);
        let mut moving = 0;
        let mut room = true; // until a placement finds none: later ones of the same spec would not either
        let mut old: Vec<(bool, &Slot)> = Vec::new();
        for (slot, stage) in slots {
            if self.pass.is_full() {
                return self.pass.wake(self.pass.now);
            }
            for alloc in &slot.broken {
                let reason = alloc.status.as_ref().and_then(|s| s.reason.clone()).unwrap_or(Reason::StopRequested);
                self.pass.stop(alloc, reason);
            }
            if !matches!(stage, Stage::Settled { .. }) {
                self.stop_surplus(slot);
            }
            match stage {
                Stage::Settled { keep } => {
                    for alloc in slot.next.iter().chain(&slot.current).filter(|a| a.id != keep.id) {
                        self.pass.stop(alloc, Reason::Replaced { release: self.workload.release });
                    }
                }
                Stage::Starting { counts_at } => {
                    moving += 1;
                    if let Some(at) = counts_at {
                        self.pass.wake(*at);
                    }
                }
                Stage::Empty { .. } => {
                    let placed = room && self.may_place(slot) && self.place(slot, &mut room);
                    // A slot that waits for room holds up an update, which cannot succeed without it, but not the way back.
                    moving += u32::from(placed || !self.rolling_back);
                }
                Stage::Old { serving } => old.push((*serving, slot)),
            }
        }
        // Old copies that do not serve anyway move first; then in the order of the slots.
        old.sort_by_key(|(serving, slot)| (*serving, slot.index));
        let room_to_come = self.room_to_come(slots, beyond);
        for (serving, slot) in old {
            if self.pass.is_full() {
                return self.pass.wake(self.pass.now);
            }
            // Going back, a copy that does not serve is nothing to be careful with.
            if moving >= parallel && (serving || !self.rolling_back) {
                break;
            }
            if !self.may_place(slot) {
                continue;
            }
            let moves = (room && self.place(slot, &mut room)) || (!room_to_come && self.stop_first(slot));
            moving += u32::from(moves);
        }
    }

    /// A slot owns one old copy; it has more when a node came back with one that had been replaced. They would hold the room
    /// that other slots wait for, while the slot itself waits for its turn.
    fn stop_surplus(&mut self, slot: &Slot) {
        let answering = || slot.current.iter().filter(|a| slot::answers(self.pass.state, a));
        let Some(keep) = answering().max_by_key(|a| (a.is_ready(), a.release, a.id)).map(|a| a.id) else { return };
        let surplus: Vec<_> = answering().filter(|a| a.id != keep).cloned().collect();
        for alloc in surplus {
            self.pass.stop(&alloc, Reason::Replaced { release: self.workload.release });
        }
    }

    /// Copies of the workload are about to end: their room is worth waiting for before a copy that serves is stopped.
    fn room_to_come(&self, slots: &[(Slot, Stage)], beyond: &[Arc<Alloc>]) -> bool {
        let leaving = slots.iter().flat_map(|(slot, stage)| {
            let replaced = match stage {
                Stage::Settled { keep } => Some(slot.next.iter().chain(&slot.current).filter(|a| a.id != keep.id)),
                _ => None,
            };
            slot.stopping.iter().chain(&slot.broken).chain(replaced.into_iter().flatten())
        });
        leaving.chain(beyond).any(|a| slot::answers(self.pass.state, a))
    }

    /// False while a slot whose copies gave up on their nodes pauses.
    fn may_place(&mut self, slot: &Slot) -> bool {
        if !slot.broken.is_empty() {
            return false; // first told to stop, so that what it could not have is known; then another
        }
        let failures = self.pass.state.failures.get(&(self.workload.key.clone(), slot.index));
        let now = self.pass.now;
        let Some(at) = failures.filter(|f| f.release == self.release.number).map(|f| retry_at(f, now)) else { return true };
        if at > self.pass.now {
            self.pass.wake(at);
        }
        at <= self.pass.now
    }

    /// False: there is no room now. It stays a wish; whoever asks is told why by [`unplaced`].
    fn place(&mut self, slot: &Slot, room: &mut bool) -> bool {
        let (state, now) = (self.pass.state, self.pass.now);
        let alloc = (self.pass.new_id)();
        let troubled = self.troubled(slot);
        let ask = Ask { key: &self.workload.key, spec: &self.release.spec, alloc, troubled: &troubled };
        let view = self.pass.view.get_or_insert_with(|| View::of(state, now));
        let Some((node, ports)) = view.place(ask) else {
            match view.make_room(ask) {
                Room::None => *room = false,
                Room::Coming => {}
                Room::Displace(victims) => {
                    let reason = Reason::Preempted { by: self.workload.key.to_string() };
                    self.pass.outcome.plan.stop.extend(victims.into_iter().map(|id| (id, reason.clone())));
                }
            }
            return false;
        };
        let placement = Placement { alloc, key: self.workload.key.clone(), index: slot.index, release: self.release.number, node, ports };
        self.pass.outcome.plan.place.push(placement);
        true
    }

    /// Nodes where a copy of the slot gave up since one was ready.
    fn troubled(&self, slot: &Slot) -> Vec<NodeId> {
        let (state, key) = (self.pass.state, &self.workload.key);
        if !state.failures.contains_key(&(key.clone(), slot.index)) {
            return vec![];
        }
        let gave_up = |a: &&Arc<Alloc>| a.release == self.release.number && a.has_ended() && is_failed(a);
        state.allocs_in(key, slot.index).filter(gave_up).map(|a| a.node).collect()
    }

    /// Makes room for the next copy by stopping the old one, where that would do.
    fn stop_first(&mut self, slot: &Slot) -> bool {
        let (state, now, release) = (self.pass.state, self.pass.now, self.release);
        let view = self.pass.view.get_or_insert_with(|| View::of(state, now));
        let would_do = slot.current.iter().any(|old| {
            let old_release = state.release(&old.key, old.release);
            old_release.is_some_and(|of_old| view.fits_instead(old, of_old, &release.spec))
        });
        if would_do {
            for alloc in &slot.current {
                self.pass.stop(alloc, Reason::Replaced { release: release.number });
            }
        }
        would_do
    }
}

/// It gave up for a reason of its node; a port taken is another matter, the next copy has another.
fn is_failed(alloc: &Alloc) -> bool {
    use optimus_common::protocol::Phase;
    let port = matches!(alloc.status.as_ref().and_then(|s| s.reason.as_ref()), Some(Reason::PortTaken { .. }));
    alloc.phase() == Phase::Failed && !port
}
