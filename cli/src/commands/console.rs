//! `optimus console`

use optimus_common::api::v1::LoginCodeAnswer;

use crate::args::Global;
use crate::commands::{ScopeArgs, Session};
use crate::error::Failure;
use crate::output::Terminal;

pub const EXAMPLES: &str = "Examples:
  optimus console                          a link that opens the web console, logged in
  xdg-open \"$(optimus console)\"";

#[derive(Debug, clap::Args)]
pub struct Args {}

pub async fn run(_: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let session = Session::open(global, &ScopeArgs::default(), terminal)?;
    let (link, answer) = link(&session).await?;
    if terminal.json {
        terminal.json_document(&serde_json::json!({ "url": link, "expires_at": answer.expires_at }))?;
        return Ok(());
    }
    terminal.line(&link)?;
    terminal.note("good for five minutes and one browser; the browser must trust the cluster's CA, or be told to go on");
    Ok(())
}

/// A link that logs one browser in. The code stands behind `#`, which a browser sends to nobody.
pub async fn link(session: &Session) -> Result<(String, LoginCodeAnswer), Failure> {
    let answer = session.client.post::<LoginCodeAnswer>("/v1/login-codes", &(), "cannot make a link to the console").await?.value;
    Ok((format!("{}/#code={}", session.client.url(), answer.code), answer))
}
