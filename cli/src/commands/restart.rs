//! `optimus restart`

use optimus_common::api::v1::ActionAnswer;

use crate::args::Global;
use crate::commands::scale::workload_only;
use crate::commands::{ScopeArgs, Session, WaitArgs};
use crate::error::Failure;
use crate::output::Terminal;
use crate::target;

pub const EXAMPLES: &str = "Examples:
  optimus restart web
  optimus restart shop/prod/web --no-wait";

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
    let key = workload_only(&session, &args.workload, "restart").await?;
    let path = format!("{}:restart", target::path(&key));
    let answer = session.client.post::<ActionAnswer>(&path, &serde_json::json!({}), &format!("cannot restart {key}")).await?;
    if terminal.json {
        terminal.json_document(&answer.value)?;
    }
    let said = if args.wait.no_wait { format!("{key} is being restarted") } else { format!("{key} was restarted") };
    session.finish_action(answer.value, &args.wait, &said, answer.request_id.as_deref()).await
}
