//! Takes what agents report into the replicated state.
//!
//! Reports of all agents are gathered while the commands of the round before are in flight, and go
//! out together: under load one round carries many, at rest a report waits for nothing. All of a
//! round is proposed at once, so that consensus can commit it in one write.
//!
//! What is gathered is bounded by what the state knows: a status of an allocation that is not this
//! node's, or not newer than the one on record, is dropped here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::StreamExt as _;
use optimus_common::protocol::{AllocStatus, LAST_LINES_MAX, Report, STATUS_MAX, TEXT_MAX};
use optimus_common::{AllocId, NodeId};
use optimus_core::state::{Applied, Command, State};
use tokio::sync::Notify;

use super::Shared;

/// Statuses in one command: a failure carries up to 10 KiB of output.
const STATUSES_PER_COMMAND: usize = 128;
/// Commands in flight at once.
const COMMANDS_IN_FLIGHT: usize = 256;
/// Entries of `unenforced` kept.
const UNENFORCED_MAX: usize = 32;
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(1);

#[derive(Debug, Default, PartialEq)]
struct Pending {
    statuses: BTreeMap<AllocId, AllocStatus>,
    gone: BTreeSet<AllocId>,
}

impl Pending {
    /// Adds a status, unless a newer one waits.
    fn add(&mut self, status: AllocStatus) {
        match self.statuses.get(&status.id) {
            Some(waiting) if waiting.seq >= status.seq => {}
            _ => {
                self.statuses.insert(status.id, status);
            }
        }
    }
}

/// What waits to be proposed, by node.
#[derive(Default)]
pub struct Reports {
    pending: Mutex<BTreeMap<NodeId, Pending>>,
    wake: Notify,
}

impl Reports {
    fn pending(&self) -> MutexGuard<'_, BTreeMap<NodeId, Pending>> {
        self.pending.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes a report of `node`. `state` tells what concerns it and is news.
    pub fn submit(&self, node: NodeId, report: Report, state: &State) {
        let Report { generation: _, statuses, gone } = report;
        let mut news = Vec::new();
        let (mut foreign, mut malformed) = (0u32, 0u32);
        for blob in statuses {
            if blob.0.len() > STATUS_MAX {
                malformed += 1;
                continue;
            }
            let Ok(status) = blob.open::<AllocStatus>() else {
                malformed += 1;
                continue;
            };
            match state.allocs.get(&status.id) {
                Some(alloc) if alloc.node != node => foreign += 1,
                Some(alloc) if alloc.status.as_ref().is_some_and(|s| s.seq >= status.seq) => {}
                Some(_) => news.push(bounded(status)),
                None => {} // forgotten meanwhile
            }
        }
        let mut ended = Vec::new();
        for id in gone {
            match state.allocs.get(&id) {
                Some(alloc) if alloc.node != node => foreign += 1,
                Some(_) => ended.push(id),
                None => {}
            }
        }
        if foreign > 0 {
            tracing::warn!(%node, count = foreign, "an agent reported on allocations of other nodes; ignored");
        }
        if malformed > 0 {
            tracing::warn!(%node, count = malformed, "an agent sent statuses that cannot be read; ignored");
        }
        if news.is_empty() && ended.is_empty() {
            return;
        }
        let mut pending = self.pending();
        let waiting = pending.entry(node).or_default();
        news.into_iter().for_each(|status| waiting.add(status));
        waiting.gone.extend(ended);
        drop(pending);
        self.wake.notify_one();
    }

    fn put_back(&self, node: NodeId, statuses: Vec<AllocStatus>, gone: Vec<AllocId>) {
        let mut pending = self.pending();
        let waiting = pending.entry(node).or_default();
        statuses.into_iter().for_each(|status| waiting.add(status));
        waiting.gone.extend(gone);
    }
}

/// Cuts what a status carries to the bounds of the protocol; a status is never lost for its length.
fn bounded(mut status: AllocStatus) -> AllocStatus {
    status.last_lines.truncate(LAST_LINES_MAX);
    status.unenforced.truncate(UNENFORCED_MAX);
    for text in status.last_lines.iter_mut().chain(&mut status.unenforced) {
        text.truncate(text.floor_char_boundary(TEXT_MAX));
    }
    status
}

pub async fn run(shared: Arc<Shared>) {
    let mut retry = RETRY_FIRST;
    loop {
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = shared.reports.wake.notified() => {}
        }
        let round = std::mem::take(&mut *shared.reports.pending());
        let commands = round.into_iter().flat_map(|(node, pending)| split(pending).map(move |part| (node, part)).collect::<Vec<_>>());
        let shared = &shared;
        let mut answers = futures_util::stream::iter(commands)
            .map(|(node, (statuses, gone))| async move {
                let command = Command::Report { node, statuses: statuses.clone(), gone: gone.clone() };
                match shared.store.propose(command).await {
                    Ok(Applied::Refused(refusal)) => {
                        tracing::warn!(%node, %refusal, "report refused");
                        true
                    }
                    Ok(_) => true,
                    Err(error) => {
                        // Without its session the agent reports everything anew in the next one.
                        if shared.sessions.get(node).is_some() {
                            tracing::debug!(%node, %error, "report not committed; trying again");
                            shared.reports.put_back(node, statuses, gone);
                        }
                        false
                    }
                }
            })
            .buffer_unordered(COMMANDS_IN_FLIGHT);
        let mut all_done = true;
        loop {
            tokio::select! {
                () = shared.stop.cancelled() => return,
                answer = answers.next() => match answer {
                    Some(done) => all_done &= done,
                    None => break,
                },
            }
        }
        drop(answers);
        if all_done {
            retry = RETRY_FIRST;
        } else {
            shared.store.env.clock.sleep(retry).await;
            retry = (retry * 2).min(RETRY_MAX);
            shared.reports.wake.notify_one();
        }
    }
}

