//! Look-ups derived from the tables: never stored, never part of the digest, rebuilt from a snapshot.

use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use optimus_common::ids::RequestId;
use optimus_common::spec::WorkloadSpec;
use optimus_common::{AllocId, DeploymentId, Name, NodeId, WorkloadKey};
use uuid::Uuid;

use super::tables::*;
use crate::scheduler::{self, Taken, Usage};

#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Indexes {
    /// By slot, then by age: ids are ordered by creation.
    pub copies: OrdMap<WorkloadKey, OrdSet<(u32, AllocId)>>,
    pub on_node: OrdMap<NodeId, OrdSet<AllocId>>,
    pub deployments: OrdMap<WorkloadKey, OrdSet<DeploymentId>>,
    /// By the index they were answered at.
    pub requests: OrdSet<(u64, RequestId)>,
    /// Runs that wait or are active.
    pub live_runs: OrdSet<(WorkloadKey, u64)>,
    /// What copies that have not ended hold of each node; no row where none does.
    pub taken: OrdMap<NodeId, Arc<Taken>>,
    /// The same by project and environment.
    pub usage: OrdMap<Name, OrdMap<Name, Usage>>,
    /// How many copies that have not ended there are of each priority.
    pub priorities: OrdMap<u8, u32>,
    /// Nodes of one class differ in nothing a rule can tell apart, but for their own names.
    pub classes: OrdMap<NodeId, u128>,
}

impl Indexes {
    fn hold(&mut self, alloc: &Alloc, spec: Option<&WorkloadSpec>) {
        Arc::make_mut(self.taken.entry(alloc.node).or_default()).add_copy(alloc, spec);
        let of_project = self.usage.entry(alloc.key.project.clone()).or_default();
        of_project.entry(alloc.key.environment.clone()).or_default().add(&Usage::of(spec));
        if let Some(spec) = spec {
            *self.priorities.entry(spec.placement.priority).or_default() += 1;
        }
    }

    fn give_back(&mut self, alloc: &Alloc, spec: Option<&WorkloadSpec>) {
        if let Some(taken) = self.taken.get_mut(&alloc.node) {
            let taken = Arc::make_mut(taken);
            taken.remove_copy(alloc, spec);
            if *taken == Taken::default() {
                self.taken.remove(&alloc.node);
            }
        }
        if let Some(spec) = spec
            && let Some(count) = self.priorities.get_mut(&spec.placement.priority)
        {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.priorities.remove(&spec.placement.priority);
            }
        }
        let (project, environment) = (&alloc.key.project, &alloc.key.environment);
        let Some(of_project) = self.usage.get_mut(project) else { return };
        if let Some(usage) = of_project.get_mut(environment) {
            usage.subtract(&Usage::of(spec));
            if *usage == Usage::default() {
                of_project.remove(environment);
            }
        }
        if of_project.is_empty() {
            self.usage.remove(project);
        }
    }
}

impl State {
    pub fn workload(&self, key: &WorkloadKey) -> Option<&Arc<Workload>> {
        self.workloads.get(key)
    }

    pub fn release(&self, key: &WorkloadKey, number: u64) -> Option<&Arc<Release>> {
        self.releases.get(&(key.clone(), number))
    }

