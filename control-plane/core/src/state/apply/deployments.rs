//! The life of a deployment, and what is kept of old ones.

use std::sync::Arc;

use optimus_common::api::v1::DeploymentPhase;
use optimus_common::{Reason, Span, WorkloadKey};

use super::super::tables::*;
use super::Step;

impl Step<'_> {
    pub(super) fn start_deployment(
        &mut self,
        workload: &mut Workload,
        id: optimus_common::DeploymentId,
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
        self.state.deployments.insert(id, Arc::new(deployment));
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

    pub(super) fn end_deployment(&mut self, id: optimus_common::DeploymentId, phase: DeploymentPhase, reason: Option<Reason>) {
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
        // Ids are ordered by creation.
        let ended: Vec<_> = self.state.deployments.values().filter(|d| d.key == *key && d.phase.is_final()).map(|d| d.id).collect();
        for id in ended.iter().rev().skip(DEPLOYMENTS_KEPT) {
            self.state.deployments.remove(id);
        }
    }
}
