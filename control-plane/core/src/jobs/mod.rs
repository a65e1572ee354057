//! What is to be done about the runs of a job: which instants of its schedule get one, whose turn it is, what the end
//! of a copy means. Placing and stopping copies is the reconciler's part.
//!
//! The proposer computes everything from cron lines and time zones; `apply` only compares instants. An instant is
//! decided once: [`JobRow::decided`] only grows, so no leader, however it came to lead, starts one again.

mod schedule;

use std::sync::Arc;

use optimus_common::spec::{RunOn, Runs};
use optimus_common::{Reason, RunId, Span, Timestamp};

use crate::scheduler;
use crate::state::{Alloc, JobRow, JobRun, Release, RunPhase, RunStep, State, Workload, scheduled_run_id};

pub use schedule::next_due;

/// Most steps of one batch.
pub const STEPS_MAX: usize = 1000;

/// What to propose for one job, and when to look again.
#[derive(Debug, Default)]
pub(crate) struct Decision {
    pub steps: Vec<RunStep>,
    pub wake_at: Option<Timestamp>,
}

impl Decision {
    fn wake(&mut self, at: Timestamp) {
        self.wake_at = Some(self.wake_at.map_or(at, |before| before.min(at)));
    }
}

/// The next steps of a job.
pub(crate) fn decide(state: &State, workload: &Workload, release: &Release, now: Timestamp) -> Decision {
    let mut decision = Decision::default();
    let key = &workload.key;
    if workload.stopped {
        for run in state.live_runs(key) {
            let (number, reason) = (run.number, Some(Reason::StopRequested));
            decision.steps.push(RunStep::End { key: key.clone(), number, phase: RunPhase::Cancelled, reason });
        }
        return decision;
    }
    let unknown = JobRow::default();
    let row = state.job(key).map_or(&unknown, |row| &**row);
    let rules = release.spec.job_runs();
    schedule::decide(state, workload, release, row, now, &mut decision);
    if rules.on == RunOn::Deploy && row.ran_release < release.number {
        decision.steps.push(RunStep::Deploy { key: key.clone(), release: release.number, id: deploy_run_id(workload, release.number) });
    }
    for run in state.live_runs(key).filter(|r| r.phase == RunPhase::Active) {
        active(state, run, &rules, release, now, &mut decision);
    }
    begin(state, workload, &rules, &mut decision);
    decision
}

/// The run of a release, the same whoever computes it.
fn deploy_run_id(workload: &Workload, release: u64) -> RunId {
    // Far from any instant a schedule names: no two are taken for one.
    scheduled_run_id(&workload.key, Timestamp(u64::MAX - release))
}

/// What the copies of an active run have come to.
fn active(state: &State, run: &Arc<JobRun>, rules: &Runs, release: &Release, now: Timestamp, decision: &mut Decision) {
    let (key, number) = (&run.job, run.number);
    let mut failures = run.failures;
    for slot in run.open_slots() {
        let ended: Vec<&Arc<Alloc>> = state.allocs_in(key, slot).filter(|a| a.phase().is_terminal()).collect();
        if let Some(done) = ended.iter().find(|a| a.is_complete()) {
            decision.steps.push(RunStep::Done { key: key.clone(), number, alloc: done.id });
            continue;
        }
        // One that was told to stop, or to move, is no try that failed.
        for failed in ended.iter().filter(|a| a.run && !a.migrate) {
            failures += 1;
            let retry_at = (failures <= rules.retries).then(|| now + pause(release, failures));
            decision.steps.push(RunStep::Tried { key: key.clone(), number, alloc: failed.id, retry_at });
        }
    }
    if run.attempts == 0
        && let Some(since) = run.started_at
    {
        let until = since + rules.start_within;
        if now >= until {
            let reason = scheduler::why_nowhere(state, key, &release.spec, now);
            decision.steps.push(RunStep::End { key: key.clone(), number, phase: RunPhase::Failed, reason });
        } else {
            decision.wake(until);
        }
    }
    if let Some(at) = run.retry_at.filter(|at| *at > now) {
        decision.wake(at);
    }
}

/// The pause after so many failures: that of a restart, doubling.
fn pause(release: &Release, failures: u32) -> Span {
    let restart = &release.spec.restart;
    Span(restart.delay.0.saturating_mul(1 << failures.saturating_sub(1).min(20)).min(restart.delay_max.0))
}

/// Gives runs that wait their turn. One that was cancelled counts as active until its copies are gone.
fn begin(state: &State, workload: &Workload, rules: &Runs, decision: &mut Decision) {
    let key = &workload.key;
    let lingers = |run: &&Arc<JobRun>| {
        run.phase.is_final()
            && run.started_at.is_some()
            && run.slots().any(|slot| state.allocs_in(key, slot).any(|a| !a.has_ended() && crate::reconciler::answers(state, a)))
    };
    let waiting: Vec<u64> = state.live_runs(key).filter(|r| r.phase == RunPhase::Waiting).map(|r| r.number).collect();
    if waiting.is_empty() {
        return;
    }
    let active = state.live_runs(key).filter(|r| r.phase == RunPhase::Active).count();
    let busy = active + state.runs_of(key).filter(lingers).count();
    for number in waiting.into_iter().take((rules.active as usize).saturating_sub(busy)) {
        decision.steps.push(RunStep::Begin { key: key.clone(), number });
    }
}

/// Why a run that is not over does not run yet.
pub fn waits_for(state: &State, run: &JobRun, now: Timestamp) -> Option<Reason> {
    let workload = state.workload(&run.job)?;
    let release = state.release(&run.job, workload.release)?;
    match run.phase {
        RunPhase::Waiting => {
            let first = state.live_runs(&run.job).find(|r| r.number != run.number)?;
            Some(Reason::RunActive { run: first.number })
        }
        RunPhase::Active if run.retry_at.is_some_and(|at| at > now) => run.reason.clone(),
        RunPhase::Active => {
            let placed = |slot| state.allocs_in(&run.job, slot).any(|a| !a.has_ended());
            if run.open_slots().all(placed) { None } else { scheduler::why_nowhere(state, &run.job, &release.spec, now) }
        }
        _ => None,
    }
}
