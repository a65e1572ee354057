//! How a new release takes over from the one before, and what happens to copies whose node falls silent: the types,
//! how they are read, and their rules.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::check::Rules;
use super::error::{nearest, printable};
use super::node::{Node, Value};
use super::read::Reader;
use super::types::{Run, WorkloadSpec};
use crate::ids::Name;
use crate::time::Span;

/// Most steps of a canary.
const STEPS_MAX: usize = 20;
/// Most workloads one may come after.
const AFTER_MAX: usize = 50;
/// Longest bake of a step, hold of a switch and run of a release command.
const WAIT_MAX: Span = Span::secs(7 * 24 * 3600);
const DAY: Span = Span::secs(24 * 3600);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Update {
    pub strategy: Strategy,
    /// How many copies move at a time: so many new copies may be unproven at once.
    pub parallel: u32,
    /// Of a daemon: how many of its nodes move at a time, in percent of those that match, rounded up. Instead of
    /// `parallel`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub percent: Option<u32>,
    /// Longest time a deployment may go without progress before it fails.
    pub deadline: Span,
    /// How long a new copy must stay ready before it counts.
    pub min_ready: Span,
    /// Copies there may be beyond the wanted number while they move. Unset: `parallel`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_surge: Option<Amount>,
    /// Copies that may be missing while they move. Unset: none, or `parallel` where a new copy cannot start beside the old.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_unavailable: Option<Amount>,
    /// How many copies try a release first.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub canary: Amount,
    /// What the canaries go through, in order. Empty: [`Update::STEP`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<CanaryStep>,
    /// How long the old set stays beside the new one after a blue-green switch.
    #[serde(default = "hold", skip_serializing_if = "is_hold")]
    pub hold: Span,
    /// A release that proved itself is promoted without being asked.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub auto_promote: bool,
    /// A release that fails gives way to the one before.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub auto_rollback: bool,
    /// Workloads of the same environment that must be ready before a deployment begins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<Name>,
    /// Runs once per deployment, before the first copy of the release starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release: Option<ReleaseStep>,
}

impl Update {
    /// The step of a canary that names none.
    pub const STEP: CanaryStep = CanaryStep { weight: 10, bake: Span::secs(60) };
    /// Of a blue-green switch that names none.
    pub const HOLD: Span = Span::secs(60);

    /// The steps canaries go through; never empty.
    pub fn canary_steps(&self) -> &[CanaryStep] {
        const DEFAULT: &[CanaryStep] = &[Update::STEP];
        if self.steps.is_empty() { DEFAULT } else { &self.steps }
    }
}

impl Default for Update {
    fn default() -> Self {
        Update {
            strategy: Strategy::Rolling,
            parallel: 1,
            percent: None,
            deadline: Span::secs(120),
            min_ready: Span(0),
            max_surge: None,
            max_unavailable: None,
            canary: one(),
            steps: vec![],
            hold: Update::HOLD,
            auto_promote: true,
            auto_rollback: true,
            after: vec![],
            release: None,
        }
    }
}

fn one() -> Amount {
    Amount::Count(1)
}
fn is_one(amount: &Amount) -> bool {
    *amount == one()
}
fn hold() -> Span {
    Update::HOLD
}
fn is_hold(span: &Span) -> bool {
    *span == Update::HOLD
}
fn yes() -> bool {
    true
}
fn is_yes(given: &bool) -> bool {
    *given
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    Rolling,
    BlueGreen,
    Canary,
}

impl Strategy {
    pub fn word(self) -> &'static str {
        match self {
            Strategy::Rolling => "rolling",
            Strategy::BlueGreen => "blue-green",
            Strategy::Canary => "canary",
        }
    }
}

/// A number of copies, or a share of the wanted number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Amount {
    Count(u32),
    /// 0 to 100, of the wanted number.
    Percent(u32),
}

impl Amount {
    /// Rounded up: a share that is not nothing is at least one.
    pub fn of(self, copies: u32) -> u32 {
        match self {
            Amount::Count(count) => count,
            Amount::Percent(percent) => (u64::from(copies) * u64::from(percent)).div_ceil(100) as u32,
        }
    }

