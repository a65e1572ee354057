//! The one judge of placement: asked when planning, and again when a plan is committed.

use std::collections::BTreeMap;
use std::sync::Arc;

use optimus_common::planted::planted;
use optimus_common::reason::Refusal;
use optimus_common::spec::WorkloadSpec;
use optimus_common::{AllocId, Bytes, Millicores, NodeId, Timestamp, WorkloadKey};

use super::device::{self, Device};
use super::{constraint, quota};
use crate::state::{Alloc, Node, QuotaKey, State, VolumeKey};

/// What is taken of a node by copies that run or have not stopped yet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Taken {
    /// Thousandths of a core.
    pub cpu: u64,
    /// Bytes.
    pub memory: u64,
    /// Bytes.
    pub disk: u64,
    /// How many copies hold each; never more than one, unless an agent went back on an end it had reported.
    pub ports: BTreeMap<u16, u32>,
    pub devices: BTreeMap<Device, u32>,
    pub copies: u32,
}

fn count<K: Ord>(held: &mut BTreeMap<K, u32>, key: K) {
    *held.entry(key).or_default() += 1;
}

fn uncount<K: Ord>(held: &mut BTreeMap<K, u32>, key: &K) {
    if let Some(n) = held.get_mut(key) {
        *n -= 1;
        if *n == 0 {
            held.remove(key);
        }
    }
}

impl Taken {
    pub(crate) fn add(&mut self, ports: &[(String, u16)], devices: &[Device], spec: &WorkloadSpec) {
        self.copies += 1;
        ports.iter().for_each(|(_, port)| count(&mut self.ports, *port));
        devices.iter().for_each(|device| count(&mut self.devices, device.clone()));
        self.cpu += u64::from(spec.resources.cpu.0);
        self.memory += spec.resources.memory_request.0;
        self.disk += spec.placement.disk.0;
    }

    /// A copy without its release, which should not be, counts as one and no more.
    pub(crate) fn add_copy(&mut self, alloc: &Alloc, spec: Option<&WorkloadSpec>) {
        match spec {
            Some(spec) => self.add(&alloc.ports, &alloc.devices, spec),
            None => self.copies += 1,
        }
    }

    pub(crate) fn remove_copy(&mut self, alloc: &Alloc, spec: Option<&WorkloadSpec>) {
        self.copies = self.copies.saturating_sub(1);
        let Some(spec) = spec else { return };
        alloc.ports.iter().for_each(|(_, port)| uncount(&mut self.ports, port));
        alloc.devices.iter().for_each(|device| uncount(&mut self.devices, device));
        self.cpu = self.cpu.saturating_sub(u64::from(spec.resources.cpu.0));
        self.memory = self.memory.saturating_sub(spec.resources.memory_request.0);
        self.disk = self.disk.saturating_sub(spec.placement.disk.0);
    }

    /// What would be taken without a copy that is counted in it.
    pub(crate) fn without(&self, alloc: &Alloc, spec: &WorkloadSpec) -> Taken {
        let mut rest = self.clone();
        rest.remove_copy(alloc, Some(spec));
        rest
    }
}

/// What the copies on a node hold. A copy holds its share until its end is reported. Kept with the state.
pub fn taken(state: &State, node: NodeId) -> Taken {
    state.taken_of(node).map_or_else(Taken::default, |t| Taken::clone(t))
}

/// What a node has for copies, without what is kept for the host: cpu, memory, disk.
pub(crate) fn capacity(node: &Node) -> (u64, u64, u64) {
    let (facts, kept) = (&node.facts, &node.facts.reserved);
    (
        u64::from(facts.cpu.0).saturating_sub(u64::from(kept.cpu.0)),
        facts.memory.0.saturating_sub(kept.memory.0),
        facts.disk.0.saturating_sub(kept.disk.0),
    )
}

/// Whether a node can take one more copy of a workload's release, with `ports` if they are chosen already.
///
/// CPU, memory and disk are reservations without overcommit: `cpu`, the memory request, `disk`.
pub fn fits(
    state: &State,
    node: NodeId,
    key: &WorkloadKey,
    spec: &WorkloadSpec,
    ports: Option<&[(String, u16)]>,
    now: Timestamp,
) -> Result<(), Refusal> {
    let Some(row) = state.nodes.get(&node) else { return Err(Refusal::NodeDown) };
    quota::within(state, key, spec, |scope| quota::usage(state, scope))?;
    is_open(row)?;
    constraint::suits(row, spec)?;
    volumes(state, node, key, spec)?;
    if spec.placement.distinct_hosts && state.allocs_on(node).any(|a| a.key == *key && !a.has_ended()) {
        return Err(Refusal::DistinctHosts);
    }
    let none = Arc::new(Taken::default());
    has_room(row, state.taken_of(node).unwrap_or(&none), spec, ports, now)
}

