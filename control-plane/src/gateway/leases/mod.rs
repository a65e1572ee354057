//! Leases: who hears which node, on every server, and who is down, on the leader.
//!
//! ```text
//! every server   sessions -> Reporter -> PeerRpc::Leases -> the leader     every 500 ms, at once when the set changes
//! the leader     reports + its own sessions -> Table -> judge -> Command::NodeDown
//! ```
//! The leader's answer is also how a server knows that it still belongs to the cluster: without one for [`STALE`] it
//! closes its sessions, so that its agents go where their leases are counted.

mod reporter;
mod table;
#[cfg(test)]
mod tests;
mod wire;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, join_all};
use imbl::ordmap::DiffItem;
use optimus_common::NodeId;
use optimus_core::state::{Applied, Command, State};
use tokio::sync::Notify;

pub use self::reporter::Hearing;
use self::reporter::Reporter;
use self::table::Table;
use self::wire::{Content, LeaseAnswer, LeaseReport};
use super::{LEASE, Shared};
use crate::raft::{Machine, PeerError, PeerHandler, PeerRpc, RaftNode};
use crate::store::ConsensusStatus;

/// How often silence is looked for; part of the time from a lost node to its replacement.
const CHECK: Duration = Duration::from_millis(250);
/// Running later than planned by this much means that this process was stopped, and that everyone only seems silent.
const SUSPENDED: Duration = Duration::from_secs(2);
/// Nodes declared down in one round; the rest follow in the next.
const DOWN_PER_ROUND: usize = 256;

/// How often a server reports, and how soon after a change or a report that failed.
const REPORT_EVERY: Duration = Duration::from_millis(500);
const REPORT_SOON: Duration = Duration::from_millis(50);
const REPORT_RETRY: Duration = Duration::from_millis(100);
/// Longest wait for the leader's answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// A node heard within this is not worth an entry of its own in a report. Above the heartbeat.
const FRESH: Duration = Duration::from_millis(1500);
/// Nodes that left a server are reported to a new leader for so long after their last word.
pub const RECENT: Duration = Duration::from_secs(10);
/// A server whose last report is older has missed two.
const SILENT_SERVER: Duration = Duration::from_millis(1500);
/// What nodes of a server that fell silent get on top of their lease. A server cut off from the leader keeps its
/// agents for [`STALE`], and they need a moment to be heard elsewhere.
const MOVE: Duration = Duration::from_millis(500);
/// A server that has had no answer of a leader for so long sends its agents away. Longer than an election takes, and
/// short enough for agents to be heard elsewhere within their lease.
pub const STALE: Duration = Duration::from_secs(3);

/// The way to the leader, as far as leases need it.
pub trait LeaseReports: Send + Sync + 'static {
    /// Asks the server that leads, `ttl` at most. An error when this one does, or none is known.
    fn ask_leader(&self, body: Bytes, ttl: Duration) -> BoxFuture<'_, Result<Bytes, PeerError>>;
}

impl<M: Machine> LeaseReports for RaftNode<M> {
    fn ask_leader(&self, body: Bytes, ttl: Duration) -> BoxFuture<'_, Result<Bytes, PeerError>> {
        Box::pin(RaftNode::ask_leader(self, PeerRpc::Leases, body, ttl))
    }
}

/// Whether this server may hold sessions.
#[derive(Debug, Default)]
struct Standing {
    /// The last proof of a leader.
    contact: Option<Duration>,
    /// Since when it has been open without a break.
    serving_since: Option<Duration>,
}

/// The leases' part of what the gateway shares.
#[derive(Default)]
pub struct Leases {
    peers: OnceLock<Arc<dyn LeaseReports>>,
    standing: Mutex<Standing>,
    /// While this server leads.
    table: Mutex<Option<Table>>,
    /// The set of sessions has changed.
    changed: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Leads, and a quorum has lately said so.
fn leads(status: &ConsensusStatus) -> bool {
    status.is_leader && status.leader_age.is_none_or(|age| age <= STALE)
}

impl Leases {
    pub fn set_peers(&self, peers: Arc<dyn LeaseReports>) {
        let _ = self.peers.set(peers); // a second one is a mistake of ours, and the first keeps working
    }

    fn contact(&self, at: Duration) {
        let mut standing = lock(&self.standing);
        standing.contact = standing.contact.max(Some(at));
    }

    /// Since when agents may have sessions here; `None`: they may not.
    pub fn serving_since(&self, now: Duration, status: &ConsensusStatus) -> Option<Duration> {
        let mut standing = lock(&self.standing);
        // Without peers to ask, knowing a leader has to do.
        if leads(status) || (self.peers.get().is_none() && status.leader.is_some() && !status.is_leader) {
            standing.contact = standing.contact.max(Some(now));
        }
        if standing.contact.is_some_and(|at| now.saturating_sub(at) <= STALE) {
            standing.serving_since = standing.serving_since.or(Some(now));
        } else {
            standing.serving_since = None;
        }
        standing.serving_since
    }

