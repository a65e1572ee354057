//! Reads and checks the fields that only jobs have.

use std::str::FromStr;

use super::check::{Rules, is_variable};
use super::cron::{CronError, Timetable};
use super::error::{nearest, printable};
use super::job::*;
use super::node::{Node, Value};
use super::read::Reader;
use super::types::Kind;
use crate::time::{SPAN_MAX, Span};

/// Latest start of a run by jitter.
const JITTER_MAX: Span = Span::secs(3600);

/// A value that is one of a few words.
macro_rules! words {
    ($type:ident { $($word:literal = $variant:ident),+ }) => {
        impl $type {
            const WORDS: &[&str] = &[$($word),+];
        }
        impl FromStr for $type {
            type Err = ();
            fn from_str(text: &str) -> Result<Self, ()> {
                match text { $($word => Ok($type::$variant),)+ _ => Err(()) }
            }
        }
    };
}
words! { Overlap { "forbid" = Forbid, "replace" = Replace, "allow" = Allow } }
words! { Missed { "skip" = Skip, "run_once" = RunOnce, "run_all" = RunAll } }
words! { RunOn { "deploy" = Deploy, "request" = Request } }
words! { PayloadRule { "optional" = Optional, "required" = Required, "forbidden" = Forbidden } }

impl Reader<'_> {
    pub fn schedule(&mut self, node: &Node) -> Option<Schedule> {
        if matches!(node.value, Value::Text(_)) {
            return self.text("schedule", node).map(Schedule::of);
        }
        let f = self.nested("schedule", Some(node))?;
        self.within("schedule", |r| {
            let Some(cron) = f.get("cron") else {
                r.error(&node.span, None, "`schedule` has no `cron`").hint = Some("for example schedule = { cron = \"0 3 * * *\" }".into());
                return None;
            };
            let mut schedule = Schedule::of(r.text("cron", cron)?);
            if let Some(zone) = f.get("timezone").and_then(|n| r.text("timezone", n)) {
                schedule.timezone = zone;
            }
            schedule.overlap = f.get("overlap").and_then(|n| r.word("overlap", n, Overlap::WORDS)).unwrap_or_default();
            schedule.missed = f.get("missed").and_then(|n| r.word("missed", n, Missed::WORDS)).unwrap_or_default();
            schedule.jitter = f.get("jitter").and_then(|n| r.span("jitter", n)).unwrap_or_default();
            Some(schedule)
        })
    }

    /// The rules of a job's runs; none for what is no job and says nothing of runs.
    pub fn runs(&mut self, kind: Kind, node: Option<&Node>, schedule: Option<&Schedule>) -> Option<Runs> {
        let mut runs = Runs::of(schedule);
        let Some(f) = self.nested("runs", node) else { return (kind == Kind::Job).then_some(runs) };
        self.within("runs", |r| {
            let mut number = |key: &str, least: i64, most: u32, default: u32| {
                f.get(key).and_then(|n| r.integer(key, n, least, i64::from(most))).map_or(default, |n| n as u32)
            };
            runs.active = number("active", 1, ACTIVE_MAX, runs.active);
            runs.waiting = number("waiting", 0, WAITING_MAX, runs.waiting);
            runs.retries = number("retries", 0, RETRIES_MAX, runs.retries);
            runs.keep = number("keep", 1, KEEP_MAX, runs.keep);
            runs.params = f.get("params").map(|n| r.list("params", n)).unwrap_or_default();
            runs.payload = f.get("payload").and_then(|n| r.word("payload", n, PayloadRule::WORDS)).unwrap_or_default();
            runs.start_within = f.get("start_within").and_then(|n| r.span("start_within", n)).unwrap_or(runs.start_within);
            if runs.is_parameterised() {
                runs.on = RunOn::Request;
            }
            runs.on = f.get("on").and_then(|n| r.word("on", n, RunOn::WORDS)).unwrap_or(runs.on);
        });
        Some(runs)
    }

    fn word<T: FromStr>(&mut self, key: &str, node: &Node, known: &[&str]) -> Option<T> {
        let label = self.label(key);
        let text = self.text(key, node)?;
        text.parse().ok().or_else(|| {
            let near = nearest(&text.replace('-', "_"), known).map(|k| format!("did you mean \"{k}\"?"));
            self.error(&node.span, Some(key), format!("`{label}` cannot be \"{}\"", printable(&text))).hint =
                near.or_else(|| Some(format!("known are {}", known.join(", "))));
            None
        })
    }
}

impl Rules {
    pub(super) fn job(&mut self, kind: Kind, schedule: Option<&Schedule>, runs: Option<&Runs>) {
        if let Some(schedule) = schedule {
            match Timetable::of(schedule) {
                Ok(_) => {}
                Err(CronError::Line(error)) => self.want(false, "schedule.cron", || format!("`schedule`: {error}")),
                Err(CronError::Zone(error)) => self.want(false, "schedule.timezone", || format!("`schedule.timezone`: {error}")),
            }
            self.want(schedule.jitter <= JITTER_MAX, "schedule.jitter", || "`schedule.jitter` must be at most 1h".into());
        }
        let Some(runs) = runs else { return };
        let Runs { active, waiting, retries, keep, on, params, payload: _, start_within, input } = runs;
        self.want(kind == Kind::Job, "runs", || "`runs` is a field of a job: [job.NAME]".into());
        self.want((1..=ACTIVE_MAX).contains(active), "runs.active", || format!("`runs.active` must be from 1 to {ACTIVE_MAX}"));
        self.want(*waiting <= WAITING_MAX, "runs.waiting", || format!("`runs.waiting` must be at most {WAITING_MAX}"));
        self.want(*retries <= RETRIES_MAX, "runs.retries", || format!("`runs.retries` must be at most {RETRIES_MAX}"));
        self.want((1..=KEEP_MAX).contains(keep), "runs.keep", || format!("`runs.keep` must be from 1 to {KEEP_MAX}"));
        self.want((Span::secs(1)..=SPAN_MAX).contains(start_within), "runs.start_within", || {
            "`runs.start_within` must be from 1s to a year".into()
        });
        self.want(params.len() <= PARAMS_MAX, "runs.params", || format!("at most {PARAMS_MAX} parameters"));
        for name in params.iter().take(PARAMS_MAX) {
            self.want(is_variable(name) && name.len() <= 64, "runs.params", || {
                format!("`{}` cannot be a parameter: letters, digits and _ only, not a digit first, at most 64", printable(name))
            });
        }
        let by_itself = schedule.is_some() || *on == RunOn::Deploy;
        self.want(!(by_itself && runs.is_parameterised()), "runs", || {
            "a run that needs parameters or a payload can only be started by a request: no `schedule`, and on = \"request\"".into()
        });
        self.want(input.is_none(), "runs.input", || "`runs.input` is set by Optimus".into());
    }
}
