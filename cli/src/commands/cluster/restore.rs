//! `optimus cluster restore`

use std::path::PathBuf;

use optimus_common::Timestamp;
use optimus_control_plane::rescue::restore::{self, Source, Until};
use optimus_host::env::HostEnv;
use serde::Serialize;

use super::keys::{KeyArgs, root_key};
use super::{failed, server_dir};
use crate::error::Failure;
use crate::output::Terminal;

pub const EXAMPLES: &str = "Examples:
  optimus cluster restore state.age --identity key.txt --root-key root.key.age
  optimus cluster restore state.age --identity key.txt --root-key root.key.age --archive /backup/archive --at 2026-11-23T10:30:00Z
  optimus server                                                 then start it";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The export to begin with (also a base-*.age of an archive)
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Data directory of the new server; must not exist or be empty [default: that of `optimus server`]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    #[command(flatten)]
    key: KeyArgs,
    /// Root key of the cluster: the file itself, or the copy of `optimus cluster root-key export`
    #[arg(long, value_name = "FILE")]
    root_key: PathBuf,
    /// Archive to go on with behind the export (repeatable)
    #[arg(long = "archive", value_name = "DIR")]
    archives: Vec<PathBuf>,
    /// Stop at the state of this log index
    #[arg(long, value_name = "N", requires = "archives")]
    index: Option<u64>,
    /// Stop at the state of this time, such as 2026-11-23T10:30:00Z
    #[arg(long, value_name = "TIME", requires = "archives", conflicts_with = "index", value_parser = time)]
    at: Option<Timestamp>,
    /// host:port other servers will reach the new one at (its --agent-listen)
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7601")]
    address: String,
    /// Read and check everything, write nothing
    #[arg(long)]
    dry_run: bool,
}

/// What was restored.
#[derive(Serialize)]
struct Answer {
    cluster: String,
    exported_index: u64,
    restored_index: u64,
    restored_to: String,
    replayed: u64,
    left_out: u64,
    workloads: usize,
    nodes: usize,
    server: Option<u64>,
    data_dir: Option<PathBuf>,
}

pub fn run(args: Args, terminal: Terminal) -> Result<(), Failure> {
    const WHAT: &str = "nothing was restored";
    let dir = server_dir(args.data_dir)?;
    let key = args.key.key(&terminal)?;
    let root = root_key(&args.root_key, Some(&key))?;
    let until = match (args.index, args.at) {
        (Some(index), _) => Until::Index(index),
        (None, Some(at)) => Until::Time(at),
        (None, None) => Until::End,
    };
    let source = Source { export: &args.file, archives: &args.archives, until, key: &key };
    let restored = restore::read(&source).map_err(|error| failed(WHAT, &error))?;
    restored.check_root_key(&root).map_err(|error| failed(WHAT, &error))?;
    let to = restored.reached_at.unwrap_or(restored.export.taken_at);
    let mut answer = Answer {
        cluster: restored.export.cluster.to_string(),
        exported_index: restored.export.index,
        restored_index: restored.reached,
        restored_to: to.to_string(),
        replayed: restored.replayed,
        left_out: restored.left_out,
        workloads: restored.state.workloads.len(),
        nodes: restored.state.nodes.len(),
        server: None,
        data_dir: None,
    };
    if !args.dry_run {
        let beginning = restore::write(restored, &root, &dir, &args.address, &HostEnv::new()).map_err(|error| failed(WHAT, &error))?;
        (answer.server, answer.data_dir) = (Some(beginning.server), Some(dir.clone()));
    }
    if terminal.json {
        terminal.json_document(&answer)?;
        return Ok(());
    }
    let Answer { cluster, exported_index, restored_index, restored_to, replayed, left_out, workloads, nodes, server, .. } = answer;
    terminal.line(&format!("cluster     {cluster}: {workloads} workloads, {nodes} nodes"))?;
    terminal.line(&format!("export      index {exported_index}"))?;
    terminal.line(&format!("restored    index {restored_index}, as of {restored_to} ({replayed} entries of the archive replayed)"))?;
    terminal.line(&match (left_out, args.archives.is_empty()) {
        (0, true) => format!("lost        whatever changed after {restored_to}: no archive was given"),
        (0, false) => format!("lost        whatever changed after {restored_to}: the archive ends there"),
        (n, _) => format!("left out    {n} later entries of the archive, as asked, and what came after them"),
    })?;
    match server {
        Some(server) => {
            terminal.note(&format!("the new server has id {server} and its data in {}", dir.display()));
            terminal.note("next: start it (`optimus server`) at the address the agents know; old servers must stay off");
        }
        None => terminal.note("nothing was written (--dry-run)"),
    }
    Ok(())
}

fn time(text: &str) -> Result<Timestamp, String> {
    let quoted = serde_json::Value::String(text.to_owned());
    serde_json::from_value(quoted).map_err(|_| "write a time with its zone, such as 2026-11-23T10:30:00Z".to_owned())
}