    /// This process did not run for a while: what it heard before says nothing about the time between.
    fn woke_up(&self, now: Duration) {
        let mut standing = lock(&self.standing);
        standing.serving_since = standing.serving_since.and(Some(now));
        *lock(&self.table) = None;
    }

    /// The server another server says a node is connected to. Known to the leader only.
    pub fn holder(&self, node: NodeId) -> Option<u64> {
        lock(&self.table).as_ref()?.holder(node)
    }
}

/// A session began here.
pub fn entered(shared: &Shared, node: NodeId, began: Duration) {
    if let Some(table) = &mut *lock(&shared.leases.table) {
        table.session_began(None, node, began);
    }
    shared.leases.changed.notify_one();
}

/// A session ended here.
pub fn left(shared: &Shared) {
    shared.leases.changed.notify_one();
}

fn others(status: &ConsensusStatus) -> BTreeSet<u64> {
    status.members.keys().copied().filter(|id| *id != status.server).collect()
}

/// Watches this server's own standing, and as leader all nodes.
pub async fn watch(shared: Arc<Shared>) {
    let clock = shared.store.env.clock.clone();
    let mut last = clock.monotonic();
    let mut before = State::default();
    let mut look_at = Duration::ZERO;
    loop {
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = clock.sleep(CHECK) => {}
        }
        let now = clock.monotonic();
        if now.saturating_sub(last) > CHECK + SUSPENDED {
            tracing::warn!(for_ms = (now - last).as_millis() as u64, "this server did not run for a while; nodes get time to come back");
            shared.leases.woke_up(now);
        }
        last = now;
        let status = shared.store.status();
        let serving = shared.leases.serving_since(now, &status);
        if serving.is_none() {
            let closed = shared.sessions.close_all();
            if closed > 0 {
                tracing::warn!(
                    sessions = closed,
                    "no leader heard for {} s: the agents of this server are sent to others",
                    STALE.as_secs()
                );
            }
        }
        let state = shared.store.state();
        // On every server, leader or not: a revoked node is out within a look.
        shared.sessions.prune(&state);
        let (Some(serving_since), true) = (serving, leads(&status)) else {
            *lock(&shared.leases.table) = None;
            before = State::default();
            continue;
        };
        let down = {
            let mut held = lock(&shared.leases.table);
            let fresh = held.is_none();
            let table = held.get_or_insert_with(|| Table::new(now, serving_since));
            // Those that were up when we began are judged by what is heard of them.
            if !fresh && before.index > 0 {
                came_up(&before, &state).for_each(|node| table.came_up(node, now));
            }
            if fresh || now >= look_at || before.index == 0 {
                let others = others(&status);
                table.prune(now, &others, |node| state.nodes.contains_key(&node));
                let up = state.nodes.values().filter(|n| n.up).map(|n| n.id);
                let verdict = table.judge(now, up, &others, &|node| shared.sessions.last_heard(node));
                // Deadlines only move on, except while servers still tell what they hear.
                look_at = verdict.look_at.min(now + 2 * CHECK);
                verdict.down
            } else {
                Vec::new()
            }
        };
        before = state;
        if down.len() > DOWN_PER_ROUND {
            look_at = now;
        }
        let proposals = down.into_iter().take(DOWN_PER_ROUND).map(|node| {
            let shared = &shared;
            async move {
                match shared.store.propose(Command::NodeDown { node }).await {
                    Ok(Applied::Refused(refusal)) => tracing::warn!(%node, %refusal, "node not declared down"),
                    Ok(_) => tracing::warn!(%node, lease = ?LEASE, "node not heard for longer than its lease: declared down"),
                    Err(error) => tracing::warn!(%node, %error, "failed to declare a node down; trying again"),
                }
            }
        });
        tokio::select! {
            () = shared.stop.cancelled() => return,
            _ = join_all(proposals) => {}
        }
    }
}

/// Nodes that are up now and were not. Costs as much as the two states differ.
fn came_up<'a>(before: &'a State, now: &'a State) -> impl Iterator<Item = NodeId> + 'a {
    before.nodes.diff(&now.nodes).filter_map(|change| match change {
        DiffItem::Add(_, node) if node.up => Some(node.id),
        DiffItem::Update { old: (_, old), new: (_, new) } if new.up && !old.up => Some(new.id),
        _ => None,
    })
}

