//! All processes of a run: killing every one of them, and what the kernel counted of their memory.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use optimus_runner::StartFile;

use crate::sys;

/// Rounds of killing before we give up; each waits [`ROUND`]. A process in an uninterruptible wait may outlast them.
const ROUNDS: u32 = 400;
const ROUND: Duration = Duration::from_millis(5);

pub struct Group {
    kill: Option<PathBuf>,
    freezer: Option<PathBuf>,
    /// One `cgroup.procs` of the group is enough to list it.
    procs: Option<PathBuf>,
    oom: Option<PathBuf>,
    peak: Option<PathBuf>,
}

impl Group {
    pub fn of(start: &StartFile) -> Self {
        Group {
            kill: start.cgroup_kill.clone(),
            freezer: start.cgroup_freezer.clone(),
            procs: start.cgroup_procs.first().cloned(),
            oom: start.oom_file.clone(),
            peak: start.peak_file.clone(),
        }
    }

    /// Kills the main process and everything it started, detached or not, and waits until they are gone.
    pub fn kill_all(&self, main: u32) {
        if let Some(kill) = &self.kill
            && fs::write(kill, "1").is_ok()
        {
            self.wait_empty();
            return;
        }
        for _ in 0..ROUNDS {
            // Frozen processes cannot fork away from under us.
            if let Some(freezer) = &self.freezer {
                let _ = fs::write(freezer, "FROZEN");
            }
            let pids = self.pids(main);
            for &pid in &pids {
                sys::kill(pid as i32, libc::SIGKILL);
            }
            if let Some(freezer) = &self.freezer {
                let _ = fs::write(freezer, "THAWED");
            }
            if pids.is_empty() {
                return;
            }
            sys::pause(ROUND);
            // The main process is left for the caller, who wants its status; it may be a zombie meanwhile.
            if pids.iter().all(|&pid| optimus_runner::start_time(pid).is_none_or(|(_, state)| state == 'Z' || state == 'X')) {
                return;
            }
        }
    }

    fn wait_empty(&self) {
        for _ in 0..ROUNDS {
            if self.listed().is_empty() {
                return;
            }
            sys::pause(ROUND);
        }
    }

    fn listed(&self) -> Vec<u32> {
        let text = self.procs.as_ref().and_then(|p| fs::read_to_string(p).ok()).unwrap_or_default();
        text.lines().filter_map(|l| l.parse().ok()).filter(|&pid| pid != 0 && pid != std::process::id()).collect()
    }

    /// The members of the cgroup; without one, our descendants: as subreaper every orphan of the run comes to us.
    fn pids(&self, main: u32) -> Vec<u32> {
        if self.procs.is_some() {
            return self.listed();
        }
        let mut found = Vec::new();
        let mut queue = vec![std::process::id()];
        while let Some(pid) = queue.pop() {
            let Ok(text) = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")) else { continue };
            for child in text.split_ascii_whitespace().filter_map(|w| w.parse::<u32>().ok()) {
                let ended = optimus_runner::start_time(child).is_none_or(|(_, state)| state == 'Z' || state == 'X');
                if !ended {
                    found.push(child);
                }
                queue.push(child);
            }
        }
        if found.is_empty() && optimus_runner::start_time(main).is_some_and(|(_, state)| state != 'Z' && state != 'X') {
            found.push(main);
        }
        found
    }

    /// How many processes of the group the kernel has killed for want of memory, ever.
    pub fn oom_kills(&self) -> u64 {
        let text = self.oom.as_ref().and_then(|p| fs::read_to_string(p).ok()).unwrap_or_default();
        text.lines().find_map(|l| l.strip_prefix("oom_kill ")).and_then(|n| n.trim().parse().ok()).unwrap_or(0)
    }

    /// Most memory the group ever held, in bytes.
    pub fn peak(&self) -> Option<u64> {
        fs::read_to_string(self.peak.as_ref()?).ok()?.trim().parse().ok()
    }
}
