//! One group: its limits, its processes, what it has used.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cgroups_rs::fs::cgroup::Cgroup;
use cgroups_rs::fs::cpu::CpuController;
use cgroups_rs::fs::memory::MemController;
use cgroups_rs::fs::pid::PidController;
use cgroups_rs::fs::{Hierarchy as CrateHierarchy, MaxValue, hierarchies};

use super::detect::{CONTROLLERS, DEVICES, Hierarchy, Version};
use super::devices::{self, DeviceNode};
use super::{Limits, SetLimitError, Usage};
use crate::metrics::group::GroupFiles;

/// CFS period. Short enough that a throttled request waits less than a blink.
const PERIOD_USEC: u64 = 100_000;
/// The kernel's smallest quota.
const QUOTA_MIN_USEC: u64 = 1000;
/// Tries and pause while a killed group empties; an uninterruptible process may outlast them.
const TRIES: u32 = 400;
const PAUSE: Duration = Duration::from_millis(5);
/// Tries and pause while a v1 group freezes; one with a process in an uninterruptible wait never does.
const FREEZE_TRIES: u32 = 50;
const FREEZE_PAUSE: Duration = Duration::from_micros(200);
/// Most directories of one group looked at.
const TREE_MAX: usize = 4096;

#[derive(Debug)]
pub struct Group {
    version: Version,
    /// Directory of the group by controller (all the same on v2).
    dirs: BTreeMap<String, PathBuf>,
    cgroup: Cgroup,
}

impl Group {
    /// A handle; the group need not exist.
    pub(super) fn load(hierarchy: &Hierarchy, path: &Path) -> Group {
        let (kind, controllers): (Box<dyn CrateHierarchy>, Vec<&str>) = match hierarchy.version {
            Version::V1 => (Box::new(hierarchies::V1::new()), [&CONTROLLERS[..], &[DEVICES]].concat()),
            Version::V2 => (Box::new(hierarchies::V2::new()), vec!["cpu", "memory", "pids"]),
        };
        let controllers = controllers.into_iter().filter(|c| hierarchy.mounts.contains_key(*c)).map(str::to_owned).collect();
        Group {
            version: hierarchy.version,
            dirs: hierarchy.mounts.iter().map(|(c, mount)| (c.clone(), mount.join(path))).collect(),
            cgroup: Cgroup::load_with_specified_controllers(kind, path, controllers),
        }
    }

    pub(super) fn create(hierarchy: &Hierarchy, path: &Path) -> Result<Group, SetLimitError> {
        let group = Group::load(hierarchy, path);
        let failed = |dir: &Path, source: io::Error| SetLimitError::Create { path: dir.to_owned(), source };
        let made = group.cgroup.create().map_err(|e| failed(group.dir(), io::Error::other(e)));
        // The crate ignores errors on the way: look for ourselves.
        let made = made.and_then(|()| match group.dirs.values().find(|d| !d.is_dir()) {
            Some(dir) => Err(failed(dir, io::ErrorKind::NotFound.into())),
            None => Ok(()),
        });
        if made.is_err() {
            let _ = group.delete(); // on v1, some of its directories may be there
        }
        made.map(|()| group)
    }

    pub(super) fn exists(&self) -> bool {
        self.dirs.values().any(|d| d.is_dir())
    }

    /// Its path below the mount points.
    pub fn path(&self) -> &str {
        self.cgroup.path()
    }

    fn dir(&self) -> &Path {
        self.dirs.values().next().map_or(Path::new(""), PathBuf::as_path)
    }

    fn file(&self, controller: &str, v1: &str, v2: &str) -> Option<PathBuf> {
        let dir = self.dirs.get(controller)?;
        Some(dir.join(if self.version == Version::V1 { v1 } else { v2 }))
    }

    fn existing(&self, controller: &str, v1: &str, v2: &str) -> Option<PathBuf> {
        self.file(controller, v1, v2).filter(|p| p.exists())
    }

    fn need(&self, controller: &'static str, v1: &str, v2: &str) -> Result<PathBuf, SetLimitError> {
        self.existing(controller, v1, v2).ok_or(SetLimitError::ControllerMissing { controller })
    }

    // ---- for the runner ----

