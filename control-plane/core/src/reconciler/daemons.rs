//! Daemons: one copy on every node that matches. It follows nodes as they join and leave; an update moves a few nodes
//! at a time, each by stopping its copy before the new one starts, so that a node never has two.
//!
//! A copy's slot is its node's: the one its newest copy there had, else the lowest that no copy or record of the
//! daemon uses. So `logger-3` stays on its node for as long as that keeps any trace of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use optimus_common::api::v1::DeploymentPhase;
use optimus_common::{AllocId, NodeId, Reason, Timestamp};

use super::{ENDED_KEPT, Pass, answers, over_at, retry_at};
use crate::deployments::{RESTARTS_MAX, may_adopt};
use crate::scheduler::{self, Ask, View, suits};
use crate::state::{Alloc, Deployment, DeploymentStep, Node, Placement, Release, State, Workload};

/// How far a node is.
#[derive(Debug, Clone, PartialEq)]
enum Place {
    /// Its copy of the wanted release has been ready for long enough.
    Settled,
    /// Something is on its way, to or from it.
    Moving,
    /// Another release runs. `serving`: and is ready.
    Old { serving: bool },
    /// Nothing is there. `pausing`: copies gave up lately.
    Empty { pausing: bool },
    /// Nothing is there and nothing fits.
    NoRoom,
}

/// The nodes a daemon is wished for: those that match and answer. A cordoned node keeps what it has, but gets nothing.
pub fn nodes_wanted<'a>(state: &'a State, workload: &'a Workload, release: &'a Release) -> impl Iterator<Item = &'a Arc<Node>> {
    state.nodes.values().filter(move |node| {
        let holds = || state.allocs_on(node.id).any(|a| a.key == workload.key && a.run && !a.migrate);
        node.up && suits(node, &release.spec).is_ok() && (!node.cordoned || holds())
    })
}

/// The nodes a daemon should have a copy on and has not, and why.
pub(super) fn unplaced(state: &State, workload: &Workload, now: Timestamp, most: usize) -> Vec<(u32, Reason)> {
    let Some(release) = state.release(&workload.key, workload.release) else { return vec![] };
    let slots = Slots::of(state, workload);
    let missing = nodes_wanted(state, workload, release)
        .filter(|node| !state.allocs_on(node.id).any(|a| a.key == workload.key && !a.has_ended()))
        .map(|node| {
            let index = slots.of_node.get(&node.id).copied().unwrap_or(u32::MAX);
            let why = scheduler::fits(state, node.id, &workload.key, &release.spec, None, now).err();
            (index, why.map_or(Reason::Starting, |why| Reason::NotForNode { node: node.facts.name.clone(), why }))
        });
    missing.take(most).collect()
}

/// How many nodes of a daemon may move at a time: a share of those that match, rounded up, or a number.
pub fn moves_at_a_time(release: &Release, matching: usize) -> usize {
    let update = &release.spec.update;
    match update.percent {
        Some(percent) => (matching * percent as usize).div_ceil(100).max(1),
        None => update.parallel.max(1) as usize,
    }
}

/// The slots in use, by node.
struct Slots {
    of_node: BTreeMap<NodeId, u32>,
    used: BTreeSet<u32>,
}

impl Slots {
    fn of(state: &State, workload: &Workload) -> Self {
        let (mut newest, mut used): (BTreeMap<NodeId, (AllocId, u32)>, _) = (BTreeMap::new(), BTreeSet::new());
        for alloc in state.allocs_of(&workload.key) {
            used.insert(alloc.index);
            let known = newest.entry(alloc.node).or_insert((alloc.id, alloc.index));
            *known = (*known).max((alloc.id, alloc.index));
        }
        Slots { of_node: newest.into_iter().map(|(node, (_, index))| (node, index)).collect(), used }
    }

    fn get(&mut self, node: NodeId) -> u32 {
        if let Some(index) = self.of_node.get(&node) {
            return *index;
        }
        let index = (0..).zip(&self.used).find(|(free, used)| free != *used).map_or(self.used.len() as u32, |(free, _)| free);
        self.used.insert(index);
        self.of_node.insert(node, index);
        index
    }
}

