//! How good a node is that can take the copy. Every term is an integer in `0..=1000` and always there, so that a
//! term nobody asked for moves nothing, and every machine agrees.

use optimus_common::spec::WorkloadSpec;

use super::fit::{Taken, capacity};
use crate::state::{Layout, Node};

/// The whole of a term.
pub const FULL: u32 = 1000;

/// The terms of a node's score.
///
/// Compared in four steps, each outweighing all below it: a node that just failed is the last choice; then the
/// spread that was asked for; then wishes and company, weighed against each other; then room and load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Score {
    /// 1000, or 0 where a copy of this slot could not run lately.
    pub untroubled: u32,
    /// How far the node's values of the spread attributes are below their share: 1000 for the one most below.
    pub even: u32,
    /// `affinity`: 500 when no wish says anything, 1000 for a full hundred of weight.
    pub liked: u32,
    /// Few copies of the same workload: 1000 with none.
    pub alone: u32,
    /// Few copies of the workloads in `anti_affinity`: 1000 with none.
    pub apart: u32,
    /// Of the scarcer of CPU and memory after placing, what is free; or what is used, in a pool that is packed.
    pub room: u32,
    /// Idle share of the CPUs when the agent last said.
    pub idle: u32,
}

const LIKED: u32 = 6;
const ALONE: u32 = 4;
const APART: u32 = 2;
const ROOM: u32 = 3;
const IDLE: u32 = 1;
const COMPANY: u64 = ((LIKED + ALONE + APART) * FULL + 1) as u64;
const COMFORT: u64 = ((ROOM + IDLE) * FULL + 1) as u64;
const EVEN: u64 = COMPANY * COMFORT;
const UNTROUBLED: u64 = (FULL as u64 + 1) * EVEN;

impl Score {
    /// One number to compare.
    pub fn total(self) -> u64 {
        self.without_even() + u64::from(self.even) * EVEN
    }

    /// [`Score::total`] but for the spread: what of it no copy on another node changes.
    pub(crate) fn without_even(self) -> u64 {
        let Score { untroubled, even: _, liked, alone, apart, room, idle } = self;
        let company = u64::from(liked * LIKED + alone * ALONE + apart * APART);
        let comfort = u64::from(room * ROOM + idle * IDLE);
        u64::from(untroubled / FULL) * UNTROUBLED + company * COMFORT + comfort
    }

    /// The terms with their names, for people.
    pub fn terms(self) -> [(&'static str, u32); 7] {
        let Score { untroubled, even, liked, alone, apart, room, idle } = self;
        [("untroubled", untroubled), ("even", even), ("liked", liked), ("alone", alone), ("apart", apart), ("room", room), ("idle", idle)]
    }
}

/// What the total gains by an even term.
pub(crate) fn weight_of_even(even: u32) -> u64 {
    u64::from(even) * EVEN
}

/// What the total loses on a node where a copy of the slot could not run.
pub(crate) const TROUBLE: u64 = UNTROUBLED;

/// What of a score does not hang on other nodes.
pub(crate) struct Standing {
    /// [`super::constraint::liking`]
    pub liking: i32,
    /// Copies of the workload on the node, wished to run.
    pub same: u32,
    /// Copies of the workloads to keep away from.
    pub unwanted: u32,
    pub layout: Layout,
}

impl Score {
    pub(crate) fn of(node: &Node, taken: &Taken, spec: &WorkloadSpec, standing: &Standing, even: u32, troubled: bool) -> Score {
        let share = |capacity: u64, used: u64| (capacity.saturating_sub(used) * u64::from(FULL)).checked_div(capacity).unwrap_or(0) as u32;
        let (cpu, memory, _) = capacity(node);
        let cpu = share(cpu, taken.cpu + u64::from(spec.resources.cpu.0));
        let memory = share(memory, taken.memory + spec.resources.memory_request.0);
        let free = cpu.min(memory);
        Score {
            untroubled: if troubled { 0 } else { FULL },
            even,
            liked: (500 + 5 * standing.liking.clamp(-100, 100)) as u32,
            alone: FULL / (1 + standing.same),
            apart: FULL / (1 + standing.unwanted),
            room: match standing.layout {
                Layout::Spread => free,
                Layout::BinPack => FULL - free,
            },
            idle: FULL - u32::from(node.facts.load).min(FULL),
        }
    }
}
