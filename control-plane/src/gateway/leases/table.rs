//! What the leader knows of all leases, and its verdict on who is down. Pure.
//!
//! For each server the set of nodes connected there, and one time before which none of them was last heard; for nodes
//! that left, their last word. A beat of a server without changes costs the same for one node and for ten thousand.
//!
//! When does silence count?
//! - A node is down when no server has heard it for [`LEASE`].
//! - A new leader knows nothing at first. Once every server has told what it hears, silence counts from the true last
//!   word, as if the leader had not changed. A server that does not tell (it died, or has just started, as this one may have) may have heard
//!   nodes until the end, so as long as one is missing silence counts from the leader's beginning at the earliest.
//! - A node nobody has heard gets a lease from the leader's beginning; after a start of the whole cluster, [`GRACE`].
//! - Nodes of a server that falls silent get [`MOVE`] on top, to show up elsewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use optimus_common::NodeId;

use super::super::{GRACE, LEASE};
use super::wire::{Content, LeaseAnswer, LeaseReport, hash_of};
use super::{MOVE, RECENT, SILENT_SERVER};

/// A node of this server itself, as [`Table::judge`] asks for it.
pub type OwnHeard<'a> = &'a dyn Fn(NodeId) -> Option<Duration>;

/// What one other server has told. Times are on the leader's monotonic clock.
#[derive(Debug)]
struct Reported {
    incarnation: u64,
    seq: u64,
    version: u64,
    hash: u64,
    /// Connected nodes and when their sessions began.
    nodes: BTreeMap<NodeId, Duration>,
    /// Those of them not heard lately, with their last word.
    silent: BTreeMap<NodeId, Duration>,
    /// All others were heard at this time or later.
    all_heard: Duration,
    last_report: Duration,
    serving_since: Duration,
    /// Nodes with a younger session elsewhere, to be told in the next answer: when that began.
    replaced: BTreeMap<NodeId, Duration>,
}

impl Reported {
    fn heard(&self, node: NodeId) -> Option<Duration> {
        self.nodes.get(&node)?;
        Some(self.silent.get(&node).copied().unwrap_or(self.all_heard))
    }
}

/// The leases of one leadership.
#[derive(Debug)]
pub struct Table {
    /// When this server began to lead, or to listen again.
    since: Duration,
    /// Since when this server itself has been open to agents.
    own_serving_since: Duration,
    servers: BTreeMap<u64, Reported>,
    /// Last words of nodes that left a server, and of nodes that came up lately.
    last: BTreeMap<NodeId, Duration>,
}

/// Who is down.
#[derive(Debug, PartialEq, Eq)]
pub struct Verdict {
    pub down: Vec<NodeId>,
    /// No other node can be down before this time.
    pub look_at: Duration,
}

impl Table {
    pub fn new(since: Duration, own_serving_since: Duration) -> Self {
        Table { since, own_serving_since: own_serving_since.min(since), servers: BTreeMap::new(), last: BTreeMap::new() }
    }

    /// Takes a report. Nothing of it is in the future, whatever it says.
    pub fn take(&mut self, now: Duration, report: LeaseReport) -> LeaseAnswer {
        let LeaseReport { server, incarnation, seq, serving, version, count, hash, within, silent, content } = report;
        let at = |age: u32| now.saturating_sub(Duration::from_millis(age.into()));
        let known = self.servers.get_mut(&server);
        if known.as_ref().is_some_and(|k| k.incarnation == incarnation && seq <= k.seq) {
            return LeaseAnswer::SendFull; // overtaken by a later one; whoever still waits for an answer starts over
        }
        let mut joined = Vec::new();
        match content {
            Content::Full { nodes, left } => {
                if let Some(before) = self.servers.remove(&server) {
                    self.fold(before, now, |reported| reported.incarnation != incarnation);
                }
                for (node, age) in left {
                    heard_at(&mut self.last, node, at(age));
                }
                let nodes: BTreeMap<NodeId, Duration> = nodes.into_iter().map(|(node, age)| (node, at(age))).collect();
                joined.extend(nodes.iter().map(|(&node, &began)| (node, began)));
                let digest = nodes.keys().fold(0, |hash, &node| hash ^ hash_of(node));
                let serving_since = now.saturating_sub(Duration::from_millis(serving));
                let reported = Reported {
                    incarnation,
                    seq,
                    version,
                    hash: digest,
                    nodes,
                    silent: BTreeMap::new(),
                    all_heard: Duration::ZERO,
                    last_report: now,
                    serving_since,
                    replaced: BTreeMap::new(),
                };
                self.servers.insert(server, reported);
            }
            Content::Changes { base, joined: new, left } => {
                let Some(known) = known.filter(|k| k.incarnation == incarnation && k.version == base) else {
                    return LeaseAnswer::SendFull;
                };
                for (node, age) in new {
                    if known.nodes.insert(node, at(age)).is_none() {
                        known.hash ^= hash_of(node);
                    }
                    joined.push((node, at(age)));
                }
                for (node, age) in left {
                    let reported = known.heard(node);
                    if known.nodes.remove(&node).is_some() {
                        known.hash ^= hash_of(node);
                    }
                    known.replaced.remove(&node);
                    heard_at(&mut self.last, node, at(age).max(reported.unwrap_or_default()));
                }
            }
        }
        let Some(known) = self.servers.get_mut(&server) else { return LeaseAnswer::SendFull };
        if known.hash != hash || known.nodes.len() != count as usize {
            // Nothing of what we hold of this server can be trusted; its nodes keep their last words.
            known.version = u64::MAX;
            return LeaseAnswer::SendFull;
        }
        known.seq = seq;
        known.version = version;
        known.serving_since = now.saturating_sub(Duration::from_millis(serving));
        known.silent = silent.into_iter().map(|(node, age)| (node, at(age))).collect();
        known.all_heard = at(within);
        known.last_report = now;
        let replaced = std::mem::take(&mut known.replaced);
        for (node, began) in joined {
            self.session_began(Some(server), node, began);
        }
        let age = |began: Duration| u32::try_from(now.saturating_sub(began).as_millis()).unwrap_or(u32::MAX);
        LeaseAnswer::Taken { version, replaced: replaced.into_iter().map(|(node, began)| (node, age(began))).collect() }
    }