    /// The `cgroup.procs` files a process writes itself into, one on v2.
    pub fn procs_files(&self) -> Vec<PathBuf> {
        let mut dirs: Vec<&PathBuf> = self.dirs.values().collect();
        dirs.sort();
        dirs.dedup();
        dirs.into_iter().map(|d| d.join("cgroup.procs")).collect()
    }
    /// v2: kills the whole group when `1` is written.
    pub fn kill_file(&self) -> Option<PathBuf> {
        if self.version == Version::V1 { None } else { Some(self.dir().join("cgroup.kill")).filter(|p| p.exists()) }
    }
    /// v1: the freezer's state file.
    pub fn freezer_file(&self) -> Option<PathBuf> {
        if self.version == Version::V1 { self.existing("freezer", "freezer.state", "") } else { None }
    }
    /// Holds an `oom_kill N` line.
    pub fn oom_file(&self) -> Option<PathBuf> {
        self.existing("memory", "memory.oom_control", "memory.events")
    }
    pub fn peak_file(&self) -> Option<PathBuf> {
        self.existing("memory", "memory.max_usage_in_bytes", "memory.peak")
    }

    /// Where its use of resources can be read, again and again.
    pub fn files(&self) -> GroupFiles {
        let v1_only = |controller, v1| if self.version == Version::V1 { self.existing(controller, v1, "") } else { None };
        let v2_only = |controller, v2| if self.version == Version::V2 { self.existing(controller, "", v2) } else { None };
        GroupFiles {
            cpuacct: v1_only("cpuacct", "cpuacct.usage"),
            cpu_stat: self.existing("cpu", "cpu.stat", "cpu.stat"),
            memory: self.existing("memory", "memory.usage_in_bytes", "memory.current"),
            memory_stat: self.existing("memory", "memory.stat", "memory.stat"),
            memory_peak: self.peak_file(),
            oom: self.oom_file(),
            pids: self.existing("pids", "pids.current", "pids.current"),
            procs: self.procs_files().into_iter().next().filter(|p| p.exists()),
            io: v2_only("cpu", "io.stat"),
            pressure_cpu: v2_only("cpu", "cpu.pressure"),
            pressure_memory: v2_only("memory", "memory.pressure"),
            pressure_io: v2_only("cpu", "io.pressure"),
        }
    }

    // ---- devices ----

    /// Keeps the processes of the group, which is empty yet, from opening these device files. Others are as they were.
    pub fn deny(&self, nodes: &[DeviceNode]) -> Result<(), SetLimitError> {
        if nodes.is_empty() {
            return Ok(());
        }
        if self.version == Version::V2 {
            return devices::attach(self.dir(), nodes).map_err(|error| not_written(self.dir(), "a device program", error));
        }
        let path = self.need(DEVICES, "devices.deny", "")?;
        nodes.iter().try_for_each(|node| write(&path, &format!("{node} rwm")))
    }

    // ---- limits ----

    /// Sets limits, also on a group that runs. Each is read back. On an error those of before are in force.
    pub fn resize(&self, limits: &Limits) -> Result<(), SetLimitError> {
        let before = self.read_back();
        self.set(limits).inspect_err(|_| {
            if let Err(error) = self.set(&before) {
                tracing::warn!(%error, "a limit of before could not be set again");
            }
        })
    }

    fn set(&self, limits: &Limits) -> Result<(), SetLimitError> {
        if let Some(limit) = limits.memory_limit {
            self.set_memory(limit, limits.memory_request)?;
        }
        if let Some(millicores) = limits.cpu_millicores {
            self.set_cpu(millicores)?;
        }
        if let Some(pids) = limits.pids {
            let path = self.need("pids", "pids.max", "pids.max")?;
            let controller: &PidController = self.cgroup.controller_of().ok_or(SetLimitError::ControllerMissing { controller: "pids" })?;
            let written = controller.set_pid_max(MaxValue::Value(i64::from(pids)));
            confirm(&path, &pids.to_string(), written)?;
        }
        Ok(())
    }

    fn set_memory(&self, limit: u64, request: Option<u64>) -> Result<(), SetLimitError> {
        let missing = SetLimitError::ControllerMissing { controller: "memory" };
        let path = self.need("memory", "memory.limit_in_bytes", "memory.max")?;
        let controller: &MemController = self.cgroup.controller_of().ok_or(missing)?;
        // The kernel counts pages: what is read back is the limit rounded down to one.
        let wanted = limit & !4095;
        let text = wanted.to_string();
        // What the kernel takes is signed, and -1 means no limit: too much must not become that.
        let bytes = i64::try_from(wanted).map_err(|_| not_written(&path, &text, io::ErrorKind::InvalidInput.into()))?;
        if self.version == Version::V1 {
            // The limit of memory and swap together can never be below that of memory: order them by direction.
            let swap = self.existing("memory", "memory.memsw.limit_in_bytes", "");
            let lowering = number(&path).is_some_and(|now| wanted < now);
            if lowering || swap.is_none() {
                confirm(&path, &text, controller.set_limit(bytes))?;
            }
            if let Some(swap) = swap {
                confirm(&swap, &text, controller.set_memswap_limit(bytes))?;
                confirm(&path, &text, controller.set_limit(bytes))?;
            }
        } else {
            self.reclaim_to(&path, wanted)?;
            confirm(&path, &text, controller.set_limit(bytes))?;
            if let Some(swap) = self.existing("memory", "", "memory.swap.max") {
                confirm(&swap, "0", controller.set_memswap_limit(0))?;
            }
            // Half a workload is no workload: the kernel kills all of it together.
            write(&self.need("memory", "", "memory.oom.group")?, "1")?;
        }
        if let Some(request) = request {
            let path = self.need("memory", "memory.soft_limit_in_bytes", "memory.low")?;
            let wanted = request.min(limit) & !4095;
            confirm(&path, &wanted.to_string(), controller.set_soft_limit(wanted as i64))?; // at most `bytes`
        }
        Ok(())
    }

