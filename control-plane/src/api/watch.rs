//! Long polls: `?index=N&wait=30s` answers when what is asked for has changed since N.
//!
//! What is shown has no index of its own. Whether it changed between N and now is told by the window
//! of events; whether it changes while we wait, by comparing what would be shown. A client that wants
//! it exact sends `If-None-Match` with the ETag it has.

use std::time::Duration;

use http::HeaderMap;
use optimus_common::{Span, WorkloadKey};
use optimus_core::state::State;

use super::context::{Ctx, etag};
use super::problem::ApiError;

/// Longest wait of a long poll; a longer one asked for is cut down to it.
pub const WAIT_MAX: Duration = Duration::from_secs(60);
/// Wait when an index is given without one.
pub const WAIT_DEFAULT: Duration = Duration::from_secs(30);
/// Changes closer together than this are looked at once.
const COALESCE: Duration = Duration::from_millis(20);

/// What a client asked to wait for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wait {
    pub index: Option<u64>,
    pub limit: Duration,
}

/// Reads `index` and `wait`; none if neither asks to wait.
pub(crate) fn wanted(index: Option<u64>, wait: Option<Span>, headers: &HeaderMap) -> Result<Option<Wait>, ApiError> {
    let limit = wait.map_or(WAIT_DEFAULT, Span::as_duration).min(WAIT_MAX);
    match (index, wait) {
        (None, None) => Ok(None),
        (None, Some(_)) if !headers.contains_key(http::header::IF_NONE_MATCH) => {
            Err(ApiError::bad_request("query: wait needs index=N or an If-None-Match header, to know what you have"))
        }
        (index, _) => Ok(Some(Wait { index, limit })),
    }
}

/// The state to answer from, once what `render` shows of it has changed or the wait is over.
pub(crate) async fn changed(
    ctx: &Ctx,
    state: State,
    wait: Wait,
    about: impl Fn(&str) -> bool,
    render: impl Fn(&State) -> Result<Vec<u8>, ApiError>,
) -> Result<State, ApiError> {
    let mut tag = etag(&render(&state)?);
    let known = match (ctx.if_none_match(), wait.index) {
        (Some(_), _) => ctx.has(&tag),
        (None, Some(index)) => !changed_since(&state, index, about),
        (None, None) => false,
    };
    if !known {
        return Ok(state);
    }
    let _place = ctx.begin_wait()?;
    let mut applied = ctx.store().applied();
    let deadline = tokio::time::Instant::now() + wait.limit;
    let mut state = state;
    loop {
        // The receiver may have seen nothing yet: look first, then wait.
        applied.mark_unchanged();
        let newest = ctx.store().state();
        if newest.index != state.index {
            state = newest;
            let now = etag(&render(&state)?);
            if std::mem::replace(&mut tag, now.clone()) != now {
                return Ok(state);
            }
        }
        tokio::select! {
            () = tokio::time::sleep_until(deadline) => return Ok(state),
            () = ctx.shared.shutdown.cancelled() => return Ok(state),
            changed = applied.changed() => if changed.is_err() { return Ok(state) },
        }
        tokio::time::sleep(COALESCE).await;
    }
}

/// Whether an event after `index` is about it, or events that may have been have left the window.
fn changed_since(state: &State, index: u64, about: impl Fn(&str) -> bool) -> bool {
    if index >= state.index {
        return false;
    }
    if is_before_window(state, index) {
        return true;
    }
    state.events.range((index + 1, 0)..).any(|(_, event)| about(&event.subject))
}

/// Whether events after `index` may have left the window.
pub(crate) fn is_before_window(state: &State, index: u64) -> bool {
    if state.events.len() < optimus_core::state::EVENTS_KEPT {
        return false;
    }
    state.events.get_min().is_some_and(|((first, n), _)| index.saturating_add(1) < *first || (index + 1 == *first && *n > 0))
}

/// Whether an event's subject is the workload or a copy of it (`shop/prod/web`, `shop/prod/web-0`).
pub(crate) fn is_about(subject: &str, key: &WorkloadKey) -> bool {
    let key = key.to_string();
    let Some(rest) = subject.strip_prefix(key.as_str()) else { return false };
    rest.is_empty() || rest.strip_prefix('-').is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use optimus_common::Name;

    use super::*;

    #[test]
    fn copies_belong_to_their_workload_only() {
        let name = |text: &str| Name::new(text).unwrap();
        let key = WorkloadKey { project: name("shop"), environment: name("prod"), workload: name("web") };
        assert!(is_about("shop/prod/web", &key));
        assert!(is_about("shop/prod/web-12", &key));
        for other in ["shop/prod/web-", "shop/prod/web-api", "shop/prod/webs", "shop/prod/web-api-0", "node/web"] {
            assert!(!is_about(other, &key), "{other}");
        }
    }
}
