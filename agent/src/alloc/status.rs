//! From what a worker knows to what the control plane is told. Pure.

use optimus_common::protocol::Phase;
use optimus_common::reason::Reason;

use super::machine::{Goal, State};

/// Phase and reason of a machine's state; `running` is the reason of a copy that runs.
pub fn describe(state: &State, running: Option<Reason>) -> (Phase, Option<Reason>) {
    match state {
        State::Pending => (Phase::Pending, Some(Reason::Starting)),
        State::Starting { stop: false, .. } => (Phase::Starting, Some(Reason::Starting)),
        State::Starting { stop: true, .. } | State::Ending { goal: Goal::Stop, .. } => (Phase::Stopping, Some(Reason::StopRequested)),
        State::Running { .. } => (Phase::Running, running),
        State::Ending { goal: Goal::Restart(why) | Goal::Fail(why), .. } => (Phase::Stopping, Some(why.clone())),
        State::Backoff { reason, .. } => (Phase::Backoff, Some(reason.clone())),
        State::Stopped { reason } => (Phase::Stopped, Some(reason.clone())),
        State::Failed { reason } => (Phase::Failed, Some(reason.clone())),
    }
}
