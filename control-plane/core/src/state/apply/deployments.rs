//! The life of a deployment.
//!
//! ```text
//! Running ──► Succeeded
//!    │  └───► Superseded (by a newer one), Cancelled (stopped or removed)
//!    └─ no progress by the deadline ──► Failed (nothing to go back to)
//!                                  └──► RollingBack ──► RolledBack, or Failed, Superseded, Cancelled
//! ```

use optimus_common::DeploymentId;

use super::*;

impl Step<'_> {
    pub(super) fn start_deployment(
        &mut self,
        workload: &mut Workload,
        id: DeploymentId,
        release: u64,
        from_release: Option<u64>,
        trigger: &str,
        deadline: Span,
    ) {
        self.end_running(workload, DeploymentPhase::Superseded, Some(Reason::Superseded { by: release }));
        let deployment = Deployment {
            id,
            key: workload.key.clone(),
            release,
            from_release: from_release.filter(|&from| from != release),
            trigger: trigger.into(),
            phase: DeploymentPhase::Running,
            created_at: self.at,
            ended_at: None,
            deadline,
            progress: 0,
            progress_at: self.at,
            reason: None,
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
        let Some(row) = self.state.deployments.get_mut(&id) else { return };
        let row = Arc::make_mut(row);
        row.phase = phase;
        if phase.is_final() {
            row.ended_at = Some(self.at);
        }
        if reason.is_some() {
            row.reason = reason.clone();
        }
        let (subject, release) = (row.key.to_string(), row.release);
        let message = match phase {
            DeploymentPhase::Running => return,
            DeploymentPhase::Succeeded => format!("release {release} is deployed"),
            DeploymentPhase::Failed => format!("release {release} failed"),
            DeploymentPhase::RollingBack => format!("release {release} failed; going back to the release before"),
            DeploymentPhase::RolledBack => format!("release {release} was rolled back"),
            DeploymentPhase::Superseded => format!("deployment of release {release} was superseded"),
            DeploymentPhase::Cancelled => format!("deployment of release {release} was cancelled"),
        };
        self.event(EventKind::DeploymentEnded, &subject, &message, reason);
    }

    /// Forgets old releases and deployments, never those in use.
    pub(super) fn trim_history(&mut self, key: &WorkloadKey, current: u64, stable: Option<u64>) {
        let used: Vec<u64> = self.state.allocs_of(key).map(|a| a.release).collect();
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
            | DeploymentStep::RolledBack { id } => *id,
        };
        let Some(deployment) = self.state.deployments.get(&id).cloned() else { return false };
        let Some(workload) = self.state.workloads.get(&deployment.key).map(|w| Workload::clone(w)) else { return false };
        if deployment.phase.is_final() || workload.deployment != Some(id) {
            return false;
        }
        match step {
            DeploymentStep::Progress { ready, .. } => {
                if ready <= deployment.progress {
                    return false;
                }
                if let Some(row) = self.state.deployments.get_mut(&id) {
                    let row = Arc::make_mut(row);
                    row.progress = ready;
                    row.progress_at = self.at;
                }
            }
            DeploymentStep::Succeed { .. } => {
                self.put_workload(Workload { stable: Some(deployment.release), updated_at: self.at, revision: self.index, ..workload });
                self.end_deployment(id, DeploymentPhase::Succeeded, None);
            }
            DeploymentStep::Fail { reason, .. } => match deployment.from_release {
                Some(before) if deployment.phase == DeploymentPhase::Running => {
                    self.put_workload(Workload { release: before, updated_at: self.at, revision: self.index, ..workload });
                    if let Some(row) = self.state.deployments.get_mut(&id) {
                        let row = Arc::make_mut(row);
                        row.progress = 0;
                        row.progress_at = self.at;
                    }
                    self.end_deployment(id, DeploymentPhase::RollingBack, Some(reason));
                }
                // On the way back only that way's own deadline counts: the plan that began it may be proposed twice.
                _ if deployment.phase == DeploymentPhase::RollingBack && self.at < deployment.progress_at + deployment.deadline => {
                    return false;
                }
                _ => self.end_deployment(id, DeploymentPhase::Failed, Some(reason)),
            },
            DeploymentStep::RolledBack { .. } => {
                if deployment.phase != DeploymentPhase::RollingBack {
                    return false;
                }
                // The reason it failed stays.
                self.end_deployment(id, DeploymentPhase::RolledBack, deployment.reason.clone());
            }
        }
        true
    }
}
