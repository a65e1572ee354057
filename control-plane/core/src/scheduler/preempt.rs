//! Who gives way to a workload of higher priority that found no room.
//!
//! As few as will do, and among those the ones of lowest priority, never one less than [`PREEMPTION_DISTANCE`] below. Room comes
//! when they have ended; until then it is promised, so that nobody else is displaced for it, nor placed in it.

use optimus_common::reason::Refusal;
use optimus_common::{AllocId, NodeId, Timestamp};

use super::device;
use super::fit::{self, Taken};
use super::view::{Ask, View};
use crate::state::{Alloc, Node, State};

/// Copies of workloads less than so many points below give way to nobody.
pub const PREEMPTION_DISTANCE: u8 = 10;
/// Most nodes looked at for one copy; the first ones by id, of those whose rules allow it.
const NODES_LOOKED_AT: usize = 500;
/// Up to so many candidates on a node every pair of them is tried.
const PAIRS_TRIED: usize = 64;

/// What may be done for a copy that found no room.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Room {
    /// Nothing: nobody is low enough, or no node suits.
    None,
    /// Copies that stop already will leave enough.
    Coming,
    /// Stop these.
    Displace(Vec<AllocId>),
}

/// A copy that could be displaced.
struct Candidate<'s> {
    alloc: &'s Alloc,
    priority: u8,
    spec: &'s optimus_common::spec::WorkloadSpec,
}

/// A way to make room on a node.
struct Way {
    /// How many go, the highest priority of them, and the sum.
    cost: (usize, u8, u32),
    victims: Vec<AllocId>,
    /// What is taken of the node once they have ended.
    left: Taken,
}

impl View<'_> {
    /// What may be done for a copy that found no room. The room found is kept for it in this view.
    pub fn make_room(&mut self, ask: Ask<'_>) -> Room {
        self.make_room_among(ask, None)
    }

    /// [`make_room`](Self::make_room) on one node, for what runs once on each.
    pub fn make_room_on(&mut self, node: NodeId, ask: Ask<'_>) -> Room {
        self.make_room_among(ask, Some(node))
    }

    fn make_room_among(&mut self, ask: Ask<'_>, only: Option<NodeId>) -> Room {
        let (state, now) = (self.state, self.now);
        if state.lowest_priority().is_none_or(|low| low.saturating_add(PREEMPTION_DISTANCE) > ask.spec.placement.priority) {
            return Room::None; // most clusters: nothing more to look at
        }
        if self.allowed(ask.key, ask.spec).is_err() {
            return Room::None; // stopping others makes no room in a quota
        }
        self.batch(ask.key, ask.spec);
        let mut best: Option<(usize, Way)> = None;
        let mut looked_at = 0;
        for (at, row) in self.rows.iter().enumerate() {
            if looked_at >= NODES_LOOKED_AT {
                break;
            }
            if only.is_some_and(|node| node != row.id)
                || fit::is_open(row.node).is_err()
                || !self.current().is_some_and(|batch| batch.suits(row, at))
            {
                continue;
            }
            looked_at += 1;
            let (taken, promised) = (row.promised.as_deref().unwrap_or(&row.taken), row.promised.is_some());
            let Some(way) = on_node(state, now, row.node, taken, promised, &ask) else { continue };
            if best.as_ref().is_none_or(|(_, least)| way.cost < least.cost) {
                let nobody = way.victims.is_empty();
                best = Some((at, way));
                if nobody {
                    break;
                }
            }
        }
        let Some((at, Way { cost: _, victims, mut left })) = best else { return Room::None };
        // The copy itself, on ports yet to be chosen.
        let node = self.rows[at].node;
        let ports: Vec<(String, u16)> = ask.spec.ports.iter().filter_map(|p| Some((p.name.to_string(), p.fixed?))).collect();
        let devices = device::allot(node, &left.devices, &ask.spec.placement.devices).unwrap_or_default();
        left.add(&ports, &devices, ask.spec);
        self.promise(at, left);
        if victims.is_empty() { Room::Coming } else { Room::Displace(victims) }
    }
}

