//! Walks the tree of a project file: finds the workloads, lays overlays over them, reads each field.
//!
//! All errors are collected; a field that cannot be read gets its default, so that the rest is still looked at.

use std::collections::BTreeMap;
use std::ops::Range;

use super::check::{check_workload, circle, warnings};
use super::error::{SpecError, nearest, parse, printable};
use super::node::{Entry, Node, Value};
use super::suggest::{elsewhere, meant};
use super::values::{a_name, example, probe};
use super::{Container, Context, Parsed, fields, types::*};
use crate::ids::Name;
use crate::time::Span;
use crate::units::{Bytes, Millicores};

const DEFAULT_ENVIRONMENT: &str = "dev";
const KINDS: [(&str, Kind); 3] = [("service", Kind::Service), ("job", Kind::Job), ("daemon", Kind::Daemon)];
/// How long a copy without a readiness check must stay up before it counts.
const MIN_READY_UNCHECKED: Span = Span::secs(1);
/// Most workloads of one file.
const WORKLOADS_MAX: usize = 200;
/// Most overlays of one file; each costs reading it once more.
const ENVIRONMENTS_MAX: usize = 32;
/// Most errors collected; a little more than are told.
const ERRORS_KEPT: usize = 1000;

/// Reads a whole file.
pub fn project(root: &Node, context: &Context) -> Result<Parsed, Vec<SpecError>> {
    let mut reader = Reader { context, errors: Vec::new(), path: Vec::new(), base: 0 };
    let parsed = reader.project(root);
    match parsed {
        Some(parsed) if reader.errors.is_empty() => Ok(parsed),
        _ => {
            if reader.errors.is_empty() {
                reader.errors.push(SpecError::new(root.span.clone(), "the file holds no workload"));
            }
            Err(reader.errors)
        }
    }
}

pub(super) struct Reader<'a> {
    pub context: &'a Context,
    pub errors: Vec<SpecError>,
    path: Vec<String>,
    /// How much of `path` leads to the workload being read.
    base: usize,
}

/// A table being read: which keys were asked for is which are known.
pub(super) struct Fields<'n> {
    pub entries: &'n [Entry],
}

impl<'n> Fields<'n> {
    pub fn get(&self, key: &str) -> Option<&'n Node> {
        self.entries.iter().find(|e| e.key == key).map(|e| &e.node)
    }
}

