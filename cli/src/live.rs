//! What a deployment looks like while it runs: one line a copy, redrawn on a terminal, or a
//! timestamped line for each change elsewhere.

use std::collections::BTreeMap;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use optimus_common::api::v1::{Allocation, Deployment, DeploymentPhase};
use optimus_common::protocol::{Phase, RELEASE_SLOT};
use optimus_common::time::Timestamp;
use optimus_common::{AllocId, DeploymentId};

use crate::error::printable;
use crate::output::{Paint, Terminal, age, clock_time};

/// Most copies shown of one deployment on a terminal; those not ready come first.
const COPIES_SHOWN_MAX: usize = 12;

/// A deployment and its copies as last seen.
#[derive(Debug, Clone)]
pub struct Progress {
    pub deployment: Deployment,
    /// Copies of the new release, and those of the old one that still are there.
    pub copies: Vec<Allocation>,
}

impl Progress {
    /// Copies of the release being deployed, in order.
    pub fn new_copies(&self) -> impl Iterator<Item = &Allocation> {
        self.copies.iter().filter(|copy| copy.release == self.deployment.release)
    }

    /// Copies to show: of the new release, or of the one it goes back to.
    fn shown(&self) -> Vec<&Allocation> {
        let release = match (self.deployment.phase, self.deployment.from_release) {
            (DeploymentPhase::RollingBack | DeploymentPhase::RolledBack, Some(from)) => from,
            _ => self.deployment.release,
        };
        let mut shown: Vec<&Allocation> = self.copies.iter().filter(|copy| copy.release == release && copy.desired_run).collect();
        shown.sort_by_key(|copy| (copy.index, copy.created_at));
        shown
    }
}

/// Where a copy stands, in a word or two.
pub fn stage(copy: &Allocation) -> &'static str {
    match copy.phase {
        _ if !copy.current => "unknown",
        Phase::Pending if copy.node.is_none() => "unplaced",
        Phase::Pending => "placed",
        Phase::Starting => "starting",
        Phase::Running if copy.index == RELEASE_SLOT => "running",
        Phase::Running if copy.ready => "ready",
        Phase::Running => "checking",
        Phase::Backoff => "restarting",
        Phase::Stopping => "stopping",
        Phase::Stopped => "stopped",
        Phase::Failed => "failed",
    }
}

/// A stage in the colour of what it means.
pub fn painted_stage(copy: &Allocation, paint: Paint, width: usize) -> String {
    let text = format!("{:<width$}", stage(copy));
    match stage(copy) {
        "ready" => paint.good(&text),
        "failed" | "restarting" | "unknown" => paint.bad(&text),
        "stopped" => paint.dim(&text),
        _ => paint.busy(&text),
    }
}

/// Why a copy is not ready, if there is more to say than its stage.
fn trouble(copy: &Allocation) -> Option<String> {
    let reason = copy.reason.as_ref().filter(|_| !copy.ready)?;
    (!reason.detail.is_calm()).then(|| printable(&reason.message))
}

/// Line of one deployment.
pub fn headline(deployment: &Deployment) -> String {
    let Deployment { key, release, ready, wanted, phase, from_release, reason, weight, .. } = deployment;
    let doing = match phase {
        DeploymentPhase::Succeeded => format!("succeeded, {ready}/{wanted} ready"),
        DeploymentPhase::Failed => "failed".to_owned(),
        DeploymentPhase::RollingBack => match from_release {
            Some(from) => format!("failed, going back to release {from}"),
            None => "failed, going back".to_owned(),
        },
        DeploymentPhase::RolledBack => match from_release {
            Some(from) => format!("rolled back to release {from}"),
            None => "rolled back".to_owned(),
        },
        DeploymentPhase::Superseded => "superseded by a newer deployment".to_owned(),
        DeploymentPhase::Cancelled => "cancelled".to_owned(),
        forward => {
            let phase = match forward {
                DeploymentPhase::Placing | DeploymentPhase::Starting | DeploymentPhase::Health => String::new(),
                other => format!("{}, ", other.word()),
            };
            let share = weight.map(|weight| format!(", {weight} % of the traffic")).unwrap_or_default();
            let waits = reason.as_ref().map(|reason| format!(", waiting: {}", printable(&reason.message))).unwrap_or_default();
            format!("{phase}{ready}/{wanted} ready{share}{waits}")
        }
    };
    format!("{key} release {release}: {doing}")
}

