//! Jobs, runs, drains and rebalancing as the API shows them.

use optimus_common::api::v1 as api;
use optimus_common::api::v1::ReasonView;
use optimus_common::spec::Kind;
use optimus_common::{NodeId, Timestamp};

use crate::drain;
use crate::jobs;
use crate::state::{Alloc, JobRow, JobRun, Node, RebalanceRow, RunPhase, SkipReason, State, Trigger, Workload};

/// Copies named with a run, and copies listed as left of a drain.
const COPIES_SHOWN: usize = 100;

fn run_phase(phase: RunPhase) -> api::RunPhase {
    match phase {
        RunPhase::Waiting => api::RunPhase::Waiting,
        RunPhase::Active => api::RunPhase::Active,
        RunPhase::Succeeded => api::RunPhase::Succeeded,
        RunPhase::Failed => api::RunPhase::Failed,
        RunPhase::Cancelled => api::RunPhase::Cancelled,
    }
}

pub fn job_run(state: &State, row: &JobRun, now: Timestamp) -> api::JobRun {
    let JobRun {
        id,
        job,
        number,
        trigger,
        scheduled_for,
        local,
        release,
        phase,
        first_index: _,
        copies,
        done,
        failures,
        attempts,
        retry_at,
        created_at,
        started_at,
        ended_at,
        reason,
        exit,
        params,
        payload: _,
    } = row;
    let reason = if phase.is_final() { reason.clone() } else { jobs::waits_for(state, row, now).or_else(|| reason.clone()) };
    let named = row.slots().take(COPIES_SHOWN).flat_map(|slot| state.allocs_in(job, slot)).map(|a| a.name());
    let mut names: Vec<String> = named.collect();
    names.dedup();
    api::JobRun {
        id: *id,
        key: job.clone(),
        number: *number,
        trigger: match trigger {
            Trigger::Schedule => api::RunTrigger::Schedule,
            Trigger::Deploy => api::RunTrigger::Deploy,
            Trigger::Request => api::RunTrigger::Request,
        },
        phase: run_phase(*phase),
        release: *release,
        scheduled_for: *scheduled_for,
        scheduled_local: local.clone(),
        copies: names,
        copies_wanted: *copies,
        copies_done: done.len() as u32,
        attempts: *attempts,
        failures: *failures,
        created_at: *created_at,
        started_at: *started_at,
        ended_at: *ended_at,
        retry_at: *retry_at,
        exit: *exit,
        reason: reason.as_ref().map(ReasonView::from),
        params: params.clone(),
    }
}

/// None for what is no job.
pub fn job(state: &State, row: &Workload, now: Timestamp) -> Option<api::Job> {
    let release = state.release(&row.key, row.release).filter(|r| r.spec.kind == Kind::Job)?;
    let unknown = JobRow::default();
    let job = state.job(&row.key).map_or(&unknown, |j| &**j);
    let count = |phase| state.live_runs(&row.key).filter(|r| r.phase == phase).count() as u32;
    let skip = |why: &SkipReason| match why {
        SkipReason::Overlap { run } => format!("run {run} was still active"),
        SkipReason::Missed => "it was missed".to_owned(),
        SkipReason::MadeUp => "it was missed; a newer one made up for it".to_owned(),
        SkipReason::Full => "as many runs as may were waiting".to_owned(),
    };
    Some(api::Job {
        key: row.key.clone(),
        release: row.release,
        stopped: row.stopped,
        schedule: release.spec.schedule.clone(),
        next_at: job.next.as_ref().map(|d| d.start_at),
        next_local: job.next.as_ref().map(|d| d.local.clone()),
        waiting: count(RunPhase::Waiting),
        active: count(RunPhase::Active),
        skipped: job.skipped,
        last_skip: job.last_skip.as_ref().map(|s| format!("{}: {}", s.at, skip(&s.why))),
        last_run: state.runs_of(&row.key).next_back().map(|run| job_run(state, run, now)),
    })
}

/// What a job wants of copies at the moment, and how many of them run.
pub(super) fn job_copies(state: &State, row: &Workload) -> (u32, u32) {
    let wanted = state.live_runs(&row.key).filter(|r| r.phase == RunPhase::Active).map(|r| r.open_slots().count() as u32).sum();
    let runs = |a: &&std::sync::Arc<Alloc>| a.run && a.is_ready();
    (wanted, state.allocs_of(&row.key).filter(runs).count() as u32)
}

/// What went wrong with a job last, until a run goes well.
pub(super) fn job_trouble(state: &State, row: &Workload) -> Option<optimus_common::Reason> {
    let last = state.runs_of(&row.key).rev().find(|r| r.phase.is_final() && r.phase != RunPhase::Cancelled)?;
    if last.phase == RunPhase::Failed { last.reason.clone() } else { None }
}

pub(super) fn drain(state: &State, row: &Node) -> Option<api::DrainView> {
    let drain = row.drain.as_ref()?;
    let left = if drain.done_at.is_some() { vec![] } else { drain::waiting(state, row.id) };
    let left = left.into_iter().take(COPIES_SHOWN).map(|(copy, why)| api::DrainLeft { copy, why }).collect();
    Some(api::DrainView {
        started_at: drain.started_at,
        deadline: drain.deadline,
        keep_daemons: drain.keep_daemons,
        done_at: drain.done_at,
        left,
    })
}

pub fn drain_preview(state: &State, node: NodeId, keep_daemons: bool, now: Timestamp) -> api::DrainPreview {
    let drain::Preview { copies, waves } = drain::preview(state, node, keep_daemons, now);
    let fate = |drain::Fated { copy, key: _, fate }| {
        let (fate, to, reason) = match fate {
            drain::Fate::Moves { to: _, to_name } => ("moves", Some(to_name), None),
            drain::Fate::Waits { why } => ("waits", None, Some(ReasonView::from(&why))),
            drain::Fate::Finishes => ("finishes", None, None),
            drain::Fate::StopsLast => ("stops_last", None, None),
            drain::Fate::Stays => ("stays", None, None),
        };
        api::DrainFate { copy, fate: fate.into(), to, reason }
    };
    api::DrainPreview { node, copies: copies.into_iter().map(fate).collect(), waves }
}

pub fn rebalance_settings(state: &State) -> api::RebalanceSettings {
    let RebalanceRow { automatic, moves, every, .. } = state.rebalance.unwrap_or_default();
    api::RebalanceSettings { automatic, moves, every }
}

pub fn rebalance_moves(state: &State, moves: &[drain::Move]) -> Vec<api::RebalanceMove> {
    let name = |node: &NodeId| state.nodes.get(node).map_or_else(|| node.to_string(), |n| n.facts.name.clone());
    let shown = |m: &drain::Move| api::RebalanceMove {
        allocation: m.alloc,
        copy: m.copy.clone(),
        from: name(&m.from),
        to: name(&m.to),
        why: m.why.clone(),
    };
    moves.iter().map(shown).collect()
}
