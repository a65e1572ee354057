//! What happened: pages of the window, and a stream.

use std::time::Duration;

use axum::response::Response;
use http::header::ACCEPT;
use optimus_common::Span;
use optimus_common::api::v1::{Event, PAGE_DEFAULT, Page};
use optimus_core::state::{EVENTS_KEPT, State};
use optimus_core::view;
use serde::Deserialize;
use utoipa::IntoParams;

use crate::api::context::{Consistency, Ctx, Freshness};
use crate::api::ndjson::{self, HEARTBEAT, Lines, NDJSON};
use crate::api::paging::PageRequest;
use crate::api::problem::ApiError;
use crate::api::watch::is_before_window;
use crate::store::Store;

/// Events sent in one piece of a stream.
const BATCH: usize = 500;
/// Changes closer together than this are sent together.
const COALESCE: Duration = Duration::from_millis(20);

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct EventsQuery {
    /// Only events after this state index. Unset: the newest page.
    pub since: Option<u64>,
    /// Stream further events as they happen (NDJSON).
    #[serde(default)]
    pub follow: bool,
    /// Items of a page: default 50, at most 1000.
    #[param(minimum = 1)]
    pub page_size: Option<u32>,
    /// `next_page_token` of the page before.
    pub page_token: Option<String>,
    pub consistency: Option<Consistency>,
    /// Answer from no older a state than this index (`Optimus-Index` of an earlier answer): wait for it, up to 5 s.
    pub min_index: Option<u64>,
    /// With `consistency=stale`: refuse (503) if this server has not heard the leader for longer.
    pub max_staleness: Option<Span>,
}

type Place = (u64, u32);

/// Events in order, oldest first: as pages, or with `follow` or `Accept: application/x-ndjson` as a stream.
///
/// A stream sends a blank line every 10 s of silence. It resumes with `since` the index of the last
/// event seen in full. 410 if events after `since` are no longer kept.
#[utoipa::path(get, path = "/v1/events", tag = "events", operation_id = "list_events", params(EventsQuery),
    responses((status = 200, content((Page<Event> = "application/json"), (Event = "application/x-ndjson")))))]
pub(crate) async fn list_events(ctx: Ctx) -> Result<Response, ApiError> {
    let query: EventsQuery = ctx.query()?;
    let scope = format!("events {:?}", query.since);
    let request = PageRequest::new(query.page_size, query.page_token.as_deref(), scope)?;
    let after = request.after.as_deref().map(parse_place).transpose()?;
    let state =
        ctx.read(Freshness { consistency: query.consistency, min_index: query.min_index, max_staleness: query.max_staleness }).await?;
    let gap = match (after, query.since) {
        (Some(place), _) => is_evicted_after(&state, place).then_some(place.0),
        (None, Some(since)) => is_before_window(&state, since).then_some(since),
        (None, None) => None,
    };
    if let Some(since) = gap {
        return Err(lost(&state, since));
    }
    let streamed = query.follow || ctx.parts.headers.get(ACCEPT).and_then(|value| value.to_str().ok()).is_some_and(|v| v.contains(NDJSON));
    let start = match (after, query.since) {
        (Some(place), _) => place,
        (None, Some(since)) => (since, u32::MAX),
        (None, None) => before_newest(&state, request.size),
    };
    if !streamed {
        let rows = after_place(&state, start).map(view::event);
        let (items, next_page_token) = request.cut(rows, |event| format!("{}/{}", event.index, event.n));
        return ctx.json(state.index, &Page { items, next_page_token, index: state.index });
    }
    let place = ctx.begin_wait()?;
    let store = ctx.store().clone();
    let (follow, index, request_id) = (query.follow, state.index, ctx.trace.request_id.clone());
    Ok(ndjson::respond(&ctx, index, place, move |lines| stream(lines, store, state, start, follow, request_id)))
}

/// Whether events after a place may have left the window.
fn is_evicted_after(state: &State, place: Place) -> bool {
    state.events.len() >= EVENTS_KEPT && state.events.get_min().is_some_and(|(first, _)| *first > place)
}

fn lost(state: &State, since: u64) -> ApiError {
    let first = state.events.get_min().map_or(state.index, |((index, _), _)| *index);
    ApiError::gone(format!("events after index {since} are no longer all kept; the oldest kept is of index {first}"))
}

fn parse_place(text: &str) -> Result<Place, ApiError> {
    let parsed = text.split_once('/').and_then(|(index, n)| Some((index.parse().ok()?, n.parse().ok()?)));
    parsed.ok_or_else(|| ApiError::bad_request("query: page_token is not one of ours"))
}

/// The place after which the newest `count` events lie.
fn before_newest(state: &State, count: usize) -> Place {
    state.events.keys().rev().nth(count).copied().unwrap_or((0, 0))
}

fn after_place(state: &State, place: Place) -> impl Iterator<Item = &optimus_core::state::Event> {
    state.events.range((std::ops::Bound::Excluded(place), std::ops::Bound::Unbounded)).map(|(_, event)| &**event)
}

async fn stream(lines: Lines, store: Store, mut state: State, mut at: Place, follow: bool, request_id: String) {
    let mut applied = store.applied();
    let mut last_sent = tokio::time::Instant::now();
    loop {
        loop {
            let batch: Vec<Event> = after_place(&state, at).take(BATCH).map(view::event).collect();
            let Some(last) = batch.last() else { break };
            at = (last.index, last.n);
            if !lines.send(&batch).await {
                return;
            }
            last_sent = tokio::time::Instant::now();
        }
        if !follow {
            return;
        }
        tokio::select! {
            () = lines.ended() => return,
            () = tokio::time::sleep_until(last_sent + HEARTBEAT) => {
                if !lines.heartbeat().await {
                    return;
                }
                last_sent = tokio::time::Instant::now();
            }
            changed = applied.changed() => {
                if changed.is_err() {
                    return;
                }
                tokio::time::sleep(COALESCE).await;
            }
        }
        state = store.state();
        // A reader slower than the window: say so, never skip in silence.
        if is_evicted_after(&state, at) {
            let problem = lost(&state, at.0).problem(&request_id);
            lines.send([&problem]).await;
            return;
        }
    }
}

const _: () = assert!(BATCH >= PAGE_DEFAULT);
