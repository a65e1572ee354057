//! The life of a deployment. What its phases mean is in [`crate::deployments`].

use optimus_common::DeploymentId;
use optimus_common::spec::Strategy;

use super::*;
use crate::deployments::{RELAPSES_MAX, is_wanted, strategy_of};

/// What a deployment begins with.
pub(super) struct Begin {
    pub id: DeploymentId,
    pub release: u64,
    /// What to go back to.
    pub from: Option<u64>,
    /// How many copies there were.
    pub from_copies: u32,
    pub trigger: &'static str,
}

impl Step<'_> {
    pub(super) fn start_deployment(&mut self, workload: &mut Workload, begin: Begin) {
        let Begin { id, release, from, from_copies, trigger } = begin;
        self.end_running(workload, DeploymentPhase::Superseded, Some(Reason::Superseded { by: release }));
        let from_release = from.filter(|&from| from != release);
        let row = self.state.release(&workload.key, release).cloned();
        let old = from_release.and_then(|from| self.state.release(&workload.key, from)).map(|r| r.spec.clone());
        let strategy = match (&row, trigger) {
            (Some(row), "deploy" | "retry") => strategy_of(old.as_deref(), &row.spec, row.fresh),
            _ => Strategy::Rolling,
        };
        let shut = row.as_ref().is_some_and(|row| is_wanted(workload, row, trigger));
        let scale = trigger == "scale" && !shut;
        let deployment = Deployment {
            id,
            key: workload.key.clone(),
            release,
            from_release,
            trigger: trigger.into(),
            phase: if scale { DeploymentPhase::Placing } else { DeploymentPhase::Preparing },
            created_at: self.at,
            ended_at: None,
            deadline: row.map_or(Span::secs(120), |r| r.spec.update.deadline),
            progress: 0,
            progress_at: self.at,
            reason: None,
            since: Some(self.at),
            strategy,
            step: 0,
            weight: (strategy != Strategy::Rolling).then_some(0),
            paused: None,
            promoted: false,
            called_off: false,
            from_copies: from_release.map(|_| from_copies),
            relapses: 0,
            prepared: scale,
            release_step: None,
            traffic: Default::default(),
        };
        self.state.insert_deployment(deployment);
        workload.release = release;
        workload.newest = workload.newest.max(release);
        workload.stopped = false;
        workload.updated_at = self.at;
        workload.revision = self.index;
        workload.deployment = Some(id);
        self.event(EventKind::DeploymentStarted, &workload.key.to_string(), &format!("{trigger}: release {release}"), None);
        self.trim_history(&workload.key, release, workload.stable);
    }

    pub(super) fn end_running(&mut self, workload: &Workload, phase: DeploymentPhase, reason: Option<Reason>) {
        if let Some(running) = self.running_deployment(workload) {
            self.end_deployment(running.id, phase, reason);
        }
    }

    pub(super) fn end_deployment(&mut self, id: DeploymentId, phase: DeploymentPhase, reason: Option<Reason>) {
        let at = self.at;
        let Some(row) = self.change(id) else { return };
        row.phase = phase;
        row.since = Some(at);
        row.paused = None;
        if phase.is_final() {
            row.ended_at = Some(at);
            row.weight = None;
        }
        if reason.is_some() {
            row.reason = reason.clone();
        }
        let (key, release) = (row.key.clone(), row.release);
        let subject = key.to_string();
        self.rerouted(&key);
        let message = match phase {
            DeploymentPhase::Succeeded => format!("release {release} is deployed"),
            DeploymentPhase::Failed => format!("release {release} failed"),
            DeploymentPhase::RollingBack => format!("release {release} failed; going back to the release before"),
            DeploymentPhase::RolledBack => format!("release {release} was rolled back"),
            DeploymentPhase::Superseded => format!("deployment of release {release} was superseded"),
            DeploymentPhase::Cancelled => format!("deployment of release {release} was cancelled"),
            _ => return,
        };
        self.event(EventKind::DeploymentEnded, &subject, &message, reason);
    }

    fn change(&mut self, id: DeploymentId) -> Option<&mut Deployment> {
        self.state.deployments.get_mut(&id).map(Arc::make_mut)
    }

    /// Forgets old releases and deployments, never those in use.
    pub(super) fn trim_history(&mut self, key: &WorkloadKey, current: u64, stable: Option<u64>) {
        let mut used: Vec<u64> = self.state.allocs_of(key).map(|a| a.release).collect();
        let newest = self.state.workloads.get(key).and_then(|w| w.deployment).and_then(|id| self.state.deployments.get(&id));
        used.extend(newest.and_then(|d| d.from_release));
        let numbers: Vec<u64> = self.state.releases.range((key.clone(), 0)..=(key.clone(), u64::MAX)).map(|((_, n), _)| *n).collect();
        for &number in numbers.iter().rev().skip(RELEASES_KEPT) {
            if number != current && Some(number) != stable && !used.contains(&number) {
                self.state.releases.remove(&(key.clone(), number));
            }
        }
        let ended: Vec<_> = self.state.deployments_of(key).filter(|d| d.phase.is_final()).map(|d| d.id).collect();
        for &id in ended.iter().rev().skip(DEPLOYMENTS_KEPT) {
            self.state.remove_deployment(id);
        }
    }

    pub(super) fn deployment_step(&mut self, step: DeploymentStep) -> bool {
        let id = match &step {
            DeploymentStep::Progress { id, .. }
            | DeploymentStep::Succeed { id }
            | DeploymentStep::Fail { id, .. }
            | DeploymentStep::RolledBack { id }
            | DeploymentStep::Enter { id, .. }
            | DeploymentStep::Promote { id } => *id,
        };
        let Some(deployment) = self.state.deployments.get(&id).cloned() else { return false };
        let Some(workload) = self.state.workloads.get(&deployment.key).map(|w| Workload::clone(w)) else { return false };
        if deployment.phase.is_final() || workload.deployment != Some(id) {
            return false;
        }
        let at = self.at;
        match step {
            DeploymentStep::Progress { ready, .. } => {
                if ready <= deployment.progress {
                    return false;
                }
                let Some(row) = self.change(id) else { return false };
                row.progress = ready;
                row.progress_at = at;
            }
            DeploymentStep::Enter { from, to, step, weight, .. } => {
                if deployment.phase != from || !to.is_forward() || (to == from && step == deployment.step && weight == deployment.weight) {
                    return false;
                }
                self.enter(&deployment, to, step, weight);
            }
            DeploymentStep::Promote { .. } => {
                if deployment.promoted || !deployment.phase.is_forward() {
                    return false;
                }
                self.promote(&deployment);
            }
            DeploymentStep::Succeed { .. } => {
                self.put_workload(Workload { stable: Some(deployment.release), updated_at: at, revision: self.index, ..workload });
                self.end_deployment(id, DeploymentPhase::Succeeded, None);
            }
            DeploymentStep::Fail { reason, .. } => {
                // On the way back only that way's own deadline counts: the plan that began it may be proposed twice.
                if deployment.phase == DeploymentPhase::RollingBack && at < deployment.progress_at + deployment.deadline {
                    return false;
                }
                self.fail(&deployment, workload, reason);
            }
            DeploymentStep::RolledBack { .. } => {
                if deployment.phase != DeploymentPhase::RollingBack {
                    return false;
                }
                // The reason it failed stays.
                let phase = if deployment.called_off { DeploymentPhase::Cancelled } else { DeploymentPhase::RolledBack };
                self.end_deployment(id, phase, deployment.reason.clone());
            }
        }
        true
    }

    fn enter(&mut self, old: &Deployment, to: DeploymentPhase, step: u32, weight: Option<u32>) {
        let at = self.at;
        let Some(row) = self.change(old.id) else { return };
        let relapse =
            to < old.phase && matches!(old.phase, DeploymentPhase::Shifting | DeploymentPhase::Baking | DeploymentPhase::Promoting);
        // The time of a wait is not held against what comes after it.
        let fresh_clock = to > DeploymentPhase::Health || old.phase == DeploymentPhase::Preparing || step != old.step || relapse;
        row.phase = to;
        row.since = Some(at);
        if step != row.step || weight != row.weight {
            row.traffic = Default::default(); // compared is what had the same share at the same time
        }
        row.weight = weight;
        row.step = step;
        row.prepared = true;
        row.relapses += u32::from(relapse);
        if fresh_clock && row.relapses <= RELAPSES_MAX {
            row.progress_at = at;
        }
        let (subject, release) = (row.key.to_string(), row.release);
        if weight != old.weight {
            self.rerouted(&old.key);
        }
        if weight != old.weight
            && let Some(weight) = weight
        {
            self.event(EventKind::DeploymentShifted, &subject, &format!("release {release} has {weight} % of the traffic"), None);
        }
    }

    fn promote(&mut self, old: &Deployment) {
        let at = self.at;
        let Some(row) = self.change(old.id) else { return };
        row.promoted = true;
        row.progress_at = at;
        if row.strategy == Strategy::Canary || row.weight == Some(100) {
            row.phase = DeploymentPhase::Promoting;
            row.since = Some(at);
            row.step = if row.strategy == Strategy::BlueGreen { 1 } else { row.step };
        }
        row.weight = row.weight.filter(|_| row.strategy == Strategy::BlueGreen);
        let (subject, release) = (row.key.to_string(), row.release);
        self.rerouted(&old.key);
        self.event(EventKind::DeploymentPromoted, &subject, &format!("release {release} was promoted"), None);
    }

    /// The release does not do: back to the one before, if there is another, and it may come back by itself.
    fn fail(&mut self, deployment: &Deployment, workload: Workload, reason: Reason) {
        let (key, id) = (&deployment.key, deployment.id);
        let release = self.state.release(key, deployment.release).cloned();
        let before = deployment.from_release.and_then(|n| self.state.release(key, n)).cloned();
        let auto = release.as_ref().is_none_or(|r| r.spec.update.auto_rollback);
        match before {
            _ if deployment.phase == DeploymentPhase::RollingBack => self.end_deployment(id, DeploymentPhase::Failed, Some(reason)),
            Some(before) if release.is_some_and(|r| r.runs_as(&before)) => {
                let reason = Reason::NothingToGoBackTo { release: before.number, last: Box::new(reason) };
                self.end_deployment(id, DeploymentPhase::Failed, Some(reason));
            }
            Some(before) if auto => self.roll_back(deployment, workload, before.number, reason),
            _ => self.end_deployment(id, DeploymentPhase::Failed, Some(reason)),
        }
    }

    /// A phase of the same deployment: no new release, no canary, and what still runs of the old one stays.
    pub(super) fn roll_back(&mut self, deployment: &Deployment, workload: Workload, before: u64, reason: Reason) {
        let copies = deployment.from_copies.unwrap_or(workload.copies);
        self.put_workload(Workload { release: before, copies, updated_at: self.at, revision: self.index, ..workload });
        let at = self.at;
        if let Some(row) = self.change(deployment.id) {
            row.progress = 0;
            row.progress_at = at;
            row.weight = row.weight.map(|_| 0);
        }
        self.end_deployment(deployment.id, DeploymentPhase::RollingBack, Some(reason));
    }
}
