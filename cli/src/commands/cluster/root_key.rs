//! `optimus cluster root-key`

use std::path::PathBuf;

use optimus_control_plane::identity::root_key::RootKey;
use optimus_control_plane::rescue::crypt;
use optimus_host::files;

use super::keys::LockArgs;
use super::{failed, server_dir};
use crate::error::{Exit, Failure};
use crate::output::Terminal;

pub const EXAMPLES: &str = "Examples:
  optimus cluster root-key export --to root.key.age --recipient age1...    on a server, as its user";

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Write an encrypted copy of the root key of this host's server; restore asks for it
    #[command(before_help = EXAMPLES)]
    Export {
        /// File to write; replaced if it exists
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
        /// Data directory of the server; it may be running [default: that of `optimus server`]
        #[arg(long, value_name = "DIR")]
        data_dir: Option<PathBuf>,
        #[command(flatten)]
        lock: LockArgs,
    },
}

pub fn run(args: &Args, terminal: Terminal) -> Result<(), Failure> {
    const WHAT: &str = "cannot export the root key";
    let What::Export { to, data_dir, lock } = &args.what;
    let dir = server_dir(data_dir.clone())?;
    let lock = lock.lock(&terminal)?;
    let key = RootKey::open(&dir).map_err(|error| failed(WHAT, &error))?;
    let key = key.ok_or_else(|| {
        Failure::new(Exit::NotFound, WHAT)
            .because(format!("there is none in {}", dir.display()))
            .hint("name the data directory of a server with --data-dir")
    })?;
    let sealed = crypt::encrypt(&lock, key.to_text().as_bytes()).map_err(|error| failed(WHAT, &error))?;
    files::write_private(to, &sealed).map_err(|error| failed(WHAT, &error))?;
    terminal.note(&format!("wrote {}; keep it apart from the exports: together they are the whole cluster", to.display()));
    Ok(())
}
