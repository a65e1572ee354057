//! From rows of the state to what the API shows. Pure; rows are destructured, so that a new field stops the build here.

mod operate;
mod placing;

pub use operate::{drain_preview, job, job_run, rebalance_moves, rebalance_settings};
pub use placing::{pool, pool_names, pool_row, quota, secret, volume};

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use optimus_common::api::v1 as api;
use optimus_common::api::v1::{NodePhase, ReasonView, WorkloadPhase};
use optimus_common::protocol::{NodeFacts, Phase};
use optimus_common::spec::{Kind, Resources};
use optimus_common::{Bytes, Millicores, Reason, Timestamp};

use crate::reconciler;
use crate::scheduler;
use crate::state::{Alloc, Event, Node, State, Workload};

mod deployments;

pub use deployments::deployment;

/// Events shown with an explanation.
const EVENTS_SHOWN: usize = 10;
/// Nodes judged in an explanation.
const NODES_SHOWN: usize = 10;
/// Endpoints listed with a workload.
const ENDPOINTS_SHOWN: usize = 20;

pub fn workload(state: &State, row: &Workload, now: Timestamp) -> api::Workload {
    let Workload {
        key,
        release,
        newest: _,
        stable: _,
        copies: _,
        stopped,
        removing: _,
        created_at,
        updated_at,
        revision,
        deployment: deployment_id,
    } = row;
    let allocs: Vec<&Arc<Alloc>> = state.allocs_of(key).filter(|a| !a.has_ended()).collect();
    let (wanted, ready) = wanted_and_ready(state, row);
    let newest = deployment_id.and_then(|id| state.deployments.get(&id));
    let under_way = newest.is_some_and(|d| !d.phase.is_final());
    let failing = operate::job_trouble(state, row).is_some();
    let phase = match (*stopped, under_way, ready >= wanted && !failing) {
        (true, ..) => WorkloadPhase::Stopped,
        (_, true, _) => WorkloadPhase::Deploying,
        (_, _, true) => WorkloadPhase::Ready,
        _ => WorkloadPhase::Degraded,
    };
    // Restarts of its copies, and a condition of a copy that is ready all the same (a full log disk).
    let reason =
        why_not_ready(state, row, now).or_else(|| allocs.iter().find_map(|a| a.status.as_ref()?.reason.clone()).filter(|r| !r.is_calm()));
    api::Workload {
        key: key.clone(),
        release: *release,
        phase,
        copies_wanted: wanted,
        copies_ready: ready,
        copies_running: allocs.iter().filter(|a| a.phase() == Phase::Running).count() as u32,
        restarts: allocs.iter().filter_map(|a| a.status.as_ref()).map(|s| s.restarts).sum(),
        created_at: *created_at,
        updated_at: *updated_at,
        revision: *revision,
        // A row without its release cannot be made: both are written by one command.
        spec: state.release(key, *release).map(|r| (*r.spec).clone()).unwrap_or_else(missing_spec),
        deployment: newest.map(|d| deployment(state, d)),
        reason: if phase == WorkloadPhase::Stopped { None } else { reason.as_ref().map(ReasonView::from) },
        endpoints: allocs.iter().filter(|a| a.run && a.is_ready()).filter_map(|a| endpoint(state, a)).take(ENDPOINTS_SHOWN).collect(),
    }
}

/// An empty spec, for a release that is not there.
fn missing_spec() -> optimus_common::spec::WorkloadSpec {
    use optimus_common::Span;
    use optimus_common::spec::*;
    WorkloadSpec {
        kind: Kind::Service,
        driver: Driver::Process,
        run: Run::Argv(vec![]),
        dir: None,
        env: BTreeMap::new(),
        user: None,
        copies: None,
        ports: vec![],
        resources: Resources { cpu: Millicores(0), memory_request: Bytes(0), memory_limit: Bytes(0), pids: 0 },
        health: Health { readiness: None, liveness: None },
        restart: Restart { delay: Span(0), delay_max: Span(0), reset_after: Span(0) },
        stop: Stop { signal: "TERM".into(), grace: Span(0) },
        update: Update::default(),
        logs: Logs { size: Bytes(0) },
        secrets: vec![],
        secret_values: BTreeMap::new(),
        labels: BTreeMap::new(),
        placement: Default::default(),
        schedule: None,
        timeout: None,
        disconnect: None,
        runs: None,
    }
}

