//! What the copies of a workload print, as one stream.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use axum::response::Response;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use optimus_common::api::v1::LogRecord;
use optimus_common::protocol::{LogChunk, LogLine, LogRequest};
use optimus_common::{AllocId, Span, Timestamp, WorkloadKey};
use optimus_core::state::{Alloc, State};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio::time::Instant;
use utoipa::IntoParams;

use super::context::{Consistency, Ctx, Freshness};
use super::merge::{Merge, Next};
use super::ndjson::{self, HEARTBEAT, Lines};
use super::problem::ApiError;
use super::v1::{allocations, workloads};
use crate::agent_calls::{AgentCallError, AgentCalls};
use crate::store::Store;

/// Most copies of one answer.
pub const COPIES_MAX: usize = 256;
/// Most lines asked for of one copy.
pub const TAIL_MAX: u32 = 1_000_000;
/// A node must begin its answer by then.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a silent copy holds back the lines of the others, to put them in order.
const PATIENCE: Duration = Duration::from_secs(5);
const PATIENCE_FOLLOWING: Duration = Duration::from_millis(200);
/// Pause before a broken stream of a living copy is asked for again.
const REOPEN_PAUSE: Duration = Duration::from_secs(2);
/// How often the copies are looked at while following, besides at each change.
const LOOK: Duration = Duration::from_secs(5);
/// Name of the stream of our own remarks: a copy whose node does not answer is said to be missing.
const REMARK: &str = "optimus";

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct LogsQuery {
    /// Go on with further lines as they come, also of copies started later.
    #[serde(default)]
    pub follow: bool,
    /// Only the last so many lines of each copy.
    pub tail: Option<u32>,
    /// Only lines from this time on: RFC 3339, or how long ago (`10m`).
    pub since: Option<String>,
    /// Only this copy: name (`web-0`), slot number or id.
    pub copy: Option<String>,
    pub consistency: Option<Consistency>,
    /// Answer from no older a state than this index (`Optimus-Index` of an earlier answer): wait for it, up to 5 s.
    pub min_index: Option<u64>,
    /// With `consistency=stale`: refuse (503) if this server has not heard the leader for longer.
    pub max_staleness: Option<Span>,
}

/// What is asked of each copy.
#[derive(Clone)]
struct Asked {
    key: WorkloadKey,
    copy: Option<String>,
    since: Option<Timestamp>,
    tail: Option<u32>,
    follow: bool,
}

/// What the copies print, also those that have ended, merged in time order (NDJSON).
///
/// With `follow` a blank line is sent every 10 s of silence. A record whose `stream` is `optimus` is
/// ours: it says which copy's output is missing and why.
#[utoipa::path(get, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}/logs", tag = "workloads",
    operation_id = "workload_logs", params(LogsQuery),
    responses((status = 200, body = LogRecord, content_type = "application/x-ndjson")))]
pub(crate) async fn workload_logs(ctx: Ctx) -> Result<Response, ApiError> {
    let query: LogsQuery = ctx.query()?;
    let key = ctx.workload_key()?;
    if query.tail.is_some_and(|tail| tail > TAIL_MAX) {
        return Err(ApiError::bad_request(format!("query: tail is at most {TAIL_MAX}")));
    }
    let since = query.since.as_deref().map(|text| parse_since(text, ctx.store().env.clock.now())).transpose()?;
    let asked = Asked { key, copy: query.copy, since, tail: query.tail, follow: query.follow };
    let state =
        ctx.read(Freshness { consistency: query.consistency, min_index: query.min_index, max_staleness: query.max_staleness }).await?;
    workloads::row(&state, &asked.key)?;
    let copies = asked.copies(&state);
    if copies.len() > COPIES_MAX {
        let detail = format!("the workload has {} copies; at most {COPIES_MAX} can be read at once", copies.len());
        return Err(ApiError::bad_request(detail).hint("name one with copy="));
    }
    if copies.is_empty() && !asked.follow {
        return Err(ApiError::not_found(match &asked.copy {
            Some(copy) => format!("workload {} has no copy `{}`", asked.key, copy.chars().take(80).collect::<String>()),
            None => format!("workload {} has no copies yet", asked.key),
        }));
    }
    let place = ctx.begin_wait()?;
    let agents = ctx.shared.deps.agents.clone();
    let opened = open_all(&*agents, &asked, &copies).await;
    // Nothing to show at all: an error says it better than an empty stream.
    if !asked.follow
        && opened.iter().all(|(_, result)| result.is_err())
        && let Some((alloc, Err(error))) = opened.first()
    {
        let mut answer = ApiError::from(error.clone());
        answer.detail = format!("the output of {} cannot be read: {error}", alloc.name());
        return Err(answer);
    }
    let store = ctx.store().clone();
    Ok(ndjson::respond(&ctx, state.index, place, move |lines| run(lines, store, agents, asked, opened)))
}

