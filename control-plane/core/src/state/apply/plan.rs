//! The reconciler's batch, checked again by the code that made it.

use std::sync::Arc;

use optimus_common::api::v1::DeploymentPhase;
use optimus_common::{AllocId, NodeId, Reason, Span, WorkloadKey};

use super::super::command::*;
use super::super::tables::*;
use super::{Step, retain};
use crate::scheduler;

/// How long a port that a stranger held is avoided.
const PORT_BLOCKED_FOR: Span = Span::secs(300);

impl Step<'_> {
    pub(super) fn plan(&mut self, plan: Plan) -> Applied {
        let Plan { place, stop, forget, deployments, remove } = plan;
        let mut changed = false;
        for (id, reason) in stop {
            changed |= self.stop_alloc(id, reason);
        }
        for placement in place {
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

    pub(super) fn place(&mut self, placement: Placement) -> bool {
        let Placement { alloc, key, index, release, node, ports } = placement;
        let wanted = self.state.workloads.get(&key).is_some_and(|w| !w.stopped && index < w.copies);
        if !wanted || self.state.allocs.contains_key(&alloc) {
            return false; // the world moved on since the plan was made, or the plan was proposed twice
        }
        // One running copy of a release in a slot; those on nodes that do not answer are being replaced.
        let answers = |node: &NodeId| self.state.nodes.get(node).is_some_and(|n| n.up);
        if self.state.allocs_of(&key).any(|a| a.run && a.index == index && a.release == release && answers(&a.node)) {
            return false;
        }
        let Some(spec) = self.state.release(&key, release).map(|r| r.spec.clone()) else { return false };
        if scheduler::fits(self.state, node, &spec, Some(&ports), self.at).is_err() {
            return false;
        }
        let row = Alloc { id: alloc, key, index, release, node, ports, run: true, stop_reason: None, created_at: self.at, status: None };
        let subject = row.subject();
        self.state.insert_alloc(row);
        let name = self.state.nodes.get(&node).map_or_else(String::new, |n| n.facts.name.clone());
        self.event(EventKind::CopyPlaced, &subject, &format!("release {release} placed on {name}"), None);
        true
    }

    pub(super) fn stop_alloc(&mut self, id: AllocId, reason: Reason) -> bool {
        let Some(row) = self.state.allocs.get_mut(&id) else { return false };
        if !row.run {
            return false;
        }
        let row = Arc::make_mut(row);
        row.run = false;
        row.stop_reason = Some(reason);
        // A stranger's port is avoided for a while, by every copy.
        if let Some(Reason::PortTaken { port, .. }) = row.status.as_ref().and_then(|s| s.reason.as_ref()) {
            let (port, node, until) = (*port, row.node, self.at + PORT_BLOCKED_FOR);
            if let Some(node) = self.state.nodes.get_mut(&node) {
                let at = self.at;
                let node = Arc::make_mut(node);
                retain(&mut node.blocked_ports, |_, until| *until > at);
                node.blocked_ports.insert(port, until);
            }
        }
        true
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

    pub(super) fn forget_workload(&mut self, key: &WorkloadKey) -> bool {
        let gone = self.state.workloads.get(key).is_some_and(|w| w.removing) && self.state.allocs_of(key).all(|a| a.has_ended());
        if !gone {
            return false;
        }
        let allocs: Vec<AllocId> = self.state.allocs_of(key).map(|a| a.id).collect();
        for id in allocs {
            self.state.remove_alloc(id);
        }
        let releases: Vec<u64> = self.state.releases.range((key.clone(), 0)..=(key.clone(), u64::MAX)).map(|((_, n), _)| *n).collect();
        for number in releases {
            self.state.releases.remove(&(key.clone(), number));
        }
        retain(&mut self.state.deployments, |_, d| d.key != *key);
        self.state.workloads.remove(key);
        self.event(EventKind::WorkloadRemoved, &key.to_string(), "removed", None);
        true
    }
}
