//! `optimus deploy`

use std::path::{Path, PathBuf};
use std::time::Duration;

use optimus_common::api::v1::{DeployAnswer, DeployRequest, Deployment, PlanAnswer, Workload};
use optimus_common::spec::ProjectSpec;
use optimus_common::{DeploymentId, WorkloadKey};
use serde_json::Value;

use crate::args::Global;
use crate::commands::{ScopeArgs, Session, WaitArgs};
use crate::error::{Exit, Failure};
use crate::live::headline;
use crate::output::{Terminal, count, now, took};
use crate::project::Source;
use crate::{follow, target};

pub const EXAMPLES: &str = "Examples:
  optimus deploy                          this directory, and wait until all copies are ready
  optimus deploy shop --env prod          another directory, its prod environment
  optimus deploy --dry-run                what would change
  optimus deploy --resume DEPLOYMENT      follow one that is under way";

/// Most differences of one workload listed by `--dry-run`.
const DIFFERENCES_MAX: usize = 30;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory with an optimus.toml, or a project file
    #[arg(value_name = "DIR|FILE", default_value = ".")]
    path: PathBuf,
    #[command(flatten)]
    scope: ScopeArgs,
    #[command(flatten)]
    wait: WaitArgs,
    /// Show what would change and deploy nothing
    #[arg(long, conflicts_with_all = ["no_wait", "timeout"])]
    dry_run: bool,
    /// Do exactly what a plan says that `optimus plan --out FILE` wrote, or refuse
    #[arg(long, value_name = "FILE", conflicts_with_all = ["path", "dry_run", "resume", "project", "environment"])]
    plan: Option<PathBuf>,
    /// Refuse if a workload of the file changed after this revision
    #[arg(long, value_name = "REVISION", conflicts_with_all = ["plan", "resume"])]
    if_revision: Option<u64>,
    /// Follow deployments that are under way, by id, and deploy nothing
    #[arg(long, value_name = "DEPLOYMENT", value_delimiter = ',', conflicts_with_all = ["path", "dry_run", "no_wait", "project", "environment"])]
    resume: Vec<DeploymentId>,
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    if !args.resume.is_empty() {
        let session = Session::open(global, &args.scope, terminal)?;
        return resume(&session, &args.resume, args.wait.limit()).await;
    }
    // The file is checked before anything is sent, and without a server.
    let request = match &args.plan {
        Some(path) => planned(path)?,
        None => DeployRequest { if_revision: args.if_revision, ..request(&args.path, &args.scope, &terminal)? },
    };
    let session = Session::open(global, &args.scope, terminal)?;
    if args.dry_run {
        return dry_run(&session, &request).await;
    }
    deploy(&session, &request, args.wait.limit()).await
}

/// What a file of `optimus plan --out` holds.
fn planned(path: &Path) -> Result<DeployRequest, Failure> {
    let failed = |why: String| Failure::new(Exit::Usage, format!("cannot read the plan {}", path.display())).because(why);
    let text = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
    let plan: PlanAnswer = serde_json::from_slice(&text).map_err(|error| failed(error.to_string()))?;
    Ok(DeployRequest { spec: plan.spec, source: None, if_revision: None, if_plan: Some(plan.digest) })
}

/// Deploys `paths` one after the other and waits for each, as `optimus deploy PATH` would.
///
/// # Errors
/// Those of the first that fails; the later ones are not deployed.
pub async fn deploy_paths(session: &Session, paths: &[PathBuf], limit: Option<Duration>) -> Result<(), Failure> {
    for path in paths {
        let request = request(path, &ScopeArgs::default(), &session.terminal)?;
        deploy(session, &request, limit).await?;
    }
    Ok(())
}

/// Reads and checks a project file.
pub fn request(path: &Path, scope: &ScopeArgs, terminal: &Terminal) -> Result<DeployRequest, Failure> {
    let source = Source::read(path)?;
    let parsed = source.parse(scope.environment.as_ref(), scope.project.as_ref())?;
    for warning in &parsed.warnings {
        terminal.note(&format!("{} {warning}", terminal.stderr_paint().busy("warning:")));
    }
    Ok(DeployRequest { spec: parsed.spec, source: Some(source.text), if_revision: None, if_plan: None })
}