fn parse_since(text: &str, now: Timestamp) -> Result<Timestamp, ApiError> {
    if let Ok(span) = text.parse::<Span>() {
        return Ok(now - span);
    }
    // A plus in a query means a space; nobody writes a space into a time zone.
    let at: Result<jiff::Timestamp, _> = text.replace(' ', "+").parse();
    let millis = at.ok().map(|at| at.as_millisecond().max(0) as u64);
    millis
        .map(Timestamp)
        .ok_or_else(|| ApiError::bad_request("query: since is neither a time (`2026-01-02T03:04:05Z`) nor a duration (`10m`)"))
}

impl Asked {
    fn copies(&self, state: &State) -> Vec<Arc<Alloc>> {
        let mut copies = allocations::of_workload(state, &self.key);
        copies.retain(|alloc| match self.copy.as_deref() {
            None => true,
            Some(wanted) => wanted == alloc.name() || wanted == alloc.index.to_string() || wanted == alloc.id.to_string(),
        });
        copies
    }

    fn request(&self, alloc: AllocId) -> LogRequest {
        LogRequest { alloc, since: self.since, tail: self.tail, follow: self.follow }
    }
}

type Opened = Result<mpsc::Receiver<LogChunk>, AgentCallError>;

async fn open(agents: &dyn AgentCalls, alloc: Arc<Alloc>, request: LogRequest) -> (Arc<Alloc>, Opened) {
    let answer = tokio::time::timeout(OPEN_TIMEOUT, agents.logs(alloc.node, request)).await;
    (alloc, answer.unwrap_or(Err(AgentCallError::TimedOut)))
}

async fn open_all(agents: &dyn AgentCalls, asked: &Asked, copies: &[Arc<Alloc>]) -> Vec<(Arc<Alloc>, Opened)> {
    let opening: FuturesUnordered<_> = copies.iter().map(|alloc| open(agents, alloc.clone(), asked.request(alloc.id))).collect();
    let mut opened: Vec<_> = opening.collect().await;
    opened.sort_by_key(|(alloc, _)| (alloc.index, alloc.id));
    opened
}

/// A copy that should be followed but is not open at the moment.
struct Closed {
    alloc: Arc<Alloc>,
    position: Option<(Timestamp, u32)>,
    again_at: Instant,
    /// Its absence has been remarked on.
    told: bool,
}

