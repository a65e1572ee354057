//! What a drain would do, copy by copy, before anything is touched.

use std::sync::Arc;

use optimus_common::spec::Kind;
use optimus_common::{NodeId, Reason, Timestamp, WorkloadKey};

use super::{kind_of, wave};
use crate::scheduler::{self, Ask, View};
use crate::state::{Node, State};

/// What would become of one copy.
#[derive(Debug, Clone, PartialEq)]
pub struct Fated {
    /// `shop/prod/web-0`
    pub copy: String,
    pub key: WorkloadKey,
    pub fate: Fate,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Fate {
    /// Its replacement starts on this node first.
    Moves { to: NodeId, to_name: String },
    /// No node has room: it stays until one has, or until the deadline.
    Waits { why: Reason },
    /// A job's copy: it stays until it ends, or until the deadline.
    Finishes,
    /// A daemon's copy: it stops last.
    StopsLast,
    /// A daemon's copy, and daemons stay.
    Stays,
}

/// A whole drain, as it would go if nothing else happened.
#[derive(Debug, Clone, PartialEq)]
pub struct Preview {
    pub copies: Vec<Fated>,
    /// Most waves any workload needs.
    pub waves: u32,
}

/// Places each copy of the node elsewhere, in turn, as the reconciler would.
pub fn preview(state: &State, node: NodeId, keep_daemons: bool, now: Timestamp) -> Preview {
    let mut cordoned = state.clone();
    if let Some(row) = state.nodes.get(&node) {
        cordoned.nodes.insert(node, Arc::new(Node { cordoned: true, ..Node::clone(row) }));
    }
    let mut view = View::of(&cordoned, now);
    let mut copies = Vec::new();
    let mut of_workload: std::collections::BTreeMap<&WorkloadKey, u32> = Default::default();
    for alloc in state.allocs_on(node).filter(|a| !a.has_ended() && a.run) {
        let fate = match kind_of(state, alloc) {
            Some(Kind::Job) => Fate::Finishes,
            Some(Kind::Daemon) if keep_daemons => Fate::Stays,
            Some(Kind::Daemon) => Fate::StopsLast,
            _ => {
                *of_workload.entry(&alloc.key).or_default() += 1;
                // A replacement is of the release that should run now.
                let release = state.workload(&alloc.key).and_then(|w| state.release(&w.key, w.release));
                let spec = release.map(|r| &*r.spec);
                let place = spec.and_then(|spec| view.place(Ask { key: &alloc.key, spec, alloc: alloc.id, troubled: &[node] }));
                match place {
                    Some((to, _)) => Fate::Moves { to, to_name: state.nodes.get(&to).map_or_else(String::new, |n| n.facts.name.clone()) },
                    // What earlier copies of this drain would take counts too, so a node may refuse only here.
                    None => Fate::Waits {
                        why: spec
                            .and_then(|spec| scheduler::why_nowhere(&cordoned, &alloc.key, spec, now))
                            .unwrap_or(Reason::NoNodeFits { nodes: vec![], counts: vec![] }),
                    },
                }
            }
        };
        copies.push(Fated { copy: alloc.subject(), key: alloc.key.clone(), fate });
    }
    let waves_of = |(key, copies): (&&WorkloadKey, &u32)| {
        let parallel = state.workload(key).and_then(|w| state.release(&w.key, w.release)).map_or(1, |r| wave(&r.spec));
        copies.div_ceil(parallel)
    };
    Preview { waves: of_workload.iter().map(waves_of).max().unwrap_or(0), copies }
}
