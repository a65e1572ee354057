//! What must be true of a spec wherever it comes from, and what is not acted on yet.

use super::error::printable;
use super::placement::{Placement, RULES_MAX, bad_mount_path};
use super::types::*;
use crate::api::v1::FieldError;
use crate::ids::Name;
use crate::time::{SPAN_MAX, Span};
use crate::units::{Bytes, Millicores};

const SIGNALS: [&str; 6] = ["TERM", "INT", "QUIT", "HUP", "USR1", "USR2"];
/// Longest text of one value: an argument, a variable, a path.
const TEXT_MAX: usize = 64 << 10;
const LIST_MAX: usize = 1000;
/// Below this not even a shell starts.
const MEMORY_MIN: Bytes = Bytes::mib(1);
const LOG_MIN: Bytes = Bytes(64 << 10);
/// Longest path of an HTTP check.
const PATH_MAX: usize = 2048;
const PORTS_MAX: usize = 32;

/// Every rule a project breaks, with JSON pointers into its JSON form.
pub fn check(project: &ProjectSpec) -> Vec<FieldError> {
    let mut errors = Vec::new();
    for (name, spec) in &project.workloads {
        errors.extend(check_workload(spec).into_iter().map(|fault| error(name, spec, &fault.field, fault.message)));
        if let Some(message) = circle(&project.workloads, name) {
            errors.push(error(name, spec, &["after".to_owned()], message));
        }
    }
    errors
}

/// Fields that are understood but not acted on yet, with JSON pointers.
pub fn not_available(project: &ProjectSpec) -> Vec<FieldError> {
    let mut errors = Vec::new();
    for (name, spec) in &project.workloads {
        let mut add = |path: &str, what: &str| {
            let field: Vec<String> = path.split('.').map(str::to_owned).collect();
            errors.push(error(name, spec, &field, format!("{what} is not available yet")));
        };
        match spec.kind {
            Kind::Service | Kind::Job | Kind::Daemon => {}
        }
        for (field, probe) in [("health", &spec.health.readiness), ("liveness", &spec.health.liveness)] {
            match probe.as_ref().map(|p| &p.check) {
                Some(Check::Grpc { .. }) => add(&format!("{field}.grpc"), "a gRPC check"),
                Some(Check::Command { .. }) if spec.driver == Driver::Process => {
                    add(&format!("{field}.command"), "a command check for a process")
                }
                Some(Check::Http { .. } | Check::Tcp | Check::Command { .. }) | None => {}
            }
        }
    }
    errors
}

/// Why a workload of the file could never begin: it comes after itself, directly or by others of the file.
pub(super) fn circle(workloads: &std::collections::BTreeMap<Name, WorkloadSpec>, name: &Name) -> Option<String> {
    let path = super::update::after_circle(|name| workloads.get(name).map_or(&[], |spec| spec.update.after.as_slice()), name)?;
    let path: Vec<&str> = path.iter().map(Name::as_str).collect();
    Some(format!("`after` goes in a circle: {}", path.join(" after ")))
}

fn error(workload: &Name, spec: &WorkloadSpec, field: &[String], message: String) -> FieldError {
    let mut pointer = format!("/workloads/{workload}");
    for key in typed(spec, field) {
        pointer.push('/');
        pointer.push_str(&key.replace('~', "~0").replace('/', "~1"));
    }
    FieldError { pointer, message }
}

/// Where a field of the file stands in the JSON of [`WorkloadSpec`].
fn typed(spec: &WorkloadSpec, field: &[String]) -> Vec<String> {
    let keys: Vec<&str> = field.iter().map(String::as_str).collect();
    let port = |name: &str| spec.ports.iter().rposition(|p| p.name.as_str() == name).map(|at| at.to_string());
    let moved: Vec<String> = match keys.as_slice() {
        ["after"] => vec!["update".into(), "after".into()],
        ["release_command", ..] => vec!["update".into(), "release".into()],
        ["image"] => vec!["driver".into(), "container".into(), "image".into()],
        ["container", ..] => ["driver".to_owned()].into_iter().chain(field.iter().cloned()).collect(),
        ["cpu" | "pids"] => vec!["resources".into(), keys[0].into()],
        ["memory"] => vec!["resources".into(), "memory_limit".into()],
        [top, ..] if PLACEMENT.contains(top) => ["placement".to_owned()].into_iter().chain(field.iter().cloned()).collect(),
        ["ports", name, ..] => ["ports".into()].into_iter().chain(port(name)).collect(),
        ["health" | "liveness", rest @ ..] => {
            let probe = if keys[0] == "health" { "readiness" } else { "liveness" };
            let rest: &[&str] = match rest {
                ["http"] => &["check", "http", "path"],
                ["grpc"] => &["check", "grpc", "service"],
                ["command"] => &["check", "command", "argv"],
                rest => rest,
            };
            ["health", probe].iter().chain(rest).map(|k| (*k).to_owned()).collect()
        }
        _ => field.to_vec(),
    };
    moved
}

