//! What this node says of itself.

use std::collections::BTreeMap;

use optimus_common::protocol::NodeFacts;
use optimus_common::units::{Bytes, Millicores};
use procfs::Current;

use crate::driver::Fingerprint;

/// What the agent's configuration says of the node.
#[derive(Debug, Clone, PartialEq)]
pub struct Stated {
    /// Unset: the host's name.
    pub name: Option<String>,
    pub address: String,
    pub ports: (u16, u16),
    pub labels: BTreeMap<String, String>,
}

/// Reads the facts of this host. What cannot be read is left empty and logged: a node with odd facts is better than none.
pub fn gather(stated: &Stated, cgroup: &str, drivers: &[Fingerprint]) -> NodeFacts {
    let Stated { name, address, ports, labels } = stated;
    let host = rustix::system::uname();
    let unenforced = drivers.iter().flat_map(|d| d.unenforced.iter().cloned()).collect();
    NodeFacts {
        name: name.clone().unwrap_or_else(|| host.nodename().to_string_lossy().into_owned()),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        cpu: cores(),
        memory: memory(),
        arch: host.machine().to_string_lossy().into_owned(),
        kernel: host.release().to_string_lossy().into_owned(),
        cgroup: cgroup.to_owned(),
        unenforced,
        drivers: drivers.iter().filter(|d| d.usable).map(|d| d.name.to_owned()).collect(),
        ports: *ports,
        address: address.clone(),
        boot_id: boot_id(),
        labels: labels.clone(),
    }
}

/// Changes at each boot of the host; empty if it cannot be read, which equals no recorded one.
pub fn boot_id() -> String {
    match procfs::sys::kernel::random::boot_id() {
        Ok(id) => id.trim().to_owned(),
        Err(error) => {
            tracing::warn!(%error, "failed to read the boot id");
            String::new()
        }
    }
}

fn cores() -> Millicores {
    // Not those of the machine but those this process may use: an agent in a container has fewer.
    match std::thread::available_parallelism() {
        Ok(cores) => Millicores(u32::try_from(cores.get()).unwrap_or(u32::MAX / 1000).saturating_mul(1000)),
        Err(error) => {
            let cpus = procfs::CpuInfo::current().map(|c| c.num_cores()).unwrap_or(1);
            tracing::warn!(%error, cpus, "failed to ask how many cores may be used");
            Millicores(u32::try_from(cpus).unwrap_or(1).saturating_mul(1000))
        }
    }
}

fn memory() -> Bytes {
    match procfs::Meminfo::current() {
        Ok(info) => Bytes(info.mem_total),
        Err(error) => {
            tracing::warn!(%error, "failed to read the size of memory");
            Bytes(0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_has_cores_memory_and_a_boot() {
        let stated = Stated { name: None, address: "10.0.0.7".into(), ports: (20_000, 29_999), labels: BTreeMap::new() };
        let driver = Fingerprint { name: "process", usable: true, unenforced: vec!["cpu: no controller".into()] };
        let facts = gather(&stated, "v1", &[driver, Fingerprint { name: "container", usable: false, unenforced: vec![] }]);
        assert!(facts.cpu.0 >= 1000 && facts.memory.0 > 1 << 20);
        assert!(!facts.name.is_empty() && !facts.kernel.is_empty() && facts.boot_id.len() == 36);
        assert_eq!((facts.drivers, facts.unenforced), (vec!["process".to_owned()], vec!["cpu: no controller".to_owned()]));
    }
}
