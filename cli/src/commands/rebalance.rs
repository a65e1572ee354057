//! `optimus rebalance`

use optimus_common::Span;
use optimus_common::api::v1::{RebalanceAnswer, RebalanceRequest, RebalanceSettings};

use crate::args::Global;
use crate::commands::{ScopeArgs, Session};
use crate::error::{Failure, printable};
use crate::output::{Terminal, count};

pub const EXAMPLES: &str = "Examples:
  optimus rebalance --dry-run                      what would move, and why
  optimus rebalance                                move it, within the budget
  optimus rebalance --auto on --moves 2 --every 10m";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only say what would move
    #[arg(long)]
    dry_run: bool,
    /// Whether it also runs by itself
    #[arg(long, value_name = "ON_OR_OFF", value_parser = ["on", "off"], conflicts_with = "dry_run")]
    auto: Option<String>,
    /// Most copies moved in each interval
    #[arg(long, value_name = "N", conflicts_with = "dry_run")]
    moves: Option<u32>,
    /// Length of an interval
    #[arg(long, value_name = "TIME", conflicts_with = "dry_run")]
    every: Option<Span>,
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let session = Session::open(global, &ScopeArgs::default(), terminal)?;
    let what = "cannot rebalance";
    let path = "/v1/rebalance";
    let Args { dry_run, auto, moves, every } = args;
    let sets = auto.is_some() || moves.is_some() || every.is_some();
    let answer = if sets {
        let now = session.client.get::<RebalanceAnswer>(path, &[], what).await?.value.settings;
        let settings = RebalanceSettings {
            automatic: auto.as_ref().map_or(now.automatic, |on| on == "on"),
            moves: moves.unwrap_or(now.moves),
            every: every.unwrap_or(now.every),
        };
        session.client.put::<RebalanceAnswer>(path, &settings, what).await?.value
    } else {
        session.client.post::<RebalanceAnswer>(path, &RebalanceRequest { dry_run: *dry_run }, what).await?.value
    };
    if terminal.json {
        terminal.json_document(&answer)?;
        return Ok(());
    }
    let RebalanceSettings { automatic, moves, every } = answer.settings;
    if sets {
        let how = if automatic { "by itself and when asked" } else { "only when asked" };
        terminal.note(&format!("moves at most {} each {every}, {how}", count(moves.into(), "copy", "copies")));
        return Ok(());
    }
    if answer.moves.is_empty() {
        terminal.note("nothing to move: the nodes are even enough, or the budget of this interval is used up");
        return Ok(());
    }
    let rows = answer.moves.iter().map(|m| vec![m.copy.clone(), printable(&m.from), printable(&m.to), m.why.clone()]).collect();
    terminal.table(&["COPY", "FROM", "TO", "WHY"], rows)?;
    if !dry_run {
        terminal.note(&format!(
            "{} on the way; the scheduler has the last word where to",
            count(answer.moves.len() as u64, "copy is", "copies are")
        ));
    }
    Ok(())
}