    /// v2: where v1 refuses a limit below what is in use, v2 kills to reach it. A resize must not: what can be given
    /// back is taken first, and if that is not enough the limit is refused.
    fn reclaim_to(&self, max: &Path, wanted: u64) -> Result<(), SetLimitError> {
        let current = self.dir().join("memory.current");
        let used = || number(&current).filter(|&used| used > wanted);
        if used().is_none() {
            return Ok(());
        }
        let high = self.need("memory", "", "memory.high")?;
        let squeezed = write(&high, &wanted.to_string());
        let left = used();
        write(&high, "max")?;
        squeezed?;
        match left {
            Some(used) => Err(SetLimitError::InUse { path: max.to_owned(), wanted, used }),
            None => Ok(()),
        }
    }

    fn set_cpu(&self, millicores: u32) -> Result<(), SetLimitError> {
        let missing = || SetLimitError::ControllerMissing { controller: "cpu" };
        let controller: &CpuController = self.cgroup.controller_of().ok_or_else(missing)?;
        let quota = (u64::from(millicores) * PERIOD_USEC / 1000).max(QUOTA_MIN_USEC);
        let written = controller.set_cfs_quota_and_period(Some(quota as i64), Some(PERIOD_USEC));
        if self.version == Version::V1 {
            let path = self.need("cpu", "cpu.cfs_quota_us", "")?;
            confirm(&path, &quota.to_string(), written)?;
            let shares = self.need("cpu", "cpu.shares", "")?;
            let wanted = (u64::from(millicores) * 1024 / 1000).clamp(2, 262_144);
            confirm(&shares, &wanted.to_string(), controller.set_shares(wanted))
        } else {
            let path = self.need("cpu", "", "cpu.max")?;
            confirm(&path, &format!("{quota} {PERIOD_USEC}"), written)?;
            // One core weighs the default of 100.
            write(&self.need("cpu", "", "cpu.weight")?, &(u64::from(millicores) / 10).clamp(1, 10_000).to_string())
        }
    }

    /// The limits as the kernel holds them; unset where it holds none. v1 gives no memory limit as one beyond any memory.
    pub fn read_back(&self) -> Limits {
        let read = |path: Option<PathBuf>| path.and_then(|p| number(&p));
        let cpu = match self.version {
            Version::V1 => read(self.file("cpu", "cpu.cfs_quota_us", "")).map(|q| (q, PERIOD_USEC)),
            Version::V2 => self.file("cpu", "", "cpu.max").and_then(|p| fs::read_to_string(p).ok()).and_then(|text| {
                let (quota, period) = text.trim().split_once(' ')?;
                Some((quota.parse().ok()?, period.parse().ok()?))
            }),
        };
        Limits {
            cpu_millicores: cpu.map(|(quota, period)| (quota * 1000 / period.max(1)) as u32),
            memory_limit: read(self.file("memory", "memory.limit_in_bytes", "memory.max")),
            memory_request: read(self.file("memory", "memory.soft_limit_in_bytes", "memory.low")),
            pids: read(self.file("pids", "pids.max", "pids.max")).and_then(|n| u32::try_from(n).ok()),
        }
    }

    // ---- use ----

