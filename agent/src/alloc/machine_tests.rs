//! Stories and properties of the allocation machine.
#![allow(clippy::unwrap_used)]

use optimus_common::reason::Exit;
use optimus_common::spec::Restart;
use proptest::prelude::*;

use super::*;

fn policy() -> Policy {
    Policy {
        restart: Restart { delay: Span::secs(1), delay_max: Span::secs(60), reset_after: Span::secs(60) },
        stop_grace: Span::secs(10),
        run_once: false,
        timeout: None,
        start_max: START_DEADLINE,
    }
}

fn at(ms: u64) -> Now {
    Now { wall: Timestamp(1_000_000 + ms), mono: Duration::from_millis(ms) }
}

fn exited(code: i32, ran_for: Span) -> Reason {
    Reason::Exited { exit: Exit { code: Some(code), signal: None, oom: None, at: Timestamp(1), ran_for } }
}

fn ended(attempt: u32, code: i32) -> Event {
    Event::Ended { attempt, reason: exited(code, Span::millis(5)), jitter: 0.0 }
}

#[test]
fn a_killed_copy_is_started_again_at_once_and_then_ever_later() {
    let mut m = Machine::new(policy(), 0);
    assert_eq!(m.on(Event::Launch { attempt: 1 }, at(0)).unwrap(), [Action::Start { attempt: 1 }]);
    m.on(Event::Started { attempt: 1 }, at(1)).unwrap();
    assert_eq!(m.on(ended(1, 1), at(2)).unwrap(), [Action::Start { attempt: 2 }], "the first restart is at once");
    m.on(Event::Started { attempt: 2 }, at(3)).unwrap();
    assert_eq!(m.on(ended(2, 1), at(4)).unwrap(), []);
    assert_eq!(m.deadline(), Some(Duration::from_millis(1004)));
    assert_eq!(m.on(Event::Tick, at(1003)).unwrap(), [], "too early");
    assert_eq!(m.on(Event::Tick, at(1004)).unwrap(), [Action::Start { attempt: 3 }]);
    m.on(Event::Started { attempt: 3 }, at(1005)).unwrap();
    m.on(ended(3, 1), at(1006)).unwrap();
    assert_eq!(m.deadline(), Some(Duration::from_millis(3006)));
}

#[test]
fn a_crash_loop_shows_after_three_restarts_and_names_the_last_cause() {
    let mut m = Machine::new(policy(), 0);
    m.on(Event::Launch { attempt: 1 }, at(0)).unwrap();
    let mut now = 0;
    for attempt in 1..=4 {
        m.on(Event::Started { attempt }, at(now)).unwrap();
        m.on(ended(attempt, 7), at(now)).unwrap();
        if attempt < 4 {
            now = m.deadline().unwrap().as_millis() as u64;
            m.on(Event::Tick, at(now)).unwrap();
        }
    }
    let State::Backoff { reason: Reason::CrashLoop { restarts, next_start, last }, .. } = m.state() else { panic!("{:?}", m.state()) };
    assert_eq!(*restarts, 3);
    assert_eq!(*next_start, at(now + 4000).wall);
    assert_eq!(**last, exited(7, Span::millis(5)));
}

#[test]
fn a_copy_that_was_up_for_long_starts_its_back_off_afresh() {
    let mut m = Machine::new(policy(), 5);
    m.on(Event::Recovered { attempt: 6, up: Duration::from_secs(3) }, at(0)).unwrap();
    let after_an_hour = Event::Ended { attempt: 6, reason: exited(1, Span::secs(3600)), jitter: 0.9 };
    assert_eq!(m.on(after_an_hour, at(3_600_000)).unwrap(), [Action::Start { attempt: 7 }]);
    assert_eq!(m.row(), 1);
}

#[test]
fn a_stop_while_starting_waits_for_the_start_and_ends_it() {
    let mut m = Machine::new(policy(), 0);
    m.on(Event::Launch { attempt: 1 }, at(0)).unwrap();
    assert_eq!(m.on(Event::StopRequested, at(1)).unwrap(), []);
    assert_eq!(m.on(Event::Started { attempt: 1 }, at(2)).unwrap(), [Action::Stop { attempt: 1 }]);
    assert_eq!(m.on(Event::Tick, at(15_002)).unwrap(), [Action::Kill { attempt: 1 }], "grace and margin have passed");
    assert_eq!(m.on(Event::Tick, at(20_002)).unwrap(), [Action::Kill { attempt: 1 }], "and again");
    m.on(ended(1, 0), at(20_003)).unwrap();
    assert_eq!(*m.state(), State::Stopped { reason: Reason::StopRequested });
}