/// Line of one copy.
fn copy_line(copy: &Allocation, now: Timestamp, paint: Paint) -> String {
    let node = copy.node_name.as_deref().map(|node| format!("  on {node}")).unwrap_or_default();
    let restarts = if copy.restarts > 0 { format!("  restarts {}", copy.restarts) } else { String::new() };
    let why = trouble(copy).map(|why| format!("  {}", paint.dim(&why))).unwrap_or_default();
    format!("  {:<12} {} {:>4}{node}{restarts}{why}", copy.name, painted_stage(copy, paint, 10), age(now.since(copy.created_at)))
}

/// Shows progress on stderr until it is dropped.
pub enum View {
    Lines(Plain),
    Redrawn(Redrawn),
}

impl View {
    pub fn new(terminal: Terminal) -> Self {
        if terminal.stderr_tty { View::Redrawn(Redrawn::new(terminal)) } else { View::Lines(Plain::default_of(terminal)) }
    }

    pub fn show(&mut self, all: &BTreeMap<DeploymentId, Progress>, now: Timestamp) {
        match self {
            View::Lines(lines) => {
                for line in lines.changes(all, now) {
                    lines.terminal.note(&line);
                }
            }
            View::Redrawn(redrawn) => redrawn.draw(all, now),
        }
    }

    /// A word beside the progress.
    pub fn note(&self, text: &str) {
        match self {
            View::Lines(lines) => lines.terminal.note(&format!("{} {text}", clock_time(crate::output::now()))),
            // Fails only when stderr is gone.
            View::Redrawn(redrawn) => drop(redrawn.all.println(text)),
        }
    }
}

/// A line for each change.
pub struct Plain {
    terminal: Terminal,
    deployments: BTreeMap<DeploymentId, String>,
    copies: BTreeMap<AllocId, String>,
}

impl Plain {
    fn default_of(terminal: Terminal) -> Self {
        Plain { terminal, deployments: BTreeMap::new(), copies: BTreeMap::new() }
    }

    fn changes(&mut self, all: &BTreeMap<DeploymentId, Progress>, now: Timestamp) -> Vec<String> {
        let mut lines = Vec::new();
        let time = clock_time(now);
        for (id, progress) in all {
            let headline = headline(&progress.deployment);
            if self.deployments.get(id) != Some(&headline) {
                lines.push(format!("{time} {headline}"));
                self.deployments.insert(*id, headline);
            }
            for copy in progress.shown() {
                let node = copy.node_name.as_deref().map(|node| format!(" on {node}")).unwrap_or_default();
                let code = copy.reason.as_ref().map_or("", |reason| reason.code.as_str());
                let state = format!("{}{node} {} {code}", stage(copy), copy.restarts);
                if self.copies.insert(copy.id, state.clone()).as_ref() != Some(&state) {
                    let why = trouble(copy).map(|why| format!(": {why}")).unwrap_or_default();
                    lines.push(format!("{time}   {} {}{node}{why}", copy.name, stage(copy)));
                }
            }
        }
        lines
    }
}

/// Lines drawn over and over.
pub struct Redrawn {
    paint: Paint,
    all: MultiProgress,
    bars: Vec<ProgressBar>,
    style: ProgressStyle,
}

impl Redrawn {
    fn new(terminal: Terminal) -> Self {
        let style = ProgressStyle::with_template("{wide_msg}").expect("a constant template");
        Redrawn { paint: terminal.stderr_paint(), all: MultiProgress::new(), bars: Vec::new(), style }
    }

    fn draw(&mut self, all: &BTreeMap<DeploymentId, Progress>, now: Timestamp) {
        let lines: Vec<String> = all.values().flat_map(|progress| screen(progress, now, self.paint)).collect();
        while self.bars.len() > lines.len() {
            if let Some(bar) = self.bars.pop() {
                bar.finish_and_clear();
                self.all.remove(&bar);
            }
        }
        while self.bars.len() < lines.len() {
            let bar = self.all.add(ProgressBar::new_spinner().with_style(self.style.clone()));
            bar.enable_steady_tick(Duration::from_secs(1));
            self.bars.push(bar);
        }
        for (bar, line) in self.bars.iter().zip(lines) {
            bar.set_message(line);
        }
    }
}

impl Drop for Redrawn {
    fn drop(&mut self) {
        for bar in &self.bars {
            bar.abandon(); // the last state stays on the screen
        }
    }
}

