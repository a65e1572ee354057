//! Where a deployment under way stands: forward, done, or over its deadline.

use std::sync::Arc;

use optimus_common::api::v1::DeploymentPhase;
use optimus_common::{Reason, Timestamp};

use super::slot::{Slot, Stage, answers};
use crate::scheduler;
use crate::state::{Alloc, Deployment, DeploymentStep, State, Workload};

/// A new copy that restarted so often without becoming ready, or a slot that gave up on so many nodes, fails its
/// deployment before the deadline: waiting on would show nothing new.
pub const RESTARTS_MAX: u32 = 5;

/// What to make of a deployment now.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Verdict {
    Step(DeploymentStep),
    /// Nothing, unless nothing changes until then.
    Wait(Timestamp),
}

pub(super) struct Rollout<'a> {
    pub state: &'a State,
    pub workload: &'a Workload,
    pub deployment: &'a Deployment,
    /// Each with its stage.
    pub slots: &'a [(Slot, Stage)],
    /// Copies beyond the last slot.
    pub beyond: &'a [Arc<Alloc>],
    pub now: Timestamp,
}

impl Rollout<'_> {
    pub fn judge(&self) -> Verdict {
        let id = self.deployment.id;
        let settled = self.slots.iter().filter(|(_, stage)| matches!(stage, Stage::Settled { .. })).count() as u32;
        let complete = settled == self.workload.copies && !self.others_run();
        let deadline_at = self.deployment.progress_at + self.deployment.deadline;
        // What is told to stop should have, but an old copy slow to die does not undo a good deployment.
        if complete && (!self.others_stop() || self.now >= deadline_at) {
            return Verdict::Step(match self.deployment.phase {
                DeploymentPhase::RollingBack => DeploymentStep::RolledBack { id },
                _ => DeploymentStep::Succeed { id },
            });
        }
        if settled > self.deployment.progress {
            return Verdict::Step(DeploymentStep::Progress { id, ready: settled }); // moves the deadline
        }
        if self.now < deadline_at && !self.hopeless() {
            return Verdict::Wait(deadline_at);
        }
        Verdict::Step(DeploymentStep::Fail { id, reason: self.why_it_failed() })
    }

    /// A copy that should not be there is not even told to stop.
    fn others_run(&self) -> bool {
        let kept = |stage: &Stage, alloc: &Alloc| matches!(stage, Stage::Settled { keep } if keep.id == alloc.id);
        self.beyond.iter().any(|a| a.run)
            || self.slots.iter().any(|(slot, stage)| slot.next.iter().chain(&slot.current).any(|a| !kept(stage, a)))
    }

    /// Copies on nodes that do not answer are not waited for.
    fn others_stop(&self) -> bool {
        let stopping = self.slots.iter().flat_map(|(slot, _)| &slot.stopping);
        stopping.chain(self.beyond.iter().filter(|a| !a.run)).any(|a| answers(self.state, a))
    }

    fn hopeless(&self) -> bool {
        if self.deployment.phase != DeploymentPhase::Running {
            return false; // going back is tried for as long as it may take
        }
        let crashes = |a: &Arc<Alloc>| {
            a.created_at >= self.deployment.created_at && a.status.as_ref().is_some_and(|s| !s.ready && s.restarts >= RESTARTS_MAX)
        };
        self.slots.iter().any(|(slot, _)| {
            let failures = self.state.failures.get(&(self.workload.key.clone(), slot.index));
            slot.next.iter().any(crashes)
                || failures.is_some_and(|f| {
                    f.release == self.deployment.release && f.count >= RESTARTS_MAX && f.last_at >= self.deployment.created_at
                })
        })
    }

    fn why_it_failed(&self) -> Reason {
        let (copy, last) = self.worst();
        match last {
            Some(last) if self.now < self.deployment.progress_at + self.deployment.deadline => last,
            last => Reason::DeadlinePassed { deadline: self.deployment.deadline, copy, last: last.map(Box::new) },
        }
    }

    /// The slot that says most about the failure: one in trouble rather than one that merely waits.
    fn worst(&self) -> (Option<String>, Option<Reason>) {
        let mut found: Vec<(String, Option<Reason>)> = Vec::new();
        for (slot, stage) in self.slots.iter().filter(|(_, stage)| !matches!(stage, Stage::Settled { .. })) {
            let name = format!("{}-{}", self.workload.key.workload, slot.index);
            let reported = slot.next.iter().chain(&slot.broken).find_map(|a| a.status.as_ref()?.reason.clone());
            let reason = match stage {
                Stage::Empty { .. } | Stage::Old { .. } if reported.is_none() => self.last_failure(slot.index).or_else(|| self.no_room()),
                _ => reported,
            };
            found.push((name, reason));
        }
        // Stable: of equals the lowest slot comes first.
        found.sort_by_key(|(_, reason)| reason.as_ref().is_none_or(Reason::is_calm));
        found.into_iter().next().map_or((None, None), |(name, reason)| (Some(name), reason))
    }

    fn no_room(&self) -> Option<Reason> {
        let release = self.state.release(&self.workload.key, self.workload.release)?;
        scheduler::why_nowhere(self.state, &self.workload.key, &release.spec, self.now)
    }

    /// What the newest copy of the slot that gave up said.
    fn last_failure(&self, index: u32) -> Option<Reason> {
        let of_this = |a: &&Arc<Alloc>| a.has_ended() && a.release == self.deployment.release;
        let newest = self.state.allocs_in(&self.workload.key, index).filter(of_this).last()?;
        newest.status.as_ref()?.reason.clone().filter(|r| !r.is_calm())
    }
}
