//! What a key that is not known was meant to be.

use super::error::nearest;
use super::fields;
use super::node::{Entry, Value};

/// Words of other tools, and what is meant here.
const ELSEWHERE: &[(&str, &str)] = &[
    ("command", "run"),
    ("cmd", "run"),
    ("exec", "run"),
    ("entrypoint", "run"),
    ("start", "run"),
    ("script", "run"),
    ("replicas", "copies"),
    ("instances", "copies"),
    ("count", "copies"),
    ("scale", "copies"),
    ("numprocs", "copies"),
    ("environment", "env"),
    ("variables", "env"),
    ("workdir", "dir"),
    ("working_dir", "dir"),
    ("directory", "dir"),
    ("cwd", "dir"),
    ("root", "dir"),
    ("mem", "memory"),
    ("mem_limit", "memory"),
    ("ram", "memory"),
    ("cpus", "cpu"),
    ("cores", "cpu"),
    ("healthcheck", "health"),
    ("readiness", "health"),
    ("readiness_probe", "health"),
    ("liveness_probe", "liveness"),
    ("deploy", "update"),
    ("strategy", "update"),
    ("cron", "schedule"),
    ("tags", "labels"),
    ("stop_grace_period", "stop"),
    ("stop_signal", "stop"),
    ("processes", "pids"),
    ("period", "interval"),
    ("retries", "unhealthy_after"),
    ("start_period", "grace"),
    ("path", "http"),
    ("worker", "service"),
    ("app", "service"),
    ("deployment", "service"),
    ("process", "service"),
    ("cronjob", "job"),
    ("task", "job"),
];

/// The known key that an unknown one stands for.
pub(super) fn meant<'k>(entry: &Entry, known: &[&'k str]) -> Option<&'k str> {
    let key = entry.key.as_str();
    let here = |field: &str| known.iter().copied().find(|k| *k == field);
    let elsewhere: Vec<&str> = ELSEWHERE.iter().map(|(word, _)| *word).collect();
    let alias = |key: &str| ELSEWHERE.iter().find(|(word, _)| *word == key).and_then(|(_, field)| here(field));
    // `[cron.nightly]` is a section, `cron = "..."` a field.
    let section = || {
        let is_cron = matches!(entry.node.value, Value::Table(_)) && key == "cron";
        is_cron.then(|| here("job")).flatten()
    };
    let begins = || known.iter().copied().find(|k| k.len() > 2 && key.strip_prefix(k).is_some_and(|rest| rest.starts_with(['_', '-'])));
    section().or_else(|| alias(key)).or_else(|| nearest(key, known)).or_else(|| alias(nearest(key, &elsewhere)?)).or_else(begins)
}

/// Where a key that is not known here belongs.
pub(super) fn elsewhere(key: &str, inside: &str) -> Option<String> {
    match key {
        "name" if inside.is_empty() => return Some("a section is named by its header; only a flat file has `name`, at its top".into()),
        "project" => return Some("`project` stands at the top of the file".into()),
        _ => {}
    }
    let plain = key.replace('-', "_");
    if !inside.is_empty() || plain.is_empty() {
        return None;
    }
    let owner = fields::FIELDS.iter().find_map(|f| f.name.split_once('.').filter(|(_, last)| *last == plain))?;
    Some(format!("`{plain}` is a field of `{}`", owner.0))
}