/// Fields of a file that stand below `placement`.
const PLACEMENT: [&str; 11] =
    ["constraints", "affinity", "anti_affinity", "spread", "distinct_hosts", "pool", "priority", "disk", "devices", "volumes", "arch"];

/// Odd but allowed.
pub(super) fn warnings(name: &Name, spec: &WorkloadSpec) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(port) = spec.ports.iter().find_map(|p| p.fixed).filter(|_| spec.copies.unwrap_or(1) > 1) {
        notes.push(format!("{name}: port {port} is fixed, so each copy needs a node of its own; `port = \"auto\"` has no such limit"));
    }
    if spec.update.deadline < spec.update.min_ready {
        notes.push(format!("{name}: `update.deadline` is shorter than `update.min_ready`, so no deployment can succeed"));
    }
    notes
}

/// A rule that is broken.
pub(super) struct Fault {
    /// Path of the field as the file has it: `["health", "interval"]`.
    pub field: Vec<String>,
    /// Whether it is about the key, not the value.
    pub of_key: bool,
    pub message: String,
}

/// The rules of one workload that are broken.
pub(super) fn check_workload(spec: &WorkloadSpec) -> Vec<Fault> {
    let mut rules = Rules(Vec::new());
    let WorkloadSpec {
        kind,
        driver,
        run,
        dir,
        env,
        user,
        copies,
        ports,
        resources,
        health,
        restart,
        stop,
        update: _,
        logs,
        secrets,
        secret_values,
        labels,
        placement,
        schedule,
        timeout,
        disconnect: _,
        runs,
    } = spec;
    rules.run(run, matches!(driver, Driver::Container { .. }));
    let in_container = matches!(driver, Driver::Container(_));
    if let Driver::Container(container) = driver {
        rules.container(container, run, ports);
    }
    if let Some(dir) = dir {
        rules.text("dir", dir);
        let of = if in_container { "in the container" } else { "on the node" };
        rules.want(dir.starts_with('/'), "dir", || format!("`dir` must be an absolute path {of}, not `{}`", printable(dir)));
    }
    if let Some(user) = user {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_.-$".contains(c) || (in_container && c == ':');
        let good = !user.is_empty() && user.len() <= 64 && user.chars().all(plain) && user.split(':').count() <= 2;
        rules.want(good && !user.starts_with(':'), "user", || "`user` must be the name of a user".into());
    }
    rules.env(env);
    rules.want(copies.unwrap_or(0) <= 10_000, "copies", || "`copies` must be from 0 to 10000".into());
    rules.ports(ports);
    rules.resources(resources);
    for (field, probe) in [("health", &health.readiness), ("liveness", &health.liveness)] {
        if let Some(probe) = probe {
            rules.probe(field, probe, ports);
        }
    }
    rules.spans("restart", &[("delay", restart.delay), ("delay_max", restart.delay_max), ("reset_after", restart.reset_after)]);
    rules.want(restart.delay >= Span(10), "restart.delay", || "`restart.delay` must be at least 10ms".into());
    rules.want(restart.delay <= Span::secs(3600), "restart.delay", || "`restart.delay` must be at most 1h".into());
    rules.want(restart.delay_max >= restart.delay, "restart.delay_max", || {
        "`restart.delay_max` must not be shorter than `restart.delay`".into()
    });
    let Stop { signal, grace } = stop;
    rules.want(SIGNALS.contains(&signal.as_str()), "stop.signal", || {
        format!("`stop.signal` must be one of {}, not `{}`", SIGNALS.join(", "), printable(signal))
    });
    rules.want(*grace <= Span::secs(3600), "stop.grace", || "`stop.grace` must be at most 1h".into());
    super::update::check(&mut rules, spec);
    let update = &spec.update;
    rules.want(update.percent.is_none() || *kind == Kind::Daemon, "update.percent", || {
        "`update.percent` is for a daemon; use `parallel`".into()
    });
    rules.want((1..=100).contains(&update.percent.unwrap_or(1)), "update.percent", || "`update.percent` must be from 1 to 100".into());
    rules.want(logs.size >= LOG_MIN, "logs.size", || format!("`logs.size` must be at least {LOG_MIN}"));
    rules.want(logs.size.0 <= 1 << 40, "logs.size", || "`logs.size` must be at most 1T".into());
    rules.want(secret_values.is_empty(), "secret_values", || "`secret_values` are told to agents; name `secrets`".into());
    rules.want(secrets.len() <= LIST_MAX, "secrets", || format!("at most {LIST_MAX} secrets"));
    for (n, secret) in secrets.iter().enumerate().take(LIST_MAX) {
        let at = n.to_string();
        rules.want_in(is_variable(secret), "secrets", &at, || format!("`{}` {NOT_A_VARIABLE}", printable(secret)));
        rules.want_in(!is_ours(secret), "secrets", &at, || format!("`{secret}` is set by Optimus and cannot be a secret"));
        rules.want_in(!secrets[..n].contains(secret), "secrets", &at, || format!("the secret `{}` is there twice", printable(secret)));
        rules.want_in(!env.contains_key(secret), "secrets", &at, || {
            format!("`{}` is a variable in `env` and a secret; it can be only one", printable(secret))
        });
    }
    rules.want(labels.len() <= LIST_MAX, "labels", || format!("at most {LIST_MAX} labels"));
    for (key, value) in labels {
        let good = !key.is_empty() && key.len() <= 63 && key.chars().all(|c| c.is_ascii_alphanumeric() || "_.-/".contains(c));
        rules.want_key(good, "labels", key, || {
            format!("`{}` cannot be a label: letters, digits and _ . - / only, 1 to 63 of them", printable(key))
        });
        rules.want_in(value.len() <= 255 && !value.contains(char::is_control), "labels", key, || {
            format!("the label `{}` is longer than 255 bytes or holds control characters", printable(key))
        });
    }
    rules.placement(placement, *kind);
    rules.want(schedule.is_none() || *kind == Kind::Job, "schedule", || "`schedule` is a field of a job: [job.NAME]".into());
    rules.want(timeout.is_none() || *kind == Kind::Job, "timeout", || "`timeout` is a field of a job: [job.NAME]".into());
    rules.want(copies.is_none() || *kind != Kind::Daemon, "copies", || {
        "`copies` is no field of a daemon: it runs once on every matching node".into()
    });
    rules.job(*kind, schedule.as_ref(), runs.as_ref());
    if let Some(timeout) = timeout {
        rules.spans("", &[("timeout", *timeout)]);
        rules.want(*timeout >= Span(100), "timeout", || "`timeout` must be at least 100ms".into());
    }
    if *kind == Kind::Job {
        rules.want(copies.unwrap_or(1) >= 1, "copies", || "a run has at least one copy".into());
        rules.want(health.liveness.is_none() && health.readiness.is_none(), "health", || {
            "a job is done when it ends: it has no health check".into()
        });
    }
    rules.0
}

