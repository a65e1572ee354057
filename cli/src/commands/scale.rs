//! `optimus scale`

use optimus_common::api::v1::{ActionAnswer, ScaleRequest};

use crate::args::Global;
use crate::commands::{ScopeArgs, Session, WaitArgs};
use crate::error::{Exit, Failure};
use crate::output::{Terminal, count};
use crate::target;
use optimus_common::{Bytes, Millicores};

pub const EXAMPLES: &str = "Examples:
  optimus scale web 5
  optimus scale web --cpu 0.5 --memory 64M..128M    as they run, without a restart
  optimus scale prod/web 2 --no-wait";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// `web`, `env/web` or `project/env/web`
    workload: String,
    /// How many copies
    #[arg(required_unless_present_any = ["cpu", "memory"])]
    copies: Option<u32>,
    /// Cores of each copy: its share, and its limit
    #[arg(long, value_name = "CORES")]
    cpu: Option<Millicores>,
    /// Memory of each copy: a limit, or what is reserved and the limit, as `64M..128M`
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    memory: Option<(Option<Bytes>, Bytes)>,
    #[command(flatten)]
    scope: ScopeArgs,
    #[command(flatten)]
    wait: WaitArgs,
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let session = Session::open(global, &args.scope, terminal)?;
    let key = workload_only(&session, &args.workload, "scale").await?;
    let path = format!("{}:scale", target::path(&key));
    let (memory_request, memory_limit) = args.memory.map_or((None, None), |(request, limit)| (request, Some(limit)));
    let request = ScaleRequest { copies: args.copies, cpu: args.cpu, memory_request, memory_limit };
    let resizes = request.cpu.is_some() || memory_limit.is_some();
    let answer = session.client.post::<ActionAnswer>(&path, &request, &format!("cannot scale {key}")).await?;
    if terminal.json {
        terminal.json_document(&answer.value)?;
    }
    let said = match args.copies {
        Some(copies) if !resizes => format!("{key} is set to {}", count(copies.into(), "copy", "copies")),
        _ => format!("the copies of {key} have other limits"),
    };
    let no_deployment = answer.value.deployment.is_none();
    session.finish_action(answer.value, &args.wait, &said, answer.request_id.as_deref()).await?;
    match (args.wait.limit().filter(|_| no_deployment), args.copies) {
        // Fewer copies need no deployment, only those above the number to end.
        (Some(limit), Some(copies)) => session.wait_until_scaled(&target::path(&key), copies, limit, &format!("optimus ps {key}")).await,
        _ => Ok(()),
    }
}

/// `128M`, or `64M..128M`: reserved and limit. A limit alone is reserved as well.
fn memory(text: &str) -> Result<(Option<Bytes>, Bytes), String> {
    let size = |part: &str| part.trim().parse::<Bytes>().map_err(|error| error.to_string());
    match text.split_once("..") {
        Some((request, limit)) => Ok((Some(size(request)?), size(limit)?)),
        None => size(text).map(|limit| (Some(limit), limit)),
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
