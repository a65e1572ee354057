//! `optimus cluster recover`

use std::path::PathBuf;

use optimus_control_plane::rescue::probe::QuicKnock;
use optimus_control_plane::rescue::recover;
use optimus_host::env::HostEnv;
use serde::Serialize;

use super::keys::{KeyArgs, root_key};
use super::{confirm, failed, server_dir};
use crate::error::Failure;
use crate::output::Terminal;

pub const EXAMPLES: &str = "Examples:
  optimus cluster recover --dry-run       say what this server holds; do it on each survivor, go on with the newest
  optimus cluster recover                 on a stopped server, when a majority of the others is gone for good";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Data directory of the stopped server [default: that of `optimus server`]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// host:port other servers will reach this one at [default: as before]
    #[arg(long, value_name = "HOST:PORT")]
    address: Option<String>,
    /// Root key, if the data directory has lost it
    #[arg(long, value_name = "FILE")]
    root_key: Option<PathBuf>,
    #[command(flatten)]
    key: KeyArgs,
    /// Do not ask. A reachable majority is refused all the same
    #[arg(long, short)]
    yes: bool,
    /// Say what this server holds, change nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Serialize)]
struct Answer {
    server: u64,
    term: u64,
    index: u64,
    committed: u64,
    workloads: usize,
    nodes: usize,
    answering: Vec<u64>,
    silent: Vec<u64>,
    new_server: Option<u64>,
    new_index: Option<u64>,
    aside: Option<PathBuf>,
}

pub async fn run(args: Args, terminal: Terminal) -> Result<(), Failure> {
    const WHAT: &str = "nothing was recovered";
    let dir = server_dir(args.data_dir)?;
    let survivor = recover::inspect(&dir).map_err(|error| failed(WHAT, &error))?;
    let given = match &args.root_key {
        Some(path) if args.key.is_given() => Some(root_key(path, Some(&args.key.key(&terminal)?))?),
        Some(path) => Some(root_key(path, None)?),
        None => None,
    };
    let root = survivor.root_key(given).map_err(|error| failed(WHAT, &error))?;
    terminal.note("asking the other servers of before whether they are there ...");
    let reached = recover::refuse_reachable_majority(&survivor.found, &QuicKnock::default()).await;
    let reached = reached.map_err(|error| failed(WHAT, &error))?;

    let found = &survivor.found;
    let (term, index) = found.last;
    let mut answer = Answer {
        server: found.node_id,
        term,
        index,
        committed: found.committed,
        workloads: found.machine.0.workloads.len(),
        nodes: found.machine.0.nodes.len(),
        answering: reached.answering,
        silent: reached.silent,
        new_server: None,
        new_index: None,
        aside: None,
    };
    if !terminal.json {
        say(&answer, &terminal)?;
    }
    if !args.dry_run {
        confirm(args.yes, &terminal, "make this server the only one of its cluster")?;
        let address = match args.address.or_else(|| survivor.addr().map(str::to_owned)) {
            Some(address) => address,
            None => return Err(Failure::usage(WHAT).because("the store knows no address of this server").hint("add --address HOST:PORT")),
        };
        let recovered = survivor.write(&root, &address, &HostEnv::new()).map_err(|error| failed(WHAT, &error))?;
        answer.new_server = Some(recovered.beginning.server);
        answer.new_index = Some(recovered.beginning.index);
        terminal.note(&format!(
            "this server is now server {}, alone; the log goes on at index {}",
            recovered.beginning.server, recovered.beginning.index
        ));
        terminal.note(&format!("the old store is kept in {}", recovered.aside.display()));
        terminal.note("next: start it, then join new servers; wipe the old ones before they are used again");
        answer.aside = Some(recovered.aside);
    }
    if terminal.json {
        terminal.json_document(&answer)?;
    }
    Ok(())
}

fn say(answer: &Answer, terminal: &Terminal) -> Result<(), Failure> {
    let list = |ids: &[u64]| ids.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    let Answer { server, term, index, committed, workloads, nodes, answering, silent, .. } = answer;
    terminal.line(&format!("server      {server}: {workloads} workloads, {nodes} nodes"))?;
    terminal.line(&format!("log         ends at index {index} of term {term}; {committed} was known to be committed"))?;
    if index > committed {
        terminal.line(&format!("            entries {} to {index} are kept: some may never have been acknowledged", committed + 1))?;
    }
    terminal.line("may be lost writes that only the other servers held, after the index above")?;
    if !silent.is_empty() {
        terminal.line(&format!("silent      servers {}", list(silent)))?;
    }
    if !answering.is_empty() {
        terminal.line(&format!(
            "ANSWERING   servers {}: stop them, compare with `optimus cluster recover --dry-run` there, go on with the newest (term first, then index)",
            list(answering)
        ))?;
    }
    Ok(())
}