#[test]
fn a_start_that_never_answers_is_killed_and_tried_again() {
    let mut m = Machine::new(policy(), 1);
    m.on(Event::Launch { attempt: 1 }, at(0)).unwrap();
    assert_eq!(m.on(Event::Tick, at(30_000)).unwrap(), [Action::Kill { attempt: 1 }]);
    let gone = Event::Ended { attempt: 1, reason: Reason::ExitUnknown { what: "killed".into() }, jitter: 0.0 };
    m.on(gone, at(30_001)).unwrap();
    assert!(matches!(m.state(), State::Backoff { attempt: 2, reason: Reason::StartFailed { .. }, .. }), "{:?}", m.state());
}

#[test]
fn a_port_taken_by_a_stranger_fails_the_copy_for_good() {
    let mut m = Machine::new(policy(), 0);
    m.on(Event::Launch { attempt: 1 }, at(0)).unwrap();
    let reason = Reason::PortTaken { port: 20_001, holder: None };
    m.on(Event::StartFailed { attempt: 1, reason: reason.clone(), elsewhere: true, jitter: 0.0 }, at(1)).unwrap();
    assert_eq!(*m.state(), State::Failed { reason });
    assert_eq!(m.on(Event::StopRequested, at(2)).unwrap(), []);
}

#[test]
fn a_job_that_exits_zero_is_done() {
    let mut m = Machine::new(Policy { run_once: true, ..policy() }, 0);
    m.on(Event::Launch { attempt: 1 }, at(0)).unwrap();
    m.on(Event::Started { attempt: 1 }, at(1)).unwrap();
    assert_eq!(m.on(ended(1, 0), at(2)).unwrap(), []);
    assert!(m.is_final());
}

fn job(timeout: Option<Span>) -> Machine {
    let mut m = Machine::new(Policy { run_once: true, timeout, ..policy() }, 0);
    m.on(Event::Launch { attempt: 1 }, at(0)).unwrap();
    m.on(Event::Started { attempt: 1 }, at(1)).unwrap();
    m
}

#[test]
fn a_job_that_fails_is_not_started_again_here() {
    let mut m = job(None);
    assert_eq!((m.deadline(), m.on(ended(1, 3), at(2)).unwrap()), (None, vec![]));
    assert_eq!(*m.state(), State::Failed { reason: exited(3, Span::millis(5)) });
    let mut m = Machine::new(Policy { run_once: true, ..policy() }, 0);
    m.on(Event::Launch { attempt: 1 }, at(0)).unwrap();
    let reason = Reason::CommandNotFound { command: "x".into() };
    m.on(Event::StartFailed { attempt: 1, reason: reason.clone(), elsewhere: false, jitter: 0.0 }, at(1)).unwrap();
    assert_eq!(*m.state(), State::Failed { reason });
}

#[test]
fn a_job_that_takes_too_long_is_stopped_and_has_failed() {
    let mut m = job(Some(Span::secs(60)));
    assert_eq!(m.deadline(), Some(Duration::from_millis(60_001)));
    assert_eq!(m.on(Event::Tick, at(60_000)).unwrap(), []);
    assert_eq!(m.on(Event::Tick, at(60_001)).unwrap(), [Action::Stop { attempt: 1 }]);
    assert_eq!(m.on(Event::Tick, at(75_001)).unwrap(), [Action::Kill { attempt: 1 }], "grace and margin have passed");
    m.on(ended(1, 0), at(75_002)).unwrap(); // too late to count as done
    assert_eq!(*m.state(), State::Failed { reason: Reason::TimedOut { after: Span::secs(60) } });
    // The time before the agent restarted counts.
    let mut m = Machine::new(Policy { run_once: true, timeout: Some(Span::secs(60)), ..policy() }, 0);
    m.on(Event::Recovered { attempt: 1, up: Duration::from_secs(50) }, at(100_000)).unwrap();
    assert_eq!(m.on(Event::Tick, at(110_000)).unwrap(), [Action::Stop { attempt: 1 }]);
}

#[test]
fn an_event_of_an_older_run_is_refused_and_changes_nothing() {
    let mut m = Machine::new(policy(), 0);
    m.on(Event::Launch { attempt: 1 }, at(0)).unwrap();
    m.on(Event::Started { attempt: 1 }, at(1)).unwrap();
    let before = m.clone();
    assert!(m.on(ended(9, 0), at(2)).is_err());
    assert!(m.on(Event::Launch { attempt: 1 }, at(2)).is_err());
    assert_eq!(m, before);
}

