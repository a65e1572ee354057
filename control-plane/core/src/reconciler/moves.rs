//! Moves the slots of one workload towards what they should hold.

use std::sync::Arc;

use optimus_common::protocol::Phase;
use optimus_common::{AllocId, NodeId, Reason};
use uuid::Uuid;

use super::aim::Aim;
use super::silent::is_unknown;
use super::slot::{Slot, Stage, answers};
use super::{Pass, retry_at};
use crate::deployments::may_adopt;
use crate::endpoints;
use crate::scheduler::{self, Ask, View};
use crate::state::{Alloc, Placement, Release, Workload};

pub(super) struct Move<'p, 'a> {
    pub pass: &'p mut Pass<'a>,
    pub workload: &'a Workload,
    pub aim: &'p Aim<'a>,
    /// Until a placement finds none: later ones of the same spec would not either. Of the target, of the release before.
    pub room: [bool; 2],
    /// Slots between two states.
    pub moving: u32,
    /// Copies of the target placed in this look.
    pub placed: u32,
    /// Copies that may still be placed while others run on until routers know better. None: nobody waits for routers,
    /// and what is told to stop makes its place free at once.
    pub left: Option<u32>,
}

impl Move<'_, '_> {
    /// Copies of the target that were placed.
    pub fn slots(mut self, slots: &[(Slot, Stage)], beyond: &[Arc<Alloc>]) -> u32 {
        let halted = self.aim.update && slots.iter().any(|(slot, _)| slot.next.iter().any(|a| is_unwell(a)));
        let starting = slots.iter().filter(|(_, stage)| matches!(stage, Stage::Starting { .. })).count() as u32;
        // Copies of a release that is not the only one are unproven until they have settled.
        self.moving = if self.aim.update { starting } else { 0 };
        if self.draining(slots, beyond) > 0 {
            let all = slots.iter().flat_map(|(slot, _)| slot.should_run()).chain(beyond);
            let running = all.filter(|a| a.run && answers(self.pass.state, a)).count() as u32;
            self.left = Some(self.aim.most.saturating_sub(running));
        }
        let mut old: Vec<(bool, &Slot)> = Vec::new();
        for (slot, stage) in slots {
            if self.pass.is_full() {
                self.pass.wake(self.pass.now);
                return self.placed;
            }
            self.tidy(slot);
            if self.aim.keep {
                self.keep(slot, stage);
                continue;
            }
            if !matches!(stage, Stage::Settled { .. }) {
                self.stop_surplus(&slot.current);
            }
            match stage {
                Stage::Settled { keep } => {
                    for alloc in slot.next.iter().chain(&slot.current).filter(|a| a.id != keep.id) {
                        self.stop_settled(alloc);
                    }
                }
                Stage::Starting { counts_at } => {
                    self.moving += u32::from(!self.aim.update);
                    if let Some(at) = counts_at {
                        self.pass.wake(*at);
                    }
                }
                Stage::Empty { .. } => {
                    // What was to stop first still runs until routers know.
                    if slot.draining.iter().any(|a| answers(self.pass.state, a)) {
                        self.moving += 1;
                        continue;
                    }
                    // No more than `parallel` are unproven at once; beyond that what is missing is made up by the old release.
                    let unproven = self.aim.update && (halted || self.moving >= self.aim.budget.parallel);
                    if unproven {
                        self.place_before(slot);
                        continue;
                    }
                    let placed = self.place(slot);
                    // A slot that waits for room holds up an update, which cannot succeed without it, but not the way back.
                    self.moving += u32::from(placed || !self.aim.going_back);
                }
                Stage::Old { serving } => {
                    if !self.adopt(slot) {
                        old.push((*serving, slot));
                    }
                }
            }
        }
        if !self.aim.keep && !halted {
            self.exchange(old, slots, beyond);
        }
        self.placed
    }

