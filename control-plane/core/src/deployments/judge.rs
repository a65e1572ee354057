//! The next step of a deployment.

use optimus_common::api::v1::DeploymentPhase;
use optimus_common::spec::{Strategy, Update};
use optimus_common::{Reason, Timestamp};

use super::analysis::{self, Traffic};
use super::{Gate, RELAPSES_MAX, ROUTERS_MAX_WAIT};
use crate::reconciler::over_at;
use crate::state::{Deployment, DeploymentStep};

/// What the reconciler counted, with what it decided in the same look.
pub(crate) struct Survey<'a> {
    /// Copies of the release that are wanted at this step.
    pub wanted: u32,
    /// Of them: have a place, have a process, have been ready for long enough.
    pub placed: u32,
    pub running: u32,
    pub settled: u32,
    /// A copy that should not be there is not even told to stop.
    pub others_run: bool,
    /// One that was told to has not stopped.
    pub others_stop: bool,
    /// What it waits for before it begins.
    pub lacks: Option<Reason>,
    /// Whether its release command lets it go on.
    pub gate: &'a Gate,
    /// Its copies, or the nodes they are tried on, fail again and again.
    pub hopeless: bool,
    pub traffic: Option<&'a Traffic>,
    /// Every router has taken on the present weights.
    pub routed: bool,
    /// What says most about why it does not get on.
    pub trouble: &'a dyn Fn() -> Trouble,
}

/// The copy in trouble, and its reason.
#[derive(Debug, Default)]
pub(crate) struct Trouble {
    pub copy: Option<String>,
    pub last: Option<Reason>,
}

/// What to make of a deployment now.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Verdict {
    Steps(Vec<DeploymentStep>),
    /// Nothing, unless nothing changes until then.
    Wait(Option<Timestamp>),
}

pub(crate) fn judge(deployment: &Deployment, update: &Update, survey: &Survey<'_>, now: Timestamp) -> Verdict {
    Judge { deployment, update, survey, now, deadline_at: deployment.progress_at + deployment.deadline }.verdict()
}

struct Judge<'a> {
    deployment: &'a Deployment,
    update: &'a Update,
    survey: &'a Survey<'a>,
    now: Timestamp,
    deadline_at: Timestamp,
}