    /// Rounded down: a budget that is never overdrawn.
    pub fn at_most(self, copies: u32) -> u32 {
        match self {
            Amount::Count(count) => count,
            Amount::Percent(percent) => (u64::from(copies) * u64::from(percent) / 100) as u32,
        }
    }
}

/// One step of a canary: the share of the traffic, and for how long it must go well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CanaryStep {
    /// Percent of the traffic, 0 to 100.
    pub weight: u32,
    pub bake: Span,
}

/// A command that runs once per deployment, for example a migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReleaseStep {
    pub run: Run,
    pub timeout: Span,
}

impl WorkloadSpec {
    /// Whether a copy that runs by this must be started anew to run by `new`. What is left aside takes effect without:
    /// numbers and waits that only the control plane reads, labels, and limits, which its agent sets as it runs.
    pub fn must_restart_for(&self, new: &WorkloadSpec) -> bool {
        let plain = |spec: &WorkloadSpec| {
            let (update, resources) = (Update::default(), self.resources);
            WorkloadSpec { copies: None, labels: Default::default(), update, disconnect: None, resources, ..spec.clone() }
        };
        plain(self) != plain(new)
    }

    /// How the release command is run: as one try of a job, in the place, with the limits and the environment of a copy.
    /// Unset: there is none.
    pub fn release_step(&self) -> Option<WorkloadSpec> {
        let ReleaseStep { run, timeout } = self.update.release.clone()?;
        let (health, update) = (super::types::Health { readiness: None, liveness: None }, Update::default());
        Some(WorkloadSpec { kind: super::types::Kind::Job, run, timeout: Some(timeout), ports: vec![], health, update, ..self.clone() })
    }
}

/// What happens to copies on a node that does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Disconnect {
    /// So long a copy counts as unknown, and may take up its place again; then it is lost.
    pub lost_after: Span,
    /// Which of two stays when the node is back.
    #[serde(default)]
    pub keep: Keep,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Keep {
    /// The copy that was cut off, unless it is of an older release or not well.
    #[default]
    Original,
    /// What replaced it.
    Newest,
}

