//! `optimus stop`

use optimus_common::api::v1::ActionAnswer;

use crate::args::Global;
use crate::commands::scale::workload_only;
use crate::commands::{ScopeArgs, Session, WaitArgs};
use crate::error::Failure;
use crate::output::Terminal;
use crate::target;

pub const EXAMPLES: &str = "Examples:
  optimus stop web                  `optimus restart web` or `optimus deploy` starts it again
  optimus stop shop/prod/web";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// `web`, `env/web` or `project/env/web`
    workload: String,
    #[command(flatten)]
    scope: ScopeArgs,
    #[command(flatten)]
    wait: WaitArgs,
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let session = Session::open(global, &args.scope, terminal)?;
    let key = workload_only(&session, &args.workload, "stop").await?;
    let path = target::path(&key);
    let answer =
        session.client.post::<ActionAnswer>(&format!("{path}:stop"), &serde_json::json!({}), &format!("cannot stop {key}")).await?;
    if terminal.json {
        terminal.json_document(&answer.value)?;
    }
    let ActionAnswer { changed, .. } = answer.value;
    if !changed {
        terminal.note("nothing to do: it was so already");
    }
    if let Some(limit) = args.wait.limit() {
        session.wait_until_gone(&path, limit, &format!("optimus ps {key}")).await?;
    }
    terminal.note(&if args.wait.no_wait { format!("{key} is being stopped") } else { format!("{key} is stopped") });
    Ok(())
}
