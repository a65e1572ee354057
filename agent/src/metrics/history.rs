//! Rows of the last hours, on disk.
//!
//! Rows gather in memory and become [chunks](super::chunk) in sled databases, one for each stretch of time: what is too
//! old, or too much, goes a whole database at a time. What is not sealed yet is saved every minute all the same, so
//! that an agent that is killed loses a minute. Blocking: it belongs to one thread.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use optimus_common::usage::{POINTS_MAX, Point};
use optimus_common::{AllocId, Bytes, Span, Timestamp};

use super::Metric;
use super::chunk::{self, ROWS_MAX, Row};
use super::probed::{self, Damage, OpenError};

/// What rows are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Subject {
    Host,
    Alloc(AllocId),
}

impl Subject {
    fn key(self, first: Timestamp) -> Vec<u8> {
        let mut key = vec![u8::from(self != Subject::Host)];
        if let Subject::Alloc(id) = self {
            key.extend(id.0.as_bytes());
        }
        key.extend(first.0.to_be_bytes());
        key
    }
}

#[derive(Debug, Clone)]
pub struct HistoryConfig {
    pub dir: PathBuf,
    /// How far back it reaches at least, room permitting.
    pub keep: Span,
    /// Most bytes on disk.
    pub bytes_max: Bytes,
}

