//! What the whole host uses.

use std::io;
use std::path::{Path, PathBuf};

use optimus_common::Figures;
use procfs::FromRead;

use super::files::{Kept, some_total};

/// Bytes of a sector in `/proc/diskstats`, whatever the device.
const SECTOR: u64 = 512;

/// Reads the host again and again.
#[derive(Debug)]
pub struct HostSampler {
    stat: Option<Kept>,
    memory: Option<Kept>,
    load: Option<Kept>,
    net: Option<Kept>,
    disks: Option<Kept>,
    pressure: [Option<Kept>; 3],
    /// The file system of this path counts as the host's disk.
    data: PathBuf,
}

impl HostSampler {
    pub fn open(data: &Path) -> HostSampler {
        let proc = |name: &str| Kept::open(&Path::new("/proc").join(name));
        HostSampler {
            stat: proc("stat"),
            memory: proc("meminfo"),
            load: proc("loadavg"),
            net: proc("net/dev"),
            disks: proc("diskstats"),
            pressure: [proc("pressure/cpu"), proc("pressure/memory"), proc("pressure/io")],
            data: data.to_owned(),
        }
    }

    /// What can be read; a figure that cannot be read is left out.
    pub fn read(&self, buffer: &mut Vec<u8>) -> Figures {
        let mut figures = Figures::default();
        if let Some(text) = text(&self.stat, buffer) {
            figures.cpu_usec = busy_usec(text);
        }
        if let Some(memory) = text(&self.memory, buffer).and_then(|t| procfs::Meminfo::from_read(t.as_bytes()).ok()) {
            figures.memory = Some(memory.mem_total.saturating_sub(memory.mem_free));
            let left = memory.mem_available.unwrap_or(memory.mem_free);
            // So that "working" is what is not available.
            figures.inactive_file = Some(left.saturating_sub(memory.mem_free));
        }
        if let Some(load) = text(&self.load, buffer).and_then(|t| procfs::LoadAverage::from_read(t.as_bytes()).ok()) {
            figures.load = Some((load.one.max(0.0) * 100.0).round() as u64);
            figures.pids = Some(u64::from(load.max));
        }
        if let Some(text) = text(&self.net, buffer) {
            let (receive, transmit) = net_totals(text);
            (figures.net_receive, figures.net_transmit) = (Some(receive), Some(transmit));
        }
        if let Some(text) = text(&self.disks, buffer) {
            let (read, write) = disk_totals(text);
            (figures.io_read, figures.io_write) = (Some(read), Some(write));
        }
        for (file, value) in self.pressure.iter().zip([&mut figures.pressure_cpu, &mut figures.pressure_memory, &mut figures.pressure_io]) {
            *value = text(file, buffer).and_then(some_total);
        }
        if let Ok(disk) = rustix::fs::statvfs(&self.data) {
            figures.disk = Some(disk.f_blocks.saturating_sub(disk.f_bfree).saturating_mul(disk.f_frsize));
            figures.disk_free = Some(disk.f_bavail.saturating_mul(disk.f_frsize));
        }
        figures
    }
}

fn text<'b>(file: &Option<Kept>, buffer: &'b mut Vec<u8>) -> Option<&'b str> {
    let read: io::Result<&str> = file.as_ref()?.read(buffer);
    read.inspect_err(|error| tracing::debug!(%error, "failed to read a file of /proc")).ok()
}

/// Time of all cores that was neither idle nor waited for a disk. The first line alone: the others are one a core.
fn busy_usec(text: &str) -> Option<u64> {
    let ticks: Vec<u64> = text.lines().next()?.strip_prefix("cpu ")?.split_ascii_whitespace().map_while(|n| n.parse().ok()).collect();
    let [user, nice, system, _idle, _waiting, irq, softirq, rest @ ..] = ticks.as_slice() else { return None };
    let stolen = rest.first().copied().unwrap_or(0);
    let busy = user + nice + system + irq + softirq + stolen;
    Some(busy.saturating_mul(1_000_000 / procfs::ticks_per_second().max(1)))
}

/// Bytes received and sent by all interfaces but loopback and those that carry others' traffic once more.
fn net_totals(text: &str) -> (u64, u64) {
    let (mut receive, mut transmit) = (0u64, 0u64);
    for line in text.lines().skip(2) {
        let Some((name, numbers)) = line.split_once(':') else { continue };
        let name = name.trim();
        if name == "lo" || ["veth", "docker", "br-", "bond", "vlan", "ifb"].iter().any(|kind| name.starts_with(kind)) {
            continue;
        }
        let mut numbers = numbers.split_ascii_whitespace().map(|n| n.parse::<u64>().unwrap_or(0));
        receive = receive.saturating_add(numbers.next().unwrap_or(0));
        transmit = transmit.saturating_add(numbers.nth(7).unwrap_or(0));
    }
    (receive, transmit)
}

/// Bytes read and written by whole disks: partitions, loops and memory disks would count twice.
fn disk_totals(text: &str) -> (u64, u64) {
    let (mut read, mut write) = (0u64, 0u64);
    for line in text.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_major, _minor, name, _reads, _merged, sectors_read, _ms, _writes, _wmerged, sectors_written, ..] = words.as_slice() else {
            continue;
        };
        if !is_whole_disk(name) {
            continue;
        }
        read = read.saturating_add(sectors_read.parse::<u64>().unwrap_or(0).saturating_mul(SECTOR));
        write = write.saturating_add(sectors_written.parse::<u64>().unwrap_or(0).saturating_mul(SECTOR));
    }
    (read, write)
}

/// `sda`, `vda`, `nvme0n1`, `mmcblk0`; not `sda1`, `nvme0n1p2`, `loop0`, `dm-0`.
fn is_whole_disk(name: &str) -> bool {
    let letters_only = |rest: &str| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_lowercase());
    if let Some(rest) = ["sd", "vd", "xvd", "hd"].iter().find_map(|kind| name.strip_prefix(kind)) {
        return letters_only(rest);
    }
    (name.starts_with("nvme") || name.starts_with("mmcblk")) && !name.contains('p')
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_and_disks_count_once() {
        let net =
            "Inter-|   Receive\n face |bytes\n    lo: 9 0 0 0 0 0 0 0 9 0\n  eth0: 100 1 0 0 0 0 0 0 40 1\nveth1: 5 0 0 0 0 0 0 0 5 0\n";
        assert_eq!(net_totals(net), (100, 40));
        let disks = "8 0 sda 1 0 10 0 1 0 20 0 0 0 0\n8 1 sda1 1 0 10 0 1 0 20 0\n7 0 loop0 1 0 10 0 1 0 20 0\n259 0 nvme0n1 1 0 2 0 1 0 4 0\n259 1 nvme0n1p1 1 0 2 0 1 0 4 0\n";
        assert_eq!(disk_totals(disks), (12 * SECTOR, 24 * SECTOR));
    }

    #[test]
    fn this_host_says_what_it_uses() {
        let dir = tempfile::tempdir().unwrap();
        let sampler = HostSampler::open(dir.path());
        let mut buffer = Vec::new();
        let first = sampler.read(&mut buffer);
        for (name, value) in
            [("cpu", first.cpu_usec), ("memory", first.memory), ("disk", first.disk), ("load", first.load), ("net", first.net_receive)]
        {
            assert!(value.is_some(), "{name}");
        }
        let mut spin = 0u64;
        loop {
            spin = spin.wrapping_add(1);
            if spin.is_multiple_of(100_000) && sampler.read(&mut buffer).cpu_usec > first.cpu_usec {
                break; // a counter of ticks moves once a core has worked for one
            }
        }
    }
}
