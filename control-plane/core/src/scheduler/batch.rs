//! One workload's release against all nodes: what does not change is found out once for each class of nodes, scores
//! once for each node, and a placement then touches one node only.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};

use optimus_common::reason::Refusal;
use optimus_common::spec::WorkloadSpec;
use optimus_common::{NodeId, Timestamp, WorkloadKey};

use super::constraint;
use super::fit;
use super::score::{Score, Standing, TROUBLE, weight_of_even};
use super::spread::{self, Counts, Values};
use super::view::Row;
use crate::state::{Layout, State};

/// What all nodes of a class have in common for this release.
#[derive(Debug, Clone)]
struct Grade {
    suits: Result<(), Refusal>,
    liking: i32,
    bucket: u32,
}

/// A score and the node that has it; of equal scores the lower node is the greater.
type Ranked = (u64, Reverse<u32>);

pub(super) struct Batch {
    pub key: WorkloadKey,
    pub spec: WorkloadSpec,
    layout: Layout,
    /// By class; by node when the spec looks at what differs within a class.
    grades: Vec<Option<Grade>>,
    by_node: bool,
    /// Copies of the workload on each node: wished to run, and not ended.
    same: Vec<u32>,
    held: Vec<u32>,
    /// Copies of workloads to keep away from; empty when there are none.
    unwanted: Vec<u32>,
    buckets: Vec<Values>,
    counts: Counts,
    /// Of each node: its score without the spread, and one; 0 when it cannot take a copy.
    scores: Vec<u64>,
    bucket_of: Vec<u32>,
    /// Nodes of each bucket that can take a copy.
    open: Vec<u32>,
    /// The nodes of each bucket, best first, with scores that may be out of date. Made for the second placement.
    heaps: Option<Vec<BinaryHeap<Ranked>>>,
    placed: u32,
}