    pub fn usage(&self) -> io::Result<Usage> {
        if !self.exists() {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("cgroup {} is gone", self.dir().display())));
        }
        let read = |path: Option<PathBuf>| path.and_then(|p| number(&p)).unwrap_or(0);
        let stat = self.file("cpu", "cpu.stat", "cpu.stat").and_then(|p| fs::read_to_string(p).ok()).unwrap_or_default();
        let field = |name: &str| field(&stat, name).unwrap_or(0);
        let (cpu_usec, throttled_usec) = match self.version {
            Version::V1 => (read(self.file("cpuacct", "cpuacct.usage", "")) / 1000, field("throttled_time") / 1000),
            Version::V2 => (field("usage_usec"), field("throttled_usec")),
        };
        let oom = self.oom_file().and_then(|p| fs::read_to_string(p).ok()).unwrap_or_default();
        Ok(Usage {
            cpu_usec,
            throttled_usec,
            throttled: field("nr_throttled"),
            memory_current: read(self.file("memory", "memory.usage_in_bytes", "memory.current")),
            memory_peak: read(self.peak_file()),
            oom_kills: optimus_runner::oom_kills(&oom),
            pids: read(self.file("pids", "pids.current", "pids.current")),
        })
    }

    /// Processes of the group and of groups a workload with the right to do so has made below it.
    pub fn pids(&self) -> Vec<u32> {
        let mut pids = Vec::new();
        for dir in self.tree() {
            let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|l| l.parse::<u32>().ok()));
        }
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// Every directory of the group, parents before children.
    fn tree(&self) -> Vec<PathBuf> {
        let mut dirs: Vec<PathBuf> = self.dirs.values().cloned().collect();
        dirs.sort();
        dirs.dedup();
        let mut next = 0;
        while next < dirs.len() && dirs.len() < TREE_MAX {
            let below = fs::read_dir(&dirs[next]).into_iter().flatten().flatten();
            dirs.extend(below.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
            next += 1;
        }
        dirs
    }

    /// Kills every process of the group and waits until it is empty; false if some would not die.
    pub fn kill_all(&self) -> bool {
        for _ in 0..TRIES {
            let pids = self.pids();
            if pids.is_empty() {
                return true;
            }
            // v2's own way cannot be outrun by forks, but misses a process whose first thread has left: those are
            // killed by number.
            let killed = self.kill_file().is_some_and(|kill| fs::write(kill, "1").is_ok());
            // Frozen, they cannot fork away from under us; the signal takes effect when they thaw.
            if !killed {
                self.freeze(true);
                self.wait_frozen();
            }
            for pid in self.pids() {
                if let Some(pid) = rustix::process::Pid::from_raw(pid as i32) {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
            }
            if !killed {
                self.freeze(false);
            }
            std::thread::sleep(PAUSE);
        }
        self.pids().is_empty()
    }

    /// Stops or lets go all processes of the group. Best effort: they may take a moment.
    pub fn freeze(&self, frozen: bool) {
        let (path, value) = match self.version {
            Version::V1 => (self.freezer_file(), if frozen { "FROZEN" } else { "THAWED" }),
            Version::V2 => (Some(self.dir().join("cgroup.freeze")), if frozen { "1" } else { "0" }),
        };
        if let Some(path) = path {
            let _ = fs::write(path, value);
        }
    }

    /// Waits a little until v1 has stopped them all: one that is not yet stopped may fork.
    fn wait_frozen(&self) {
        let Some(state) = self.freezer_file() else { return };
        for _ in 0..FREEZE_TRIES {
            if fs::read_to_string(&state).is_ok_and(|s| s.trim() == "FROZEN") {
                return;
            }
            std::thread::sleep(FREEZE_PAUSE);
        }
    }

    /// Removes the group. Its processes must have been killed; the kernel may take a moment to let go of them.
    pub fn delete(&self) -> io::Result<()> {
        for dir in self.tree().iter().rev() {
            let mut tries = 0;
            loop {
                match fs::remove_dir(dir) {
                    Ok(()) => break,
                    Err(e) if e.kind() == io::ErrorKind::NotFound => break,
                    Err(e) if tries >= TRIES || e.raw_os_error() != Some(libc::EBUSY) => return Err(e),
                    Err(_) => {
                        tries += 1;
                        std::thread::sleep(PAUSE);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Compares a limit with what the kernel now says. `written` is what the crate reports, for the cause.
fn confirm(path: &Path, wanted: &str, written: cgroups_rs::fs::error::Result<()>) -> Result<(), SetLimitError> {
    if let Err(error) = written {
        return Err(not_written(path, wanted, io::Error::other(error)));
    }
    let actual = actual(path);
    if actual == wanted {
        return Ok(());
    }
    Err(SetLimitError::NotTaken { path: path.to_owned(), wanted: wanted.to_owned(), actual })
}

fn write(path: &Path, value: &str) -> Result<(), SetLimitError> {
    fs::write(path, value).map_err(|source| not_written(path, value, source))
}

fn not_written(path: &Path, wanted: &str, source: io::Error) -> SetLimitError {
    SetLimitError::Write { path: path.to_owned(), wanted: wanted.to_owned(), actual: actual(path), source }
}

fn actual(path: &Path) -> String {
    fs::read_to_string(path).map_or_else(|e| format!("unreadable ({e})"), |text| text.trim().to_owned())
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The number behind a name in a `name number` file.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}
