//! Jobs and their runs.

use std::ops::Bound;
use std::sync::Arc;

use axum::response::Response;
use base64::Engine as _;
use optimus_common::api::v1::{Job, JobRun, Page, RunAnswer, RunRequest};
use optimus_common::{Name, RunId, Span, WorkloadKey};
use optimus_core::state::{self, Applied, Command, RunOrder, State};
use optimus_core::view;
use serde::Deserialize;
use utoipa::IntoParams;

use super::workloads::{WatchQuery, parse_key};
use super::{ReadQuery, actions};
use crate::api::context::{Consistency, Ctx, Freshness, to_json};
use crate::api::idempotency::{self, ChangeQuery, Identity, mark_replayed};
use crate::api::paging::PageRequest;
use crate::api::problem::ApiError;
use crate::api::{json, watch};

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct JobsQuery {
    /// Only this project.
    pub project: Option<Name>,
    /// Only environments of this name.
    pub environment: Option<Name>,
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

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct RunsQuery {
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

/// The jobs with their schedule and newest run, by project, environment and name.
#[utoipa::path(get, path = "/v1/jobs", tag = "jobs", operation_id = "list_jobs", params(JobsQuery),
    responses((status = 200, body = Page<Job>)))]
pub(crate) async fn list_jobs(ctx: Ctx) -> Result<Response, ApiError> {
    let JobsQuery { project, environment, page_size, page_token, consistency, min_index, max_staleness } = ctx.query()?;
    let request = PageRequest::new(page_size, page_token.as_deref(), format!("jobs {project:?} {environment:?}"))?;
    let after = request.after.as_deref().map(parse_key).transpose()?;
    let state = ctx.read(Freshness { consistency, min_index, max_staleness }).await?;
    let now = ctx.store().env.clock.now();
    let from = after.map_or(Bound::Unbounded, Bound::Excluded);
    // Every job has its row from its first look on; those of no interest cost a comparison.
    let rows = state.jobs.range((from, Bound::Unbounded)).filter_map(|(key, _)| state.workload(key)).filter(|row| {
        project.as_ref().is_none_or(|name| *name == row.key.project) && environment.as_ref().is_none_or(|name| *name == row.key.environment)
    });
    let (rows, next_page_token) = request.cut(rows, |row: &&Arc<state::Workload>| row.key.to_string());
    let items: Vec<Job> = rows.into_iter().filter_map(|row| view::job(&state, row, now)).collect();
    ctx.json(state.index, &Page { items, next_page_token, index: state.index })
}

fn the_job<'a>(state: &'a State, key: &WorkloadKey) -> Result<&'a Arc<state::Workload>, ApiError> {
    let row = state.workload(key).ok_or_else(|| ApiError::not_found(format!("there is no workload {key}")))?;
    let is_job = state.release(key, row.release).is_some_and(|r| r.spec.kind == optimus_common::spec::Kind::Job);
    if is_job { Ok(row) } else { Err(ApiError::conflict(format!("{key} is no job")).hint("`optimus jobs` lists the jobs")) }
}

/// The runs kept of a job, newest first.
#[utoipa::path(get, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}/runs", tag = "jobs", operation_id = "list_runs",
    params(RunsQuery), responses((status = 200, body = Page<JobRun>)))]
pub(crate) async fn list_runs(ctx: Ctx) -> Result<Response, ApiError> {
    let RunsQuery { page_size, page_token, consistency, min_index, max_staleness } = ctx.query()?;
    let key = ctx.workload_key()?;
    let request = PageRequest::new(page_size, page_token.as_deref(), format!("runs {key}"))?;
    let after: Option<u64> = request.after()?;
    let state = ctx.read(Freshness { consistency, min_index, max_staleness }).await?;
    the_job(&state, &key)?;
    let now = ctx.store().env.clock.now();
    let rows = state.runs_of(&key).rev().filter(|run| after.is_none_or(|after| run.number < after));
    let (rows, next_page_token) = request.cut(rows, |run: &&Arc<state::JobRun>| run.number.to_string());
    let items: Vec<JobRun> = rows.into_iter().map(|run| view::job_run(&state, run, now)).collect();
    ctx.json(state.index, &Page { items, next_page_token, index: state.index })
}

fn number(ctx: &Ctx) -> Result<u64, ApiError> {
    ctx.param("number")?.parse().map_err(|_| ApiError::bad_request("a run is named by its number, such as 12"))
}

fn the_run<'a>(state: &'a State, key: &WorkloadKey, number: u64) -> Result<&'a Arc<state::JobRun>, ApiError> {
    the_job(state, key)?;
    state.run(key, number).ok_or_else(|| {
        ApiError::not_found(format!("there is no run {number} of {key}; ended ones are kept for a while only"))
            .hint(format!("`optimus runs {key}` lists those that are kept"))
    })
}

