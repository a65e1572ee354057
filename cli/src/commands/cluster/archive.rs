//! `optimus cluster archive`

use std::path::PathBuf;

use optimus_control_plane::rescue::archive::{Archive, ArchiveError};
use optimus_control_plane::rescue::export;
use serde::Serialize;

use super::failed;
use super::keys::KeyArgs;
use crate::error::Failure;
use crate::output::Terminal;

pub const EXAMPLES: &str = "Examples:
  optimus cluster archive /backup/archive --from state.age --identity key.txt";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What `optimus server --archive-dir` wrote (repeatable: several servers' archives are read together)
    #[arg(value_name = "DIR", required = true)]
    dirs: Vec<PathBuf>,
    /// The export the archive is to go on from
    #[arg(long, value_name = "FILE")]
    from: PathBuf,
    #[command(flatten)]
    key: KeyArgs,
}

#[derive(Serialize)]
struct Verified {
    from: u64,
    to: u64,
    segments: usize,
    entries: u64,
}

pub fn run(args: &Args, terminal: Terminal) -> Result<(), Failure> {
    const WHAT: &str = "the archive cannot be used";
    let key = args.key.key(&terminal)?;
    let export = export::read_file(&args.from, &key).map_err(|error| failed(&format!("cannot read {}", args.from.display()), &error))?;
    let archive = Archive::open(&args.dirs, export.head.cluster).map_err(|error| failed(WHAT, &error))?;
    let mut entries = 0;
    let walk = archive.walk(export.head.covers, u64::MAX, &key, |_| -> Result<bool, ArchiveError> {
        entries += 1;
        Ok(true)
    });
    let walk = walk.map_err(|error| failed(WHAT, &error))?;
    let verified = Verified { from: export.head.covers + 1, to: walk.reached, segments: archive.len(), entries };
    if terminal.json {
        terminal.json_document(&verified)?;
    } else if entries == 0 {
        terminal.line(&format!(
            "nothing after the export (index {}); {} segments reach index {}",
            export.head.covers,
            archive.len(),
            archive.end()
        ))?;
    } else {
        terminal.line(&format!("entries {} to {}, whole and in order, in {} segments", verified.from, verified.to, verified.segments))?;
    }
    Ok(())
}
