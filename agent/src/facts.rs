//! What this node says of itself.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use optimus_common::protocol::{LOAD_STEP, NodeFacts};
use optimus_common::spec::placement::architecture;
use optimus_common::units::{Bytes, Millicores};
use procfs::Current;

use crate::driver::Fingerprint;
use crate::placing::Placing;

/// What the agent's configuration says of the node.
#[derive(Debug, Clone, PartialEq)]
pub struct Stated {
    /// Unset: the host's name.
    pub name: Option<String>,
    pub address: String,
    pub ports: (u16, u16),
    pub labels: BTreeMap<String, String>,
    /// Directory of the agent's data, on the disk that workloads use.
    pub data_dir: PathBuf,
    /// What the operator says of placement: pool, reserves, devices.
    pub placing: Placing,
}

/// Reads the facts of this host. What cannot be read is left empty and logged: a node with odd facts is better than none.
pub fn gather(stated: &Stated, cgroup: &str, drivers: &[Fingerprint]) -> NodeFacts {
    let Stated { name, address, ports, labels, data_dir, placing } = stated;
    let host = rustix::system::uname();
    let unenforced = drivers.iter().flat_map(|d| d.unenforced.iter().cloned()).collect();
    let (disk, disk_free) = disk(data_dir);
    let mut labels = labels.clone();
    labels.extend(placing.labels.clone());
    NodeFacts {
        attributes: attributes(&host, cgroup, drivers),
        pool: placing.pool.clone(),
        disk,
        disk_free,
        reserved: placing.reserved,
        devices: placing.devices.clone(),
        load: load(),
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
        labels,
    }
}

/// What rules of placement may look at, beside what every node has.
fn attributes(host: &rustix::system::Uname, cgroup: &str, drivers: &[Fingerprint]) -> BTreeMap<String, String> {
    let text = |value: &std::ffi::CStr| value.to_string_lossy().into_owned();
    let mut found = BTreeMap::from([
        ("kernel.name".to_owned(), text(host.sysname()).to_lowercase()),
        ("kernel.version".to_owned(), text(host.release())),
        ("cpu.arch".to_owned(), architecture(&text(host.machine())).to_owned()),
        ("cpu.cores".to_owned(), (cores().0 / 1000).to_string()),
        ("cgroup.version".to_owned(), cgroup.to_owned()),
        ("hostname".to_owned(), text(host.nodename())),
    ]);
    for driver in drivers.iter().filter(|d| d.usable) {
        found.insert(format!("driver.{}", driver.name), "1".to_owned());
    }
    match std::fs::read_to_string("/etc/os-release") {
        Ok(text) => found.extend(os_release(&text)),
        Err(error) => tracing::debug!(%error, "no /etc/os-release"),
    }
    found
}

/// `os.name` (`debian`) and `os.version` (`12`) of an os-release file.
fn os_release(text: &str) -> impl Iterator<Item = (String, String)> + '_ {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once('=')?;
        let name = match key {
            "ID" => "os.name",
            "VERSION_ID" => "os.version",
            _ => return None,
        };
        Some((name.to_owned(), value.trim_matches('"').chars().filter(|c| !c.is_control()).take(64).collect()))
    })
}

/// Size of the disk that holds the agent's data, and what is free of it for others than root.
fn disk(dir: &Path) -> (Bytes, Bytes) {
    match rustix::fs::statvfs(dir) {
        Ok(fs) => {
            // Free space changes all the time: in whole GiB the facts stay the same for longer.
            let free = fs.f_bavail.saturating_mul(fs.f_frsize);
            (Bytes(fs.f_blocks.saturating_mul(fs.f_frsize)), Bytes(free >> 30 << 30))
        }
        Err(error) => {
            tracing::warn!(%error, dir = %dir.display(), "failed to ask for the size of the disk");
            (Bytes(0), Bytes(0))
        }
    }
}

/// The last minute's load in thousandths of the cores, in steps.
fn load() -> u16 {
    let Ok(average) = procfs::LoadAverage::current() else { return 0 };
    let thousandths = f64::from(average.one) * 1_000_000.0 / f64::from(cores().0.max(1));
    (thousandths.clamp(0.0, 1000.0) as u16) / LOAD_STEP * LOAD_STEP
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
        let stated = Stated {
            name: None,
            address: "10.0.0.7".into(),
            ports: (20_000, 29_999),
            labels: BTreeMap::new(),
            data_dir: "/".into(),
            placing: Placing::default(),
        };
        let driver = Fingerprint { name: "process", usable: true, unenforced: vec!["cpu: no controller".into()] };
        let facts = gather(&stated, "v1", &[driver, Fingerprint { name: "container", usable: false, unenforced: vec![] }]);
        assert!(facts.cpu.0 >= 1000 && facts.memory.0 > 1 << 20);
        assert!(facts.disk.0 > 0 && facts.load.is_multiple_of(LOAD_STEP));
        assert_eq!(facts.attributes["kernel.name"], "linux");
        assert_eq!(
            (facts.attributes["kernel.version"].as_str(), facts.attributes["driver.process"].as_str()),
            (facts.kernel.as_str(), "1")
        );
        assert!(!facts.attributes.contains_key("driver.container"));
        let debian: Vec<_> = os_release("ID=debian\nVERSION_ID=\"12\"\nNAME=x\n").collect();
        assert_eq!(debian, [("os.name".to_owned(), "debian".to_owned()), ("os.version".to_owned(), "12".to_owned())]);
        assert!(!facts.name.is_empty() && !facts.kernel.is_empty() && facts.boot_id.len() == 36);
        assert_eq!((facts.drivers, facts.unenforced), (vec!["process".to_owned()], vec!["cpu: no controller".to_owned()]));
    }
}