/// Most subjects whose rows are gathered; rows of others are dropped and counted.
pub const SUBJECTS_MAX: usize = 4096;
/// Databases the time kept is cut into.
const STRETCHES: u64 = 4;
/// Page cache of all of them together.
const CACHE: u64 = 4 << 20;
/// What [`History::query`] is asked.
#[derive(Debug, Clone)]
pub struct Query {
    pub subject: Subject,
    pub metrics: Vec<Metric>,
    /// Inclusive.
    pub from: Timestamp,
    /// Exclusive.
    pub to: Timestamp,
    pub step: Span,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueryError {
    #[error("the step is zero")]
    NoStep,
    #[error("{asked} points asked for; at most {POINTS_MAX}: choose a step of {least} or longer")]
    TooMany { asked: u64, least: Span },
}

pub struct History {
    config: HistoryConfig,
    /// By the start of its stretch of time.
    databases: BTreeMap<u64, sled::Db>,
    gathering: BTreeMap<Subject, Vec<Row>>,
    lost: u64,
}

impl History {
    /// Opens what is there; a damaged database is moved aside.
    pub fn open(config: HistoryConfig, now: Timestamp) -> io::Result<History> {
        fs::create_dir_all(&config.dir)?;
        let mut history = History { config, databases: BTreeMap::new(), gathering: BTreeMap::new(), lost: 0 };
        let mut starts: Vec<u64> = Vec::new();
        for entry in fs::read_dir(&history.config.dir)? {
            starts.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u64>().ok()));
        }
        for start in starts {
            let _ = history.database(start); // logged; one that cannot be opened is not read
        }
        history.rotate(now);
        Ok(history)
    }

    /// Rows that could not be kept so far.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> Bytes {
        Bytes(self.databases.values().map(|db| probed::guarded(|| db.size_on_disk()).unwrap_or(0)).sum())
    }

    pub fn append(&mut self, subject: Subject, row: Row) {
        if !self.gathering.contains_key(&subject) && self.gathering.len() >= SUBJECTS_MAX {
            self.lost += 1;
            return;
        }
        let rows = self.gathering.entry(subject).or_default();
        // A chunk begins anew where the clock went back: its rows are in order.
        let back = rows.last().is_some_and(|last| row.at < last.at);
        let next = if rows.len() >= ROWS_MAX || back { Some(std::mem::take(rows)) } else { None };
        rows.push(row);
        if let Some(full) = next {
            self.write(subject, &full);
        }
    }

    /// The subject is gone: seals what was gathered.
    pub fn close(&mut self, subject: Subject) {
        if let Some(rows) = self.gathering.remove(&subject) {
            self.write(subject, &rows);
        }
    }

    /// Saves what is gathered, and drops what is too old or too much. Once a minute.
    pub fn save(&mut self, now: Timestamp) {
        let gathering = std::mem::take(&mut self.gathering);
        for (subject, rows) in &gathering {
            self.write(*subject, rows);
        }
        self.gathering = gathering;
        let flush = |db: &sled::Db| probed::guarded(|| db.flush()).err();
        let damaged: Vec<_> = self.databases.iter().filter_map(|(start, db)| Some((*start, flush(db)?))).collect();
        for (start, damage) in damaged {
            self.give_up(start, &damage);
        }
        self.rotate(now);
    }

    /// The rows of a subject in steps: for each metric asked for, a point a step.
    pub fn query(&mut self, query: &Query) -> Result<Vec<Vec<Option<Point>>>, QueryError> {
        if query.step.0 == 0 {
            return Err(QueryError::NoStep);
        }
        let length = query.to.since(query.from).0;
        let count = length.div_ceil(query.step.0);
        if count > POINTS_MAX {
            return Err(QueryError::TooMany { asked: count, least: Span(length.div_ceil(POINTS_MAX)) });
        }
        let mut sums = vec![vec![(0u128, 0u64, 0u64); count as usize]; query.metrics.len()];
        for row in self.rows(query) {
            let step = (row.at.since(query.from).0 / query.step.0) as usize;
            for (metric, series) in query.metrics.iter().zip(&mut sums) {
                if let (Some(value), Some((sum, samples, max))) = (row.get(*metric), series.get_mut(step)) {
                    *sum += u128::from(value);
                    *samples += 1;
                    *max = value.max(*max);
                }
            }
        }
        let point =
            |(sum, samples, max): &(u128, u64, u64)| (*samples > 0).then(|| Point { mean: (sum / u128::from(*samples)) as u64, max: *max });
        Ok(sums.iter().map(|series| series.iter().map(point).collect()).collect())
    }

    /// All rows of a subject in a range, each once, from disk and from memory.
    fn rows(&mut self, query: &Query) -> Vec<Row> {
        // A chunk that began before the range may reach into it.
        let longest = Span(ROWS_MAX as u64 * 60_000);
        let (first, last) = (query.subject.key(query.from - longest), query.subject.key(query.to));
        let mut rows: Vec<Row> = Vec::new();
        let mut damaged = Vec::new();
        // What is being gathered is on disk too, as of the last save.
        let gathered = self.gathering.get(&query.subject);
        let gathered_from = gathered.and_then(|rows| rows.first()).map(|r| query.subject.key(r.at));
        for (start, db) in &self.databases {
            let read = probed::guarded(|| {
                for item in db.range(first.clone()..last.clone()) {
                    let (key, value) = item?;
                    if Some(&*key) == gathered_from.as_deref() {
                        continue;
                    }
                    match chunk::open(&value) {
                        Ok(chunk) => rows.extend(chunk),
                        Err(error) => tracing::warn!(%error, "a chunk of the metric history is not readable"),
                    }
                }
                Ok(())
            });
            if let Err(damage) = read {
                damaged.push((*start, damage));
            }
        }
        for (start, damage) in damaged {
            self.give_up(start, &damage);
        }
        rows.extend(self.gathering.get(&query.subject).into_iter().flatten().cloned());
        rows.retain(|row| (query.from..query.to).contains(&row.at));
        rows
    }

    fn write(&mut self, subject: Subject, rows: &[Row]) {
        let Some(first) = rows.first() else { return };
        let start = first.at.0 - first.at.0 % self.stretch();
        let (key, bytes) = (subject.key(first.at), chunk::seal(rows));
        let written = match self.database(start) {
            Some(db) => probed::guarded(|| db.insert(key, bytes)),
            None => {
                self.lost += rows.len() as u64;
                return;
            }
        };
        if let Err(damage) = written {
            self.lost += rows.len() as u64;
            self.give_up(start, &damage);
        }
    }

    fn stretch(&self) -> u64 {
        (self.config.keep.0 / STRETCHES).max(1000)
    }

    fn path(&self, start: u64) -> PathBuf {
        self.config.dir.join(start.to_string())
    }

    fn database(&mut self, start: u64) -> Option<sled::Db> {
        if let Some(db) = self.databases.get(&start) {
            return Some(db.clone());
        }
        match probed::open(&self.path(start), CACHE / (STRETCHES + 1)) {
            Ok(db) => {
                self.databases.insert(start, db.clone());
                Some(db)
            }
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::error!(error, "the metric history cannot be kept");
                None
            }
        }
    }

    /// A database that turned out to be damaged; the next row makes an empty one.
    fn give_up(&mut self, start: u64, damage: &Damage) {
        self.databases.remove(&start);
        if let Err(error) = probed::set_aside(&self.path(start), damage) {
            let error: &dyn std::error::Error = &error;
            tracing::error!(error, "a damaged metric history stays where it is");
        }
    }

    /// Drops databases whose last row is older than what is kept, or, the oldest first, what is beyond the bytes allowed.
    fn rotate(&mut self, now: Timestamp) {
        let stretch = self.stretch();
        let over = |start: u64| Timestamp(start.saturating_add(stretch)) + self.config.keep < now;
        let mut drop: Vec<u64> = self.databases.keys().copied().filter(|start| over(*start)).collect();
        // A clock that was ahead once leaves a future that never comes; two stretches are ordinary skew.
        drop.extend(self.databases.keys().copied().filter(|start| *start > now.0.saturating_add(2 * stretch)));
        let mut bytes = self.bytes().0;
        for (start, db) in &self.databases {
            if bytes <= self.config.bytes_max.0 || self.databases.len() - drop.len() <= 1 {
                break;
            }
            if !drop.contains(start) {
                bytes = bytes.saturating_sub(probed::guarded(|| db.size_on_disk()).unwrap_or(0));
                drop.push(*start);
            }
        }
        for start in drop {
            self.databases.remove(&start);
            remove(&self.path(start));
        }
    }
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_dir_all(path).or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) }) {
        tracing::warn!(path = %path.display(), %error, "an old metric history could not be removed");
    }
}

