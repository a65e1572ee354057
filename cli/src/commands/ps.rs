//! `optimus ps`

use optimus_common::api::v1::{Allocation, Page};

use crate::args::Global;
use crate::commands::{ScopeArgs, Session};
use crate::error::{Failure, printable};
use crate::live::painted_stage;
use crate::output::{Terminal, age, now};
use crate::target::{self, Scope};

pub const EXAMPLES: &str = "Examples:
  optimus ps                  copies of all workloads
  optimus ps web --all        of one, with those that have ended
  optimus ps --env prod";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// `web`, `env/web`, `project/env/web`, or a copy such as `web-0`
    workload: Option<String>,
    /// Also copies that have ended
    #[arg(long, short)]
    all: bool,
    #[command(flatten)]
    scope: ScopeArgs,
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let what = "cannot list the copies";
    let (session, _) = Session::open(global, &args.scope, terminal)?.or_stale(what).await?;
    let mut scope = session.scope.clone();
    let (mut workload, mut copy_named) = (None, None);
    if let Some(text) = &args.workload {
        let found = target::resolve(&session.client, text, &session.scope, &session.defaults).await?;
        scope = Scope { project: Some(found.key.project), environment: Some(found.key.environment) };
        (workload, copy_named) = (Some(found.key.workload), found.copy);
    }
    let mut query = scope.query();
    query.extend(workload.map(|workload| ("workload", workload.to_string())));
    query.extend(args.all.then(|| ("all", "true".to_owned())));
    let Page { mut items, index, .. } = session.client.list::<Allocation>("/v1/allocations", &query, what).await?;
    items.retain(|copy| copy_named.as_ref().is_none_or(|named| copy.name == named.as_str()));
    items.sort_by(|a, b| (&a.key, a.index, a.created_at).cmp(&(&b.key, b.index, b.created_at)));
    if terminal.json {
        terminal.json_document(&Page { items, next_page_token: None, index })?;
        return Ok(());
    }
    if items.is_empty() {
        terminal.note("no copies");
        return Ok(());
    }
    let (now, paint) = (now(), terminal.stdout_paint());
    let rows = items
        .iter()
        .map(|copy| {
            vec![
                copy.name.clone(),
                format!("{}/{}", copy.key.project, copy.key.environment),
                painted_stage(copy, paint, 0),
                copy.release.to_string(),
                copy.node_name.clone().unwrap_or_else(|| "-".to_owned()),
                copy.endpoint.clone().unwrap_or_else(|| "-".to_owned()),
                copy.restarts.to_string(),
                age(now.since(copy.started_at.unwrap_or(copy.created_at))),
                copy.reason.as_ref().filter(|_| !copy.ready).map(|reason| printable(&reason.message)).unwrap_or_default(),
            ]
        })
        .collect();
    terminal.table(&["COPY", "IN", "STAGE", "RELEASE", "NODE", "ENDPOINT", "RESTARTS", "AGE", "WHY"], rows)?;
    for copy in items.iter().filter(|copy| !copy.unenforced.is_empty()).take(3) {
        terminal.note(&format!("{} {}: not enforced: {}", terminal.stderr_paint().busy("warning:"), copy.name, copy.unenforced.join(", ")));
    }
    Ok(())
}