/// How many copies a workload should have now, and how many of them are ready.
fn wanted_and_ready(state: &State, row: &Workload) -> (u32, u32) {
    let release = state.release(&row.key, row.release);
    match release.map(|r| r.spec.kind) {
        _ if row.stopped => (0, slots_ready(state, row)),
        Some(Kind::Daemon) => {
            let nodes = release.map_or(0, |release| reconciler::nodes_wanted(state, row, release).count());
            let ready = |a: &&Arc<Alloc>| a.run && a.is_ready() && is_current(state, a);
            (nodes as u32, state.allocs_of(&row.key).filter(ready).map(|a| a.node).collect::<BTreeSet<_>>().len() as u32)
        }
        Some(Kind::Job) => operate::job_copies(state, row),
        _ => (row.copies, slots_ready(state, row)),
    }
}

/// Slots with a copy that is ready on a node that answers. While one moves, two copies in it count once.
fn slots_ready(state: &State, row: &Workload) -> u32 {
    let ready = |a: &&Arc<Alloc>| a.run && a.index < row.copies && a.is_ready() && is_current(state, a);
    state.allocs_of(&row.key).filter(ready).map(|a| a.index).collect::<BTreeSet<_>>().len() as u32
}

fn is_current(state: &State, alloc: &Alloc) -> bool {
    state.nodes.get(&alloc.node).is_some_and(|n| n.up)
}

/// The most telling reason why a workload has not all its copies ready.
fn why_not_ready(state: &State, row: &Workload, now: Timestamp) -> Option<Reason> {
    if row.stopped {
        return None;
    }
    let mut calm = None;
    for alloc in state.allocs_of(&row.key).filter(|a| a.run && !(a.is_ready() && is_current(state, a))) {
        match allocation_reason(state, alloc) {
            Some(reason) if !reason.is_calm() => return Some(reason),
            reason => calm = calm.or(reason),
        }
    }
    let unplaced = reconciler::unplaced_slots(state, row, now, 1).pop().map(|(_, reason)| reason);
    unplaced.or_else(|| operate::job_trouble(state, row)).or(calm)
}

/// Why a copy is not running and ready; unset when it is.
fn allocation_reason(state: &State, alloc: &Alloc) -> Option<Reason> {
    let node = state.nodes.get(&alloc.node);
    if let Some(node) = node.filter(|n| !n.up && !alloc.has_ended()) {
        return Some(Reason::NodeDown { node: node.facts.name.clone(), since: node.changed_at });
    }
    let reported = alloc.status.as_ref().and_then(|s| s.reason.clone());
    match (&alloc.status, alloc.run) {
        (None, true) => Some(Reason::WaitingForNode { node: node.map_or_else(|| alloc.node.to_string(), |n| n.facts.name.clone()) }),
        // Why it ended by itself says more than why it is no longer wanted.
        (_, false) => reported.filter(|r| !r.is_calm()).or_else(|| alloc.stop_reason.clone()),
        (Some(_), true) => reported,
    }
}

fn endpoint(state: &State, alloc: &Alloc) -> Option<String> {
    let (_, port) = alloc.ports.first()?;
    let address = &state.nodes.get(&alloc.node)?.facts.address;
    Some(if address.contains(':') { format!("http://[{address}]:{port}") } else { format!("http://{address}:{port}") })
}

pub fn allocation(state: &State, row: &Alloc) -> api::Allocation {
    let Alloc {
        id,
        key,
        index,
        release,
        node,
        ports,
        devices: _,
        run,
        stop_reason: _,
        created_at,
        status,
        migrate: _,
        draining_since: _,
        unrouted_at: _,
    } = row;
    let node_row = state.nodes.get(node);
    let status = status.as_ref();
    api::Allocation {
        id: *id,
        key: key.clone(),
        name: row.name(),
        index: *index,
        release: *release,
        node: Some(*node),
        node_name: node_row.map(|n| n.facts.name.clone()),
        desired_run: *run,
        phase: row.phase(),
        ready: row.is_ready(),
        current: is_current(state, row),
        restarts: status.map_or(0, |s| s.restarts),
        pid: status.and_then(|s| s.pid),
        ports: ports.iter().cloned().collect(),
        endpoint: endpoint(state, row),
        created_at: *created_at,
        started_at: status.and_then(|s| s.started_at),
        reason: allocation_reason(state, row).as_ref().map(ReasonView::from),
        last_exit: status.and_then(|s| s.last_exit.clone()),
        unenforced: status.map(|s| s.unenforced.clone()).unwrap_or_default(),
        last_lines: status.map(|s| s.last_lines.clone()).unwrap_or_default(),
        limits: status.and_then(|s| s.limits),
        devices: placing::allocation_devices(row),
        volumes: state.release(key, *release).map(|r| r.spec.placement.volumes.clone()).unwrap_or_default(),
    }
}

