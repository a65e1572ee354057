//! From what is wanted and what is held to what is to be done. Pure.

use std::collections::BTreeMap;

use optimus_common::AllocId;

/// What of a held allocation matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldState {
    /// It was asked to stop.
    pub stopping: bool,
    /// Its worker has ended: nothing of it runs.
    pub ended: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Hold it; `run`: start it, else only stop what may still run of it.
    Take {
        alloc: AllocId,
        run: bool,
    },
    Stop(AllocId),
    /// Drop its records and tell the server that it is gone.
    Forget(AllocId),
}

/// `desired`: whether each wanted allocation should run. An allocation that has ended stays so: to run again, the
/// control plane makes a new one.
pub fn diff(desired: &BTreeMap<AllocId, bool>, held: &BTreeMap<AllocId, HeldState>) -> Vec<Step> {
    let release = held.iter().filter_map(|(&id, state)| match (desired.get(&id), state) {
        (None, HeldState { ended: true, .. }) => Some(Step::Forget(id)),
        (None | Some(false), HeldState { stopping: false, ended: false }) => Some(Step::Stop(id)),
        _ => None,
    });
    let take = desired.iter().filter(|(id, _)| !held.contains_key(id)).map(|(&alloc, &run)| Step::Take { alloc, run });
    release.chain(take).collect() // stops first: they free what the new ones need
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(n: u8) -> AllocId {
        AllocId(uuid::Uuid::from_u128(n.into()))
    }

    #[test]
    fn stops_come_first_and_ended_ones_are_forgotten_when_dropped() {
        let live = HeldState { stopping: false, ended: false };
        let held = BTreeMap::from([
            (id(1), live),
            (id(2), live),
            (id(3), HeldState { stopping: true, ended: false }),
            (id(4), HeldState { stopping: true, ended: true }),
            (id(5), HeldState { stopping: false, ended: true }),
        ]);
        let desired = BTreeMap::from([(id(1), true), (id(2), false), (id(5), true), (id(6), true), (id(7), false)]);
        let want =
            [Step::Stop(id(2)), Step::Forget(id(4)), Step::Take { alloc: id(6), run: true }, Step::Take { alloc: id(7), run: false }];
        assert_eq!(diff(&desired, &held), want);
    }

    proptest! {
        /// Whatever is held, doing the steps (and letting stops end) leads to the desired set and then to rest.
        #[test]
        fn doing_the_steps_converges(
            desired in prop::collection::btree_map((0u8..12).prop_map(id), any::<bool>(), 0..12),
            held in prop::collection::btree_map((0u8..12).prop_map(id), any::<(bool, bool)>(), 0..12),
        ) {
            let mut held: BTreeMap<_, _> = held.into_iter().map(|(id, (stopping, ended))| (id, HeldState { stopping, ended })).collect();
            for _ in 0..3 {
                for step in diff(&desired, &held) {
                    match step {
                        Step::Take { alloc, run } => drop(held.insert(alloc, HeldState { stopping: !run, ended: false })),
                        Step::Stop(id) => drop(held.insert(id, HeldState { stopping: true, ended: false })),
                        Step::Forget(id) => drop(held.remove(&id)),
                    }
                }
                for state in held.values_mut() {
                    state.ended |= state.stopping;
                }
            }
            prop_assert_eq!(diff(&desired, &held), vec![]);
            prop_assert!(held.keys().eq(desired.keys()));
            prop_assert!(held.iter().all(|(id, state)| desired[id] || state.ended));
        }
    }
}