impl From<OpenError> for io::Error {
    fn from(error: OpenError) -> Self {
        io::Error::other(error)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const START: Timestamp = Timestamp(1_800_000_000_000);

    fn config(dir: &Path) -> HistoryConfig {
        HistoryConfig { dir: dir.join("metrics"), keep: Span::secs(4 * 3600), bytes_max: Bytes::mib(64) }
    }

    fn row(second: u64) -> Row {
        let mut row = Row::empty(START + Span::secs(second));
        row.set(Metric::Cpu, second % 500);
        row
    }

    fn query(from: u64, to: u64, step: u64) -> Query {
        let at = |s| START + Span::secs(s);
        Query { subject: Subject::Host, metrics: vec![Metric::Cpu, Metric::Fds], from: at(from), to: at(to), step: Span::secs(step) }
    }

    fn cpu(history: &mut History, from: u64, to: u64, step: u64) -> Vec<Option<Point>> {
        history.query(&query(from, to, step)).unwrap().swap_remove(0)
    }

    #[test]
    fn what_was_sampled_is_answered_in_steps() {
        let dir = tempfile::tempdir().unwrap();
        let mut history = History::open(config(dir.path()), START).unwrap();
        for second in (0..700).filter(|s| !(20..30).contains(s)) {
            history.append(Subject::Host, row(second));
        }
        let points = cpu(&mut history, 0, 40, 10);
        assert_eq!(points[1], Some(Point { mean: 14, max: 19 }));
        assert_eq!(points[2], None, "a gap is no zero");
        assert_eq!(cpu(&mut history, 690, 710, 10), [Some(Point { mean: 194, max: 199 }), None]);
        assert_eq!(history.query(&query(0, 10, 10)).unwrap()[1], [None], "nothing is known of open files");
    }

    #[test]
    fn a_killed_agent_loses_what_came_after_the_last_save() {
        let dir = tempfile::tempdir().unwrap();
        let mut history = History::open(config(dir.path()), START).unwrap();
        for second in 0..400 {
            history.append(Subject::Host, row(second));
            if second == 350 {
                history.save(START + Span::secs(second));
            }
        }
        drop(history);
        let mut history = History::open(config(dir.path()), START + Span::secs(400)).unwrap();
        for second in 400..420 {
            history.append(Subject::Host, row(second));
        }
        let points = cpu(&mut history, 0, 420, 1);
        let known = |from: usize, to: usize| points[from..to].iter().filter(|p| p.is_some()).count();
        assert_eq!((known(0, 351), known(351, 400), known(400, 420)), (351, 0, 20));
        // Saved twice and more is one and the same.
        history.save(START + Span::secs(420));
        history.save(START + Span::secs(421));
        assert_eq!(cpu(&mut history, 400, 420, 20), [Some(Point { mean: 409, max: 419 })]);
    }

    #[test]
    fn subjects_do_not_mix() {
        let dir = tempfile::tempdir().unwrap();
        let mut history = History::open(config(dir.path()), START).unwrap();
        let alloc = Subject::Alloc(AllocId(uuid::Uuid::from_u128(7)));
        history.append(alloc, row(5));
        history.close(alloc);
        assert_eq!(cpu(&mut history, 0, 10, 10), [None]);
        let of_alloc = history.query(&Query { subject: alloc, ..query(0, 10, 10) }).unwrap();
        assert_eq!(of_alloc[0][0], Some(Point { mean: 5, max: 5 }));
    }

    #[test]
    fn old_databases_go_and_so_do_those_of_a_clock_that_was_ahead() {
        let dir = tempfile::tempdir().unwrap();
        let mut history = History::open(config(dir.path()), START).unwrap();
        for hour in [0, 1, 2, 3, 4, 5, 6, 7, 400] {
            history.append(Subject::Host, row(hour * 3600));
            history.close(Subject::Host);
        }
        let now = START + Span::secs(7 * 3600 + 10);
        history.save(now);
        let hours = |h: &mut History| (0..8).filter(|n| cpu(h, n * 3600, n * 3600 + 60, 60)[0].is_some()).collect::<Vec<_>>();
        assert_eq!(hours(&mut history), [3, 4, 5, 6, 7]);
        drop(history);
        assert_eq!(hours(&mut History::open(config(dir.path()), now).unwrap()), [3, 4, 5, 6, 7]);
        assert!(fs::read_dir(dir.path().join("metrics")).unwrap().count() <= 6);
    }

    #[test]
    fn what_is_too_much_goes_the_oldest_first() {
        let dir = tempfile::tempdir().unwrap();
        let mut history = History::open(HistoryConfig { bytes_max: Bytes(1), ..config(dir.path()) }, START).unwrap();
        for hour in 0..3 {
            history.append(Subject::Host, row(hour * 3600));
            history.close(Subject::Host);
        }
        history.save(START + Span::secs(2 * 3600 + 1));
        let left: Vec<bool> = (0..3).map(|n| cpu(&mut history, n * 3600, n * 3600 + 60, 60)[0].is_some()).collect();
        assert_eq!(left, [false, false, true], "the newest stays, whatever it takes");
    }

    #[test]
    fn too_many_points_are_refused_with_the_step_that_would_do() {
        let dir = tempfile::tempdir().unwrap();
        let mut history = History::open(config(dir.path()), START).unwrap();
        assert_eq!(history.query(&query(0, 4000, 1)), Err(QueryError::TooMany { asked: 4000, least: Span::secs(2) }));
        assert_eq!(history.query(&query(0, 4000, 0)), Err(QueryError::NoStep));
        assert!(history.query(&query(0, 4000, 2)).is_ok());
        assert_eq!(history.query(&query(10, 5, 1)), Ok(vec![vec![], vec![]]));
    }

    #[test]
    fn a_damaged_history_is_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut history = History::open(config(dir.path()), START).unwrap();
        history.append(Subject::Host, row(1));
        history.close(Subject::Host);
        drop(history);
        for database in fs::read_dir(dir.path().join("metrics")).unwrap() {
            fs::write(database.unwrap().path().join("db"), [7; 5000]).unwrap();
        }
        let mut history = History::open(config(dir.path()), START).unwrap();
        history.append(Subject::Host, row(2));
        assert_eq!(cpu(&mut history, 2, 3, 1), [Some(Point { mean: 2, max: 2 })]);
        history.save(START + Span::secs(3));
        assert_eq!(history.lost(), 0);
    }
}
