//! The one judge of placement: asked when planning, and again when a plan is committed.

use std::collections::BTreeSet;

use optimus_common::planted::planted;
use optimus_common::reason::Refusal;
use optimus_common::spec::{Driver, WorkloadSpec};
use optimus_common::{AllocId, Bytes, Millicores, NodeId, Timestamp};

use crate::state::{Alloc, Node, State};

/// What is taken of a node by copies that run or have not stopped yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Taken {
    /// Thousandths of a core.
    pub cpu: u64,
    /// Bytes.
    pub memory: u64,
    pub ports: BTreeSet<u16>,
    pub copies: u32,
}

impl Taken {
    pub(crate) fn add(&mut self, ports: &[(String, u16)], spec: &WorkloadSpec) {
        self.copies += 1;
        self.ports.extend(ports.iter().map(|(_, port)| *port));
        self.cpu += u64::from(spec.resources.cpu.0);
        self.memory += spec.resources.memory_request.0;
    }

    /// What would be taken without a copy that is counted in it.
    pub(crate) fn without(&self, alloc: &Alloc, spec: &WorkloadSpec) -> Taken {
        let mut rest = self.clone();
        rest.copies = rest.copies.saturating_sub(1);
        rest.cpu = rest.cpu.saturating_sub(u64::from(spec.resources.cpu.0));
        rest.memory = rest.memory.saturating_sub(spec.resources.memory_request.0);
        for (_, port) in &alloc.ports {
            rest.ports.remove(port);
        }
        rest
    }
}

/// Sums what the copies on a node hold. A copy holds its share until its end is reported.
pub fn taken(state: &State, node: NodeId) -> Taken {
    let mut sum = Taken::default();
    for alloc in state.allocs_on(node).filter(|a| !a.has_ended()) {
        match state.release(&alloc.key, alloc.release) {
            Some(release) => sum.add(&alloc.ports, &release.spec),
            None => sum.copies += 1,
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

/// Whether the node is of the kind that `spec` may run on at all, whatever room it has: what a daemon runs on.
pub fn eligible(node: &Node, spec: &WorkloadSpec) -> Result<(), Refusal> {
    let driver = match &spec.driver {
        Driver::Process => "process",
        Driver::Container { .. } => "container",
    };
    if !node.facts.drivers.iter().any(|d| d == driver) {
        return Err(Refusal::DriverMissing { driver: driver.into() });
    }
    Ok(())
}

/// [`fits`] with the sums at hand.
pub fn fits_with(node: &Node, taken: &Taken, spec: &WorkloadSpec, ports: Option<&[(String, u16)]>, now: Timestamp) -> Result<(), Refusal> {
    if !node.up {
        return Err(Refusal::NodeDown);
    }
    if node.cordoned {
        return Err(Refusal::Cordoned);
    }
    eligible(node, spec)?;
    let free_cpu = u64::from(node.facts.cpu.0).saturating_sub(taken.cpu);
    if u64::from(spec.resources.cpu.0) > free_cpu {
        return Err(Refusal::Cpu { asked: spec.resources.cpu, free: Millicores(u32::try_from(free_cpu).unwrap_or(u32::MAX)) });
    }
    let free_memory = node.facts.memory.0.saturating_sub(taken.memory);
    if spec.resources.memory_request.0 > free_memory {
        return Err(Refusal::Memory { asked: spec.resources.memory_request, free: Bytes(free_memory) });
    }
    match ports {
        None => dynamic_ports_left(node, taken, spec, now),
        Some(chosen) => ports_stand(node, taken, spec, chosen, now),
    }
}

/// Whether the node of a copy that runs by `old` has what `new` asks beyond that. Its ports stay as they are.
pub fn fits_resized(state: &State, alloc: &Alloc, old: &WorkloadSpec, new: &WorkloadSpec) -> bool {
    let Some(node) = state.nodes.get(&alloc.node) else { return false };
    let rest = taken(state, alloc.node).without(alloc, old);
    rest.cpu + u64::from(new.resources.cpu.0) <= u64::from(node.facts.cpu.0)
        && rest.memory + new.resources.memory_request.0 <= node.facts.memory.0
}

/// The fixed ports are free, and there are enough others.
fn dynamic_ports_left(node: &Node, taken: &Taken, spec: &WorkloadSpec, now: Timestamp) -> Result<(), Refusal> {
    let fixed: Vec<u16> = spec.ports.iter().filter_map(|p| p.fixed).collect();
    let twice = |at: usize| fixed[..at].contains(&fixed[at]);
    if let Some(port) = (0..fixed.len()).find(|&at| taken.ports.contains(&fixed[at]) || twice(at)).map(|at| fixed[at]) {
        return Err(Refusal::PortReserved { port });
    }
    let wanted = spec.ports.len() - fixed.len();
    if wanted == 0 {
        return Ok(());
    }
    let (first, last) = node.facts.ports;
    let range = (usize::from(last) + 1).saturating_sub(usize::from(first));
    // Most nodes have ports to spare: no need to count.
    if range >= taken.ports.len() + node.blocked_ports.len() + fixed.len() + wanted {
        return Ok(());
    }
    let free = (first..=last).filter(|p| is_free(node, taken, *p, now) && !fixed.contains(p)).take(wanted).count();
    if free < wanted { Err(Refusal::NoFreePort) } else { Ok(()) }
}

/// The ports chosen when planning are ports of the spec, and still to be had.
fn ports_stand(node: &Node, taken: &Taken, spec: &WorkloadSpec, chosen: &[(String, u16)], now: Timestamp) -> Result<(), Refusal> {
    let (first, last) = node.facts.ports;
    let mut used = BTreeSet::new();
    for (name, number) in chosen {
        let stands = match spec.ports.iter().find(|port| port.name.as_str() == name).map(|port| port.fixed) {
            None => false,
            Some(Some(fixed)) => fixed == *number && !taken.ports.contains(number),
            Some(None) => (first..=last).contains(number) && is_free(node, taken, *number, now),
        };
        if !stands || !used.insert(*number) {
            return Err(Refusal::PortReserved { port: *number });
        }
    }
    Ok(())
}

fn is_free(node: &Node, taken: &Taken, port: u16, now: Timestamp) -> bool {
    (!taken.ports.contains(&port) || planted("ports-double-booked")) && node.blocked_ports.get(&port).is_none_or(|until| *until <= now)
}

/// Chooses the host ports of a copy: fixed ones as asked, dynamic ones from the node's range, starting at a
/// place that depends on the copy, so that a port just given back is not handed out at once.
pub(crate) fn choose_ports(node: &Node, taken: &Taken, spec: &WorkloadSpec, alloc: AllocId, now: Timestamp) -> Option<Vec<(String, u16)>> {
    let mut used: BTreeSet<u16> = spec.ports.iter().filter_map(|p| p.fixed).collect();
    let mut chosen = Vec::with_capacity(spec.ports.len());
    for port in &spec.ports {
        let number = match port.fixed {
            Some(fixed) => fixed,
            None => {
                let (first, last) = node.facts.ports;
                let range = u32::from(last.checked_sub(first)?) + 1;
                // The tail of the id is its random part.
                let start = (alloc.0.as_u128() as u32) % range;
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