fn any_event() -> impl Strategy<Value = Event> {
    let attempt = 0u32..6;
    let reason = Just(exited(1, Span::millis(5)));
    prop_oneof![
        Just(Event::Launch { attempt: 1 }),
        (attempt.clone(), 0u64..100).prop_map(|(attempt, up)| Event::Recovered { attempt, up: Duration::from_secs(up) }),
        attempt.clone().prop_map(|attempt| Event::Started { attempt }),
        (attempt.clone(), reason.clone(), any::<bool>(), 0.0f64..1.0).prop_map(|(attempt, reason, elsewhere, jitter)| Event::StartFailed {
            attempt,
            reason,
            elsewhere,
            jitter
        }),
        (attempt.clone(), reason.clone(), 0.0f64..1.0).prop_map(|(attempt, reason, jitter)| Event::Ended { attempt, reason, jitter }),
        (attempt, reason).prop_map(|(attempt, reason)| Event::LivenessFailed { attempt, reason }),
        Just(Event::StopRequested),
        Just(Event::Tick),
    ]
}

/// A host that does what it is told, slowly and not always: what is really alive on it.
#[derive(Default)]
struct Host {
    starting: Option<u32>,
    running: Option<u32>,
}

impl Host {
    fn perform(&mut self, actions: &[Action]) {
        for action in actions {
            if let Action::Start { attempt } = action {
                assert!(self.starting.is_none() && self.running.is_none(), "two live runs");
                self.starting = Some(*attempt);
            }
        }
    }
    /// What happens next by itself, chosen by `dice`; always legal for what is alive.
    fn event(&mut self, dice: u8, jitter: f64) -> Event {
        if let Some(attempt) = self.starting {
            return match dice % 4 {
                0 => Event::Tick,
                1 => {
                    self.starting = None;
                    Event::StartFailed { attempt, reason: exited(1, Span(1)), elsewhere: dice > 250, jitter }
                }
                _ => {
                    self.running = self.starting.take();
                    Event::Started { attempt }
                }
            };
        }
        match self.running {
            Some(attempt) => match dice % 4 {
                0 => Event::LivenessFailed { attempt, reason: exited(2, Span(1)) },
                1 => Event::Tick,
                _ => {
                    self.running = None;
                    Event::Ended { attempt, reason: exited(1, Span(u64::from(dice))), jitter }
                }
            },
            None => Event::Tick,
        }
    }
}

proptest! {
    #[test]
    fn no_event_panics_and_refused_ones_change_nothing(events in prop::collection::vec((any_event(), 0u64..100_000), 0..40)) {
        let (mut m, mut now) = (Machine::new(policy(), 0), 0);
        for (event, pause) in events {
            now += pause;
            let before = m.clone();
            if m.on(event, at(now)).is_err() {
                prop_assert_eq!(&m, &before);
            }
            // A final state is never left, and every passing one has a deadline.
            if before.is_final() {
                prop_assert_eq!(m.state(), before.state());
            }
            let passing = matches!(m.state(), State::Starting { .. } | State::Ending { .. } | State::Backoff { .. });
            prop_assert_eq!(passing, m.deadline().is_some());
        }
    }

    #[test]
    fn there_are_never_two_live_runs_and_a_stop_always_ends(
        steps in prop::collection::vec((any::<u8>(), 0.0f64..1.0, 0u64..20_000), 0..60),
        ending in prop::collection::vec((any::<u8>(), 0.0f64..1.0), 1..20),
    ) {
        let (mut m, mut host, mut now) = (Machine::new(policy(), 0), Host::default(), 0);
        host.perform(&m.on(Event::Launch { attempt: 1 }, at(now)).unwrap());
        for (dice, jitter, pause) in steps {
            if m.is_final() { break }
            now += pause;
            let actions = m.on(host.event(dice, jitter), at(now)).unwrap();
            host.perform(&actions);
        }
        host.perform(&m.on(Event::StopRequested, at(now)).unwrap());
        // The host may dawdle, but in the end does what it is told.
        let dice = ending.into_iter().chain(std::iter::repeat_n((2, 0.0), 4));
        for (dice, jitter) in dice {
            if m.is_final() { break }
            now = m.deadline().map_or(now, |d| d.as_millis() as u64);
            let actions = m.on(host.event(dice, jitter), at(now)).unwrap();
            prop_assert!(!actions.iter().any(|a| matches!(a, Action::Start { .. })), "started after a stop");
        }
        prop_assert!(m.is_final(), "{:?}", m.state());
        prop_assert!(host.running.is_none() && host.starting.is_none());
    }
}
