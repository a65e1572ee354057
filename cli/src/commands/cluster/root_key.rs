//! `optimus cluster root-key`

use std::path::{Path, PathBuf};

use optimus_common::api::v1::ActionAnswer;
use optimus_control_plane::identity::root_key::RootKey;
use optimus_control_plane::rescue::crypt;
use optimus_host::files;

use super::keys::LockArgs;
use super::{failed, server_dir};
use crate::commands::Session;
use crate::error::{Exit, Failure};
use crate::output::Terminal;

pub const EXAMPLES: &str = "Examples:
  optimus cluster root-key export --to root.key.age --recipient age1...    on a server, as its user
  optimus cluster root-key rotate                                          replace it; every server must be there";

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
    /// Replace the root key on all servers; exports and archives made before need the old one
    #[command(before_help = EXAMPLES)]
    Rotate,
}

pub async fn run(args: Args, session: impl FnOnce() -> Result<Session, Failure>, terminal: Terminal) -> Result<(), Failure> {
    match args.what {
        What::Export { to, data_dir, lock } => export(&to, data_dir, &lock, terminal),
        What::Rotate => rotate(&session()?).await,
    }
}

async fn rotate(session: &Session) -> Result<(), Failure> {
    let nothing = serde_json::json!({});
    let what = "cannot replace the root key";
    let answer = session.client.post::<ActionAnswer>("/v1/cluster:rotate-root-key", &nothing, what).await?.value;
    if session.terminal.json {
        return Ok(session.terminal.json_document(&answer)?);
    }
    session.terminal.note(
        "every server uses the new root key from now on; export it (`optimus cluster root-key export`).\n\
         Exports and archives made before are restored with the old one, which servers keep as root.key.retired",
    );
    Ok(())
}

fn export(to: &Path, data_dir: Option<PathBuf>, lock: &LockArgs, terminal: Terminal) -> Result<(), Failure> {
    const WHAT: &str = "cannot export the root key";
    let dir = server_dir(data_dir)?;
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
