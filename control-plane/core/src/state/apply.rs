//! `apply`: the only way state changes. Total and deterministic; a refusal is an answer.

use std::sync::Arc;

use imbl::OrdMap;
use optimus_common::api::v1::DeploymentPhase;
use optimus_common::protocol::{AllocStatus, NodeFacts, Phase};
use optimus_common::{AllocId, NodeId, Reason, Span, Timestamp, WorkloadKey};

use super::command::*;
use super::tables::*;
use crate::scheduler;

/// How long a port that a stranger held is avoided.
const PORT_BLOCKED_FOR: Span = Span::secs(300);
/// Answers are kept this long for retries.
const REQUEST_KEPT_FOR: Span = Span::secs(24 * 3600);
/// Ended copies whose records are kept for people, of each slot.
pub const ENDED_KEPT: usize = 2;

impl State {
    /// Applies one committed proposal. Several may share an index (one batch, one log entry).
    pub fn apply(&mut self, index: u64, proposal: Proposal) -> Applied {
        let Proposal { at, request, command } = proposal;
        if let Some((id, digest)) = &request
            && let Some(known) = self.requests.get(id)
        {
            self.index = index;
            return if known.digest == *digest { known.answer.clone() } else { Applied::Refused(Refusal::RequestReused) };
        }
        self.index = index;
        let mut step = Step { at, index, state: self };
        let answer = step.command(command);
        if let Some((id, digest)) = request {
            self.requests.insert(id, Arc::new(Answered { at, index, digest, answer: answer.clone() }));
            self.trim_requests(at);
        }
        answer
    }

    fn trim_requests(&mut self, at: Timestamp) {
        // Ids are hashes of the client's keys, so their order says nothing of age; the table is small and trimmed rarely.
        if self.requests.len() <= REQUESTS_KEPT {
            return;
        }
        let mut by_age: Vec<_> = self.requests.iter().map(|(id, a)| (a.index, *id, a.at)).collect();
        by_age.sort();
        // A tenth at once, so that the scan is paid once in a thousand requests.
        for (n, (_, id, answered)) in by_age.into_iter().enumerate() {
            if n >= REQUESTS_KEPT / 10 && at.since(answered) < REQUEST_KEPT_FOR {
                break;
            }
            self.requests.remove(&id);
        }
    }

    pub fn workload(&self, key: &WorkloadKey) -> Option<&Arc<Workload>> {
        self.workloads.get(key)
    }

    pub fn release(&self, key: &WorkloadKey, number: u64) -> Option<&Arc<Release>> {
        self.releases.get(&(key.clone(), number))
    }

    /// All allocations of a workload, ended ones included, by slot and age.
    pub fn allocs_of<'a>(&'a self, key: &'a WorkloadKey) -> impl Iterator<Item = &'a Arc<Alloc>> + 'a {
        self.by_workload.get(key).into_iter().flatten().filter_map(|id| self.allocs.get(id))
    }

    /// All allocations placed on a node, ended ones included.
    pub fn allocs_on(&self, node: NodeId) -> impl Iterator<Item = &Arc<Alloc>> {
        self.by_node.get(&node).into_iter().flatten().filter_map(|id| self.allocs.get(id))
    }

    fn insert_alloc(&mut self, alloc: Alloc) {
        let alloc = Arc::new(alloc);
        index_insert(&mut self.by_workload, alloc.key.clone(), alloc.id);
        index_insert(&mut self.by_node, alloc.node, alloc.id);
        self.allocs.insert(alloc.id, alloc);
    }

    fn remove_alloc(&mut self, id: AllocId) {
        if let Some(alloc) = self.allocs.remove(&id) {
            index_remove(&mut self.by_workload, &alloc.key, id);
            index_remove(&mut self.by_node, &alloc.node, id);
        }
    }

    /// Rebuilds the indexes that are derived from the tables and not stored. `apply` keeps them; whoever changes
    /// a table by hand (a snapshot, a test) calls this after it.
    pub fn reindex(&mut self) {
        self.by_workload = OrdMap::new();
        self.by_node = OrdMap::new();
        for alloc in self.allocs.values() {
            index_insert(&mut self.by_workload, alloc.key.clone(), alloc.id);
            index_insert(&mut self.by_node, alloc.node, alloc.id);
        }
    }
}

fn index_insert<K: Ord + Clone>(index: &mut OrdMap<K, imbl::OrdSet<AllocId>>, key: K, id: AllocId) {
    index.entry(key).or_default().insert(id);
}

