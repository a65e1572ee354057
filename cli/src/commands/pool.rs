//! `optimus pool`

use optimus_common::Name;
use optimus_common::api::v1::{Page, Pool, PoolLayout, PoolSettings, RemoveAnswer};

use crate::args::Global;
use crate::commands::{ScopeArgs, Session};
use crate::error::{Failure, printable};
use crate::output::{Terminal, count};

pub const EXAMPLES: &str = "Examples:
  optimus pool                           list pools
  optimus pool set gpu --layout bin-pack
  optimus nodes pool host-1 gpu          put a host into a pool";

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// List pools
    #[command(before_help = "Examples:\n  optimus pool ls")]
    Ls,
    /// Show one pool and its nodes
    #[command(before_help = "Examples:\n  optimus pool show gpu")]
    Show { pool: Name },
    /// Set how copies are laid out over the nodes of a pool; those that run stay
    #[command(before_help = "Examples:\n  optimus pool set gpu --layout bin-pack\n  optimus pool set default --layout spread")]
    Set {
        pool: Name,
        /// `spread`: the node with the most room; `bin-pack`: the fullest one that has room, so that others stay free
        #[arg(long, value_name = "LAYOUT", value_parser = ["spread", "bin-pack"])]
        layout: String,
    },
    /// Forget what was set for a pool; its nodes stay in it
    #[command(before_help = "Examples:\n  optimus pool rm gpu")]
    Rm { pool: Name },
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let session = Session::open(global, &ScopeArgs::default(), terminal)?;
    let path = |pool: &Name| format!("/v1/pools/{pool}");
    match &args.what {
        None | Some(What::Ls) => list(&session).await,
        Some(What::Show { pool }) => {
            let pool = session.client.get::<Pool>(&path(pool), &[], "cannot read the pool").await?.value;
            show(&session, &pool)
        }
        Some(What::Set { pool, layout }) => {
            let layout = if layout == "bin-pack" { PoolLayout::BinPack } else { PoolLayout::Spread };
            let pool = session.client.put::<Pool>(&path(pool), &PoolSettings { layout }, "cannot set the pool").await?.value;
            show(&session, &pool)
        }
        Some(What::Rm { pool }) => {
            let answer = session.client.delete::<RemoveAnswer>(&path(pool), "cannot forget the pool").await?.value;
            if terminal.json {
                terminal.json_document(&answer)?;
                return Ok(());
            }
            terminal.note(&format!("nothing is set for pool {pool} any more; its nodes stay in it"));
            Ok(())
        }
    }
}

fn word(layout: PoolLayout) -> &'static str {
    match layout {
        PoolLayout::Spread => "spread",
        PoolLayout::BinPack => "bin-pack",
    }
}

fn show(session: &Session, pool: &Pool) -> Result<(), Failure> {
    let terminal = session.terminal;
    if terminal.json {
        terminal.json_document(pool)?;
        return Ok(());
    }
    let mut names: Vec<String> = pool.node_names.iter().map(|name| printable(name)).collect();
    if pool.nodes as usize > names.len() {
        names.push(format!("and {} more", pool.nodes as usize - names.len()));
    }
    for (key, value) in [
        ("pool", printable(&pool.name)),
        ("layout", format!("{}{}", word(pool.layout), if pool.set { "" } else { " (nothing was set)" })),
        ("nodes", format!("{}, {} up: {}", pool.nodes, pool.nodes_up, names.join(", "))),
        ("copies", pool.copies.to_string()),
        ("cpu", format!("{} of {} reserved", pool.cpu_reserved, pool.cpu)),
        ("memory", format!("{} of {} reserved", pool.memory_reserved.human(), pool.memory.human())),
    ] {
        terminal.line(&format!("{key:<8} {value}"))?;
    }
    if pool.nodes == 0 {
        terminal.note(&format!("no host is in it yet: optimus nodes pool HOST {}", printable(&pool.name)));
    }
    Ok(())
}

async fn list(session: &Session) -> Result<(), Failure> {
    let terminal = session.terminal;
    let pools: Page<Pool> = session.client.list("/v1/pools", &[], "cannot list the pools").await?;
    if terminal.json {
        terminal.json_document(&pools)?;
        return Ok(());
    }
    let rows = pools.items.iter().map(|pool| {
        vec![
            printable(&pool.name),
            word(pool.layout).to_owned(),
            count(pool.nodes.into(), "node", "nodes"),
            pool.nodes_up.to_string(),
            pool.copies.to_string(),
            format!("{}/{}", pool.cpu_reserved, pool.cpu),
            format!("{}/{}", pool.memory_reserved.human(), pool.memory.human()),
        ]
    });
    terminal.table(&["POOL", "LAYOUT", "NODES", "UP", "COPIES", "CPU", "MEMORY"], rows.collect())?;
    Ok(())
}
