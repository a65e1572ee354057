//! Where a copy may run, and where best. One judge, [`fits`], when planning and when committing.

use std::collections::BTreeSet;

use optimus_common::reason::{NodeRefusal, Refusal};
use optimus_common::spec::{Driver, WorkloadSpec};
use optimus_common::{AllocId, Bytes, Millicores, NodeId, Reason, Timestamp, WorkloadKey};

use crate::state::{Node, State};

/// Host port of each port of a spec, in its order.
pub type HostPorts = Vec<(String, u16)>;

/// What is taken of a node by copies that run or have not stopped yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Taken {
    pub cpu: u64,
    pub memory: u64,
    pub ports: BTreeSet<u16>,
    pub copies: u32,
}

/// Sums what the copies on a node hold. A copy holds its share until its end is reported.
pub fn taken(state: &State, node: NodeId) -> Taken {
    let mut sum = Taken::default();
    for alloc in state.allocs_on(node) {
        if alloc.has_ended() {
            continue;
        }
        sum.copies += 1;
        sum.ports.extend(alloc.ports.iter().map(|(_, port)| *port));
        if let Some(release) = state.release(&alloc.key, alloc.release) {
            sum.cpu += u64::from(release.spec.resources.cpu.0);
            sum.memory += release.spec.resources.memory_request.0;
        }
    }
    sum
}

/// Whether a node can take one more copy of `spec`, with `ports` if they are chosen already.
///
/// CPU and memory are reservations without overcommit: `cpu` and the memory request.
pub fn fits(state: &State, node: NodeId, spec: &WorkloadSpec, ports: Option<&[(String, u16)]>, now: Timestamp) -> Result<(), Refusal> {
    let Some(row) = state.nodes.get(&node) else { return Err(Refusal::NodeDown) };
    fits_with(row, &taken(state, node), spec, ports, now)
}

/// [`fits`] with the sums at hand.
pub fn fits_with(node: &Node, taken: &Taken, spec: &WorkloadSpec, ports: Option<&[(String, u16)]>, now: Timestamp) -> Result<(), Refusal> {
    if !node.up {
        return Err(Refusal::NodeDown);
    }
    if node.cordoned {
        return Err(Refusal::Cordoned);
    }
    let driver = match &spec.driver {
        Driver::Process => "process",
        Driver::Container { .. } => "container",
    };
    if !node.facts.drivers.iter().any(|d| d == driver) {
        return Err(Refusal::DriverMissing { driver: driver.into() });
    }
    let free_cpu = u64::from(node.facts.cpu.0).saturating_sub(taken.cpu);
    if u64::from(spec.resources.cpu.0) > free_cpu {
        return Err(Refusal::Cpu { asked: spec.resources.cpu, free: Millicores(free_cpu as u32) });
    }
    let free_memory = node.facts.memory.0.saturating_sub(taken.memory);
    if spec.resources.memory_request.0 > free_memory {
        return Err(Refusal::Memory { asked: spec.resources.memory_request, free: Bytes(free_memory) });
    }
    let chosen = match ports {
        Some(ports) => ports.iter().map(|(_, port)| *port).collect::<Vec<_>>(),
        None => spec.ports.iter().filter_map(|p| p.fixed).collect(),
    };
    if let Some(&port) = chosen.iter().find(|port| taken.ports.contains(port)) {
        return Err(Refusal::PortReserved { port });
    }
    if ports.is_none() {
        let wanted = spec.ports.iter().filter(|p| p.fixed.is_none()).count();
        let (first, last) = node.facts.ports;
        let free = (first..=last).filter(|p| is_free(node, taken, *p, now) && !chosen.contains(p)).take(wanted).count();
        if free < wanted {
            return Err(Refusal::NoFreePort);
        }
    }
    Ok(())
}

fn is_free(node: &Node, taken: &Taken, port: u16, now: Timestamp) -> bool {
    !taken.ports.contains(&port) && node.blocked_ports.get(&port).is_none_or(|until| *until <= now)
}

