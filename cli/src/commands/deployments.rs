//! `optimus deployments`

use optimus_common::DeploymentId;
use optimus_common::api::v1::{Deployment, DeploymentPhase, Page, TrafficSide, TrafficView};

use crate::args::Global;
use crate::commands::{ScopeArgs, Session};
use crate::error::{Failure, printable};
use crate::live::headline;
use crate::output::{Paint, Terminal, age, now};
use crate::target::{self, Scope};

pub const EXAMPLES: &str = "Examples:
  optimus deployments                 the newest of all workloads
  optimus deployments list web        of one
  optimus deployments show 0198c1f2-7e1e-7bb4-8b1a-3c0d7f0e4a11";

/// Rows shown unless `--all`.
const SHOWN: usize = 20;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// List deployments, newest first
    #[command(before_help = "Examples:\n  optimus deployments list web --all")]
    List {
        /// `web`, `env/web` or `project/env/web`
        workload: Option<String>,
        /// All that are kept, not only the newest 20
        #[arg(long, short)]
        all: bool,
        #[command(flatten)]
        scope: ScopeArgs,
    },
    /// Show one: its phase, steps, deadline and reason
    #[command(before_help = "Examples:\n  optimus deployments show 0198c1f2-7e1e-7bb4-8b1a-3c0d7f0e4a11")]
    Show { id: DeploymentId },
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    match &args.what {
        None => list(&Session::open(global, &ScopeArgs::default(), terminal)?, None, false).await,
        Some(What::List { workload, all, scope }) => list(&Session::open(global, scope, terminal)?, workload.as_deref(), *all).await,
        Some(What::Show { id }) => show(&Session::open(global, &ScopeArgs::default(), terminal)?, *id).await,
    }
}

async fn list(session: &Session, workload: Option<&str>, all: bool) -> Result<(), Failure> {
    let terminal = session.terminal;
    let mut scope = session.scope.clone();
    let mut name = None;
    if let Some(text) = workload {
        let found = target::resolve(&session.client, text, &session.scope, &session.defaults).await?;
        scope = Scope { project: Some(found.key.project), environment: Some(found.key.environment) };
        name = Some(found.key.workload);
    }
    let mut query = scope.query();
    query.extend(name.map(|name| ("workload", name.to_string())));
    let what = "cannot list the deployments";
    let page: Page<Deployment> = if all {
        session.client.list("/v1/deployments", &query, what).await?
    } else {
        query.push(("page_size", SHOWN.to_string()));
        session.client.get("/v1/deployments", &query, what).await?.value
    };
    if terminal.json {
        terminal.json_document(&page)?;
        return Ok(());
    }
    if page.items.is_empty() {
        terminal.note("no deployments");
        return Ok(());
    }
    let (now, paint) = (now(), terminal.stdout_paint());
    let rows = page
        .items
        .iter()
        .map(|d| {
            vec![
                d.key.to_string(),
                d.release.to_string(),
                phase(d, paint),
                d.strategy.clone(),
                format!("{}/{}", d.ready, d.wanted),
                d.trigger.clone(),
                age(now.since(d.created_at)),
                d.id.to_string(),
                d.reason.as_ref().map(|r| printable(&r.message)).unwrap_or_default(),
            ]
        })
        .collect();
    terminal.table(&["WORKLOAD", "RELEASE", "PHASE", "STRATEGY", "READY", "BY", "AGE", "ID", "REASON"], rows)?;
    Ok(())
}

fn phase(deployment: &Deployment, paint: Paint) -> String {
    let word = if deployment.paused { format!("{} (paused)", deployment.phase.word()) } else { deployment.phase.word().to_owned() };
    match deployment.phase {
        DeploymentPhase::Succeeded => paint.good(&word),
        DeploymentPhase::Failed | DeploymentPhase::RolledBack | DeploymentPhase::RollingBack => paint.bad(&word),
        DeploymentPhase::Superseded | DeploymentPhase::Cancelled => paint.dim(&word),
        _ => paint.busy(&word),
    }
}

async fn show(session: &Session, id: DeploymentId) -> Result<(), Failure> {
    let terminal = session.terminal;
    let deployment: Deployment = session.client.get(&format!("/v1/deployments/{id}"), &[], "cannot show the deployment").await?.value;
    if terminal.json {
        terminal.json_document(&deployment)?;
        return Ok(());
    }
    let now = now();
    terminal.line(&headline(&deployment))?;
    terminal.line(&format!("phase     {}", phase(&deployment, terminal.stdout_paint())))?;
    if let Some(since) = deployment.since {
        terminal.line(&format!("since     {since} ({} ago)", age(now.since(since))))?;
    }
    if let Some(deadline) = deployment.deadline_at {
        terminal.line(&format!("until     {deadline} at most"))?;
    }
    terminal.line(&format!("strategy  {}", deployment.strategy))?;
    for (n, step) in deployment.steps.iter().enumerate() {
        terminal.line(&format!("step {}    {} % for {}: {}", n + 1, step.weight, step.bake, step.status))?;
    }
    if let Some(TrafficView { new, old }) = deployment.traffic {
        let said = |side: TrafficSide| format!("{} requests, {} failed", side.requests, side.errors);
        terminal.line(&format!("traffic   new: {}; old: {}", said(new), said(old)))?;
    }
    if let Some(reason) = &deployment.reason {
        terminal.line(&format!("reason    {} ({})", printable(&reason.message), reason.code))?;
    }
    Ok(())
}