/// One run. With `index` or If-None-Match, and `wait`: as soon as it changed.
#[utoipa::path(get, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}/runs/{number}", tag = "jobs",
    operation_id = "get_run", params(WatchQuery), responses((status = 200, body = JobRun)))]
pub(crate) async fn get_run(ctx: Ctx) -> Result<Response, ApiError> {
    let WatchQuery { index, wait, consistency, min_index, max_staleness } = ctx.query()?;
    let (key, number) = (ctx.workload_key()?, number(&ctx)?);
    let mut state = ctx.read(Freshness { consistency, min_index, max_staleness }).await?;
    let now = ctx.store().env.clock.now();
    if let Some(wait) = watch::wanted(index, wait, &ctx.parts.headers)? {
        let render = |state: &State| to_json(&view::job_run(state, the_run(state, &key, number)?, now));
        state = watch::changed(&ctx, state, wait, |subject| watch::is_about(subject, &key), render).await?;
    }
    ctx.object(state.index, &view::job_run(&state, the_run(&state, &key, number)?, now))
}

/// Start a run of a job. It waits when as many as may are active, and is refused (429) when as many as may wait.
#[utoipa::path(post, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}:run", tag = "jobs", operation_id = "start_run",
    params(ChangeQuery), request_body = RunRequest, responses((status = 200, body = RunAnswer)))]
pub(crate) async fn start_run(mut ctx: Ctx) -> Result<Response, ApiError> {
    let query: ChangeQuery = ctx.query()?;
    let key = ctx.workload_key()?;
    let body = ctx.take_body();
    let bytes = json::body_bytes(&ctx.parts.headers, body, true).await?;
    let RunRequest { params, payload } = if bytes.is_empty() { RunRequest::default() } else { json::parse(&bytes)? };
    let payload = match payload {
        Some(text) => {
            let decoded = base64::engine::general_purpose::STANDARD.decode(text);
            Some(Arc::new(decoded.map_err(|_| ApiError::bad_request("`payload` is not base64"))?))
        }
        None => None,
    };
    let identity = Identity::of(&ctx, &bytes)?;
    // A retry asks for the same run.
    let id = RunId(identity.id().0);
    let order = RunOrder { key: key.clone(), id, params, payload };
    let committed = idempotency::commit(&ctx, identity, &query, |_| Ok(Command::StartRun(order))).await?;
    let state = &committed.state;
    let Some(run) = state.runs_of(&key).rev().find(|run| run.id == id) else {
        return Err(ApiError::not_found(format!("the run of {key} this request started is no longer kept")));
    };
    answer(&ctx, &committed, run)
}

/// Cancel a run that waits or is active; its copies are stopped.
#[utoipa::path(post, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}/runs/{number}:cancel", tag = "jobs",
    operation_id = "cancel_run", params(ChangeQuery), responses((status = 200, body = RunAnswer)))]
pub(crate) async fn cancel_run(mut ctx: Ctx) -> Result<Response, ApiError> {
    let query: ChangeQuery = ctx.query()?;
    let (key, number) = (ctx.workload_key()?, number(&ctx)?);
    let bytes = actions::no_body(&mut ctx).await?;
    let identity = Identity::of(&ctx, &bytes)?;
    let command = Command::CancelRun { key: key.clone(), number };
    let committed = idempotency::commit(&ctx, identity, &query, |state| the_run(state, &key, number).map(|_| command)).await?;
    answer(&ctx, &committed, the_run(&committed.state, &key, number)?)
}

fn answer(ctx: &Ctx, committed: &idempotency::Committed, run: &state::JobRun) -> Result<Response, ApiError> {
    let index = idempotency::index_of(&committed.applied).unwrap_or(committed.state.index);
    let changed = matches!(committed.applied, Applied::Done { .. });
    let run = view::job_run(&committed.state, run, ctx.store().env.clock.now());
    let mut response = ctx.json(index, &RunAnswer { index, run, changed })?;
    mark_replayed(&mut response, committed.replayed);
    Ok(response)
}

/// One job.
#[utoipa::path(get, path = "/v1/projects/{project}/envs/{env}/workloads/{workload}/job", tag = "jobs", operation_id = "get_job",
    params(ReadQuery), responses((status = 200, body = Job)))]
pub(crate) async fn get_job(ctx: Ctx) -> Result<Response, ApiError> {
    let ReadQuery { consistency, min_index, max_staleness } = ctx.query()?;
    let key = ctx.workload_key()?;
    let state = ctx.read(Freshness { consistency, min_index, max_staleness }).await?;
    let job = view::job(&state, the_job(&state, &key)?, ctx.store().env.clock.now());
    ctx.object(state.index, &job.ok_or_else(|| ApiError::conflict(format!("{key} is no job")))?)
}
