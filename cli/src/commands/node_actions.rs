//! What `optimus nodes` does to a host: show, label, pool, cordon, drain.

use std::collections::BTreeMap;
use std::time::Duration;

use optimus_common::api::v1::{DrainPreview, DrainRequest, LabelRequest, Node, NodeDevice, PoolRequest};
use optimus_common::{Name, Span};

use crate::commands::{Session, WaitArgs};
use crate::error::{Exit, Failure, printable};
use crate::output::{count, took};

/// Pause between two looks at a drain.
const LOOK_EVERY: Duration = Duration::from_millis(500);

#[derive(Debug, clap::Args)]
#[command(
    before_help = "Examples:\n  optimus nodes drain host-1 --preview     where each copy would go, and what would wait\n  optimus nodes drain host-1 --deadline 10m\n  optimus nodes drain host-1 --cancel"
)]
pub struct Drain {
    /// Its name, or its id where two have one name
    node: Name,
    /// Only say what would happen
    #[arg(long, conflicts_with_all = ["cancel", "force", "deadline"])]
    preview: bool,
    /// Stop what is left after so long
    #[arg(long, value_name = "TIME", conflicts_with = "force")]
    deadline: Option<Span>,
    /// Stop everything now, whether there is room elsewhere or not
    #[arg(long)]
    force: bool,
    /// Leave daemons where they are
    #[arg(long)]
    keep_daemons: bool,
    /// Stop draining; what still runs there stays
    #[arg(long, conflicts_with_all = ["force", "deadline", "keep_daemons"])]
    cancel: bool,
    #[command(flatten)]
    wait: WaitArgs,
}

async fn act(session: &Session, node: &Name, verb: &str, body: &impl serde::Serialize, what: &str) -> Result<Node, Failure> {
    Ok(session.client.post::<Node>(&format!("/v1/nodes/{node}:{verb}"), body, what).await?.value)
}

fn done(session: &Session, node: &Node, said: &str) -> Result<(), Failure> {
    if session.terminal.json {
        session.terminal.json_document(node)?;
        return Ok(());
    }
    session.terminal.note(&format!("{} {said}", printable(&node.name)));
    Ok(())
}

pub async fn cordon(session: &Session, node: &Name, on: bool) -> Result<(), Failure> {
    let (verb, said) = if on { ("cordon", "takes no new copies") } else { ("uncordon", "takes copies again") };
    let row = act(session, node, verb, &serde_json::json!({}), &format!("cannot {verb} the node")).await?;
    done(session, &row, said)
}

pub async fn pool(session: &Session, node: &Name, pool: &Name) -> Result<(), Failure> {
    let row = act(session, node, "pool", &PoolRequest { pool: Some(pool.clone()) }, "cannot set the pool of the node").await?;
    done(session, &row, &format!("is in pool {}", row.pool))
}

/// `zone=b` sets, `zone-` takes away.
pub async fn label(session: &Session, node: &Name, changes: &[String]) -> Result<(), Failure> {
    let mut labels = BTreeMap::new();
    for change in changes {
        let (key, value) = match (change.split_once('='), change.strip_suffix('-')) {
            (Some((key, value)), _) => (key, Some(value.to_owned())),
            (None, Some(key)) => (key, None),
            (None, None) => {
                let failure = Failure::new(Exit::Usage, format!("cannot read the label `{change}`"));
                return Err(failure.hint("write NAME=VALUE, or NAME- to take one away"));
            }
        };
        labels.insert(key.to_owned(), value);
    }
    let row = act(session, node, "label", &LabelRequest { labels }, "cannot label the node").await?;
    let shown: Vec<String> = row.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
    done(session, &row, &format!("has {}", if shown.is_empty() { "no labels".to_owned() } else { shown.join(" ") }))
}

