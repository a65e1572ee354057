//! Replacing the cluster's CA: start it, watch it, push it on, take it back.

use std::time::Duration;

use optimus_common::Span;
use optimus_common::api::v1::{ActionAnswer, ClusterView, RotateCaRequest};

use crate::commands::Session;
use crate::error::{Exit, Failure};

pub(super) const EXAMPLES: &str = "Examples:
  optimus cluster rotate-ca                   begin, and return at once
  optimus cluster rotate-ca --watch           begin, or find the one under way, and follow it to its end
  optimus cluster rotate-ca --overlap 2d      nodes that are away have two days to come back; 7 if not said
  optimus cluster status                      how far it is, and whom it waits for
  optimus cluster rotate-ca --force           do not wait for the nodes named there
  optimus cluster rotate-ca --abort           take it back, until the new CA signs";

/// Time between two looks of `--watch`.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Looks in a row that may fail: servers show new certificates meanwhile, and one may be restarting.
const FAILURES_MAX: u32 = 30;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Follow the rotation to its end; one that is under way already is followed, too
    #[arg(long, conflicts_with_all = ["force", "abort"])]
    watch: bool,
    /// How long both CAs are trusted at most, 1m to 90d [7d]; nodes that are away longer renew when they come back
    #[arg(long, value_name = "TIME")]
    overlap: Option<Span>,
    /// Let the phase the rotation is in wait for no node any longer
    #[arg(long, conflicts_with_all = ["overlap", "abort"])]
    force: bool,
    /// Give the rotation up; possible until the new CA signs
    #[arg(long, conflicts_with_all = ["overlap", "force"])]
    abort: bool,
}

pub(super) async fn run(session: &Session, args: Args) -> Result<(), Failure> {
    let Args { watch, overlap, force, abort } = args;
    let before = if watch { Some(look(session).await?) } else { None };
    if before.as_ref().is_none_or(|view| view.rotation.is_none()) {
        let request = RotateCaRequest { force, abort, overlap };
        let answer = session.client.post::<ActionAnswer>("/v1/cluster:rotate-ca", &request, "cannot rotate the CA").await?.value;
        if session.terminal.json && !watch {
            return Ok(session.terminal.json_document(&answer)?);
        }
        session.terminal.note(match (force, abort) {
            (true, _) => "the rotation goes on without the nodes it waited for; `optimus events` names those left out",
            (_, true) => "the rotation is given up; the old CA signs as before",
            _ => "a new CA is announced; `optimus cluster status` tells how far the rotation is",
        });
    }
    match before {
        Some(before) => follow(session, &before).await,
        None => Ok(()),
    }
}

async fn look(session: &Session) -> Result<ClusterView, Failure> {
    let view = session.client.get::<ClusterView>("/v1/cluster", &[], "cannot look at the cluster").await?.value;
    session.learn_ca(&view.ca_pem);
    Ok(view)
}

/// Says each change until the rotation is over; an error when it was given up.
async fn follow(session: &Session, before: &ClusterView) -> Result<(), Failure> {
    let terminal = session.terminal;
    let (mut said, mut to, mut failures) = (String::new(), before.rotation.as_ref().map(|r| r.to), 0);
    loop {
        let view = match look(session).await {
            Ok(view) => view,
            Err(failure) if failures == FAILURES_MAX => return Err(failure),
            Err(_) => {
                failures += 1;
                tokio::time::sleep(LOOK_EVERY).await;
                continue;
            }
        };
        failures = 0;
        let Some(rotation) = &view.rotation else {
            // The one we began may have been over before the first look.
            if to.map_or(view.ca == before.ca, |to| to != view.ca) {
                return Err(Failure::new(Exit::Failed, "the rotation was given up")
                    .because(format!("CA {} signs as before", view.ca))
                    .hint("`optimus events` tells why"));
            }
            if terminal.json {
                return Ok(terminal.json_document(&view)?);
            }
            terminal.note(&format!("CA {} signs, and nobody trusts the one before any more", view.ca));
            return Ok(());
        };
        to = Some(rotation.to);
        if rotation.text != said {
            said.clone_from(&rotation.text);
            terminal.note(&said);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
