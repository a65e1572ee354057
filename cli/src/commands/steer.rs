//! `optimus promote`, `pause`, `resume`, `abort`, `retry`, `rollback`: what can be asked of a deployment.

use optimus_common::api::v1::{ActionAnswer, SteerRequest};

use crate::args::Global;
use crate::commands::scale::workload_only;
use crate::commands::{ScopeArgs, Session, WaitArgs};
use crate::error::Failure;
use crate::output::Terminal;
use crate::target;

pub const PROMOTE: &str = "Examples:
  optimus promote web
  optimus promote web --reason \"the numbers are good\"";
pub const PAUSE: &str = "Examples:
  optimus pause web --reason \"looking at the errors\"";
pub const RESUME: &str = "Examples:
  optimus resume web";
pub const ABORT: &str = "Examples:
  optimus abort web --reason \"wrong branch\"";
pub const RETRY: &str = "Examples:
  optimus retry web";
pub const ROLLBACK: &str = "Examples:
  optimus rollback web                to the release that ran before
  optimus rollback web --to 12        to another that is still kept";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// `web`, `env/web` or `project/env/web`
    workload: String,
    /// Why, for those who look at it later
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    #[command(flatten)]
    scope: ScopeArgs,
    #[command(flatten)]
    wait: WaitArgs,
}

#[derive(Debug, clap::Args)]
pub struct RollbackArgs {
    /// The release to go back to [default: the one that ran before]
    #[arg(long, value_name = "RELEASE")]
    to: Option<u64>,
    #[command(flatten)]
    args: Args,
}

/// What is asked, and whether its end is worth waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    Promote,
    Pause,
    Resume,
    Abort,
    Retry,
}

impl Ask {
    fn verb(self) -> &'static str {
        match self {
            Ask::Promote => "promote",
            Ask::Pause => "pause",
            Ask::Resume => "resume",
            Ask::Abort => "abort",
            Ask::Retry => "retry",
        }
    }
}

pub async fn run(ask: Ask, args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    steer(ask.verb(), args, None, global, terminal).await
}

pub async fn rollback(args: &RollbackArgs, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    steer("rollback", &args.args, args.to, global, terminal).await
}

async fn steer(verb: &str, args: &Args, to: Option<u64>, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let session = Session::open(global, &args.scope, terminal)?;
    let key = workload_only(&session, &args.workload, verb).await?;
    let path = format!("{}:{verb}", target::path(&key));
    let request = SteerRequest { reason: args.reason.clone(), to };
    let answer = session.client.post::<ActionAnswer>(&path, &request, &format!("cannot {verb} {key}")).await?;
    if terminal.json {
        terminal.json_document(&answer.value)?;
    }
    let said = match verb {
        "promote" => format!("{key} is promoted"),
        "pause" => format!("the deployment of {key} is paused; `optimus resume {key}` lets it go on"),
        "resume" => format!("the deployment of {key} goes on"),
        "abort" => format!("the deployment of {key} is called off"),
        "retry" => format!("{key} is tried again"),
        _ => format!("{key} goes back"),
    };
    // A pause has no end to wait for; a deployment that is called off, or goes back, does not end as one that succeeded.
    let ends_well =
        matches!(verb, "promote" | "resume" | "retry") || answer.value.deployment.as_ref().is_some_and(|d| d.trigger == "rollback");
    if verb == "pause" || !ends_well {
        if !answer.value.changed {
            terminal.note("nothing to do: it was so already");
        }
        terminal.note(&said);
        return Ok(());
    }
    session.finish_action(answer.value, &args.wait, &said, answer.request_id.as_deref()).await
}
