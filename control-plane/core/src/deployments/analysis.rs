//! Whether new copies do worse under traffic than those of the release before, told from chance by two tests.
//!
//! What routers count while a step bakes is in the deployment's row. Where no router counts, health and restarts decide alone.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};

/// Fewer requests than this on either side say nothing.
pub const REQUESTS_MIN: u64 = 100;
/// How many standard deviations apart the sides must be: one chance in a thousand, one-sided, as it is asked often.
pub const DEVIATIONS: f64 = 3.09;
/// A difference smaller than this matters to nobody, however certain: in shares of all requests.
pub const ERRORS_MATTER: f64 = 0.005;
/// As [`ERRORS_MATTER`]: by how much the chance that a request to a new copy is the slower of two exceeds a half.
pub const LATENCY_MATTERS: f64 = 0.1;

/// Most buckets of latencies that are kept.
pub const LATENCY_BUCKETS: usize = 32;

/// What was counted on one side since the step began.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    pub requests: u64,
    /// Of them, answered by a fault of the server or not at all.
    pub errors: u64,
    /// Requests by latency: the same buckets on both sides, from quick to slow.
    pub latency: Vec<u64>,
}

impl Sample {
    /// Counts on; what would overflow stays at the top.
    pub fn add(&mut self, more: &Sample) {
        self.requests = self.requests.saturating_add(more.requests);
        self.errors = self.errors.saturating_add(more.errors);
        let buckets = self.latency.len().max(more.latency.len()).min(LATENCY_BUCKETS);
        self.latency.resize(buckets, 0);
        for (sum, count) in self.latency.iter_mut().zip(&more.latency) {
            *sum = sum.saturating_add(*count);
        }
    }
}

/// Both sides at the same time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    pub new: Sample,
    pub old: Sample,
}

/// Unset: nothing speaks against the new copies. Otherwise what does, in a sentence.
pub fn worse(traffic: &Traffic) -> Option<String> {
    let Traffic { new, old } = traffic;
    if new.requests.min(old.requests) < REQUESTS_MIN {
        return None;
    }
    let share = |s: &Sample| s.errors.min(s.requests) as f64 / s.requests as f64;
    if share(new) - share(old) > ERRORS_MATTER && errors_apart(new, old) > DEVIATIONS {
        let percent = |s: &Sample| share(s) * 100.0;
        return Some(format!(
            "{:.1} % of {} requests to the new copies failed, {:.1} % of {} to the old ones",
            percent(new),
            new.requests,
            percent(old),
            old.requests
        ));
    }
    let (slower, deviations) = latency_apart(&new.latency, &old.latency)?;
    if slower - 0.5 > LATENCY_MATTERS && deviations > DEVIATIONS {
        return Some(format!(
            "the new copies are slower: of two requests, one to each side, theirs takes longer in {:.0} % of cases",
            slower * 100.0
        ));
    }
    None
}

/// The two-proportion z-test with pooled variance: how many standard deviations the new error share lies above the old.
pub fn errors_apart(new: &Sample, old: &Sample) -> f64 {
    let (n, m) = (new.requests as f64, old.requests as f64);
    if n == 0.0 || m == 0.0 {
        return 0.0;
    }
    let (a, b) = (new.errors.min(new.requests) as f64, old.errors.min(old.requests) as f64);
    let pooled = (a + b) / (n + m);
    let deviation = (pooled * (1.0 - pooled) * (1.0 / n + 1.0 / m)).sqrt();
    if deviation == 0.0 { 0.0 } else { (a / n - b / m) / deviation }
}

/// The Mann-Whitney test on bucketed values, with the correction for ties: the chance that a value of `new` exceeds one
/// of `old` (ties count half), and how many standard deviations that lies above a half. Unset without values.
pub fn latency_apart(new: &[u64], old: &[u64]) -> Option<(f64, f64)> {
    let total = |counts: &[u64]| counts.iter().map(|c| *c as f64).sum::<f64>();
    let (n, m) = (total(new), total(old));
    if n.partial_cmp(&0.0) != Some(Ordering::Greater) || m.partial_cmp(&0.0) != Some(Ordering::Greater) {
        return None;
    }
    let at = |counts: &[u64], bucket: usize| counts.get(bucket).copied().unwrap_or(0) as f64;
    let (mut below, mut exceeds, mut ties) = (0.0, 0.0, 0.0);
    for bucket in 0..new.len().max(old.len()) {
        let (a, b) = (at(new, bucket), at(old, bucket));
        exceeds += a * (below + b / 2.0);
        below += b;
        let tied = a + b;
        ties += tied * tied * tied - tied;
    }
    let all = n + m;
    let variance = n * m / 12.0 * ((all + 1.0) - ties / (all * (all - 1.0)).max(1.0));
    let deviations = if variance <= 0.0 { 0.0 } else { (exceeds - n * m / 2.0) / variance.sqrt() };
    Some((exceeds / (n * m), deviations))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sample(requests: u64, errors: u64) -> Sample {
        Sample { requests, errors, latency: vec![] }
    }

    #[test]
    fn few_requests_say_nothing() {
        let traffic = Traffic { new: sample(99, 99), old: sample(10_000, 0) };
        assert_eq!(worse(&traffic), None);
    }

    #[test]
    fn errors_that_chance_does_not_explain_are_told() {
        let traffic = Traffic { new: sample(1000, 50), old: sample(9000, 45) };
        assert_eq!(worse(&traffic).unwrap(), "5.0 % of 1000 requests to the new copies failed, 0.5 % of 9000 to the old ones");
        // Twice the share, of so few, may be chance; and what is certain but tiny matters to nobody.
        assert_eq!(worse(&Traffic { new: sample(100, 2), old: sample(900, 9) }), None);
        assert_eq!(worse(&Traffic { new: sample(10_000_000, 20_000), old: sample(10_000_000, 10_000) }), None);
        // The other way round it is an improvement.
        assert_eq!(worse(&Traffic { new: sample(9000, 45), old: sample(1000, 50) }), None);
    }

    /// By hand: 60 of 200 against 30 of 200 is z = 3.592.
    #[test]
    fn the_proportions_test_agrees_with_a_table() {
        let z = errors_apart(&sample(200, 60), &sample(200, 30));
        assert!((z - 3.592).abs() < 0.001, "{z}");
        assert_eq!(errors_apart(&sample(0, 0), &sample(5, 1)), 0.0);
    }

    /// By hand: {1, 3} against {0, 2} wins 3 of 4 pairs; the variance is 2 * 2 * 5 / 12.
    #[test]
    fn the_rank_test_agrees_with_counting_pairs() {
        let (share, deviations) = latency_apart(&[0, 1, 0, 1], &[1, 0, 1, 0]).unwrap();
        assert_eq!(share, 0.75);
        assert!((deviations - 1.0 / (20.0f64 / 12.0).sqrt()).abs() < 1e-9, "{deviations}");
        // All in one bucket: no difference can be seen.
        assert_eq!(latency_apart(&[5], &[7]), Some((0.5, 0.0)));
        assert_eq!(latency_apart(&[], &[7]), None);
    }

    #[test]
    fn slower_copies_are_told() {
        let with = |latency: Vec<u64>| Sample { requests: latency.iter().sum(), errors: 0, latency };
        let traffic = Traffic { new: with(vec![100, 300, 400]), old: with(vec![6000, 2000, 100]) };
        assert!(worse(&traffic).unwrap().contains("slower"));
        assert_eq!(worse(&Traffic { new: traffic.old.clone(), old: traffic.new }), None);
        assert_eq!(worse(&Traffic { new: traffic.old.clone(), old: traffic.old }), None);
    }
}
