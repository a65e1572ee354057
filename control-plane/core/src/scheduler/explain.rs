//! Why a copy went where it did, or nowhere. Computed when somebody asks.

use std::collections::BTreeMap;

use optimus_common::reason::{NodeRefusal, Refusal, RefusalCount};
use optimus_common::spec::WorkloadSpec;
use optimus_common::{AllocId, Reason, Timestamp, WorkloadKey};
use uuid::Uuid;

use super::view::{Ask, Judged, View};
use crate::state::State;

/// Most nodes named in a refusal; with more nodes, refusals are counted by reason.
const NODES_NAMED: usize = 10;
/// Most reasons told.
const REASONS_TOLD: usize = 6;

/// Every node with its score or its refusal, best first. For people who ask why.
pub fn judge(state: &State, key: &WorkloadKey, spec: &WorkloadSpec, now: Timestamp) -> Vec<Judged> {
    View::of(state, now).judge(Ask { key, spec, alloc: AllocId(Uuid::nil()), troubled: &[] })
}

/// Why no node takes a copy; unset when one would.
pub fn why_nowhere(state: &State, key: &WorkloadKey, spec: &WorkloadSpec, now: Timestamp) -> Option<Reason> {
    if state.nodes.is_empty() {
        return Some(Reason::NoNodes);
    }
    let mut view = View::of(state, now);
    if let Err(Refusal::Quota { scope, what, asked, left }) = view.allowed(key, spec) {
        return Some(Reason::OverQuota { scope, what, asked, left });
    }
    view.batch(key, spec);
    let mut refusals = Vec::new();
    let mut counts: BTreeMap<String, RefusalCount> = BTreeMap::new();
    let few = view.rows.len() <= NODES_NAMED;
    for (at, row) in view.rows.iter().enumerate() {
        let refusal = view.refusal(at)?;
        if few {
            refusals.push(NodeRefusal { node: row.node.facts.name.clone(), refusal });
            continue;
        }
        match counts.get_mut(&sort_of(&refusal)) {
            None => {
                let nearest = NodeRefusal { node: row.node.facts.name.clone(), refusal };
                counts.insert(sort_of(&nearest.refusal), RefusalCount { nodes: 1, nearest });
            }
            Some(count) => {
                count.nodes += 1;
                if missing(&refusal) < missing(&count.nearest.refusal) {
                    count.nearest = NodeRefusal { node: row.node.facts.name.clone(), refusal };
                }
            }
        }
    }
    let mut counts: Vec<RefusalCount> = counts.into_values().collect();
    counts.sort_by_key(|c| std::cmp::Reverse(c.nodes));
    counts.truncate(REASONS_TOLD);
    Some(Reason::NoNodeFits { nodes: refusals, counts })
}

/// Refusals of one sort are counted together.
fn sort_of(refusal: &Refusal) -> String {
    match refusal {
        Refusal::NodeDown => "down".into(),
        Refusal::Cordoned => "cordoned".into(),
        Refusal::Cpu { .. } => "cpu".into(),
        Refusal::Memory { .. } => "memory".into(),
        Refusal::Disk { .. } => "disk".into(),
        Refusal::PortReserved { port } => format!("port {port}"),
        Refusal::NoFreePort => "ports".into(),
        Refusal::DriverMissing { driver } => format!("driver {driver}"),
        Refusal::Constraint { rule, .. } => format!("rule {rule}"),
        Refusal::Architecture { .. } => "arch".into(),
        Refusal::Pool { .. } => "pool".into(),
        Refusal::Devices { kind, .. } => format!("devices {kind}"),
        Refusal::VolumeMissing { volume } | Refusal::VolumeElsewhere { volume, .. } => format!("volume {volume}"),
        Refusal::DistinctHosts => "distinct".into(),
        Refusal::Quota { what, .. } => format!("quota {what}"),
    }
}

/// By how much it was refused, where that can be said.
fn missing(refusal: &Refusal) -> u64 {
    match refusal {
        Refusal::Cpu { asked, free } => u64::from(asked.0.saturating_sub(free.0)),
        Refusal::Memory { asked, free } | Refusal::Disk { asked, free } => asked.0.saturating_sub(free.0),
        Refusal::Devices { asked, free, .. } => u64::from(asked.saturating_sub(*free)),
        _ => 0,
    }
}

impl View<'_> {
    /// Why a node cannot take a copy of the workload looked at last.
    fn refusal(&self, at: usize) -> Option<Refusal> {
        self.current()?.judge(self.state, self.now, &self.rows[at], at).err()
    }
}