    /// A session began at server `at` (`None`: here). Of two sessions of a node the older one is to end, as on one server:
    /// other servers are told in their next answer. Gives when a younger one elsewhere began, if there is one.
    pub fn session_began(&mut self, at: Option<u64>, node: NodeId, began: Duration) -> Option<Duration> {
        let mut younger = None;
        for (&server, reported) in &mut self.servers {
            let Some(&other) = reported.nodes.get(&node).filter(|_| Some(server) != at) else { continue };
            if other < began {
                reported.replaced.insert(node, began);
            } else {
                younger = younger.max(Some(other));
            }
        }
        if let (Some(reported), Some(younger)) = (at.and_then(|at| self.servers.get_mut(&at)), younger) {
            reported.replaced.insert(node, younger);
        }
        younger
    }

    /// The server another server's report says a node is connected to.
    pub fn holder(&self, node: NodeId) -> Option<u64> {
        let holding = self.servers.iter().filter_map(|(&id, s)| Some((*s.nodes.get(&node)?, id)));
        holding.max().map(|(_, id)| id)
    }

    /// Keeps the last words of a server's nodes. `vanished`: it ended, and its nodes must look for another server.
    fn fold(&mut self, reported: Reported, now: Duration, vanished: impl Fn(&Reported) -> bool) {
        let extra = if vanished(&reported) { (reported.last_report + MOVE).min(now) } else { Duration::ZERO };
        for &node in reported.nodes.keys() {
            let silent = reported.silent.get(&node).copied();
            heard_at(&mut self.last, node, silent.unwrap_or_else(|| reported.all_heard.max(extra)));
        }
    }

    /// A node was brought up just now, which takes a server that hears it.
    pub fn came_up(&mut self, node: NodeId, now: Duration) {
        heard_at(&mut self.last, node, now);
    }

    /// Forgets servers that left the cluster and nodes that were removed.
    pub fn prune(&mut self, now: Duration, members: &BTreeSet<u64>, is_node: impl Fn(NodeId) -> bool) {
        let gone: Vec<u64> = self.servers.keys().filter(|id| !members.contains(id)).copied().collect();
        for id in gone {
            if let Some(reported) = self.servers.remove(&id) {
                self.fold(reported, now, |_| true);
            }
        }
        self.last.retain(|&node, _| is_node(node));
    }

    /// The nodes to declare down. `up`: those the state has as up; `others`: the other servers of the cluster;
    /// `own`: when this server last heard a node.
    pub fn judge(&self, now: Duration, up: impl Iterator<Item = NodeId>, others: &BTreeSet<u64>, own: OwnHeard<'_>) -> Verdict {
        // One that began to serve shortly before we began to lead may have been the server of anyone until it was stopped. So
        // may this one.
        let watched = |server: u64| self.servers.get(&server).is_some_and(|s| s.serving_since + LEASE <= self.since);
        let complete = self.own_serving_since + LEASE <= self.since && others.iter().all(|&server| watched(server));
        let cluster_since = self.servers.values().map(|s| s.serving_since).fold(self.own_serving_since, Duration::min);
        let nobody_heard = (self.since + LEASE).max(cluster_since + GRACE);
        let own_from = self.own_serving_since.max(self.since.saturating_sub(RECENT));
        let mut verdict = Verdict { down: Vec::new(), look_at: now + LEASE };
        for node in up {
            let mut heard = self.last.get(&node).copied().max(own(node).filter(|at| *at >= own_from));
            let mut moving = Duration::ZERO;
            for server in self.servers.values() {
                let Some(at) = server.heard(node) else { continue };
                heard = heard.max(Some(at));
                if now.saturating_sub(server.last_report) > SILENT_SERVER && !server.silent.contains_key(&node) {
                    moving = moving.max(server.last_report + LEASE + MOVE);
                }
            }
            let deadline = match heard {
                Some(at) if at >= self.since || complete => at + LEASE,
                Some(_) => self.since + LEASE,
                None => nobody_heard,
            };
            let deadline = deadline.max(moving);
            if now > deadline {
                verdict.down.push(node);
            } else {
                verdict.look_at = verdict.look_at.min(deadline);
            }
        }
        verdict
    }
}

fn heard_at(last: &mut BTreeMap<NodeId, Duration>, node: NodeId, at: Duration) {
    let held = last.entry(node).or_default();
    *held = at.max(*held);
}