/// What is on the screen for one deployment.
fn screen(progress: &Progress, now: Timestamp, paint: Paint) -> Vec<String> {
    let deployment = &progress.deployment;
    let time = age(deployment.ended_at.unwrap_or(now).since(deployment.created_at));
    let mut lines = vec![format!("{}  {}", paint.bold(&headline(deployment)), paint.dim(&time))];
    let mut shown = progress.shown();
    let hidden = shown.len().saturating_sub(COPIES_SHOWN_MAX);
    if hidden > 0 {
        shown.sort_by_key(|copy| (copy.ready, copy.index));
        shown.truncate(COPIES_SHOWN_MAX);
    }
    lines.extend(shown.into_iter().map(|copy| copy_line(copy, now, paint)));
    if hidden > 0 {
        lines.push(format!("  and {hidden} more"));
    }
    lines
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use optimus_common::{Name, NodeId, WorkloadKey};
    use uuid::Uuid;

    fn key() -> WorkloadKey {
        WorkloadKey { project: Name::new("shop").unwrap(), environment: Name::new("dev").unwrap(), workload: Name::new("web").unwrap() }
    }

    fn deployment(phase: DeploymentPhase, ready: u32) -> Deployment {
        Deployment {
            id: DeploymentId(Uuid::from_u128(1)),
            key: key(),
            release: 2,
            from_release: Some(1),
            phase,
            ready,
            wanted: 2,
            created_at: Timestamp(1_000),
            ended_at: None,
            deadline_at: None,
            reason: None,
            trigger: "deploy".into(),
            since: None,
            strategy: "rolling".into(),
            weight: None,
            steps: vec![],
            paused: false,
            release_step: None,
            traffic: None,
            promoted: true,
        }
    }

    fn copy(index: u32, release: u64, phase: Phase, ready: bool) -> Allocation {
        Allocation {
            id: AllocId(Uuid::from_u128(u128::from(index) + 10 * u128::from(release))),
            key: key(),
            name: format!("web-{index}"),
            index,
            release,
            node: Some(NodeId(Uuid::from_u128(9))),
            node_name: Some("host-1".into()),
            desired_run: true,
            phase,
            ready,
            current: true,
            restarts: 0,
            pid: None,
            ports: BTreeMap::new(),
            endpoint: None,
            created_at: Timestamp(2_000),
            started_at: None,
            reason: None,
            last_exit: None,
            unenforced: vec![],
            last_lines: vec![],
            limits: None,
            devices: vec![],
            volumes: vec![],
        }
    }

    #[test]
    fn the_screen_has_a_line_for_each_new_copy() {
        let progress = Progress {
            deployment: deployment(DeploymentPhase::Starting, 1),
            copies: vec![copy(1, 2, Phase::Starting, false), copy(0, 2, Phase::Running, true), copy(1, 1, Phase::Running, true)],
        };
        assert_eq!(
            screen(&progress, Timestamp(5_000), Paint(false)),
            [
                "shop/dev/web release 2: 1/2 ready  4s",
                "  web-0        ready        3s  on host-1",
                "  web-1        starting     3s  on host-1",
            ]
        );
    }

    #[test]
    fn a_large_deployment_shows_what_is_not_ready_first() {
        let mut copies: Vec<Allocation> = (0..30).map(|index| copy(index, 2, Phase::Running, true)).collect();
        copies[29].ready = false;
        let lines = screen(&Progress { deployment: deployment(DeploymentPhase::Starting, 1), copies }, Timestamp(5_000), Paint(false));
        assert_eq!(lines.len(), 1 + COPIES_SHOWN_MAX + 1);
        assert!(lines[1].contains("web-29") && lines[1].contains("checking"), "{lines:?}");
        assert_eq!(lines.last().unwrap(), "  and 18 more");
    }

    #[test]
    fn plain_lines_appear_once_for_each_change() {
        let mut plain = Plain::default_of(Terminal::detect(crate::output::ColorChoice::Never, false));
        let id = DeploymentId(Uuid::from_u128(1));
        let mut all = BTreeMap::from([(
            id,
            Progress { deployment: deployment(DeploymentPhase::Starting, 0), copies: vec![copy(0, 2, Phase::Starting, false)] },
        )]);
        assert_eq!(plain.changes(&all, Timestamp(0)).len(), 2);
        assert!(plain.changes(&all, Timestamp(1)).is_empty());
        if let Some(progress) = all.get_mut(&id) {
            progress.copies[0].phase = Phase::Running;
            progress.copies[0].ready = true;
        }
        let lines = plain.changes(&all, Timestamp(2));
        assert!(lines.len() == 1 && lines[0].ends_with("web-0 ready on host-1"), "{lines:?}");
    }
}
