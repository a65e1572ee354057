//! Quotas, pools, volumes, devices and secrets as the API shows them.

use std::sync::Arc;

use std::collections::BTreeSet;

use optimus_common::api::v1 as api;
use optimus_common::protocol::HostReserve;
use optimus_common::{Bytes, Millicores};

use crate::scheduler;
use crate::state::{Alloc, DEFAULT_POOL, Layout, Node, Pool, Quota, QuotaKey, Secret, SecretKey, State, Volume};

/// Names listed with a pool, a volume or a node.
const NAMES_SHOWN: usize = 100;
/// Devices listed with a node.
const DEVICES_SHOWN: usize = 1000;

fn cores(thousandths: u64) -> Millicores {
    Millicores(u32::try_from(thousandths).unwrap_or(u32::MAX))
}

pub fn quota(state: &State, key: &QuotaKey, row: &Quota) -> api::Quota {
    let Quota { cpu, memory, disk, copies, devices } = *row;
    let scheduler::Usage { cpu: used_cpu, memory: used_memory, disk: used_disk, copies: used_copies, devices: used_devices } =
        scheduler::usage(state, key);
    api::Quota {
        project: key.project.clone(),
        environment: key.environment.clone(),
        limits: api::QuotaLimits { cpu, memory, disk, copies, devices },
        used: api::QuotaUsed {
            cpu: cores(used_cpu),
            memory: Bytes(used_memory),
            disk: Bytes(used_disk),
            copies: used_copies,
            devices: used_devices,
        },
    }
}

/// Names of all pools: those that something was set for, and those that a node is in. Costs a look at every node.
pub fn pool_names(state: &State) -> BTreeSet<String> {
    let set = state.pools.keys().map(|name| name.to_string());
    set.chain(state.nodes.values().map(|node| node.pool().to_owned())).chain([DEFAULT_POOL.to_owned()]).collect()
}

/// None for a pool that has no node and no settings. Costs a look at every node.
pub fn pool(state: &State, name: &str) -> Option<api::Pool> {
    let row = state.pools.iter().find(|(known, _)| known.as_str() == name).map(|(_, row)| row);
    let mut shown = api::Pool {
        name: name.to_owned(),
        layout: match row.map(|row| row.layout).unwrap_or_default() {
            Layout::Spread => api::PoolLayout::Spread,
            Layout::BinPack => api::PoolLayout::BinPack,
        },
        set: row.is_some(),
        nodes: 0,
        nodes_up: 0,
        node_names: vec![],
        copies: 0,
        cpu: Millicores(0),
        cpu_reserved: Millicores(0),
        memory: Bytes(0),
        memory_reserved: Bytes(0),
    };
    let (mut cpu, mut cpu_reserved) = (0, 0);
    for node in state.nodes.values().filter(|node| node.pool() == name) {
        shown.nodes += 1;
        shown.nodes_up += u32::from(node.up);
        if shown.node_names.len() < NAMES_SHOWN {
            shown.node_names.push(node.facts.name.clone());
        }
        let (node_cpu, node_memory, _) = scheduler::capacity(node);
        let taken = scheduler::taken(state, node.id);
        (cpu, cpu_reserved) = (cpu + node_cpu, cpu_reserved + taken.cpu);
        shown.memory.0 += node_memory;
        shown.memory_reserved.0 += taken.memory;
        shown.copies += taken.copies;
    }
    (shown.cpu, shown.cpu_reserved) = (cores(cpu), cores(cpu_reserved));
    (shown.set || shown.nodes > 0 || name == DEFAULT_POOL).then_some(shown)
}

/// The row that a request asks for.
pub fn pool_row(name: optimus_common::Name, settings: api::PoolSettings) -> Pool {
    let layout = match settings.layout {
        api::PoolLayout::Spread => Layout::Spread,
        api::PoolLayout::BinPack => Layout::BinPack,
    };
    Pool { name, layout }
}

pub fn volume(state: &State, row: &Volume) -> api::Volume {
    let Volume { key, node } = row;
    let host = state.nodes.get(node);
    let holders: Vec<String> = state.volume_holders(key).take(NAMES_SHOWN).map(|alloc| alloc.subject()).collect();
    let workloads: Vec<_> = state.volume_workloads(key).take(NAMES_SHOWN).map(|row| row.key.clone()).collect();
    api::Volume {
        project: key.project.clone(),
        environment: key.environment.clone(),
        name: key.name.clone(),
        node: *node,
        node_name: host.map_or_else(|| node.to_string(), |host| host.facts.name.clone()),
        node_up: host.is_some_and(|host| host.up),
        orphan: holders.is_empty() && workloads.is_empty(),
        holders,
        workloads,
    }
}

pub(super) fn host_reserve(reserve: HostReserve) -> api::NodeReserve {
    let HostReserve { cpu, memory, disk } = reserve;
    api::NodeReserve { cpu, memory, disk }
}

/// The devices of a node, with the copy each was given to.
pub(super) fn devices(state: &State, node: &Node) -> Vec<api::NodeDevice> {
    if node.facts.devices.is_empty() {
        return vec![];
    }
    let holds = |alloc: &Alloc, kind: &str, id: &str| !alloc.has_ended() && alloc.devices.iter().any(|(k, i)| k == kind && i == id);
    let mut shown = Vec::new();
    for group in &node.facts.devices {
        let kind = scheduler::device_kind(group);
        for id in &group.ids {
            if shown.len() == DEVICES_SHOWN {
                return shown;
            }
            let holder = state.allocs_on(node.id).find(|alloc| holds(alloc, &kind, id)).map(|alloc| alloc.subject());
            let paths = group.paths.get(id).cloned().unwrap_or_default();
            shown.push(api::NodeDevice { kind: kind.clone(), id: id.clone(), paths, holder });
        }
    }
    shown
}

/// Volumes that live on a node. Costs a look at every volume.
pub(super) fn volumes_on(state: &State, node: &Node) -> Vec<String> {
    state.volumes.values().filter(|row| row.node == node.id).take(NAMES_SHOWN).map(|row| row.key.to_string()).collect()
}

pub(super) fn allocation_devices(alloc: &Alloc) -> Vec<api::AllocationDevice> {
    alloc.devices.iter().map(|(kind, id)| api::AllocationDevice { kind: kind.clone(), id: id.clone() }).collect()
}

/// A secret as the API shows it: everything but its value.
pub fn secret(state: &State, key: &SecretKey, row: &Secret) -> api::Secret {
    let version = |v: &Arc<crate::state::SecretVersion>| api::SecretVersion { version: v.number, created_at: v.created_at };
    let reader = |w: &Arc<crate::state::Workload>| api::SecretReader {
        workload: w.key.workload.clone(),
        version: state.release(&w.key, w.release).and_then(|r| r.secrets.get(&key.name).copied()),
    };
    api::Secret {
        project: key.vault.project.clone(),
        environment: key.vault.environment.clone(),
        name: key.name.clone(),
        version: row.newest,
        created_at: row.versions.last().map_or(optimus_common::Timestamp(0), |v| v.created_at),
        versions: row.versions.iter().map(version).collect(),
        readers: state.secret_readers(key).map(reader).collect(),
    }
}
