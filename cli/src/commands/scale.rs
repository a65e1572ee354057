//! `optimus scale`

use optimus_common::api::v1::{ActionAnswer, ScaleRequest};

use crate::args::Global;
use crate::commands::{ScopeArgs, Session, WaitArgs};
use crate::error::{Exit, Failure};
use crate::output::{Terminal, count};
use crate::target;

pub const EXAMPLES: &str = "Examples:
  optimus scale web 5
  optimus scale prod/web 2 --no-wait";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// `web`, `env/web` or `project/env/web`
    workload: String,
    /// How many copies
    copies: u32,
    #[command(flatten)]
    scope: ScopeArgs,
    #[command(flatten)]
    wait: WaitArgs,
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let session = Session::open(global, &args.scope, terminal)?;
    let key = workload_only(&session, &args.workload, "scale").await?;
    let path = format!("{}:scale", target::path(&key));
    let answer = session.client.post::<ActionAnswer>(&path, &ScaleRequest { copies: args.copies }, &format!("cannot scale {key}")).await?;
    if terminal.json {
        terminal.json_document(&answer.value)?;
    }
    let said = format!("{key} is set to {}", count(args.copies.into(), "copy", "copies"));
    let no_deployment = answer.value.deployment.is_none();
    session.finish_action(answer.value, &args.wait, &said, answer.request_id.as_deref()).await?;
    match args.wait.limit().filter(|_| no_deployment) {
        // Fewer copies need no deployment, only those above the number to end.
        Some(limit) => session.wait_until_scaled(&target::path(&key), args.copies, limit, &format!("optimus ps {key}")).await,
        None => Ok(()),
    }
}

/// Verbs that act on a whole workload take no copy.
pub async fn workload_only(session: &Session, text: &str, verb: &str) -> Result<optimus_common::WorkloadKey, Failure> {
    let found = target::resolve(&session.client, text, &session.scope, &session.defaults).await?;
    match found.copy {
        None => Ok(found.key),
        Some(copy) => Err(Failure::new(Exit::Usage, format!("cannot {verb} the copy {copy} alone"))
            .because(format!("`optimus {verb}` acts on a whole workload"))
            .hint(format!("optimus {verb} {}", found.key))),
    }
}