async fn deploy(session: &Session, request: &DeployRequest, limit: Option<Duration>) -> Result<(), Failure> {
    let ProjectSpec { project, environment, workloads } = &request.spec;
    let what = format!("cannot deploy {project} to {environment}");
    let answer = session.client.post::<DeployAnswer>("/v1/deploy", request, &what).await?;
    let request_id = answer.request_id;
    let mut answer = answer.value;
    for key in &answer.unchanged {
        session.terminal.note(&format!("{key}: already as the file says"));
    }
    let Some(limit) = limit else {
        return started(session, &answer);
    };
    // A workload that is as the file says may still be on its way there.
    let mut deployments = answer.deployments.clone();
    for key in &answer.unchanged {
        let workload = session.client.get::<Workload>(&target::path(key), &[], &what).await?.value;
        deployments.extend(workload.deployment.filter(|deployment| !deployment.phase.is_final()));
    }
    let ended = finish(session, deployments, answer.index, limit, request_id.as_deref()).await;
    let (Ok(last_seen) | Err((_, last_seen))) = &ended;
    for deployment in &mut answer.deployments {
        if let Some(end) = last_seen.iter().find(|end| end.id == deployment.id) {
            *deployment = end.clone();
        }
    }
    if session.terminal.json {
        session.terminal.json_document(&answer)?;
    }
    ended.map_err(|(failure, _)| failure)?;
    if !session.terminal.json {
        let keys: Vec<WorkloadKey> = workloads
            .keys()
            .map(|workload| WorkloadKey { project: project.clone(), environment: environment.clone(), workload: workload.clone() })
            .collect();
        print_endpoints(session, &keys).await?;
    }
    Ok(())
}

/// `--no-wait`: what was started.
fn started(session: &Session, answer: &DeployAnswer) -> Result<(), Failure> {
    if session.terminal.json {
        session.terminal.json_document(answer)?;
        return Ok(());
    }
    for deployment in &answer.deployments {
        session.terminal.line(&format!("{} {}", deployment.key, deployment.id))?;
    }
    if !answer.deployments.is_empty() {
        let ids: Vec<String> = answer.deployments.iter().map(|deployment| deployment.id.to_string()).collect();
        session.terminal.note(&format!("started; follow with `optimus deploy --resume {}`", ids.join(",")));
    }
    Ok(())
}

/// Follows to the end; all failures but the first are printed here.
async fn finish(
    session: &Session,
    deployments: Vec<Deployment>,
    index: u64,
    limit: Duration,
    request_id: Option<&str>,
) -> Result<Vec<Deployment>, (Failure, Vec<Deployment>)> {
    let ended = follow::to_the_end(session, deployments, index, Some(limit)).await.map_err(|failure| (failure, Vec::new()))?;
    let mut failures = Vec::new();
    for progress in ended.values() {
        let deployment = &progress.deployment;
        match follow::failure(&session.client, progress, request_id).await {
            Some(failure) => failures.push(failure),
            None if !deployment.phase.is_final() => {
                let next = if deployment.paused { "resume" } else { "promote" };
                session.terminal.note(&format!(
                    "{}\n  hint: `optimus {next} {}` lets it go on, `optimus abort` calls it off",
                    headline(deployment),
                    deployment.key
                ));
            }
            None => {
                let time = took(deployment.ended_at.unwrap_or_else(now).since(deployment.created_at));
                let copies = count(deployment.ready.into(), "copy", "copies");
                let paint = session.terminal.stderr_paint();
                session.terminal.note(&format!(
                    "{} {} release {}: {copies} ready in {time}",
                    paint.good("deployed"),
                    deployment.key,
                    deployment.release
                ));
            }
        }
    }
    let ended: Vec<Deployment> = ended.into_values().map(|progress| progress.deployment).collect();
    let Some(last) = failures.pop() else { return Ok(ended) };
    for failure in &failures {
        failure.print(&session.terminal);
    }
    Err((last, ended))
}

/// Where the workloads answer now.
async fn print_endpoints(session: &Session, keys: &[WorkloadKey]) -> Result<(), Failure> {
    for key in keys {
        let workload = session.client.get::<Workload>(&target::path(key), &[], "cannot read the endpoints").await?.value;
        for endpoint in workload.endpoints {
            session.terminal.line(&format!("{key} {endpoint}"))?;
        }
    }
    Ok(())
}

async fn resume(session: &Session, ids: &[DeploymentId], limit: Option<Duration>) -> Result<(), Failure> {
    let mut deployments = Vec::new();
    let mut index = 0;
    for id in ids {
        let answer =
            session.client.get::<Deployment>(&format!("/v1/deployments/{id}"), &[], &format!("cannot follow deployment {id}")).await?;
        index = answer.index.unwrap_or(index).max(index);
        deployments.push(answer.value);
    }
    let keys: Vec<WorkloadKey> = deployments.iter().map(|deployment| deployment.key.clone()).collect();
    let limit = limit.unwrap_or(super::WAIT_DEFAULT);
    let ended = finish(session, deployments, index, limit, None).await;
    let (Ok(last_seen) | Err((_, last_seen))) = &ended;
    if session.terminal.json {
        session.terminal.json_document(&DeployAnswer { deployments: last_seen.clone(), unchanged: Vec::new(), index })?;
    }
    ended.map_err(|(failure, _)| failure)?;
    if !session.terminal.json {
        print_endpoints(session, &keys).await?;
    }
    Ok(())
}

