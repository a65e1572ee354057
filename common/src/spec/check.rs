//! What must be true of a spec wherever it comes from, and what is not acted on yet.

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
/// The agent's own; a workload learns its place from them.
const RESERVED: &str = "OPTIMUS_";
const PORTS_MAX: usize = 32;

/// Every rule a project breaks, with JSON pointers into its JSON form.
pub fn check(project: &ProjectSpec) -> Vec<FieldError> {
    let mut errors = Vec::new();
    for (name, spec) in &project.workloads {
        errors.extend(check_workload(spec).into_iter().map(|(path, message)| error(name, &path, message)));
    }
    errors
}

/// Fields that are understood but not acted on yet, with JSON pointers.
pub fn not_available(project: &ProjectSpec) -> Vec<FieldError> {
    let mut errors = Vec::new();
    for (name, spec) in &project.workloads {
        let mut add = |path: &str, what: &str| errors.push(error(name, path, format!("{what} is not available yet")));
        match spec.kind {
            Kind::Service => {}
            Kind::Job => add("kind", "a job"),
            Kind::Daemon => add("kind", "a daemon"),
        }
        if matches!(spec.driver, Driver::Container { .. }) {
            add("image", "running containers");
        }
        match spec.update.strategy {
            Strategy::Rolling => {}
            Strategy::Canary => add("update.strategy", "the canary strategy"),
            Strategy::BlueGreen => add("update.strategy", "the blue-green strategy"),
        }
        for (field, probe) in [("health", &spec.health.readiness), ("liveness", &spec.health.liveness)] {
            match probe.as_ref().map(|p| &p.check) {
                Some(Check::Grpc { .. }) => add(&format!("{field}.grpc"), "a gRPC check"),
                Some(Check::Command { .. }) => add(&format!("{field}.command"), "a command check"),
                Some(Check::Http { .. } | Check::Tcp) | None => {}
            }
        }
        if !spec.secrets.is_empty() {
            add("secrets", "giving secrets to a workload");
        }
        if spec.schedule.is_some() {
            add("schedule", "a schedule");
        }
        if spec.timeout.is_some() {
            add("timeout", "a time limit for runs");
        }
    }
    errors
}

fn error(workload: &Name, path: &str, message: String) -> FieldError {
    FieldError { pointer: format!("/workloads/{workload}/{}", path.replacen('.', "/", 1)), message }
}

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