impl<'a> Pass<'a> {
    pub(super) fn daemon(&mut self, workload: &'a Workload, release: &'a Arc<Release>) {
        self.forget_daemon_copies(workload);
        if workload.stopped {
            return self.stop_all(workload);
        }
        let mut slots = Slots::of(self.state, workload);
        let mut copies: BTreeMap<NodeId, Vec<&Arc<Alloc>>> = BTreeMap::new();
        for alloc in self.state.allocs_of(&workload.key).filter(|a| !a.has_ended()) {
            copies.entry(alloc.node).or_default().push(alloc);
        }
        for (node, here) in &copies {
            for alloc in here.iter().filter(|a| a.run && a.migrate) {
                let node = self.state.nodes.get(node).map_or_else(String::new, |n| n.facts.name.clone());
                self.stop(alloc, Reason::Drained { node });
            }
            let refusal = self.state.nodes.get(node).and_then(|row| Some((row, suits(row, &release.spec).err()?)));
            if let Some((row, why)) = refusal {
                for alloc in here.iter().filter(|a| a.run && !a.migrate) {
                    self.stop(alloc, Reason::NotForNode { node: row.facts.name.clone(), why: why.clone() });
                }
            }
        }
        let (mut places, mut old) = (Vec::new(), Vec::new());
        for node in nodes_wanted(self.state, workload, release) {
            if self.is_full() {
                return self.wake(self.now);
            }
            let here = copies.get(&node.id).map_or(&[][..], Vec::as_slice);
            let mut place = self.look(workload, release, here, slots.of_node.get(&node.id).copied());
            if place == (Place::Empty { pausing: false }) {
                place = self.put(workload, release, node.id, slots.get(node.id));
            }
            if let Place::Old { serving } = place {
                // Nothing could be put in its place there: it runs on, and the update is of the other nodes.
                if node.cordoned {
                    continue;
                }
                old.push((serving, here));
            }
            places.push(place);
        }
        let moving = places.iter().filter(|p| matches!(p, Place::Moving | Place::Empty { .. })).count();
        let may_move = moves_at_a_time(release, places.len()).saturating_sub(moving);
        old.sort_by_key(|(serving, _)| *serving); // what does not serve anyway goes first
        for (_, here) in old.into_iter().take(may_move) {
            for alloc in here.iter().filter(|a| a.run) {
                self.stop(alloc, Reason::Replaced { release: release.number });
            }
        }
        if let Some(deployment) = workload.deployment.and_then(|id| self.state.deployments.get(&id)).filter(|d| !d.phase.is_final()) {
            self.daemon_deployment(workload, deployment, &places);
        }
    }

    /// How far one node is; stops what should not be there.
    fn look(&mut self, workload: &Workload, release: &Release, here: &[&Arc<Alloc>], index: Option<u32>) -> Place {
        let (mut wanted, mut old, mut leaving) = (Vec::new(), Vec::new(), false);
        for &alloc in here {
            if !alloc.run || alloc.migrate {
                leaving = true;
            } else if alloc.phase().is_terminal() {
                let reason = alloc.status.as_ref().and_then(|s| s.reason.clone()).unwrap_or(Reason::StopRequested);
                self.stop(alloc, reason);
                leaving = true;
            } else if alloc.release == release.number {
                wanted.push(alloc);
            } else {
                old.push(alloc);
            }
        }
        if let Some((keep, surplus)) = wanted.split_last() {
            for alloc in surplus.iter().chain(&old) {
                self.stop(alloc, Reason::Replaced { release: release.number });
            }
            let proven = keep.is_ready() && !keep.awaits_limits(&release.spec);
            return match keep.status.as_ref().filter(|_| proven).and_then(|s| s.ready_since) {
                Some(since) => self.counts(over_at(since, release.spec.update.min_ready, self.now)),
                None => Place::Moving,
            };
        }
        if let Some((keep, surplus)) = old.split_last() {
            for alloc in surplus {
                self.stop(alloc, Reason::Replaced { release: release.number });
            }
            if may_go_on(self.state, keep, release) {
                self.outcome.plan.adopt.push((keep.id, release.number));
                return Place::Moving;
            }
            return Place::Old { serving: old.iter().any(|a| a.is_ready()) };
        }
        if leaving {
            return Place::Moving;
        }
        let failures = index.and_then(|index| self.state.failures.get(&(workload.key.clone(), index)));
        let again = failures.filter(|f| f.release == release.number).map_or(Timestamp(0), |f| retry_at(f, self.now));
        if again > self.now {
            self.wake(again);
        }
        Place::Empty { pausing: again > self.now }
    }

    fn counts(&mut self, at: Timestamp) -> Place {
        if self.now >= at {
            return Place::Settled;
        }
        self.wake(at);
        Place::Moving
    }