/// What the server would do, and in which fields the file differs from what it holds.
async fn dry_run(session: &Session, request: &DeployRequest) -> Result<(), Failure> {
    let what = "cannot rehearse the deploy";
    // The server runs the very checks of a deploy, on a copy of its state.
    let answer = session.client.post_query::<DeployAnswer>("/v1/deploy", &[("dry_run", "true".into())], request, what).await?.value;
    let mut plan = Vec::new();
    let ProjectSpec { project, environment, workloads } = &request.spec;
    for (workload, wanted) in workloads {
        let key = WorkloadKey { project: project.clone(), environment: environment.clone(), workload: workload.clone() };
        let held = match session.client.get::<Workload>(&target::path(&key), &[], what).await {
            Ok(answer) => Some(answer.value),
            Err(failure) if failure.exit == Exit::NotFound => None,
            Err(failure) => return Err(failure),
        };
        let json = |value| serde_json::to_value(value).map_err(|error| Failure::new(Exit::Failed, what).because(error.to_string()));
        let mut changes = Vec::new();
        if let Some(held) = &held {
            let mut wanted = wanted.clone();
            let mut spec = held.spec.clone();
            // The number may have been scaled since; a file that names none leaves it.
            spec.copies = Some(held.copies_wanted);
            wanted.copies = wanted.copies.or(spec.copies);
            differences("", &json(&spec)?, &json(&wanted)?, &mut changes);
        }
        let verdict = match held {
            None => "new",
            Some(_) if answer.unchanged.contains(&key) => "unchanged",
            Some(_) => "changed",
        };
        plan.push((key, verdict, changes));
    }
    if session.terminal.json {
        let items: Vec<Value> = plan
            .iter()
            .map(|(key, verdict, changes)| {
                let changes: Vec<Value> =
                    changes.iter().map(|(field, from, to)| serde_json::json!({"field": field, "from": from, "to": to})).collect();
                serde_json::json!({"workload": key.to_string(), "verdict": verdict, "changes": changes})
            })
            .collect();
        session.terminal.json_document(&serde_json::json!({ "items": items }))?;
        return Ok(());
    }
    let paint = session.terminal.stdout_paint();
    for (key, verdict, changes) in &plan {
        session.terminal.line(&format!("{} {key}", paint.bold(verdict)))?;
        for (field, from, to) in changes.iter().take(DIFFERENCES_MAX) {
            session.terminal.line(&format!("  {field}: {} -> {}", paint.bad(&brief(from)), paint.good(&brief(to))))?;
        }
        if changes.len() > DIFFERENCES_MAX {
            session.terminal.line(&format!("  and {} more", changes.len() - DIFFERENCES_MAX))?;
        }
    }
    session.terminal.note("dry run: nothing was deployed");
    Ok(())
}

/// Leaves that differ, as dotted fields.
fn differences(field: &str, from: &Value, to: &Value, found: &mut Vec<(String, Value, Value)>) {
    match (from, to) {
        (Value::Object(from), Value::Object(to)) => {
            let mut names: Vec<&String> = from.keys().chain(to.keys().filter(|name| !from.contains_key(*name))).collect();
            names.sort();
            for name in names {
                let path = if field.is_empty() { name.clone() } else { format!("{field}.{name}") };
                differences(&path, from.get(name).unwrap_or(&Value::Null), to.get(name).unwrap_or(&Value::Null), found);
            }
        }
        (from, to) if from == to => {}
        (from, to) => found.push((field.to_owned(), from.clone(), to.clone())),
    }
}

/// A value on a line.
fn brief(value: &Value) -> String {
    match value {
        Value::Null => "unset".to_owned(),
        value => crate::error::printable(&value.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn differences_are_named_by_their_field() {
        let mut found = Vec::new();
        let from = json!({"a": {"b": 1, "c": 2}, "gone": true, "same": [1]});
        let to = json!({"a": {"b": 1, "c": 3}, "new": "x", "same": [1]});
        differences("", &from, &to, &mut found);
        let lines: Vec<String> = found.iter().map(|(field, from, to)| format!("{field}: {} -> {}", brief(from), brief(to))).collect();
        assert_eq!(lines, ["a.c: 2 -> 3", "gone: true -> unset", "new: unset -> \"x\""]);
    }
}