/// Chooses the host ports of a copy: fixed ones as asked, dynamic ones from the node's range, starting at a
/// place that depends on the copy, so that a port just given back is not handed out at once.
fn choose_ports(node: &Node, taken: &Taken, spec: &WorkloadSpec, alloc: AllocId, now: Timestamp) -> Option<HostPorts> {
    let (first, last) = node.facts.ports;
    let range = u32::from(last.checked_sub(first)?) + 1;
    // The tail of the id is its random part.
    let start = (alloc.0.as_u128() as u32) % range;
    let mut used: BTreeSet<u16> = spec.ports.iter().filter_map(|p| p.fixed).collect();
    let mut chosen = Vec::with_capacity(spec.ports.len());
    for port in &spec.ports {
        let number = match port.fixed {
            Some(fixed) => fixed,
            None => {
                let free = (0..range)
                    .map(|n| first + ((start + n) % range) as u16)
                    .find(|p| is_free(node, taken, *p, now) && !used.contains(p))?;
                used.insert(free);
                free
            }
        };
        chosen.push((port.name.to_string(), number));
    }
    Some(chosen)
}

/// The terms of a node's score, each in `0..=1000`, always all present. Integers, so that every machine agrees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Score {
    /// Few copies of the same workload: 1000 with none.
    pub spread: u32,
    /// Free share of the scarcer of CPU and memory after placing.
    pub room: u32,
}

impl Score {
    /// Spread weighs twice: two copies on one host die together.
    pub fn total(self) -> u32 {
        2 * self.spread + self.room
    }
}

fn score(state: &State, node: &Node, taken: &Taken, key: &WorkloadKey, spec: &WorkloadSpec) -> Score {
    let same = state.allocs_on(node.id).filter(|a| a.key == *key && a.run).count() as u32;
    let share = |capacity: u64, used: u64| (capacity.saturating_sub(used) * 1000).checked_div(capacity).unwrap_or(0) as u32;
    let cpu = share(u64::from(node.facts.cpu.0), taken.cpu + u64::from(spec.resources.cpu.0));
    let memory = share(node.facts.memory.0, taken.memory + spec.resources.memory_request.0);
    Score { spread: 1000 / (1 + same), room: cpu.min(memory) }
}

/// A node and ports for one more copy, or why there are none.
pub fn place(state: &State, key: &WorkloadKey, spec: &WorkloadSpec, alloc: AllocId, now: Timestamp) -> Result<(NodeId, HostPorts), Reason> {
    let mut best: Option<(u32, NodeId, HostPorts)> = None;
    for (id, node) in &state.nodes {
        let taken = taken(state, *id);
        if fits_with(node, &taken, spec, None, now).is_err() {
            continue;
        }
        let total = score(state, node, &taken, key, spec).total();
        // Ties go to the lowest id: nodes come in the order of their ids.
        if best.as_ref().is_none_or(|(most, ..)| total > *most)
            && let Some(ports) = choose_ports(node, &taken, spec, alloc, now)
        {
            best = Some((total, *id, ports));
        }
    }
    best.map(|(_, node, ports)| (node, ports)).ok_or_else(|| why_not(state, spec, now))
}

/// Most nodes named in a refusal.
const NODES_NAMED: usize = 10;

/// Why no node takes a copy, computed when somebody asks.
pub fn why_not(state: &State, spec: &WorkloadSpec, now: Timestamp) -> Reason {
    if state.nodes.is_empty() {
        return Reason::NoNodes;
    }
    let nodes = state
        .nodes
        .iter()
        .filter_map(|(id, node)| {
            let refusal = fits(state, *id, spec, None, now).err()?;
            Some(NodeRefusal { node: node.facts.name.clone(), refusal })
        })
        .take(NODES_NAMED)
        .collect();
    Reason::NoNodeFits { nodes }
}