/// The rules of one workload: the field's path and what is wrong.
pub(super) fn check_workload(spec: &WorkloadSpec) -> Vec<(String, String)> {
    let mut rules = Rules(Vec::new());
    let WorkloadSpec {
        kind: _,
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
        update,
        logs,
        secrets,
        labels,
        schedule,
        timeout,
    } = spec;
    rules.run(run, matches!(driver, Driver::Container { .. }));
    if let Driver::Container { image } = driver {
        rules.text("image", image);
        rules.want(!image.is_empty(), "image", || "`image` is empty".into());
    }
    if let Some(dir) = dir {
        rules.text("dir", dir);
        rules.want(dir.starts_with('/'), "dir", || format!("`dir` must be an absolute path on the node, not {dir:?}"));
    }
    if let Some(user) = user {
        let good = !user.is_empty() && user.len() <= 64 && user.chars().all(|c| c.is_ascii_alphanumeric() || "_.-$".contains(c));
        rules.want(good, "user", || "`user` must be the name of a user".into());
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
    rules.want(restart.delay_max >= restart.delay, "restart.delay_max", || {
        "`restart.delay_max` must not be shorter than `restart.delay`".into()
    });
    let Stop { signal, grace } = stop;
    rules.want(SIGNALS.contains(&signal.as_str()), "stop.signal", || format!("`stop.signal` must be one of {}", SIGNALS.join(", ")));
    rules.want(*grace <= Span::secs(3600), "stop.grace", || "`stop.grace` must be at most 1h".into());
    let Update { strategy: _, parallel, deadline, min_ready } = update;
    rules.want((1..=1000).contains(parallel), "update.parallel", || "`update.parallel` must be from 1 to 1000".into());
    rules.spans("update", &[("deadline", *deadline), ("min_ready", *min_ready)]);
    rules.want(*deadline >= Span::secs(1), "update.deadline", || "`update.deadline` must be at least 1s".into());
    rules.want(logs.size >= LOG_MIN, "logs.size", || format!("`logs.size` must be at least {LOG_MIN}"));
    rules.want(logs.size.0 <= 1 << 40, "logs.size", || "`logs.size` must be at most 1T".into());
    rules.want(secrets.len() <= LIST_MAX, "secrets", || format!("at most {LIST_MAX} secrets"));
    for secret in secrets {
        rules.want(is_variable(secret), "secrets", || format!("{secret:?} cannot be the name of a variable"));
    }
    rules.want(labels.len() <= LIST_MAX, "labels", || format!("at most {LIST_MAX} labels"));
    for (key, value) in labels {
        let good = !key.is_empty() && key.len() <= 63 && key.chars().all(|c| c.is_ascii_alphanumeric() || "_.-/".contains(c));
        let path = format!("labels.{key}");
        rules.want(good, &path, || format!("{key:?} cannot be a label: letters, digits and _ . - / only, at most 63"));
        rules.want(value.len() <= 255 && !value.contains(char::is_control), &path, || {
            format!("the label {key:?} is longer than 255 bytes or holds control characters")
        });
    }
    if let Some(schedule) = schedule {
        rules.want(schedule.split_whitespace().count() >= 5 && schedule.len() <= 256, "schedule", || {
            "`schedule` must be a cron line of five fields".into()
        });
    }
    if let Some(timeout) = timeout {
        rules.spans("", &[("timeout", *timeout)]);
    }
    rules.0
}

struct Rules(Vec<(String, String)>);

impl Rules {
    fn want(&mut self, good: bool, path: &str, message: impl FnOnce() -> String) {
        if !good {
            self.0.push((path.to_owned(), message()));
        }
    }

    fn text(&mut self, path: &str, text: &str) {
        self.want(text.len() <= TEXT_MAX, path, || format!("`{path}` is longer than {TEXT_MAX} bytes"));
        self.want(!text.contains('\0'), path, || format!("`{path}` holds a NUL"));
    }

    fn spans(&mut self, table: &str, spans: &[(&str, Span)]) {
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
            let path = format!("env.{key}");
            self.want(is_variable(key), &path, || {
                format!("{key:?} cannot be the name of a variable: letters, digits and _ only, not a digit first")
            });
            let ours = key == "PORT" || key.starts_with("PORT_") || key.starts_with(RESERVED);
            self.want(!ours, &path, || format!("{key} is set by Optimus"));
            self.text(&path, value);
        }
    }

    fn ports(&mut self, ports: &[Port]) {
        self.want(ports.len() <= PORTS_MAX, "ports", || format!("at most {PORTS_MAX} ports"));
        for (n, port) in ports.iter().enumerate() {
            self.want(port.fixed != Some(0), "ports", || "a port is from 1 to 65535".into());
            self.want(!ports[..n].iter().any(|p| p.name == port.name), "ports", || format!("two ports are named `{}`", port.name));
            let twice = port.fixed.filter(|f| ports[..n].iter().any(|p| p.fixed == Some(*f)));
            self.want(twice.is_none(), "ports", || format!("port {} is there twice", port.fixed.unwrap_or(0)));
        }
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
                self.text(field, path);
                let good = path.starts_with('/') && !path.contains(|c: char| c.is_control() || c == ' ');
                self.want(good, &format!("{field}.http"), || format!("the path of `{field}` must start with / and hold no space"));
                true
            }
            Check::Tcp | Check::Grpc { .. } => true,
            Check::Command { argv } => {
                self.want(argv.first().is_some_and(|p| !p.is_empty()), &format!("{field}.command"), || {
                    format!("`{field}.command` names no program")
                });
                false
            }
        };
        if let Some(name) = port {
            self.want(ports.iter().any(|p| p.name == *name), &format!("{field}.port"), || {
                format!("`{field}.port`: there is no port `{name}`")
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

fn is_variable(name: &str) -> bool {
    let first = name.chars().next();
    first.is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && name.len() <= 255
        && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}
