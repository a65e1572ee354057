//! How a new release takes over, and when it must not.
//!
//! A deployment is a row of the state with a phase; [`judge`] looks at it and at what the reconciler counted, and says
//! the next step. Pure; what it says is committed with the reconciler's batch.
//!
//! ```text
//!             ┌───────────── next step of a canary ◄──────────────┐
//! preparing ─► placing ─► starting ─► health ─► shifting ─► baking ┴─► promoting ─► done
//!                 └─ rolling: as far as copies move ─► done      ▲────────┘ a copy is no longer ready: back to health
//! any of them ─ failed, aborted ─► rolling_back ─► rolled_back, cancelled; or failed with nothing to go back to
//! ```
//!
//! What holds, whatever the strategy: the release before stays whole until the new one proved itself (canary,
//! blue-green), or as whole as `max_unavailable` asks for (rolling). Going back is a phase of the same deployment and
//! never a release of its own.

pub mod analysis;
mod judge;
mod plan;
mod preflight;
mod release_step;

pub(crate) use judge::{Survey, Trouble, Verdict, judge};
pub use plan::{Action, DeployPlan, LOOKS_MAX, Planned, Planning, What, plan_deploy};
pub use preflight::{Findings, preflight};
pub use release_step::RELEASE_STEP_MARGIN;
pub(crate) use release_step::{Gate, gate, is_shut, is_wanted};

use optimus_common::Span;
use optimus_common::spec::{Strategy, WorkloadSpec};

use crate::state::{Deployment, Release, State};

/// A new copy that restarted so often without becoming ready, or a slot that gave up on so many nodes, fails its
/// deployment before the deadline: waiting on would show nothing new.
pub const RESTARTS_MAX: u32 = 5;
/// How often copies may prove themselves and then be no longer ready.
pub const RELAPSES_MAX: u32 = 3;
/// Longest wait for routers to take on a set of endpoints. A router that takes longer counts as gone.
pub const ROUTERS_MAX_WAIT: Span = Span::secs(2);

/// Whether a copy of release `from` may become one of `to` as it runs.
pub fn may_adopt(state: &State, from: &Release, to: &Release) -> bool {
    let fresh = |number: u64| state.release(&to.key, number).is_none_or(|r| r.fresh);
    from.number != to.number
        && from.secrets == to.secrets
        && !(from.number + 1..=to.number).any(fresh)
        && !from.spec.must_restart_for(&to.spec)
}

/// The strategy a deployment goes by: one with nothing to compare with, or nothing to start, is as good as rolling.
pub fn strategy_of(old: Option<&WorkloadSpec>, new: &WorkloadSpec, fresh: bool) -> Strategy {
    match old {
        Some(old) if fresh || old.must_restart_for(new) => new.update.strategy,
        _ => Strategy::Rolling,
    }
}

impl Deployment {
    /// The old set stays whole beside the new copies for now.
    pub fn keeps_old(&self) -> bool {
        match self.strategy {
            Strategy::Rolling => false,
            Strategy::Canary => !self.promoted,
            Strategy::BlueGreen => self.step == 0,
        }
    }
}
