//! Which instants of a schedule get a run.

use optimus_common::spec::job::MISSED_MAX;
use optimus_common::spec::{Instance, Missed, Overlap, Schedule, Timetable};
use optimus_common::{Reason, Span, Timestamp, WorkloadKey};

use super::Decision;
use crate::state::{Due, JobRow, Release, RunPhase, RunStep, SkipReason, State, Workload, scheduled_run_id};

/// Later than this a run counts as missed. Longer than a change of leaders takes.
const LATE_MAX: Span = Span::secs(60);

/// The next instant of a schedule after `after`.
pub fn next_due(key: &WorkloadKey, schedule: &Schedule, after: Timestamp) -> Option<Due> {
    let table = Timetable::of(schedule).ok()?;
    table.after(after).map(|next| due(key, schedule, next))
}

fn due(key: &WorkloadKey, schedule: &Schedule, instance: Instance) -> Due {
    let Instance { at, local } = instance;
    // From the run's id, so that it is the same on every server and another at each run.
    let id = scheduled_run_id(key, at).0.as_u128();
    let jitter = if schedule.jitter.0 == 0 { 0 } else { (id % u128::from(schedule.jitter.0 + 1)) as u64 };
    Due { at, local, start_at: at + Span(jitter) }
}

pub(super) fn decide(state: &State, workload: &Workload, release: &Release, row: &JobRow, now: Timestamp, decision: &mut Decision) {
    let (key, schedule) = (&workload.key, release.spec.schedule.as_ref());
    if row.armed_release != release.number {
        decision.steps.push(arm(state, key, release, row, now));
        return;
    }
    let (Some(schedule), Some(next)) = (schedule, &row.next) else { return };
    if now < next.start_at {
        return decision.wake(next.start_at);
    }
    // The state holds only what was read well once.
    let Ok(table) = Timetable::of(schedule) else { return };
    let (instants, _) = table.between(row.decided, now, MISSED_MAX);
    let dues: Vec<Due> = instants.into_iter().map(|i| due(key, schedule, i)).take_while(|d| d.start_at <= now).collect();
    let starts = choose(schedule.missed, &dues, now);
    let mut live = state.live_runs(key).next_back().map(|run| run.number);
    let mut newest = row.newest;
    let mut steps = Vec::new();
    for (due, start) in dues.iter().zip(starts) {
        let late = is_late(due, now);
        let start = match (start, schedule.overlap, live) {
            (Err(why), ..) => Err(why),
            // Those made up for queue behind each other: with one active at a time they do not overlap.
            (Ok(()), Overlap::Forbid, Some(run)) if !(late && schedule.missed == Missed::RunAll) => Err(SkipReason::Overlap { run }),
            (Ok(()), Overlap::Replace, Some(_)) => {
                for run in state.live_runs(key) {
                    let (number, reason) = (run.number, Some(Reason::Superseded { by: release.number }));
                    steps.push(RunStep::End { key: key.clone(), number, phase: RunPhase::Cancelled, reason });
                }
                Ok(())
            }
            (Ok(()), ..) => Ok(()),
        };
        if start.is_ok() {
            newest += 1;
            live = Some(newest);
        }
        let start = start.map(|()| scheduled_run_id(key, due.at));
        let next = table.after(due.at).map(|next| self::due(key, schedule, next));
        // Of instants skipped in a row the last says it all.
        if let (Err(_), Some(RunStep::Due { start: Err(_), .. })) = (&start, steps.last()) {
            steps.pop();
        }
        steps.push(RunStep::Due { key: key.clone(), due: due.clone(), start, next });
    }
    decision.steps.extend(steps);
}

/// A new release follows its schedule from now on, or goes on with it if it is as before.
fn arm(state: &State, key: &WorkloadKey, release: &Release, row: &JobRow, now: Timestamp) -> RunStep {
    let schedule = release.spec.schedule.as_ref();
    let before = state.release(key, row.armed_release).and_then(|r| r.spec.schedule.as_ref());
    let (decided, next) = match schedule {
        Some(schedule) if before.is_some_and(|b| b.cron == schedule.cron && b.timezone == schedule.timezone) => {
            (row.decided, next_due(key, schedule, row.decided))
        }
        Some(schedule) => (now.max(row.decided), next_due(key, schedule, now.max(row.decided))),
        None => (row.decided, None),
    };
    RunStep::Arm { key: key.clone(), release: release.number, decided, next }
}

fn is_late(due: &Due, now: Timestamp) -> bool {
    now.since(due.start_at) > LATE_MAX
}

/// Which of the instants that have come get a run, leaving out what else runs.
fn choose(missed: Missed, dues: &[Due], now: Timestamp) -> Vec<Result<(), SkipReason>> {
    let last = dues.len().saturating_sub(1);
    let choice = |(n, due): (usize, &Due)| match missed {
        _ if !is_late(due, now) => Ok(()),
        Missed::Skip => Err(SkipReason::Missed),
        Missed::RunAll => Ok(()),
        Missed::RunOnce if n == last => Ok(()),
        Missed::RunOnce => Err(SkipReason::MadeUp),
    };
    dues.iter().enumerate().map(choice).collect()
}
