//! What people ask of a deployment.

use optimus_common::DeploymentId;
use optimus_common::spec::Strategy;

use super::deployments::Begin;
use super::*;

impl Step<'_> {
    pub(super) fn steer(&mut self, key: WorkloadKey, act: Steering, why: Option<String>, id: DeploymentId) -> Applied {
        let workload = match self.changeable(&key) {
            Ok(workload) => workload,
            Err(refusal) => return Applied::Refused(refusal),
        };
        let newest = workload.deployment.and_then(|id| self.state.deployments.get(&id)).cloned();
        let cannot = |why: &str| Applied::Refused(Refusal::CannotSteer { key: key.clone(), why: why.into() });
        let Some(newest) = newest else { return cannot("it was never deployed") };
        let forward = newest.phase.is_forward();
        match act {
            Steering::Promote => match self.may_promote(&newest) {
                Ok(()) => {
                    self.deployment_step(DeploymentStep::Promote { id: newest.id });
                }
                Err(_) if newest.promoted => return self.unchanged(),
                Err(why) => return cannot(&why),
            },
            Steering::Pause if !forward => return cannot("none is on its way forward"),
            Steering::Pause if newest.paused.is_some() => return self.unchanged(),
            Steering::Pause => {
                let pause = Pause { since: self.at, why };
                self.set_pause(newest.id, Some(pause));
            }
            Steering::Resume if !forward => return cannot("none is on its way forward"),
            Steering::Resume if newest.paused.is_none() => return self.unchanged(),
            Steering::Resume => self.set_pause(newest.id, None),
            Steering::Abort if newest.phase == DeploymentPhase::RollingBack => return self.unchanged(),
            Steering::Abort if !forward => return cannot("none is under way"),
            Steering::Abort => self.call_off(&newest, workload, Reason::CalledOff { why }, true),
            Steering::Retry => {
                use DeploymentPhase::*;
                if !matches!(newest.phase, Failed | RolledBack | Cancelled) {
                    return cannot("the newest did not fail");
                }
                return self.begin_again(workload, id, newest.release, "retry", true);
            }
            Steering::RollBack { to } => {
                let to_before = to.is_none() || to == newest.from_release;
                if newest.phase == DeploymentPhase::RollingBack && to_before {
                    return self.unchanged();
                }
                if forward && newest.from_release.is_some() && to_before {
                    self.call_off(&newest, workload, Reason::CalledOff { why }, false);
                } else {
                    let held = newest.phase == DeploymentPhase::Failed && workload.release == newest.release;
                    let before = if held { newest.from_release } else { None };
                    let Some(to) = to.or(before).or_else(|| self.release_before(&workload)) else {
                        return cannot("no other release was ever deployed with success, or it is no longer kept");
                    };
                    return self.begin_again(workload, id, to, "rollback", false);
                }
            }
        }
        self.done()
    }

    fn set_pause(&mut self, id: DeploymentId, pause: Option<Pause>) {
        let at = self.at;
        let Some(row) = self.state.deployments.get_mut(&id) else { return };
        let row = Arc::make_mut(row);
        // Deadlines begin anew, and what bakes bakes as long as it still had to.
        if let (Some(before), None) = (&row.paused, &pause) {
            let stood = at.since(before.since);
            row.progress_at = at;
            row.since = row.since.map(|since| (since + stood).min(at));
        }
        row.paused = pause.clone();
        let (subject, release) = (row.key.to_string(), row.release);
        let message = format!("deployment of release {release} {}", if pause.is_some() { "paused" } else { "goes on" });
        self.event(EventKind::DeploymentPaused, &subject, &message, pause.map(|p| Reason::Paused { since: p.since, why: p.why }));
    }

    /// All canaries are well, now.
    fn may_promote(&self, deployment: &Deployment) -> Result<(), String> {
        use DeploymentPhase::*;
        let wanted = match (deployment.strategy, self.state.workloads.get(&deployment.key)) {
            (Strategy::Rolling, _) | (_, None) => return Err("it has nothing to promote".into()),
            (_, Some(workload)) => crate::reconciler::wanted_now(self.state, workload, deployment),
        };
        if deployment.promoted {
            return Err("it is promoted already".into());
        }
        if !matches!(deployment.phase, Shifting | Baking | Promoting) {
            return Err(format!("it is {}; its copies have not proved themselves", deployment.phase.word()));
        }
        let ready = |a: &&Arc<Alloc>| a.run && a.release == deployment.release && a.is_ready();
        let ready = self.state.allocs_of(&deployment.key).filter(ready).count();
        if ready < wanted as usize { Err(format!("only {ready} of its {wanted} copies are ready")) } else { Ok(()) }
    }

    fn call_off(&mut self, deployment: &Deployment, workload: Workload, reason: Reason, cancel: bool) {
        if cancel && let Some(row) = self.state.deployments.get_mut(&deployment.id) {
            Arc::make_mut(row).called_off = true;
        }
        match deployment.from_release {
            Some(before) => self.roll_back(deployment, workload, before, reason),
            None => {
                self.end_deployment(deployment.id, DeploymentPhase::Cancelled, Some(reason));
                // Of a first release nothing ran before; of a number of copies the release stays.
                if workload.stable.is_none() {
                    self.put_workload(Workload { stopped: true, updated_at: self.at, revision: self.index, ..workload });
                }
            }
        }
    }

    /// The newest other release that was deployed with success and is still kept.
    fn release_before(&self, workload: &Workload) -> Option<u64> {
        let current = self.state.release(&workload.key, workload.release)?;
        let good = |d: &&Arc<Deployment>| d.phase == DeploymentPhase::Succeeded && d.release != workload.release;
        let kept = |d: &Arc<Deployment>| self.state.release(&workload.key, d.release).filter(|r| !r.runs_as(current)).map(|r| r.number);
        self.state.deployments_of(&workload.key).rev().filter(good).find_map(kept)
    }

    fn begin_again(&mut self, mut workload: Workload, id: DeploymentId, release: u64, trigger: &'static str, retry: bool) -> Applied {
        let key = workload.key.clone();
        let Some(row) = self.state.release(&key, release).cloned() else {
            return Applied::Refused(Refusal::NoSuchRelease { key, release });
        };
        let current = self.state.release(&key, workload.release);
        if !retry && current.is_some_and(|current| current.number == release || current.runs_as(&row)) {
            let why = format!("release {release} is what runs");
            return Applied::Refused(Refusal::CannotSteer { key, why });
        }
        if let Some(path) = self.circle(&[(&key, &row.spec)]) {
            return Applied::Refused(Refusal::AfterCircle { path });
        }
        let from = workload.stable.filter(|_| !workload.stopped);
        let from_copies = workload.copies;
        if let Some(copies) = row.spec.copies.filter(|_| retry) {
            workload.copies = copies;
        }
        self.start_deployment(&mut workload, Begin { id, release, from, from_copies, trigger });
        self.put_workload(workload);
        self.done()
    }
}
