//! Walks the tree of a project file: finds the workloads, lays overlays over them, reads each field.
//!
//! All errors are collected; a field that cannot be read gets its default, so that the rest is still looked at.

use std::collections::BTreeMap;
use std::ops::Range;

use super::check::{check_workload, warnings};
use super::error::SpecError;
use super::node::{Entry, Node, Value};
use super::{Context, Parsed, fields, types::*};
use crate::ids::Name;
use crate::time::Span;
use crate::units::{Bytes, Millicores};

const DEFAULT_ENVIRONMENT: &str = "dev";
const KINDS: [(&str, Kind); 3] = [("service", Kind::Service), ("job", Kind::Job), ("daemon", Kind::Daemon)];
/// Most workloads of one file.
const WORKLOADS_MAX: usize = 200;
/// Probes ask a new copy more often than this; see the agent.
const INTERVAL: Span = Span::secs(2);
/// How long a copy without a readiness check must stay up before it counts.
const MIN_READY_UNCHECKED: Span = Span::secs(1);
/// Characters that mean something to a shell and nothing to us.
const SHELL_SYNTAX: &[char] = &['$', '|', ';', '&', '<', '>', '*', '?', '`', '(', ')', '{', '}', '[', ']', '~', '#', '!', '\n'];

/// Reads a whole file.
pub fn project(root: &Node, context: &Context) -> Result<Parsed, Vec<SpecError>> {
    let mut reader = Reader { context, errors: Vec::new(), path: Vec::new() };
    let parsed = reader.project(root);
    match parsed {
        Some(parsed) if reader.errors.is_empty() => Ok(parsed),
        _ => Err(reader.errors),
    }
}

struct Reader<'a> {
    context: &'a Context,
    errors: Vec<SpecError>,
    path: Vec<String>,
}

/// A table being read: which keys were asked for is which are known.
struct Fields<'n> {
    entries: &'n [Entry],
}

impl<'n> Fields<'n> {
    fn get(&self, key: &str) -> Option<&'n Node> {
        self.entries.iter().find(|e| e.key == key).map(|e| &e.node)
    }
}