impl Reader<'_> {
    pub fn update(&mut self, node: Option<&Node>, min_ready: Span) -> Update {
        let mut update = Update { min_ready, ..Update::default() };
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
                    update.percent = get("percent").and_then(|n| r.integer("percent", n, 1, 100)).map(|n| n as u32);
                    update.deadline = get("deadline").and_then(|n| r.span("deadline", n)).unwrap_or(update.deadline);
                    update.min_ready = get("min_ready").and_then(|n| r.span("min_ready", n)).unwrap_or(update.min_ready);
                    update.max_surge = get("max_surge").and_then(|n| r.amount("max_surge", n));
                    update.max_unavailable = get("max_unavailable").and_then(|n| r.amount("max_unavailable", n));
                    update.canary = get("canary").and_then(|n| r.amount("canary", n)).unwrap_or(update.canary);
                    update.steps = get("steps").map(|n| r.steps("steps", n)).unwrap_or_default();
                    update.hold = get("hold").and_then(|n| r.span("hold", n)).unwrap_or(update.hold);
                    update.auto_promote = get("auto_promote").and_then(|n| r.flag("auto_promote", n)).unwrap_or(true);
                    update.auto_rollback = get("auto_rollback").and_then(|n| r.flag("auto_rollback", n)).unwrap_or(true);
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

    fn flag(&mut self, key: &str, node: &Node) -> Option<bool> {
        if let Value::Bool(given) = node.value {
            return Some(given);
        }
        let message = format!("`{}` must be true or false, not {}", self.label(key), node.value.kind());
        self.error(&node.span, Some(key), message);
        None
    }

    /// `2` or `"25%"`.
    fn amount(&mut self, key: &str, node: &Node) -> Option<Amount> {
        match &node.value {
            Value::Integer(n) if (0..=10_000).contains(n) => Some(Amount::Count(*n as u32)),
            Value::Text(text) if text.strip_suffix('%').and_then(|n| n.trim().parse::<u32>().ok()).is_some_and(|n| n <= 100) => {
                text.strip_suffix('%').and_then(|n| n.trim().parse().ok()).map(Amount::Percent)
            }
            other => {
                let shown = match other {
                    Value::Text(text) => format!("\"{}\"", printable(text)),
                    Value::Integer(n) => n.to_string(),
                    other => other.kind().to_owned(),
                };
                let message = format!("`{}` must be a number of copies or a share such as \"25%\", not {shown}", self.label(key));
                self.error(&node.span, Some(key), message);
                None
            }
        }
    }

    fn steps(&mut self, key: &str, node: &Node) -> Vec<CanaryStep> {
        let label = self.label(key);
        let Value::List(items) = &node.value else {
            let message = format!("`{label}` must be a list of steps, not {}", node.value.kind());
            self.error(&node.span, Some(key), message).hint = Some("for example steps = [{ weight = 10, bake = \"5m\" }]".into());
            return Vec::new();
        };
        let mut steps = Vec::new();
        for (n, item) in items.iter().enumerate().take(STEPS_MAX + 1) {
            let at = format!("{key}.{n}");
            let Some(entries) = self.table(&at, item) else { continue };
            self.within(&at, |r| {
                r.unknown(entries, &["weight", "bake"], &label);
                let get = |name: &str| entries.iter().find(|e| e.key == name).map(|e| &e.node);
                let weight = get("weight").and_then(|n| r.integer("weight", n, 0, 100));
                let bake = get("bake").and_then(|n| r.span("bake", n));
                if get("weight").is_none() {
                    r.error(&item.span, None, format!("a step of `{label}` says no weight")).hint =
                        Some("for example { weight = 10, bake = \"5m\" }".into());
                }
                if let Some(weight) = weight {
                    steps.push(CanaryStep { weight: weight as u32, bake: bake.unwrap_or(Update::STEP.bake) });
                }
            });
        }
        steps
    }

    pub fn after(&mut self, node: Option<&Node>) -> Vec<Name> {
        let Some(node) = node else { return Vec::new() };
        if matches!(node.value, Value::Text(_)) {
            return self.name("after", node).into_iter().collect();
        }
        let given = self.list("after", node);
        given.iter().filter_map(|text| self.parsed("after", node, text)).collect()
    }

    /// A command line, or a table of `run` and `timeout`.
    pub fn release_command(&mut self, node: &Node) -> Option<ReleaseStep> {
        const TIMEOUT: Span = Span::secs(600);
        if !matches!(node.value, Value::Table(_)) {
            return self.words("release_command", node).map(|run| ReleaseStep { run, timeout: TIMEOUT });
        }
        let f = self.nested("release_command", Some(node))?;
        self.within("release_command", |r| {
            let timeout = f.get("timeout").and_then(|n| r.span("timeout", n)).unwrap_or(TIMEOUT);
            match f.get("run") {
                Some(n) => r.words("run", n).map(|run| ReleaseStep { run, timeout }),
                None => {
                    r.error(&node.span, None, "`release_command` says nothing to run");
                    None
                }
            }
        })
    }

    pub fn disconnect(&mut self, node: &Node) -> Option<Disconnect> {
        let f = self.nested("disconnect", Some(node))?;
        self.within("disconnect", |r| {
            let keep = match f.get("keep").and_then(|n| Some((n, r.text("keep", n)?))) {
                None => Keep::default(),
                Some((_, text)) if text == "original" => Keep::Original,
                Some((_, text)) if text == "newest" => Keep::Newest,
                Some((n, text)) => {
                    let message = format!("`disconnect.keep` is \"original\" or \"newest\", not \"{}\"", printable(&text));
                    r.error(&n.span, Some("keep"), message);
                    Keep::default()
                }
            };
            match f.get("lost_after") {
                Some(n) => r.span("lost_after", n).map(|lost_after| Disconnect { lost_after, keep }),
                None => {
                    r.error(&node.span, None, "`disconnect` says no `lost_after`").hint = Some("for example lost_after = \"10m\"".into());
                    None
                }
            }
        })
    }
}

