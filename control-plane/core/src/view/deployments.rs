//! How the API shows a deployment.

use optimus_common::Reason;
use optimus_common::api::v1 as api;
use optimus_common::api::v1::{DeploymentPhase, DeploymentStepView, ReasonView};
use optimus_common::spec::Strategy;

use crate::deployments::analysis::Sample;
use crate::deployments::{Findings, Gate, gate, preflight};
use crate::reconciler;
use crate::state::{Deployment, State};

pub fn deployment(state: &State, row: &Deployment) -> api::Deployment {
    let Deployment {
        id,
        key,
        release,
        from_release,
        trigger,
        phase,
        created_at,
        ended_at,
        deadline: _,
        progress: _,
        progress_at: _,
        reason,
        since,
        strategy,
        step,
        weight,
        paused,
        promoted,
        called_off: _,
        from_copies: _,
        relapses: _,
        prepared: _,
        release_step,
        traffic,
    } = row;
    let workload = state.workload(key);
    // While rolling back, what counts is the release it goes back to.
    let counted = workload.map_or(*release, |w| w.release);
    let wanted = workload.map_or(0, |w| if phase.is_forward() { reconciler::wanted_now(state, w, row) } else { w.copies });
    api::Deployment {
        id: *id,
        key: key.clone(),
        release: *release,
        from_release: *from_release,
        phase: *phase,
        since: *since,
        ready: state.allocs_of(key).filter(|a| a.run && a.release == counted && a.is_ready()).count() as u32,
        wanted,
        created_at: *created_at,
        ended_at: *ended_at,
        deadline_at: deadline_at(state, row),
        reason: reason.clone().filter(|_| !phase.is_forward()).or_else(|| waiting_for(state, row)).as_ref().map(ReasonView::from),
        trigger: trigger.clone(),
        strategy: strategy.word().into(),
        weight: *weight,
        steps: if *strategy == Strategy::Canary { steps(state, row, *step) } else { vec![] },
        paused: paused.is_some(),
        promoted: *promoted || !row.keeps_old(),
        release_step: *release_step,
        traffic: (*traffic != Default::default()).then(|| api::TrafficView { new: side(&traffic.new), old: side(&traffic.old) }),
    }
}

fn side(sample: &Sample) -> api::TrafficSide {
    api::TrafficSide { requests: sample.requests, errors: sample.errors }
}

fn steps(state: &State, row: &Deployment, current: u32) -> Vec<DeploymentStepView> {
    let Some(release) = state.release(&row.key, row.release) else { return vec![] };
    let forward = row.phase.is_forward() && !row.promoted;
    let status = |n: u32| match n.cmp(&current) {
        _ if row.promoted || row.phase == DeploymentPhase::Succeeded => "done",
        std::cmp::Ordering::Less => "done",
        std::cmp::Ordering::Equal if forward => "current",
        _ => "waiting",
    };
    let shown = |(n, step): (usize, &optimus_common::spec::CanaryStep)| DeploymentStepView {
        weight: step.weight,
        bake: step.bake,
        status: status(n as u32).into(),
    };
    release.spec.update.canary_steps().iter().enumerate().map(shown).collect()
}

/// When it fails without progress, or is through with its bake. None while nobody waits for a time.
fn deadline_at(state: &State, row: &Deployment) -> Option<optimus_common::Timestamp> {
    if row.phase.is_final() || row.paused.is_some() {
        return None;
    }
    match row.phase {
        DeploymentPhase::Baking => baked_at(state, row),
        DeploymentPhase::Promoting if row.keeps_old() => None,
        DeploymentPhase::Preparing if row.release_step.is_some() => match gate(state, state.workload(&row.key)?, row, row.progress_at) {
            Gate::Wait { until, .. } => Some(until),
            _ => None,
        },
        _ => Some(row.progress_at + row.deadline),
    }
}

fn baked_at(state: &State, row: &Deployment) -> Option<optimus_common::Timestamp> {
    let update = &state.release(&row.key, row.release)?.spec.update;
    let bake = match row.strategy {
        Strategy::Canary => update.canary_steps().get(row.step as usize)?.bake,
        _ => update.hold,
    };
    Some(row.since? + bake)
}

/// What a deployment that is under way waits for, as far as it is not a copy of its own.
fn waiting_for(state: &State, row: &Deployment) -> Option<Reason> {
    let workload = state.workload(&row.key).filter(|w| !row.phase.is_final() && w.deployment == Some(row.id))?;
    if let Some(pause) = &row.paused {
        return Some(Reason::Paused { since: pause.since, why: pause.why.clone() });
    }
    match row.phase {
        DeploymentPhase::Preparing if row.release_step.is_some() => match gate(state, workload, row, row.progress_at) {
            Gate::Wait { why, .. } => Some(why),
            _ => None,
        },
        DeploymentPhase::Preparing => {
            preflight(state, workload, &**state.release(&row.key, row.release)?, &Findings::default(), row.progress_at)
        }
        DeploymentPhase::Baking => baked_at(state, row).map(|until| Reason::Baking { until }),
        DeploymentPhase::Promoting if row.keeps_old() => Some(Reason::AwaitingPromotion),
        _ => reconciler::unplaced_slots(state, workload, row.progress_at, 1).pop().map(|(_, reason)| reason),
    }
}
