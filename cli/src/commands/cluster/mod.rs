//! `optimus cluster`

mod archive;
mod keys;
mod recover;
mod restore;
mod root_key;
mod rotate_ca;
mod servers;
mod snapshot;

use std::path::PathBuf;

use optimus_common::Span;
use optimus_host::telemetry::Chain;

use crate::args::Global;
use crate::commands::{ScopeArgs, Session, data_dir};
use crate::error::{Exit, Failure};
use crate::output::Terminal;

pub const EXAMPLES: &str = "Examples:
  optimus cluster                                                the servers and how they are
  optimus cluster join-token                                     a token for one more server, good for an hour
  optimus cluster transfer-leader --to 7                         before maintenance of the leader's host
  optimus cluster leave --server 7                               remove a server, dead or alive
  optimus cluster rotate-ca                                      replace the CA; everybody keeps working
  optimus cluster snapshot --to state.age --recipient age1...    the whole state, encrypted
  optimus cluster restore state.age --identity key.txt --root-key root.key.age
  optimus cluster recover                                        when a majority of the servers is gone for good";

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Tell how the cluster is, in sentences
    #[command(before_help = "Examples:\n  optimus cluster status")]
    Status,
    /// List the servers
    #[command(before_help = "Examples:\n  optimus cluster members")]
    Members,
    /// Make a token that lets a server join; it is shown once, and hands over the root key: keep it secret
    #[command(before_help = "Examples:\n  optimus cluster join-token > token.txt\n  optimus server --join \"$(cat token.txt)\"")]
    JoinToken {
        /// How long it may be used [default: 1h, at most 30d]
        #[arg(long, value_name = "TIME")]
        ttl: Option<Span>,
        /// How many servers may use it [default: 1]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        uses: Option<u32>,
    },
    /// Join the cluster of a token: the same as `optimus server --join TOKEN`
    #[command(before_help = "Examples:\n  optimus cluster join TOKEN --agent-listen 0.0.0.0:7601 --advertise 10.0.0.6:7601")]
    Join {
        /// Token of `optimus cluster join-token`
        token: String,
        #[command(flatten)]
        server: Box<super::server::Args>,
    },
    /// Let a server leave: it loses its vote, then its place, and its process ends
    #[command(before_help = "Examples:\n  optimus cluster leave --server 7")]
    Leave {
        /// Id of the server (`optimus cluster members`)
        #[arg(long, value_name = "ID")]
        server: u64,
    },
    /// Hand leadership to another server; writes pause for some milliseconds
    #[command(before_help = "Examples:\n  optimus cluster transfer-leader\n  optimus cluster transfer-leader --to 7")]
    TransferLeader {
        /// Id of the server that shall lead [default: the one with most of the log]
        #[arg(long, value_name = "ID")]
        to: Option<u64>,
    },
    /// Replace the cluster's CA; both are trusted until nobody holds a certificate of the old one
    #[command(before_help = rotate_ca::EXAMPLES)]
    RotateCa(rotate_ca::Args),
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
    /// Keep a copy of the root key, which exports do not hold, or replace it
    #[command(before_help = root_key::EXAMPLES)]
    RootKey(root_key::Args),
}

/// The server to run instead of a request, for `cluster join`.
pub fn server_to_join(args: Args) -> Result<super::server::Args, Args> {
    match args.what {
        Some(What::Join { token, server }) => Ok(server.joining(token)),
        what => Err(Args { what }),
    }
}

pub async fn run(args: Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let session = || Session::open(global, &ScopeArgs::default(), terminal);
    match args.what {
        None | Some(What::Status) => servers::show(&session()?, true).await,
        Some(What::Members) => servers::show(&session()?, false).await,
        Some(What::JoinToken { ttl, uses }) => servers::join_token(&session()?, ttl, uses).await,
        Some(What::Join { .. }) => Err(Failure::usage("`cluster join` starts a server")),
        Some(What::Leave { server }) => servers::leave(&session()?, server).await,
        Some(What::TransferLeader { to }) => servers::transfer(&session()?, to).await,
        Some(What::RotateCa(args)) => rotate_ca::run(&session()?, args).await,
        Some(What::Snapshot(args)) => snapshot::run(args, global, terminal).await,
        Some(What::Restore(args)) => restore::run(args, terminal),
        Some(What::Recover(args)) => recover::run(args, terminal).await,
        Some(What::Archive(args)) => archive::run(&args, terminal),
        Some(What::RootKey(args)) => root_key::run(args, session, terminal).await,
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