/// The rules of an update and of what goes with it.
pub(super) fn check(rules: &mut Rules, spec: &WorkloadSpec) {
    let Update {
        strategy,
        parallel,
        percent: _,
        deadline,
        min_ready,
        max_surge,
        max_unavailable,
        canary,
        steps,
        hold,
        auto_promote: _,
        auto_rollback: _,
        after,
        release,
    } = &spec.update;
    rules.want((1..=1000).contains(parallel), "update.parallel", || "`update.parallel` must be from 1 to 1000".into());
    rules.spans("update", &[("deadline", *deadline), ("min_ready", *min_ready)]);
    rules.want(*deadline >= Span::secs(1), "update.deadline", || "`update.deadline` must be at least 1s".into());
    let percent_fits = |amount: &Amount| !matches!(amount, Amount::Percent(n) if *n > 100);
    for (field, amount) in [("max_surge", max_surge), ("max_unavailable", max_unavailable), ("canary", &Some(*canary))] {
        let path = format!("update.{field}");
        rules.want(amount.as_ref().is_none_or(percent_fits), &path, || format!("`{path}` is more than 100%"));
    }
    let none = |amount: &Option<Amount>| amount.is_some_and(|a| a.at_most(spec.copies.unwrap_or(100).max(1)) == 0);
    rules.want(!(none(max_surge) && none(max_unavailable)), "update.max_surge", || {
        "`update.max_surge` and `update.max_unavailable` both come to 0, so no copy could ever move".into()
    });
    if *strategy == Strategy::Canary {
        rules.want(canary.of(100) > 0, "update.canary", || "`update.canary` must be at least 1".into());
        rules.want(spec.copies.is_none_or(|copies| copies == 0 || canary.of(copies) <= copies), "update.canary", || {
            format!("`update.canary` is more than the {} copies of the workload", spec.copies.unwrap_or(0))
        });
    }
    rules.want(steps.len() <= STEPS_MAX, "update.steps", || format!("at most {STEPS_MAX} steps"));
    rules.want(steps.iter().all(|s| s.weight <= 100), "update.steps", || "a step's weight is at most 100".into());
    rules.want(steps.is_sorted_by_key(|s| s.weight), "update.steps", || {
        "the weight of a step must not be below that of the one before".into()
    });
    rules.want(steps.iter().all(|s| s.bake <= WAIT_MAX), "update.steps", || "a step bakes at most a week".into());
    rules.want(*hold <= WAIT_MAX, "update.hold", || "`update.hold` is at most a week".into());
    rules.want(after.len() <= AFTER_MAX, "after", || format!("at most {AFTER_MAX} workloads in `after`"));
    if let Some(ReleaseStep { run, timeout }) = release {
        let names_it = match run {
            Run::Argv(argv) => argv.first().is_some_and(|p| !p.is_empty()),
            Run::Shell(line) => !line.trim().is_empty(),
        };
        rules.want(names_it, "release_command", || "`release_command` names no program".into());
        rules.want((Span::secs(1)..=DAY).contains(timeout), "release_command", || {
            "the timeout of `release_command` must be from 1s to 24h".into()
        });
        rules.want(spec.kind == super::types::Kind::Service, "release_command", || "only a service has a `release_command`".into());
    }
    if let Some(Disconnect { lost_after, keep: _ }) = &spec.disconnect {
        rules.want(*lost_after <= WAIT_MAX, "disconnect.lost_after", || "`disconnect.lost_after` is at most a week".into());
    }
}

/// A circle of `after` through `start`, as the names along it.
pub fn after_circle<'a>(after: impl Fn(&Name) -> &'a [Name], start: &Name) -> Option<Vec<Name>> {
    let mut path = vec![start.clone()];
    let mut seen = std::collections::BTreeSet::new();
    let mut pending: Vec<(usize, &Name)> = after(start).iter().map(|next| (1, next)).collect();
    while let Some((depth, next)) = pending.pop() {
        path.truncate(depth);
        path.push(next.clone());
        if next == start {
            return Some(path);
        }
        if seen.insert(next.clone()) {
            pending.extend(after(next).iter().map(|further| (depth + 1, further)));
        }
    }
    None
}