async fn run(lines: Lines, store: Store, agents: Arc<dyn AgentCalls>, asked: Asked, opened: Vec<(Arc<Alloc>, Opened)>) {
    let mut merge = Merge::new(if asked.follow { PATIENCE_FOLLOWING } else { PATIENCE });
    let mut names: BTreeMap<AllocId, String> = BTreeMap::new();
    let mut known: BTreeSet<AllocId> = BTreeSet::new();
    let mut closed: Vec<Closed> = Vec::new();
    for (alloc, result) in opened {
        names.insert(alloc.id, alloc.name());
        known.insert(alloc.id);
        match result {
            Ok(receiver) => merge.add(alloc.id, receiver, None),
            Err(error) => {
                if !lines.send([&remark(&store, &alloc, &error)]).await {
                    return;
                }
                closed.push(Closed { alloc, position: None, again_at: Instant::now() + REOPEN_PAUSE, told: true });
            }
        }
    }
    let mut applied = store.applied();
    let mut last_sent = Instant::now();
    let mut look_at = Instant::now() + LOOK;
    while asked.follow || !merge.is_empty() {
        let next = tokio::select! {
            biased;
            () = lines.ended() => return,
            next = merge.next(), if !merge.is_empty() => Some(next),
            () = tokio::time::sleep_until((last_sent + HEARTBEAT).min(look_at)), if asked.follow => None,
            changed = applied.changed(), if asked.follow => {
                if changed.is_err() {
                    return;
                }
                None
            }
        };
        match next {
            Some(Next::Lines(batch)) => {
                let records: Vec<LogRecord> = batch.into_iter().map(|(id, line)| record(&names, id, line)).collect();
                if !lines.send(&records).await {
                    return;
                }
                last_sent = Instant::now();
                continue;
            }
            Some(Next::Ended(source)) => {
                let state = store.state();
                if let Some(alloc) = state.allocs.get(&source.key).filter(|alloc| asked.follow && !alloc.has_ended()) {
                    let again_at = Instant::now() + REOPEN_PAUSE;
                    closed.push(Closed { alloc: alloc.clone(), position: source.position, again_at, told: false });
                    look_at = look_at.min(again_at);
                }
                continue;
            }
            Some(Next::Empty) | None => {}
        }
        if Instant::now() >= last_sent + HEARTBEAT {
            if !lines.heartbeat().await {
                return;
            }
            last_sent = Instant::now();
        }
        if !asked.follow {
            continue;
        }
        // Look at whole state: copies that came, copies to ask again, and whether anything can still come.
        let state = store.state();
        if !state.workloads.contains_key(&asked.key) && merge.is_empty() {
            return;
        }
        let now = Instant::now();
        for alloc in asked.copies(&state) {
            if known.len() < 4 * COPIES_MAX && known.insert(alloc.id) {
                names.insert(alloc.id, alloc.name());
                closed.push(Closed { alloc, position: None, again_at: now, told: false });
            }
        }
        let mut later = Vec::new();
        for mut copy in std::mem::take(&mut closed) {
            if copy.again_at > now || merge.len() >= COPIES_MAX {
                later.push(copy);
                continue;
            }
            if !state.allocs.contains_key(&copy.alloc.id) {
                continue;
            }
            let mut request = asked.request(copy.alloc.id);
            // After a break, from where it broke; of a new copy, everything.
            request.tail = None;
            request.since = copy.position.map(|(at, _)| at).or(asked.since);
            let (alloc, result) = open(&*agents, copy.alloc, request).await;
            match result {
                Ok(receiver) => merge.add(alloc.id, receiver, copy.position),
                Err(error) => {
                    if !copy.told && !lines.send([&remark(&store, &alloc, &error)]).await {
                        return;
                    }
                    copy.alloc = alloc;
                    copy.told = true;
                    copy.again_at = Instant::now() + REOPEN_PAUSE;
                    later.push(copy);
                }
            }
        }
        closed = later;
        let next_try = closed.iter().map(|copy| copy.again_at).min();
        look_at = next_try.unwrap_or(now + LOOK).min(now + LOOK).max(now + Duration::from_millis(50));
    }
}

fn record(names: &BTreeMap<AllocId, String>, id: AllocId, line: LogLine) -> LogRecord {
    LogRecord {
        at: line.at,
        copy: names.get(&id).cloned().unwrap_or_else(|| id.to_string()),
        stream: if line.stderr { "stderr" } else { "stdout" }.into(),
        text: line.text,
    }
}

fn remark(store: &Store, alloc: &Alloc, error: &AgentCallError) -> LogRecord {
    LogRecord { at: store.env.clock.now(), copy: alloc.name(), stream: REMARK.into(), text: format!("output not available: {error}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_is_a_time_or_a_span() {
        let now = Timestamp(1_000_000_000_000);
        assert!(matches!(parse_since("10m", now), Ok(at) if at == now - Span::secs(600)));
        assert!(matches!(parse_since("1970-01-01T00:00:05Z", now), Ok(Timestamp(5000))));
        assert!(matches!(parse_since("1970-01-01T01:00:05 01:00", now), Ok(Timestamp(5000))));
        assert!(matches!(parse_since("1960-01-01T00:00:05Z", now), Ok(Timestamp(0))));
        for bad in ["", "yesterday", "-5m", "99999-01-01T00:00:00Z"] {
            assert!(parse_since(bad, now).is_err(), "{bad}");
        }
    }
}
