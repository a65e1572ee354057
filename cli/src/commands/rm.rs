//! `optimus rm`

use std::io::BufRead;

use optimus_common::WorkloadKey;
use optimus_common::api::v1::ActionAnswer;

use crate::args::Global;
use crate::commands::scale::workload_only;
use crate::commands::{ScopeArgs, Session};
use crate::error::{Exit, Failure};
use crate::output::Terminal;
use crate::target;

pub const EXAMPLES: &str = "Examples:
  optimus rm web                     asks for the name first
  optimus rm shop/dev/web --yes      for scripts";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// `web`, `env/web` or `project/env/web`
    workload: String,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
    #[command(flatten)]
    scope: ScopeArgs,
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let can_ask = terminal.stdin_tty && terminal.stderr_tty;
    if !args.yes && !can_ask {
        return Err(Failure::usage(format!("cannot ask whether to remove `{}`", args.workload))
            .because("this is no terminal, and removing is not undone")
            .hint(format!("optimus rm {} --yes", args.workload)));
    }
    let session = Session::open(global, &args.scope, terminal)?;
    let key = workload_only(&session, &args.workload, "rm").await?;
    if !args.yes {
        confirm(&key, &terminal)?;
    }
    let answer = session.client.delete::<ActionAnswer>(&target::path(&key), &format!("cannot remove {key}")).await?;
    if terminal.json {
        terminal.json_document(&answer.value)?;
    }
    terminal.note(&format!("{key} is removed; its copies are being stopped"));
    Ok(())
}

fn confirm(key: &WorkloadKey, terminal: &Terminal) -> Result<(), Failure> {
    terminal.note(&format!("{key}: all its copies are stopped, its releases and logs are forgotten. This is not undone."));
    terminal.note_raw(&format!("Type {} to go on: ", terminal.stderr_paint().bold(key.workload.as_str())));
    let mut typed = String::new();
    std::io::stdin().lock().read_line(&mut typed)?;
    if typed.trim() == key.workload.as_str() {
        return Ok(());
    }
    Err(Failure::new(Exit::Failed, format!("{key} was not removed")).because("what was typed is not its name"))
}
