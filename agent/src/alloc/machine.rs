//! The life of one allocation as a pure state machine.
//!
//! ```text
//!            Launch             Started                Ended (restart wished)
//!  Pending ----------> Starting --------> Running ------------------------------.
//!     | Recovered         |  ^             |   | LivenessFailed                  |
//!     '-------------------|--|-----------> |   '-----------> Ending(Restart) ----|
//!                         |  |                                                   v
//!             StartFailed |  '----------------------- due at once or by Tick: Backoff
//!                         '--> Backoff | Failed
//!
//!  StopRequested:  Pending, Backoff -> Stopped;  Starting, Running, Ending -> Ending(Stop) -> Ended -> Stopped
//! ```
//!
//! A copy of a job runs once: its end is `Stopped` (exit 0) or `Failed`, and `Running` ends at its timeout.
//!
//! Every other state but the last two and `Running` has a deadline: [`Machine::deadline`] says when the next
//! [`Event::Tick`] is due. At most one run is live at a time: [`Action::Start`] is only given when the
//! run before has ended. Events that do not fit are [`Illegal`] and change nothing.

use std::time::Duration;

use optimus_common::reason::Reason;
use optimus_common::spec::{Driver, Kind, WorkloadSpec};
use optimus_common::time::{Span, Timestamp};

use super::backoff;

/// Longest time from asking the driver to start until it must have answered; the driver's own
/// limits are shorter, so this one only fires when it is stuck.
pub const START_DEADLINE: Duration = Duration::from_secs(30);
/// Added to the stop grace before the agent itself kills what is left.
pub const STOP_MARGIN: Duration = Duration::from_secs(5);
/// Pause between two attempts to kill a run that does not end.
pub const KILL_AGAIN: Duration = Duration::from_secs(5);
/// From so many restarts in a row on the reason is a crash loop.
pub const CRASH_LOOP_FROM: u32 = 3;

/// Both clocks, read once by the caller. Deadlines use the monotonic one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    pub wall: Timestamp,
    pub mono: Duration,
}

/// What of a spec the machine obeys.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    pub restart: optimus_common::spec::Restart,
    pub stop_grace: Span,
    /// A job's copy has one run: exit 0 is done, anything else has failed, and whether there is another try the
    /// control plane decides. A service is started again.
    pub run_once: bool,
    /// Longest run.
    pub timeout: Option<Span>,
    /// Longest time for a start: [`START_DEADLINE`] and what fetching an image may take.
    pub start_max: Duration,
}

impl Policy {
    pub fn of(spec: &WorkloadSpec) -> Self {
        let fetching = match &spec.driver {
            Driver::Process => Duration::ZERO,
            Driver::Container(container) => container.pull_timeout.as_duration(),
        };
        Policy {
            restart: spec.restart,
            stop_grace: spec.stop.grace,
            run_once: spec.kind == Kind::Job,
            timeout: spec.timeout,
            start_max: START_DEADLINE + fetching,
        }
    }
}

/// What a run that is being ended is followed by.
#[derive(Debug, Clone, PartialEq)]
pub enum Goal {
    Stop,
    /// Start it again; the reason says why it was ended.
    Restart(Reason),
    /// It has failed and is not started again here.
    Fail(Reason),
}

#[derive(Debug, Clone, PartialEq)]
pub enum State {
    /// Taken over, nothing done yet.
    Pending,
    /// The driver prepares and starts `attempt`.
    Starting { attempt: u32, deadline: Duration, stop: bool },
    /// Ends by itself, but for a job's copy at the latest after its timeout.
    Running { attempt: u32, since: Duration },
    /// `attempt` was asked to end.
    Ending { attempt: u32, since: Option<Duration>, deadline: Duration, goal: Goal },
    /// Ended; `attempt` is started at `until`.
    Backoff { attempt: u32, until: Duration, reason: Reason },
    /// Ended as wished. Final.
    Stopped { reason: Reason },
    /// Cannot run here. Final.
    Failed { reason: Reason },
}

#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Nothing of it runs: start it as this attempt.
    Launch {
        attempt: u32,
    },
    /// A run of an earlier agent was found alive; it has been up for `up`.
    Recovered {
        attempt: u32,
        up: Duration,
    },
    Started {
        attempt: u32,
    },
    /// The driver could not start it; nothing is left of the try. `elsewhere`: no use trying again here.
    StartFailed {
        attempt: u32,
        reason: Reason,
        elsewhere: bool,
        jitter: f64,
    },
    /// The run and all its processes are gone.
    Ended {
        attempt: u32,
        reason: Reason,
        jitter: f64,
    },
    LivenessFailed {
        attempt: u32,
        reason: Reason,
    },
    StopRequested,
    /// The deadline may have passed.
    Tick,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    Start {
        attempt: u32,
    },
    /// Ask it to end: signal, grace, then kill; the driver reports the end.
    Stop {
        attempt: u32,
    },
    /// Kill every process of the run now.
    Kill {
        attempt: u32,
    },
}