/// Parts of at most [`STATUSES_PER_COMMAND`].
fn split(pending: Pending) -> impl Iterator<Item = (Vec<AllocStatus>, Vec<AllocId>)> {
    let mut statuses = pending.statuses.into_values().peekable();
    let mut gone = pending.gone.into_iter().peekable();
    std::iter::from_fn(move || {
        if statuses.peek().is_none() && gone.peek().is_none() {
            return None;
        }
        let part: Vec<_> = statuses.by_ref().take(STATUSES_PER_COMMAND).collect();
        // Last words before the end: an allocation goes with or after its last status.
        let ended: Vec<_> = if statuses.peek().is_none() { gone.by_ref().take(STATUSES_PER_COMMAND).collect() } else { Vec::new() };
        Some((part, ended))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use optimus_common::protocol::{Blob, Phase};
    use optimus_common::{Name, Timestamp, WorkloadKey};
    use optimus_core::state::Alloc;

    #[test]
    fn only_news_of_the_nodes_own_allocations_is_taken() {
        let name = |n: &str| Name::new(n).unwrap();
        let key = WorkloadKey { project: name("p"), environment: name("e"), workload: name("w") };
        let (mine, other) = (NodeId(uuid::Uuid::from_u128(1)), NodeId(uuid::Uuid::from_u128(2)));
        let known = status(10, 5);
        let alloc = Alloc {
            id: known.id,
            key,
            index: 0,
            release: 1,
            node: mine,
            ports: vec![],
            devices: vec![],
            run: true,
            stop_reason: None,
            created_at: Timestamp(1),
            status: Some(Arc::new(known.clone())),
            migrate: false,
            draining_since: None,
            unrouted_at: None,
        };
        let mut state = State::default();
        state.allocs.insert(alloc.id, Arc::new(alloc));
        let taken = |node, statuses: Vec<Blob>, gone: Vec<AllocId>| {
            let reports = Reports::default();
            reports.submit(node, Report { generation: 1, statuses, gone }, &state);
            reports.pending.into_inner().unwrap().remove(&node).map_or((0, 0), |p| (p.statuses.len(), p.gone.len()))
        };
        let newer = Blob::of(&status(10, 6));
        assert_eq!(taken(mine, vec![newer.clone()], vec![known.id]), (1, 1));
        assert_eq!(taken(other, vec![newer], vec![known.id]), (0, 0), "of another node");
        assert_eq!(taken(mine, vec![Blob::of(&known)], vec![]), (0, 0), "on record already");
        assert_eq!(taken(mine, vec![Blob::of(&status(11, 1))], vec![AllocId(uuid::Uuid::from_u128(11))]), (0, 0), "unknown");
        assert_eq!(taken(mine, vec![Blob(vec![0xc1]), Blob(vec![0; STATUS_MAX + 1])], vec![]), (0, 0), "malformed");
    }

    fn status(n: u128, seq: u64) -> AllocStatus {
        AllocStatus {
            id: AllocId(uuid::Uuid::from_u128(n)),
            seq,
            phase: Phase::Running,
            ready: true,
            ready_since: None,
            reason: None,
            restarts: 0,
            pid: None,
            started_at: None,
            last_exit: None,
            unenforced: vec![],
            last_lines: vec![],
            limits: None,
        }
    }

    #[test]
    fn the_newest_status_of_an_allocation_is_kept() {
        let mut pending = Pending::default();
        for (seq, kept) in [(2, 2), (1, 2), (3, 3)] {
            pending.add(status(1, seq));
            assert_eq!(pending.statuses.values().next().map(|s| s.seq), Some(kept));
        }
    }

    #[test]
    fn a_round_is_split_and_nothing_is_lost() {
        let mut pending = Pending::default();
        for n in 0..300 {
            pending.add(status(n, 1));
            pending.gone.insert(AllocId(uuid::Uuid::from_u128(n)));
        }
        let parts: Vec<_> = split(pending).collect();
        assert!(parts.iter().all(|(s, g)| s.len() <= STATUSES_PER_COMMAND && g.len() <= STATUSES_PER_COMMAND));
        assert_eq!(parts.iter().map(|(s, _)| s.len()).sum::<usize>(), 300);
        assert_eq!(parts.iter().map(|(_, g)| g.len()).sum::<usize>(), 300);
        assert!(split(Pending::default()).next().is_none());
    }

    #[test]
    fn long_texts_are_cut_and_not_in_the_middle_of_a_character() {
        let mut long = status(1, 1);
        long.last_lines = vec!["é".repeat(TEXT_MAX); LAST_LINES_MAX + 5];
        let cut = bounded(long);
        assert_eq!(cut.last_lines.len(), LAST_LINES_MAX);
        assert!(cut.last_lines.iter().all(|l| l.len() <= TEXT_MAX && !l.is_empty()));
    }
}
