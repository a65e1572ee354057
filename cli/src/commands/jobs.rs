//! `optimus jobs`

use optimus_common::api::v1::{Job, Page};

use crate::args::Global;
use crate::commands::run::word;
use crate::commands::{ScopeArgs, Session};
use crate::error::{Failure, printable};
use crate::output::{Terminal, age, now};

pub const EXAMPLES: &str = "Examples:
  optimus jobs                 list jobs, when they run next and how they last ended
  optimus jobs --env prod";

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    scope: ScopeArgs,
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let session = Session::open(global, &args.scope, terminal)?;
    let jobs: Page<Job> = session.client.list("/v1/jobs", &session.scope.query(), "cannot list the jobs").await?;
    if terminal.json {
        terminal.json_document(&jobs)?;
        return Ok(());
    }
    if jobs.items.is_empty() {
        terminal.note("no jobs yet: write a [job.NAME] section, then `optimus deploy`");
        return Ok(());
    }
    let now = now();
    let rows = jobs
        .items
        .iter()
        .map(|job| {
            let next = match (&job.next_local, job.next_at) {
                _ if job.stopped => "stopped".to_owned(),
                (Some(local), Some(at)) => format!("{local} (in {})", age(at.since(now))),
                _ => "-".to_owned(),
            };
            let last = job.last_run.as_ref();
            vec![
                job.key.to_string(),
                job.schedule.as_ref().map_or_else(|| "-".to_owned(), |s| format!("{} {}", printable(&s.cron), printable(&s.timezone))),
                next,
                format!("{}+{}", job.active, job.waiting),
                last.map_or_else(
                    || "-".to_owned(),
                    |run| format!("#{} {} {} ago", run.number, word(run.phase), age(now.since(run.created_at))),
                ),
                job.skipped.to_string(),
            ]
        })
        .collect();
    terminal.table(&["JOB", "SCHEDULE", "NEXT", "ACTIVE+WAITING", "LAST RUN", "SKIPPED"], rows)?;
    Ok(())
}