fn index_remove<K: Ord + Clone>(index: &mut OrdMap<K, imbl::OrdSet<AllocId>>, key: &K, id: AllocId) {
    if let Some(set) = index.get_mut(key) {
        set.remove(&id);
        if set.is_empty() {
            index.remove(key);
        }
    }
}

impl Alloc {
    /// It should not run and does not: only its record is left.
    pub fn has_ended(&self) -> bool {
        !self.run && self.phase().is_terminal()
    }
    pub fn phase(&self) -> Phase {
        self.status.as_ref().map_or(Phase::Pending, |s| s.phase)
    }
    pub fn is_ready(&self) -> bool {
        self.status.as_ref().is_some_and(|s| s.ready && s.phase == Phase::Running)
    }
    /// `web-0`
    pub fn name(&self) -> String {
        format!("{}-{}", self.key.workload, self.index)
    }
    /// `shop/prod/web-0`
    pub fn subject(&self) -> String {
        format!("{}-{}", self.key, self.index)
    }
}

/// One command being applied.
struct Step<'a> {
    at: Timestamp,
    index: u64,
    state: &'a mut State,
}

impl Step<'_> {
    fn command(&mut self, command: Command) -> Applied {
        match command {
            Command::CreateCluster { id, ca_certificate, ca_key_sealed } => {
                if self.state.cluster.is_some() {
                    return Applied::Refused(Refusal::ClusterExists);
                }
                self.state.cluster = Some(Cluster { id, created_at: self.at, ca_certificate, ca_key_sealed, version: 1 });
                self.event(EventKind::ClusterCreated, "cluster", "cluster created", None);
                self.done()
            }
            Command::CreateToken { id, secret_hash, expires_at, uses } => {
                let at = self.at;
                retain(&mut self.state.tokens, |_, t| t.expires_at > at && t.uses_left > 0);
                if self.state.tokens.len() >= TOKENS_MAX {
                    return too_many("join tokens", TOKENS_MAX as u64);
                }
                self.state.tokens.insert(id, Arc::new(JoinToken { id, secret_hash, created_at: at, expires_at, uses_left: uses }));
                self.event(
                    EventKind::TokenCreated,
                    &format!("token/{id}"),
                    &format!("join token for {uses} agents, good until {expires_at}"),
                    None,
                );
                self.done()
            }
            Command::RevokeToken { id } => match self.state.tokens.remove(&id) {
                Some(_) => self.done(),
                None => self.unchanged(),
            },
            Command::AdmitNode { token, node, name, key_fingerprint, certificate_expires_at } => {
                self.admit(token, node, name, key_fingerprint, certificate_expires_at)
            }
            Command::NodeUp { node, facts } => self.node_up(node, facts),
            Command::NodeDown { node } => self.node_down(node),
            Command::NodeCertificate { node, key_fingerprint, expires_at } => {
                let Some(row) = self.state.nodes.get_mut(&node) else { return Applied::Refused(Refusal::NoSuchNode(node)) };
                let row = Arc::make_mut(row);
                row.key_fingerprint = key_fingerprint;
                row.certificate_expires_at = expires_at;
                self.done()
            }
            Command::Deploy { items } => self.deploy(items),
            Command::Restart { key, deployment } => self.restart(key, deployment),
            Command::Scale { key, copies, deployment } => self.scale(key, copies, deployment),
            Command::StopWorkload { key } => self.stop_workload(key),
            Command::RemoveWorkload { key } => self.remove_workload(key),
            Command::Plan(plan) => self.plan(plan),
            Command::Report { node, statuses, gone } => self.report(node, statuses, gone),
        }
    }

    fn done(&self) -> Applied {
        Applied::Done { index: self.index }
    }
    fn unchanged(&self) -> Applied {
        Applied::Unchanged { index: self.index }
    }

    fn event(&mut self, kind: EventKind, subject: &str, message: &str, reason: Option<Reason>) {
        let n = match self.state.events.get_max() {
            Some(((index, n), _)) if *index == self.index => n + 1,
            _ => 0,
        };
        let event = Event { index: self.index, n, at: self.at, kind, subject: subject.into(), message: message.into(), reason };
        self.state.events.insert((self.index, n), Arc::new(event));
        while self.state.events.len() > EVENTS_KEPT {
            let Some(oldest) = self.state.events.get_min().map(|(key, _)| *key) else { break };
            self.state.events.remove(&oldest);
        }
    }

    // ---- nodes ----

    fn admit(&mut self, token: optimus_common::TokenId, node: NodeId, name: String, key: Vec<u8>, expires: Timestamp) -> Applied {
        let refusal = match self.state.tokens.get(&token) {
            None => Some(Refusal::TokenUnknown),
            Some(t) if t.expires_at <= self.at => Some(Refusal::TokenExpired),
            Some(t) if t.uses_left == 0 => Some(Refusal::TokenUsedUp),
            Some(_) if self.state.nodes.len() >= NODES_MAX => Some(Refusal::TooMany { what: "nodes".into(), limit: NODES_MAX as u64 }),
            Some(_) => None,
        };
        if let Some(refusal) = refusal {
            self.event(EventKind::TokenRefused, &format!("node/{name}"), &format!("join refused: {refusal}"), None);
            return Applied::Refused(refusal);
        }
        if let Some(row) = self.state.tokens.get_mut(&token) {
            Arc::make_mut(row).uses_left -= 1;
        }
        let facts = NodeFacts { name: name.clone(), ..NodeFacts::default() };
        let row = Node {
            id: node,
            facts,
            joined_at: self.at,
            up: false,
            changed_at: self.at,
            certificate_expires_at: expires,
            key_fingerprint: key,
            cordoned: false,
            blocked_ports: OrdMap::new(),
        };
        self.state.nodes.insert(node, Arc::new(row));
        self.event(EventKind::NodeJoined, &format!("node/{name}"), "node joined the cluster", None);
        self.done()
    }

    fn node_up(&mut self, node: NodeId, facts: NodeFacts) -> Applied {
        let Some(row) = self.state.nodes.get_mut(&node) else { return Applied::Refused(Refusal::NoSuchNode(node)) };
        if row.up && row.facts == facts {
            return self.unchanged();
        }
        let came_up = !row.up;
        let name = facts.name.clone();
        let row = Arc::make_mut(row);
        row.facts = facts;
        if came_up {
            row.up = true;
            row.changed_at = self.at;
            self.event(EventKind::NodeUp, &format!("node/{name}"), "node is up", None);
        }
        self.done()
    }

    fn node_down(&mut self, node: NodeId) -> Applied {
        let Some(row) = self.state.nodes.get_mut(&node) else { return Applied::Refused(Refusal::NoSuchNode(node)) };
        if !row.up {
            return self.unchanged();
        }
        let row = Arc::make_mut(row);
        row.up = false;
        row.changed_at = self.at;
        let name = row.facts.name.clone();
        let reason = Reason::NodeDown { node: name.clone(), since: self.at };
        self.event(EventKind::NodeDown, &format!("node/{name}"), "node is not answering", Some(reason));
        self.done()
    }

    // ---- workloads ----

    fn deploy(&mut self, items: Vec<DeployItem>) -> Applied {
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

    /// False: it already was so.
    fn deploy_one(&mut self, item: &DeployItem) -> bool {
        let known = self.state.workloads.get(&item.key).cloned();
        let copies = item.spec.copies.or(known.as_ref().map(|w| w.copies)).unwrap_or(1);
        if let Some(workload) = &known {
            let same_spec = self.state.release(&item.key, workload.release).is_some_and(|r| r.spec == item.spec);
            let under_way = self.running_deployment(workload).is_some();
            let settled = workload.stable == Some(workload.release);
            if same_spec && !workload.stopped && workload.copies == copies && (settled || under_way) {
                return false;
            }
        }
        let number = known.as_ref().map_or(1, |w| w.newest + 1);
        let release = Release { key: item.key.clone(), number, spec: item.spec.clone(), source: item.source.clone(), created_at: self.at };
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
        workload.copies = copies;
        self.start_deployment(&mut workload, item.deployment, number, from, "deploy", item.spec.update.deadline);
        self.put_workload(workload);
        true
    }

    fn restart(&mut self, key: WorkloadKey, deployment: optimus_common::DeploymentId) -> Applied {
        let mut workload = match self.changeable(&key) {
            Ok(workload) => workload,
            Err(refusal) => return Applied::Refused(refusal),
        };
        let Some(current) = self.state.release(&key, workload.release).cloned() else {
            return Applied::Refused(Refusal::NoSuchWorkload(key));
        };
        let number = workload.newest + 1;
        let release = Release { number, created_at: self.at, ..Release::clone(&current) };
        self.state.releases.insert((key.clone(), number), Arc::new(release));
        let from = workload.stable.filter(|_| !workload.stopped);
        self.start_deployment(&mut workload, deployment, number, from, "restart", current.spec.update.deadline);
        self.put_workload(workload);
        self.done()
    }

    fn scale(&mut self, key: WorkloadKey, copies: u32, deployment: optimus_common::DeploymentId) -> Applied {
        if copies > COPIES_MAX {
            return too_many("copies", u64::from(COPIES_MAX));
        }
        let mut workload = match self.changeable(&key) {
            Ok(workload) => workload,
            Err(refusal) => return Applied::Refused(refusal),
        };
        if workload.copies == copies && !workload.stopped {
            return self.unchanged();
        }
        self.event(EventKind::WorkloadScaled, &key.to_string(), &format!("scaled from {} to {copies} copies", workload.copies), None);
        workload.copies = copies;
        if self.running_deployment(&workload).is_some() {
            // The deployment under way simply has another number to reach.
            workload.updated_at = self.at;
            workload.revision = self.index;
        } else {
            let deadline = self.state.release(&key, workload.release).map_or(Span::secs(120), |r| r.spec.update.deadline);
            // Nothing to go back to: a scale that does not fit stays as a wish with its reason.
            let release = workload.release;
            self.start_deployment(&mut workload, deployment, release, None, "scale", deadline);
        }
        self.put_workload(workload);
        self.done()
    }

    fn stop_workload(&mut self, key: WorkloadKey) -> Applied {
        let mut workload = match self.changeable(&key) {
            Ok(workload) => workload,
            Err(refusal) => return Applied::Refused(refusal),
        };
        if workload.stopped {
            return self.unchanged();
        }
        self.end_running(&workload, DeploymentPhase::Cancelled, Some(Reason::Cancelled));
        workload.stopped = true;
        workload.updated_at = self.at;
        workload.revision = self.index;
        self.put_workload(workload);
        self.event(EventKind::WorkloadStopped, &key.to_string(), "stopped on request", None);
        self.done()
    }

    fn remove_workload(&mut self, key: WorkloadKey) -> Applied {
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

    /// The workload, unless it is unknown or on its way out.
    fn changeable(&self, key: &WorkloadKey) -> Result<Workload, Refusal> {
        match self.state.workloads.get(key) {
            None => Err(Refusal::NoSuchWorkload(key.clone())),
            Some(w) if w.removing => Err(Refusal::BeingRemoved(key.clone())),
            Some(w) => Ok(Workload::clone(w)),
        }
    }

    fn put_workload(&mut self, workload: Workload) {
        self.state.workloads.insert(workload.key.clone(), Arc::new(workload));
    }

    fn running_deployment(&self, workload: &Workload) -> Option<Arc<Deployment>> {
        workload.deployment.and_then(|id| self.state.deployments.get(&id)).filter(|d| !d.phase.is_final()).cloned()
    }

    // ---- deployments ----

    fn start_deployment(
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

    fn end_running(&mut self, workload: &Workload, phase: DeploymentPhase, reason: Option<Reason>) {
        if let Some(running) = self.running_deployment(workload) {
            self.end_deployment(running.id, phase, reason);
        }
    }

    fn end_deployment(&mut self, id: optimus_common::DeploymentId, phase: DeploymentPhase, reason: Option<Reason>) {
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
    fn trim_history(&mut self, key: &WorkloadKey, current: u64, stable: Option<u64>) {
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

    // ---- the reconciler's batch ----

    fn plan(&mut self, plan: Plan) -> Applied {
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

    fn place(&mut self, placement: Placement) -> bool {
        let Placement { alloc, key, index, release, node, ports } = placement;
        let wanted = self.state.workloads.get(&key).is_some_and(|w| !w.stopped && index < w.copies);
        if !wanted || self.state.allocs.contains_key(&alloc) {
            return false; // the world moved on since the plan was made, or the plan was proposed twice
        }
        // One running copy of a release in a slot.
        if self.state.allocs_of(&key).any(|a| a.run && a.index == index && a.release == release) {
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

    fn stop_alloc(&mut self, id: AllocId, reason: Reason) -> bool {
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

    fn deployment_step(&mut self, step: DeploymentStep) -> bool {
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

    fn forget_workload(&mut self, key: &WorkloadKey) -> bool {
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

    // ---- reports ----

    fn report(&mut self, node: NodeId, statuses: Vec<AllocStatus>, gone: Vec<AllocId>) -> Applied {
        let mut changed = false;
        for status in statuses {
            changed |= self.status(node, status);
        }
        for id in gone {
            // The agent has no trace of it: for us it has stopped, whatever was last seen.
            let Some(alloc) = self.state.allocs.get(&id).filter(|a| a.node == node && !a.run && !a.phase().is_terminal()) else { continue };
            let seq = alloc.status.as_ref().map_or(0, |s| s.seq);
            let mut status = alloc.status.as_ref().map_or_else(|| empty_status(id), |s| AllocStatus::clone(s));
            status.seq = seq + 1;
            status.phase = Phase::Stopped;
            status.ready = false;
            status.pid = None;
            changed |= self.status(node, status);
        }
        if changed { self.done() } else { self.unchanged() }
    }

    fn status(&mut self, node: NodeId, new: AllocStatus) -> bool {
        let Some(alloc) = self.state.allocs.get_mut(&new.id).filter(|a| a.node == node) else { return false };
        let old = alloc.status.clone();
        if old.as_ref().is_some_and(|o| o.seq >= new.seq) {
            return false;
        }
        let new = Arc::new(new);
        Arc::make_mut(alloc).status = Some(new.clone());
        let subject = alloc.subject();
        self.status_events(&subject, old.as_deref(), &new);
        true
    }

    fn status_events(&mut self, subject: &str, old: Option<&AllocStatus>, new: &AllocStatus) {
        let was = old.map_or(Phase::Pending, |o| o.phase);
        let was_ready = old.is_some_and(|o| o.ready);
        if new.last_exit.is_some() && new.last_exit != old.and_then(|o| o.last_exit.clone()) && !(new.phase == Phase::Stopped) {
            let reason = new.reason.as_ref().map(|r| match r {
                Reason::CrashLoop { last, .. } => Reason::clone(last),
                other => other.clone(),
            });
            let exit = new.last_exit.clone().map(|exit| Reason::Exited { exit });
            let reason = reason.filter(|r| !matches!(r, Reason::Starting | Reason::NotReady { .. })).or(exit);
            let message = reason.as_ref().map_or_else(|| "ended".to_owned(), Reason::to_string);
            self.event(EventKind::CopyExited, subject, &message, reason);
        }
        if new.started_at.is_some() && new.started_at != old.and_then(|o| o.started_at) {
            self.event(EventKind::CopyStarted, subject, &format!("started, pid {}", new.pid.unwrap_or(0)), None);
        }
        if new.ready && !was_ready {
            self.event(EventKind::CopyReady, subject, "ready", None);
        }
        if was_ready && !new.ready && new.phase == Phase::Running {
            self.event(EventKind::CopyNotReady, subject, "no longer ready", new.reason.clone());
        }
        if new.phase != was {
            match new.phase {
                Phase::Stopped => self.event(EventKind::CopyStopped, subject, "stopped", None),
                Phase::Failed => {
                    let message = new.reason.as_ref().map_or_else(|| "failed".to_owned(), Reason::to_string);
                    self.event(EventKind::CopyFailed, subject, &message, new.reason.clone());
                }
                // A start that never came to a process has no exit to tell of.
                Phase::Backoff if new.last_exit == old.and_then(|o| o.last_exit.clone()) => {
                    let message = new.reason.as_ref().map_or_else(|| "waits for its next start".to_owned(), |r| r.root().to_string());
                    self.event(EventKind::CopyExited, subject, &message, new.reason.clone());
                }
                _ => {}
            }
        }
    }
}

/// Drops the rows that `keep` refuses.
fn retain<K: Ord + Clone, V: Clone>(table: &mut OrdMap<K, V>, keep: impl Fn(&K, &V) -> bool) {
    let drop: Vec<K> = table.iter().filter(|(k, v)| !keep(k, v)).map(|(k, _)| k.clone()).collect();
    for key in drop {
        table.remove(&key);
    }
}

fn too_many(what: &str, limit: u64) -> Applied {
    Applied::Refused(Refusal::TooMany { what: what.into(), limit })
}

fn empty_status(id: AllocId) -> AllocStatus {
    AllocStatus {
        id,
        seq: 0,
        phase: Phase::Pending,
        ready: false,
        ready_since: None,
        reason: None,
        restarts: 0,
        pid: None,
        started_at: None,
        last_exit: None,
        unenforced: vec![],
        last_lines: vec![],
    }
}
