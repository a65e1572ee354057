//! The servers: looking at them, letting them in and out, choosing the leader.

use optimus_common::Span;
use optimus_common::api::v1::{ActionAnswer, ClusterView, JoinTokenAnswer, JoinTokenRequest, ServerRole, TransferAnswer, TransferRequest};
use optimus_common::join_token::Role;

use crate::commands::Session;
use crate::error::Failure;
use crate::output::count;

pub(super) async fn show(session: &Session, sentences: bool) -> Result<(), Failure> {
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
            "cluster {} at version {}: {} with a vote, {} in term {}, {} in the log",
            view.cluster,
            view.version,
            count(voters, "server", "servers"),
            view.leader.map_or_else(|| "no server leads".to_owned(), |id| format!("server {id} leads")),
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
    if let Some(rotation) = &view.rotation {
        terminal.note(&rotation.text);
    }
    for warning in &view.warnings {
        terminal.note(&format!("{} {warning}", terminal.stderr_paint().busy("warning:")));
    }
    Ok(())
}

pub(super) async fn join_token(session: &Session, ttl: Option<Span>, uses: Option<u32>) -> Result<(), Failure> {
    let terminal = session.terminal;
    let request = JoinTokenRequest { ttl, uses, role: Role::Server };
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

pub(super) async fn leave(session: &Session, server: u64) -> Result<(), Failure> {
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

pub(super) async fn transfer(session: &Session, to: Option<u64>) -> Result<(), Failure> {
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