    /// A copy on a node where there is none, or what is stopped for it.
    fn put(&mut self, workload: &Workload, release: &Release, node: NodeId, index: u32) -> Place {
        let (state, now) = (self.state, self.now);
        let alloc = (self.new_id)();
        let ask = Ask { key: &workload.key, spec: &release.spec, alloc, troubled: &[] };
        let view = self.view.get_or_insert_with(|| View::of(state, now));
        let Ok(ports) = view.place_on(node, ask) else {
            let room = view.make_room_on(node, ask);
            return if self.displace(room, workload) { Place::Moving } else { Place::NoRoom };
        };
        let placement = Placement { alloc, key: workload.key.clone(), index, release: release.number, node, ports };
        self.outcome.plan.place.push(placement);
        Place::Moving
    }

    /// A deployment is done when every node has settled, but for those that have no room: they are shown as missing.
    fn daemon_deployment(&mut self, workload: &Workload, deployment: &Deployment, places: &[Place]) {
        let id = deployment.id;
        let settled = places.iter().filter(|p| **p == Place::Settled).count() as u32;
        let open = places.iter().any(|p| !matches!(p, Place::Settled | Place::NoRoom));
        let deadline_at = deployment.progress_at + deployment.deadline;
        let rolling_back = deployment.phase == DeploymentPhase::RollingBack;
        let hopeless = !rolling_back && self.state.allocs_of(&workload.key).any(|a| gave_up(self.state, deployment, a));
        let step = if !open && (settled > 0 || places.is_empty()) {
            if rolling_back { DeploymentStep::RolledBack { id } } else { DeploymentStep::Succeed { id } }
        } else if settled > deployment.progress {
            DeploymentStep::Progress { id, ready: settled }
        } else if self.now >= deadline_at || hopeless {
            DeploymentStep::Fail { id, reason: self.why_failed(workload, deployment, hopeless) }
        } else {
            return self.wake(deadline_at);
        };
        self.outcome.plan.deployments.push(step);
    }

    fn why_failed(&self, workload: &Workload, deployment: &Deployment, hopeless: bool) -> Reason {
        let of_this = |a: &&Arc<Alloc>| a.release == deployment.release && !a.is_ready();
        let told = |a: &Arc<Alloc>| Some((a.name(), a.status.as_ref()?.reason.clone().filter(|r| !r.is_calm())?));
        let worst = self.state.allocs_of(&workload.key).filter(of_this).find_map(told);
        let (copy, last) = match worst {
            Some((copy, last)) => (Some(copy), Some(last)),
            None => (None, unplaced(self.state, workload, self.now, 1).pop().map(|(_, reason)| reason)),
        };
        match last {
            Some(last) if hopeless => last,
            last => Reason::DeadlinePassed { deadline: deployment.deadline, copy, last: last.map(Box::new) },
        }
    }

    fn forget_daemon_copies(&mut self, workload: &Workload) {
        let mut ended: BTreeMap<u32, Vec<AllocId>> = BTreeMap::new();
        for alloc in self.state.allocs_of(&workload.key).filter(|a| a.has_ended()) {
            ended.entry(alloc.index).or_default().push(alloc.id);
        }
        for oldest_first in ended.values() {
            self.outcome.plan.forget.extend(oldest_first.iter().rev().skip(ENDED_KEPT));
        }
    }
}

/// The copy need not start anew for the release, and there is room for it as it is then.
fn may_go_on(state: &State, alloc: &Alloc, release: &Release) -> bool {
    let of = state.release(&alloc.key, alloc.release).filter(|of| may_adopt(state, of, release));
    of.is_some_and(|of| scheduler::fits_resized(state, alloc, &of.spec, &release.spec))
}

fn gave_up(state: &State, deployment: &Deployment, alloc: &Alloc) -> bool {
    if alloc.release != deployment.release || alloc.created_at < deployment.created_at || !answers(state, alloc) {
        return false;
    }
    let refused = matches!(alloc.status.as_ref().and_then(|s| s.reason.as_ref()), Some(Reason::LimitNotEnforceable { .. }));
    let release = state.release(&alloc.key, alloc.release).filter(|_| refused && alloc.run);
    let unfit = release.is_some_and(|release| alloc.awaits_limits(&release.spec));
    let crashes = alloc.run && alloc.status.as_ref().is_some_and(|s| !s.ready && s.restarts >= RESTARTS_MAX);
    let failures = state.failures.get(&(alloc.key.clone(), alloc.index));
    unfit
        || crashes
        || failures.is_some_and(|f| f.release == deployment.release && f.count >= RESTARTS_MAX && f.last_at >= deployment.created_at)
}
