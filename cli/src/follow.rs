//! Following deployments to their end: long polls for the deployment, short ones for its copies, and
//! what is said when it ends.

use std::collections::BTreeMap;
use std::time::Duration;

use optimus_common::api::v1::{Allocation, Deployment, DeploymentPhase, LogRecord, Page};
use optimus_common::reason::{Reason, code};
use optimus_common::{DeploymentId, Name};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::client::Client;
use crate::commands::Session;
use crate::error::{Exit, Failure, printable};
use crate::live::{Progress, View};
use crate::output::now;
use crate::target;

/// Pause between two looks at the copies, and between two at a deployment whose server does not hold long polls.
const LOOK_EVERY: Duration = Duration::from_millis(400);
/// How long the server may be away (a restart, a change of leader) before following gives up.
const AWAY_MAX: Duration = Duration::from_secs(60);
/// Lines of a failing copy that are shown.
pub const LAST_LINES_MAX: usize = 20;
/// Longest wait for those lines.
const LAST_LINES_WITHIN: Duration = Duration::from_secs(5);
/// Messages between the watchers and the view.
const UPDATES_MAX: usize = 64;

enum Update {
    Deployment(Box<Deployment>),
    Copies(DeploymentId, Vec<Allocation>),
    /// The server does not answer at the moment.
    Away(String),
    Lost(Failure),
}

/// Follows all of `deployments` until each has ended, `timeout` has passed, or Ctrl-C.
///
/// # Errors
/// 7 after the timeout, 130 after Ctrl-C, 8 when the server stays away; the deployments go on in each case.
pub async fn to_the_end(
    session: &Session,
    deployments: Vec<Deployment>,
    index: u64,
    timeout: Option<Duration>,
) -> Result<BTreeMap<DeploymentId, Progress>, Failure> {
    let mut view = View::new(session.terminal);
    let (sender, mut updates) = mpsc::channel(UPDATES_MAX);
    // Dropped at the end, which stops the watchers.
    let mut watchers = JoinSet::new();
    let mut all = BTreeMap::new();
    for deployment in deployments {
        if !deployment.is_at_rest() {
            watchers.spawn(watch(session.client.clone(), deployment.clone(), index, sender.clone()));
        }
        all.insert(deployment.id, Progress { deployment, copies: Vec::new() });
    }
    drop(sender);
    view.show(&all, now());
    let started = Instant::now();
    let deadline = timeout.map(|timeout| started + timeout);
    let interrupt = tokio::signal::ctrl_c();
    tokio::pin!(interrupt);
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            update = updates.recv() => match update {
                None => return Ok(all),
                Some(Update::Deployment(deployment)) => {
                    if let Some(progress) = all.get_mut(&deployment.id) {
                        progress.deployment = *deployment;
                    }
                }
                Some(Update::Copies(id, copies)) => {
                    if let Some(progress) = all.get_mut(&id) {
                        progress.copies = keep_failed(std::mem::take(&mut progress.copies), copies);
                    }
                }
                Some(Update::Away(why)) => view.note(&format!("the server does not answer, trying again: {}", printable(&why))),
                Some(Update::Lost(failure)) => {
                    return Err(Failure { hint: Some(resume(&all)), ..failure });
                }
            },
            _ = tick.tick() => {}
            () = sleep_until(deadline) => {
                drop(view);
                let waited = started.elapsed().as_secs();
                return Err(Failure::new(Exit::TimedOut, format!("not finished after {waited} s; the deployment goes on")).because(unfinished(&all)).hint(resume(&all)));
            }
            interrupted = &mut interrupt => {
                drop(view);
                if interrupted.is_ok() {
                    session.terminal.note(&format!("detached; the deployment goes on\n  hint: {}", resume(&all)));
                }
                return Err(Failure::quiet(Exit::Interrupted));
            }
        }
        view.show(&all, now());
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// The command that takes up following again.
fn resume(all: &BTreeMap<DeploymentId, Progress>) -> String {
    let ids: Vec<String> =
        all.values().filter(|progress| !progress.deployment.phase.is_final()).map(|progress| progress.deployment.id.to_string()).collect();
    format!("follow it again with `optimus deploy --resume {}`", ids.join(","))
}

fn unfinished(all: &BTreeMap<DeploymentId, Progress>) -> String {
    let open: Vec<String> = all
        .values()
        .filter(|progress| !progress.deployment.phase.is_final())
        .map(|progress| crate::live::headline(&progress.deployment))
        .collect();
    open.join("; ")
}

/// Takes the newer view, but keeps copies of before that are gone from it: one of them may be why it failed.
fn keep_failed(old: Vec<Allocation>, mut new: Vec<Allocation>) -> Vec<Allocation> {
    for copy in old {
        if copy.reason.is_some() && !copy.ready && !new.iter().any(|other| other.id == copy.id) {
            new.push(Allocation { desired_run: false, ..copy });
        }
    }
    new
}

