//! The loop that asks one check of one run until it is dropped.

use std::sync::Arc;
use std::time::Duration;

use optimus_common::env::Clock;
use optimus_common::spec::{Check, Probe};
use tokio::sync::mpsc;

use super::check;
use super::probe_state::{ProbeState, Verdict};
use crate::driver::Run;

/// A first failure is not told before the run has had this long: until then "starting" says it better.
pub const QUIET: Duration = Duration::from_secs(1);

/// What a prober has to say. Only changes are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    Good,
    /// The check fails, but not often enough to count.
    Failing {
        probe: String,
        last: String,
    },
    /// It failed `unhealthy_after` times in a row.
    Bad {
        probe: String,
        last: String,
    },
}

/// What to ask, and where.
#[derive(Clone)]
pub struct Question {
    pub probe: Probe,
    /// Zero for a check that asks none.
    pub port: u16,
    /// Whom a command is given to.
    pub run: Arc<dyn Run>,
    /// When the run started, on the monotonic clock.
    pub started: Duration,
    /// Ask in quick succession until first good.
    pub eager: bool,
    /// It was good when last looked at.
    pub resumed_good: bool,
}

/// Asks for ever, telling `out` what changes; ends when `out` closes or its task is dropped.
pub async fn run(question: Question, clock: Arc<dyn Clock>, out: mpsc::Sender<Finding>) {
    let Question { probe, port, run, started, eager, resumed_good } = question;
    let mut state = if resumed_good { ProbeState::resumed_good(&probe) } else { ProbeState::new(&probe, eager) };
    let mut told: Option<Finding> = resumed_good.then_some(Finding::Good);
    loop {
        clock.sleep(state.pause()).await;
        let timeout = probe.timeout.as_duration();
        let answer = match &probe.check {
            Check::Command { argv } => check::ask_inside(&*run, argv, timeout).await,
            check => check::ask(check, port, timeout).await,
        };
        let up = clock.monotonic().saturating_sub(started);
        let before = state.verdict();
        let verdict = state.answer(answer.is_ok(), up);
        let finding = match (verdict, answer) {
            (Verdict::Good, _) => Finding::Good, // a few failures of a good copy are not told
            (Verdict::Bad, Err(last)) => Finding::Bad { probe: check::describe(&probe.check, port), last },
            (Verdict::Unknown, Err(last)) if up >= QUIET => Finding::Failing { probe: check::describe(&probe.check, port), last },
            (Verdict::Unknown | Verdict::Bad, _) => continue,
        };
        // A verdict of bad repeats after a good one in between; otherwise the same finding is told once.
        if told.as_ref() != Some(&finding) || verdict != before {
            if out.send(finding.clone()).await.is_err() {
                return;
            }
            told = Some(finding);
        }
    }
}
