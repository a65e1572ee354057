//! Devices: each is given to one copy alone.

use std::collections::BTreeMap;

use optimus_common::NodeId;
use optimus_common::protocol::DeviceGroup;
use optimus_common::reason::Refusal;
use optimus_common::spec::{DeviceAsk, WorkloadSpec};

use super::fit::{Taken, taken};
use crate::state::{Node, State};

/// A device of a node: its kind (`nvidia/gpu/a100`) and id.
pub type Device = (String, String);

/// The kind of a group's devices: `nvidia/gpu/a100`.
pub fn kind_of(group: &DeviceGroup) -> String {
    format!("{}/{}/{}", group.vendor, group.kind, group.name)
}

/// Whether a group is of the kind asked for, `gpu`, `nvidia/gpu` or `nvidia/gpu/a100`, and meets its rules.
fn matches(group: &DeviceGroup, ask: &DeviceAsk) -> bool {
    let parts: Vec<&str> = ask.kind.split('/').collect();
    let kind = match parts.as_slice() {
        [kind] => group.kind == *kind,
        [vendor, kind] => group.vendor == *vendor && group.kind == *kind,
        [vendor, kind, name] => group.vendor == *vendor && group.kind == *kind && group.name == *name,
        _ => false,
    };
    kind && ask.rules.iter().all(|(name, test)| test.holds(group.attributes.get(name).map(String::as_str)))
}

/// Chooses devices for one more copy: those that suit the fewest asks are not known ahead, so asks are served in
/// their order, each from the first group with enough that match, lowest ids first.
pub(crate) fn allot(node: &Node, held: &BTreeMap<Device, u32>, asks: &[DeviceAsk]) -> Result<Vec<Device>, Refusal> {
    let mut chosen: Vec<Device> = Vec::new();
    for ask in asks {
        let free: Vec<Device> = node
            .facts
            .devices
            .iter()
            .filter(|group| matches(group, ask))
            .flat_map(|group| group.ids.iter().map(|id| (kind_of(group), id.clone())))
            .filter(|device| !held.contains_key(device) && !chosen.contains(device))
            .take(ask.count as usize)
            .collect();
        if free.len() < ask.count as usize {
            return Err(Refusal::Devices { kind: ask.kind.clone(), asked: ask.count, free: free.len() as u32 });
        }
        chosen.extend(free);
    }
    Ok(chosen)
}

/// The devices a copy gets that is committed now. The planner takes the same ones, as it commits in the same order.
pub fn allot_devices(state: &State, node: NodeId, spec: &WorkloadSpec) -> Vec<Device> {
    let Some(row) = state.nodes.get(&node).filter(|_| !spec.placement.devices.is_empty()) else { return vec![] };
    let held: Taken = taken(state, node);
    allot(row, &held.devices, &spec.placement.devices).unwrap_or_default()
}