/// `now` stands in for when a node that is up was last seen: its lease says it is there.
pub fn node(state: &State, row: &Node, now: Timestamp) -> api::Node {
    let Node {
        id,
        facts,
        joined_at,
        up,
        changed_at,
        certificate_expires_at,
        key_fingerprint: _,
        cordoned,
        blocked_ports: _,
        ca_trusted: _,
        ca_signer: _,
        clock_skew_ms,
        labels: _,
        pool: _,
        drain: _,
    } = row;
    let NodeFacts {
        name,
        version,
        cpu,
        memory,
        arch,
        kernel,
        cgroup,
        unenforced,
        drivers,
        ports: _,
        address,
        boot_id: _,
        labels: _,
        attributes,
        pool: _,
        disk,
        disk_free,
        reserved,
        devices: _,
        load: _,
    } = facts.clone();
    let taken = scheduler::taken(state, *id);
    api::Node {
        id: *id,
        name,
        phase: if *up { NodePhase::Up } else { NodePhase::Down },
        address,
        version,
        arch,
        kernel,
        cgroup,
        unenforced,
        drivers,
        cpu,
        cpu_reserved: Millicores(u32::try_from(taken.cpu).unwrap_or(u32::MAX)),
        memory,
        memory_reserved: Bytes(taken.memory),
        copies: taken.copies,
        joined_at: *joined_at,
        last_seen: if *up { now } else { *changed_at },
        certificate_expires_at: *certificate_expires_at,
        clock_skew_ms: *clock_skew_ms,
        labels: row.labels(),
        pool: row.pool().to_owned(),
        cordoned: *cordoned,
        drain: operate::drain(state, row),
        disk,
        disk_reserved: Bytes(taken.disk),
        disk_free,
        host_reserve: placing::host_reserve(reserved),
        attributes,
        devices: placing::devices(state, row),
        volumes: placing::volumes_on(state, row),
    }
}

pub fn event(row: &Event) -> api::Event {
    let Event { index, n, at, kind, subject, message, reason } = row;
    // The stored name of a kind is its public name.
    let kind = serde_name(kind);
    api::Event {
        index: *index,
        n: *n,
        at: *at,
        kind,
        subject: subject.clone(),
        message: message.clone(),
        reason: reason.as_ref().map(ReasonView::from),
    }
}

fn serde_name(kind: &crate::state::EventKind) -> String {
    use crate::state::EventKind::*;
    match kind {
        ClusterCreated => "cluster_created",
        ClusterUpgraded => "cluster_upgraded",
        ServerJoined => "server_joined",
        ServerLeaving => "server_leaving",
        ServerLeft => "server_left",
        NodeJoined => "node_joined",
        NodeUp => "node_up",
        NodeDown => "node_down",
        NodeRemoved => "node_removed",
        TokenCreated => "token_created",
        TokenRefused => "token_refused",
        DeploymentStarted => "deployment_started",
        DeploymentEnded => "deployment_ended",
        WorkloadScaled => "workload_scaled",
        WorkloadStopped => "workload_stopped",
        WorkloadRemoved => "workload_removed",
        CopyPlaced => "copy_placed",
        CopyStarted => "copy_started",
        CopyReady => "copy_ready",
        CopyNotReady => "copy_not_ready",
        CopyExited => "copy_exited",
        CopyStopped => "copy_stopped",
        CaRotation => "ca_rotation",
        ClockSkew => "clock_skew",
        CopyFailed => "copy_failed",
        DeploymentShifted => "deployment_shifted",
        DeploymentPromoted => "deployment_promoted",
        DeploymentPaused => "deployment_paused",
        CopyUpdated => "copy_updated",
        SecretSet => "secret_set",
        RunStarted => "run_started",
        RunEnded => "run_ended",
        RunSkipped => "run_skipped",
        NodeChanged => "node_changed",
        NodeDraining => "node_draining",
        NodeDrained => "node_drained",
        Rebalanced => "rebalanced",
    }
    .to_owned()
}