/// Reports one deployment until it has ended.
async fn watch(client: Client, deployment: Deployment, index: u64, updates: mpsc::Sender<Update>) {
    let copies_path = format!("{}/allocations", target::path(&deployment.key));
    let id = deployment.id;
    let look = async {
        loop {
            let _ = send_copies(&client, &copies_path, id, &updates).await;
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    tokio::select! {
        () = watch_deployment(&client, id, index, &updates) => {}
        () = look => {}
    }
    let _ = send_copies(&client, &copies_path, id, &updates).await;
}

async fn send_copies(client: &Client, path: &str, id: DeploymentId, updates: &mpsc::Sender<Update>) -> Result<(), Failure> {
    let copies: Page<Allocation> = client.list(path, &[("all", "true".into())], "cannot list the copies").await?;
    // The receiver is gone only when nobody follows any more.
    let _ = updates.send(Update::Copies(id, copies.items)).await;
    Ok(())
}

async fn watch_deployment(client: &Client, id: DeploymentId, mut index: u64, updates: &mpsc::Sender<Update>) {
    let path = format!("/v1/deployments/{id}");
    let mut away_since: Option<Instant> = None;
    loop {
        let asked = Instant::now();
        match client.get_changed::<Deployment>(&path, index, "cannot follow the deployment").await {
            Ok(answer) => {
                away_since = None;
                let last = answer.value.is_at_rest();
                if updates.send(Update::Deployment(Box::new(answer.value))).await.is_err() || last {
                    return;
                }
                // An answer at once without news: the server does not hold the poll.
                let news = answer.index.is_some_and(|at| at > index);
                index = answer.index.unwrap_or(index).max(index);
                if !news && asked.elapsed() < LOOK_EVERY {
                    tokio::time::sleep(LOOK_EVERY).await;
                }
            }
            Err(failure) => {
                let since = *away_since.get_or_insert(asked);
                if failure.exit != Exit::Unreachable || since.elapsed() > AWAY_MAX {
                    let _ = updates.send(Update::Lost(failure)).await;
                    return;
                }
                if since == asked {
                    let _ = updates.send(Update::Away(failure.why.join(": "))).await;
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
    }
}

/// What an ended deployment that did not succeed is told as; `None` for one that did.
pub async fn failure(client: &Client, progress: &Progress, request_id: Option<&str>) -> Option<Failure> {
    let Deployment { key, phase, reason, from_release, release, .. } = &progress.deployment;
    let (exit, what) = match (phase, from_release) {
        (DeploymentPhase::Succeeded, _) => return None,
        (phase, _) if phase.is_forward() => return None,
        (DeploymentPhase::Superseded, _) => (Exit::Conflict, format!("deployment of {key} release {release} was superseded")),
        (DeploymentPhase::Cancelled, _) => (Exit::Conflict, format!("deployment of {key} release {release} was cancelled")),
        (DeploymentPhase::RolledBack | DeploymentPhase::RollingBack, Some(from)) => {
            (Exit::DeploymentFailed, format!("deployment of {key} release {release} failed and was rolled back to release {from}"))
        }
        (_, _) => (Exit::DeploymentFailed, format!("deployment of {key} release {release} failed")),
    };
    let mut failure = Failure::new(exit, what);
    failure.request_id = request_id.map(str::to_owned);
    match reason {
        Some(reason) => {
            failure.code = Some(reason.code.clone());
            failure.why.push(reason.message.clone());
            failure.hint = Some(reason.hint.clone()).filter(|hint| !hint.is_empty());
        }
        None => failure.code = Some(code::DEADLINE_PASSED.code.to_owned()),
    }
    if exit == Exit::DeploymentFailed
        && let Some(copy) = culprit(progress)
    {
        if let Some(reason) =
            copy.reason.as_ref().filter(|reason| !reason.detail.is_calm() && !failure.why.iter().any(|why| why.contains(&reason.message)))
        {
            failure.why.push(format!("{}: {}", copy.name, reason.message));
        }
        let lines = last_lines(client, copy, *phase).await;
        if lines.is_empty() {
            failure.detail.push(format!("{} printed nothing", copy.name));
        } else {
            failure.detail.push(format!("last lines of {}:", copy.name));
            failure.detail.extend(lines.iter().map(|line| format!("  {} | {}", copy.name, printable(line))));
        }
        let rolled_back = from_release.is_some() && *phase != DeploymentPhase::Failed;
        if !rolled_back {
            failure.detail.push(format!("look closer: optimus explain {}/{}/{}", key.project, key.environment, copy.name));
        }
    }
    Some(failure)
}

/// The copy that kept it from succeeding: the one its reason names, else the first that is not ready.
fn culprit(progress: &Progress) -> Option<&Allocation> {
    let named = match progress.deployment.reason.as_ref().map(|reason| &reason.detail) {
        Some(Reason::DeadlinePassed { copy: Some(copy), .. }) => progress.new_copies().find(|other| other.name == *copy),
        _ => None,
    };
    named
        .or_else(|| progress.new_copies().find(|copy| !copy.ready && copy.reason.is_some()))
        .or_else(|| progress.new_copies().find(|copy| !copy.ready))
}

/// The end of what a copy printed: as reported with it, else asked for.
async fn last_lines(client: &Client, copy: &Allocation, phase: DeploymentPhase) -> Vec<String> {
    let mut lines = copy.last_lines.clone();
    // After a roll-back the name belongs to the old release's copy again, so its log is not asked for.
    if lines.is_empty() && phase == DeploymentPhase::Failed && Name::new(copy.name.as_str()).is_ok() {
        let asked = tokio::time::timeout(LAST_LINES_WITHIN, ask_lines(client, copy)).await;
        lines = asked.unwrap_or_else(|_| Ok(Vec::new())).unwrap_or_default();
    }
    lines.split_off(lines.len().saturating_sub(LAST_LINES_MAX))
}

async fn ask_lines(client: &Client, copy: &Allocation) -> Result<Vec<String>, Failure> {
    let query = [("copy", copy.name.clone()), ("tail", LAST_LINES_MAX.to_string())];
    let mut stream = client.stream(&format!("{}/logs", target::path(&copy.key)), &query, "cannot read the log").await?;
    let mut lines = Vec::new();
    while let Some(record) = stream.next::<LogRecord>().await? {
        lines.push(record.text);
        if lines.len() > LAST_LINES_MAX {
            lines.remove(0);
        }
    }
    Ok(lines)
}