pub async fn show(session: &Session, node: &Name) -> Result<(), Failure> {
    let row = session.client.get::<Node>(&format!("/v1/nodes/{node}"), &[], "cannot read the node").await?.value;
    let terminal = session.terminal;
    if terminal.json {
        terminal.json_document(&row)?;
        return Ok(());
    }
    let labels: Vec<String> = row.labels.iter().map(|(k, v)| format!("{k}={}", printable(v))).collect();
    let kept = row.host_reserve;
    let takes = if row.cordoned { "cordoned: takes no new copies" } else { "takes copies" };
    for (key, value) in [
        ("node", printable(&row.name)),
        ("id", row.id.to_string()),
        ("address", printable(&row.address)),
        ("pool", row.pool.clone()),
        ("labels", labels.join(" ")),
        ("state", takes.to_owned()),
        ("copies", row.copies.to_string()),
        ("cpu", format!("{} of {} reserved", row.cpu_reserved, row.cpu)),
        ("memory", format!("{} of {} reserved", row.memory_reserved.human(), row.memory.human())),
        ("disk", format!("{} of {} reserved, {} free", row.disk_reserved.human(), row.disk.human(), row.disk_free.human())),
        ("host", format!("{} cores, {} memory, {} disk are kept for it", kept.cpu, kept.memory.human(), kept.disk.human())),
    ] {
        terminal.line(&format!("{key:<8} {value}"))?;
    }
    let holders =
        |device: &NodeDevice| device.holder.as_ref().map_or_else(|| "free".to_owned(), |holder| format!("held by {}", printable(holder)));
    let devices = row.devices.iter().map(|d| format!("{} {} {}", printable(&d.kind), printable(&d.id), holders(d)));
    let attributes = row.attributes.iter().map(|(k, v)| format!("{k} = {}", printable(v)));
    let groups: [(&str, Vec<String>); 3] =
        [("devices", devices.collect()), ("volumes", row.volumes.clone()), ("found", attributes.collect())];
    for (key, lines) in groups {
        for (n, line) in lines.iter().enumerate() {
            terminal.line(&format!("{:<8} {line}", if n == 0 { key } else { "" }))?;
        }
    }
    if let Some(drain) = &row.drain {
        let state = match (drain.done_at, drain.deadline) {
            (Some(at), _) => format!("drained at {at}"),
            (None, Some(at)) => format!("draining since {}, what is left at {at} is stopped", drain.started_at),
            (None, None) => format!("draining since {}", drain.started_at),
        };
        terminal.line(&format!("{:<8} {state}", "drain"))?;
        for left in &drain.left {
            terminal.line(&format!("{:<8} {}: {}", "", printable(&left.copy), printable(&left.why)))?;
        }
    }
    Ok(())
}

pub async fn drain(session: &Session, args: &Drain) -> Result<(), Failure> {
    let Drain { node, preview: preview_only, deadline, force, keep_daemons, cancel, wait } = args;
    if *preview_only {
        return preview(session, node, *keep_daemons).await;
    }
    if *cancel {
        let row = act(session, node, "cancel-drain", &serde_json::json!({}), "cannot cancel the drain").await?;
        return done(session, &row, if row.cordoned { "is no longer drained; it stays cordoned" } else { "is no longer drained" });
    }
    let request = DrainRequest { deadline: *deadline, force: *force, keep_daemons: *keep_daemons };
    let row = act(session, node, "drain", &request, "cannot drain the node").await?;
    match wait.limit() {
        Some(limit) => until_drained(session, row, limit).await,
        None => done(session, &row, "is being drained"),
    }
}

async fn until_drained(session: &Session, mut row: Node, limit: Duration) -> Result<(), Failure> {
    let started = tokio::time::Instant::now();
    let resume = format!("optimus nodes show {}", row.name);
    let interrupt = tokio::signal::ctrl_c();
    tokio::pin!(interrupt);
    let mut told = String::new();
    loop {
        let Some(drain) = &row.drain else { return Err(Failure::new(Exit::Failed, "the drain was cancelled")) };
        if let Some(at) = drain.done_at {
            let said = format!("is drained, in {}", took(at.since(drain.started_at)));
            return done(session, &row, &said);
        }
        let left = match drain.left.as_slice() {
            [] => "about to end".to_owned(),
            [first, ..] => format!("{} left; {} {}", count(drain.left.len() as u64, "copy", "copies"), first.copy, first.why),
        };
        if left != told {
            session.terminal.note(&printable(&left));
            told = left.clone();
        }
        if started.elapsed() >= limit {
            let failure = Failure::new(Exit::TimedOut, format!("not drained after {} s; it goes on", limit.as_secs()));
            return Err(failure.because(left).hint(resume));
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY.min(limit)) => {}
            _ = &mut interrupt => {
                session.terminal.note(&format!("detached; the drain goes on\n  hint: {resume}"));
                return Err(Failure::quiet(Exit::Interrupted));
            }
        }
        row = session.client.get::<Node>(&format!("/v1/nodes/{}", row.id), &[], "cannot follow the drain").await?.value;
    }
}

async fn preview(session: &Session, node: &Name, keep_daemons: bool) -> Result<(), Failure> {
    let query = [("keep_daemons", keep_daemons.to_string())];
    let path = format!("/v1/nodes/{node}:preview-drain");
    let preview = session.client.get::<DrainPreview>(&path, &query, "cannot preview the drain").await?.value;
    let terminal = session.terminal;
    if terminal.json {
        terminal.json_document(&preview)?;
        return Ok(());
    }
    if preview.copies.is_empty() {
        terminal.note(&format!("{node} has no copies: it would be drained at once"));
        return Ok(());
    }
    let fate = |copy: &optimus_common::api::v1::DrainFate| match (copy.fate.as_str(), &copy.to, &copy.reason) {
        ("moves", Some(to), _) => format!("moves to {}", printable(to)),
        ("waits", _, Some(reason)) => format!("waits: {}", printable(&reason.message)),
        ("finishes", ..) => "is left to finish its run".to_owned(),
        ("stops_last", ..) => "stops last".to_owned(),
        (other, ..) => printable(other),
    };
    terminal.table(&["COPY", "WOULD"], preview.copies.iter().map(|copy| vec![copy.copy.clone(), fate(copy)]).collect())?;
    terminal.note(&format!("in at most {}; nothing was touched", count(preview.waves.into(), "wave", "waves")));
    Ok(())
}
