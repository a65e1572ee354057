//! What a deploy would do, and deploys bound to that.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::response::Response;
use optimus_common::api::v1::{DeployRequest, PlanAnswer, PlannedMove, PlannedWorkload, ReasonView, SpecChange};
use optimus_common::spec::{ProjectSpec, WorkloadSpec};
use optimus_common::{DeploymentId, Name, Timestamp, WorkloadKey};
use optimus_core::deployments::{Action, Planned, What, plan_deploy};
use optimus_core::state::State;
use optimus_core::state::command::DeployItem;
use serde_json::Value;

use super::deploy::check;
use crate::api::context::{Ctx, Freshness, to_json};
use crate::api::json;
use crate::api::problem::ApiError;

/// Most moves of one workload that are listed; all are counted.
const MOVES_SHOWN: usize = 1000;
/// Most fields of one workload that are listed.
const CHANGES_SHOWN: usize = 200;

/// What a deploy of this project file would do: which copies come and go, where and why. Changes nothing.
///
/// A deploy with the `digest` of the answer as `if_plan` does exactly that, or is refused.
#[utoipa::path(post, path = "/v1/plan", tag = "workloads", operation_id = "plan", request_body = DeployRequest,
    responses((status = 200, body = PlanAnswer)))]
pub(crate) async fn plan(mut ctx: Ctx) -> Result<Response, ApiError> {
    let body = ctx.take_body();
    let bytes = json::body_bytes(&ctx.parts.headers, body, false).await?;
    let request: DeployRequest = json::parse(&bytes)?;
    check(&request)?;
    let state = ctx.read(Freshness { consistency: None, min_index: None, max_staleness: None }).await?;
    let now = ctx.store().env.clock.now();
    let answer = planned(&state, &request.spec, request.source.as_deref(), now)?;
    ctx.json(state.index, &answer)
}

/// Plays a deploy through on a state.
pub(crate) fn planned(state: &State, spec: &ProjectSpec, source: Option<&str>, now: Timestamp) -> Result<PlanAnswer, ApiError> {
    let source: Option<Arc<str>> = source.map(Into::into);
    let key =
        |workload: &Name| WorkloadKey { project: spec.project.clone(), environment: spec.environment.clone(), workload: workload.clone() };
    let items = spec.workloads.iter().enumerate().map(|(n, (workload, spec))| DeployItem {
        key: key(workload),
        spec: Arc::new(spec.clone()),
        source: source.clone(),
        // It ends with the play.
        deployment: DeploymentId(uuid::Uuid::from_u128(n as u128)),
    });
    let plan = plan_deploy(state, items.collect(), now)?;
    let workloads: Vec<PlannedWorkload> = plan.workloads.iter().map(|planned| shown(state, planned, &spec.workloads)).collect();
    let digest = blake3::hash(&to_json(&(&workloads, plan.cut_short, spec))?).to_hex().to_string();
    Ok(PlanAnswer { index: plan.index, digest, cut_short: plan.cut_short, workloads, spec: spec.clone() })
}

fn shown(state: &State, planned: &Planned, specs: &BTreeMap<Name, WorkloadSpec>) -> PlannedWorkload {
    let Planned { key, action, release, moves, waits, unplaced } = planned;
    let held = state.workload(key);
    let strategy = specs.get(&key.workload).map(|spec| spec.update.strategy.word()).unwrap_or_default();
    let mut changes = Vec::new();
    if let (Some(workload), Some(wanted)) = (held, specs.get(&key.workload))
        && let Some(release) = state.release(key, workload.release)
    {
        // The number may have been scaled since; a file that names none leaves it.
        let old = WorkloadSpec { copies: Some(workload.copies), ..(*release.spec).clone() };
        let new = WorkloadSpec { copies: wanted.copies.or(old.copies), ..wanted.clone() };
        let json = |spec: &WorkloadSpec| serde_json::to_value(spec).unwrap_or(Value::Null);
        differences("", &json(&old), &json(&new), &mut changes);
        changes.truncate(CHANGES_SHOWN);
    }
    let listed = moves.iter().take(MOVES_SHOWN).map(|m| PlannedMove {
        copy: match m.what {
            What::ReleaseCommand => format!("{}-release", key.workload),
            _ => format!("{}-{}", key.workload, m.slot),
        },
        action: match m.what {
            What::Place => "place",
            What::Stop(_) => "stop",
            What::Adopt => "in_place",
            What::ReleaseCommand => "release_command",
        }
        .into(),
        release: m.release,
        node: m.node,
        node_name: state.nodes.get(&m.node).map(|n| n.facts.name.clone()),
        reason: match &m.what {
            What::Stop(reason) => Some(reason.to_string()),
            _ => None,
        },
    });
    let count = |wanted: fn(&What) -> bool| moves.iter().filter(|m| wanted(&m.what)).count() as u32;
    PlannedWorkload {
        key: key.clone(),
        action: match action {
            Action::Create => "create",
            Action::Update => "update",
            Action::InPlace => "in_place",
            Action::Unchanged => "unchanged",
        }
        .into(),
        release: *release,
        revision: held.map(|w| w.revision),
        strategy: strategy.into(),
        changes,
        placed: count(|what| matches!(what, What::Place)),
        stopped: count(|what| matches!(what, What::Stop(_))),
        in_place: count(|what| matches!(what, What::Adopt)),
        moves: listed.collect(),
        waits: waits.as_ref().map(ReasonView::from),
        unplaced: unplaced.iter().map(|(slot, reason)| format!("{}-{slot}: {reason}", key.workload)).collect(),
    }
}

/// Leaves that differ, as dotted fields.
fn differences(field: &str, from: &Value, to: &Value, found: &mut Vec<SpecChange>) {
    if let (Value::Object(from), Value::Object(to)) = (from, to) {
        let mut names: Vec<&String> = from.keys().chain(to.keys().filter(|name| !from.contains_key(*name))).collect();
        names.sort();
        for name in names {
            let path = if field.is_empty() { name.clone() } else { format!("{field}.{name}") };
            differences(&path, from.get(name).unwrap_or(&Value::Null), to.get(name).unwrap_or(&Value::Null), found);
        }
    } else if from != to {
        let text = |value: &Value| (!value.is_null()).then(|| value.to_string());
        found.push(SpecChange { field: field.to_owned(), from: text(from), to: text(to) });
    }
}