impl Judge<'_> {
    fn verdict(&self) -> Verdict {
        let (d, s) = (self.deployment, self.survey);
        let id = d.id;
        let going_back = d.phase == DeploymentPhase::RollingBack;
        if d.paused.is_some() {
            return Verdict::Wait(None);
        }
        if !going_back && d.phase == DeploymentPhase::Preparing && !d.prepared && s.lacks.is_some() {
            return self.unless_over(vec![]);
        }
        if !going_back {
            match s.gate {
                Gate::Open => {}
                Gate::Place => return self.unless_over(vec![]),
                // It has a deadline of its own.
                Gate::Wait { until, .. } => return Verdict::Wait(Some(*until)),
                Gate::Failed(reason) => return self.fail(Some(reason.clone())),
            }
        }
        let complete = s.settled >= s.wanted && !s.others_run && (going_back || !d.keeps_old());
        // What is told to stop should have, but an old copy slow to die does not undo a good deployment.
        if complete && (!s.others_stop || self.now >= self.deadline_at) {
            return Verdict::Steps(vec![if going_back { DeploymentStep::RolledBack { id } } else { DeploymentStep::Succeed { id } }]);
        }
        if s.hopeless && !going_back {
            return self.fail(None);
        }
        if let Some(what) = self.worse() {
            return self.fail(Some(Reason::AnalysisFailed { what }));
        }
        let mut steps = Vec::new();
        if s.settled > d.progress {
            steps.push(DeploymentStep::Progress { id, ready: s.settled }); // moves the deadline
        }
        if going_back {
            return self.unless_over(steps);
        }
        if s.settled < s.wanted || !d.keeps_old() {
            return self.forming(steps);
        }
        self.proven(steps)
    }

    /// Copies are on their way to be what the step wants.
    fn forming(&self, mut steps: Vec<DeploymentStep>) -> Verdict {
        use DeploymentPhase::*;
        let (d, s) = (self.deployment, self.survey);
        let phase = match d.phase {
            // What was promoted is not called anything else again.
            Promoting if d.promoted || !d.keeps_old() => Promoting,
            _ if s.placed < s.wanted => Placing,
            _ if s.running < s.wanted => Starting,
            _ => Health,
        };
        let relapses = d.keeps_old() && matches!(d.phase, Shifting | Baking | Promoting);
        if relapses && d.relapses >= RELAPSES_MAX {
            return self.fail(None);
        }
        if phase != d.phase {
            steps.push(self.enter(phase, d.step, d.weight));
            return Verdict::Steps(steps);
        }
        self.unless_over(steps)
    }

    /// All copies the step wants have proved themselves, and the old set is there.
    fn proven(&self, mut steps: Vec<DeploymentStep>) -> Verdict {
        use DeploymentPhase::*;
        let (d, now) = (self.deployment, self.now);
        let since = d.since.unwrap_or(d.created_at);
        let canary = d.strategy == Strategy::Canary;
        let bake = if canary { self.canary_step(d.step).bake } else { self.update.hold };
        let go = if canary { self.canary_step(d.step).weight } else { 100 };
        let held_back = !canary && !self.update.auto_promote && !d.promoted;
        let step = match d.phase {
            // A person decides on a switch before, on a canary after.
            Preparing | Placing | Starting | Health if held_back => self.enter(Promoting, d.step, d.weight),
            Promoting if held_back => return wait(steps, None),
            Preparing | Placing | Starting | Health => self.enter(Shifting, d.step, Some(go)),
            Promoting if !canary && d.weight != Some(100) => self.enter(Shifting, d.step, Some(go)),
            Shifting if self.survey.routed || now >= since + ROUTERS_MAX_WAIT => self.enter(Baking, d.step, d.weight),
            Shifting => return wait(steps, Some(since + ROUTERS_MAX_WAIT)),
            Baking if now < over_at(since, bake, now) => return wait(steps, Some(since + bake)),
            Baking if canary && (d.step as usize) + 1 < self.update.canary_steps().len() => {
                let next = d.step + 1;
                self.enter(Shifting, next, Some(self.canary_step(next).weight))
            }
            Baking if !canary => self.enter(Promoting, 1, d.weight),
            Baking if self.update.auto_promote => DeploymentStep::Promote { id: d.id },
            Baking => self.enter(Promoting, d.step, d.weight),
            _ => return wait(steps, None),
        };
        steps.push(step);
        Verdict::Steps(steps)
    }

    fn canary_step(&self, step: u32) -> optimus_common::spec::CanaryStep {
        let steps = self.update.canary_steps();
        steps.get(step as usize).or(steps.last()).copied().unwrap_or(Update::STEP)
    }

    /// Only while they get traffic can copies be compared.
    fn worse(&self) -> Option<String> {
        let d = self.deployment;
        if !matches!(d.phase, DeploymentPhase::Baking | DeploymentPhase::Promoting) || !d.keeps_old() {
            return None;
        }
        self.survey.traffic.and_then(analysis::worse)
    }

    fn enter(&self, to: DeploymentPhase, step: u32, weight: Option<u32>) -> DeploymentStep {
        DeploymentStep::Enter { id: self.deployment.id, from: self.deployment.phase, to, step, weight }
    }

    /// The steps; without any, a wait for the deadline, or the end when it has passed.
    fn unless_over(&self, steps: Vec<DeploymentStep>) -> Verdict {
        if !steps.is_empty() {
            return Verdict::Steps(steps);
        }
        if self.now < self.deadline_at { Verdict::Wait(Some(self.deadline_at)) } else { self.fail(None) }
    }

    fn fail(&self, reason: Option<Reason>) -> Verdict {
        let reason = reason.unwrap_or_else(|| {
            let Trouble { copy, last } = (self.survey.trouble)();
            match last {
                Some(last) if self.now < self.deadline_at => last,
                last => Reason::DeadlinePassed { deadline: self.deployment.deadline, copy, last: last.map(Box::new) },
            }
        });
        Verdict::Steps(vec![DeploymentStep::Fail { id: self.deployment.id, reason }])
    }
}

fn wait(steps: Vec<DeploymentStep>, until: Option<Timestamp>) -> Verdict {
    if steps.is_empty() { Verdict::Wait(until) } else { Verdict::Steps(steps) }
}
