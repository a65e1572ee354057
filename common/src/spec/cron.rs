//! Cron lines: which instants a schedule names. Pure: computed from the times given, with the zone data of this
//! build, never the host's.
//!
//! A fixed time that a clock change skips runs at the first instant after the gap; one that the change repeats runs
//! once, the first time. Lines with `*` or `/` in minute or hour follow the clock: they skip the gap and go on
//! through the repeated hour.

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::tz::{TimeZone, TimeZoneDatabase};
use jiff::{Timestamp as Instant, Zoned};

use super::job::Schedule;
use crate::time::Timestamp;

/// Longest cron line.
const LINE_MAX: usize = 256;
/// A line that names something every minute names some thousands in so long, in milliseconds.
const NEAR: u64 = 2 * 24 * 3_600_000;

/// A schedule that was understood.
#[derive(Debug, Clone)]
pub struct Timetable {
    cron: Cron,
    zone: TimeZone,
}

/// An instant a schedule names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    pub at: Timestamp,
    /// The same with its zone, for people: `2026-10-25T02:30:00+01:00[Europe/Berlin]`.
    pub local: String,
}

/// Why a schedule cannot be used; which of its fields, and what is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CronError {
    #[error("{0}")]
    Line(String),
    #[error("{0}")]
    Zone(String),
}

impl Timetable {
    pub fn of(schedule: &Schedule) -> Result<Self, CronError> {
        let line = schedule.cron.trim();
        if line.len() > LINE_MAX {
            return Err(CronError::Line(format!("a cron line has at most {LINE_MAX} bytes")));
        }
        if !line.starts_with('@') && line.split_whitespace().count() != 5 {
            return Err(CronError::Line("a cron line has five fields: minute, hour, day of the month, month, day of the week".into()));
        }
        let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let cron = parser.parse(line).map_err(|error| CronError::Line(error.to_string().to_lowercase()))?;
        let zone = zone(&schedule.timezone)?;
        let table = Timetable { cron, zone };
        // A line such as `0 0 30 2 *` is well formed and names nothing.
        if table.after(Timestamp(0)).is_none() {
            return Err(CronError::Line(format!("`{line}` names no time at all")));
        }
        Ok(table)
    }

    /// The first instant after `at`; none if the line names no more.
    pub fn after(&self, at: Timestamp) -> Option<Instance> {
        let from = Instant::from_millisecond(i64::try_from(at.0).ok()?).ok()?;
        let mut from = from.to_zoned(self.zone.clone());
        // The search reads local fields, and at a repeated hour those of one instant fit another: never go back.
        for _ in 0..8 {
            let next: Zoned = self.cron.find_next_occurrence(&from, false).ok()?;
            let millis = u64::try_from(next.timestamp().as_millisecond()).ok()?;
            if millis > at.0 {
                return Some(Instance { at: Timestamp(millis), local: next.to_string() });
            }
            from = next;
        }
        None
    }

    /// The newest `keep` instants after `after` up to and with `until`, in order, and whether there were more.
    pub fn between(&self, after: Timestamp, until: Timestamp, keep: usize) -> (Vec<Instance>, bool) {
        // A line that names many leaves enough of them near the end; one that names few is quickly read as a whole.
        let near = Timestamp(until.0.saturating_sub(NEAR)).max(after);
        let found = self.all(near, until);
        let found = if found.len() > keep || near == after { found } else { self.all(after, until) };
        let more = found.len() > keep;
        let surplus = found.len().saturating_sub(keep);
        (found.into_iter().skip(surplus).collect(), more)
    }

    fn all(&self, after: Timestamp, until: Timestamp) -> Vec<Instance> {
        let first = self.after(after);
        std::iter::successors(first, |last| self.after(last.at)).take_while(|next| next.at <= until).collect()
    }
}

fn zone(name: &str) -> Result<TimeZone, CronError> {
    if name == "UTC" {
        return Ok(TimeZone::UTC);
    }
    // Of this build: servers must agree whatever their hosts have installed.
    TimeZoneDatabase::bundled().get(name).map_err(|_| {
        CronError::Zone(format!("there is no time zone `{}`; write an IANA name such as Europe/Berlin", super::error::printable(name)))
    })
}

#[cfg(test)]
#[path = "cron_tests.rs"]
mod tests;
