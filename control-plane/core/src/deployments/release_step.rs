//! The release command: what runs once in a deployment, before the first copy of its release starts.
//!
//! It is a copy in a slot of its own ([`RELEASE_SLOT`]), which the agent runs as it runs a job: once, with a timeout. The
//! deployment's row names it from the moment it is placed, in the same command, and never names another: whatever
//! becomes of nodes and leaders, it does not run a second time. The deployment waits in `preparing` until it ended well.

use optimus_common::protocol::RELEASE_SLOT;
use optimus_common::{Reason, Span, Timestamp};

use crate::reconciler::over_at;
use crate::state::{Alloc, Deployment, Release, State, Workload};

/// Time a node has to start the command and tell how it ended, beside the command's own timeout.
pub const RELEASE_STEP_MARGIN: Span = Span::secs(60);

/// Whether a deployment may go on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Gate {
    /// There is nothing to run, or it ended well.
    Open,
    /// To be placed now.
    Place,
    /// It runs, or another one still does.
    Wait {
        why: Reason,
        until: Timestamp,
    },
    Failed(Reason),
}

/// Whether a deployment that begins so runs the command of its release. A restart or a change of number starts nothing
/// that was not prepared before; going back to a release must not migrate again.
pub(crate) fn is_wanted(workload: &Workload, release: &Release, trigger: &str) -> bool {
    release.spec.update.release.is_some() && (matches!(trigger, "deploy" | "retry") || workload.stable.is_none())
}

/// Whether copies of the release of the newest deployment must not start, as its command has not ended well.
pub(crate) fn is_shut(state: &State, workload: &Workload, newest: &Deployment) -> bool {
    let release = state.release(&workload.key, newest.release);
    !newest.prepared && workload.release == newest.release && release.is_some_and(|r| is_wanted(workload, r, &newest.trigger))
}

pub(crate) fn gate(state: &State, workload: &Workload, deployment: &Deployment, now: Timestamp) -> Gate {
    if !is_shut(state, workload, deployment) || !deployment.phase.is_forward() {
        return Gate::Open;
    }
    let of = |number: u64| state.release(&workload.key, number).and_then(|r| r.spec.update.release.as_ref());
    let timeout = |number: u64| of(number).map_or(Span(0), |step| step.timeout);
    let until = |alloc: &Alloc| over_at(alloc.created_at, Span(timeout(alloc.release).0 + RELEASE_STEP_MARGIN.0), now);
    let on = |alloc: &Alloc| state.nodes.get(&alloc.node).map_or_else(|| alloc.node.to_string(), |n| n.facts.name.clone());
    let Some(id) = deployment.release_step else {
        // That of a deployment before may still be at work: two migrations at a time are worse than none.
        let other = state.allocs_in(&workload.key, RELEASE_SLOT).find(|a| !a.phase().is_terminal() && now < until(a));
        return match other {
            Some(other) => Gate::Wait { why: Reason::ReleaseCommandRuns { node: on(other), release: other.release }, until: until(other) },
            None => Gate::Place,
        };
    };
    let failed = |why: String| Gate::Failed(Reason::ReleaseCommand { why });
    let Some(alloc) = state.allocs.get(&id) else {
        return failed("the node it ran on was removed; how it ended is not known, and it is not run again".into());
    };
    let timeout = timeout(deployment.release);
    match alloc.phase().is_terminal() {
        true if alloc.is_complete() => Gate::Open,
        true => failed(alloc.status.as_ref().and_then(|s| s.trouble()).map_or_else(|| "it ended".into(), |reason| reason.to_string())),
        false if now >= until(alloc) => {
            failed(format!("{} did not say within {timeout} and {RELEASE_STEP_MARGIN} how it ended; it is not run again", on(alloc)))
        }
        false => Gate::Wait { why: Reason::ReleaseCommandRuns { node: on(alloc), release: alloc.release }, until: until(alloc) },
    }
}
