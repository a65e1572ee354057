//! What agents report, and the events that follow from it.

use super::*;

impl Step<'_> {
    pub(super) fn report(&mut self, node: NodeId, statuses: Vec<AllocStatus>, gone: Vec<AllocId>) -> Applied {
        let mut changed = false;
        for status in statuses {
            changed |= self.status(node, status);
        }
        for id in gone {
            // The agent has no trace of it: for us it has stopped, whatever was last seen.
            let Some(alloc) = self.state.allocs.get(&id).filter(|a| a.node == node && !a.run && !a.phase().is_terminal()) else { continue };
            let seq = alloc.status.as_ref().map_or(0, |s| s.seq);
            let mut status = alloc.status.as_ref().map_or_else(|| AllocStatus::unknown(id), |s| AllocStatus::clone(s));
            status.seq = seq + 1;
            status.phase = Phase::Stopped;
            status.ready = false;
            status.pid = None;
            changed |= self.status(node, status);
        }
        if changed { self.done() } else { self.unchanged() }
    }

    fn status(&mut self, node: NodeId, mut new: AllocStatus) -> bool {
        let Some(alloc) = self.state.allocs.get(&new.id).filter(|a| a.node == node || planted("report-for-wrong-node")) else {
            return false;
        };
        let old = alloc.status.clone();
        if old.as_ref().is_some_and(|o| o.seq >= new.seq) {
            return false;
        }
        new.ready_since = new.ready.then(|| ready_since(old.as_deref(), &new, self.at));
        let (subject, slot) = (alloc.subject(), (alloc.key.clone(), alloc.index));
        let (was_ready, routable) = (alloc.is_ready(), alloc.run && !alloc.ports.is_empty());
        let new = Arc::new(new);
        self.state.change_alloc(new.id, |alloc| alloc.status = Some(new.clone()));
        if routable && was_ready != (new.ready && new.phase == Phase::Running) {
            self.rerouted(&slot.0);
        }
        if new.ready && self.state.failures.contains_key(&slot) {
            self.state.failures.remove(&slot);
        }
        self.status_events(&subject, old.as_deref(), &new);
        true
    }

    fn status_events(&mut self, subject: &str, old: Option<&AllocStatus>, new: &AllocStatus) {
        let was = old.map_or(Phase::Pending, |o| o.phase);
        let was_ready = old.is_some_and(|o| o.ready);
        if new.last_exit.is_some() && new.last_exit != old.and_then(|o| o.last_exit.clone()) && new.phase != Phase::Stopped {
            let reason = new.reason.as_ref().map(|r| match r {
                Reason::CrashLoop { last, .. } => Reason::clone(last),
                other => other.clone(),
            });
            let exit = new.last_exit.clone().map(|exit| match exit.oom {
                Some(oom) => Reason::OutOfMemory { exit, oom },
                None => Reason::Exited { exit },
            });
            let reason = reason.filter(|r| !matches!(r, Reason::Starting | Reason::NotReady { .. })).or(exit);
            let message = reason.as_ref().map_or_else(|| "ended".to_owned(), Reason::to_string);
            self.event(EventKind::CopyExited, subject, &message, reason);
        }
        if new.started_at.is_some() && new.started_at != old.and_then(|o| o.started_at) {
            self.event(EventKind::CopyStarted, subject, &format!("started, pid {}", new.pid.unwrap_or(0)), None);
        }
        if new.ready && !was_ready {
            self.event(EventKind::CopyReady, subject, "ready", None);
        }
        if was_ready && !new.ready && new.phase == Phase::Running {
            self.event(EventKind::CopyNotReady, subject, "no longer ready", new.reason.clone());
        }
        if new.phase != was {
            match new.phase {
                Phase::Stopped => self.event(EventKind::CopyStopped, subject, "stopped", None),
                Phase::Failed => {
                    let message = new.reason.as_ref().map_or_else(|| "failed".to_owned(), Reason::to_string);
                    self.event(EventKind::CopyFailed, subject, &message, new.reason.clone());
                }
                // A start that never came to a process has no exit to tell of.
                Phase::Backoff if new.last_exit == old.and_then(|o| o.last_exit.clone()) => {
                    let message = new.reason.as_ref().map_or_else(|| "waits for its next start".to_owned(), |r| r.root().to_string());
                    self.event(EventKind::CopyExited, subject, &message, new.reason.clone());
                }
                _ => {}
            }
        }
    }
}

/// Since when a copy that is ready has been, by the clock of the log: agents' clocks may be wrong.
fn ready_since(old: Option<&AllocStatus>, new: &AllocStatus, at: Timestamp) -> Timestamp {
    let same_run = |old: &&AllocStatus| old.ready && old.restarts == new.restarts && old.started_at == new.started_at;
    old.filter(same_run).and_then(|old| old.ready_since).unwrap_or(at)
}