    /// Old copies, one after the other, as far as the budget goes.
    fn exchange(&mut self, mut old: Vec<(bool, &Slot)>, slots: &[(Slot, Stage)], beyond: &[Arc<Alloc>]) {
        // Old copies that do not serve anyway move first; then in the order of the slots.
        old.sort_by_key(|(serving, slot)| (*serving, slot.index));
        let budget = self.aim.budget;
        let room_to_come = self.room_to_come(slots, beyond);
        let unsettled = || slots.iter().filter(|(_, stage)| !matches!(stage, Stage::Settled { .. }));
        let mut extra: u32 = unsettled().map(|(slot, _)| slot.extra(self.pass.state)).sum();
        extra += self.draining(slots, beyond);
        let mut missing = slots.iter().filter(|(slot, _)| !slot.serves(self.pass.state)).count() as u32;
        for (serving, slot) in old {
            if self.pass.is_full() {
                return self.pass.wake(self.pass.now);
            }
            // Going back, a copy that does not serve is nothing to be careful with.
            let careful = serving || !self.aim.going_back;
            if self.moving >= budget.parallel && careful {
                break;
            }
            if !self.may_place(slot, self.aim.target) {
                continue;
            }
            if extra < budget.surge && self.place(slot) {
                extra += 1;
                self.moving += 1;
                continue;
            }
            let allowed = match budget.unavailable {
                _ if !careful => true,
                // Said: what serves may be missing so often, whatever the room.
                Some(most) => !serving || missing < most,
                // Not said: `parallel` at a time; one at a time where so many are missing already, so that it ends at all.
                None => !room_to_come && (!serving || missing < budget.parallel || self.moving == 0),
            };
            if allowed && self.stop_first(slot, !careful || budget.unavailable.is_some()) {
                missing += u32::from(serving);
                self.moving += 1;
            }
        }
    }

    /// Copies that run on until routers know that they get no more requests: beyond the wanted number like others.
    fn draining(&self, slots: &[(Slot, Stage)], beyond: &[Arc<Alloc>]) -> u32 {
        let (state, now) = (self.pass.state, self.pass.now);
        let drains = slots.iter().flat_map(|(slot, _)| &slot.draining).filter(|a| answers(state, a)).count();
        let next = slots.iter().map(|(slot, stage)| match stage {
            Stage::Settled { keep } => {
                let others = slot.next.iter().chain(&slot.current).filter(|a| a.id != keep.id);
                others.filter(|a| endpoints::is_routed(state, a, now)).count()
            }
            _ => 0,
        });
        let beyond = beyond.iter().filter(|a| a.run && answers(state, a) && endpoints::is_routed(state, a, now)).count();
        (drains + next.sum::<usize>() + beyond) as u32
    }

    /// What is broken is told to stop, and what gets no more requests is stopped.
    fn tidy(&mut self, slot: &Slot) {
        for alloc in &slot.broken {
            let reason = alloc.status.as_ref().and_then(|s| s.reason.clone()).unwrap_or(Reason::StopRequested);
            self.pass.stop(alloc, reason);
        }
        for alloc in &slot.draining {
            self.stop_replaced(alloc);
        }
    }

    /// While both releases are kept: each side of the slot is made up by its own.
    fn keep(&mut self, slot: &Slot, stage: &Stage) {
        let (state, aim) = (self.pass.state, self.aim);
        if let Stage::Starting { counts_at: Some(at) } = stage {
            self.pass.wake(*at);
        }
        // A copy of the target that is to move is among `current`; it is of neither side.
        let (moved, before): (Vec<_>, Vec<_>) = slot.current.iter().cloned().partition(|a| a.release == aim.target.number);
        let here = |list: &[Arc<Alloc>]| list.iter().any(|a| answers(state, a));
        let unproven = aim.drop_unproven && here(&before);
        if slot.index >= aim.target_slots || unproven {
            for alloc in slot.next.iter().chain(&moved) {
                self.stop_replaced(alloc);
            }
        } else {
            match stage {
                Stage::Settled { keep } => {
                    for alloc in slot.next.iter().chain(&moved).filter(|a| a.id != keep.id) {
                        self.stop_settled(alloc);
                    }
                }
                Stage::Starting { .. } => {}
                // Held up or not, what was lost is replaced: by the release before, or where there is none by its own.
                Stage::Empty { lost: true } if aim.before.is_none() && !aim.shut => drop(self.place(slot)),
                _ if aim.hold || self.leaves_first(slot, &moved, Some(aim.target)) => {}
                _ => drop(self.place(slot)),
            }
        }
        if slot.index >= aim.before_slots {
            // What a deployment that was cut short has left there serves on until the target has the slot.
            if slot.index >= self.workload.copies || matches!(stage, Stage::Settled { .. }) {
                for alloc in &before {
                    self.pass.stop(alloc, Reason::StopRequested);
                }
            }
            return;
        }
        let (leaving, staying): (Vec<_>, Vec<_>) = before.into_iter().partition(|a| a.migrate);
        let needed = aim.beside || matches!(stage, Stage::Old { .. } | Stage::Empty { .. });
        if needed && !here(&staying) && !self.leaves_first(slot, &leaving, aim.before) {
            self.place_before(slot);
        }
        self.stop_surplus(&staying);
        if staying.iter().any(|a| a.is_ready() && answers(state, a)) {
            let lost = staying.iter().filter(|a| !answers(state, a) && !is_unknown(state, a));
            for alloc in leaving.iter().chain(lost) {
                self.stop_replaced(alloc);
            }
        }
    }

