//! What a job says beside what every workload says: when it runs, and how its runs are kept apart.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, de};
use utoipa::ToSchema;

use crate::time::{Span, Timestamp};

/// Most runs of one job at the same time, and most that wait.
pub const ACTIVE_MAX: u32 = 1000;
pub const WAITING_MAX: u32 = 1000;
/// Most ended runs of one job that are remembered.
pub const KEEP_MAX: u32 = 200;
pub const RETRIES_MAX: u32 = 100;
/// Longest payload of a run, in bytes.
pub const PAYLOAD_MAX: usize = 16 << 10;
/// Most parameters of a run, and the longest value of one in bytes.
pub const PARAMS_MAX: usize = 32;
pub const PARAM_MAX: usize = 1024;
/// Most missed runs that `run_all` makes up for, the newest of them.
pub const MISSED_MAX: usize = 50;

/// When a job runs by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Schedule {
    /// Five fields: minute, hour, day of the month, month, day of the week.
    pub cron: String,
    /// IANA name of the zone the fields are read in.
    pub timezone: String,
    pub overlap: Overlap,
    pub missed: Missed,
    /// Each run starts up to so much later, by an amount that depends on the run alone.
    pub jitter: Span,
}

/// What happens when a run is due while another of the job is active.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Overlap {
    /// The new run is skipped.
    #[default]
    Forbid,
    /// The old run is cancelled, then the new one starts.
    Replace,
    /// Both run, up to `runs.active`.
    Allow,
}

/// What happens to runs that were due while nobody could start them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Missed {
    Skip,
    /// The newest of them runs now, once.
    #[default]
    RunOnce,
    /// All of them run, one after another unless they may overlap; at most [`MISSED_MAX`].
    RunAll,
}

impl Schedule {
    /// The schedule of a cron line alone.
    pub fn of(cron: impl Into<String>) -> Self {
        Schedule { cron: cron.into(), timezone: "UTC".into(), overlap: Overlap::default(), missed: Missed::default(), jitter: Span(0) }
    }
}

impl<'de> Deserialize<'de> for Schedule {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Table {
            cron: String,
            #[serde(default)]
            timezone: Option<String>,
            #[serde(default)]
            overlap: Overlap,
            #[serde(default)]
            missed: Missed,
            #[serde(default)]
            jitter: Span,
        }

        // A cron line alone is a schedule too. Not an untagged enum: that one reads binary forms as if they were text.
        struct Written;
        impl<'de> de::Visitor<'de> for Written {
            type Value = Schedule;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a cron line or a table with `cron`")
            }
            fn visit_str<E: de::Error>(self, cron: &str) -> Result<Schedule, E> {
                Ok(Schedule::of(cron))
            }
            fn visit_map<M: de::MapAccess<'de>>(self, map: M) -> Result<Schedule, M::Error> {
                let Table { cron, timezone, overlap, missed, jitter } = Table::deserialize(de::value::MapAccessDeserializer::new(map))?;
                Ok(Schedule { cron, timezone: timezone.unwrap_or_else(|| "UTC".into()), overlap, missed, jitter })
            }
        }
        d.deserialize_any(Written)
    }
}

/// How the runs of a job are admitted, retried and remembered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Runs {
    /// Runs at the same time.
    pub active: u32,
    /// Runs that wait for their turn; a further one is refused.
    pub waiting: u32,
    /// How often the copies of one run may fail before the run has failed.
    pub retries: u32,
    /// Ended runs whose records are kept.
    pub keep: u32,
    /// What starts a run beside the schedule and a request.
    pub on: RunOn,
    /// Names of the parameters a run must be given.
    #[serde(default)]
    pub params: Vec<String>,
    pub payload: PayloadRule,
    /// Longest time until its copies are placed; then the run has failed.
    pub start_within: Span,
    /// What this run was given. Set by the control plane in what an agent receives, never by a user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(ignore)]
    pub input: Option<Box<RunInput>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RunOn {
    /// Each new release runs once.
    Deploy,
    /// Only what asks for it.
    Request,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PayloadRule {
    #[default]
    Optional,
    Required,
    Forbidden,
}

impl Runs {
    /// What stands when a job says nothing of its runs.
    pub fn of(schedule: Option<&Schedule>) -> Self {
        let one_at_a_time = schedule.is_some_and(|s| s.overlap != Overlap::Allow);
        Runs {
            active: if one_at_a_time { 1 } else { 10 },
            waiting: 100,
            retries: 0,
            keep: 20,
            on: if schedule.is_some() { RunOn::Request } else { RunOn::Deploy },
            params: vec![],
            payload: PayloadRule::Optional,
            start_within: Span::secs(3600),
            input: None,
        }
    }

    /// Whether a run cannot start without something that only a request can give.
    pub fn is_parameterised(&self) -> bool {
        !self.params.is_empty() || self.payload == PayloadRule::Required
    }
}

/// What one run knows of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunInput {
    pub run: String,
    pub number: u64,
    #[serde(default)]
    pub scheduled_for: Option<Timestamp>,
    #[serde(default)]
    pub params: BTreeMap<String, String>,
    #[serde(default)]
    pub payload: Option<Vec<u8>>,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_schedule_reads_back_in_every_form_and_a_line_is_one() {
        let mut schedule = Schedule::of("0 3 * * *");
        (schedule.jitter, schedule.missed, schedule.timezone) = (Span::secs(5), Missed::RunAll, "Europe/Berlin".into());
        let json = serde_json::to_string(&schedule).unwrap();
        assert_eq!(serde_json::from_str::<Schedule>(&json).unwrap(), schedule);
        let bytes = crate::codec::to_msgpack(&schedule);
        assert_eq!(crate::codec::from_msgpack::<Schedule>(&bytes).unwrap(), schedule);
        assert_eq!(serde_json::from_str::<Schedule>("\"0 3 * * *\"").unwrap(), Schedule::of("0 3 * * *"));
    }
}