/// An event that does not fit the state. Nothing has changed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("event {event:?} does not fit state {state:?}")]
pub struct Illegal {
    pub state: Box<State>,
    pub event: Box<Event>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Machine {
    policy: Policy,
    state: State,
    /// Restarts since the copy was last up for `reset_after`.
    row: u32,
}

impl Machine {
    /// A copy of which nothing runs, as far as known. `row`: restarts in a row so far (from the ledger).
    pub fn new(policy: Policy, row: u32) -> Self {
        Machine { policy, state: State::Pending, row }
    }

    /// One that ended before, so that its end is still told.
    pub fn ended(policy: Policy, state: State, row: u32) -> Self {
        Machine { policy, state, row }
    }

    pub fn state(&self) -> &State {
        &self.state
    }
    /// Restarts in a row.
    pub fn row(&self) -> u32 {
        self.row
    }
    pub fn is_final(&self) -> bool {
        matches!(self.state, State::Stopped { .. } | State::Failed { .. })
    }
    /// The run that may have processes.
    pub fn live(&self) -> Option<u32> {
        match &self.state {
            State::Starting { attempt, .. } | State::Running { attempt, .. } | State::Ending { attempt, .. } => Some(*attempt),
            _ => None,
        }
    }
    /// When the next [`Event::Tick`] is due.
    pub fn deadline(&self) -> Option<Duration> {
        match &self.state {
            State::Starting { deadline, .. } | State::Ending { deadline, .. } => Some(*deadline),
            State::Backoff { until, .. } => Some(*until),
            State::Running { since, .. } => self.policy.timeout.map(|most| *since + most.as_duration()),
            State::Pending | State::Stopped { .. } | State::Failed { .. } => None,
        }
    }

    /// Takes an event and says what to do. Starting is the last thing of an ended run: its [`Event::Ended`] came first.
    pub fn on(&mut self, event: Event, now: Now) -> Result<Vec<Action>, Illegal> {
        use State::*;
        let (state, actions) = match (self.state.clone(), event) {
            (Pending, Event::Launch { attempt }) => self.start(attempt, now),
            (Pending | Backoff { .. }, Event::Recovered { attempt, up }) => {
                (Running { attempt, since: now.mono.saturating_sub(up) }, vec![])
            }
            // What an earlier agent's run came to while nobody watched.
            (Pending, Event::Ended { attempt, reason, jitter }) => self.ended_run(attempt, Duration::ZERO, reason, jitter, now),
            (Pending, Event::StopRequested) => (Stopped { reason: Reason::StopRequested }, vec![]),
            (Backoff { .. }, Event::StopRequested) => (Stopped { reason: Reason::StopRequested }, vec![]),

            (Starting { attempt, stop: false, .. }, Event::Started { attempt: started }) if attempt == started => {
                (Running { attempt, since: now.mono }, vec![])
            }
            (Starting { attempt, stop: true, .. }, Event::Started { attempt: started }) if attempt == started => {
                self.ending(attempt, Some(now.mono), Goal::Stop, now)
            }
            (Starting { attempt, stop, .. }, Event::StartFailed { attempt: failed, reason, elsewhere, jitter }) if attempt == failed => {
                match (stop, elsewhere || self.policy.run_once) {
                    (true, _) => (Stopped { reason: Reason::StopRequested }, vec![]),
                    (false, true) => (Failed { reason }, vec![]),
                    (false, false) => self.back_off(attempt, reason, jitter, now),
                }
            }
            // A start that may take long (an image is fetched) is given up soon once nobody wants it.
            (Starting { attempt, deadline, stop: false }, Event::StopRequested) => {
                (Starting { attempt, deadline: deadline.min(now.mono + START_DEADLINE), stop: true }, vec![])
            }
            (Starting { attempt, deadline, stop }, Event::Tick) if now.mono >= deadline => {
                let stuck = Reason::StartFailed {
                    step: "start the process".into(),
                    error: format!("no answer within {:?}", self.policy.start_max),
                };
                let goal = if stop { Goal::Stop } else { self.again(stuck) };
                (Ending { attempt, since: None, deadline: now.mono + KILL_AGAIN, goal }, vec![Action::Kill { attempt }])
            }

            (Running { attempt, since }, Event::Ended { attempt: ended, reason, jitter }) if attempt == ended => {
                self.ended_run(attempt, now.mono.saturating_sub(since), reason, jitter, now)
            }
            (Running { attempt, since }, Event::LivenessFailed { attempt: failed, reason }) if attempt == failed => {
                self.ending(attempt, Some(since), self.again(reason), now)
            }
            (Running { attempt, since }, Event::Tick) if self.policy.timeout.is_some_and(|most| now.mono >= since + most.as_duration()) => {
                let after = self.policy.timeout.unwrap_or_default();
                self.ending(attempt, Some(since), Goal::Fail(Reason::TimedOut { after }), now)
            }
            (Running { attempt, since }, Event::StopRequested) => self.ending(attempt, Some(since), Goal::Stop, now),

            (Ending { attempt, goal: Goal::Stop, .. }, Event::Ended { attempt: ended, .. }) if attempt == ended => {
                (Stopped { reason: Reason::StopRequested }, vec![])
            }
            (Ending { attempt, goal: Goal::Fail(reason), .. }, Event::Ended { attempt: ended, .. }) if attempt == ended => {
                (Failed { reason }, vec![])
            }
            (Ending { attempt, since, goal: Goal::Restart(why), .. }, Event::Ended { attempt: ended, jitter, .. }) if attempt == ended => {
                self.note_uptime(since.map_or(Duration::ZERO, |s| now.mono.saturating_sub(s)));
                self.back_off(attempt, why, jitter, now)
            }
            // A start that was given up may still answer before it is gone.
            (state @ Ending { attempt, .. }, Event::Started { attempt: started }) if attempt == started => {
                (state, vec![Action::Kill { attempt }])
            }
            (Ending { attempt, goal, .. }, Event::StartFailed { attempt: failed, jitter, .. }) if attempt == failed => match goal {
                Goal::Stop => (Stopped { reason: Reason::StopRequested }, vec![]),
                Goal::Restart(why) => self.back_off(attempt, why, jitter, now),
                Goal::Fail(reason) => (Failed { reason }, vec![]),
            },
            (Ending { attempt, since, deadline, goal: Goal::Restart(_) | Goal::Fail(_) }, Event::StopRequested) => {
                (Ending { attempt, since, deadline, goal: Goal::Stop }, vec![])
            }
            (Ending { attempt, since, deadline, goal }, Event::Tick) if now.mono >= deadline => {
                (Ending { attempt, since, deadline: now.mono + KILL_AGAIN, goal }, vec![Action::Kill { attempt }])
            }
            // A probe's verdict on a run that is already being ended.
            (state @ Ending { attempt, .. }, Event::LivenessFailed { attempt: failed, .. }) if attempt == failed => (state, vec![]),

            (Backoff { attempt, until, .. }, Event::Tick) if now.mono >= until => self.start(attempt, now),

            // Asking again, and a timer that fired early or late, are harmless.
            (
                state @ (Starting { stop: true, .. } | Ending { goal: Goal::Stop, .. } | Stopped { .. } | Failed { .. }),
                Event::StopRequested,
            ) => (state, vec![]),
            (state, Event::Tick) => (state, vec![]),
            (state, event) => return Err(Illegal { state: Box::new(state), event: Box::new(event) }),
        };
        self.state = state;
        Ok(actions)
    }

