//! The planted bugs and the seeds that find them.

/// Each planted bug and what it breaks. The names are those the code asks for.
pub const BUGS: &[(&str, &str)] = &[
    ("ack-before-fsync", "an append is acknowledged before it is flushed"),
    ("vote-without-fsync", "a vote is acknowledged before it is flushed"),
    ("stale-read", "a read is answered without asking a quorum"),
    ("no-request-dedup", "a repeated request has its effect again"),
    ("no-g1", "a server resumes as leader after a restart, without an election"),
    ("no-g2", "the log is purged before the snapshot that covers it is durable"),
    ("rename-before-fsync", "a snapshot gets its name before its content is durable"),
    ("purge-too-far", "a purge takes an entry more than the snapshot covers"),
    ("skip-after-snapshot", "the first entry after a snapshot is not applied"),
    ("half-batch", "the last command of a batch is not applied"),
    ("failed-flush-ignored", "a flush that failed is taken for one that did not"),
    ("clock-in-apply", "applying looks at something that is not in the log"),
    ("hash-order-in-apply", "applying follows the order of a hash map"),
    ("plan-unchecked", "a plan is applied without looking at the slot again"),
    ("report-for-wrong-node", "a report is believed of copies on other nodes"),
    ("ports-double-booked", "ports are not checked when a plan is applied"),
    ("event-index-reused", "the second event of an index takes the place of the first"),
    ("snapshot-forgets-requests", "a snapshot comes back without the answers kept for retries"),
];

/// `name seed` lines of `planted.txt`: the first seed that finds each bug.
pub fn recorded() -> Vec<(&'static str, u64)> {
    let lines = include_str!("../planted.txt").lines().filter(|l| !l.starts_with('#'));
    lines.filter_map(|line| line.split_once(' ')).filter_map(|(name, seed)| Some((name, seed.trim().parse().ok()?))).collect()
}

/// `seed why` lines of `regressions.txt`: seeds that once found a bug of ours.
pub fn regressions() -> Vec<(u64, &'static str)> {
    let lines = include_str!("../regressions.txt").lines().filter(|l| !l.starts_with('#'));
    lines.filter_map(|line| line.split_once(' ')).filter_map(|(seed, why)| Some((seed.parse().ok()?, why))).collect()
}
