//! `optimus volume`

use std::io::BufRead;

use optimus_common::Name;
use optimus_common::api::v1::{Page, RemoveAnswer, Volume, VolumeRequest};

use crate::args::Global;
use crate::commands::{ScopeArgs, Session};
use crate::error::{Exit, Failure, printable};
use crate::output::Terminal;

pub const EXAMPLES: &str = "Examples:
  optimus volume                                   list volumes and who holds them
  optimus volume create shop/prod/data --node host-1
  optimus volume inspect shop/prod/data
  optimus volume rm shop/prod/data                 asks for the name first";

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// List volumes and who holds them
    #[command(before_help = "Examples:\n  optimus volume ls\n  optimus volume ls --orphans")]
    Ls {
        /// Only those that nobody holds or asks for
        #[arg(long)]
        orphans: bool,
        #[command(flatten)]
        scope: ScopeArgs,
    },
    /// Show one volume
    #[command(before_help = "Examples:\n  optimus volume inspect shop/prod/data")]
    Inspect {
        /// `project/env/volume`
        volume: String,
    },
    /// Make a volume on a host: copies that ask for it run there
    #[command(before_help = "Examples:\n  optimus volume create shop/prod/data --node host-1")]
    Create {
        /// `project/env/volume`
        volume: String,
        /// Name or id of the host
        #[arg(long, value_name = "HOST")]
        node: String,
    },
    /// Forget a volume that nobody uses; its files stay on its host
    #[command(before_help = "Examples:\n  optimus volume rm shop/prod/data\n  optimus volume rm shop/prod/data --yes      for scripts")]
    Rm {
        /// `project/env/volume`
        volume: String,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let none = ScopeArgs::default();
    let scope = if let Some(What::Ls { scope, .. }) = &args.what { scope } else { &none };
    if let Some(What::Rm { volume, yes: false }) = &args.what
        && !(terminal.stdin_tty && terminal.stderr_tty)
    {
        return Err(Failure::usage(format!("cannot ask whether to remove `{volume}`"))
            .because("this is no terminal, and removing is not undone")
            .hint(format!("optimus volume rm {volume} --yes")));
    }
    let session = Session::open(global, scope, terminal)?;
    match &args.what {
        None => list(&session, false).await,
        Some(What::Ls { orphans, .. }) => list(&session, *orphans).await,
        Some(What::Inspect { volume }) => {
            let volume = session.client.get::<Volume>(&path(volume)?, &[], "cannot read the volume").await?.value;
            show(&session, &volume)
        }
        Some(What::Create { volume, node }) => {
            let request = VolumeRequest { node: node.clone() };
            let volume = session.client.put::<Volume>(&path(volume)?, &request, "cannot create the volume").await?.value;
            show(&session, &volume)
        }
        Some(What::Rm { volume, yes }) => remove(&session, volume, *yes).await,
    }
}

fn path(volume: &str) -> Result<String, Failure> {
    let names: Vec<Name> = volume.split('/').filter_map(|part| Name::new(part).ok()).collect();
    match names.as_slice() {
        [project, environment, name] if volume.split('/').count() == 3 => {
            Ok(format!("/v1/projects/{project}/envs/{environment}/volumes/{name}"))
        }
        _ => {
            Err(Failure::new(Exit::Usage, format!("`{volume}` names no volume")).hint("write `project/env/volume`, such as shop/prod/data"))
        }
    }
}

fn name(volume: &Volume) -> String {
    format!("{}/{}/{}", volume.project, volume.environment, volume.name)
}

async fn remove(session: &Session, volume: &str, yes: bool) -> Result<(), Failure> {
    let terminal = session.terminal;
    let path = path(volume)?;
    if !yes {
        let row = session.client.get::<Volume>(&path, &[], "cannot read the volume").await?.value;
        terminal.note(&format!("{volume} on {} is forgotten; its files stay there. This is not undone.", printable(&row.node_name)));
        terminal.note_raw(&format!("Type {} to go on: ", terminal.stderr_paint().bold(row.name.as_str())));
        let mut typed = String::new();
        std::io::stdin().lock().read_line(&mut typed)?;
        if typed.trim() != row.name.as_str() {
            return Err(Failure::new(Exit::Failed, format!("{volume} was not removed")).because("what was typed is not its name"));
        }
    }
    let answer = session.client.delete::<RemoveAnswer>(&path, &format!("cannot remove volume {volume}")).await?.value;
    if terminal.json {
        terminal.json_document(&answer)?;
        return Ok(());
    }
    terminal.note(&format!("volume {volume} is forgotten; its files stay on its host"));
    Ok(())
}

fn show(session: &Session, volume: &Volume) -> Result<(), Failure> {
    let terminal = session.terminal;
    if terminal.json {
        terminal.json_document(volume)?;
        return Ok(());
    }
    let or_none = |list: Vec<String>| if list.is_empty() { "nobody".to_owned() } else { list.join(", ") };
    for (key, value) in [
        ("volume", name(volume)),
        ("node", format!("{}{}", printable(&volume.node_name), if volume.node_up { "" } else { " (down)" })),
        ("held by", or_none(volume.holders.clone())),
        ("asked by", or_none(volume.workloads.iter().map(|key| key.to_string()).collect())),
    ] {
        terminal.line(&format!("{key:<8} {value}"))?;
    }
    if volume.orphan {
        terminal.note("nobody uses it; it stays until somebody removes it");
    }
    Ok(())
}

async fn list(session: &Session, orphans: bool) -> Result<(), Failure> {
    let terminal = session.terminal;
    let scope = &session.scope;
    let query: Vec<(&str, String)> = [("project", &scope.project), ("environment", &scope.environment)]
        .into_iter()
        .filter_map(|(key, value)| Some((key, value.as_ref()?.to_string())))
        .collect();
    let mut volumes: Page<Volume> = session.client.list("/v1/volumes", &query, "cannot list the volumes").await?;
    volumes.items.retain(|volume| volume.orphan || !orphans);
    if terminal.json {
        terminal.json_document(&volumes)?;
        return Ok(());
    }
    if volumes.items.is_empty() {
        let said = if orphans { "every volume is used" } else { "no volumes\n  hint: optimus volume create PROJECT/ENV/NAME --node HOST" };
        terminal.note(said);
        return Ok(());
    }
    let paint = terminal.stdout_paint();
    let rows = volumes.items.iter().map(|volume| {
        let holders = match (volume.holders.as_slice(), volume.workloads.as_slice()) {
            ([], []) => paint.dim("orphan"),
            ([], [first, ..]) => paint.dim(&format!("none of {first}")),
            (holders, _) => holders.join(","),
        };
        vec![name(volume), printable(&volume.node_name), if volume.node_up { "up".into() } else { paint.bad("down") }, holders]
    });
    terminal.table(&["VOLUME", "NODE", "NODE IS", "HELD BY"], rows.collect())?;
    Ok(())
}