/// Why a workload is as it is.
pub fn explain_workload(state: &State, row: &Workload, now: Timestamp) -> api::Explanation {
    let shown = workload(state, row, now);
    let key = &row.key;
    let mut evidence = vec![format!(
        "release {} should run with {} {}; {} running, {} ready",
        row.release,
        shown.copies_wanted,
        if shown.copies_wanted == 1 { "copy" } else { "copies" },
        shown.copies_running,
        shown.copies_ready
    )];
    if let Some(d) = &shown.deployment {
        let name = d.phase.word();
        evidence.push(format!("newest deployment ({}) of release {}: {name}", d.trigger, d.release));
        if let Some(reason) = &d.reason {
            evidence.push(format!("it ended so because: {}", reason.message));
        }
    }
    for alloc in state.allocs_of(key).filter(|a| a.run && !a.is_ready()).take(EVENTS_SHOWN) {
        let why = allocation_reason(state, alloc).map_or_else(|| "no reason reported".to_owned(), |r| r.to_string());
        evidence.push(format!("{}: {why}", alloc.name()));
    }
    for (index, reason) in reconciler::unplaced_slots(state, row, now, EVENTS_SHOWN) {
        evidence.push(format!("{}-{index} is not placed: {reason}", key.workload));
    }
    evidence.extend(placement_evidence(state, row, now));
    let subject = key.to_string();
    let summary = match (&shown.reason, shown.phase) {
        (_, WorkloadPhase::Stopped) => format!("{} is stopped on request", key.workload),
        (_, WorkloadPhase::Ready) if shown.spec.kind == Kind::Job => {
            format!("{} is well: {} copies of its runs are at work", key.workload, shown.copies_ready)
        }
        (_, WorkloadPhase::Ready) => format!("{} is ready: {} of {} copies", key.workload, shown.copies_ready, shown.copies_wanted),
        (Some(reason), _) => {
            format!("{}: {} of {} copies ready: {}", key.workload, shown.copies_ready, shown.copies_wanted, reason.message)
        }
        (None, _) => format!("{}: {} of {} copies ready", key.workload, shown.copies_ready, shown.copies_wanted),
    };
    api::Explanation {
        summary,
        allocation: None,
        hint: shown.reason.as_ref().filter(|_| shown.phase != WorkloadPhase::Ready).map(|r| r.hint.clone()),
        workload: shown,
        evidence,
        events: events_of(state, |s| s == subject || s.strip_prefix(&subject).is_some_and(|rest| rest.starts_with('-'))),
    }
}

/// What each node says to one more copy, best first: the terms of its score, or which rule it fails and by how much.
fn placement_evidence(state: &State, row: &Workload, now: Timestamp) -> Vec<String> {
    let Some(release) = state.release(&row.key, row.release).filter(|_| !row.stopped) else { return vec![] };
    let judged = scheduler::judge(state, &row.key, &release.spec, now);
    let more = judged.len().saturating_sub(NODES_SHOWN);
    let mut lines: Vec<String> = judged
        .into_iter()
        .take(NODES_SHOWN)
        .map(|j| match j.verdict {
            Ok(score) => {
                let terms: Vec<String> = score.terms().iter().map(|(name, value)| format!("{name} {value}")).collect();
                format!("another copy could run on {} ({} of 1000 each)", j.name, terms.join(", "))
            }
            Err(refusal) => format!("another copy could not run on {}: {refusal}", j.name),
        })
        .collect();
    if more > 0 {
        lines.push(format!("and {more} more nodes"));
    }
    lines
}