pub(super) struct Rules(Vec<Fault>);

impl Rules {
    pub(super) fn want(&mut self, good: bool, path: &str, message: impl FnOnce() -> String) {
        if !good {
            self.0.push(Fault { field: path.split('.').map(str::to_owned).collect(), of_key: false, message: message() });
        }
    }

    /// As [`Rules::want`], for a key of the user's in a table, or a place in a list.
    fn want_in(&mut self, good: bool, table: &str, key: &str, message: impl FnOnce() -> String) {
        if !good {
            self.0.push(Fault { field: vec![table.to_owned(), key.to_owned()], of_key: false, message: message() });
        }
    }

    /// As [`Rules::want_in`], about the key itself.
    fn want_key(&mut self, good: bool, table: &str, key: &str, message: impl FnOnce() -> String) {
        if !good {
            self.0.push(Fault { field: vec![table.to_owned(), key.to_owned()], of_key: true, message: message() });
        }
    }

    pub(super) fn text(&mut self, path: &str, text: &str) {
        self.want(text.len() <= TEXT_MAX, path, || format!("`{path}` is longer than {TEXT_MAX} bytes"));
        self.want(!text.contains('\0'), path, || format!("`{path}` holds a NUL"));
    }

    pub(super) fn spans(&mut self, table: &str, spans: &[(&str, Span)]) {
        for (name, span) in spans {
            let path = if table.is_empty() { (*name).to_owned() } else { format!("{table}.{name}") };
            self.want(*span <= SPAN_MAX, &path, || format!("`{path}` is longer than a year"));
        }
    }