/// The cheapest way to make room on a node: its cost, who gives way, and what is taken then.
fn on_node(state: &State, now: Timestamp, node: &Node, taken: &Taken, promised: bool, ask: &Ask<'_>) -> Option<Way> {
    fit::volumes(state, node.id, ask.key, ask.spec).ok()?;
    if ask.spec.placement.distinct_hosts && state.allocs_on(node.id).any(|a| a.run && a.key == *ask.key) {
        return None;
    }
    let enough = |taken: &Taken| fit::has_room(node, taken, ask.spec, None, now).is_ok();
    let mut left = taken.clone();
    let mut candidates = Vec::new();
    for alloc in state.allocs_on(node.id).filter(|a| !a.has_ended()) {
        let Some(release) = state.release(&alloc.key, alloc.release) else { continue };
        let priority = release.spec.placement.priority;
        if !alloc.run {
            if !promised {
                left.remove_copy(alloc, Some(&release.spec)); // on its way out; a promise has counted that already
            }
        } else if priority.saturating_add(PREEMPTION_DISTANCE) <= ask.spec.placement.priority && alloc.key != *ask.key {
            candidates.push(Candidate { alloc, priority, spec: &release.spec });
        }
    }
    if enough(&left) {
        return Some(Way { cost: (0, 0, 0), victims: vec![], left });
    }
    if promised {
        return None; // one displacement of a node at a time: what is promised there is settled first
    }
    candidates.sort_by_key(|c| (c.priority, c.alloc.id));
    let victims = fewest(&left, &candidates, &enough, node, ask, now)?;
    for &n in &victims {
        left.remove_copy(candidates[n].alloc, Some(candidates[n].spec));
    }
    let highest = victims.iter().map(|&n| candidates[n].priority).max().unwrap_or(0);
    let sum = victims.iter().map(|&n| u32::from(candidates[n].priority)).sum();
    let cost = (victims.len(), highest, sum);
    Some(Way { cost, victims: victims.iter().map(|&n| candidates[n].alloc.id).collect(), left })
}

/// Which of the candidates, lowest first, must go so that there is enough: never one that could stay.
fn fewest(
    taken: &Taken,
    candidates: &[Candidate<'_>],
    enough: &impl Fn(&Taken) -> bool,
    node: &Node,
    ask: &Ask<'_>,
    now: Timestamp,
) -> Option<Vec<usize>> {
    let without = |gone: &[usize]| {
        let mut left = taken.clone();
        gone.iter().for_each(|&n| left.remove_copy(candidates[n].alloc, Some(candidates[n].spec)));
        left
    };
    let all: Vec<usize> = (0..candidates.len()).collect();
    if !enough(&without(&all)) {
        return None; // also when a fixed port is held by one that stays
    }
    if let Some(one) = all.iter().find(|&&n| enough(&without(&[n]))) {
        return Some(vec![*one]);
    }
    if candidates.len() <= PAIRS_TRIED {
        let pairs = all.iter().flat_map(|&a| all[a + 1..].iter().map(move |&b| vec![a, b]));
        let cost = |pair: &Vec<usize>| (candidates[pair[1]].priority, candidates[pair[0]].priority);
        if let Some(pair) = pairs.filter(|pair| enough(&without(pair))).min_by_key(cost) {
            return Some(pair);
        }
    }
    // The ones that give most of what is short go first; then whoever could have stayed does, the highest first.
    let mut gone: Vec<usize> = Vec::new();
    while let Err(refusal) = fit::has_room(node, &without(&gone), ask.spec, None, now) {
        let staying = all.iter().filter(|n| !gone.contains(n));
        let next = staying.max_by_key(|&&n| (gives(&candidates[n], &refusal), std::cmp::Reverse(n)))?;
        gone.push(*next);
    }
    gone.sort_unstable();
    for n in gone.clone().into_iter().rev() {
        let fewer: Vec<usize> = gone.iter().copied().filter(|&other| other != n).collect();
        if enough(&without(&fewer)) {
            gone = fewer;
        }
    }
    Some(gone)
}

/// How much of what is short a candidate would give back.
fn gives(candidate: &Candidate<'_>, refusal: &Refusal) -> u64 {
    let Candidate { alloc, spec, .. } = candidate;
    match refusal {
        Refusal::Cpu { .. } => u64::from(spec.resources.cpu.0),
        Refusal::Memory { .. } => spec.resources.memory_request.0,
        Refusal::Disk { .. } => spec.placement.disk.0,
        Refusal::Devices { .. } => alloc.devices.len() as u64,
        Refusal::PortReserved { port } => u64::from(alloc.ports.iter().any(|(_, held)| held == port)),
        Refusal::NoFreePort => alloc.ports.len() as u64,
        _ => 0,
    }
}
