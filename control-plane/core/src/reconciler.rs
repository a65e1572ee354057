//! From the whole state to the next batch of changes. Level-triggered: called at any time, it gives what is
//! still to do, and nothing when nothing is.
//!
//! A workload has slots `0..copies`. Each slot owns at most one **current** copy (of the release that ran
//! before, or any other) and one **next** copy (of the release that should run):
//!
//! ```text
//!   empty ── place ──► next ── ready for min_ready ──► settled
//!   current ── place next beside it (start-first) ──► current + next ── next settled ──► stop current
//!   current ── stop it (stop-first: a fixed port allows one only) ──► empty
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;

use optimus_common::api::v1::DeploymentPhase;
use optimus_common::protocol::{Blob, DesiredAlloc, Phase};
use optimus_common::{AllocId, NodeId, Reason, Timestamp};

use crate::scheduler;
use crate::state::apply::ENDED_KEPT;
use crate::state::{Alloc, Applied, Command, Deployment, DeploymentStep, Placement, Plan, Proposal, Release, State, Workload};

/// Most placements in one batch; the rest follow in the next.
pub const PLACEMENTS_MAX: usize = 500;
/// A new copy that restarted so often without becoming ready fails its deployment before the deadline.
pub const RESTARTS_MAX: u32 = 5;

/// What to propose now, and when to look again if nothing else changes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outcome {
    pub plan: Plan,
    pub wake_at: Option<Timestamp>,
}

/// Decides the next batch.
pub fn reconcile(state: &State, now: Timestamp, new_id: &mut dyn FnMut() -> AllocId) -> Outcome {
    let mut pass = Pass { scratch: state.clone(), now, new_id, outcome: Outcome::default() };
    for workload in state.workloads.values() {
        pass.workload(workload);
    }
    pass.outcome
}

/// Why a slot has no copy, computed when somebody asks. Unset when it has one or should have none.
pub fn unplaced(state: &State, workload: &Workload, index: u32, now: Timestamp) -> Option<Reason> {
    if workload.stopped || index >= workload.copies || state.allocs_of(&workload.key).any(|a| a.run && a.index == index) {
        return None;
    }
    let release = state.release(&workload.key, workload.release)?;
    Some(scheduler::why_not(state, &release.spec, now))
}

/// One slot of a workload.
#[derive(Default)]
struct Slot {
    /// Copies of other releases that should run.
    current: Vec<Arc<Alloc>>,
    /// Copies of the wanted release that should run, oldest first.
    next: Vec<Arc<Alloc>>,
    /// Copies told to stop that have not ended yet.
    stopping: bool,
}

struct Pass<'a> {
    /// The state with this pass' own decisions applied, so that two placements do not take the same room.
    scratch: State,
    now: Timestamp,
    new_id: &'a mut dyn FnMut() -> AllocId,
    outcome: Outcome,
}

