//! `apply`: the only way state changes. Total and deterministic; a refusal is an answer.

mod deployments;
mod nodes;
mod plan;
mod reports;
mod workloads;

use std::sync::Arc;

use imbl::OrdMap;
use optimus_common::protocol::{AllocStatus, Phase};
use optimus_common::{AllocId, NodeId, Reason, Span, Timestamp, WorkloadKey};

use super::command::*;
use super::tables::*;

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