    fn run(&mut self, run: &Run, may_be_empty: bool) {
        match run {
            Run::Argv(argv) => {
                self.want(may_be_empty || argv.first().is_some_and(|p| !p.is_empty()), "run", || "`run` names no program".into());
                self.want(argv.len() <= LIST_MAX, "run", || format!("`run` has more than {LIST_MAX} words"));
                for word in argv {
                    self.text("run", word);
                }
            }
            Run::Shell(line) => {
                self.text("run", line);
                self.want(!line.trim().is_empty(), "run", || "`run` is empty".into());
            }
        }
    }

    fn env(&mut self, env: &std::collections::BTreeMap<String, String>) {
        self.want(env.len() <= LIST_MAX, "env", || format!("at most {LIST_MAX} variables"));
        for (key, value) in env {
            self.want_key(is_variable(key), "env", key, || format!("`{}` {NOT_A_VARIABLE}", printable(key)));
            self.want_key(!is_ours(key), "env", key, || format!("`{}` is set by Optimus", printable(key)));
            self.want_in(value.len() <= TEXT_MAX, "env", key, || format!("`{}` is longer than {TEXT_MAX} bytes", printable(key)));
            self.want_in(!value.contains('\0'), "env", key, || format!("`{}` holds a NUL", printable(key)));
        }
    }

    fn ports(&mut self, ports: &[Port]) {
        self.want(ports.len() <= PORTS_MAX, "ports", || format!("at most {PORTS_MAX} ports"));
        for (n, port) in ports.iter().enumerate().take(PORTS_MAX) {
            let (name, before) = (port.name.as_str(), &ports[..n]);
            self.want_in(port.fixed != Some(0), "ports", name, || "a port is from 1 to 65535".into());
            self.want_in(!before.iter().any(|p| p.name == port.name), "ports", name, || format!("two ports are named `{name}`"));
            let twice = before.iter().find(|p| p.fixed.is_some() && p.fixed == port.fixed);
            self.want_in(twice.is_none(), "ports", name, || {
                format!("port {} is given twice, to `{}` and `{name}`", port.fixed.unwrap_or(0), twice.map_or("", |p| p.name.as_str()))
            });
        }
    }

    fn placement(&mut self, placement: &Placement, kind: Kind) {
        let Placement {
            constraints,
            affinity,
            anti_affinity,
            spread,
            distinct_hosts,
            pool: _,
            priority,
            disk,
            devices,
            given,
            volumes,
            mounts,
            arch,
        } = placement;
        for (what, count) in [
            ("constraints", constraints.len()),
            ("affinity", affinity.len()),
            ("anti_affinity", anti_affinity.len()),
            ("spread", spread.len()),
            ("devices", devices.len()),
            ("volumes", volumes.len()),
            ("arch", arch.len()),
        ] {
            self.want(count <= RULES_MAX, what, || format!("`{what}` holds {count}; at most {RULES_MAX} are possible"));
        }
        for (n, name) in volumes.iter().enumerate() {
            self.want_in(!volumes[..n].contains(name), "volumes", &n.to_string(), || format!("volume `{name}` is named twice"));
        }
        for (n, mount) in mounts.iter().enumerate() {
            let at = volumes.iter().position(|name| *name == mount.volume);
            self.want(at.is_some(), "volumes", || format!("`mounts` names volume `{}`, which is not in `volumes`", mount.volume));
            let bad = bad_mount_path(&mount.path);
            let at = at.unwrap_or(0).to_string();
            self.want_in(bad.is_none(), "volumes", &at, || {
                format!("volume `{}` cannot be seen at `{}`: {}", mount.volume, printable(&mount.path), bad.unwrap_or_default())
            });
            let inside =
                |one: &str, other: &str| other.strip_prefix(one.trim_end_matches('/')).is_some_and(|r| r.is_empty() || r.starts_with('/'));
            let twice = mounts[..n].iter().any(|other| inside(&other.path, &mount.path) || inside(&mount.path, &other.path));
            self.want_in(!twice, "volumes", &at, || format!("two volumes would be seen at `{}`", printable(&mount.path)));
        }
        self.want(given.is_empty(), "given", || "`given` is told to agents; ask with `devices`".into());
        self.want(*priority <= 100, "priority", || "`priority` must be from 0 to 100".into());
        self.want(disk.0 <= 1 << 60, "disk", || "`disk` is more than any host has".into());
        for (n, one) in spread.iter().enumerate() {
            let twice = spread[..n].iter().any(|other| other.attribute == one.attribute);
            self.want_in(!twice, "spread", &n.to_string(), || format!("the copies are spread over `{}` twice", one.attribute));
        }
        for (n, ask) in devices.iter().enumerate() {
            let twice = devices[..n].iter().any(|other| other.kind == ask.kind && other.rules == ask.rules);
            self.want_in(!twice, "devices", &n.to_string(), || format!("`{}` is asked for twice; add up the counts", ask.kind));
        }
        self.want(kind != Kind::Daemon || !distinct_hosts, "distinct_hosts", || {
            "`distinct_hosts` says nothing of a daemon: it runs once on every matching node".into()
        });
        self.want(kind != Kind::Daemon || spread.is_empty(), "spread", || {
            "`spread` says nothing of a daemon: it runs once on every matching node".into()
        });
    }

