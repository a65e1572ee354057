//! How a container ended, from what the engine and our group say. Pure but for reading the group.

use bollard::models::{ContainerInspectResponse, ContainerStateStatusEnum as Status};
use optimus_common::reason::{Exit, Oom, Reason};
use optimus_common::time::{Span, Timestamp};
use optimus_common::units::Bytes;

use crate::isolation::Group;

/// How it ended; unset while it runs. One that was created and never started has not run: [`Reason::ExitUnknown`].
pub fn of(found: &ContainerInspectResponse, group: Option<&Group>, limit: Bytes) -> Option<Reason> {
    let usage = group.and_then(|g| g.usage().ok());
    // v1 counts kills in the container's own group, which is gone by now; v2 in ours too.
    judge(found, usage.map(|u| u.oom_kills), usage.map(|u| Bytes(u.memory_peak)), limit)
}

fn judge(found: &ContainerInspectResponse, kills: Option<u64>, peak: Option<Bytes>, limit: Bytes) -> Option<Reason> {
    let Some(state) = &found.state else { return Some(Reason::ExitUnknown { what: "the engine says nothing of it".to_owned() }) };
    match state.status {
        Some(Status::EXITED | Status::DEAD | Status::REMOVING) => {}
        Some(Status::CREATED) => return Some(Reason::ExitUnknown { what: "its container was never started".to_owned() }),
        _ => return None,
    }
    let at = time(state.finished_at.as_deref()).unwrap_or(Timestamp(0));
    let started = time(state.started_at.as_deref()).unwrap_or(at);
    let kills = kills.unwrap_or(0).max(u64::from(state.oom_killed == Some(true)));
    let peak = peak.filter(|p| p.0 > 0).map_or(limit, |p| p.min(limit));
    let oom = (kills > 0).then_some(Oom { limit, peak, kills });
    // The engine tells a signal as 128 + its number, which a program may also leave with: told as it is.
    let code = state.exit_code.and_then(|code| i32::try_from(code).ok());
    let exit = Exit { code, signal: None, oom, at, ran_for: Span(at.0.saturating_sub(started.0)) };
    Some(match oom {
        // A child was killed and the main process left content: its own verdict counts.
        Some(oom) if code != Some(0) => Reason::OutOfMemory { exit, oom },
        _ => Reason::Exited { exit },
    })
}

/// A time of the engine. Its "never" is the year 1.
pub fn time(text: Option<&str>) -> Option<Timestamp> {
    let at: jiff::Timestamp = text?.parse().ok()?;
    u64::try_from(at.as_millisecond()).ok().filter(|ms| *ms > 0).map(Timestamp)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use bollard::models::ContainerState;

    use super::*;

    fn ended(code: i64, oom: bool, kills: Option<u64>) -> Option<Reason> {
        let state = ContainerState {
            status: Some(Status::EXITED),
            exit_code: Some(code),
            oom_killed: Some(oom),
            started_at: Some("2026-01-02T03:04:05.5Z".into()),
            finished_at: Some("2026-01-02T03:04:07.75Z".into()),
            ..ContainerState::default()
        };
        let found = ContainerInspectResponse { state: Some(state), ..ContainerInspectResponse::default() };
        judge(&found, kills, Some(Bytes::mib(64)), Bytes::mib(32))
    }

    #[test]
    fn out_of_memory_is_told_from_an_exit_with_the_same_number() {
        let Some(Reason::Exited { exit }) = ended(137, false, Some(0)) else { panic!() };
        assert_eq!((exit.code, exit.oom, exit.ran_for), (Some(137), None, Span(2250)));
        for (flag, kills) in [(true, None), (true, Some(0)), (false, Some(1))] {
            let Some(Reason::OutOfMemory { oom, .. }) = ended(137, flag, kills) else { panic!("{flag} {kills:?}") };
            assert_eq!(oom, Oom { limit: Bytes::mib(32), peak: Bytes::mib(32), kills: 1 });
        }
        assert!(matches!(ended(0, true, None), Some(Reason::Exited { exit }) if exit.oom.is_some()), "only a child");
    }

    #[test]
    fn one_that_runs_has_not_ended() {
        for status in [Status::RUNNING, Status::PAUSED, Status::RESTARTING] {
            let state = ContainerState { status: Some(status), ..ContainerState::default() };
            let found = ContainerInspectResponse { state: Some(state), ..ContainerInspectResponse::default() };
            assert_eq!(judge(&found, None, None, Bytes(1)), None);
        }
        assert_eq!(time(Some("0001-01-01T00:00:00Z")), None);
    }
}
