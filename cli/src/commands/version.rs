//! `optimus version`

use std::time::Duration;

use optimus_common::api::v1::Version;

use crate::args::Global;
use crate::commands::{ScopeArgs, Session};
use crate::error::Failure;
use crate::output::Terminal;

pub const EXAMPLES: &str = "Examples:
  optimus version
  optimus version --json";

/// Longest wait for the server's answer; the version of this program does not depend on it.
const SERVER_WITHIN: Duration = Duration::from_secs(2);

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Do not ask the server
    #[arg(long)]
    client: bool,
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let ours = env!("CARGO_PKG_VERSION");
    let server = if args.client { Err(None) } else { ask(global, terminal).await.map_err(Some) };
    if terminal.json {
        terminal.json_document(&serde_json::json!({ "version": ours, "server": server.as_ref().ok() }))?;
        return Ok(());
    }
    terminal.line(&format!("optimus {ours}"))?;
    match server {
        Ok(server) => {
            let cluster = server.cluster.map(|cluster| format!(", cluster {cluster}")).unwrap_or_default();
            terminal.line(&format!("server  {} (api {}{cluster})", server.version, server.api.join(", ")))?;
        }
        Err(Some(failure)) => terminal.note(&format!("server  not asked: {}", failure.why.first().unwrap_or(&failure.what))),
        Err(None) => {}
    }
    Ok(())
}

async fn ask(global: &Global, terminal: Terminal) -> Result<Version, Failure> {
    let session = Session::open(global, &ScopeArgs::default(), terminal)?;
    let asked = session.client.get::<Version>("/v1/version", &[], "cannot ask the server's version");
    match tokio::time::timeout(SERVER_WITHIN, asked).await {
        Ok(answer) => Ok(answer?.value),
        Err(_) => Err(crate::error::unreachable(session.client.url(), format!("no answer within {} s", SERVER_WITHIN.as_secs()))),
    }
}