    /// Stops the copies of a slot that are to move to another node, where no copy may be there beyond the wanted number and
    /// there is a place to move to. Whether it did.
    fn leaves_first(&mut self, slot: &Slot, leaving: &[Arc<Alloc>], release: Option<&Arc<Release>>) -> bool {
        let (state, now) = (self.pass.state, self.pass.now);
        let Some(release) = release.filter(|_| self.aim.budget.surge == 0) else { return false };
        let here: Vec<_> = leaving.iter().filter(|a| answers(state, a)).cloned().collect();
        if here.is_empty() || !self.may_place(slot, release) {
            return false;
        }
        let ask = Ask { key: &self.workload.key, spec: &release.spec, alloc: AllocId(Uuid::nil()), troubled: &[] };
        if !self.pass.view.get_or_insert_with(|| View::of(state, now)).could_place(ask) {
            return true; // it stays for as long as there is nowhere to go
        }
        for alloc in &here {
            self.stop_replaced(alloc);
        }
        true
    }

    /// Another copy has the slot. One of the same release that is only cut off may have it again.
    fn stop_settled(&mut self, alloc: &Alloc) {
        if alloc.release != self.aim.target.number || !is_unknown(self.pass.state, alloc) {
            self.stop_replaced(alloc);
        }
    }

    fn stop_replaced(&mut self, alloc: &Alloc) {
        self.pass.stop(alloc, Reason::Replaced { release: self.aim.target.number });
    }

    /// A slot owns one old copy; it has more when a node came back with one that had been replaced, or a canary was there that
    /// a newer release took over from. They would hold the room that other slots wait for, while the slot itself waits for its
    /// turn. What proved itself stays.
    fn stop_surplus(&mut self, old: &[Arc<Alloc>]) {
        let answering = || old.iter().filter(|a| answers(self.pass.state, a));
        let proven = self.aim.before.map(|release| release.number);
        let best = answering().max_by_key(|a| (a.is_ready(), Some(a.release) == proven, a.release, a.id));
        let Some(keep) = best.map(|a| a.id) else { return };
        let surplus: Vec<_> = answering().filter(|a| a.id != keep).cloned().collect();
        for alloc in surplus {
            self.stop_replaced(&alloc);
        }
    }

    /// The copy of the slot goes on under the target, where it need not start anew for it.
    fn adopt(&mut self, slot: &Slot) -> bool {
        let (state, target) = (self.pass.state, self.aim.target);
        let may = |a: &&Arc<Alloc>| {
            let release = state.release(&a.key, a.release).filter(|r| may_adopt(state, r, target));
            !a.migrate && answers(state, a) && release.is_some_and(|r| scheduler::fits_resized(state, a, &r.spec, &target.spec))
        };
        let Some(alloc) = slot.current.iter().filter(may).max_by_key(|a| (a.is_ready(), a.id)) else { return false };
        self.pass.outcome.plan.adopt.push((alloc.id, target.number));
        true
    }

    /// Copies of the workload are about to end: their room is worth waiting for before a copy that serves is stopped.
    fn room_to_come(&self, slots: &[(Slot, Stage)], beyond: &[Arc<Alloc>]) -> bool {
        let leaving = slots.iter().flat_map(|(slot, stage)| {
            let replaced = match stage {
                Stage::Settled { keep } => Some(slot.next.iter().chain(&slot.current).filter(|a| a.id != keep.id)),
                _ => None,
            };
            slot.stopping.iter().chain(&slot.draining).chain(&slot.broken).chain(replaced.into_iter().flatten())
        });
        leaving.chain(beyond).any(|a| answers(self.pass.state, a))
    }

