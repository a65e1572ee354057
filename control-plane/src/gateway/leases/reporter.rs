//! A server's side of the lease reports: what to tell the leader, given what it holds already. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use optimus_common::NodeId;

use super::FRESH;
use super::wire::{Content, LeaseAnswer, LeaseReport, hash_of};

/// A node this server hears, or heard lately. Times on its own monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hearing {
    pub heard: Duration,
    /// When its session began; `None`: it has none any more.
    pub session: Option<Duration>,
}

/// What the leader is known to hold.
#[derive(Debug, Clone)]
struct Acked {
    version: u64,
    nodes: BTreeMap<NodeId, Duration>,
    /// When that was so.
    at: Duration,
}

/// Makes reports. One is in flight at a time: [`Reporter::report`], then [`Reporter::answered`] or [`Reporter::lost`].
#[derive(Debug)]
pub struct Reporter {
    server: u64,
    incarnation: u64,
    seq: u64,
    version: u64,
    acked: Option<Acked>,
    in_flight: Option<Acked>,
}

impl Reporter {
    /// `incarnation`: random, so that a server that starts again is not taken for the one before.
    pub fn new(server: u64, incarnation: u64) -> Self {
        Reporter { server, incarnation, seq: 0, version: 0, acked: None, in_flight: None }
    }

    /// The next report. `hearings`: every node connected or heard lately. `serving_since`: since when agents may connect
    /// here; what was heard before is not told, as it was not listened for all the time since.
    pub fn report(&mut self, now: Duration, serving_since: Duration, hearings: &BTreeMap<NodeId, Hearing>) -> LeaseReport {
        let age = |at: Duration| u32::try_from(now.saturating_sub(at).as_millis()).unwrap_or(u32::MAX);
        let mut nodes = BTreeMap::new();
        let (mut silent, mut within, mut hash) = (Vec::new(), 0, 0);
        for (&node, hearing) in hearings {
            let Some(began) = hearing.session else { continue };
            nodes.insert(node, began);
            hash ^= hash_of(node);
            let age = age(hearing.heard);
            if u128::from(age) > FRESH.as_millis() {
                silent.push((node, age));
            } else {
                within = age.max(within);
            }
        }
        let last_words = |node: &NodeId| {
            let hearing = hearings.get(node).filter(|h| h.session.is_none() && h.heard >= serving_since)?;
            Some((*node, age(hearing.heard)))
        };
        let content = match &self.acked {
            None => Content::Full {
                nodes: nodes.iter().map(|(&node, &began)| (node, age(began))).collect(),
                left: hearings.keys().filter_map(last_words).collect(),
            },
            Some(acked) => {
                let joined = nodes.iter().filter(|(node, began)| acked.nodes.get(*node) != Some(*began));
                // One that is not even heard lately has no last word worth telling.
                let gone = acked.nodes.keys().filter(|node| !nodes.contains_key(*node));
                let gone = gone.map(|node| last_words(node).unwrap_or((*node, u32::MAX)));
                // Came and went since.
                let passed = hearings.iter().filter(|(node, h)| h.heard >= acked.at && !acked.nodes.contains_key(*node));
                let passed = passed.filter_map(|(node, _)| last_words(node));
                Content::Changes {
                    base: acked.version,
                    joined: joined.map(|(&node, &began)| (node, age(began))).collect(),
                    left: gone.chain(passed).collect(),
                }
            }
        };
        let changed = match &content {
            Content::Full { .. } => true,
            Content::Changes { joined, left, .. } => !joined.is_empty() || !left.is_empty(),
        };
        if changed {
            self.version += 1; // of a lost report too: one version never names two sets
        }
        let version = if changed { self.version } else { self.acked.as_ref().map_or(self.version, |acked| acked.version) };
        self.seq += 1;
        let count = u32::try_from(nodes.len()).unwrap_or(u32::MAX);
        self.in_flight = Some(Acked { version, nodes, at: now });
        LeaseReport {
            server: self.server,
            incarnation: self.incarnation,
            seq: self.seq,
            serving: u64::try_from(now.saturating_sub(serving_since).as_millis()).unwrap_or(u64::MAX),
            version,
            count,
            hash,
            within,
            silent,
            content,
        }
    }

    /// Takes the leader's answer. True: the next report is due at once.
    pub fn answered(&mut self, answer: &LeaseAnswer) -> bool {
        let sent = self.in_flight.take();
        match answer {
            LeaseAnswer::Taken { version, .. } => {
                self.acked = sent.filter(|sent| sent.version == *version);
                self.acked.is_none()
            }
            LeaseAnswer::SendFull => {
                self.acked = None;
                true
            }
            LeaseAnswer::NotLeading => {
                self.acked = None;
                false
            }
        }
    }

    /// No answer came: the leader may or may not have it, and finds out by the version.
    pub fn lost(&mut self) {
        self.in_flight = None;
    }

    /// There may be another leader: it gets the whole set.
    pub fn start_over(&mut self) {
        self.acked = None;
    }
}