impl Reader<'_> {
    pub fn error(&mut self, span: &Option<Range<usize>>, key: Option<&str>, message: impl Into<String>) -> &mut SpecError {
        let mut error = SpecError::new(span.clone(), message);
        error.path = self.path.iter().cloned().chain(key.map(str::to_owned)).collect();
        let at = self.errors.len();
        if at >= ERRORS_KEPT {
            self.errors.truncate(at - 1); // keeps the bound; this many are never told
        }
        self.errors.push(error);
        let last = self.errors.len() - 1;
        &mut self.errors[last]
    }

    /// A key as people name it: `health.interval`.
    pub fn label(&self, key: &str) -> String {
        let keys = self.path.iter().skip(self.base).map(String::as_str).chain([key]);
        keys.map(printable).collect::<Vec<_>>().join(".")
    }

    /// Runs `read` with a key on the path.
    pub fn within<T>(&mut self, key: &str, read: impl FnOnce(&mut Self) -> T) -> T {
        self.path.push(key.to_owned());
        let value = read(self);
        self.path.pop();
        value
    }

    pub fn table<'n>(&mut self, key: &str, node: &'n Node) -> Option<&'n [Entry]> {
        match &node.value {
            Value::Table(entries) => Some(entries),
            other => {
                let label = self.label(key);
                let hint = example(&label);
                self.error(&node.span, Some(key), format!("`{label}` must be a table, not {}", other.kind())).hint = hint;
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
        let environments: Vec<Name> = overlays.iter().map(|(name, _)| name.clone()).collect();
        let mut workloads = BTreeMap::new();
        let mut notes = self.doubts(&environment, &environments);
        let chosen = overlays.iter().find(|(name, _)| *name == environment).map(|(_, entries)| *entries);
        let read = |r: &mut Self, env: Option<(&Name, &[Entry])>| {
            let mut specs = Vec::new();
            for found in if sectioned { r.sections(entries, env) } else { r.flat(entries, env, root) } {
                let outer = std::mem::replace(&mut r.path, found.path);
                let base = std::mem::replace(&mut r.base, r.path.len());
                if let Some(spec) = r.workload(found.kind, &found.entries, &found.span) {
                    specs.push((found.name, spec));
                }
                (r.path, r.base) = (outer, base);
            }
            specs
        };
        for (name, spec) in read(self, chosen.map(|overlay| (&environment, overlay))) {
            notes.extend(warnings(&name, &spec));
            workloads.insert(name, spec);
        }
        // A circle is told once, of its first workload.
        if let Some(message) = workloads.keys().find_map(|name| circle(&workloads, name)) {
            self.error(&root.span, Some("after"), message);
        }
        if sectioned && workloads.is_empty() && self.errors.is_empty() {
            let section = entries.iter().find(|e| KINDS.iter().any(|(kind, _)| e.key == *kind));
            self.error(&section.and_then(|e| e.key_span.clone()), None, "the file holds no workload").hint =
                Some("add one: [service.NAME] with `run = \"COMMAND\"`".into());
        }
        // A mistake in another environment's overlay must not wait for the day it is deployed to.
        for (name, overlay) in overlays.iter().filter(|(name, _)| *name != environment) {
            read(self, Some((name, overlay)));
        }
        Some(Parsed { spec: ProjectSpec { project: project?, environment, workloads }, warnings: notes, environments })
    }

    /// An environment the file does not know, next to ones it does, may be a slip.
    fn doubts(&self, asked: &Name, known: &[Name]) -> Vec<String> {
        let names: Vec<&str> = known.iter().map(Name::as_str).collect();
        if names.is_empty() || asked.as_str() == DEFAULT_ENVIRONMENT || known.contains(asked) {
            return Vec::new();
        }
        let near = nearest(asked.as_str(), &names).map(|n| format!("; did you mean `{n}`?")).unwrap_or_default();
        vec![format!("the file says nothing of the environment `{asked}`, so its base applies{near}")]
    }

    /// The tables below `env`, by environment.
    fn overlays<'n>(&mut self, top: &Fields<'n>) -> Vec<(Name, &'n [Entry])> {
        let Some(Node { value: Value::Table(entries), .. }) = top.get("env") else { return Vec::new() };
        let mut found = Vec::new();
        for entry in entries {
            let Value::Table(below) = &entry.node.value else { continue };
            match parse::<Name>(&entry.key) {
                Ok(_) if found.len() >= ENVIRONMENTS_MAX => {
                    self.error(&entry.key_span, Some("env"), format!("overlays for more than {ENVIRONMENTS_MAX} environments"));
                    break;
                }
                Ok(name) => found.push((name, below.as_slice())),
                Err(error) => self.within("env", |r| {
                    r.error(&entry.key_span, Some(&entry.key), format!("not the name of an environment: {error}")).hint =
                        Some("a table below `env` is an overlay; the value of a variable is text".into());
                }),
            }
        }
        found
    }

    /// One workload whose fields are at the top of the file.
    fn flat(&mut self, entries: &[Entry], overlay: Option<(&Name, &[Entry])>, root: &Node) -> Vec<Found> {
        let Some(name) = entries.iter().find(|e| e.key == "name") else {
            let top = Some(0..0);
            if entries.is_empty() {
                self.error(&root.span.clone().and(top), None, "the file is empty").hint =
                    Some("`optimus init` writes one to start from".into());
                return Vec::new();
            }
            if entries.iter().all(|e| e.key == "project" || e.key == "env") {
                self.error(&entries[0].key_span, None, "the file holds no workload").hint =
                    Some("add `name = \"NAME\"` and `run = \"COMMAND\"`, or [service.NAME] sections".into());
                return Vec::new();
            }
            let mut known = fields::below("");
            known.extend(KINDS.map(|(kind, _)| kind));
            let before = self.errors.len();
            self.unknown(entries, &known, "");
            // A section's name written wrongly says more than that `name` is missing.
            let a_section = |e: &Entry| matches!(e.node.value, Value::Table(_)) && !known.contains(&e.key.as_str());
            if self.errors.len() == before || !entries.iter().any(a_section) {
                let top = entries[0].key_span.clone();
                self.error(&top, Some("name"), "the workload has no name").hint =
                    Some("add `name = \"NAME\"`, or use [service.NAME] sections".into());
            }
            return Vec::new();
        };
        let span = name.key_span.clone();
        let name = self.name("name", &name.node);
        let over = overlay.map_or(&[][..], |(_, entries)| entries);
        if let Some((env, entry)) = overlay.and_then(|(env, o)| Some((env, o.iter().find(|e| KINDS.iter().any(|(k, _)| e.key == *k))?))) {
            self.path = vec!["env".into(), env.to_string()];
            self.error(&entry.key_span, Some(&entry.key), "the file holds one workload at its top; its overlay has no sections").hint =
                Some(format!("write the fields directly below [env.{env}]"));
            self.path.clear();
        }
        let over: Vec<Entry> = over.iter().filter(|e| !KINDS.iter().any(|(k, _)| e.key == *k)).cloned().collect();
        let entries: Vec<Entry> = entries.iter().filter(|e| e.key != "project" && e.key != "name").map(without_overlays).collect();
        let entries = merge(&entries, &over, overlay.map(|(env, _)| env));
        name.map(|name| Found { kind: Kind::Service, name, entries, span, path: Vec::new() }).into_iter().collect()
    }

    /// `[service.NAME]`, `[job.NAME]`, `[daemon.NAME]`.
    fn sections(&mut self, entries: &[Entry], overlay: Option<(&Name, &[Entry])>) -> Vec<Found> {
        let known = ["service", "job", "daemon", "project", "env"];
        let fields = fields::below("");
        let (stray, rest): (Vec<Entry>, Vec<Entry>) =
            entries.iter().cloned().partition(|e| fields.contains(&e.key.as_str()) && !known.contains(&e.key.as_str()));
        self.unknown(&rest, &known, "");
        for entry in stray {
            let hint = match entry.key.as_str() {
                "name" => "a section is named by its header: [service.NAME]".to_owned(),
                key => format!("move `{key}` below its [service.NAME]"),
            };
            self.error(&entry.key_span, Some(&entry.key), format!("`{}` stands outside the sections of this file", entry.key)).hint =
                Some(hint);
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
        if let Some((env, overlay)) = overlay {
            self.within("env", |r| r.within(env.as_str(), |r| r.unknown(overlay, &known[..3], &format!("env.{env}"))));
        }
        let in_overlay =
            |key: &str| overlay.iter().flat_map(|(env, _)| ["env".to_owned(), env.to_string()]).chain([key.to_owned()]).collect();
        let mut found: Vec<Found> = Vec::new();
        for (word, kind) in KINDS {
            let section = entries.iter().find(|e| e.key == word);
            let over = overlay.and_then(|(_, o)| o.iter().find(|e| e.key == word));
            let outer = std::mem::replace(&mut self.path, in_overlay(word));
            let over: &[Entry] = match over.map(|e| (&e.node.value, e)) {
                Some((Value::Table(entries), _)) => entries,
                Some((other, e)) => {
                    self.error(&e.node.span, None, format!("`{word}` must be a table, not {}", other.kind()));
                    &[]
                }
                None => &[],
            };
            let named: Vec<&str> = match section.map(|s| &s.node.value) {
                Some(Value::Table(workloads)) => workloads.iter().map(|w| w.key.as_str()).collect(),
                _ => Vec::new(),
            };
            for entry in over {
                if !named.contains(&entry.key.as_str()) {
                    let hint = nearest(&entry.key, &named).map(|n| format!("did you mean `{n}`?"));
                    let message = format!("there is no [{word}.{}] to lay this over", printable(&entry.key));
                    self.error(&entry.key_span, Some(&entry.key), message).hint = hint;
                } else if !matches!(entry.node.value, Value::Table(_)) {
                    let message = format!("`{}` must be a table, not {}", printable(&entry.key), entry.node.value.kind());
                    self.error(&entry.node.span, Some(&entry.key), message);
                }
            }
            self.path = outer;
            let Some(section) = section else { continue };
            if let Value::Table(below) = &section.node.value
                && let Some(entry) = below.iter().find(|e| !matches!(e.node.value, Value::Table(_)))
            {
                self.path.push(word.to_owned());
                let message = format!("`{}` must be a table, not {}", printable(&entry.key), entry.node.value.kind());
                self.error(&entry.key_span, Some(&entry.key), message).hint = Some(format!("name the {word} in the header: [{word}.NAME]"));
                self.path.pop();
                continue;
            }
            let Some(workloads) = self.table(word, &section.node) else { continue };
            for workload in workloads {
                let name = self.within(word, |r| match parse::<Name>(&workload.key) {
                    Ok(name) => Some(name),
                    Err(error) => {
                        r.error(&workload.key_span, Some(&workload.key), error).hint = a_name(&workload.key);
                        None
                    }
                });
                let Some(name) = name else { continue };
                let Some(fields) = self.within(word, |r| r.table(&workload.key, &workload.node)) else { continue };
                if found.iter().any(|other| other.name == name) {
                    self.within(word, |r| {
                        let message = format!("`{name}` is the name of another workload of this file");
                        r.error(&workload.key_span, Some(&workload.key), message);
                    });
                    continue;
                }
                if found.len() >= WORKLOADS_MAX {
                    self.error(&workload.key_span, Some(word), format!("more than {WORKLOADS_MAX} workloads in one file"));
                    return found;
                }
                let over = over.iter().find(|o| o.key == workload.key).map(|o| &o.node.value);
                let over = if let Some(Value::Table(entries)) = over { entries.as_slice() } else { &[] };
                found.push(Found {
                    kind,
                    name,
                    entries: merge(fields, over, overlay.map(|(env, _)| env)),
                    span: workload.key_span.clone(),
                    path: vec![word.to_owned(), workload.key.clone()],
                });
            }
        }
        found
    }

    /// Refuses keys that are not known, each with the nearest that is.
    pub fn unknown(&mut self, entries: &[Entry], known: &[&str], inside: &str) {
        for entry in entries.iter().filter(|e| !known.contains(&e.key.as_str())) {
            let near = meant(entry, known).map(|k| format!("did you mean `{k}`?"));
            let hint = near.or_else(|| elsewhere(&entry.key, inside));
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
        let driver = self.container(&f).map(|container| Driver::Container(Box::new(container)));
        let in_container = f.get("image").is_some();
        let run = match f.get("run") {
            Some(node) => self.run(node),
            None if in_container => Some(Run::Argv(vec![])),
            None => {
                self.error(span, Some("run"), "the workload says nothing to run").hint = Some("add `run = \"COMMAND\"`".into());
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
        let mut update = self.update(f.get("update"), min_ready);
        update.after = self.after(f.get("after"));
        update.release = f.get("release_command").and_then(|n| self.release_command(n));
        let schedule = f.get("schedule").and_then(|n| self.schedule(n));
        let runs = self.runs(kind, f.get("runs"), schedule.as_ref());
        let spec = WorkloadSpec {
            kind,
            // An image that cannot be read was refused above.
            driver: driver.unwrap_or_else(|| if in_container { Driver::Container(Box::new(Container::of("?"))) } else { Driver::Process }),
            run: run.unwrap_or(Run::Argv(vec!["?".into()])),
            dir: match f.get("dir") {
                Some(node) if in_container => self.text("dir", node),
                None if in_container => None,
                node => Some(self.dir(node)),
            },
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
            secret_values: BTreeMap::new(),
            secrets: f.get("secrets").map(|n| self.list("secrets", n)).unwrap_or_default(),
            labels: f.get("labels").map(|n| self.texts("labels", n)).unwrap_or_default(),
            schedule,
            placement: self.placement(&f),
            timeout: f.get("timeout").and_then(|n| self.span("timeout", n)),
            disconnect: f.get("disconnect").and_then(|n| self.disconnect(n)),
            runs,
        };
        // Rules between fields. One about a field that was refused above would be told of a value nobody wrote.
        let depth = self.path.len();
        let refused: Vec<String> = self.errors[before..].iter().filter_map(|e| e.path.get(depth).cloned()).collect();
        let is_refused = |key: &str| refused.iter().any(|r| r == key);
        for fault in check_workload(&spec) {
            let top = fault.field[0].as_str();
            let asks_ports = matches!(top, "health" | "liveness") && (is_refused("port") || is_refused("ports"));
            if !is_refused(top) && !asks_ports {
                let place = place(entries, &fault.field, fault.of_key).or(span.clone());
                self.error(&place, None, fault.message).path.extend(fault.field);
            }
        }
        for error in &mut self.errors[before..] {
            // What an overlay gave stands below `env`.
            let from =
                entries.iter().find(|e| Some(&e.key) == error.path.get(depth)).and_then(|e| below_overlay(e, error.path.get(depth + 1)));
            if let Some(env) = from {
                error.path.splice(0..0, ["env".to_owned(), env]);
            }
        }
        Some(spec)
    }
}

/// A workload of the file, before its fields are read.
struct Found {
    kind: Kind,
    name: Name,
    /// Its fields, with the overlay laid over.
    entries: Vec<Entry>,
    /// Place of its name.
    span: Option<Range<usize>>,
    /// Path of its table.
    path: Vec<String>,
}

/// The deepest part of a field's path that the file has. A single `port` is the table `ports` for the rules.
fn place(entries: &[Entry], field: &[String], of_key: bool) -> Option<Range<usize>> {
    let (key, rest) = field.split_first()?;
    let entry = entries.iter().find(|e| e.key == *key).or_else(|| entries.iter().find(|e| key == "ports" && e.key == "port"))?;
    let deeper = match (&entry.node.value, rest) {
        (Value::Table(below), [name]) if of_key => below.iter().find(|e| e.key == *name).and_then(|e| e.key_span.clone()),
        (Value::Table(below), [_, ..]) => place(below, rest, of_key),
        (Value::List(items), [at]) => at.parse::<usize>().ok().and_then(|at| items.get(at)?.span.clone()),
        _ => None,
    };
    // The value of a table may begin at its header; its key is what people look for.
    let own = if matches!(entry.node.value, Value::Table(_)) { entry.key_span.clone() } else { entry.node.span.clone() };
    deeper.or(own)
}

/// The environment whose overlay gave an entry, or the key below it.
fn below_overlay(entry: &Entry, below: Option<&String>) -> Option<String> {
    let inner = match &entry.node.value {
        Value::Table(entries) => entries.iter().find(|e| Some(&e.key) == below).and_then(|e| e.overlay.clone()),
        _ => None,
    };
    inner.or_else(|| entry.overlay.clone())
}

/// Tables whose entries an overlay adds to; all other fields it replaces.
const MERGED: [&str; 2] = ["env", "labels"];

fn merge(base: &[Entry], over: &[Entry], env: Option<&Name>) -> Vec<Entry> {
    let env = env.map(Name::to_string);
    let mut out = base.to_vec();
    // `port` over `ports`, and the other way round, replaces as well. An overlay with both keeps both, to be refused.
    let is_port = |e: &Entry| e.key == "port" || e.key == "ports";
    if over.iter().any(is_port) {
        out.retain(|e| !is_port(e));
    }
    for entry in over {
        let entry = &Entry { overlay: env.clone(), ..entry.clone() };
        let at = out.iter().position(|e| e.key == entry.key);
        match at {
            Some(at) if MERGED.contains(&entry.key.as_str()) => {
                let merged = match (&out[at].node.value, &entry.node.value) {
                    (Value::Table(below), Value::Table(above)) => {
                        let mut all: Vec<Entry> = below.iter().filter(|b| !above.iter().any(|a| a.key == b.key)).cloned().collect();
                        all.extend(above.iter().map(|a| Entry { overlay: env.clone(), ..a.clone() }));
                        Value::Table(all)
                    }
                    _ => entry.node.value.clone(),
                };
                out[at].node = Node { value: merged, span: entry.node.span.clone() };
            }
            Some(at) => out[at] = entry.clone(),
            None => out.push(entry.clone()),
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
