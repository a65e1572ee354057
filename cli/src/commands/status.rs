//! `optimus status`

use optimus_common::api::v1::{ClusterStatus, Page, ReasonView, Workload, WorkloadPhase};

use crate::args::Global;
use crate::commands::{ScopeArgs, Session};
use crate::error::{Failure, printable};
use crate::output::{Paint, Terminal, age, now};

pub const EXAMPLES: &str = "Examples:
  optimus status
  optimus status --project shop --env prod
  optimus status --json";

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    scope: ScopeArgs,
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let what = "cannot read the status";
    let (session, status) = Session::open(global, &args.scope, terminal)?.or_stale(what).await?;
    let workloads: Page<Workload> = session.client.list("/v1/workloads", &session.scope.query(), what).await?;
    if terminal.json {
        terminal.json_document(&serde_json::json!({ "status": status, "workloads": workloads.items }))?;
        return Ok(());
    }
    let paint = terminal.stdout_paint();
    let ClusterStatus { servers, nodes_up, nodes_down, leader, summary, .. } = &status;
    terminal.line(&paint.bold(&printable(summary)))?;
    let down = if *nodes_down > 0 { paint.bad(&format!("{nodes_down} down")) } else { "0 down".to_owned() };
    let leader = leader.map_or_else(|| paint.bad("no leader"), |leader| format!("leader {leader}"));
    terminal.line(&format!("servers {servers} ({leader})   nodes {nodes_up} up, {down}   {}", paint.dim(session.client.url())))?;
    if workloads.items.is_empty() {
        terminal.note("no workloads yet: write a project file with `optimus init`, then `optimus deploy`");
        return Ok(());
    }
    terminal.line("")?;
    let now = now();
    let rows = workloads.items.iter().map(|workload| row(workload, age(now.since(workload.updated_at)), paint)).collect();
    terminal.table(&["WORKLOAD", "PHASE", "READY", "RELEASE", "RESTARTS", "CHANGED", "ENDPOINT", "WHY"], rows)?;
    Ok(())
}

fn row(workload: &Workload, changed: String, paint: Paint) -> Vec<String> {
    let phase = match workload.phase {
        WorkloadPhase::Ready => paint.good("ready"),
        WorkloadPhase::Deploying => paint.busy("deploying"),
        WorkloadPhase::Degraded => paint.bad("degraded"),
        WorkloadPhase::Stopped => paint.dim("stopped"),
    };
    let endpoint = match workload.endpoints.as_slice() {
        [] => "-".to_owned(),
        [one] => one.clone(),
        [first, rest @ ..] => format!("{first} +{}", rest.len()),
    };
    vec![
        workload.key.to_string(),
        phase,
        format!("{}/{}", workload.copies_ready, workload.copies_wanted),
        workload.release.to_string(),
        workload.restarts.to_string(),
        changed,
        endpoint,
        workload.reason.as_ref().map(why).unwrap_or_default(),
    ]
}

/// The code first: it is what `optimus explain` takes.
fn why(reason: &ReasonView) -> String {
    if reason.detail.is_calm() {
        printable(&reason.message)
    } else {
        format!("{}: {}", printable(&reason.code), printable(&reason.message))
    }
}