/// Why a copy is as it is.
pub fn explain_allocation(state: &State, row: &Alloc, now: Timestamp) -> api::Explanation {
    let shown = allocation(state, row);
    let name = row.name();
    let mut evidence = Vec::new();
    let node = shown.node_name.clone().unwrap_or_else(|| row.node.to_string());
    evidence.push(format!("release {} placed on {node} at {}", row.release, row.created_at));
    if !shown.current {
        evidence.push(format!("{node} is not answering; what follows is what was last seen"));
    }
    if let (Some(pid), Some(at)) = (shown.pid, shown.started_at) {
        evidence.push(format!("process {pid} started at {at}, {} ago", whole_seconds(now.since(at))));
    }
    if let Some(Resources { cpu, memory_limit, .. }) = row.status.as_ref().and_then(|s| s.limits) {
        let wanted = state.release(&row.key, row.release).filter(|release| row.awaits_limits(&release.spec));
        let late = wanted.map_or_else(String::new, |release| {
            let Resources { cpu, memory_limit, .. } = release.spec.resources;
            format!("; release {} asks for {cpu} cores and {}", release.number, memory_limit.human())
        });
        evidence.push(format!("it may use {cpu} cores and {} of memory{late}", memory_limit.human()));
    }
    if shown.restarts > 0 {
        evidence.push(format!("restarted {} {}", shown.restarts, if shown.restarts == 1 { "time" } else { "times" }));
    }
    if let Some(exit) = &shown.last_exit {
        let mut line = format!("last end: {exit} at {}", exit.at);
        if let Some(oom) = exit.oom {
            line.push_str(&format!("; out of memory: limit {}, peak {}", oom.limit.human(), oom.peak.human()));
        }
        evidence.push(line);
    }
    for device in &shown.devices {
        evidence.push(format!("it has device {} {} for itself", device.kind, device.id));
    }
    for volume in &shown.volumes {
        evidence.push(format!("it uses volume {volume} of {node}"));
    }
    for limit in &shown.unenforced {
        evidence.push(format!("not enforced on this node: {limit}"));
    }
    let phase = match shown.phase {
        Phase::Running if shown.ready => "running and ready".to_owned(),
        Phase::Running => "running, not ready".to_owned(),
        Phase::Backoff => "waiting for its next start".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    };
    let summary = match &shown.reason {
        Some(reason) if !matches!(reason.detail, Reason::Starting) => format!("{name} is {phase}: {}", reason.message),
        _ => format!("{name} is {phase}"),
    };
    let subject = row.subject();
    let workload_row = state.workload(&row.key);
    let shown_workload = workload_row.map_or_else(|| workload_of_orphan(row), |w| workload(state, w, now));
    api::Explanation {
        summary,
        hint: shown.reason.as_ref().filter(|r| !r.detail.is_calm()).map(|r| r.hint.clone()),
        allocation: Some(shown),
        workload: shown_workload,
        evidence,
        events: events_of(state, |s| s == subject),
    }
}

/// A copy outlives its workload's row for an instant at most; it is shown under a removed one.
fn workload_of_orphan(row: &Alloc) -> api::Workload {
    api::Workload {
        key: row.key.clone(),
        release: row.release,
        phase: WorkloadPhase::Stopped,
        copies_wanted: 0,
        copies_ready: 0,
        copies_running: 0,
        restarts: 0,
        created_at: row.created_at,
        updated_at: row.created_at,
        revision: 0,
        spec: missing_spec(),
        deployment: None,
        reason: None,
        endpoints: vec![],
    }
}

fn events_of(state: &State, about: impl Fn(&str) -> bool) -> Vec<api::Event> {
    let mut found: Vec<api::Event> =
        state.events.values().rev().filter(|e| about(&e.subject)).take(EVENTS_SHOWN).map(|e| event(e)).collect();
    found.reverse();
    found
}

fn whole_seconds(span: optimus_common::Span) -> optimus_common::Span {
    optimus_common::Span(span.0 / 1000 * 1000)
}

/// The fleet in one answer; none before the cluster exists. Costs a pass over all copies.
pub fn status(state: &State, leader: Option<u64>, term: u64, servers: u32) -> Option<api::ClusterStatus> {
    let cluster = state.cluster.as_ref()?;
    let nodes_up = state.nodes.values().filter(|n| n.up).count() as u32;
    let nodes_down = state.nodes.len() as u32 - nodes_up;
    let (mut wanted, mut ready) = (0, 0);
    let mut troubled: Option<(String, u32, u32)> = None;
    for row in state.workloads.values() {
        let (copies, up) = wanted_and_ready(state, row);
        let up = up.min(copies);
        wanted += copies;
        ready += up;
        if up < copies && troubled.is_none() {
            troubled = Some((row.key.to_string(), up, copies));
        }
    }
    let workloads = state.workloads.len() as u32;
    let plural = |n: u32, one: &str, many: &str| if n == 1 { format!("{n} {one}") } else { format!("{n} {many}") };
    let mut summary = match troubled {
        None if workloads == 0 => "nothing is deployed yet".to_owned(),
        None => format!("all {} of {} are ready", plural(wanted, "copy", "copies"), plural(workloads, "workload", "workloads")),
        Some((key, up, copies)) => format!("{ready} of {} ready; {key} has {up} of {copies}", plural(wanted, "copy", "copies")),
    };
    if nodes_down > 0 {
        summary.push_str(&format!("; {} down", plural(nodes_down, "node is", "nodes are")));
    }
    if state.nodes.is_empty() {
        summary.push_str("; no node has joined");
    }
    Some(api::ClusterStatus {
        cluster: cluster.id,
        index: state.index,
        leader,
        term,
        servers,
        nodes_up,
        nodes_down,
        workloads,
        copies_wanted: wanted,
        copies_ready: ready,
        summary,
    })
}
