//! All processes of a run: killing every one of them, and what the kernel counted of their memory.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use optimus_runner::StartFile;

use crate::sys;

/// Rounds of killing before we give up; each waits [`ROUND`]. A process in an uninterruptible wait may outlast them.
const ROUNDS: u32 = 400;
const ROUND: Duration = Duration::from_millis(5);

/// Looks at a v1 freezer, and the pause between, until all stand still; one in an uninterruptible wait never does.
const FREEZE_LOOKS: u32 = 50;
const FREEZE_PAUSE: Duration = Duration::from_micros(200);
/// Most directories of one group looked at.
const TREE_MAX: usize = 4096;

pub struct Group {
    kill: Option<PathBuf>,
    freezer: Option<PathBuf>,
    /// Directories of the group: several on v1, none without cgroups.
    dirs: Vec<PathBuf>,
    oom: Option<PathBuf>,
    peak: Option<PathBuf>,
}

impl Group {
    pub fn of(start: &StartFile) -> Self {
        Group {
            kill: start.cgroup_kill.clone(),
            freezer: start.cgroup_freezer.clone(),
            dirs: start.cgroup_procs.iter().filter_map(|p| Some(p.parent()?.to_owned())).collect(),
            oom: start.oom_file.clone(),
            peak: start.peak_file.clone(),
        }
    }

    /// Kills the main process and everything it started, detached or not, and waits until they are gone. The dead are
    /// left for the caller to reap, who wants the status of one of them.
    pub fn kill_all(&self) {
        // Twice nobody: a process whose parent dies between two looks of one round is found in the next.
        let mut empty = 0;
        for _ in 0..ROUNDS {
            if self.kill_round() == 0 {
                empty += 1;
                if empty == 2 {
                    return;
                }
                // The kernel's lists of children skip some while others of them end.
                sys::pause(FREEZE_PAUSE);
            } else {
                empty = 0;
                sys::pause(ROUND);
            }
        }
    }

    /// Gives how many were there to kill.
    fn kill_round(&self) -> usize {
        // v2's own way cannot be outrun by forks, but misses a process whose first thread has left: those are killed
        // by number. v1: frozen processes cannot fork away from under us; the signal takes effect when they thaw.
        if let Some(kill) = &self.kill {
            let _ = fs::write(kill, "1");
        }
        self.freeze();
        let pids = self.pids();
        for &pid in &pids {
            sys::kill(pid as i32, libc::SIGKILL);
        }
        if let Some(freezer) = &self.freezer {
            let _ = fs::write(freezer, "THAWED");
        }
        pids.len()
    }

    fn freeze(&self) {
        let Some(freezer) = &self.freezer else { return };
        if fs::write(freezer, "FROZEN").is_err() {
            return;
        }
        for _ in 0..FREEZE_LOOKS {
            if fs::read_to_string(freezer).is_ok_and(|s| s.trim() == "FROZEN") {
                return;
            }
            sys::pause(FREEZE_PAUSE);
        }
    }

    /// Who is left to kill. The members of the cgroup and of groups made below it, and our descendants: as subreaper
    /// every orphan of the run comes to us. Either finds who the other misses: a descendant that was moved out of the
    /// group by somebody, a member that was moved into it.
    fn pids(&self) -> Vec<u32> {
        let mut found = self.members();
        found.extend(descendants());
        found.sort_unstable();
        found.dedup();
        found
    }

    fn members(&self) -> Vec<u32> {
        let mut dirs = self.dirs.clone();
        let mut found = Vec::new();
        let mut next = 0;
        while next < dirs.len() {
            let dir = dirs[next].clone();
            next += 1;
            let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            found.extend(text.lines().filter_map(|l| l.parse::<u32>().ok()).filter(|&pid| pid != 0 && pid != std::process::id()));
            if dirs.len() < TREE_MAX {
                let below = fs::read_dir(&dir).into_iter().flatten().flatten();
                dirs.extend(below.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
            }
        }
        found
    }

    /// How many processes of the group the kernel has killed for want of memory, ever.
    pub fn oom_kills(&self) -> u64 {
        let text = self.oom.as_ref().and_then(|p| fs::read_to_string(p).ok()).unwrap_or_default();
        optimus_runner::oom_kills(&text)
    }

    /// Most memory the group ever held, in bytes.
    pub fn peak(&self) -> Option<u64> {
        fs::read_to_string(self.peak.as_ref()?).ok()?.trim().parse().ok()
    }
}

/// Our children, theirs, and so on, without those that have ended.
fn descendants() -> Vec<u32> {
    let mut found = Vec::new();
    let mut queue = vec![std::process::id()];
    while let Some(pid) = queue.pop() {
        // Each thread has children of its own.
        for thread in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let text = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            for child in text.split_ascii_whitespace().filter_map(|w| w.parse::<u32>().ok()) {
                if is_alive(child) {
                    found.push(child);
                }
                queue.push(child);
            }
        }
    }
    found
}

/// A process whose first thread has left looks like a zombie; it is alive while it has another.
fn is_alive(pid: u32) -> bool {
    match optimus_runner::start_time(pid) {
        None => false,
        Some((_, 'Z' | 'X')) => fs::read_dir(format!("/proc/{pid}/task")).is_ok_and(|threads| threads.count() > 1),
        Some(_) => true,
    }
}