impl Pass<'_> {
    fn workload(&mut self, workload: &Workload) {
        let allocs: Vec<Arc<Alloc>> = self.scratch.allocs_of(&workload.key).cloned().collect();
        self.forget(&allocs);
        if workload.stopped {
            for alloc in allocs.iter().filter(|a| a.run) {
                self.stop(alloc.id, Reason::StopRequested);
            }
            if workload.removing && allocs.iter().all(|a| a.has_ended()) {
                self.outcome.plan.remove.push(workload.key.clone());
            }
            return;
        }
        let Some(release) = self.scratch.release(&workload.key, workload.release).cloned() else { return };
        let mut slots: BTreeMap<u32, Slot> = (0..workload.copies).map(|n| (n, Slot::default())).collect();
        for alloc in &allocs {
            match slots.get_mut(&alloc.index) {
                Some(slot) if !alloc.run => slot.stopping |= !alloc.has_ended(),
                Some(slot) if alloc.release == workload.release => slot.next.push(alloc.clone()),
                Some(slot) => slot.current.push(alloc.clone()),
                None if alloc.run => self.stop(alloc.id, Reason::StopRequested), // scaled down
                None => {}
            }
        }
        let deployment = workload.deployment.and_then(|id| self.scratch.deployments.get(&id)).filter(|d| !d.phase.is_final()).cloned();
        self.slots(workload, &release, slots);
        if let Some(deployment) = deployment {
            self.deployment(workload, &release, &deployment, &allocs);
        }
    }

    fn slots(&mut self, workload: &Workload, release: &Arc<Release>, slots: BTreeMap<u32, Slot>) {
        let (now, min_ready) = (self.now, release.spec.update.min_ready);
        let settled =
            |a: &Alloc| a.is_ready() && a.status.as_ref().and_then(|s| s.ready_since).is_some_and(|since| now.since(since) >= min_ready);
        let fixed = release.spec.ports.iter().any(|p| p.fixed.is_some());
        // Copies under way: those placed beside a current one and not settled yet.
        let mut moving = slots.values().filter(|s| !s.current.is_empty() && s.next.iter().any(|a| !settled(a))).count() as u32;
        let mut moves: Vec<u32> = Vec::new();

        for (&index, slot) in &slots {
            // A copy that cannot run where it is gives way to another one.
            for alloc in slot.next.iter().chain(&slot.current).filter(|a| a.phase() == Phase::Failed) {
                let reason = alloc.status.as_ref().and_then(|s| s.reason.clone()).unwrap_or(Reason::StopRequested);
                self.stop(alloc.id, reason);
            }
            let next: Vec<&Arc<Alloc>> = slot.next.iter().filter(|a| a.phase() != Phase::Failed).collect();
            let current: Vec<&Arc<Alloc>> = slot.current.iter().filter(|a| a.phase() != Phase::Failed).collect();

            if let Some(&ready) = next.iter().find(|a| settled(a) && self.node_up(a.node)) {
                for other in next.iter().chain(&current).filter(|a| a.id != ready.id) {
                    self.stop(other.id, Reason::Replaced { release: workload.release });
                }
                continue;
            }
            if let Some(since) = next.iter().filter(|a| a.is_ready()).filter_map(|a| a.status.as_ref()?.ready_since).min() {
                self.wake(Timestamp(since.0 + min_ready.0));
            }
            match (next.iter().any(|a| self.node_up(a.node)), current.is_empty()) {
                (true, _) => {} // under way
                // Nothing runs here: place. With copies on a lost node only: place if there is room elsewhere.
                (false, true) if fixed && slot.stopping => {} // the port is still held
                (false, true) => self.place(workload, release, index),
                (false, false) => moves.push(index),
            }
        }
        // Old copies that do not run anyway move first; then in the order of the slots.
        let ready_now = |index: &u32| slots[index].current.iter().any(|a| a.is_ready());
        moves.sort_by_key(|index| (ready_now(index), *index));
        for index in moves {
            if moving >= release.spec.update.parallel.max(1) {
                break;
            }
            moving += 1;
            if fixed {
                for alloc in &slots[&index].current {
                    self.stop(alloc.id, Reason::Replaced { release: workload.release });
                }
            } else {
                self.place(workload, release, index);
            }
        }
    }

    fn deployment(&mut self, workload: &Workload, release: &Release, deployment: &Deployment, allocs: &[Arc<Alloc>]) {
        let id = deployment.id;
        let (now, min_ready) = (self.now, release.spec.update.min_ready);
        let mut ready_slots = std::collections::BTreeSet::new();
        let mut others_run = false;
        for alloc in allocs.iter().filter(|a| !a.has_ended()) {
            if alloc.release == workload.release && alloc.run && alloc.index < workload.copies {
                let since = alloc.status.as_ref().and_then(|s| s.ready_since);
                if alloc.is_ready() && since.is_some_and(|since| now.since(since) >= min_ready) {
                    ready_slots.insert(alloc.index);
                }
            } else {
                others_run = true;
            }
        }
        let ready = ready_slots.len() as u32;
        let steps = &mut self.outcome.plan.deployments;
        if ready == workload.copies && !others_run {
            steps.push(match deployment.phase {
                DeploymentPhase::RollingBack => DeploymentStep::RolledBack { id },
                _ => DeploymentStep::Succeed { id },
            });
            return;
        }
        if ready > deployment.progress {
            steps.push(DeploymentStep::Progress { id, ready });
            return; // the deadline starts afresh once this is applied
        }
        let deadline_at = deployment.progress_at + deployment.deadline;
        let hopeless = deployment.phase == DeploymentPhase::Running
            && allocs.iter().any(|a| {
                a.run
                    && a.release == deployment.release
                    && a.created_at >= deployment.created_at
                    && a.status.as_ref().is_some_and(|s| !s.ready && s.restarts >= RESTARTS_MAX)
            });
        if hopeless || self.now >= deadline_at {
            // Name a copy that is in trouble rather than one that merely waits.
            let why = |a: &Alloc| a.status.as_ref().and_then(|s| s.reason.clone());
            let mut stuck: Vec<&Arc<Alloc>> = allocs.iter().filter(|a| a.run && a.release == workload.release && !a.is_ready()).collect();
            stuck.sort_by_key(|a| (why(a).is_none_or(|r| r.is_calm()), a.index));
            let (copy, last) = match stuck.first() {
                Some(alloc) => (Some(alloc.name()), why(alloc)),
                None => {
                    let empty = (0..workload.copies).find_map(|n| unplaced(&self.scratch, workload, n, self.now).map(|r| (n, r)));
                    empty.map_or((None, None), |(n, reason)| (Some(format!("{}-{n}", workload.key.workload)), Some(reason)))
                }
            };
            let reason = match (hopeless, last) {
                (true, Some(last)) => last,
                (_, last) => Reason::DeadlinePassed { deadline: deployment.deadline, copy, last: last.map(Box::new) },
            };
            steps.push(DeploymentStep::Fail { id, reason });
        } else {
            self.wake(deadline_at);
        }
    }

    /// Drops the records of copies that ended, but for the newest few of each slot.
    fn forget(&mut self, allocs: &[Arc<Alloc>]) {
        let mut ended: BTreeMap<u32, Vec<&Arc<Alloc>>> = BTreeMap::new();
        for alloc in allocs.iter().filter(|a| a.has_ended()) {
            ended.entry(alloc.index).or_default().push(alloc);
        }
        for list in ended.values_mut() {
            list.sort_by_key(|a| std::cmp::Reverse((a.created_at, a.id)));
            self.outcome.plan.forget.extend(list.iter().skip(ENDED_KEPT).map(|a| a.id));
        }
    }

    fn node_up(&self, node: NodeId) -> bool {
        self.scratch.nodes.get(&node).is_some_and(|n| n.up)
    }

    fn wake(&mut self, at: Timestamp) {
        self.outcome.wake_at = Some(self.outcome.wake_at.map_or(at, |before| before.min(at)));
    }

    fn stop(&mut self, alloc: AllocId, reason: Reason) {
        if self.outcome.plan.stop.iter().any(|(id, _)| *id == alloc) {
            return;
        }
        self.try_out(Plan { stop: vec![(alloc, reason.clone())], ..Plan::default() });
        self.outcome.plan.stop.push((alloc, reason));
    }

    fn place(&mut self, workload: &Workload, release: &Release, index: u32) {
        if self.outcome.plan.place.len() >= PLACEMENTS_MAX {
            self.wake(self.now);
            return;
        }
        let alloc = (self.new_id)();
        // What does not fit stays a wish; whoever asks is told why by `unplaced`.
        let Ok((node, ports)) = scheduler::place(&self.scratch, &workload.key, &release.spec, alloc, self.now) else { return };
        let placement = Placement { alloc, key: workload.key.clone(), index, release: release.number, node, ports };
        self.try_out(Plan { place: vec![placement.clone()], ..Plan::default() });
        self.outcome.plan.place.push(placement);
    }

    /// Applies a decision to the scratch state, by the code that will apply it for real.
    fn try_out(&mut self, plan: Plan) {
        let index = self.scratch.index;
        let _: Applied = self.scratch.apply(index, Proposal { at: self.now, request: None, command: Command::Plan(plan) });
    }
}

/// What a node should hold, as its agent receives it: its copies, less those that have ended as wished.
pub fn desired_for(state: &State, node: NodeId) -> Vec<DesiredAlloc> {
    state
        .allocs_on(node)
        .filter(|a| !a.has_ended())
        .filter_map(|a| {
            let release = state.release(&a.key, a.release)?;
            Some(DesiredAlloc {
                id: a.id,
                key: a.key.clone(),
                index: a.index,
                release: a.release,
                run: a.run,
                ports: a.ports.clone(),
                spec: Blob::of(&*release.spec),
            })
        })
        .collect()
}