    fn start(&self, attempt: u32, now: Now) -> (State, Vec<Action>) {
        (State::Starting { attempt, deadline: now.mono + self.policy.start_max, stop: false }, vec![Action::Start { attempt }])
    }

    fn ending(&self, attempt: u32, since: Option<Duration>, goal: Goal, now: Now) -> (State, Vec<Action>) {
        let deadline = now.mono + self.policy.stop_grace.as_duration() + STOP_MARGIN;
        (State::Ending { attempt, since, deadline, goal }, vec![Action::Stop { attempt }])
    }

    /// What follows the end of a run that did not go well.
    fn again(&self, why: Reason) -> Goal {
        if self.policy.run_once { Goal::Fail(why) } else { Goal::Restart(why) }
    }

    fn note_uptime(&mut self, up: Duration) {
        if up >= self.policy.restart.reset_after.as_duration() {
            self.row = 0;
        }
    }

    fn ended_run(&mut self, attempt: u32, up: Duration, reason: Reason, jitter: f64, now: Now) -> (State, Vec<Action>) {
        let (up, done) = match &reason {
            // The record knows better how long it was up than we do: it may have ended while we were away.
            Reason::Exited { exit } | Reason::OutOfMemory { exit, .. } => (exit.ran_for.as_duration(), exit.code == Some(0)),
            _ => (up, false),
        };
        if self.policy.run_once {
            return (if done { State::Stopped { reason } } else { State::Failed { reason } }, vec![]);
        }
        self.note_uptime(up);
        self.back_off(attempt, reason, jitter, now)
    }

    /// Counts the restart and waits for it, or starts at once if there is nothing to wait for.
    fn back_off(&mut self, attempt: u32, reason: Reason, jitter: f64, now: Now) -> (State, Vec<Action>) {
        let pause = backoff::delay(&self.policy.restart, self.row, jitter);
        self.row = self.row.saturating_add(1);
        let attempt = attempt.saturating_add(1);
        if pause.is_zero() {
            return self.start(attempt, now);
        }
        let reason = if self.row > CRASH_LOOP_FROM {
            Reason::CrashLoop { restarts: self.row - 1, next_start: now.wall + Span::from(pause), last: Box::new(reason) }
        } else {
            reason
        };
        (State::Backoff { attempt, until: now.mono + pause, reason }, vec![])
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
