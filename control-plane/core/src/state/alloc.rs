//! What follows from a copy's row alone.

use optimus_common::protocol::{Phase, RELEASE_SLOT};
use optimus_common::spec::WorkloadSpec;

use super::Alloc;

impl Alloc {
    /// It should not run and does not: only its record is left.
    pub fn has_ended(&self) -> bool {
        !self.run && self.phase().is_terminal()
    }
    pub fn phase(&self) -> Phase {
        self.status.as_ref().map_or(Phase::Pending, |s| s.phase)
    }
    /// It runs a release command, once, and is none of the workload's copies.
    pub fn is_release_step(&self) -> bool {
        self.index == RELEASE_SLOT
    }
    /// A release command is never ready: nothing is to be sent to it.
    pub fn is_ready(&self) -> bool {
        !self.is_release_step() && self.status.as_ref().is_some_and(|s| s.ready && s.phase == Phase::Running)
    }
    /// It runs, but not with the limits of `spec`: its agent has not changed them yet, or cannot.
    pub fn awaits_limits(&self, spec: &WorkloadSpec) -> bool {
        let told = self.status.as_ref().filter(|s| s.phase == Phase::Running).and_then(|s| s.limits);
        told.is_some_and(|limits| limits != spec.resources)
    }
    /// It is on its way out: to be stopped once nobody asks it any more, or to move to another node.
    pub fn is_leaving(&self) -> bool {
        self.migrate || self.draining_since.is_some()
    }
    /// `web-0`, `web-release`
    pub fn name(&self) -> String {
        format!("{}-{}", self.key.workload, self.slot_name())
    }
    /// `shop/prod/web-0`
    pub fn subject(&self) -> String {
        format!("{}-{}", self.key, self.slot_name())
    }
    fn slot_name(&self) -> String {
        if self.is_release_step() { "release".to_owned() } else { self.index.to_string() }
    }
}
