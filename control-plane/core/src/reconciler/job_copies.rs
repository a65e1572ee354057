//! The copies of a job's runs: one in each slot that is not done. A copy that ended well never runs again; of two
//! that run, because a node came back, the older goes on.

use std::sync::Arc;

use optimus_common::{AllocId, NodeId, Reason, Timestamp};

use super::{Pass, answers};
use crate::jobs;
use crate::scheduler::{Ask, View};
use crate::state::{Alloc, Command, DeploymentStep, JobRun, Placement, Release, RunPhase, State, Workload};

/// Ended copies of a job whose records are kept, the newest.
pub const JOB_ENDED_KEPT: usize = 20;

impl<'a> Pass<'a> {
    pub(super) fn job(&mut self, workload: &'a Workload) {
        let Some(release) = self.state.release(&workload.key, workload.release) else { return };
        let decision = jobs::decide(self.state, workload, release, self.now);
        if !decision.steps.is_empty() {
            self.run_steps(decision.steps);
        }
        if let Some(at) = decision.wake_at {
            self.wake(at);
        }
        self.forget_job_copies(workload);
        if workload.stopped {
            return self.stop_all(workload);
        }
        // A job is deployed when its release is known; its runs are another matter.
        if let Some(id) = workload.deployment.filter(|id| self.state.deployments.get(id).is_some_and(|d| !d.phase.is_final())) {
            self.outcome.plan.deployments.push(DeploymentStep::Succeed { id });
        }
        let open: std::collections::BTreeSet<u32> =
            self.state.live_runs(&workload.key).filter(|r| r.phase == RunPhase::Active).flat_map(|r| r.open_slots()).collect();
        for alloc in self.state.allocs_of(&workload.key).filter(|a| a.run && !open.contains(&a.index)) {
            self.stop(alloc, Reason::StopRequested);
        }
        for run in self.state.live_runs(&workload.key).filter(|r| r.phase == RunPhase::Active) {
            let Some(release) = self.state.release(&run.job, run.release) else { continue };
            let mut room = true;
            for slot in run.open_slots() {
                if self.is_full() {
                    return self.wake(self.now);
                }
                self.run_slot(workload, run, release, slot, &mut room);
            }
        }
    }

    fn run_slot(&mut self, workload: &Workload, run: &JobRun, release: &'a Release, slot: u32, room: &mut bool) {
        let copies: Vec<&Arc<Alloc>> = self.state.allocs_in(&run.job, slot).filter(|a| !a.has_ended()).collect();
        if self.state.allocs_in(&run.job, slot).any(|a| a.is_complete()) {
            return; // about to be noted
        }
        // Not settled yet: what ended is noted first, what stops is waited for, so that no two work at once.
        let mut hold = copies.iter().any(|a| answers(self.state, a) && (!a.run || a.phase().is_terminal()));
        let mut kept = false;
        for copy in copies.iter().filter(|a| a.run && answers(self.state, a)) {
            if copy.migrate {
                let node = self.state.nodes.get(&copy.node).map_or_else(String::new, |n| n.facts.name.clone());
                self.stop(copy, Reason::Drained { node });
                hold = true;
            } else if copy.phase().is_terminal() {
                continue;
            } else if kept {
                self.stop(copy, Reason::Replaced { release: release.number });
            } else {
                kept = true; // the oldest comes first
            }
        }
        if kept || hold || !*room {
            return;
        }
        if let Some(at) = run.retry_at.filter(|at| *at > self.now) {
            return self.wake(at);
        }
        let troubled: Vec<NodeId> = self.state.allocs_in(&run.job, slot).filter(|a| a.has_ended()).map(|a| a.node).collect();
        let alloc = (self.new_id)();
        let (state, now) = (self.state, self.now);
        let ask = Ask { key: &run.job, spec: &release.spec, alloc, troubled: &troubled };
        let view = self.view.get_or_insert_with(|| View::of(state, now));
        match view.place(ask) {
            Some((node, ports)) => {
                let placement = Placement { alloc, key: run.job.clone(), index: slot, release: release.number, node, ports };
                self.outcome.plan.place.push(placement);
            }
            None => {
                let made = view.make_room(ask);
                *room = self.displace(made, workload);
            }
        }
    }

    fn forget_job_copies(&mut self, workload: &Workload) {
        let kept = if workload.removing { 0 } else { JOB_ENDED_KEPT };
        let mut ended: Vec<AllocId> = self.state.allocs_of(&workload.key).filter(|a| a.has_ended()).map(|a| a.id).collect();
        ended.sort_unstable();
        self.outcome.plan.forget.extend(ended.iter().rev().skip(kept));
    }

    fn run_steps(&mut self, steps: Vec<crate::state::RunStep>) {
        match self.outcome.commands.last_mut() {
            Some(Command::RunSteps(batch)) if batch.len() < jobs::STEPS_MAX => batch.extend(steps),
            _ => self.outcome.commands.push(Command::RunSteps(steps)),
        }
    }
}

/// The slots of active runs without a copy, and why.
pub(super) fn unplaced(state: &State, workload: &Workload, now: Timestamp, most: usize) -> Vec<(u32, Reason)> {
    let active = state.live_runs(&workload.key).filter(|r| r.phase == RunPhase::Active);
    let empty = active.flat_map(|run| {
        let reason = jobs::waits_for(state, run, now).unwrap_or(Reason::Starting);
        let slots = run.open_slots().filter(|slot| !state.allocs_in(&run.job, *slot).any(|a| !a.has_ended()));
        slots.map(move |slot| (slot, reason.clone())).collect::<Vec<_>>()
    });
    empty.take(most).collect()
}
