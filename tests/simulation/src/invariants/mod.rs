//! What must hold, one property a file.
//!
//! ```text
//! hooks, observer, clients, hosts --Event--> Checks --> each invariant looks (with the Model as it was before)
//!                                              '------> the Model takes the event over
//! ```
//! The first eleven and `leader_append_only` are openraft's own list for its fuzzer; `durable` to `linearizable` are ours.

mod acked_survives;
mod applied_monotonic;
mod bounded;
mod capacity;
mod commit_monotonic;
mod committed_immutable;
mod committed_on_quorum;
mod converged;
mod desired_is_actual;
mod digest;
mod durable;
mod election_safety;
mod events_contiguous;
mod leader_append_only;
mod leader_completeness;
mod linearizable;
mod log_matching;
mod one_copy;
mod own_reports;
mod placed_once;
mod request_once;
mod restarts;
mod state_machine_safety;
mod state_ordering;
mod term_monotonic;
mod vote_monotonic;

use std::collections::BTreeMap;

use optimus_common::ids::RequestId;
use optimus_common::{AllocId, NodeId};
use optimus_control_plane::raft::runtime::Stored;
use optimus_core::state::{Applied, Proposal, State};

use crate::history::Op;
use crate::model::{Canon, Model};

/// Something that happened.
pub enum Event<'a> {
    /// A server's store did something.
    Stored { server: u64, what: &'a Stored },
    /// A server became leader in a term.
    Leads { server: u64, term: u64 },
    /// It leads no more.
    Follows { server: u64 },
    /// A server process begins.
    Starts { server: u64 },
    /// A server process ended, for whatever reason.
    Ended { server: u64 },
    /// The disk of a server was damaged on purpose.
    Damaged { server: u64 },
    /// A server refused to start.
    Refused { server: u64, reason: &'a str, expected: bool },
    /// A server applied a proposal; `before` and `after` are its state.
    Applied { server: u64, index: u64, n: usize, proposal: &'a Proposal, before: &'a State, after: &'a State },
    /// A server's state was replaced by a snapshot's.
    Restored { server: u64, state: &'a State },
    /// A client was told that its request is done.
    Acked { request: RequestId, answer: &'a Applied },
    /// A copy's process began or ended on a simulated host.
    Process { node: NodeId, alloc: AllocId, ports: &'a [u16], runs: bool },
    /// A reader of the event stream was given these places, having seen all up to `after`.
    Streamed { reader: u64, after: (u64, u32), places: &'a [(u64, u32)], upto: u64 },
    /// Something countable has this size.
    Size { what: &'static str, server: u64, size: u64, bound: u64 },
    /// The run is over; what was found.
    End(&'a End),
}

/// The end of a run, after everything was healed and had time to settle.
#[derive(Debug, Default)]
pub struct End {
    /// State of each server that runs.
    pub states: BTreeMap<u64, State>,
    /// Processes that run, by node and copy.
    pub processes: Vec<(NodeId, AllocId)>,
    /// What had not settled in time, if anything.
    pub unsettled: Option<String>,
    /// Whether a write was accepted in time.
    pub writable: bool,
    pub history: Vec<Op>,
}

/// A property.
pub trait Invariant: Send {
    /// Its name, as printed.
    fn name(&self) -> &'static str;
    /// Looks at an event. `model` is as before it.
    ///
    /// # Errors
    /// What is wrong.
    fn on(&mut self, event: &Event<'_>, model: &Model) -> Result<(), String>;
}

/// All properties, and what they found.
pub struct Checks {
    pub model: Model,
    invariants: Vec<Box<dyn Invariant>>,
    violations: Vec<String>,
}

/// Violations kept; one is enough to fail, a few help.
const KEPT: usize = 5;

impl Default for Checks {
    fn default() -> Self {
        let invariants: Vec<Box<dyn Invariant>> = vec![
            Box::<election_safety::ElectionSafety>::default(),
            Box::<log_matching::LogMatching>::default(),
            Box::<leader_completeness::LeaderCompleteness>::default(),
            Box::<state_machine_safety::StateMachineSafety>::default(),
            Box::<committed_on_quorum::CommittedOnQuorum>::default(),
            Box::<committed_immutable::CommittedImmutable>::default(),
            Box::<state_ordering::StateOrdering>::default(),
            Box::<term_monotonic::TermMonotonic>::default(),
            Box::<commit_monotonic::CommitMonotonic>::default(),
            Box::<applied_monotonic::AppliedMonotonic>::default(),
            Box::<vote_monotonic::VoteMonotonic>::default(),
            Box::<leader_append_only::LeaderAppendOnly>::default(),
            Box::<durable::Durable>::default(),
            Box::<restarts::Restarts>::default(),
            Box::<digest::Digest>::default(),
            Box::<acked_survives::AckedSurvives>::default(),
            Box::<request_once::RequestOnce>::default(),
            Box::<desired_is_actual::DesiredIsActual>::default(),
            Box::<one_copy::OneCopy>::default(),
            Box::<placed_once::PlacedOnce>::default(),
            Box::<own_reports::OwnReports>::default(),
            Box::<capacity::Capacity>::default(),
            Box::<events_contiguous::EventsContiguous>::default(),
            Box::<bounded::Bounded>::default(),
            Box::<converged::Converged>::default(),
            Box::<linearizable::Linearizable>::default(),
        ];
        Self { model: Model::default(), invariants, violations: Vec::new() }
    }
}

impl Checks {
    /// Shows an event to every invariant, then takes it over. Returns new violations.
    pub fn see(&mut self, event: &Event<'_>) -> Vec<String> {
        let mut found = Vec::new();
        for invariant in &mut self.invariants {
            if let Err(what) = invariant.on(event, &self.model) {
                found.push(format!("{}: {what}", invariant.name()));
            }
        }
        self.take(event);
        for violation in &found {
            if self.violations.len() < KEPT && !self.violations.contains(violation) {
                self.violations.push(violation.clone());
            }
        }
        found
    }

    /// Adds a violation that no invariant of ours words, such as a panic.
    pub fn add(&mut self, violation: String) {
        if self.violations.len() < KEPT {
            self.violations.push(violation);
        }
    }

    pub fn violations(&self) -> &[String] {
        &self.violations
    }

    /// Names of all invariants.
    pub fn names(&self) -> Vec<&'static str> {
        self.invariants.iter().map(|i| i.name()).collect()
    }

    fn take(&mut self, event: &Event<'_>) {
        let model = &mut self.model;
        match *event {
            Event::Stored { server, what } => {
                let known = model.servers.entry(server).or_default();
                if let Stored::Committed(upto) = what {
                    for index in known.committed + 1..=upto.index {
                        if let Some(leader) = known.log.get(&index) {
                            model.committed.entry(index).or_insert(*leader);
                        }
                    }
                }
                known.take(what);
                if let Stored::Appended(entries) = what {
                    let log = &known.log;
                    for entry in entries {
                        if let Some(before) = entry.index.checked_sub(1).and_then(|i| log.get(&i)) {
                            model.before.entry((entry.index, entry.leader)).or_insert(*before);
                        }
                    }
                }
            }
            Event::Leads { server, .. } => model.servers.entry(server).or_default().leads = true,
            Event::Follows { server } => model.servers.entry(server).or_default().leads = false,
            Event::Starts { server } => {
                let known = model.servers.entry(server).or_default();
                known.life += 1;
                known.up = true;
            }
            Event::Ended { server } => {
                let known = model.servers.entry(server).or_default();
                (known.up, known.leads) = (false, false);
            }
            Event::Damaged { server } => model.servers.entry(server).or_default().damaged = true,
            Event::Applied { server, index, n, proposal, after, .. } => {
                model.servers.entry(server).or_default().applied = index;
                let canon = model.canon.entry(index).or_insert_with(|| Canon { proposals: Vec::new(), states: Vec::new() });
                if canon.proposals.len() == n {
                    canon.proposals.push(proposal.clone());
                    canon.states.push(after.clone());
                }
            }
            Event::Restored { server, state } => model.servers.entry(server).or_default().applied = state.index,
            _ => {}
        }
    }
}
