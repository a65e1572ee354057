//! `apply`: the only way state changes. Total and deterministic; a refusal is an answer.

use std::sync::Arc;

use imbl::OrdMap;
use optimus_common::api::v1::DeploymentPhase;
use optimus_common::planted::planted;
use optimus_common::protocol::{AllocStatus, NodeFacts, Phase};
use optimus_common::{AllocId, NodeId, Reason, Span, Timestamp, WorkloadKey};

mod authority;
mod deployments;
mod endpoints;
mod jobs;
mod nodes;
mod operate;
mod placing;
mod plan;
mod reports;
mod secrets;
mod servers;
mod steering;
mod workloads;

use super::authority::Authorities;
use super::command::*;
use super::tables::*;
use crate::scheduler;

/// Answers are kept this long for retries.
const REQUEST_KEPT_FOR: Span = Span::secs(24 * 3600);

impl State {
    /// Applies one committed proposal. Several may share an index (one batch, one log entry).
    pub fn apply(&mut self, index: u64, proposal: Proposal) -> Applied {
        let Proposal { at, request, command } = proposal;
        if let Some((id, digest)) = &request
            && let Some(known) = self.requests.get(id)
            && !planted("no-request-dedup")
        {
            self.index = index;
            return if known.digest == *digest { known.answer.clone() } else { Applied::Refused(Refusal::RequestReused) };
        }
        self.index = index;
        let mut step = Step { at, index, state: self };
        let answer = step.command(command);
        if let Some((id, digest)) = request {
            self.requests.insert(id, Arc::new(Answered { at, index, digest, answer: answer.clone() }));
            self.indexes.requests.insert((index, id));
            self.trim_requests(at);
        }
        answer
    }

    /// Forgets the oldest answers: those over the number kept, and those nobody retries any more.
    fn trim_requests(&mut self, at: Timestamp) {
        while let Some(&(index, id)) = self.indexes.requests.get_min() {
            let stale = self.requests.get(&id).is_none_or(|answered| at.since(answered.at) >= REQUEST_KEPT_FOR);
            if self.requests.len() <= REQUESTS_KEPT && !stale {
                break;
            }
            self.indexes.requests.remove(&(index, id));
            self.requests.remove(&id);
        }
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
        // Proposers look first; this is for the one whose view was old.
        let cluster = self.state.cluster.as_ref().map_or(LEVEL, |c| c.version);
        if command.level() > cluster {
            return Applied::Refused(Refusal::NotYet { cluster, needed: command.level() });
        }
        match command {
            Command::CreateCluster { id, ca_certificate, ca_key_sealed } => {
                if self.state.cluster.is_some() {
                    return Applied::Refused(Refusal::ClusterExists);
                }
                self.state.cluster = Some(Cluster {
                    id,
                    created_at: self.at,
                    ca_certificate,
                    ca_key_sealed,
                    version: 1,
                    authorities: Authorities::default(),
                });
                self.event(EventKind::ClusterCreated, "cluster", "cluster created", None);
                self.done()
            }
            Command::CreateToken { id, secret_hash, expires_at, uses, role } => self.create_token(id, secret_hash, expires_at, uses, role),
            Command::RevokeToken { id } => match self.state.tokens.remove(&id) {
                Some(_) => self.done(),
                None => self.unchanged(),
            },
            Command::AdmitNode { token, node, name, key_fingerprint, certificate_expires_at } => {
                self.admit(token, node, name, key_fingerprint, certificate_expires_at)
            }
            Command::NodeUp { node, facts } => self.node_up(node, facts),
            Command::NodeDown { node } => self.node_down(node),
            Command::RemoveNode { node } => self.remove_node(node),
            Command::NodeCertificate { node, key_fingerprint, expires_at } => self.node_certificate(node, key_fingerprint, expires_at),
            Command::Deploy { items } => self.deploy(items),
            Command::DeployIf { items, revision } => self.deploy_if(items, revision),
            Command::Restart { key, deployment } => self.restart(key, deployment),
            Command::Scale { key, copies, deployment } => self.scale(key, copies, deployment),
            Command::Resize { key, limits, copies, deployment } => self.resize(key, limits, copies, deployment),
            Command::Rewrap(rewrap) => self.rewrap(rewrap),
            Command::StopWorkload { key } => self.stop_workload(key),
            Command::RemoveWorkload { key } => self.remove_workload(key),
            Command::Plan(plan) => self.plan(plan),
            Command::Report { node, statuses, gone } => self.report(node, statuses, gone),
            Command::AdmitServer { token, server, key_fingerprint } => self.admit_server(token, server, key_fingerprint),
            Command::ServerUp { id, server } => self.server_up(id, server),
            Command::RaiseVersion { to } => self.raise_version(to),
            Command::RemoveServer { id } => self.remove_server(id),
            Command::ForgetServer { id } => self.forget_server(id),
            Command::RotateCa { number, certificate, key_sealed, cross, overlap } => {
                self.rotate_ca(number, certificate, key_sealed, cross, overlap)
            }
            Command::RotationWaited { number, phase, waited } => self.rotation_waited(number, phase, waited),
            Command::AbortRotation { number } => self.abort_rotation(number),
            Command::ForceRotation => self.force_rotation(),
            Command::StepRotation { number, from } => self.step_rotation(number, from),
            Command::MemberCa { member, trusted, signer } => self.member_ca(member, trusted, signer),
            Command::MemberClock { member, skew_ms } => self.member_clock(member, skew_ms),
            Command::AckEndpoints { router, generation } => self.ack_endpoints(router, generation),
            Command::CountTraffic { router, generation, counts } => self.count_traffic(router, generation, counts),
            Command::Steer { key, act, why, deployment } => self.steer(key, act, why, deployment),
            Command::StartRun(order) => self.start_run(order),
            Command::CancelRun { key, number } => self.cancel_run(key, number),
            Command::RunSteps(steps) => self.run_steps(steps),
            Command::ChangeNode { node, change } => self.change_node(node, change),
            Command::NodeDrained { node } => self.node_drained(node),
            Command::SetRebalance { automatic, moves, every } => self.set_rebalance(automatic, moves, every),
            Command::Rebalance { moves } => self.flag_for_balance(moves),
            Command::SetQuota { key, quota } => self.set_quota(key, quota),
            Command::RemoveQuota { key } => self.remove_quota(&key),
            Command::SetPool { pool } => self.set_pool(pool),
            Command::RemovePool { name } => self.remove_pool(&name),
            Command::SetVolume { volume } => self.set_volume(volume),
            Command::RemoveVolume { key } => self.remove_volume(&key),
            Command::SetSecret { key, sealed, vault } => self.set_secret(key, sealed, vault),
            Command::RemoveSecret { key } => self.remove_secret(key),
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
            Some(((index, n), _)) if *index == self.index && !planted("event-index-reused") => n + 1,
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
