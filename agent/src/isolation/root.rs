//! Our one directory in the tree of control groups. Nothing outside it is ever touched.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::detect::{CONTROLLERS, Detected, Hierarchy, Version, detect};
use super::group::Group;
use super::{Limits, SetLimitError};

/// Why control groups cannot be used here, in words for people.
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
pub struct OpenError {
    pub why: String,
}

/// The owner directory.
#[derive(Debug, Clone)]
pub struct CgroupRoot {
    hierarchy: Hierarchy,
    /// Relative to the mount points: `optimus`, or below a delegated unit.
    owner: PathBuf,
    missing: Vec<String>,
}

impl CgroupRoot {
    /// Finds the controllers and makes the owner directory.
    pub fn open(owner: &str) -> Result<CgroupRoot, OpenError> {
        let hierarchy = match detect() {
            Detected::Usable(hierarchy) => hierarchy,
            Detected::None { why } => return Err(OpenError { why }),
        };
        let wanted: &[&str] = match hierarchy.version {
            Version::V1 => &CONTROLLERS,
            Version::V2 => &["cpu", "memory", "pids"],
        };
        let missing: Vec<String> = wanted
            .iter()
            .filter(|c| !hierarchy.mounts.contains_key(**c))
            .map(|c| format!("{c}: this host has no `{c}` controller"))
            .collect();
        let root = CgroupRoot { owner: hierarchy.delegated.clone().unwrap_or_default().join(owner), hierarchy, missing };
        root.prepare().map_err(|error| OpenError { why: format!("failed to prepare {}: {error}", root.owner.display()) })?;
        Ok(root)
    }

    /// v2 hands controllers down only through groups without processes of their own: under a delegated unit the
    /// agent first moves itself into a leaf.
    fn prepare(&self) -> io::Result<()> {
        for dir in self.dirs() {
            fs::create_dir_all(&dir)?;
        }
        if self.hierarchy.version == Version::V2 {
            let mount = self.mount();
            if let Some(unit) = &self.hierarchy.delegated {
                let leaf = mount.join(unit).join("agent");
                fs::create_dir_all(&leaf)?;
                fs::write(leaf.join("cgroup.procs"), "0")?;
            }
            let mut at = mount.join(self.hierarchy.delegated.clone().unwrap_or_default());
            let below = self.owner.strip_prefix(self.hierarchy.delegated.clone().unwrap_or_default()).unwrap_or(&self.owner).to_owned();
            self.hand_down(&at)?;
            for part in &below {
                at.push(part);
                self.hand_down(&at)?;
            }
        }
        Ok(())
    }

    fn hand_down(&self, at: &Path) -> io::Result<()> {
        for controller in ["cpu", "memory", "pids"] {
            if self.hierarchy.mounts.contains_key(controller) {
                fs::write(at.join("cgroup.subtree_control"), format!("+{controller}"))?;
            }
        }
        Ok(())
    }

    fn mount(&self) -> PathBuf {
        self.hierarchy.mounts.values().next().cloned().unwrap_or_default()
    }

    /// The owner directory in each tree (one on v2).
    fn dirs(&self) -> BTreeSet<PathBuf> {
        self.hierarchy.mounts.values().map(|m| m.join(&self.owner)).collect()
    }

    /// `v1`, `v2` or `hybrid`.
    pub fn name(&self) -> &'static str {
        match (self.hierarchy.version, self.hierarchy.hybrid) {
            (Version::V2, _) => "v2",
            (Version::V1, true) => "hybrid",
            (Version::V1, false) => "v1",
        }
    }

    /// Limits that cannot be enforced here, each with why.
    pub fn missing(&self) -> &[String] {
        &self.missing
    }

    /// Makes a group with these limits, all of them read back. On an error nothing is left.
    pub fn create(&self, name: &str, limits: &Limits) -> Result<Group, SetLimitError> {
        let group = Group::create(&self.hierarchy, &self.owner.join(name))?;
        match group.resize(limits) {
            Ok(()) => Ok(group),
            Err(error) => {
                let _ = group.delete();
                Err(error)
            }
        }
    }

    /// A group made before, perhaps by an earlier agent.
    pub fn open_group(&self, name: &str) -> Option<Group> {
        let group = Group::load(&self.hierarchy, &self.owner.join(name));
        group.exists().then_some(group)
    }

    /// Kills and removes every group of ours that is not in `keep`; gives the names of those that are gone.
    pub fn sweep(&self, keep: &BTreeSet<String>) -> Vec<String> {
        let mut names = BTreeSet::new();
        for dir in self.dirs() {
            let Ok(entries) = fs::read_dir(&dir) else { continue };
            names.extend(entries.flatten().filter(|e| e.path().is_dir()).filter_map(|e| e.file_name().into_string().ok()));
        }
        names.retain(|name| !keep.contains(name));
        let removed = |name: &String| {
            let group = Group::load(&self.hierarchy, &self.owner.join(name));
            group.kill_all();
            let deleted = group.delete();
            if let Err(error) = &deleted {
                tracing::warn!(group = %name, %error, "leaked cgroup could not be removed");
            }
            deleted.is_ok()
        };
        names.into_iter().filter(removed).collect()
    }

    /// Removes the owner directory; fails while groups are left in it.
    pub fn remove(self) -> io::Result<()> {
        for dir in self.dirs() {
            match fs::remove_dir(&dir) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }
}

/// The group a process is in, wherever it is: to read and to kill, not to set. Unset if there is none but the root.
pub fn group_of(pid: u32) -> Option<Group> {
    let Detected::Usable(hierarchy) = detect() else { return None };
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    // `ID:CONTROLLERS:/PATH`; of v1, memory's stands for all.
    let path = text.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let wanted = match hierarchy.version {
            Version::V1 => controllers.split(',').any(|c| c == "memory"),
            Version::V2 => controllers.is_empty(),
        };
        wanted.then(|| path.trim_start_matches('/').to_owned())
    })?;
    let group = Group::load(&hierarchy, Path::new(&path));
    (!path.is_empty() && group.exists()).then_some(group)
}
