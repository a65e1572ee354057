//! Reads the value of each field: its type, its shape, its range.

use std::collections::BTreeMap;
use std::ops::Range;
use std::str::FromStr;

use super::command::parse_line;
use super::error::{nearest, parse, printable};
use super::node::{Entry, Node, Value};
use super::read::{Fields, Reader};
use super::{fields, types::*};
use crate::ids::Name;
use crate::time::Span;
use crate::units::{Bytes, Millicores};

/// Probes ask a new copy more often than this; see the agent.
const INTERVAL: Span = Span::secs(2);

impl Reader<'_> {
    pub fn name(&mut self, key: &str, node: &Node) -> Option<Name> {
        let text = self.text(key, node)?;
        self.parsed(key, node, &text)
    }

    /// Reads a text as a quantity or a name.
    fn parsed<T: FromStr<Err: std::fmt::Display>>(&mut self, key: &str, node: &Node, text: &str) -> Option<T> {
        match parse(text) {
            Ok(value) => Some(value),
            Err(error) => {
                let hint = habit(text).or_else(|| a_name(text).filter(|_| error.contains(" name")));
                self.error(&node.span, Some(key), format!("`{}`: {error}", self.label(key))).hint = hint;
                None
            }
        }
    }

    pub fn text(&mut self, key: &str, node: &Node) -> Option<String> {
        let label = format!("`{}`", self.label(key));
        self.text_of(key, &label, node)
    }

    fn text_of(&mut self, key: &str, label: &str, node: &Node) -> Option<String> {
        match &node.value {
            Value::Text(text) if text.contains('\0') => {
                self.error(&node.span, Some(key), format!("{label} holds a NUL"));
                None
            }
            Value::Text(text) => Some(text.clone()),
            other => {
                let hint = match other {
                    Value::Integer(n) => Some(format!("write \"{n}\"")),
                    Value::Float(_, text) => Some(format!("write \"{}\"", printable(text))),
                    Value::Other("a date") => Some("put it in quotes".into()),
                    _ => None,
                };
                self.error(&node.span, Some(key), format!("{label} must be text, not {}", other.kind())).hint = hint;
                None
            }
        }
    }

    pub fn integer(&mut self, key: &str, node: &Node, least: i64, most: i64) -> Option<i64> {
        let label = self.label(key);
        match &node.value {
            Value::Integer(n) if (least..=most).contains(n) => Some(*n),
            Value::Integer(n) => {
                self.error(&node.span, Some(key), format!("`{label}` is {n}; it must be from {least} to {most}"));
                None
            }
            other => {
                let message = format!("`{label}` must be an integer from {least} to {most}, not {}", other.kind());
                let quoted = matches!(other, Value::Text(text) if text.parse::<i64>().is_ok());
                self.error(&node.span, Some(key), message).hint = quoted.then(|| "write the number without quotes".into());
                None
            }
        }
    }

    pub fn span(&mut self, key: &str, node: &Node) -> Option<Span> {
        match &node.value {
            Value::Text(text) => self.parsed(key, node, text),
            other => {
                let message = format!("`{}` must be a duration such as \"30s\", not {}", self.label(key), other.kind());
                let error = self.error(&node.span, Some(key), message);
                if let Value::Integer(n) = other {
                    error.hint = Some(format!("did you mean \"{n}s\"?"));
                }
                None
            }
        }
    }

    fn size(&mut self, key: &str, node: &Node) -> Option<Bytes> {
        match &node.value {
            Value::Integer(n) if *n >= 0 => Some(Bytes(*n as u64)),
            Value::Text(text) => self.parsed(key, node, text),
            other => {
                let message = match other {
                    Value::Integer(n) => format!("`{}` is {n}; a size cannot be negative", self.label(key)),
                    other => format!("`{}` must be a size such as \"256M\", not {}", self.label(key), other.kind()),
                };
                self.error(&node.span, Some(key), message);
                None
            }
        }
    }

    pub fn memory(&mut self, node: &Node) -> Option<(Bytes, Bytes)> {
        if let Value::Text(text) = &node.value
            && let Some((low, high)) = text.split_once("..")
        {
            if low.trim().is_empty() || high.trim().is_empty() {
                self.error(&node.span, Some("memory"), "`memory`: a range has two sizes").hint =
                    Some("write \"128M..256M\", or one size for both".into());
                return None;
            }
            return match (parse(low), parse(high)) {
                (Ok(low), Ok(high)) => Some((low, high)),
                (Err(error), _) | (_, Err(error)) => {
                    self.error(&node.span, Some("memory"), format!("`memory`: {error}")).hint =
                        Some("a range is written \"128M..256M\"".into());
                    None
                }
            };
        }
        let read = self.size("memory", node).map(|size| (size, size));
        if let (None, Value::Text(text)) = (&read, &node.value)
            && text.trim_start_matches('-').contains('-')
            && let Some(error) = self.errors.last_mut()
        {
            error.hint = Some("a range is written \"128M..256M\"".into());
        }
        read
    }

    pub fn cpu(&mut self, node: &Node) -> Option<Millicores> {
        let cores = match &node.value {
            Value::Float(cores, _) => Millicores::from_cores(*cores).map_err(|e| e.to_string()),
            Value::Integer(cores) => Millicores::from_cores(*cores as f64).map_err(|e| e.to_string()),
            Value::Text(text) => return self.parsed("cpu", node, text),
            other => {
                self.error(&node.span, Some("cpu"), format!("`cpu` must be a number of cores such as 0.5, not {}", other.kind()));
                return None;
            }
        };
        match cores {
            Ok(cpu) => Some(cpu),
            Err(error) => {
                self.error(&node.span, Some("cpu"), format!("`cpu`: {error}"));
                None
            }
        }
    }

    pub fn list(&mut self, key: &str, node: &Node) -> Vec<String> {
        let label = self.label(key);
        let Value::List(items) = &node.value else {
            let message = format!("`{label}` must be a list of strings, not {}", node.value.kind());
            let hint = example(&label);
            self.error(&node.span, Some(key), message).hint = hint;
            return Vec::new();
        };
        let label = format!("each item of `{label}`");
        self.within(key, |r| items.iter().enumerate().filter_map(|(n, item)| r.text_of(&n.to_string(), &label, item)).collect())
    }

    /// A command line, or its words.
    fn words(&mut self, key: &str, node: &Node) -> Option<Run> {
        let label = self.label(key);
        match &node.value {
            Value::List(_) => {
                let argv = self.list(key, node);
                if matches!(&node.value, Value::List(items) if items.is_empty()) {
                    self.error(&node.span, Some(key), format!("`{label}` is an empty list"));
                    return None;
                }
                Some(Run::Argv(argv))
            }
            Value::Text(_) => {
                let line = self.text(key, node)?;
                match parse_line(&line) {
                    Ok(run) => Some(run),
                    Err(why) => {
                        self.error(&node.span, Some(key), format!("`{label}`: {why}"));
                        None
                    }
                }
            }
            other => {
                let message = format!("`{label}` must be a command line or a list of strings, not {}", other.kind());
                let hint = example(&label);
                self.error(&node.span, Some(key), message).hint = hint;
                None
            }
        }
    }

    /// A table of text; numbers and booleans are taken as they would be written.
    pub fn texts(&mut self, key: &str, node: &Node) -> BTreeMap<String, String> {
        let Some(entries) = self.table(key, node) else { return BTreeMap::new() };
        let mut found = BTreeMap::new();
        self.within(key, |r| {
            for entry in entries {
                let text = match &entry.node.value {
                    Value::Integer(n) => Some(n.to_string()),
                    Value::Float(_, text) => Some(text.clone()),
                    Value::Bool(b) => Some(b.to_string()),
                    _ => r.text(&entry.key, &entry.node),
                };
                if let Some(text) = text {
                    found.insert(entry.key.clone(), text);
                }
            }
        });
        found
    }

    pub fn run(&mut self, node: &Node) -> Option<Run> {
        self.words("run", node)
    }

    /// The path itself: whether it exists is the node's business. `.` goes; `..` stays, it may follow a link.
    pub fn dir(&mut self, node: Option<&Node>) -> String {
        let base = &self.context.base_dir;
        let given = node.and_then(|n| self.text("dir", n)).filter(|d| !d.is_empty());
        if let (Some(node), Some(_)) = (node, given.as_ref().filter(|dir| dir.starts_with('~'))) {
            self.error(&node.span, Some("dir"), "`dir`: `~` is not expanded").hint = Some("write the whole path".into());
        }
        let dir = given.map_or(base.clone(), |dir| base.join(dir));
        dir.components().collect::<std::path::PathBuf>().display().to_string()
    }

    pub fn ports(&mut self, f: &Fields<'_>) -> Vec<Port> {
        match (f.get("port"), f.get("ports")) {
            (Some(_), Some(node)) => {
                self.error(&node.span, Some("ports"), "`port` and `ports` say the same thing; use one of them");
                Vec::new()
            }
            (Some(node), None) => {
                let name = Name::new("http").ok();
                self.port("port", node).and_then(|fixed| Some(Port { name: name?, fixed })).into_iter().collect()
            }
            (None, Some(node)) => {
                let Some(entries) = self.table("ports", node) else { return Vec::new() };
                self.within("ports", |r| {
                    entries
                        .iter()
                        .filter_map(|entry| match parse::<Name>(&entry.key) {
                            Ok(name) => r.port(&entry.key, &entry.node).map(|fixed| Port { name, fixed }),
                            Err(error) => {
                                r.error(&entry.key_span, Some(&entry.key), format!("a port's name: {error}")).hint = a_name(&entry.key);
                                None
                            }
                        })
                        .collect()
                })
            }
            (None, None) => Vec::new(),
        }
    }

    fn port(&mut self, key: &str, node: &Node) -> Option<Option<u16>> {
        match &node.value {
            Value::Text(text) if text == "auto" => Some(None),
            Value::Integer(n) if (1..=65535).contains(n) => Some(Some(*n as u16)),
            Value::Integer(n) => {
                let label = self.label(key);
                self.error(&node.span, Some(key), format!("`{label}` is {n}; a port is from 1 to 65535"));
                None
            }
            other => {
                let message = format!("`{}` must be \"auto\" or a port number, not {}", self.label(key), shown(other));
                let error = self.error(&node.span, Some(key), message);
                if let Value::Text(text) = other {
                    error.hint = if text.parse::<u16>().is_ok() {
                        Some("write the number without quotes".into())
                    } else {
                        Some("write \"auto\"".into())
                    };
                }
                None
            }
        }
    }

    pub fn probe(&mut self, key: &str, node: &Node) -> Option<Probe> {
        match &node.value {
            Value::Text(text) => match text.as_str() {
                "none" => None,
                "tcp" => Some(probe(Check::Tcp)),
                path if path.starts_with('/') => Some(probe(Check::Http { path: path.to_owned() })),
                other => {
                    let error = self.error(
                        &node.span,
                        Some(key),
                        format!("`{key}` must be a path that starts with /, \"tcp\", \"none\" or a table, not \"{}\"", printable(other)),
                    );
                    let address = other.split_once("://").and_then(|(_, rest)| rest.find('/').map(|at| &rest[at..]));
                    error.hint = match (nearest(other, &["tcp", "none"]), address) {
                        (Some(known), _) => Some(format!("did you mean \"{known}\"?")),
                        (None, Some(path)) => Some(format!("write the path alone: \"{}\"", printable(path))),
                        (None, None) if other == "grpc" => Some("write { grpc = \"\" }".into()),
                        (None, None) => Some(format!("did you mean \"/{}\"?", printable(other))),
                    };
                    None
                }
            },
            Value::Table(entries) => self.within(key, |r| r.probe_table(key, entries, &node.span)),
            other => {
                let none = matches!(other, Value::Bool(false)).then(|| "write \"none\"".into());
                self.error(&node.span, Some(key), format!("`{key}` must be a path, \"tcp\", \"none\" or a table, not {}", other.kind()))
                    .hint = none;
                None
            }
        }
    }

    fn probe_table(&mut self, key: &str, entries: &[Entry], span: &Option<Range<usize>>) -> Option<Probe> {
        let known = fields::below("health");
        let before = self.errors.len();
        self.unknown(entries, &known, key);
        let f = Fields { entries };
        let mut checks = Vec::new();
        if let Some(node) = f.get("http") {
            checks.extend(self.text("http", node).map(|path| Check::Http { path }));
        }
        match f.get("tcp") {
            Some(Node { value: Value::Bool(true), .. }) => checks.push(Check::Tcp),
            Some(node) => {
                let message = format!("`{}` can only be true", self.label("tcp"));
                self.error(&node.span, Some("tcp"), message);
            }
            None => {}
        }
        if let Some(node) = f.get("grpc") {
            checks.extend(self.text("grpc", node).map(|service| Check::Grpc { service }));
        }
        if let Some(node) = f.get("command") {
            checks.extend(self.words("command", node).map(|run| Check::Command { argv: run.argv() }));
        }
        let asked = ["http", "tcp", "grpc", "command"].iter().filter(|k| f.get(k).is_some()).count();
        if asked == 0 && self.errors.len() > before {
            return None; // the unknown key was meant to say it
        }
        if asked != 1 {
            let what = if asked == 0 { "says nothing to check" } else { "has more than one check" };
            self.error(span, None, format!("`{key}` {what}")).hint = Some("give one of http, tcp, grpc, command".into());
            return None;
        }
        let default = probe(checks.pop()?);
        Some(Probe {
            port: f.get("port").and_then(|n| self.name("port", n)),
            interval: f.get("interval").and_then(|n| self.span("interval", n)).unwrap_or(default.interval),
            timeout: f.get("timeout").and_then(|n| self.span("timeout", n)).unwrap_or(default.timeout),
            grace: f.get("grace").and_then(|n| self.span("grace", n)).unwrap_or(default.grace),
            healthy_after: f
                .get("healthy_after")
                .and_then(|n| self.integer("healthy_after", n, 1, 100))
                .map_or(default.healthy_after, |n| n as u32),
            unhealthy_after: f
                .get("unhealthy_after")
                .and_then(|n| self.integer("unhealthy_after", n, 1, 100))
                .map_or(default.unhealthy_after, |n| n as u32),
            check: default.check,
        })
    }

    /// Opens the table of a field with fields of its own.
    pub(super) fn nested<'n>(&mut self, key: &str, node: Option<&'n Node>) -> Option<Fields<'n>> {
        let entries = self.table(key, node?)?;
        self.within(key, |r| r.unknown(entries, &fields::below(key), key));
        Some(Fields { entries })
    }

    pub fn restart(&mut self, node: Option<&Node>) -> Restart {
        let f = self.nested("restart", node);
        let mut span = |key: &str, default: Span| {
            f.as_ref().and_then(|f| f.get(key)).and_then(|n| self.within("restart", |r| r.span(key, n))).unwrap_or(default)
        };
        Restart {
            delay: span("delay", Span::secs(1)),
            delay_max: span("delay_max", Span::secs(60)),
            reset_after: span("reset_after", Span::secs(60)),
        }
    }

    pub fn stop(&mut self, node: Option<&Node>) -> Stop {
        let f = self.nested("stop", node);
        let get = |key: &str| f.as_ref().and_then(|f| f.get(key));
        self.within("stop", |r| Stop {
            signal: get("signal")
                .and_then(|n| r.text("signal", n))
                .map_or_else(|| "TERM".into(), |s| s.strip_prefix("SIG").map(str::to_owned).unwrap_or(s)),
            grace: get("grace").and_then(|n| r.span("grace", n)).unwrap_or(Span::secs(10)),
        })
    }

    pub fn update(&mut self, node: Option<&Node>, min_ready: Span) -> Update {
        let mut update = Update { strategy: Strategy::Rolling, parallel: 1, deadline: Span::secs(120), min_ready };
        match node {
            Some(node) if matches!(node.value, Value::Text(_)) => {
                if let Some(strategy) = self.strategy("update", node) {
                    update.strategy = strategy;
                }
            }
            Some(node) if !matches!(node.value, Value::Table(_)) => {
                let kind = node.value.kind();
                self.error(&node.span, Some("update"), format!("`update` must be the name of a strategy or a table, not {kind}"));
            }
            node => {
                let f = self.nested("update", node);
                let get = |key: &str| f.as_ref().and_then(|f| f.get(key));
                self.within("update", |r| {
                    update.strategy = get("strategy").and_then(|n| r.strategy("strategy", n)).unwrap_or(update.strategy);
                    update.parallel = get("parallel").and_then(|n| r.integer("parallel", n, 1, 1000)).map_or(update.parallel, |n| n as u32);
                    update.deadline = get("deadline").and_then(|n| r.span("deadline", n)).unwrap_or(update.deadline);
                    update.min_ready = get("min_ready").and_then(|n| r.span("min_ready", n)).unwrap_or(update.min_ready);
                });
            }
        }
        update
    }

    fn strategy(&mut self, key: &str, node: &Node) -> Option<Strategy> {
        let known = ["rolling", "canary", "blue-green"];
        let label = self.label(key);
        match self.text(key, node)?.as_str() {
            "rolling" => Some(Strategy::Rolling),
            "canary" => Some(Strategy::Canary),
            "blue-green" => Some(Strategy::BlueGreen),
            other => {
                let hint =
                    nearest(other, &known).map_or_else(|| format!("known are {}", known.join(", ")), |k| format!("did you mean \"{k}\"?"));
                self.error(&node.span, Some(key), format!("`{label}`: there is no strategy \"{}\"", printable(other))).hint = Some(hint);
                None
            }
        }
    }

    pub fn logs(&mut self, node: Option<&Node>) -> Logs {
        let f = self.nested("logs", node);
        let size = f.as_ref().and_then(|f| f.get("size")).and_then(|n| self.within("logs", |r| r.size("size", n)));
        Logs { size: size.unwrap_or(Bytes::mib(32)) }
    }
}