    /// False while a slot whose copies gave up on their nodes pauses.
    fn may_place(&mut self, slot: &Slot, release: &Release) -> bool {
        if !slot.broken.is_empty() {
            return false; // first told to stop, so that what it could not have is known; then another
        }
        let failures = self.pass.state.failures.get(&(self.workload.key.clone(), slot.index));
        let now = self.pass.now;
        let Some(at) = failures.filter(|f| f.release == release.number).map(|f| retry_at(f, now)) else { return true };
        if at > self.pass.now {
            self.pass.wake(at);
        }
        at <= self.pass.now
    }

    /// A copy of the target. False: there is no room now, or it is too soon. It stays a wish; whoever asks is told why by
    /// [`super::unplaced`].
    fn place(&mut self, slot: &Slot) -> bool {
        let placed = self.place_one(slot, self.aim.target, 0);
        self.placed += u32::from(placed);
        placed
    }

    /// A copy of the release before, which is still wanted.
    fn place_before(&mut self, slot: &Slot) {
        if let Some(before) = self.aim.before {
            self.place_one(slot, before, 1);
        }
    }

    fn place_one(&mut self, slot: &Slot, release: &Arc<Release>, side: usize) -> bool {
        if !self.room[side] || self.left == Some(0) || !self.may_place(slot, release) {
            return false;
        }
        let (state, now) = (self.pass.state, self.pass.now);
        let alloc = (self.pass.new_id)();
        let troubled = self.troubled(slot, release);
        let ask = Ask { key: &self.workload.key, spec: &release.spec, alloc, troubled: &troubled };
        let view = self.pass.view.get_or_insert_with(|| View::of(state, now));
        let Some((node, ports)) = view.place(ask) else {
            let room = view.make_room(ask);
            self.room[side] = self.pass.displace(room, self.workload);
            return false;
        };
        let placement = Placement { alloc, key: self.workload.key.clone(), index: slot.index, release: release.number, node, ports };
        self.pass.outcome.plan.place.push(placement);
        self.left = self.left.map(|n| n - 1);
        true
    }

    /// Nodes where a copy of the slot gave up since one was ready, and those it is to move away from.
    fn troubled(&self, slot: &Slot, release: &Release) -> Vec<NodeId> {
        let (state, key) = (self.pass.state, &self.workload.key);
        let mut nodes: Vec<NodeId> = slot.current.iter().filter(|a| a.migrate).map(|a| a.node).collect();
        if state.failures.contains_key(&(key.clone(), slot.index)) {
            let gave_up = |a: &&Arc<Alloc>| a.release == release.number && a.has_ended() && is_failed(a);
            nodes.extend(state.allocs_in(key, slot.index).filter(gave_up).map(|a| a.node));
        }
        nodes
    }

    /// Makes room for the next copy by stopping the old one, where that would do, or anyway.
    fn stop_first(&mut self, slot: &Slot, anyway: bool) -> bool {
        let (state, now, release) = (self.pass.state, self.pass.now, self.aim.target);
        let view = self.pass.view.get_or_insert_with(|| View::of(state, now));
        let would_do = slot.current.iter().any(|old| {
            let old_release = state.release(&old.key, old.release);
            old_release.is_some_and(|of_old| view.fits_instead(old, of_old, &release.spec))
        });
        let ask = Ask { key: &self.workload.key, spec: &release.spec, alloc: AllocId(Uuid::nil()), troubled: &[] };
        let stops = would_do || anyway && view.could_place(ask);
        if stops {
            for alloc in &slot.current {
                self.stop_replaced(alloc);
            }
        }
        stops
    }
}

/// A new copy that was started again and is not ready: nothing more is risked on its release until it is.
fn is_unwell(alloc: &Alloc) -> bool {
    !alloc.is_ready() && alloc.status.as_ref().is_some_and(|s| s.restarts > 0 || s.phase == Phase::Backoff)
}

/// It gave up for a reason of its node; a port taken is another matter, the next copy has another.
fn is_failed(alloc: &Alloc) -> bool {
    let port = matches!(alloc.status.as_ref().and_then(|s| s.reason.as_ref()), Some(Reason::PortTaken { .. }));
    alloc.phase() == Phase::Failed && !port
}