impl Batch {
    /// `planned` are the nodes that copies of the workload were placed on since the state was read.
    pub fn new(
        state: &State,
        now: Timestamp,
        rows: &[Row<'_>],
        classes: usize,
        key: &WorkloadKey,
        spec: &WorkloadSpec,
        planned: &[usize],
    ) -> Batch {
        let by_node = constraint::looks_at_names(spec);
        let pool = spec.placement.pool.as_ref();
        let mut batch = Batch {
            key: key.clone(),
            spec: spec.clone(),
            layout: pool.and_then(|p| state.pools.get(p)).or_else(|| default_pool(state, spec)).map_or(Layout::default(), |p| p.layout),
            grades: vec![None; if by_node { rows.len() } else { classes }],
            by_node,
            same: vec![0; rows.len()],
            held: vec![0; rows.len()],
            unwanted: vec![],
            buckets: vec![],
            counts: Counts::new(&spec.placement.spread),
            scores: vec![0; rows.len()],
            bucket_of: vec![0; rows.len()],
            open: vec![],
            heaps: None,
            placed: 0,
        };
        let at = |node: NodeId| rows.binary_search_by_key(&node, |row| row.id).ok();
        for alloc in state.allocs_of(key) {
            let Some(at) = at(alloc.node) else { continue };
            batch.held[at] += u32::from(!alloc.has_ended());
            if alloc.run {
                batch.count(rows, at);
            }
        }
        for &at in planned {
            batch.held[at] += 1;
            batch.count(rows, at);
        }
        if !spec.placement.anti_affinity.is_empty() {
            batch.unwanted = vec![0; rows.len()];
            for name in spec.placement.anti_affinity.iter().filter(|name| **name != key.workload) {
                let other = WorkloadKey { workload: name.clone(), ..key.clone() };
                for alloc in state.allocs_of(&other).filter(|a| !a.has_ended()) {
                    if let Some(at) = at(alloc.node) {
                        batch.unwanted[at] += 1;
                    }
                }
            }
        }
        let mut known: BTreeMap<Values, u32> = BTreeMap::new();
        for (at, row) in rows.iter().enumerate() {
            let slot = if by_node { at } else { row.class };
            if batch.grades[slot].is_none() {
                let values = spread::values_of(row.node, &spec.placement.spread);
                let bucket = *known.entry(values).or_insert_with_key(|values| {
                    batch.buckets.push(values.clone());
                    (batch.buckets.len() - 1) as u32
                });
                let liking = constraint::liking(row.node, &spec.placement.affinity);
                batch.grades[slot] = Some(Grade { suits: constraint::suits(row.node, spec), liking, bucket });
            }
            batch.bucket_of[at] = batch.grades[slot].as_ref().map_or(0, |g| g.bucket);
        }
        batch.open = vec![0; batch.buckets.len()];
        for (at, row) in rows.iter().enumerate() {
            batch.rescore(state, now, row, at);
        }
        batch
    }

    /// A copy that is wished to run is on the node.
    fn count(&mut self, rows: &[Row<'_>], at: usize) {
        self.same[at] += 1;
        if !self.spec.placement.spread.is_empty() {
            self.counts.add(&spread::values_of(rows[at].node, &self.spec.placement.spread));
        }
    }

    fn grade(&self, row: &Row<'_>, at: usize) -> Option<&Grade> {
        self.grades[if self.by_node { at } else { row.class }].as_ref()
    }

    /// Whether the node's class does.
    pub fn suits(&self, row: &Row<'_>, at: usize) -> bool {
        self.grade(row, at).is_some_and(|g| g.suits.is_ok())
    }

    /// Whether a node can take one more copy now; the same answer as [`fit::fits`], but for quotas.
    pub fn judge(&self, state: &State, now: Timestamp, row: &Row<'_>, at: usize) -> Result<(), Refusal> {
        fit::is_open(row.node)?;
        if let Some(Grade { suits: Err(refusal), .. }) = self.grade(row, at) {
            return Err(refusal.clone());
        }
        self.judge_rest(state, now, row, at)
    }

    fn judge_rest(&self, state: &State, now: Timestamp, row: &Row<'_>, at: usize) -> Result<(), Refusal> {
        if !self.spec.placement.volumes.is_empty() {
            fit::volumes(state, row.id, &self.key, &self.spec)?;
        }
        if self.spec.placement.distinct_hosts && self.held[at] > 0 {
            return Err(Refusal::DistinctHosts);
        }
        fit::has_room(row.node, &row.taken, &self.spec, None, now)?;
        match &row.promised {
            Some(promised) => fit::has_room(row.node, promised, &self.spec, None, now),
            None => Ok(()),
        }
    }

    fn standing(&self, row: &Row<'_>, at: usize) -> Standing {
        Standing {
            liking: self.grade(row, at).map_or(0, |g| g.liking),
            same: self.same[at],
            unwanted: self.unwanted.get(at).copied().unwrap_or(0),
            layout: self.layout,
        }
    }

    /// Looks at a node again after something changed on it.
    pub fn rescore(&mut self, state: &State, now: Timestamp, row: &Row<'_>, at: usize) {
        let fits = self.suits(row, at) && fit::is_open(row.node).is_ok() && self.judge_rest(state, now, row, at).is_ok();
        let score = match fits {
            true => 1 + Score::of(row.node, &row.taken, &self.spec, &self.standing(row, at), 0, false).without_even(),
            false => 0,
        };
        let before = std::mem::replace(&mut self.scores[at], score);
        let bucket = self.bucket_of[at] as usize;
        match (before > 0, score > 0) {
            (false, true) => self.open[bucket] += 1,
            (true, false) => self.open[bucket] -= 1,
            _ => {}
        }
        if let Some(heaps) = &mut self.heaps
            && score > 0
            && score != before
        {
            heaps[bucket].push((score, Reverse(at as u32)));
        }
    }

    /// One more copy was placed on a node.
    pub fn took(&mut self, state: &State, now: Timestamp, row: &Row<'_>, at: usize) {
        self.placed += 1;
        self.same[at] += 1;
        self.held[at] += 1;
        let values = &self.buckets[self.bucket_of[at] as usize];
        self.counts.add(values);
        self.rescore(state, now, row, at);
    }

    /// The buckets with a node that can take a copy, with what the spread makes of each.
    fn live(&self) -> (Vec<usize>, Vec<u32>) {
        let live: Vec<usize> = (0..self.buckets.len()).filter(|&b| self.open[b] > 0).collect();
        let values: Vec<&Values> = live.iter().map(|&b| &self.buckets[b]).collect();
        let even = spread::evenness(&self.spec.placement.spread, &self.counts, &values);
        (live, even)
    }

    /// The best node for one more copy; ties go to the lowest id.
    pub fn best(&mut self, rows: &[Row<'_>], troubled: &[NodeId]) -> Option<usize> {
        let (live, even) = self.live();
        if self.placed > 0 && troubled.is_empty() {
            return self.best_of_heaps(&live, &even);
        }
        let mut bonus = vec![0; self.buckets.len()];
        for (&bucket, even) in live.iter().zip(even) {
            bonus[bucket] = weight_of_even(even);
        }
        let mut best: Option<(u64, usize)> = None;
        for (at, &score) in self.scores.iter().enumerate().filter(|(_, score)| **score > 0) {
            let lost = if troubled.contains(&rows[at].id) { TROUBLE } else { 0 };
            let total = score + bonus[self.bucket_of[at] as usize] - lost;
            if best.is_none_or(|(most, _)| total > most) {
                best = Some((total, at));
            }
        }
        best.map(|(_, at)| at)
    }

    fn best_of_heaps(&mut self, live: &[usize], even: &[u32]) -> Option<usize> {
        let Batch { heaps, scores, bucket_of, buckets, .. } = self;
        let heaps = heaps.get_or_insert_with(|| {
            let mut nodes: Vec<Vec<Ranked>> = vec![vec![]; buckets.len()];
            for (at, &score) in scores.iter().enumerate().filter(|(_, score)| **score > 0) {
                nodes[bucket_of[at] as usize].push((score, Reverse(at as u32)));
            }
            nodes.into_iter().map(BinaryHeap::from).collect()
        });
        let mut best: Option<Ranked> = None;
        for (&bucket, &even) in live.iter().zip(even) {
            let heap = &mut heaps[bucket];
            // What was pushed before a node changed is dropped when it comes up.
            while heap.peek().is_some_and(|(score, Reverse(at))| scores[*at as usize] != *score) {
                heap.pop();
            }
            if let Some(&(score, at)) = heap.peek() {
                best = best.max(Some((score + weight_of_even(even), at)));
            }
        }
        best.map(|(_, Reverse(at))| at as usize)
    }

    /// The score of a node in full, or why it cannot take a copy. For people, and to check the quick way against.
    pub fn explain(&self, state: &State, now: Timestamp, row: &Row<'_>, at: usize, troubled: &[NodeId]) -> Result<Score, Refusal> {
        self.judge(state, now, row, at)?;
        let (live, even) = self.live();
        let even = live.iter().position(|&b| b == self.bucket_of[at] as usize).map_or(0, |n| even[n]);
        Ok(Score::of(row.node, &row.taken, &self.spec, &self.standing(row, at), even, troubled.contains(&row.id)))
    }
}

/// The row of the pool of a spec that names none.
fn default_pool<'s>(state: &'s State, spec: &WorkloadSpec) -> Option<&'s std::sync::Arc<crate::state::Pool>> {
    if spec.placement.pool.is_some() || state.pools.is_empty() {
        return None;
    }
    state.pools.iter().find(|(name, _)| name.as_str() == crate::state::DEFAULT_POOL).map(|(_, pool)| pool)
}