    fn resources(&mut self, resources: &Resources) {
        let Resources { cpu, memory_request, memory_limit, pids } = resources;
        self.want((Millicores(10)..=Millicores(4_096_000)).contains(cpu), "cpu", || "`cpu` must be from 0.01 to 4096 cores".into());
        self.want(*memory_limit >= MEMORY_MIN, "memory", || format!("`memory` must be at least {MEMORY_MIN}"));
        self.want(memory_limit.0 <= 1 << 50, "memory", || "`memory` is more than any host has".into());
        self.want(memory_request <= memory_limit, "memory", || {
            format!("`memory` reserves {memory_request}, more than its limit of {memory_limit}; a range is written smaller..larger")
        });
        self.want((1..=4_194_304).contains(pids), "pids", || "`pids` must be from 1 to 4194304".into());
    }

    fn probe(&mut self, field: &str, probe: &Probe, ports: &[Port]) {
        let Probe { check, port, interval, timeout, grace, healthy_after, unhealthy_after } = probe;
        let asks_a_port = match check {
            Check::Http { path } => {
                let good = path.starts_with('/') && path.len() <= PATH_MAX && !path.contains(|c: char| c.is_control() || c == ' ');
                self.want(good, &format!("{field}.http"), || {
                    format!(
                        "the path of `{field}` must start with / and hold no space, at most {PATH_MAX} bytes; it is `{}`",
                        printable(path)
                    )
                });
                true
            }
            Check::Tcp => true,
            Check::Grpc { service } => {
                self.text(&format!("{field}.grpc"), service);
                true
            }
            Check::Command { argv } => {
                let at = format!("{field}.command");
                self.want(argv.first().is_some_and(|p| !p.is_empty()), &at, || format!("`{at}` names no program"));
                self.want(argv.len() <= LIST_MAX, &at, || format!("`{at}` has more than {LIST_MAX} words"));
                argv.iter().for_each(|word| self.text(&at, word));
                false
            }
        };
        if let Some(name) = port {
            self.want(ports.iter().any(|p| p.name == *name), &format!("{field}.port"), || {
                let names: Vec<String> = ports.iter().map(|p| format!("`{}`", p.name)).collect();
                let known = if names.is_empty() { "the workload has none".to_owned() } else { format!("known are {}", names.join(", ")) };
                format!("`{field}.port`: there is no port `{name}`; {known}")
            });
        } else if asks_a_port {
            self.want(!ports.is_empty(), field, || format!("`{field}` asks a port, but the workload has none; add `port = \"auto\"`"));
        }
        self.spans(field, &[("grace", *grace)]);
        let hour = Span::secs(3600);
        self.want((Span(100)..=hour).contains(interval), &format!("{field}.interval"), || {
            format!("`{field}.interval` must be from 100ms to 1h")
        });
        self.want((Span(10)..=hour).contains(timeout), &format!("{field}.timeout"), || {
            format!("`{field}.timeout` must be from 10ms to 1h")
        });
        self.want((1..=100).contains(healthy_after), &format!("{field}.healthy_after"), || {
            format!("`{field}.healthy_after` must be from 1 to 100")
        });
        self.want((1..=100).contains(unhealthy_after), &format!("{field}.unhealthy_after"), || {
            format!("`{field}.unhealthy_after` must be from 1 to 100")
        });
    }
}

const NOT_A_VARIABLE: &str = "cannot be the name of a variable: letters, digits and _ only, not a digit first";

/// Whether the agent sets the variable; a workload learns its place from these.
/// Why a secret cannot have this name; unset: it can.
pub fn bad_secret_name(name: &str) -> Option<String> {
    if !is_variable(name) || name.len() > 128 {
        return Some(format!("`{}` cannot be a secret: letters, digits and _, no digit first, at most 128 of them", printable(name)));
    }
    is_ours(name).then(|| format!("`{name}` is set by Optimus and cannot be a secret"))
}

fn is_ours(name: &str) -> bool {
    name == "PORT" || name.starts_with("PORT_") || name.starts_with("OPTIMUS_")
}

pub(super) fn is_variable(name: &str) -> bool {
    let first = name.chars().next();
    first.is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && name.len() <= 255
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}
