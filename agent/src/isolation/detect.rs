//! Which control groups this host has, and whether we may use them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// v1: decides which device files may be opened. Not a limit: a host without it runs what asks for no device.
pub(super) const DEVICES: &str = "devices";

/// Controllers a run's limits need, by their v1 names.
pub(super) const CONTROLLERS: [&str; 5] = ["cpu", "cpuacct", "memory", "pids", "freezer"];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    V1,
    V2,
}

/// Where the controllers are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    pub version: Version,
    /// v1 controllers beside a v2 mount without them.
    pub hybrid: bool,
    /// v1: mount point by controller. v2: the one mount point under every controller it offers.
    pub mounts: BTreeMap<String, PathBuf>,
    /// v2 under a delegated unit: the unit's directory, relative to the mount.
    pub delegated: Option<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Detected {
    Usable(Hierarchy),
    None { why: String },
}

/// Looks at this host.
pub fn detect() -> Detected {
    let Ok(mounts) = fs::read_to_string("/proc/self/mountinfo") else {
        return Detected::None { why: "/proc/self/mountinfo cannot be read".into() };
    };
    let Some(mut hierarchy) = from_mountinfo(&mounts) else {
        return Detected::None { why: "no cgroup file system is mounted".into() };
    };
    if hierarchy.version == Version::V2 {
        let Some(mount) = hierarchy.mounts.remove("") else { return Detected::None { why: "no cgroup2 mount".into() } };
        let own = fs::read_to_string("/proc/self/cgroup").ok().and_then(|t| own_v2_path(&t)).unwrap_or_default();
        let unit = mount.join(&own);
        hierarchy.delegated = (!own.as_os_str().is_empty() && is_delegated(&unit)).then_some(own);
        let at = if hierarchy.delegated.is_some() { &unit } else { &mount };
        let offered = fs::read_to_string(at.join("cgroup.controllers")).unwrap_or_default();
        hierarchy.mounts = offered.split_ascii_whitespace().map(|c| (c.to_owned(), mount.clone())).collect();
        if hierarchy.mounts.is_empty() {
            return Detected::None { why: format!("{} offers no controllers", at.display()) };
        }
        if !writable(at) {
            return Detected::None {
                why: format!("{} is not writable: run as root, or under a systemd unit with Delegate=yes", at.display()),
            };
        }
        return Detected::Usable(hierarchy);
    }
    if hierarchy.mounts.get(DEVICES).is_some_and(|mount| !writable(mount)) {
        hierarchy.mounts.remove(DEVICES);
    }
    match hierarchy.mounts.values().find(|m| !writable(m)) {
        Some(mount) => Detected::None { why: format!("{} is not writable: run as root", mount.display()) },
        None => Detected::Usable(hierarchy),
    }
}

/// The hierarchy that `/proc/self/mountinfo` shows. For v2, the mount point stands under the empty name.
fn from_mountinfo(text: &str) -> Option<Hierarchy> {
    let (mut v1, mut v2) = (BTreeMap::new(), None);
    for line in text.lines() {
        // `ID PARENT DEV ROOT POINT OPTIONS [TAGS...] - TYPE SOURCE SUPER_OPTIONS`
        let Some((mount, kind)) = line.split_once(" - ") else { continue };
        let Some(point) = mount.split(' ').nth(4) else { continue };
        let mut kind = kind.split(' ');
        match kind.next() {
            Some("cgroup2") => v2 = v2.or_else(|| Some(PathBuf::from(unescape(point)))),
            Some("cgroup") => {
                for option in kind.nth(1).unwrap_or_default().split(',') {
                    if CONTROLLERS.contains(&option) || option == DEVICES {
                        v1.entry(option.to_owned()).or_insert_with(|| PathBuf::from(unescape(point)));
                    }
                }
            }
            _ => {}
        }
    }
    match (v1.is_empty(), v2) {
        (false, v2) => Some(Hierarchy { version: Version::V1, hybrid: v2.is_some(), mounts: v1, delegated: None }),
        (true, Some(point)) => {
            Some(Hierarchy { version: Version::V2, hybrid: false, mounts: BTreeMap::from([(String::new(), point)]), delegated: None })
        }
        (true, None) => None,
    }
}

/// Undoes the octal escapes of mountinfo (`\040` is a space).
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        match rest.get(at + 1..at + 4).and_then(|code| u8::from_str_radix(code, 8).ok()) {
            Some(byte) => {
                out.push(byte as char);
                rest = &rest[at + 4..];
            }
            None => {
                out.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    out
}

/// Our own place in the v2 tree, from `/proc/self/cgroup`, without the leading slash.
fn own_v2_path(text: &str) -> Option<PathBuf> {
    text.lines().find_map(|l| l.strip_prefix("0::/")).map(PathBuf::from)
}

/// systemd marks what it hands over with an extended attribute.
fn is_delegated(unit: &Path) -> bool {
    let mut value = [0u8; 8];
    ["trusted.delegate", "user.delegate"]
        .iter()
        .any(|name| rustix::fs::getxattr(unit, *name, &mut value[..]).is_ok_and(|n| value[..n].starts_with(b"1")))
}

/// Whether a group could be made here: read-only mounts and missing rights both say no.
fn writable(dir: &Path) -> bool {
    rustix::fs::access(dir, rustix::fs::Access::WRITE_OK).is_ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn joined_controllers_and_a_hybrid_host_are_v1() {
        let text = "25 24 0:22 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755\n\
                    26 25 0:23 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                    30 25 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:10 - cgroup cgroup rw,cpu,cpuacct\n\
                    31 25 0:28 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                    32 25 0:29 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n";
        let found = from_mountinfo(text).unwrap();
        assert_eq!((found.version, found.hybrid), (Version::V1, true));
        assert_eq!(found.mounts["cpu"], PathBuf::from("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(found.mounts["cpuacct"], found.mounts["cpu"]);
        assert_eq!(found.mounts.len(), 3);
    }

    #[test]
    fn a_unified_host_is_v2() {
        let found = from_mountinfo("26 25 0:23 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n").unwrap();
        assert_eq!((found.version, found.hybrid), (Version::V2, false));
        assert_eq!(found.mounts[""], PathBuf::from("/sys/fs/cgroup"));
    }

    #[test]
    fn none_is_none_and_garbage_is_passed_over() {
        assert_eq!(from_mountinfo("1 2 0:1 / / rw - ext4 /dev/vda rw\n"), None);
        assert_eq!(from_mountinfo("- - -\n\n - cgroup\nx - cgroup2"), None);
        assert_eq!(unescape(r"/a\040b\\c\9"), r"/a b\\c\9");
    }

    #[test]
    fn own_place_is_read() {
        assert_eq!(own_v2_path("12:pids:/x\n0::/system.slice/optimus.service\n"), Some("system.slice/optimus.service".into()));
        assert_eq!(own_v2_path("0::/\n"), Some(PathBuf::new()));
        assert_eq!(own_v2_path("3:cpu:/x\n"), None);
    }
}
