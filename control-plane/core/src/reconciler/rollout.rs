//! What the slots of a workload say about its deployment.

use std::sync::Arc;

use optimus_common::Timestamp;
use optimus_common::api::v1::DeploymentPhase;
use optimus_common::protocol::Phase;
use optimus_common::spec::Strategy;

use super::aim::Aim;
use super::silent;
use super::slot::{Slot, Stage, answers};
use crate::deployments::{self, Gate, RESTARTS_MAX, Survey, Trouble, Verdict};
use crate::scheduler;
use crate::state::{Alloc, Deployment, State, Workload};
use optimus_common::Reason;

pub(super) struct Rollout<'a> {
    pub state: &'a State,
    pub workload: &'a Workload,
    pub deployment: &'a Deployment,
    pub aim: &'a Aim<'a>,
    /// Each with its stage.
    pub slots: &'a [(Slot, Stage)],
    /// Copies beyond the last slot.
    pub beyond: &'a [Arc<Alloc>],
    /// Placed in this look.
    pub placed: u32,
    pub lacks: Option<Reason>,
    pub gate: &'a Gate,
    pub now: Timestamp,
}

impl Rollout<'_> {
    pub fn judge(&self) -> Verdict {
        let (mut placed, mut running, mut settled) = (self.placed, 0, 0);
        for (slot, stage) in self.wanted() {
            let best = match stage {
                Stage::Settled { keep } => Some(keep),
                Stage::Starting { .. } => slot.next.iter().rev().find(|a| answers(self.state, a)),
                _ => None,
            };
            settled += u32::from(matches!(stage, Stage::Settled { .. }));
            placed += u32::from(best.is_some());
            running += u32::from(best.is_some_and(|a| a.phase() == Phase::Running));
        }
        let update = self.state.release(&self.deployment.key, self.deployment.release).map(|r| r.spec.update.clone());
        let survey = Survey {
            wanted: self.aim.target_slots,
            placed,
            running,
            settled,
            others_run: self.others_run(),
            others_stop: self.others_stop(),
            lacks: self.lacks.clone(),
            gate: self.gate,
            hopeless: self.hopeless(),
            traffic: Some(&self.deployment.traffic),
            routed: crate::endpoints::acknowledged(self.state, &self.workload.key, self.now),
            trouble: &|| self.worst(),
        };
        deployments::judge(self.deployment, &update.unwrap_or_default(), &survey, self.now)
    }

    /// The slots that should hold a copy of the release at this step.
    fn wanted(&self) -> impl Iterator<Item = &(Slot, Stage)> {
        self.slots.iter().filter(|(slot, _)| slot.index < self.aim.target_slots)
    }

    /// A copy that should not be there is not even told to stop.
    fn others_run(&self) -> bool {
        let kept = |stage: &Stage, alloc: &Alloc| matches!(stage, Stage::Settled { keep } if keep.id == alloc.id);
        let target = self.aim.target.number;
        let unknown =
            |stage: &Stage, a: &Alloc| matches!(stage, Stage::Settled { .. }) && a.release == target && silent::is_unknown(self.state, a);
        self.beyond.iter().any(|a| a.run)
            || self.slots.iter().any(|(slot, stage)| {
                let mut here = slot.next.iter().chain(&slot.current).chain(&slot.draining);
                here.any(|a| (!kept(stage, a) && !unknown(stage, a)) || slot.index >= self.workload.copies)
            })
    }

    /// Copies on nodes that do not answer are not waited for.
    fn others_stop(&self) -> bool {
        let stopping = self.slots.iter().flat_map(|(slot, _)| &slot.stopping);
        stopping.chain(self.beyond.iter().filter(|a| !a.run)).any(|a| answers(self.state, a))
    }

    fn hopeless(&self) -> bool {
        if self.deployment.phase == DeploymentPhase::RollingBack {
            return false; // going back is tried for as long as it may take
        }
        let most = match self.deployment.strategy {
            // What gets a share of the traffic to be judged by has to stay up.
            Strategy::Canary | Strategy::BlueGreen if self.deployment.phase > DeploymentPhase::Health && self.deployment.keeps_old() => 1,
            _ => RESTARTS_MAX,
        };
        let crashes = |a: &Arc<Alloc>| {
            a.created_at >= self.deployment.created_at && a.status.as_ref().is_some_and(|s| !s.ready && s.restarts >= most)
        };
        // Its agent tried: it uses more than the new limits leave it, say.
        let unfit = |a: &Arc<Alloc>| {
            let refused = matches!(a.status.as_ref().and_then(|s| s.reason.as_ref()), Some(Reason::LimitNotEnforceable { .. }));
            refused && a.awaits_limits(&self.aim.target.spec)
        };
        self.wanted().any(|(slot, _)| {
            let failures = self.state.failures.get(&(self.workload.key.clone(), slot.index));
            slot.next.iter().any(crashes)
                || slot.next.iter().any(unfit)
                || failures.is_some_and(|f| {
                    f.release == self.deployment.release && f.count >= RESTARTS_MAX && f.last_at >= self.deployment.created_at
                })
        })
    }

    /// The slot that says most about the failure: one in trouble rather than one that merely waits.
    fn worst(&self) -> Trouble {
        if let Some(lacks) = self.lacks.clone().filter(|_| !self.deployment.prepared) {
            return Trouble { copy: None, last: Some(lacks) };
        }
        let mut found: Vec<(String, Option<Reason>)> = Vec::new();
        for (slot, stage) in self.wanted().filter(|(_, stage)| !matches!(stage, Stage::Settled { .. })) {
            let name = format!("{}-{}", self.workload.key.workload, slot.index);
            let reported = slot.next.iter().chain(&slot.broken).find_map(|a| a.status.as_ref()?.trouble());
            let reason = match stage {
                Stage::Empty { .. } | Stage::Old { .. } if reported.is_none() => self.last_failure(slot.index).or_else(|| self.no_room()),
                _ => reported,
            };
            found.push((name, reason));
        }
        // Stable: of equals the lowest slot comes first.
        found.sort_by_key(|(_, reason)| reason.as_ref().is_none_or(Reason::is_calm));
        found.into_iter().next().map_or_else(Trouble::default, |(name, last)| Trouble { copy: Some(name), last })
    }

    fn no_room(&self) -> Option<Reason> {
        let release = self.state.release(&self.workload.key, self.workload.release)?;
        scheduler::why_nowhere(self.state, &self.workload.key, &release.spec, self.now)
    }

    /// What the newest copy of the slot that gave up said.
    fn last_failure(&self, index: u32) -> Option<Reason> {
        let of_this = |a: &&Arc<Alloc>| a.has_ended() && a.release == self.deployment.release;
        let newest = self.state.allocs_in(&self.workload.key, index).filter(of_this).last()?;
        newest.status.as_ref()?.trouble().filter(|r| !r.is_calm())
    }
}
