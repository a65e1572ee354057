//! `optimus plan`

use std::fs;
use std::path::PathBuf;

use optimus_common::api::v1::{PlanAnswer, PlannedWorkload};

use crate::args::Global;
use crate::commands::{ScopeArgs, Session, deploy};
use crate::error::{Exit, Failure, printable};
use crate::output::{Terminal, count};

pub const EXAMPLES: &str = "Examples:
  optimus plan                        what a deploy of this directory would do
  optimus plan --out plan.json        and keep it
  optimus deploy --plan plan.json     do exactly that, or refuse";

/// Copies listed of one workload.
const MOVES_SHOWN: usize = 20;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory with an optimus.toml, or a project file
    #[arg(value_name = "DIR|FILE", default_value = ".")]
    path: PathBuf,
    #[command(flatten)]
    scope: ScopeArgs,
    /// Write the plan to a file, for `optimus deploy --plan`
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let request = deploy::request(&args.path, &args.scope, &terminal)?;
    let session = Session::open(global, &args.scope, terminal)?;
    let plan = session.client.post::<PlanAnswer>("/v1/plan", &request, "cannot plan the deploy").await?.value;
    if let Some(path) = &args.out {
        let failed = |why: String| Failure::new(Exit::Failed, format!("cannot write the plan to {}", path.display())).because(why);
        let text = serde_json::to_vec_pretty(&plan).map_err(|error| failed(error.to_string()))?;
        fs::write(path, text).map_err(|error| failed(error.to_string()))?;
    }
    if terminal.json {
        terminal.json_document(&plan)?;
        return Ok(());
    }
    for workload in &plan.workloads {
        show(workload, &terminal)?;
    }
    if plan.cut_short {
        terminal.note("the plan was not played through to its end; there would be more");
    }
    match &args.out {
        Some(path) => {
            terminal.note(&format!("nothing was deployed; `optimus deploy --plan {}` does exactly this, or refuses", path.display()))
        }
        None => terminal.note(&format!("nothing was deployed; planned at revision {}", plan.index)),
    }
    Ok(())
}

fn show(workload: &PlannedWorkload, terminal: &Terminal) -> Result<(), Failure> {
    let paint = terminal.stdout_paint();
    let PlannedWorkload { key, action, release, strategy, changes, placed, stopped, in_place, moves, waits, unplaced, .. } = workload;
    let action = action.replace('_', " ");
    if action == "unchanged" {
        terminal.line(&format!("{} {key}", paint.dim(&action)))?;
        return Ok(());
    }
    let copies = |n: &u32| count(u64::from(*n), "copy", "copies");
    let mut what = vec![format!("release {release}, {strategy}")];
    what.extend((*placed > 0).then(|| format!("places {}", copies(placed))));
    what.extend((*stopped > 0).then(|| format!("stops {}", copies(stopped))));
    what.extend((*in_place > 0).then(|| format!("changes {} in place", copies(in_place))));
    terminal.line(&format!("{} {key}: {}", paint.bold(&action), what.join("; ")))?;
    let brief = |value: &Option<String>| value.as_deref().map_or_else(|| "unset".to_owned(), printable);
    for change in changes {
        terminal.line(&format!("  {}: {} -> {}", change.field, paint.bad(&brief(&change.from)), paint.good(&brief(&change.to))))?;
    }
    for step in moves.iter().take(MOVES_SHOWN) {
        let node = step.node_name.clone().unwrap_or_else(|| step.node.to_string());
        let reason = step.reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
        terminal.line(&format!("  {} {} r{} on {node}{reason}", step.action.replace('_', " "), step.copy, step.release))?;
    }
    if moves.len() > MOVES_SHOWN {
        terminal.line(&format!("  and {} more", moves.len() - MOVES_SHOWN))?;
    }
    if let Some(reason) = waits {
        terminal.line(&format!("  {} {}", paint.busy("waits:"), printable(&reason.message)))?;
    }
    for reason in unplaced {
        terminal.line(&format!("  {} {}", paint.bad("no room:"), printable(reason)))?;
    }
    Ok(())
}