/// How a field is written, for one that was written wrongly.
pub(super) fn example(label: &str) -> Option<String> {
    fields::field(label).map(|f| format!("for example {}", f.example.lines().next().unwrap_or("").trim()))
}

/// The name nearest to a text that is none.
pub(super) fn a_name(text: &str) -> Option<String> {
    if printable(text) != text {
        return None;
    }
    let plain = |c: char| if c.is_ascii_lowercase() || c.is_ascii_digit() { c } else { '-' };
    let text: String = text.to_lowercase().chars().take(crate::ids::NAME_MAX).map(plain).collect();
    let text = text.trim_start_matches(|c: char| !c.is_ascii_lowercase()).trim_end_matches('-');
    Name::new(text).ok().map(|name| format!("did you mean \"{name}\"?"))
}

/// What a size or a share of a CPU of another tool would be here.
fn habit(text: &str) -> Option<String> {
    let number = |digits: &str| !digits.is_empty() && digits.len() < 10 && digits.bytes().all(|b| b.is_ascii_digit());
    if let Some(rest) = text.strip_suffix('i')
        && let Some(digits) = rest.strip_suffix(['K', 'M', 'G', 'T'])
        && number(digits)
    {
        return Some(format!("write \"{rest}\"; it counts in 1024s"));
    }
    let millis = text.strip_suffix('m').filter(|digits| number(digits))?.parse::<u32>().ok()?;
    Some(format!("write {}, in cores", f64::from(millis) / 1000.0))
}

pub(super) fn probe(check: Check) -> Probe {
    Probe { check, port: None, interval: INTERVAL, timeout: Span::secs(1), grace: Span::secs(10), healthy_after: 1, unhealthy_after: 3 }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Text(text) => format!("\"{}\"", printable(text)),
        other => other.kind().to_owned(),
    }
}
