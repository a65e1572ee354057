//! Look-ups derived from the tables: never stored, never part of the digest, rebuilt from a snapshot.

use std::sync::Arc;

use imbl::{OrdMap, OrdSet};
use optimus_common::ids::RequestId;
use optimus_common::{AllocId, DeploymentId, NodeId, WorkloadKey};
use uuid::Uuid;

use super::tables::*;

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
}

impl State {
    pub fn workload(&self, key: &WorkloadKey) -> Option<&Arc<Workload>> {
        self.workloads.get(key)
    }

    pub fn release(&self, key: &WorkloadKey, number: u64) -> Option<&Arc<Release>> {
        self.releases.get(&(key.clone(), number))
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

    /// The deployments kept of a workload, oldest first.
    pub fn deployments_of<'a>(&'a self, key: &'a WorkloadKey) -> impl DoubleEndedIterator<Item = &'a Arc<Deployment>> + 'a {
        self.indexes.deployments.get(key).into_iter().flatten().filter_map(|id| self.deployments.get(id))
    }

    pub(crate) fn insert_alloc(&mut self, alloc: Alloc) {
        insert(&mut self.indexes.copies, alloc.key.clone(), (alloc.index, alloc.id));
        insert(&mut self.indexes.on_node, alloc.node, alloc.id);
        self.allocs.insert(alloc.id, Arc::new(alloc));
    }

    pub(crate) fn remove_alloc(&mut self, id: AllocId) {
        if let Some(alloc) = self.allocs.remove(&id) {
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
        }
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
