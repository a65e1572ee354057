//! Generations of endpoints, and the routers that take them on.

use super::*;
use crate::deployments::analysis::Sample;
use crate::endpoints::ROUTER_SILENT;

/// The same said again sooner than this changes nothing.
const HEARD_AGAIN: Span = Span::secs(30);

impl Step<'_> {
    /// The endpoints of a workload are others from here on.
    pub(super) fn rerouted(&mut self, key: &WorkloadKey) {
        self.state.routes.insert(key.clone(), self.index);
    }

    /// As [`Step::rerouted`], for each workload with a copy that serves on a node.
    pub(super) fn rerouted_on(&mut self, node: NodeId) {
        let serves = |a: &&Arc<Alloc>| a.run && a.is_ready() && !a.ports.is_empty();
        let keys: Vec<WorkloadKey> = self.state.allocs_on(node).filter(serves).map(|a| a.key.clone()).collect();
        for key in keys {
            self.rerouted(&key);
        }
    }

    /// Counts of copies that are not being compared are left aside.
    pub(super) fn count_traffic(&mut self, router: String, generation: u64, counts: Vec<(AllocId, Sample)>) -> Applied {
        let acked = self.ack_endpoints(router, generation);
        if matches!(acked, Applied::Refused(_)) {
            return acked;
        }
        let mut counted = false;
        for (alloc, sample) in counts {
            let Some(alloc) = self.state.allocs.get(&alloc) else { continue };
            let of = self.state.workloads.get(&alloc.key).and_then(|w| w.deployment);
            let Some(row) = of.and_then(|id| self.state.deployments.get_mut(&id)) else { continue };
            let compared = row.keeps_old() && matches!(row.phase, DeploymentPhase::Baking | DeploymentPhase::Promoting);
            let row = if compared { Arc::make_mut(row) } else { continue };
            let side = match alloc.release {
                release if release == row.release => &mut row.traffic.new,
                release if Some(release) == row.from_release => &mut row.traffic.old,
                _ => continue,
            };
            side.add(&sample);
            counted = true;
        }
        if counted { self.done() } else { acked }
    }

    pub(super) fn ack_endpoints(&mut self, router: String, generation: u64) -> Applied {
        let at = self.at;
        retain(&mut self.state.routers, |name, row| *name == router || at.since(row.heard_at) < ROUTER_SILENT);
        let generation = generation.min(self.index);
        let known = self.state.routers.get(&router).copied();
        if known.is_none() && self.state.routers.len() >= ROUTERS_MAX {
            return too_many("routers", ROUTERS_MAX as u64);
        }
        // A router that lost its memory says less than before: it is believed.
        if known.is_some_and(|row| row.generation == generation && at.since(row.heard_at) < HEARD_AGAIN) {
            return self.unchanged();
        }
        self.state.routers.insert(router, RouterRow { generation, heard_at: at });
        self.done()
    }
}
