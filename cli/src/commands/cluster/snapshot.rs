//! `optimus cluster snapshot`

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use optimus_common::api::v1::SnapshotRequest;
use optimus_control_plane::rescue::{export, restore};
use serde::Serialize;

use super::failed;
use super::keys::{KeyArgs, LockArgs, root_key};
use crate::args::Global;
use crate::commands::{ScopeArgs, Session};
use crate::error::{Exit, Failure};
use crate::output::Terminal;

pub const EXAMPLES: &str = "Examples:
  optimus cluster snapshot --to state.age --recipient age1...
  optimus cluster snapshot --to state.age --passphrase-file pass.txt
  optimus cluster snapshot verify state.age --identity key.txt --root-key root.key.age";

const WHAT: &str = "cannot export the state";

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,
    /// File to write; replaced if it exists
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
    #[command(flatten)]
    lock: LockArgs,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Read and check an export, and say what it holds
    #[command(before_help = "Examples:\n  optimus cluster snapshot verify state.age --identity key.txt --root-key root.key.age")]
    Verify {
        /// The export
        #[arg(value_name = "FILE")]
        file: PathBuf,
        #[command(flatten)]
        key: KeyArgs,
        /// Root key to try, as `optimus cluster root-key export` or the server wrote it
        #[arg(long, value_name = "FILE")]
        root_key: Option<PathBuf>,
    },
}

pub async fn run(args: Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    match args.what {
        Some(What::Verify { file, key, root_key }) => verify(&file, &key, root_key.as_deref(), terminal),
        None => take(args.to, &args.lock, global, terminal).await,
    }
}

async fn take(to: Option<PathBuf>, lock: &LockArgs, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let to = to.ok_or_else(|| Failure::usage(WHAT).because("no file was named").hint("add --to FILE"))?;
    let (recipients, passphrase) = lock.given(&terminal)?;
    let session = Session::open(global, &ScopeArgs::default(), terminal)?;
    let mut out = Beside::create(&to)?;
    let request = SnapshotRequest { recipients, passphrase };
    let mut bytes = 0u64;
    let index = session.client.download("/v1/cluster/snapshot", &request, WHAT, |piece| {
        bytes += piece.len() as u64;
        out.file.write_all(piece)
    });
    let index = index.await?;
    out.finish(&to)?;
    #[derive(Serialize)]
    struct Taken<'a> {
        file: &'a Path,
        index: Option<u64>,
        bytes: u64,
    }
    if terminal.json {
        terminal.json_document(&Taken { file: &to, index, bytes })?;
    }
    terminal.note(&format!("wrote {} ({bytes} bytes), the state at index {}", to.display(), index.unwrap_or(0)));
    terminal.note("  the root key is not in it: keep a copy with `optimus cluster root-key export`");
    Ok(())
}

/// A file that appears under its name only when it is whole and on disk.
struct Beside {
    file: File,
    path: PathBuf,
    done: bool,
}

impl Beside {
    fn create(to: &Path) -> Result<Self, Failure> {
        let mut name = to.file_name().ok_or_else(|| Failure::usage(WHAT).because(format!("{} names no file", to.display())))?.to_owned();
        name.push(format!(".tmp.{}", std::process::id()));
        let path = to.with_file_name(name);
        let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
        let file = file.map_err(|error| failed(WHAT, &error).because(path.display().to_string()))?;
        Ok(Beside { file, path, done: false })
    }

    fn finish(mut self, to: &Path) -> Result<(), Failure> {
        let parent = to.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let moved = self.file.sync_all().and_then(|()| fs::rename(&self.path, to)).and_then(|()| File::open(parent)?.sync_all());
        moved.map_err(|error| failed(WHAT, &error))?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if !self.done {
            let _ = fs::remove_file(&self.path); // half an export is worth nothing
        }
    }
}

/// What an export holds.
#[derive(Serialize)]
struct Verified {
    cluster: String,
    index: u64,
    term: u64,
    taken_at: String,
    version: String,
    workloads: usize,
    nodes: usize,
    copies: usize,
    root_key_fits: Option<bool>,
}

fn verify(file: &Path, key: &KeyArgs, root: Option<&Path>, terminal: Terminal) -> Result<(), Failure> {
    let key = key.key(&terminal)?;
    let what = format!("{} is no export that can be restored", file.display());
    let export = export::read_file(file, &key).map_err(|error| failed(&what, &error))?;
    let fits = match root {
        Some(path) => {
            let root = root_key(path, Some(&key))?;
            Some(restore::check_root_key(&export.state, &root).is_ok())
        }
        None => None,
    };
    let verified = Verified {
        cluster: export.head.cluster.to_string(),
        index: export.head.index,
        term: export.head.term,
        taken_at: export.head.taken_at.to_string(),
        version: export.head.version,
        workloads: export.state.workloads.len(),
        nodes: export.state.nodes.len(),
        copies: export.state.allocs.len(),
        root_key_fits: fits,
    };
    if terminal.json {
        terminal.json_document(&verified)?;
    } else {
        let Verified { cluster, index, term, taken_at, version, workloads, nodes, copies, root_key_fits } = verified;
        let root = match root_key_fits {
            Some(true) => "fits",
            Some(false) => "DOES NOT FIT",
            None => "not given",
        };
        for (name, value) in [
            ("cluster", cluster),
            ("index", format!("{index} (term {term})")),
            ("taken at", taken_at),
            ("written by", format!("optimus {version}")),
            ("holds", format!("{workloads} workloads, {copies} copies, {nodes} nodes")),
            ("root key", root.to_owned()),
        ] {
            terminal.line(&format!("{name:<12}{value}"))?;
        }
    }
    match fits {
        Some(false) => Err(Failure::new(Exit::Failed, "the root key does not open this export's CA key")
            .hint("it is the key of another cluster; look for the file `root.key` of a server of this one")),
        _ => Ok(()),
    }
}
