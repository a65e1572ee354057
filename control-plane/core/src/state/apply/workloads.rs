//! What users ask of workloads: deploy, restart, scale, stop, remove.

use optimus_common::spec::{Kind, WorkloadSpec};
use optimus_common::{DeploymentId, Name};

use super::deployments::Begin;
use super::*;

impl Step<'_> {
    pub(super) fn deploy(&mut self, items: Vec<DeployItem>) -> Applied {
        let fresh = items.iter().filter(|i| !self.state.workloads.contains_key(&i.key)).count();
        if self.state.workloads.len() + fresh > WORKLOADS_MAX {
            return too_many("workloads", WORKLOADS_MAX as u64);
        }
        // All or none: look at every item before the first change.
        for item in &items {
            if item.spec.copies.unwrap_or(0) > COPIES_MAX {
                return too_many("copies", u64::from(COPIES_MAX));
            }
            if self.state.workloads.get(&item.key).is_some_and(|w| w.removing) {
                return Applied::Refused(Refusal::BeingRemoved(item.key.clone()));
            }
            if let Some(is) = self.kind_of(&item.key).filter(|is| *is != item.spec.kind) {
                return Applied::Refused(Refusal::KindChanged { key: item.key.clone(), is });
            }
        }
        if let Some(path) = self.circle(&items.iter().map(|item| (&item.key, &*item.spec)).collect::<Vec<_>>()) {
            return Applied::Refused(Refusal::AfterCircle { path });
        }
        let (mut deployments, mut unchanged) = (Vec::new(), Vec::new());
        for item in items {
            let id = item.deployment;
            if self.deploy_one(&item) {
                deployments.push(id);
            } else {
                unchanged.push(item.key);
            }
        }
        Applied::Deployed { index: self.index, deployments, unchanged }
    }

    /// A circle of `after` that these would close, also through what other files brought.
    pub(super) fn circle(&self, specs: &[(&WorkloadKey, &WorkloadSpec)]) -> Option<Vec<String>> {
        specs.iter().filter(|(_, spec)| !spec.update.after.is_empty()).find_map(|(of, _)| {
            let after = |name: &Name| {
                let key = WorkloadKey { workload: name.clone(), ..WorkloadKey::clone(of) };
                if let Some((_, spec)) = specs.iter().find(|(other, _)| **other == key) {
                    return spec.update.after.as_slice();
                }
                let held = self.state.workloads.get(&key).and_then(|w| self.state.release(&key, w.release));
                held.map_or(&[][..], |release| release.spec.update.after.as_slice())
            };
            let path = optimus_common::spec::after_circle(after, &of.workload)?;
            Some(path.iter().map(Name::to_string).collect())
        })
    }

    pub(super) fn deploy_if(&mut self, items: Vec<DeployItem>, revision: u64) -> Applied {
        let known = |item: &DeployItem| self.state.workloads.get(&item.key).map(|w| (item.key.clone(), w.revision));
        match items.iter().filter_map(known).find(|(_, now)| *now > revision) {
            Some((key, now)) => Applied::Refused(Refusal::ChangedSince { key, expected: revision, now }),
            None => self.deploy(items),
        }
    }

    /// False: it already was so.
    pub(super) fn deploy_one(&mut self, item: &DeployItem) -> bool {
        let known = self.state.workloads.get(&item.key).cloned();
        let copies = item.spec.copies.or(known.as_ref().map(|w| w.copies)).unwrap_or(1);
        let secrets = self.state.secret_versions(&item.key, &item.spec);
        if let Some(workload) = &known {
            let same_spec = self.state.release(&item.key, workload.release).is_some_and(|r| r.spec == item.spec && r.secrets == secrets);
            let under_way = self.running_deployment(workload).is_some();
            let settled = workload.stable == Some(workload.release);
            if same_spec && !workload.stopped && workload.copies == copies && (settled || under_way) {
                return false;
            }
        }
        let number = known.as_ref().map_or(1, |w| w.newest + 1);
        // The same again is another try: its copies start afresh. So they do with other versions of secrets.
        let current = known.as_ref().and_then(|w| self.state.release(&item.key, w.release));
        let fresh = current.is_some_and(|r| r.spec == item.spec || r.secrets != secrets);
        let (spec, source) = (item.spec.clone(), item.source.clone());
        let release = Release { key: item.key.clone(), number, spec, source, created_at: self.at, fresh, secrets };
        self.state.releases.insert((item.key.clone(), number), Arc::new(release));
        let mut workload = known.map_or_else(
            || Workload {
                key: item.key.clone(),
                release: number,
                newest: number,
                stable: None,
                copies,
                stopped: false,
                removing: false,
                created_at: self.at,
                updated_at: self.at,
                revision: self.index,
                deployment: None,
            },
            |w| Workload::clone(&w),
        );
        // What to go back to: the release that ran, unless it was stopped on purpose.
        let from = workload.stable.filter(|_| !workload.stopped);
        let from_copies = self.copies_to_go_back_to(&workload);
        workload.copies = copies;
        self.start_deployment(&mut workload, Begin { id: item.deployment, release: number, from, from_copies, trigger: "deploy" });
        self.put_workload(workload);
        true
    }

    pub(super) fn restart(&mut self, key: WorkloadKey, deployment: DeploymentId) -> Applied {
        let mut workload = match self.changeable(&key) {
            Ok(workload) => workload,
            Err(refusal) => return Applied::Refused(refusal),
        };
        let Some(current) = self.state.release(&key, workload.release).cloned() else {
            return Applied::Refused(Refusal::NoSuchWorkload(key));
        };
        let number = workload.newest + 1;
        let secrets = self.state.secret_versions(&key, &current.spec);
        let release = Release { number, created_at: self.at, fresh: true, secrets, ..Release::clone(&current) };
        self.state.releases.insert((key.clone(), number), Arc::new(release));
        let from = workload.stable.filter(|_| !workload.stopped);
        let from_copies = workload.copies;
        self.start_deployment(&mut workload, Begin { id: deployment, release: number, from, from_copies, trigger: "restart" });
        self.put_workload(workload);
        self.done()
    }

    pub(super) fn scale(&mut self, key: WorkloadKey, copies: u32, deployment: DeploymentId) -> Applied {
        if copies > COPIES_MAX {
            return too_many("copies", u64::from(COPIES_MAX));
        }
        let mut workload = match self.changeable(&key) {
            Ok(workload) => workload,
            Err(refusal) => return Applied::Refused(refusal),
        };
        if self.kind_of(&key) == Some(Kind::Daemon) {
            return Applied::Refused(Refusal::NoCopies(key));
        }
        if workload.copies == copies && !workload.stopped {
            return self.unchanged();
        }
        self.event(EventKind::WorkloadScaled, &key.to_string(), &format!("scaled from {} to {copies} copies", workload.copies), None);
        workload.copies = copies;
        if let Some(running) = self.running_deployment(&workload) {
            // The deployment under way simply has another number to reach, and the release before it as well.
            if let Some(row) = self.state.deployments.get_mut(&running.id) {
                let row = Arc::make_mut(row);
                row.from_copies = row.from_copies.map(|_| copies);
            }
            workload.updated_at = self.at;
            workload.revision = self.index;
        } else {
            // Nothing to go back to: a scale that does not fit stays as a wish with its reason.
            let (release, from_copies) = (workload.release, workload.copies);
            self.start_deployment(&mut workload, Begin { id: deployment, release, from: None, from_copies, trigger: "scale" });
        }
        self.put_workload(workload);
        self.done()
    }

    pub(super) fn resize(&mut self, key: WorkloadKey, limits: NewLimits, copies: Option<u32>, deployment: DeploymentId) -> Applied {
        let mut workload = match self.changeable(&key) {
            Ok(workload) => workload,
            Err(refusal) => return Applied::Refused(refusal),
        };
        if copies.is_some_and(|copies| copies > COPIES_MAX) {
            return too_many("copies", u64::from(COPIES_MAX));
        }
        if workload.stopped {
            return Applied::Refused(Refusal::Stopped(key));
        }
        let cannot = |why: &str| Applied::Refused(Refusal::CannotSteer { key: key.clone(), why: why.into() });
        let Some(current) = self.state.release(&key, workload.release).filter(|r| r.spec.kind != Kind::Job).cloned() else {
            return cannot("each run of a job has the limits it began with; deploy it with others");
        };
        if copies.is_some() && current.spec.kind == Kind::Daemon {
            return Applied::Refused(Refusal::NoCopies(key));
        }
        let resources = limits.of(current.spec.resources);
        if resources == current.spec.resources {
            return match copies {
                Some(copies) => self.scale(key, copies, deployment),
                None => self.unchanged(),
            };
        }
        if self.running_deployment(&workload).is_some() {
            return cannot("one is under way; when it has ended, or was aborted, its copies can be resized");
        }
        let number = workload.newest + 1;
        let spec =
            Arc::new(optimus_common::spec::WorkloadSpec { resources, copies: copies.or(current.spec.copies), ..(*current.spec).clone() });
        let release = Release { number, spec, source: None, created_at: self.at, fresh: false, ..Release::clone(&current) };
        self.state.releases.insert((key.clone(), number), Arc::new(release));
        let (from, from_copies) = (workload.stable, workload.copies);
        workload.copies = copies.unwrap_or(workload.copies);
        self.start_deployment(&mut workload, Begin { id: deployment, release: number, from, from_copies, trigger: "resize" });
        self.put_workload(workload);
        self.done()
    }

    pub(super) fn stop_workload(&mut self, key: WorkloadKey) -> Applied {
        let mut workload = match self.changeable(&key) {
            Ok(workload) => workload,
            Err(refusal) => return Applied::Refused(refusal),
        };
        if workload.stopped {
            return self.unchanged();
        }
        self.end_running(&workload, DeploymentPhase::Cancelled, Some(Reason::Cancelled));
        workload.stopped = true;
        // What would be due while it is stopped is not missed.
        if let Some(row) = self.state.jobs.get_mut(&key) {
            let row = Arc::make_mut(row);
            (row.armed_release, row.next) = (0, None);
        }
        workload.updated_at = self.at;
        workload.revision = self.index;
        self.put_workload(workload);
        self.event(EventKind::WorkloadStopped, &key.to_string(), "stopped on request", None);
        self.done()
    }

    pub(super) fn remove_workload(&mut self, key: WorkloadKey) -> Applied {
        let Some(workload) = self.state.workloads.get(&key).map(|w| Workload::clone(w)) else {
            return Applied::Refused(Refusal::NoSuchWorkload(key));
        };
        if workload.removing {
            return self.unchanged();
        }
        self.end_running(&workload, DeploymentPhase::Cancelled, Some(Reason::Cancelled));
        self.put_workload(Workload { stopped: true, removing: true, updated_at: self.at, revision: self.index, ..workload });
        self.event(EventKind::WorkloadStopped, &key.to_string(), "being removed on request", None);
        self.done()
    }

    fn kind_of(&self, key: &WorkloadKey) -> Option<Kind> {
        let workload = self.state.workloads.get(key)?;
        self.state.release(key, workload.release).map(|r| r.spec.kind)
    }

    /// The workload, unless it is unknown or on its way out.
    pub(super) fn changeable(&self, key: &WorkloadKey) -> Result<Workload, Refusal> {
        match self.state.workloads.get(key) {
            None => Err(Refusal::NoSuchWorkload(key.clone())),
            Some(w) if w.removing => Err(Refusal::BeingRemoved(key.clone())),
            Some(w) => Ok(Workload::clone(w)),
        }
    }

    pub(super) fn put_workload(&mut self, mut workload: Workload) {
        if planted("clock-in-apply") {
            static TICKS: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
            workload.updated_at.0 += TICKS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
        self.forget_failures(&workload.key, workload.copies);
        self.state.workloads.insert(workload.key.clone(), Arc::new(workload));
    }

    /// Of several deployments in a row, none of which was through, the number before the first counts.
    fn copies_to_go_back_to(&self, workload: &Workload) -> u32 {
        self.running_deployment(workload).and_then(|d| d.from_copies).unwrap_or(workload.copies)
    }

    pub(super) fn running_deployment(&self, workload: &Workload) -> Option<Arc<Deployment>> {
        workload.deployment.and_then(|id| self.state.deployments.get(&id)).filter(|d| !d.phase.is_final()).cloned()
    }
}
