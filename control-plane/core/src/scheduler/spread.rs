//! Spreading the copies of a workload over the values of attributes.
//!
//! Nodes with the same values form a bucket. How even a bucket is hangs on the counts of all values, and on which
//! values can still take a copy; it is the same for all nodes of the bucket.

use std::collections::BTreeMap;

use optimus_common::spec::Spread;

use super::constraint::value_of;
use super::score::FULL;
use crate::state::Node;

/// The values of the spread attributes of a node, in the order of the spec.
pub(crate) type Values = Vec<Option<String>>;

pub(crate) fn values_of(node: &Node, spreads: &[Spread]) -> Values {
    spreads.iter().map(|s| value_of(node, &s.attribute).map(|v| v.into_owned())).collect()
}

/// Copies by value, for each spread.
#[derive(Debug, Clone, Default)]
pub(crate) struct Counts(Vec<BTreeMap<String, u64>>);

impl Counts {
    pub fn new(spreads: &[Spread]) -> Self {
        Counts(vec![BTreeMap::new(); spreads.len()])
    }

    pub fn add(&mut self, values: &Values) {
        for (counts, value) in self.0.iter_mut().zip(values) {
            if let Some(value) = value {
                *counts.entry(value.clone()).or_default() += 1;
            }
        }
    }
}

/// A copy in thousandths, so that a share of a copy still counts.
const SCALE: u64 = 1000;
/// No copy should be there.
const NEVER: u64 = u64::MAX;

/// How even it is to place into each of the `live` buckets, those with a node that can take the copy.
///
/// For each spread the load of a value is its copies divided by its share; the least loaded value gets 1000, others
/// less, a node without the attribute 0. Several spreads count alike.
pub(crate) fn evenness(spreads: &[Spread], counts: &Counts, live: &[&Values]) -> Vec<u32> {
    if spreads.is_empty() {
        return vec![FULL; live.len()];
    }
    let mut sums = vec![0u32; live.len()];
    for (n, (spread, counts)) in spreads.iter().zip(&counts.0).enumerate() {
        let named: u64 = spread.targets.iter().map(|(_, share)| u64::from(*share)).sum();
        let target = |value: &str| spread.targets.iter().find(|(known, _)| known == value).map(|(_, share)| u64::from(*share));
        // Values without a share of their own divide what is left.
        let mut others: Vec<&str> = live.iter().filter_map(|v| v[n].as_deref()).filter(|v| target(v).is_none()).collect();
        others.sort_unstable();
        others.dedup();
        let load = |value: &str| {
            let count = counts.get(value).copied().unwrap_or(0);
            match target(value) {
                Some(share) => count * SCALE * 100 / share,
                None if named >= 100 => NEVER,
                None => count * SCALE * 100 * others.len() as u64 / (100 - named),
            }
        };
        let loads: Vec<Option<u64>> = live.iter().map(|values| values[n].as_deref().map(load).filter(|l| *l != NEVER)).collect();
        let least = loads.iter().flatten().min().copied().unwrap_or(0);
        for (sum, load) in sums.iter_mut().zip(loads) {
            *sum += load.map_or(0, |load| (u64::from(FULL) * (SCALE + least) / (SCALE + load)) as u32);
        }
    }
    sums.into_iter().map(|sum| sum / spreads.len() as u32).collect()
}