/// Tells the leader what this server hears.
pub async fn report(shared: Arc<Shared>) {
    let env = &shared.store.env;
    let clock = &env.clock;
    let mut random = [0u8; 8];
    env.entropy.fill(&mut random);
    let mut reporter = Reporter::new(shared.store.status().server, u64::from_le_bytes(random));
    let mut wait = Duration::ZERO;
    loop {
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = clock.sleep(wait) => {}
            // Many at once travel together.
            () = shared.leases.changed.notified() => clock.sleep(REPORT_SOON).await,
        }
        let status = shared.store.status();
        let Some(peers) = shared.leases.peers.get() else {
            wait = REPORT_EVERY;
            continue;
        };
        if status.is_leader || status.leader.is_none() {
            reporter.start_over();
            wait = REPORT_RETRY;
            continue;
        }
        let now = clock.monotonic();
        // One that is closed says so by a start of now: nothing it heard counts, and yet the leader must know it lives.
        let serving_since = shared.leases.serving_since(now, &status).unwrap_or(now);
        let report = reporter.report(now, serving_since, &shared.sessions.hearings(now));
        let asked = peers.ask_leader(report.encode().into(), ANSWER_WITHIN);
        let answer = tokio::select! {
            () = shared.stop.cancelled() => return,
            answer = asked => answer,
            // The new one waits for our report; the old one may never answer.
            () = leader_changed(&shared, status.leader) => Err(PeerError::Timeout),
        };
        wait = match answer.map(|bytes| LeaseAnswer::decode(&bytes)) {
            Ok(Ok(answer)) => {
                let again = reporter.answered(&answer);
                if !matches!(answer, LeaseAnswer::NotLeading) {
                    shared.leases.contact(now);
                }
                if let LeaseAnswer::Taken { replaced, .. } = &answer {
                    let now = clock.monotonic();
                    for &(node, age) in replaced {
                        shared.sessions.replace(node, now.saturating_sub(Duration::from_millis(age.into())));
                    }
                }
                match answer {
                    LeaseAnswer::NotLeading => REPORT_RETRY,
                    _ if again => Duration::from_millis(1), // a pause, so that a mistake of ours cannot spin
                    _ => REPORT_EVERY,
                }
            }
            Ok(Err(error)) => {
                reporter.start_over();
                tracing::warn!(%error, "the leader's answer to a lease report cannot be read");
                REPORT_EVERY
            }
            Err(error) => {
                reporter.lost();
                tracing::debug!(%error, "lease report not taken; trying again");
                REPORT_RETRY
            }
        };
    }
}

async fn leader_changed(shared: &Shared, leader: Option<u64>) {
    while shared.store.status().leader == leader {
        shared.store.env.clock.sleep(REPORT_RETRY).await;
    }
}

/// Takes the reports of other servers.
pub struct Handler(Weak<Shared>);

impl Handler {
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        // Weak: whoever holds the handler is held by the gateway's store.
        Handler(Arc::downgrade(shared))
    }
}

impl PeerHandler for Handler {
    fn handle(&self, from: u64, kind: PeerRpc, body: Bytes) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        let answer = match self.0.upgrade() {
            Some(shared) => take(&shared, from, kind, &body),
            None => Err(PeerError::Stopped("the gateway has ended".to_owned())),
        };
        Box::pin(std::future::ready(answer.map(|answer| answer.encode().into())))
    }
}

fn take(shared: &Shared, from: u64, kind: PeerRpc, body: &[u8]) -> Result<LeaseAnswer, PeerError> {
    if kind != PeerRpc::Leases {
        return Err(PeerError::Refused(format!("a request of kind {kind:?} is not about leases")));
    }
    let report = LeaseReport::decode(body).map_err(|e| PeerError::Refused(format!("a lease report cannot be read: {e}")))?;
    if report.server != from {
        return Err(PeerError::Refused(format!("server {from} sent a lease report in the name of server {}", report.server)));
    }
    let status = shared.store.status();
    if !leads(&status) {
        return Ok(LeaseAnswer::NotLeading);
    }
    if !status.members.contains_key(&from) {
        return Err(PeerError::Refused(format!("server {from} is not a member of this cluster")));
    }
    let now = shared.store.env.clock.monotonic();
    let Some(serving_since) = shared.leases.serving_since(now, &status) else { return Ok(LeaseAnswer::NotLeading) };
    let joined: Vec<NodeId> = match &report.content {
        Content::Full { nodes: joined, .. } | Content::Changes { joined, .. } => joined.iter().map(|(node, _)| *node).collect(),
    };
    let mut held = lock(&shared.leases.table);
    let table = held.get_or_insert_with(|| Table::new(now, serving_since));
    let answer = table.take(now, report);
    if matches!(answer, LeaseAnswer::Taken { .. }) {
        for node in joined {
            let Some(own) = shared.sessions.began(node) else { continue };
            // Ours is the older one, or else the other server is told with its next answer.
            if let Some(younger) = table.session_began(None, node, own) {
                shared.sessions.replace(node, younger);
            }
        }
    }
    Ok(answer)
}
