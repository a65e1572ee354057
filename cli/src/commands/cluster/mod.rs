//! `optimus cluster`

mod archive;
mod keys;
mod recover;
mod restore;
mod root_key;
mod snapshot;

use std::path::PathBuf;

use optimus_host::telemetry::Chain;

use crate::args::Global;
use crate::commands::data_dir;
use crate::error::{Exit, Failure};
use crate::output::Terminal;

pub const EXAMPLES: &str = "Examples:
  optimus cluster snapshot --to state.age --recipient age1...    the whole state, encrypted
  optimus cluster restore state.age --identity key.txt --root-key root.key.age
  optimus cluster recover                                        when a majority of the servers is gone for good";

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Export the whole state as one encrypted file, or verify one
    #[command(before_help = snapshot::EXAMPLES)]
    Snapshot(snapshot::Args),
    /// Make the data directory of a new server from an export
    #[command(before_help = restore::EXAMPLES)]
    Restore(restore::Args),
    /// Make the server of a data directory the only one of its cluster
    #[command(before_help = recover::EXAMPLES)]
    Recover(recover::Args),
    /// Verify an archive and say what it holds
    #[command(before_help = archive::EXAMPLES)]
    Archive(archive::Args),
    /// Keep a copy of the root key, which exports do not hold
    #[command(before_help = root_key::EXAMPLES)]
    RootKey(root_key::Args),
}

pub async fn run(args: Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    match args.what {
        What::Snapshot(args) => snapshot::run(args, global, terminal).await,
        What::Restore(args) => restore::run(args, terminal),
        What::Recover(args) => recover::run(args, terminal).await,
        What::Archive(args) => archive::run(&args, terminal),
        What::RootKey(args) => root_key::run(&args, terminal),
    }
}

/// The data directory of this host's server.
fn server_dir(given: Option<PathBuf>) -> Result<PathBuf, Failure> {
    given.map_or_else(|| data_dir("server", true), Ok)
}

/// An error with its causes as a failure.
fn failed(what: &str, error: &(dyn std::error::Error + 'static)) -> Failure {
    let mut failure = Failure::new(Exit::Failed, what).because(error.to_string());
    let mut cause = error.source();
    while let Some(error) = cause {
        failure = failure.because(error.to_string());
        cause = error.source();
    }
    tracing::debug!(error = %Chain(error), "{what}");
    failure
}

/// Asks for a `yes`, unless it was given.
fn confirm(yes: bool, terminal: &Terminal, what: &str) -> Result<(), Failure> {
    if yes {
        return Ok(());
    }
    if !(terminal.stdin_tty && terminal.stderr_tty) {
        return Err(Failure::usage(format!("cannot ask whether to {what}")).because("this is no terminal").hint("add --yes"));
    }
    terminal.note_raw(&format!("Type {} to {what}: ", terminal.stderr_paint().bold("yes")));
    let mut typed = String::new();
    std::io::stdin().read_line(&mut typed)?;
    if typed.trim() == "yes" { Ok(()) } else { Err(Failure::new(Exit::Failed, "nothing was done").because("the answer was not yes")) }
}
