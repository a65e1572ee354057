//! What the slots of a workload should hold now: which releases, in how many slots, and how fast they may change.

use std::sync::Arc;

use optimus_common::api::v1::DeploymentPhase;
use optimus_common::spec::{Strategy, Update};

use crate::state::{Deployment, Release, State, Workload};

/// How fast copies may be exchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Budget {
    /// Slots that may be between two states at once.
    pub parallel: u32,
    /// Copies there may be beyond the wanted number.
    pub surge: u32,
    /// Copies that may be missing, as far as somebody said so.
    pub unavailable: Option<u32>,
}

impl Budget {
    fn of(update: &Update, copies: u32) -> Budget {
        let parallel = update.parallel.max(1);
        Budget {
            parallel,
            surge: update.max_surge.map_or(parallel, |a| a.of(copies)),
            unavailable: update.max_unavailable.map(|a| a.at_most(copies)),
        }
    }
}

pub(super) struct Aim<'a> {
    /// The release that should run.
    pub target: &'a Arc<Release>,
    /// The one before, while its copies are still replaced by its own.
    pub before: Option<&'a Arc<Release>>,
    /// Slots below this should hold a copy of the target.
    pub target_slots: u32,
    /// Slots below this should hold a copy of the release before, while both are kept.
    pub before_slots: u32,
    /// Copies of the release before are not stopped for one of the target.
    pub keep: bool,
    /// They are there beside a copy of the target as well; otherwise in its place.
    pub beside: bool,
    /// No copy of the target is placed.
    pub hold: bool,
    /// Nor to replace one that was lost: its release command has not ended well.
    pub shut: bool,
    /// What did not prove itself makes way for what runs.
    pub drop_unproven: bool,
    /// Going back: nothing to be careful with.
    pub going_back: bool,
    /// A deployment goes forward, with something to go back to.
    pub update: bool,
    pub budget: Budget,
    /// Most copies that may run at once.
    pub most: u32,
}

impl<'a> Aim<'a> {
    /// `lacks`: the deployment may not begin yet. None: the workload has no release that is kept.
    pub fn of(state: &'a State, workload: &Workload, newest: Option<&Deployment>, lacks: bool) -> Option<Aim<'a>> {
        let target = state.release(&workload.key, workload.release)?;
        let copies = workload.copies;
        let mut aim = Aim {
            target,
            before: None,
            target_slots: copies,
            before_slots: 0,
            keep: false,
            beside: false,
            hold: false,
            shut: false,
            drop_unproven: false,
            going_back: false,
            update: false,
            budget: Budget::of(&target.spec.update, copies),
            most: most(&target.spec.update, workload, newest),
        };
        let Some(deployment) = newest else { return Some(aim) };
        aim.going_back = deployment.phase == DeploymentPhase::RollingBack;
        let failed = deployment.phase == DeploymentPhase::Failed;
        if keeps_before(workload, deployment) {
            aim.before = deployment.from_release.and_then(|n| state.release(&workload.key, n));
        }
        let forward = deployment.phase.is_forward();
        aim.update = forward && aim.before.is_some();
        aim.hold = forward && (lacks || deployment.paused.is_some()) || failed && aim.before.is_some();
        let begins = lacks && deployment.phase == DeploymentPhase::Preparing;
        aim.beside = aim.before.is_some() && (deployment.keeps_old() || begins);
        // Whatever became of the deployment: nothing starts by a release whose command did not end well.
        aim.shut = crate::deployments::is_shut(state, workload, deployment);
        aim.hold |= aim.shut;
        aim.keep = aim.beside || aim.hold;
        aim.drop_unproven = failed && aim.before.is_some();
        if aim.keep {
            aim.before_slots = if aim.beside { deployment.from_copies.unwrap_or(copies) } else { copies };
        }
        if forward {
            aim.target_slots = wanted_now(state, workload, deployment);
        }
        Some(aim)
    }
}

/// The wanted number, of whichever release wants more, and what its way of taking over puts beside it.
fn most(update: &Update, workload: &Workload, newest: Option<&Deployment>) -> u32 {
    let copies = workload.copies;
    let surge = Budget::of(update, copies).surge;
    let Some(deployment) = newest.filter(|d| !d.phase.is_final()) else { return copies + surge };
    let beside = match deployment.strategy {
        _ if !deployment.phase.is_forward() || !deployment.keeps_old() => surge,
        Strategy::BlueGreen => copies,
        _ => update.canary.of(copies),
    };
    deployment.from_copies.unwrap_or(copies).max(copies) + beside
}

/// Copies of the release before may still be placed.
pub(crate) fn keeps_before(workload: &Workload, newest: &Deployment) -> bool {
    let held = newest.phase == DeploymentPhase::Failed && workload.release == newest.release;
    newest.from_release.is_some() && (newest.phase.is_forward() || held)
}

/// How many copies of its release a deployment wants at its present step.
pub(crate) fn wanted_now(state: &State, workload: &Workload, deployment: &Deployment) -> u32 {
    let canary = deployment.strategy == Strategy::Canary && deployment.keeps_old();
    match state.release(&workload.key, deployment.release) {
        Some(release) if canary => release.spec.update.canary.of(workload.copies).min(workload.copies),
        _ => workload.copies,
    }
}
