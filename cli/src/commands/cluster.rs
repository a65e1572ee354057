//! `optimus cluster`

use optimus_common::Span;
use optimus_common::api::v1::{ActionAnswer, ClusterView, JoinTokenAnswer, JoinTokenRequest, ServerRole, TransferAnswer, TransferRequest};
use optimus_common::join_token::Role;

use crate::args::Global;
use crate::commands::{ScopeArgs, Session};
use crate::error::Failure;
use crate::output::{Terminal, count};

pub const EXAMPLES: &str = "Examples:
  optimus cluster                          the servers and how they are
  optimus cluster join-token               a token for one more server, good for an hour
  optimus cluster transfer-leader --to 7   plan maintenance of the leader's host
  optimus cluster leave --server 7         remove a server, dead or alive";

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
}

/// The server to run instead of a request, for `cluster join`.
pub fn server_to_join(args: Args) -> Result<super::server::Args, Args> {
    match args.what {
        Some(What::Join { token, server }) => Ok(server.joining(token)),
        what => Err(Args { what }),
    }
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let session = Session::open(global, &ScopeArgs::default(), terminal)?;
    match &args.what {
        None => show(&session, true).await,
        Some(What::Status) => show(&session, true).await,
        Some(What::Members) => show(&session, false).await,
        Some(What::JoinToken { ttl, uses }) => join_token(&session, JoinTokenRequest { ttl: *ttl, uses: *uses, role: Role::Server }).await,
        Some(What::Leave { server }) => leave(&session, *server).await,
        Some(What::TransferLeader { to }) => transfer(&session, *to).await,
        Some(What::Join { .. }) => Err(Failure::usage("`cluster join` starts a server")),
    }
}

async fn show(session: &Session, sentences: bool) -> Result<(), Failure> {
    let terminal = session.terminal;
    let view = session.client.get::<ClusterView>("/v1/cluster", &[], "cannot look at the cluster").await?.value;
    if terminal.json {
        terminal.json_document(&view)?;
        return Ok(());
    }
    let paint = terminal.stdout_paint();
    if sentences {
        let voters = view.servers.iter().filter(|s| matches!(s.role, ServerRole::Leader | ServerRole::Voter)).count() as u64;
        terminal.line(&format!(
            "cluster {} at version {}: {} with a vote, server {} leads in term {}, {} in the log",
            view.cluster,
            view.version,
            count(voters, "server", "servers"),
            view.leader,
            view.term,
            count(view.last_log, "entry", "entries"),
        ))?;
    }
    let rows = view
        .servers
        .iter()
        .map(|server| {
            let role = match server.role {
                ServerRole::Leader => "leader",
                ServerRole::Voter => "voter",
                ServerRole::Learner => "learner",
                ServerRole::Joining => "joining",
                ServerRole::Leaving => "leaving",
            };
            vec![
                server.id.to_string(),
                server.name.clone(),
                server.address.clone(),
                server.api.clone(),
                role.to_owned(),
                if server.alive { paint.good("alive") } else { paint.bad("silent") },
                server.behind.map_or_else(|| "?".to_owned(), |n| n.to_string()),
                server.version.clone(),
            ]
        })
        .collect();
    terminal.table(&["ID", "NAME", "ADDRESS", "API", "ROLE", "STATE", "BEHIND", "VERSION"], rows)?;
    for warning in &view.warnings {
        terminal.note(&format!("{} {warning}", terminal.stderr_paint().busy("warning:")));
    }
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
        "good for {} until {}; on the host: `optimus server --agent-listen 0.0.0.0:7601 --advertise HOST:7601 --join TOKEN`",
        count(answer.uses.into(), "server", "servers"),
        answer.expires_at
    ));
    Ok(())
}

async fn leave(session: &Session, server: u64) -> Result<(), Failure> {
    let path = format!("/v1/cluster/servers/{server}");
    let answer = session.client.delete::<ActionAnswer>(&path, "cannot remove the server").await?.value;
    let terminal = session.terminal;
    if terminal.json {
        terminal.json_document(&answer)?;
        return Ok(());
    }
    terminal.note(&if answer.changed { format!("server {server} is leaving") } else { format!("server {server} was leaving already") });
    Ok(())
}

async fn transfer(session: &Session, to: Option<u64>) -> Result<(), Failure> {
    let request = TransferRequest { to };
    let answer = session.client.post::<TransferAnswer>("/v1/cluster:transfer-leader", &request, "cannot hand leadership over").await?.value;
    let terminal = session.terminal;
    if terminal.json {
        terminal.json_document(&answer)?;
        return Ok(());
    }
    terminal.note(&format!("server {} leads now", answer.leader));
    Ok(())
}
