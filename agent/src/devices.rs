//! Which devices a copy has, and which it is kept from.
//!
//! What its commands tell of a node's devices ([`crate::placing`]) is all that is managed: a copy may open the files of
//! those it was given, no copy the files of others, and what nobody offers is as open as the host leaves it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use optimus_common::protocol::DeviceGroup;
use optimus_common::spec::GivenDevice;

use crate::isolation::DeviceNode;

/// The devices this node offers.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Devices(Vec<DeviceGroup>);

/// What one copy gets.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Share {
    /// Device files it may open, in the order they were given.
    pub paths: Vec<String>,
    /// What tells it which they are.
    pub env: BTreeMap<String, String>,
    /// Devices of this node that it must not open.
    pub kept_from: BTreeSet<DeviceNode>,
}

impl Devices {
    pub fn new(groups: Vec<DeviceGroup>) -> Self {
        Devices(groups)
    }

    /// The share of a copy. The error says which device is not here; it is for people.
    pub fn share(&self, given: &[GivenDevice]) -> Result<Share, String> {
        let mut share = Share::default();
        let (mut by_kind, mut nvidia) = (BTreeMap::<String, Vec<String>>::new(), Vec::new());
        for device in given {
            let GivenDevice { kind, id } = device;
            let group = self.0.iter().find(|group| kind_of(group) == *kind && group.ids.contains(id));
            let group = group.ok_or_else(|| format!("this node has no device {kind} {id} any more"))?;
            let named = by_kind.entry(group.kind.clone()).or_default();
            for path in group.paths.get(id).into_iter().flatten() {
                if !named.contains(path) {
                    named.push(path.clone());
                }
                if !share.paths.contains(path) {
                    share.paths.push(path.clone());
                }
            }
            if group.vendor == "nvidia" {
                nvidia.push(id.clone());
            }
        }
        for (kind, paths) in by_kind {
            share.env.insert(format!("OPTIMUS_DEVICE_{}", variable(&kind)), paths.join(","));
        }
        if !nvidia.is_empty() {
            share.env.insert("NVIDIA_VISIBLE_DEVICES".to_owned(), nvidia.join(","));
        }
        let mut allowed = BTreeSet::new();
        for path in &share.paths {
            allowed.insert(DeviceNode::of(Path::new(path)).map_err(|error| format!("device file {path}: {error}"))?);
        }
        // A file that is not there now cannot be opened either.
        let managed = self.0.iter().flat_map(|group| group.paths.values().flatten());
        share.kept_from = managed.filter_map(|path| DeviceNode::of(Path::new(path)).ok()).filter(|node| !allowed.contains(node)).collect();
        Ok(share)
    }
}

fn kind_of(group: &DeviceGroup) -> String {
    format!("{}/{}/{}", group.vendor, group.kind, group.name)
}

/// `gpu` as part of a variable's name.
fn variable(kind: &str) -> String {
    kind.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn group(vendor: &str, devices: &[(&str, &str)]) -> DeviceGroup {
        DeviceGroup {
            vendor: vendor.into(),
            kind: "gpu-x".into(),
            name: "m".into(),
            ids: devices.iter().map(|(id, _)| (*id).into()).collect(),
            paths: devices.iter().map(|(id, path)| ((*id).into(), vec![(*path).into(), "/dev/tty".into()])).collect(),
            ..DeviceGroup::default()
        }
    }

    fn given(vendor: &str, id: &str) -> GivenDevice {
        GivenDevice { kind: format!("{vendor}/gpu-x/m"), id: id.into() }
    }

    #[test]
    fn a_copy_may_open_what_it_was_given_and_is_kept_from_the_rest() {
        let devices = Devices::new(vec![group("nvidia", &[("a", "/dev/zero"), ("b", "/dev/full")])]);
        let share = devices.share(&[given("nvidia", "a")]).unwrap();
        assert_eq!(share.paths, ["/dev/zero", "/dev/tty"]);
        assert_eq!(share.env["OPTIMUS_DEVICE_GPU_X"], "/dev/zero,/dev/tty");
        assert_eq!(share.env["NVIDIA_VISIBLE_DEVICES"], "a");
        // What both share is not kept from who has one of them.
        assert_eq!(share.kept_from, [DeviceNode { block: false, major: 1, minor: 7 }].into());
        let nothing = devices.share(&[]).unwrap();
        assert_eq!((nothing.paths.len(), nothing.env.len(), nothing.kept_from.len()), (0, 0, 3));
        assert_eq!(Devices::default().share(&[]).unwrap(), Share::default());
    }

    #[test]
    fn a_device_that_is_gone_is_named() {
        let devices = Devices::new(vec![group("acme", &[("a", "/nonexistent/acme0")])]);
        assert!(devices.share(&[given("acme", "z")]).unwrap_err().contains("acme/gpu-x/m z"));
        assert!(devices.share(&[given("acme", "a")]).unwrap_err().contains("/nonexistent/acme0"));
        assert_eq!(devices.share(&[]).unwrap().kept_from.len(), 1, "the one that is there");
    }
}