    /// The releases kept of a workload, oldest first.
    pub fn releases_of<'a>(&'a self, key: &WorkloadKey) -> impl Iterator<Item = &'a Arc<Release>> + 'a {
        self.releases.range((key.clone(), 0)..=(key.clone(), u64::MAX)).map(|(_, release)| release)
    }

    /// All allocations of a workload, ended ones included, by slot and age.
    pub fn allocs_of<'a>(&'a self, key: &'a WorkloadKey) -> impl Iterator<Item = &'a Arc<Alloc>> + 'a {
        self.indexes.copies.get(key).into_iter().flatten().filter_map(|(_, id)| self.allocs.get(id))
    }

    /// All allocations of one slot of a workload, ended ones included, by age.
    pub fn allocs_in<'a>(&'a self, key: &WorkloadKey, index: u32) -> impl Iterator<Item = &'a Arc<Alloc>> + 'a {
        let slot = (index, AllocId(Uuid::nil()))..=(index, AllocId(Uuid::max()));
        self.indexes.copies.get(key).into_iter().flat_map(move |set| set.range(slot.clone())).filter_map(|(_, id)| self.allocs.get(id))
    }

    /// All allocations placed on a node, ended ones included.
    pub fn allocs_on(&self, node: NodeId) -> impl Iterator<Item = &Arc<Alloc>> {
        self.indexes.on_node.get(&node).into_iter().flatten().filter_map(|id| self.allocs.get(id))
    }

    /// What copies that have not ended hold of a node; none when none does.
    pub(crate) fn taken_of(&self, node: NodeId) -> Option<&Arc<Taken>> {
        self.indexes.taken.get(&node)
    }

    /// What a project reserves in each of its environments.
    pub(crate) fn usage_by_environment<'s>(&'s self, project: &'s Name) -> impl Iterator<Item = (&'s Name, &'s Usage)> {
        self.indexes.usage.get(project).into_iter().flatten()
    }

    /// The lowest priority of a copy that has not ended.
    pub(crate) fn lowest_priority(&self) -> Option<u8> {
        self.indexes.priorities.get_min().map(|(priority, _)| *priority)
    }

    pub(crate) fn class_of(&self, node: &Node) -> u128 {
        self.indexes.classes.get(&node.id).copied().unwrap_or_else(|| scheduler::class_of(node))
    }

    /// The deployments kept of a workload, oldest first.
    pub fn deployments_of<'a>(&'a self, key: &'a WorkloadKey) -> impl DoubleEndedIterator<Item = &'a Arc<Deployment>> + 'a {
        self.indexes.deployments.get(key).into_iter().flatten().filter_map(|id| self.deployments.get(id))
    }

    pub(crate) fn insert_alloc(&mut self, alloc: Alloc) {
        insert(&mut self.indexes.copies, alloc.key.clone(), (alloc.index, alloc.id));
        insert(&mut self.indexes.on_node, alloc.node, alloc.id);
        let alloc = Arc::new(alloc);
        self.allocs.insert(alloc.id, alloc.clone());
        self.hold(&alloc);
    }

    /// Every change of a copy's row goes through here, so that what nodes hold follows.
    pub(crate) fn change_alloc(&mut self, id: AllocId, change: impl FnOnce(&mut Alloc)) {
        let Some(row) = self.allocs.get_mut(&id) else { return };
        let before = row.clone();
        change(Arc::make_mut(row));
        let row = row.clone();
        if before.has_ended() != row.has_ended() || before.release != row.release {
            if !before.has_ended() {
                self.give_back(&before);
            }
            self.hold(&row);
        }
    }

    fn hold(&mut self, alloc: &Alloc) {
        if !alloc.has_ended() {
            let spec = self.release(&alloc.key, alloc.release).map(|r| r.spec.clone());
            self.indexes.hold(alloc, spec.as_deref());
        }
    }

    fn give_back(&mut self, alloc: &Alloc) {
        let spec = self.release(&alloc.key, alloc.release).map(|r| r.spec.clone());
        self.indexes.give_back(alloc, spec.as_deref());
    }

    pub(crate) fn insert_node(&mut self, node: Node) {
        let id = node.id;
        self.nodes.insert(id, Arc::new(node));
        self.reclass(id);
    }

    /// After a change of a node's facts.
    pub(crate) fn reclass(&mut self, id: NodeId) {
        if let Some(class) = self.nodes.get(&id).map(|node| scheduler::class_of(node)) {
            self.indexes.classes.insert(id, class);
        }
    }

    pub(crate) fn remove_node(&mut self, id: NodeId) -> Option<Arc<Node>> {
        self.indexes.classes.remove(&id);
        self.nodes.remove(&id)
    }

    pub(crate) fn remove_alloc(&mut self, id: AllocId) {
        if let Some(alloc) = self.allocs.remove(&id) {
            if !alloc.has_ended() {
                self.give_back(&alloc);
            }
            remove(&mut self.indexes.copies, &alloc.key, &(alloc.index, id));
            remove(&mut self.indexes.on_node, &alloc.node, &id);
        }
    }

    pub(crate) fn insert_deployment(&mut self, deployment: Deployment) {
        insert(&mut self.indexes.deployments, deployment.key.clone(), deployment.id);
        self.deployments.insert(deployment.id, Arc::new(deployment));
    }

    pub(crate) fn remove_deployment(&mut self, id: DeploymentId) {
        if let Some(deployment) = self.deployments.remove(&id) {
            remove(&mut self.indexes.deployments, &deployment.key, &id);
        }
    }

    pub(crate) fn put_run(&mut self, run: JobRun) {
        let row = (run.job.clone(), run.number);
        if run.phase.is_final() {
            self.indexes.live_runs.remove(&row);
        } else {
            self.indexes.live_runs.insert(row.clone());
        }
        self.runs.insert(row, Arc::new(run));
    }

    pub(crate) fn remove_run(&mut self, key: &WorkloadKey, number: u64) {
        let row = (key.clone(), number);
        self.runs.remove(&row);
        self.indexes.live_runs.remove(&row);
    }

    /// Rebuilds what is derived from the tables. For whoever filled them without `apply`.
    pub fn reindex(&mut self) {
        let mut fresh = Indexes::default();
        for alloc in self.allocs.values() {
            insert(&mut fresh.copies, alloc.key.clone(), (alloc.index, alloc.id));
            insert(&mut fresh.on_node, alloc.node, alloc.id);
            if !alloc.has_ended() {
                fresh.hold(alloc, self.release(&alloc.key, alloc.release).map(|r| &*r.spec));
            }
        }
        fresh.classes = self.nodes.iter().map(|(id, node)| (*id, scheduler::class_of(node))).collect();
        for deployment in self.deployments.values() {
            insert(&mut fresh.deployments, deployment.key.clone(), deployment.id);
        }
        fresh.live_runs = self.runs.iter().filter(|(_, run)| !run.phase.is_final()).map(|(row, _)| row.clone()).collect();
        fresh.requests = self.requests.iter().map(|(id, answered)| (answered.index, *id)).collect();
        self.indexes = fresh;
    }
}

fn insert<K: Ord + Clone, V: Ord + Clone>(index: &mut OrdMap<K, OrdSet<V>>, key: K, value: V) {
    index.entry(key).or_default().insert(value);
}

fn remove<K: Ord + Clone, V: Ord + Clone>(index: &mut OrdMap<K, OrdSet<V>>, key: &K, value: &V) {
    if let Some(set) = index.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            index.remove(key);
        }
    }
}
