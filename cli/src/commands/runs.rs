//! `optimus runs`

use optimus_common::api::v1::{JobRun, Page, RunAnswer, RunPhase, RunTrigger};

use crate::args::Global;
use crate::commands::run::word;
use crate::commands::scale::workload_only;
use crate::commands::{ScopeArgs, Session};
use crate::error::{Failure, printable};
use crate::output::{Terminal, age, now, took};
use crate::target;

pub const EXAMPLES: &str = "Examples:
  optimus runs report                list the runs of a job, newest first
  optimus runs report --cancel 12    cancel one that waits or is active";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// `report`, `env/report` or `project/env/report`
    job: String,
    /// Cancel the run of this number
    #[arg(long, value_name = "NUMBER")]
    cancel: Option<u64>,
    #[command(flatten)]
    scope: ScopeArgs,
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let session = Session::open(global, &args.scope, terminal)?;
    let key = workload_only(&session, &args.job, "runs").await?;
    let path = target::path(&key);
    if let Some(number) = args.cancel {
        let at = format!("{path}/runs/{number}:cancel");
        let answer = session.client.post::<RunAnswer>(&at, &serde_json::json!({}), &format!("cannot cancel run {number} of {key}")).await?;
        if terminal.json {
            terminal.json_document(&answer.value)?;
        }
        terminal.note(&format!("run {number} of {key} is cancelled"));
        return Ok(());
    }
    let runs: Page<JobRun> = session.client.list(&format!("{path}/runs"), &[], "cannot list the runs").await?;
    if terminal.json {
        terminal.json_document(&runs)?;
        return Ok(());
    }
    if runs.items.is_empty() {
        terminal.note(&format!("{key} has not run yet; `optimus run {key}` starts it"));
        return Ok(());
    }
    let (now, paint) = (now(), terminal.stdout_paint());
    let rows = runs
        .items
        .iter()
        .map(|run| {
            let phase = match run.phase {
                RunPhase::Succeeded => paint.good(word(run.phase)),
                RunPhase::Failed => paint.bad(word(run.phase)),
                RunPhase::Waiting | RunPhase::Active => paint.busy(word(run.phase)),
                RunPhase::Cancelled => paint.dim(word(run.phase)),
            };
            let trigger = match run.trigger {
                RunTrigger::Schedule => "schedule",
                RunTrigger::Deploy => "deploy",
                RunTrigger::Request => "request",
            };
            let lasted = run.started_at.map_or_else(|| "-".to_owned(), |at| took(run.ended_at.unwrap_or(now).since(at)));
            vec![
                run.number.to_string(),
                phase,
                trigger.to_owned(),
                run.scheduled_local.clone().unwrap_or_else(|| "-".to_owned()),
                age(now.since(run.created_at)),
                lasted,
                format!("{}/{}", run.copies_done, run.copies_wanted),
                run.failures.to_string(),
                run.exit.map_or_else(|| "-".to_owned(), |code| code.to_string()),
                run.reason.as_ref().map(|r| printable(&r.message)).unwrap_or_default(),
            ]
        })
        .collect();
    terminal.table(&["RUN", "PHASE", "TRIGGER", "DUE", "AGE", "TOOK", "DONE", "FAILED", "EXIT", "WHY"], rows)?;
    Ok(())
}
