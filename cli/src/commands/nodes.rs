//! `optimus nodes`

use optimus_common::api::v1::{ActionAnswer, JoinTokenAnswer, JoinTokenRequest, Node, NodePhase, Page};
use optimus_common::join_token::Role;
use optimus_common::{Name, Span, clock_skew};

use crate::args::Global;
use crate::commands::{ScopeArgs, Session, node_actions};
use crate::error::Failure;
use crate::output::{Terminal, age, count, now};

pub const EXAMPLES: &str = "Examples:
  optimus nodes                            list hosts
  optimus nodes drain host-1 --preview     what emptying a host would do
  optimus nodes join-token                 a token for one agent, good for an hour
  optimus nodes join-token --uses 10 --ttl 1d";

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// List hosts
    #[command(before_help = "Examples:\n  optimus nodes ls")]
    Ls,
    /// Show one host, its labels, and what is left of its drain
    #[command(before_help = "Examples:\n  optimus nodes show host-1")]
    Show {
        /// Its name, or its id where two have one name
        node: Name,
    },
    /// Set labels of a host, over those of its agent
    #[command(before_help = "Examples:\n  optimus nodes label host-1 zone=b disk=ssd\n  optimus nodes label host-1 zone-")]
    Label {
        /// Its name, or its id where two have one name
        node: Name,
        /// NAME=VALUE sets one, NAME- takes one away
        #[arg(required = true, value_name = "LABEL")]
        labels: Vec<String>,
    },
    /// Put a host into a pool
    #[command(before_help = "Examples:\n  optimus nodes pool host-1 batch\n  optimus nodes pool host-1 default")]
    Pool {
        /// Its name, or its id where two have one name
        node: Name,
        pool: Name,
    },
    /// Give a host no new copies; those it has stay
    #[command(before_help = "Examples:\n  optimus nodes cordon host-1")]
    Cordon {
        /// Its name, or its id where two have one name
        node: Name,
    },
    /// Let a host take copies again; also ends a drain
    #[command(before_help = "Examples:\n  optimus nodes uncordon host-1")]
    Uncordon {
        /// Its name, or its id where two have one name
        node: Name,
    },
    /// Empty a host: its copies are replaced elsewhere, a few at a time
    Drain(node_actions::Drain),
    /// Remove a host for good: its certificate is revoked and its copies start elsewhere
    #[command(before_help = "Examples:\n  optimus nodes rm host-7")]
    Rm {
        /// Its name, or its id where two have one name
        node: Name,
    },
    /// Make a token that lets agents join; it is shown once
    #[command(before_help = "Examples:\n  optimus nodes join-token > token.txt\n  optimus nodes join-token --uses 10 --ttl 1d")]
    JoinToken {
        /// How long it may be used [default: 1h, at most 30d]
        #[arg(long, value_name = "TIME")]
        ttl: Option<Span>,
        /// How many agents may use it [default: 1]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        uses: Option<u32>,
    },
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let session = Session::open(global, &ScopeArgs::default(), terminal)?;
    match &args.what {
        None | Some(What::Ls) => list(session).await,
        Some(What::Show { node }) => node_actions::show(&session, node).await,
        Some(What::Label { node, labels }) => node_actions::label(&session, node, labels).await,
        Some(What::Pool { node, pool }) => node_actions::pool(&session, node, pool).await,
        Some(What::Cordon { node }) => node_actions::cordon(&session, node, true).await,
        Some(What::Uncordon { node }) => node_actions::cordon(&session, node, false).await,
        Some(What::Drain(args)) => node_actions::drain(&session, args).await,
        Some(What::Rm { node }) => remove(&session, node).await,
        Some(What::JoinToken { ttl, uses }) => join_token(&session, JoinTokenRequest { ttl: *ttl, uses: *uses, role: Role::Agent }).await,
    }
}

async fn list(session: Session) -> Result<(), Failure> {
    let (terminal, what) = (session.terminal, "cannot list the nodes");
    let (session, _) = session.or_stale(what).await?;
    let nodes: Page<Node> = session.client.list("/v1/nodes", &[], what).await?;
    if terminal.json {
        terminal.json_document(&nodes)?;
        return Ok(());
    }
    if nodes.items.is_empty() {
        terminal.note("no nodes yet: make a token with `optimus nodes join-token`, then run `optimus agent` on a host");
        return Ok(());
    }
    let (now, paint) = (now(), terminal.stdout_paint());
    let rows = nodes
        .items
        .iter()
        .map(|node| {
            vec![
                node.name.clone(),
                match (node.phase, &node.drain, node.cordoned) {
                    (NodePhase::Down, ..) => paint.bad("down"),
                    (NodePhase::Up, Some(drain), _) if drain.done_at.is_none() => paint.busy("draining"),
                    (NodePhase::Up, Some(_), _) => paint.dim("drained"),
                    (NodePhase::Up, None, true) => paint.dim("cordoned"),
                    (NodePhase::Up, None, false) => paint.good("up"),
                },
                node.pool.clone(),
                node.address.clone(),
                node.copies.to_string(),
                format!("{}/{}", node.cpu_reserved, node.cpu),
                format!("{}/{}", node.memory_reserved.human(), node.memory.human()),
                node.drivers.join(","),
                node.version.clone(),
                age(now.since(node.last_seen)),
            ]
        })
        .collect();
    terminal.table(&["NODE", "PHASE", "POOL", "ADDRESS", "COPIES", "CPU", "MEMORY", "DRIVERS", "VERSION", "SEEN"], rows)?;
    for (node, skew) in nodes.items.iter().filter_map(|node| Some((node, node.clock_skew_ms?))) {
        let warning = terminal.stderr_paint().busy("warning:");
        terminal.note(&format!("{warning} the clock of {} is {}", node.name, clock_skew::in_words(skew)));
    }
    for node in nodes.items.iter().filter(|node| !node.unenforced.is_empty()) {
        terminal.note(&format!(
            "{} {} cannot enforce: {}",
            terminal.stderr_paint().busy("warning:"),
            node.name,
            node.unenforced.join(", ")
        ));
    }
    Ok(())
}

async fn remove(session: &Session, node: &Name) -> Result<(), Failure> {
    let path = format!("/v1/nodes/{}", node);
    let answer = session.client.delete::<ActionAnswer>(&path, "cannot remove the node").await?.value;
    let terminal = session.terminal;
    if terminal.json {
        terminal.json_document(&answer)?;
        return Ok(());
    }
    terminal.note(&format!("node {node} is removed; what it still runs, stop there (`systemctl stop optimus-agent` does not)"));
    Ok(())
}

async fn join_token(session: &Session, request: JoinTokenRequest) -> Result<(), Failure> {
    let terminal = session.terminal;
    let answer = session.client.post::<JoinTokenAnswer>("/v1/join-tokens", &request, "cannot make a join token").await?.value;
    if terminal.json {
        terminal.json_document(&answer)?;
        return Ok(());
    }
    terminal.line(&answer.token)?;
    terminal.note(&format!(
        "good for {} until {}; on the host, put it into a file and run `optimus agent --join-file FILE`",
        count(answer.uses.into(), "agent", "agents"),
        answer.expires_at
    ));
    Ok(())
}