/// The volumes of a spec are on the node.
pub(crate) fn volumes(state: &State, node: NodeId, key: &WorkloadKey, spec: &WorkloadSpec) -> Result<(), Refusal> {
    for name in &spec.placement.volumes {
        let volume = VolumeKey { project: key.project.clone(), environment: key.environment.clone(), name: name.clone() };
        match state.volumes.get(&volume) {
            None => return Err(Refusal::VolumeMissing { volume: name.to_string() }),
            Some(row) if row.node != node => {
                let holder = state.nodes.get(&row.node).map_or_else(|| row.node.to_string(), |n| n.facts.name.clone());
                return Err(Refusal::VolumeElsewhere { volume: name.to_string(), node: holder });
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// The part of [`fits`] that one node decides, with the sums at hand.
pub fn fits_with(node: &Node, taken: &Taken, spec: &WorkloadSpec, ports: Option<&[(String, u16)]>, now: Timestamp) -> Result<(), Refusal> {
    is_open(node)?;
    constraint::suits(node, spec)?;
    has_room(node, taken, spec, ports, now)
}

/// The node answers and takes copies.
pub(crate) fn is_open(node: &Node) -> Result<(), Refusal> {
    if !node.up {
        return Err(Refusal::NodeDown);
    }
    if node.cordoned {
        return Err(Refusal::Cordoned);
    }
    Ok(())
}

/// What changes with each copy on the node.
pub(crate) fn has_room(
    node: &Node,
    taken: &Taken,
    spec: &WorkloadSpec,
    ports: Option<&[(String, u16)]>,
    now: Timestamp,
) -> Result<(), Refusal> {
    let (cpu, memory, disk) = capacity(node);
    let free_cpu = cpu.saturating_sub(taken.cpu);
    if u64::from(spec.resources.cpu.0) > free_cpu {
        return Err(Refusal::Cpu { asked: spec.resources.cpu, free: Millicores(u32::try_from(free_cpu).unwrap_or(u32::MAX)) });
    }
    let free_memory = memory.saturating_sub(taken.memory);
    if spec.resources.memory_request.0 > free_memory {
        return Err(Refusal::Memory { asked: spec.resources.memory_request, free: Bytes(free_memory) });
    }
    let free_disk = disk.saturating_sub(taken.disk);
    if spec.placement.disk.0 > free_disk {
        return Err(Refusal::Disk { asked: spec.placement.disk, free: Bytes(free_disk) });
    }
    if !spec.placement.devices.is_empty() {
        device::allot(node, &taken.devices, &spec.placement.devices)?;
    }
    match ports {
        None => dynamic_ports_left(node, taken, spec, now),
        Some(chosen) => ports_stand(node, taken, spec, chosen, now),
    }
}

/// Whether a copy that runs by `old` may run on by `new`, with its ports as they are: its node has what that asks
/// beyond, and the quotas allow it.
pub fn fits_resized(state: &State, alloc: &Alloc, old: &WorkloadSpec, new: &WorkloadSpec) -> bool {
    let Some(node) = state.nodes.get(&alloc.node) else { return false };
    let given_back = quota::Usage::of(Some(old));
    let used = |scope: &QuotaKey| {
        let mut used = quota::usage(state, scope);
        used.subtract(&given_back);
        used
    };
    let rest = taken(state, alloc.node).without(alloc, old);
    let (cpu, memory, disk) = capacity(node);
    constraint::suits(node, new).is_ok()
        && quota::within(state, &alloc.key, new, used).is_ok()
        && rest.cpu + u64::from(new.resources.cpu.0) <= cpu
        && rest.memory + new.resources.memory_request.0 <= memory
        && rest.disk + new.placement.disk.0 <= disk
}

/// The fixed ports are free, and there are enough others.
fn dynamic_ports_left(node: &Node, taken: &Taken, spec: &WorkloadSpec, now: Timestamp) -> Result<(), Refusal> {
    let mut fixed = 0;
    for (at, port) in spec.ports.iter().enumerate() {
        let Some(number) = port.fixed else { continue };
        fixed += 1;
        if taken.ports.contains_key(&number) || spec.ports[..at].iter().any(|p| p.fixed == Some(number)) {
            return Err(Refusal::PortReserved { port: number });
        }
    }
    let wanted = spec.ports.len() - fixed;
    if wanted == 0 {
        return Ok(());
    }
    let (first, last) = node.facts.ports;
    let range = (usize::from(last) + 1).saturating_sub(usize::from(first));
    // Most nodes have ports to spare: no need to count.
    if range >= taken.ports.len() + node.blocked_ports.len() + fixed + wanted {
        return Ok(());
    }
    let is_fixed = |port: u16| spec.ports.iter().any(|p| p.fixed == Some(port));
    let free = (first..=last).filter(|p| is_free(node, taken, *p, now) && !is_fixed(*p)).take(wanted).count();
    if free < wanted { Err(Refusal::NoFreePort) } else { Ok(()) }
}

/// The ports chosen when planning are ports of the spec, and still to be had.
fn ports_stand(node: &Node, taken: &Taken, spec: &WorkloadSpec, chosen: &[(String, u16)], now: Timestamp) -> Result<(), Refusal> {
    let (first, last) = node.facts.ports;
    let mut used = std::collections::BTreeSet::new();
    for (name, number) in chosen {
        let stands = match spec.ports.iter().find(|port| port.name.as_str() == name).map(|port| port.fixed) {
            None => false,
            Some(Some(fixed)) => fixed == *number && !taken.ports.contains_key(number),
            Some(None) => (first..=last).contains(number) && is_free(node, taken, *number, now),
        };
        if !stands || !used.insert(*number) {
            return Err(Refusal::PortReserved { port: *number });
        }
    }
    Ok(())
}

fn is_free(node: &Node, taken: &Taken, port: u16, now: Timestamp) -> bool {
    (!taken.ports.contains_key(&port) || planted("ports-double-booked")) && node.blocked_ports.get(&port).is_none_or(|until| *until <= now)
}

/// Chooses the host ports of a copy: fixed ones as asked, dynamic ones from the node's range, starting at a
/// place that depends on the copy, so that a port just given back is not handed out at once.
pub(crate) fn choose_ports(node: &Node, taken: &Taken, spec: &WorkloadSpec, alloc: AllocId, now: Timestamp) -> Option<Vec<(String, u16)>> {
    let mut used: Vec<u16> = spec.ports.iter().filter_map(|p| p.fixed).collect();
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
                used.push(free);
                free
            }
        };
        chosen.push((port.name.to_string(), number));
    }
    Some(chosen)
}
