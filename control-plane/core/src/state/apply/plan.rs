//! The reconciler's batch. Looked at again, step by step: the world may have moved on since it was made.

use optimus_common::protocol::RELEASE_SLOT;
use optimus_common::spec::Kind;

use super::*;
use crate::scheduler::Device;

/// How long a port that a stranger held is avoided.
const PORT_BLOCKED_FOR: Span = Span::secs(300);

impl Step<'_> {
    pub(super) fn plan(&mut self, plan: Plan) -> Applied {
        let Plan { place, stop, forget, deployments, remove, adopt, drain, migrate } = plan;
        let mut changed = false;
        for id in migrate {
            changed |= self.migrate(id);
        }
        for (id, release) in adopt {
            changed |= self.adopt(id, release);
        }
        for id in drain {
            let (at, index) = (self.at, self.index);
            let drained = self.flag(id, |a| {
                let first = a.draining_since.is_none();
                a.draining_since = a.draining_since.or(Some(at));
                a.unrouted_at = a.unrouted_at.or(Some(index));
                first
            });
            if drained && let Some(key) = self.state.allocs.get(&id).map(|a| a.key.clone()) {
                self.rerouted(&key);
            }
            changed |= drained;
        }
        for (id, reason) in stop {
            changed |= self.stop_alloc(id, reason);
        }
        for placement in planted_order(place) {
            changed |= self.place(placement);
        }
        for step in deployments {
            changed |= self.deployment_step(step);
        }
        for id in forget {
            if self.state.allocs.get(&id).is_some_and(|a| a.has_ended()) {
                self.state.remove_alloc(id);
                changed = true;
            }
        }
        for key in remove {
            changed |= self.forget_workload(&key);
        }
        if changed { self.done() } else { self.unchanged() }
    }

    fn place(&mut self, placement: Placement) -> bool {
        if placement.index == RELEASE_SLOT {
            return self.place_release_step(placement);
        }
        let Placement { alloc, key, index, release, node, ports } = placement;
        if !self.wants_copy(&key, index, release, node) || self.state.allocs.contains_key(&alloc) {
            return false; // the world moved on since the plan was made, or the plan was proposed twice
        }
        // One copy of a release in a slot; those on nodes that do not answer may be replaced.
        let answers = |node: &NodeId| self.state.nodes.get(node).is_some_and(|n| n.up);
        if !planted("plan-unchecked")
            && self.state.allocs_in(&key, index).any(|a| a.run && !a.is_leaving() && a.release == release && answers(&a.node))
        {
            return false;
        }
        let Some(spec) = self.state.release(&key, release).map(|r| r.spec.clone()) else { return false };
        if scheduler::fits(self.state, node, &key, &spec, Some(&ports), self.at).is_err() {
            return false;
        }
        let devices = scheduler::allot_devices(self.state, node, &spec);
        self.put_copy(Placement { alloc, key, index, release, node, ports }, devices);
        true
    }

    fn put_copy(&mut self, placement: Placement, devices: Vec<Device>) {
        let Placement { alloc, key, index, release, node, ports } = placement;
        let row = Alloc {
            id: alloc,
            key: key.clone(),
            index,
            release,
            node,
            ports,
            devices,
            run: true,
            stop_reason: None,
            created_at: self.at,
            status: None,
            migrate: false,
            draining_since: None,
            unrouted_at: None,
        };
        let subject = row.subject();
        self.state.insert_alloc(row);
        let name = self.state.nodes.get(&node).map_or_else(String::new, |n| n.facts.name.clone());
        self.count_attempt(&key, index);
        self.event(EventKind::CopyPlaced, &subject, &format!("release {release} placed on {name}"), None);
    }

    /// The row of the deployment names it from now on, so that no other is ever placed for it.
    fn place_release_step(&mut self, placement: Placement) -> bool {
        let Placement { alloc, key, release, node, .. } = placement;
        let Some(workload) = self.state.workloads.get(&key).filter(|w| !w.stopped && w.release == release).cloned() else { return false };
        let Some(deployment) = self.running_deployment(&workload) else { return false };
        let (id, spec) = (deployment.id, self.state.release(&key, release).and_then(|r| r.spec.release_step()));
        let begins = deployment.release == release && deployment.release_step.is_none() && deployment.paused.is_none();
        let wanted = begins && crate::deployments::is_shut(self.state, &workload, &deployment);
        let Some(spec) = spec.filter(|spec| scheduler::fits(self.state, node, &key, spec, None, self.at).is_ok()) else { return false };
        if !wanted || !deployment.phase.is_forward() || self.state.allocs.contains_key(&alloc) {
            return false;
        }
        if let Some(row) = self.state.deployments.get_mut(&id) {
            Arc::make_mut(row).release_step = Some(alloc);
        }
        let devices = scheduler::allot_devices(self.state, node, &spec);
        self.put_copy(Placement { alloc, key, index: RELEASE_SLOT, release, node, ports: vec![] }, devices);
        true
    }

    /// Whether a copy of the release in this slot, on this node, is (still) wished for.
    fn wants_copy(&self, key: &WorkloadKey, index: u32, release: u64, node: NodeId) -> bool {
        let Some(workload) = self.state.workloads.get(key).filter(|w| !w.stopped) else { return false };
        match self.state.release(key, release).map(|r| r.spec.kind) {
            Some(Kind::Service) => self.is_wanted(workload, index, release),
            Some(Kind::Daemon) => {
                // One copy on a node, of whatever release: the old one ends first.
                workload.release == release && !self.state.allocs_on(node).any(|a| a.key == *key && !a.has_ended())
            }
            Some(Kind::Job) => self
                .state
                .run_of_slot(key, index)
                .is_some_and(|run| run.phase == RunPhase::Active && run.release == release && !run.done.contains(&index)),
            None => false,
        }
    }

    /// A copy of the release that should run, or of the one before it while that is kept.
    fn is_wanted(&self, workload: &Workload, index: u32, release: u64) -> bool {
        let newest = workload.deployment.and_then(|id| self.state.deployments.get(&id));
        let before = newest.filter(|d| crate::reconciler::keeps_before(workload, d));
        (workload.release == release && index < workload.copies)
            || before
                .is_some_and(|d| d.from_release == Some(release) && index < d.from_copies.unwrap_or(workload.copies).max(workload.copies))
    }

    /// Marks a copy to be replaced elsewhere.
    pub(super) fn migrate(&mut self, id: AllocId) -> bool {
        self.flag(id, |a| !std::mem::replace(&mut a.migrate, true))
    }

    /// Changes a copy that should run; `change` says whether it did.
    fn flag(&mut self, id: AllocId, change: impl FnOnce(&mut Alloc) -> bool) -> bool {
        if !self.state.allocs.get(&id).is_some_and(|row| row.run) {
            return false;
        }
        let mut changed = false;
        self.state.change_alloc(id, |row| changed = change(row));
        changed
    }

    /// A copy goes on running under another release.
    fn adopt(&mut self, id: AllocId, release: u64) -> bool {
        let Some(alloc) = self.state.allocs.get(&id).filter(|a| a.run && a.release != release).cloned() else { return false };
        let (Some(old), Some(new)) = (self.state.release(&alloc.key, alloc.release), self.state.release(&alloc.key, release)) else {
            return false;
        };
        let wanted = self.state.workloads.get(&alloc.key).is_some_and(|w| w.release == release);
        if !wanted
            || !crate::deployments::may_adopt(self.state, old, new)
            || !scheduler::fits_resized(self.state, &alloc, &old.spec, &new.spec)
        {
            return false;
        }
        self.flag(id, |a| {
            a.release = release;
            true
        });
        self.event(EventKind::CopyUpdated, &alloc.subject(), &format!("runs on as release {release}"), None);
        true
    }

    fn stop_alloc(&mut self, id: AllocId, reason: Reason) -> bool {
        if !self.state.allocs.get(&id).is_some_and(|row| row.run) {
            return false;
        }
        self.state.change_alloc(id, |row| {
            row.run = false;
            row.stop_reason = Some(reason);
        });
        let Some(row) = self.state.allocs.get(&id).cloned() else { return false };
        if row.is_ready() && !row.ports.is_empty() {
            self.rerouted(&row.key);
        }
        if row.phase() == Phase::Failed && !row.migrate {
            self.could_not_run(&row);
        }
        true
    }

    /// A copy gave up on its node. Another may be placed, but not for ever at once.
    fn could_not_run(&mut self, row: &Alloc) {
        let at = self.at;
        if let Some(&Reason::PortTaken { port, .. }) = row.status.as_ref().and_then(|s| s.reason.as_ref())
            && let Some(node) = self.state.nodes.get_mut(&row.node)
        {
            // Avoided by every copy for a while; the next one takes another port, so it may start at once.
            let node = Arc::make_mut(node);
            retain(&mut node.blocked_ports, |_, until| *until > at);
            node.blocked_ports.insert(port, at + PORT_BLOCKED_FOR);
        }
        let slot = (row.key.clone(), row.index);
        let before = self.state.failures.get(&slot).filter(|f| f.release == row.release).map_or(0, |f| f.count);
        self.state.failures.insert(slot, SlotFailures { release: row.release, count: before.saturating_add(1), last_at: at });
    }

    /// Ends a removal, once no node that answers holds a copy. A node that comes back later finds none of them in
    /// its desired set and stops them.
    fn forget_workload(&mut self, key: &WorkloadKey) -> bool {
        let answers = |node: &NodeId| self.state.nodes.get(node).is_some_and(|n| n.up);
        let gone = self.state.workloads.get(key).is_some_and(|w| w.removing)
            && self.state.allocs_of(key).all(|a| a.has_ended() || !answers(&a.node));
        if !gone {
            return false;
        }
        let allocs: Vec<AllocId> = self.state.allocs_of(key).map(|a| a.id).collect();
        for id in allocs {
            self.state.remove_alloc(id);
        }
        let all = (key.clone(), 0)..=(key.clone(), u64::MAX);
        let releases: Vec<u64> = self.state.releases.range(all).map(|((_, n), _)| *n).collect();
        for number in releases {
            self.state.releases.remove(&(key.clone(), number));
        }
        let deployments: Vec<_> = self.state.deployments_of(key).map(|d| d.id).collect();
        for id in deployments {
            self.state.remove_deployment(id);
        }
        self.forget_job(key);
        self.forget_failures(key, 0);
        self.state.workloads.remove(key);
        self.state.routes.remove(key);
        self.event(EventKind::WorkloadRemoved, &key.to_string(), "removed", None);
        true
    }

    /// Drops what is remembered of the failures in slots from `first` on.
    pub(super) fn forget_failures(&mut self, key: &WorkloadKey, first: u32) {
        let slots = (key.clone(), first)..=(key.clone(), u32::MAX);
        let slots: Vec<_> = self.state.failures.range(slots).map(|(slot, _)| slot.clone()).collect();
        for slot in slots {
            self.state.failures.remove(&slot);
        }
    }
}

/// As given, unless the order of a hash map is planted.
#[allow(clippy::disallowed_types)] // what is planted is just that
fn planted_order(place: Vec<Placement>) -> Vec<Placement> {
    if !planted("hash-order-in-apply") {
        return place;
    }
    let by_id: std::collections::HashMap<AllocId, Placement> = place.into_iter().map(|p| (p.alloc, p)).collect();
    by_id.into_values().collect()
}
