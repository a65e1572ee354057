//! `optimus events`

use std::time::Duration;

use optimus_common::api::v1::Event;
use tokio::time::Instant;

use crate::args::Global;
use crate::commands::{ScopeArgs, Session};
use crate::error::{Exit, Failure, printable};
use crate::output::{Terminal, age, clock_time, now};

pub const EXAMPLES: &str = "Examples:
  optimus events                    the latest
  optimus events -f                 and go on until Ctrl-C
  optimus events --since 120 --json";

/// A broken stream is taken up again after a pause, for at most this long.
const REOPEN_PAUSE: Duration = Duration::from_millis(500);
const REOPEN_FOR: Duration = Duration::from_secs(60);

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Go on with new events until Ctrl-C
    #[arg(long, short)]
    follow: bool,
    /// Only events after this state index
    #[arg(long, value_name = "INDEX")]
    since: Option<u64>,
}

pub async fn run(args: &Args, global: &Global, terminal: Terminal) -> Result<(), Failure> {
    let session = Session::open(global, &ScopeArgs::default(), terminal)?;
    if !args.follow {
        return stream(&session, args, &mut None).await;
    }
    tokio::select! {
        ended = follow(&session, args) => ended,
        _ = tokio::signal::ctrl_c() => Err(Failure::quiet(Exit::Interrupted)),
    }
}

async fn follow(session: &Session, args: &Args) -> Result<(), Failure> {
    let mut last = None;
    let mut broken_since: Option<Instant> = None;
    loop {
        let before = last;
        let ended = stream(session, args, &mut last).await;
        if last != before {
            broken_since = None;
        }
        let since = *broken_since.get_or_insert_with(Instant::now);
        match ended {
            Err(failure) if failure.exit != Exit::Unreachable || since.elapsed() > REOPEN_FOR => return Err(failure),
            _ => tokio::time::sleep(REOPEN_PAUSE).await,
        }
    }
}

/// Prints what comes after `last`, and moves it on.
async fn stream(session: &Session, args: &Args, last: &mut Option<(u64, u32)>) -> Result<(), Failure> {
    let mut query = Vec::new();
    query.extend(args.follow.then(|| ("follow", "true".to_owned())));
    // Several events may share an index: ask from before it, and skip those seen.
    query.extend(last.map(|(index, _)| index.saturating_sub(1)).or(args.since).map(|since| ("since", since.to_string())));
    let mut lines = session.client.stream("/v1/events", &query, "cannot read the events").await?;
    while let Some(event) = lines.next::<Event>().await? {
        let place = (event.index, event.n);
        if last.is_some_and(|last| place <= last) {
            continue;
        }
        *last = Some(place);
        if session.terminal.json {
            session.terminal.json_line(&event)?;
        } else {
            session.terminal.line(&line(&event, session.terminal, args.follow))?;
        }
    }
    Ok(())
}

fn line(event: &Event, terminal: Terminal, follow: bool) -> String {
    let paint = terminal.stdout_paint();
    let when = if follow { clock_time(event.at) } else { format!("{:>4}", age(now().since(event.at))) };
    let Event { index, kind, subject, message, .. } = event;
    let kind = if event.reason.as_ref().is_some_and(|reason| !reason.detail.is_calm()) { paint.bad(kind) } else { kind.clone() };
    format!("{}  {index:>6}  {kind}  {}  {}", paint.dim(&when), paint.bold(&printable(subject)), printable(message))
}