impl Reader<'_> {
    fn error(&mut self, span: &Option<Range<usize>>, key: Option<&str>, message: impl Into<String>) -> &mut SpecError {
        let mut error = SpecError::new(span.clone(), message);
        error.path = self.path.iter().cloned().chain(key.map(str::to_owned)).collect();
        let at = self.errors.len();
        self.errors.push(error);
        &mut self.errors[at]
    }

    /// Runs `read` with a key on the path.
    fn within<T>(&mut self, key: &str, read: impl FnOnce(&mut Self) -> T) -> T {
        self.path.push(key.to_owned());
        let value = read(self);
        self.path.pop();
        value
    }

    fn table<'n>(&mut self, key: &str, node: &'n Node) -> Option<&'n [Entry]> {
        match &node.value {
            Value::Table(entries) => Some(entries),
            other => {
                self.error(&node.span, Some(key), format!("`{key}` must be a table, not {}", other.kind()));
                None
            }
        }
    }

    fn project(&mut self, root: &Node) -> Option<Parsed> {
        let Value::Table(entries) = &root.value else {
            self.error(&root.span, None, format!("a project file is a table, not {}", root.value.kind()));
            return None;
        };
        let top = Fields { entries };
        let sectioned = KINDS.iter().any(|(kind, _)| top.get(kind).is_some());
        let environment = match &self.context.environment {
            Some(name) => name.clone(),
            None => Name::new(DEFAULT_ENVIRONMENT).ok()?,
        };
        let project = match top.get("project") {
            Some(node) => self.name("project", node),
            None => self.context.default_project.clone().or_else(|| {
                self.error(&Some(0..0), Some("project"), "the project has no name, and its directory's name cannot be one").hint =
                    Some("add `project = \"NAME\"`".into());
                None
            }),
        };
        let overlays = self.overlays(&top);
        let environments = overlays.iter().map(|(name, _)| name.clone()).collect();
        let overlay = overlays.into_iter().find(|(name, _)| *name == environment).map(|(_, entries)| entries);

        let mut workloads = BTreeMap::new();
        let mut notes = Vec::new();
        let found = if sectioned { self.sections(entries, overlay) } else { self.flat(entries, overlay, root) };
        for (kind, name, entries, span, path) in found {
            let outer = std::mem::replace(&mut self.path, path);
            let spec = self.workload(kind, &entries, &span);
            self.path = outer;
            if let Some(spec) = spec {
                notes.extend(warnings(&name, &spec));
                workloads.insert(name, spec);
            }
        }
        if workloads.is_empty() && self.errors.is_empty() {
            self.error(&Some(0..0), None, "the file holds no workload").hint = Some("add a section such as [service.NAME]".into());
        }
        Some(Parsed { spec: ProjectSpec { project: project?, environment, workloads }, warnings: notes, environments })
    }

    /// The tables below `env`, by environment.
    fn overlays<'n>(&mut self, top: &Fields<'n>) -> Vec<(Name, &'n [Entry])> {
        let Some(Node { value: Value::Table(entries), .. }) = top.get("env") else { return Vec::new() };
        let mut found = Vec::new();
        for entry in entries {
            let Value::Table(below) = &entry.node.value else { continue };
            match Name::new(entry.key.clone()) {
                Ok(name) => found.push((name, below.as_slice())),
                Err(error) => {
                    self.within("env", |r| {
                        r.error(&entry.key_span, Some(&entry.key), format!("not a name of an environment: {error}")).path.len()
                    });
                }
            }
        }
        found
    }

    /// One workload whose fields are at the top of the file.
    fn flat(&mut self, entries: &[Entry], overlay: Option<&[Entry]>, root: &Node) -> Vec<Found> {
        let Some(name) = entries.iter().find(|e| e.key == "name") else {
            let top = Some(0..0);
            if entries.is_empty() {
                self.error(&top, None, "the file is empty").hint = Some("`optimus init` writes one to start from".into());
            } else {
                // A key that nobody knows is most likely a misspelt section: that says more than a missing name.
                let before = self.errors.len();
                let known: Vec<&str> = ["service", "job", "daemon"].into_iter().chain(fields::below("")).collect();
                self.unknown(entries, &known, "");
                if self.errors.len() == before {
                    self.error(&top, Some("name"), "the workload has no name").hint =
                        Some("add `name = \"NAME\"`, or use [service.NAME] sections".into());
                }
            }
            return Vec::new();
        };
        let name = self.name("name", &name.node);
        let overlay = overlay.unwrap_or_default();
        if let Some(entry) = overlay.iter().find(|e| KINDS.iter().any(|(k, _)| e.key == *k)) {
            self.error(&entry.key_span, Some(&entry.key), "the file holds one workload at its top; its overlay has no sections").hint =
                Some("write the fields directly below [env.NAME]".into());
        }
        let entries: Vec<Entry> = entries.iter().filter(|e| e.key != "project" && e.key != "name").map(without_overlays).collect();
        name.map(|name| (Kind::Service, name, merge(&entries, overlay), root.span.clone(), Vec::new())).into_iter().collect()
    }

    /// `[service.NAME]`, `[job.NAME]`, `[daemon.NAME]`.
    fn sections(&mut self, entries: &[Entry], overlay: Option<&[Entry]>) -> Vec<Found> {
        let known = ["service", "job", "daemon", "project", "env"];
        let (of_workloads, rest): (Vec<Entry>, Vec<Entry>) =
            entries.iter().cloned().partition(|e| !known.contains(&e.key.as_str()) && fields::below("").contains(&e.key.as_str()));
        self.unknown(&rest, &known, "");
        for entry in &of_workloads {
            self.error(&entry.key_span, Some(&entry.key), format!("`{}` stands outside of any workload", entry.key)).hint =
                Some("in a file with sections it belongs below one, such as [service.NAME]".into());
        }
        if let Some(entry) = entries.iter().find(|e| e.key == "env") {
            self.within("env", |r| {
                if let Some(below) = r.table("env", &entry.node) {
                    for entry in below.iter().filter(|e| !matches!(e.node.value, Value::Table(_))) {
                        r.error(&entry.key_span, Some(&entry.key), "variables belong to a workload").hint =
                            Some("write them below [service.NAME.env]".into());
                    }
                }
            });
        }
        if let Some(overlay) = overlay {
            self.within("env", |r| r.unknown(overlay, &known[..3], ""));
        }
        let mut found: Vec<Found> = Vec::new();
        for (word, kind) in KINDS {
            let Some(section) = entries.iter().find(|e| e.key == word) else { continue };
            let over = overlay.and_then(|o| o.iter().find(|e| e.key == word));
            let over: &[Entry] = over.and_then(|e| self.table(word, &e.node)).unwrap_or_default();
            let Some(workloads) = self.table(word, &section.node) else { continue };
            for entry in over.iter().filter(|o| !workloads.iter().any(|w| w.key == o.key)) {
                self.error(&entry.key_span, Some(&entry.key), format!("there is no [{word}.{}] to lay this over", entry.key));
            }
            for workload in workloads {
                let name = self.within(word, |r| match Name::new(workload.key.clone()) {
                    Ok(name) => Some(name),
                    Err(error) => {
                        r.error(&workload.key_span, Some(&workload.key), printable(&error.to_string()));
                        None
                    }
                });
                let Some(name) = name else { continue };
                let Some(entries) = self.within(word, |r| r.table(&workload.key, &workload.node)) else { continue };
                if found.iter().any(|(_, other, ..)| *other == name) {
                    self.error(&workload.key_span, Some(word), format!("`{name}` is the name of another workload of this file"));
                    continue;
                }
                if found.len() >= WORKLOADS_MAX {
                    self.error(&workload.key_span, None, format!("more than {WORKLOADS_MAX} workloads in one file"));
                    return found;
                }
                let over = over.iter().find(|o| o.key == workload.key).and_then(|o| self.table(&o.key, &o.node)).unwrap_or_default();
                let path = vec![word.to_owned(), workload.key.clone()];
                found.push((kind, name, merge(entries, over), workload.key_span.clone(), path));
            }
        }
        found
    }

    /// Refuses keys that are not known, each with the nearest that is.
    fn unknown(&mut self, entries: &[Entry], known: &[&str], inside: &str) {
        for entry in entries.iter().filter(|e| !known.contains(&e.key.as_str())) {
            let hint = match entry.key.as_str() {
                "name" => Some("the workload's name is that of its section".into()),
                "project" => Some("it belongs at the top of the file".into()),
                key => nearest(key, known).map(|k| format!("did you mean `{k}`?")),
            };
            let place = if inside.is_empty() { String::new() } else { format!(" in `{inside}`") };
            let error = self.error(&entry.key_span, Some(&entry.key), format!("unknown key `{}`{place}", printable(&entry.key)));
            error.hint = hint.or_else(|| (known.len() <= 8).then(|| format!("known are {}", known.join(", "))));
        }
    }

    fn workload(&mut self, kind: Kind, entries: &[Entry], span: &Option<Range<usize>>) -> Option<WorkloadSpec> {
        let mut known = fields::below("");
        known.retain(|k| *k != "project" && *k != "name");
        let before = self.errors.len();
        self.unknown(entries, &known, "");
        let f = Fields { entries };
        let driver = match f.get("image") {
            Some(node) => self.text("image", node).map(|image| Driver::Container { image }),
            None => Some(Driver::Process),
        };
        let run = match f.get("run") {
            Some(node) => self.run(node),
            None if f.get("image").is_some() => Some(Run::Argv(vec![])),
            None => {
                self.error(span, Some("run"), "what to run is not said").hint = Some("add `run = \"COMMAND\"`".into());
                None
            }
        };
        let ports = self.ports(&f);
        let readiness = match f.get("health") {
            Some(node) => self.probe("health", node),
            None if kind == Kind::Service && !ports.is_empty() => Some(probe(Check::Tcp)),
            None => None,
        };
        let liveness = f.get("liveness").and_then(|node| self.probe("liveness", node));
        let (memory_request, memory_limit) = f.get("memory").and_then(|n| self.memory(n)).unwrap_or((Bytes::mib(128), Bytes::mib(128)));
        // With nothing that says it is ready, a copy proves itself by staying up.
        let min_ready = if readiness.is_some() { Span(0) } else { MIN_READY_UNCHECKED };
        let update = self.update(f.get("update"), min_ready);
        let spec = WorkloadSpec {
            kind,
            driver: driver.unwrap_or(Driver::Process),
            run: run.unwrap_or(Run::Argv(vec!["?".into()])),
            dir: Some(self.dir(f.get("dir"))),
            env: f.get("env").map(|n| self.texts("env", n)).unwrap_or_default(),
            user: f.get("user").and_then(|n| self.text("user", n)),
            copies: f.get("copies").and_then(|n| self.integer("copies", n, 0, 10_000)).map(|n| n as u32),
            ports,
            resources: Resources {
                cpu: f.get("cpu").and_then(|n| self.cpu(n)).unwrap_or(Millicores(250)),
                memory_request,
                memory_limit,
                pids: f.get("pids").and_then(|n| self.integer("pids", n, 1, 4_194_304)).unwrap_or(512) as u32,
            },
            health: Health { readiness, liveness },
            restart: self.restart(f.get("restart")),
            stop: self.stop(f.get("stop")),
            update,
            logs: self.logs(f.get("logs")),
            secrets: f.get("secrets").map(|n| self.list("secrets", n)).unwrap_or_default(),
            labels: f.get("labels").map(|n| self.texts("labels", n)).unwrap_or_default(),
            schedule: f.get("schedule").and_then(|n| self.text("schedule", n)),
            timeout: f.get("timeout").and_then(|n| self.span("timeout", n)),
        };
        // Rules between fields; those of a single field that was refused above are not told twice.
        if self.errors.len() == before {
            for (path, message) in check_workload(&spec) {
                let place = place_of(entries, &path).unwrap_or_else(|| span.clone());
                let error = self.error(&place, None, message);
                error.path.extend(path.splitn(2, '.').map(str::to_owned));
            }
        }
        Some(spec)
    }

    // ---- values ----

    fn name(&mut self, key: &str, node: &Node) -> Option<Name> {
        let text = self.text(key, node)?;
        match Name::new(text) {
            Ok(name) => Some(name),
            Err(error) => {
                self.error(&node.span, Some(key), printable(&error.to_string()));
                None
            }
        }
    }

    fn text(&mut self, key: &str, node: &Node) -> Option<String> {
        match &node.value {
            Value::Text(text) if text.contains('\0') => {
                self.error(&node.span, Some(key), format!("`{key}` holds a NUL"));
                None
            }
            Value::Text(text) => Some(text.clone()),
            other => {
                self.error(&node.span, Some(key), format!("`{key}` must be text, not {}", other.kind()));
                None
            }
        }
    }

    fn integer(&mut self, key: &str, node: &Node, least: i64, most: i64) -> Option<i64> {
        match node.value {
            Value::Integer(n) if (least..=most).contains(&n) => Some(n),
            Value::Integer(n) => {
                self.error(&node.span, Some(key), format!("`{key}` is {n}; it must be from {least} to {most}"));
                None
            }
            ref other => {
                self.error(&node.span, Some(key), format!("`{key}` must be an integer from {least} to {most}, not {}", other.kind()));
                None
            }
        }
    }

    fn span(&mut self, key: &str, node: &Node) -> Option<Span> {
        match &node.value {
            Value::Text(text) => match text.parse() {
                Ok(span) => Some(span),
                Err(error) => {
                    self.error(&node.span, Some(key), format!("`{key}`: {error}"));
                    None
                }
            },
            other => {
                let error = self.error(&node.span, Some(key), format!("`{key}` must be a duration such as \"30s\", not {}", other.kind()));
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
            Value::Integer(n) => {
                self.error(&node.span, Some(key), format!("`{key}` is {n}; a size cannot be negative"));
                None
            }
            Value::Text(text) => match text.parse() {
                Ok(size) => Some(size),
                Err(error) => {
                    self.error(&node.span, Some(key), format!("`{key}`: {error}"));
                    None
                }
            },
            other => {
                self.error(&node.span, Some(key), format!("`{key}` must be a size such as \"256M\", not {}", other.kind()));
                None
            }
        }
    }

    fn memory(&mut self, node: &Node) -> Option<(Bytes, Bytes)> {
        if let Value::Text(text) = &node.value
            && let Some((low, high)) = text.split_once("..")
        {
            if low.trim().is_empty() || high.trim().is_empty() {
                self.error(&node.span, Some("memory"), "`memory`: a range has two sizes").hint =
                    Some("write \"128M..256M\", or one size for both".into());
                return None;
            }
            return match (low.parse(), high.parse()) {
                (Ok(low), Ok(high)) => Some((low, high)),
                (Err(error), _) | (_, Err(error)) => {
                    self.error(&node.span, Some("memory"), format!("`memory`: {error}")).hint =
                        Some("a range is written \"128M..256M\"".into());
                    None
                }
            };
        }
        self.size("memory", node).map(|size| (size, size))
    }

    fn cpu(&mut self, node: &Node) -> Option<Millicores> {
        let cores = match &node.value {
            Value::Float(cores) => Millicores::from_cores(*cores),
            Value::Integer(cores) => Millicores::from_cores(*cores as f64),
            Value::Text(text) => text.parse(),
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

    fn list(&mut self, key: &str, node: &Node) -> Vec<String> {
        let Value::List(items) = &node.value else {
            self.error(&node.span, Some(key), format!("`{key}` must be a list of strings, not {}", node.value.kind()));
            return Vec::new();
        };
        let mut texts = Vec::new();
        for item in items {
            match &item.value {
                Value::Text(_) => texts.extend(self.text(key, item)),
                other => {
                    self.error(&item.span, Some(key), format!("`{key}` must be a list of strings; this is {}", other.kind()));
                }
            }
        }
        texts
    }

    /// A table of text; numbers and booleans are taken as they would be written.
    fn texts(&mut self, key: &str, node: &Node) -> BTreeMap<String, String> {
        let Some(entries) = self.table(key, node) else { return BTreeMap::new() };
        let mut found = BTreeMap::new();
        self.within(key, |r| {
            for entry in entries {
                let text = match &entry.node.value {
                    Value::Integer(n) => Some(n.to_string()),
                    Value::Float(n) => Some(n.to_string()),
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

    fn run(&mut self, node: &Node) -> Option<Run> {
        match &node.value {
            Value::List(_) => {
                let argv = self.list("run", node);
                if argv.is_empty() {
                    self.error(&node.span, Some("run"), "`run` is an empty list");
                }
                Some(Run::Argv(argv))
            }
            Value::Text(line) if line.trim().is_empty() => {
                self.error(&node.span, Some("run"), "`run` is empty");
                None
            }
            Value::Text(_) => {
                let line = self.text("run", node)?;
                if line.contains(SHELL_SYNTAX) {
                    return Some(Run::Shell(line));
                }
                match shell_words::split(&line) {
                    // `A=1 program` is shell syntax too.
                    Ok(words) if words.first().is_some_and(|w| w.contains('=')) => Some(Run::Shell(line)),
                    Ok(words) => Some(Run::Argv(words)),
                    Err(_) => {
                        self.error(&node.span, Some("run"), "`run` has a quote that is not closed");
                        None
                    }
                }
            }
            other => {
                self.error(&node.span, Some("run"), format!("`run` must be a command line or a list of strings, not {}", other.kind()));
                None
            }
        }
    }

    /// The path itself: whether it exists is the node's business.
    fn dir(&mut self, node: Option<&Node>) -> String {
        let base = &self.context.base_dir;
        let given = node.and_then(|n| self.text("dir", n)).filter(|d| !d.is_empty());
        given.map_or(base.clone(), |dir| base.join(dir)).display().to_string()
    }

    fn ports(&mut self, f: &Fields<'_>) -> Vec<Port> {
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
                        .filter_map(|entry| match Name::new(entry.key.clone()) {
                            Ok(name) => r.port(&entry.key, &entry.node).map(|fixed| Port { name, fixed }),
                            Err(error) => {
                                r.error(&entry.key_span, Some(&entry.key), format!("a port's name: {error}"));
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
                self.error(&node.span, Some(key), format!("`{key}` is {n}; a port is from 1 to 65535"));
                None
            }
            other => {
                let error = self.error(&node.span, Some(key), format!("`{key}` must be \"auto\" or a port number, not {}", shown(other)));
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

    fn probe(&mut self, key: &str, node: &Node) -> Option<Probe> {
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
                    error.hint = nearest(other, &["tcp", "none"]).map(|k| format!("did you mean \"{k}\"?"));
                    None
                }
            },
            Value::Table(entries) => self.within(key, |r| r.probe_table(key, entries, &node.span)),
            other => {
                self.error(&node.span, Some(key), format!("`{key}` must be a path, \"tcp\", \"none\" or a table, not {}", other.kind()));
                None
            }
        }
    }

    fn probe_table(&mut self, key: &str, entries: &[Entry], span: &Option<Range<usize>>) -> Option<Probe> {
        let known = fields::below("health");
        self.unknown(entries, &known, key);
        let f = Fields { entries };
        let mut checks = Vec::new();
        if let Some(node) = f.get("http") {
            checks.extend(self.text("http", node).map(|path| Check::Http { path }));
        }
        match f.get("tcp") {
            Some(Node { value: Value::Bool(true), .. }) => checks.push(Check::Tcp),
            Some(node) => {
                self.error(&node.span, Some("tcp"), "`tcp` can only be true");
            }
            None => {}
        }
        if let Some(node) = f.get("grpc") {
            checks.extend(self.text("grpc", node).map(|service| Check::Grpc { service }));
        }
        if let Some(node) = f.get("command") {
            checks.push(Check::Command { argv: self.list("command", node) });
        }
        let asked = ["http", "tcp", "grpc", "command"].iter().filter(|k| f.get(k).is_some()).count();
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
    fn nested<'n>(&mut self, key: &str, node: Option<&'n Node>) -> Option<Fields<'n>> {
        let entries = self.table(key, node?)?;
        self.within(key, |r| r.unknown(entries, &fields::below(key), key));
        Some(Fields { entries })
    }

    fn restart(&mut self, node: Option<&Node>) -> Restart {
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

    fn stop(&mut self, node: Option<&Node>) -> Stop {
        let f = self.nested("stop", node);
        let get = |key: &str| f.as_ref().and_then(|f| f.get(key));
        self.within("stop", |r| Stop {
            signal: get("signal")
                .and_then(|n| r.text("signal", n))
                .map_or_else(|| "TERM".into(), |s| s.strip_prefix("SIG").map(str::to_owned).unwrap_or(s)),
            grace: get("grace").and_then(|n| r.span("grace", n)).unwrap_or(Span::secs(10)),
        })
    }

    fn update(&mut self, node: Option<&Node>, min_ready: Span) -> Update {
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
        match self.text(key, node)?.as_str() {
            "rolling" => Some(Strategy::Rolling),
            "canary" => Some(Strategy::Canary),
            "blue-green" => Some(Strategy::BlueGreen),
            other => {
                let hint =
                    nearest(other, &known).map_or_else(|| format!("known are {}", known.join(", ")), |k| format!("did you mean \"{k}\"?"));
                self.error(&node.span, Some(key), format!("`{key}`: there is no strategy \"{}\"", printable(other))).hint = Some(hint);
                None
            }
        }
    }

    fn logs(&mut self, node: Option<&Node>) -> Logs {
        let f = self.nested("logs", node);
        let size = f.as_ref().and_then(|f| f.get("size")).and_then(|n| self.within("logs", |r| r.size("size", n)));
        Logs { size: size.unwrap_or(Bytes::mib(32)) }
    }
}

/// Kind, name, fields with the overlay laid over, place of its name, path.
type Found = (Kind, Name, Vec<Entry>, Option<Range<usize>>, Vec<String>);

/// Tables whose entries an overlay adds to; all other fields it replaces.
const MERGED: [&str; 2] = ["env", "labels"];

fn merge(base: &[Entry], over: &[Entry]) -> Vec<Entry> {
    let mut out = base.to_vec();
    for entry in over {
        let at = out.iter().position(|e| e.key == entry.key);
        match at {
            Some(at) if MERGED.contains(&entry.key.as_str()) => {
                let merged = match (&out[at].node.value, &entry.node.value) {
                    (Value::Table(below), Value::Table(above)) => {
                        let mut all: Vec<Entry> = below.iter().filter(|b| !above.iter().any(|a| a.key == b.key)).cloned().collect();
                        all.extend(above.iter().cloned());
                        Value::Table(all)
                    }
                    _ => entry.node.value.clone(),
                };
                out[at].node = Node { value: merged, span: entry.node.span.clone() };
            }
            // `port` over `ports`, and the other way round, replaces as well.
            Some(at) => out[at] = entry.clone(),
            None => {
                if entry.key == "port" || entry.key == "ports" {
                    out.retain(|e| e.key != "port" && e.key != "ports");
                }
                out.push(entry.clone());
            }
        }
    }
    out
}

/// In a flat file `env` holds variables and overlays; a variable is never a table.
fn without_overlays(entry: &Entry) -> Entry {
    let mut entry = entry.clone();
    if entry.key == "env"
        && let Value::Table(below) = &mut entry.node.value
    {
        below.retain(|e| !matches!(e.node.value, Value::Table(_)));
    }
    entry
}

/// Where the value of a rule's path stands: that of the inner field if it was written, else of the outer.
fn place_of(entries: &[Entry], path: &str) -> Option<Option<Range<usize>>> {
    let (key, inner) = path.split_once('.').map_or((path, None), |(key, inner)| (key, Some(inner)));
    let outer = entries.iter().find(|e| e.key == key)?;
    let below = match (&outer.node.value, inner) {
        (Value::Table(below), Some(inner)) => below.iter().find(|e| e.key == inner),
        _ => None,
    };
    Some(below.map_or(&outer.node, |e| &e.node).span.clone())
}

fn probe(check: Check) -> Probe {
    Probe { check, port: None, interval: INTERVAL, timeout: Span::secs(1), grace: Span::secs(10), healthy_after: 1, unhealthy_after: 3 }
}

/// The known word nearest to one that is not, if it is near enough to be meant.
fn nearest<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    if word.len() > 64 {
        return None;
    }
    let (best, score) = known.iter().map(|k| (*k, strsim::jaro_winkler(word, k))).max_by(|a, b| a.1.total_cmp(&b.1))?;
    (score >= 0.78).then_some(best)
}

/// Most characters of a file's text inside a message.
const SHOWN: usize = 130;

/// Text from a file inside a message: no control characters, not long.
fn printable(text: &str) -> String {
    let clean: String = text.chars().take(SHOWN).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if text.chars().count() > SHOWN { format!("{clean}...") } else { clean }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Text(text) => format!("\"{}\"", printable(text)),
        other => other.kind().to_owned(),
    }
}
