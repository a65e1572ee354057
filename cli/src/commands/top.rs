//! `optimus top`

use std::time::Duration;

use optimus_common::Name;
use optimus_common::api::usage::{UsageList, UsageRow};

use crate::args::Global;
use crate::commands::{ScopeArgs, Session};
use crate::error::Failure;
use crate::output::{Terminal, age, count};

pub const EXAMPLES: &str = "Examples:
  optimus top                        the copies that use most CPU
  optimus top --by memory -n 10
  optimus top --nodes                hosts instead of copies
  optimus top -w                     again every two seconds";

/// Pause between two looks with `--watch`.
const LOOK_EVERY: Duration = Duration::from_secs(2);

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    scope: ScopeArgs,
    /// Hosts instead of copies
    #[arg(long)]
    nodes: bool,
    /// What decides the order
    #[arg(long, value_name = "WHAT", default_value = "cpu")]
    by: By,
    /// Only copies on this host
    #[arg(long, value_name = "NODE")]
    node: Option<Name>,
    /// How many
    #[arg(short = 'n', long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    number: u32,
    /// Again every two seconds, until Ctrl-C
    #[arg(short, long)]
    watch: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum By {
    Cpu,
    Memory,
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let session = Session::open(global, &args.scope, terminal)?;
    loop {
        show(args, &session).await?;
        if !args.watch {
            return Ok(());
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn show(args: &Args, session: &Session) -> Result<(), Failure> {
    let mut query = vec![("limit", args.number.to_string())];
    query.push(("of", if args.nodes { "nodes" } else { "allocations" }.into()));
    query.push(("by", if matches!(args.by, By::Memory) { "memory" } else { "cpu" }.into()));
    query.extend(session.scope.project.iter().map(|name| ("project", name.to_string())));
    query.extend(session.scope.environment.iter().map(|name| ("environment", name.to_string())));
    query.extend(args.node.iter().map(|name| ("node", name.to_string())));
    let usage: UsageList = session.client.get("/v1/usage", &query, "cannot ask what is used").await?.value;
    let terminal = session.terminal;
    if terminal.json {
        match args.watch {
            true => terminal.json_line(&usage)?,
            false => terminal.json_document(&usage)?,
        }
        return Ok(());
    }
    let rows = usage.items.iter().map(|row| line(row, args.nodes)).collect();
    let first = if args.nodes { "NODE" } else { "COPY" };
    let mut header = vec![first, "CPU", "OF", "MEMORY", "OF", "PIDS", "AGE"];
    if !args.nodes {
        header.insert(1, "NODE");
    }
    terminal.table(&header, rows)?;
    let more = usage.total - usage.items.len() as u64;
    if more > 0 {
        terminal.note(&format!("and {more} more; -n shows more of them"));
    }
    if !usage.missing.is_empty() {
        let nodes = count(usage.missing.len() as u64, "node", "nodes");
        terminal.note(&format!("nothing is known of {nodes}: {}", usage.missing.join(", ")));
    }
    Ok(())
}

fn line(row: &UsageRow, nodes: bool) -> Vec<String> {
    let unknown = || "-".to_owned();
    let mut cells = match &row.allocation {
        Some(copy) if !nodes => vec![format!("{}/{}/{}", copy.key.project, copy.key.environment, copy.name), row.node_name.clone()],
        _ => vec![row.node_name.clone()],
    };
    cells.extend([
        row.cpu.map_or_else(unknown, |cpu| cpu.to_string()),
        row.cpu_limit.to_string(),
        row.memory.map_or_else(unknown, |memory| memory.human()),
        row.memory_limit.human(),
        row.pids.map_or_else(unknown, |pids| pids.to_string()),
        age(row.age),
    ]);
    cells
}
