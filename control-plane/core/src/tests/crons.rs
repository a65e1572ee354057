//! Schedules: which runs start, over clock changes and while nobody leads.

use optimus_common::spec::{Missed, Overlap, Timetable};
use proptest::prelude::*;

use super::fleet::*;
use super::*;

fn at(text: &str) -> Timestamp {
    let json = format!("\"{text}\"");
    serde_json::from_str(&json).unwrap()
}

fn scheduled(line: &str, set: impl FnOnce(&mut Schedule)) -> WorkloadSpec {
    let mut schedule = Schedule::of(line);
    set(&mut schedule);
    WorkloadSpec { runs: Some(Runs { keep: 200, ..Runs::of(Some(&schedule)) }), schedule: Some(schedule), ..job() }
}

fn due(fleet: &Fleet, name: &str) -> Vec<Timestamp> {
    fleet.runs(name).iter().filter_map(|r| r.scheduled_for).collect()
}

#[test]
fn a_run_starts_each_minute_and_has_the_id_of_its_instant() {
    let mut fleet = Fleet::new(1);
    let began = fleet.now;
    fleet.deploy("tick", scheduled("* * * * *", |_| {}));
    fleet.pass(185);
    assert_eq!(due(&fleet, "tick"), [60, 120, 180].map(|s| began + Span::secs(s)));
    let run = &fleet.runs("tick")[0];
    assert_eq!((run.id, run.phase), (scheduled_run_id(&key("tick"), began + Span::secs(60)), RunPhase::Succeeded));
    assert_eq!(run.local.as_deref(), Some("2026-01-01T00:01:00+00:00[UTC]"));
    fleet.replays();
}

#[test]
fn a_run_that_is_due_while_another_is_active_follows_the_policy() {
    for (overlap, expected) in [
        (Overlap::Forbid, vec![RunPhase::Active]),
        (Overlap::Replace, vec![RunPhase::Cancelled, RunPhase::Cancelled, RunPhase::Active]),
        (Overlap::Allow, vec![RunPhase::Active; 3]),
    ] {
        let mut fleet = Fleet::new(3);
        fleet.work("slow", Work { takes: Span::secs(1000), ..Work::default() });
        fleet.deploy("slow", scheduled("* * * * *", |s| s.overlap = overlap));
        fleet.pass(185);
        assert_eq!(fleet.phases("slow"), expected, "{overlap:?}");
        let live = fleet.state.allocs_of(&key("slow")).filter(|a| a.run && !a.phase().is_terminal()).count();
        assert_eq!(live, if overlap == Overlap::Allow { 3 } else { 1 });
        let skipped = fleet.state.job(&key("slow")).unwrap().skipped;
        assert_eq!(skipped, if overlap == Overlap::Forbid { 2 } else { 0 });
    }
}

#[test]
fn what_was_missed_without_a_leader_is_made_up_for_as_the_schedule_says() {
    let hours = |list: &[u64], began: Timestamp| list.iter().map(|h| began + Span::secs(h * 3600)).collect::<Vec<_>>();
    for (missed, expected) in [(Missed::Skip, vec![1, 7]), (Missed::RunOnce, vec![1, 6, 7]), (Missed::RunAll, vec![1, 2, 3, 4, 5, 6, 7])] {
        let mut fleet = Fleet::new(1);
        let began = fleet.now;
        fleet.deploy("hourly", scheduled("0 * * * *", |s| s.missed = missed));
        fleet.pass_by(3600 + 600, 60);
        fleet.leader = false;
        fleet.now = began + Span::secs(6 * 3600 + 1800);
        fleet.leader = true;
        fleet.pass_by(3600, 5);
        assert_eq!(due(&fleet, "hourly"), hours(&expected, began), "{missed:?}");
        assert!(fleet.phases("hourly").iter().all(|p| *p == RunPhase::Succeeded));
        fleet.replays();
    }
}

#[test]
fn a_missed_run_does_not_start_beside_one_that_is_active() {
    let mut fleet = Fleet::new(1);
    fleet.work("hourly", Work { takes: Span::secs(20_000), ..Work::default() });
    fleet.deploy("hourly", scheduled("0 * * * *", |_| {}));
    fleet.pass_by(3660, 60);
    fleet.now = fleet.now + Span::secs(3 * 3600);
    fleet.pass(5);
    assert_eq!(fleet.phases("hourly"), [RunPhase::Active]);
}

#[test]
fn a_stopped_job_misses_nothing() {
    let mut fleet = Fleet::new(1);
    fleet.deploy("hourly", scheduled("0 * * * *", |s| s.missed = Missed::RunAll));
    fleet.pass(5);
    fleet.apply(Command::StopWorkload { key: key("hourly") });
    fleet.pass_by(5 * 3600, 600);
    let deployment = DeploymentId(id(99));
    fleet.apply(Command::Restart { key: key("hourly"), deployment });
    fleet.pass(5);
    assert!(fleet.runs("hourly").is_empty());
}

#[test]
fn a_new_release_at_the_very_second_loses_no_run() {
    let mut fleet = Fleet::new(1);
    let spec = scheduled("* * * * *", |_| {});
    let began = fleet.now;
    fleet.deploy("tick", spec.clone());
    fleet.pass(59);
    fleet.leader = false;
    fleet.now = fleet.now + Span::secs(2);
    fleet.deploy("tick", again(spec, 2));
    fleet.leader = true;
    fleet.pass(3);
    assert_eq!(due(&fleet, "tick"), [began + Span::secs(60)]);
}

#[test]
fn an_instant_has_one_run_however_often_it_is_proposed() {
    let mut fleet = Fleet::new(1);
    fleet.deploy("tick", scheduled("* * * * *", |s| s.overlap = Overlap::Allow));
    fleet.pass(5);
    fleet.now = fleet.now + Span::secs(58);
    let outcome = reconciler::reconcile(&fleet.state, fleet.now, &mut || AllocId(id(5)));
    for _ in 0..3 {
        // What an earlier leader proposed and a later one proposes again.
        outcome.commands.iter().for_each(|command| drop(fleet.apply(command.clone())));
    }
    fleet.pass(5);
    assert_eq!(fleet.runs("tick").len(), 1);
}

#[test]
fn jitter_is_the_same_for_everyone_and_within_its_bound() {
    let mut schedule = Schedule::of("0 * * * *");
    schedule.jitter = Span::secs(300);
    let dues: Vec<Due> = std::iter::successors(crate::jobs::next_due(&key("j"), &schedule, at("2026-01-01T00:00:00Z")), |d| {
        crate::jobs::next_due(&key("j"), &schedule, d.at)
    })
    .take(50)
    .collect();
    assert!(dues.iter().all(|d| d.start_at >= d.at && d.start_at <= d.at + schedule.jitter));
    let different: std::collections::BTreeSet<u64> = dues.iter().map(|d| d.start_at.since(d.at).0).collect();
    assert!(different.len() > 40);
}

const ZONES: [&str; 5] = ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Africa/Casablanca"];
const LINES: [&str; 5] = ["30 2 * * *", "0 */2 * * *", "15,45 1-3 * * *", "0 3 * * 0", "*/20 * * * *"];
/// Days around clock changes of these zones.
const BEGINS: [&str; 4] = ["2026-03-07T12:00:00Z", "2026-03-28T12:00:00Z", "2026-10-24T12:00:00Z", "2026-10-31T12:00:00Z"];

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 8, ..ProptestConfig::default() })]

    /// Whatever leaders come and go: no instant has two runs, each that had a leader in time has one, and with
    /// `run_all` all have.
    #[test]
    fn no_run_is_doubled_or_lost(
        zone in 0..ZONES.len(), line in 0..LINES.len(), begin in 0..BEGINS.len(),
        outages in prop::collection::vec((1u64..8, 1u64..10), 1..8), all in any::<bool>(),
    ) {
        let mut fleet = Fleet::at(2, at(BEGINS[begin]));
        fleet.work("j", Work { takes: Span::secs(1), ..Work::default() });
        let spec = scheduled(LINES[line], |s| {
            s.timezone = ZONES[zone].into();
            s.overlap = Overlap::Allow;
            s.missed = if all { Missed::RunAll } else { Missed::Skip };
        });
        let table = Timetable::of(spec.schedule.as_ref().unwrap()).unwrap();
        let began = fleet.now;
        fleet.deploy("j", spec);
        fleet.pass_by(30, 10);
        let mut led: Vec<(Timestamp, Timestamp)> = vec![];
        for (with, without) in outages {
            let from = fleet.now;
            fleet.pass_by(with * 3600, 30);
            led.push((from, fleet.now));
            fleet.now = fleet.now + Span::secs(without * 3600 + 17);
        }
        fleet.pass_by(120, 10);
        let (due, _) = table.between(began, fleet.now, 10_000);
        let runs = due_all(&fleet);
        let unique: std::collections::BTreeSet<Timestamp> = runs.iter().copied().collect();
        prop_assert_eq!(unique.len(), runs.len(), "an instant has two runs");
        for instance in due {
            let in_time = led.iter().any(|(from, to)| (*from + Span::secs(1)..=*to).contains(&instance.at));
            // At most 50 of one outage are made up for; the longest here has 30.
            if in_time || all {
                prop_assert!(unique.contains(&instance.at), "{} has no run", instance.local);
            }
        }
        fleet.replays();
    }
}

fn due_all(fleet: &Fleet) -> Vec<Timestamp> {
    // History is bounded, the log is not: count what was ever started.
    let mut found: Vec<Timestamp> = Vec::new();
    let mut state = State::default();
    let mut seen = 0;
    for (index, proposal) in &fleet.log {
        state.apply(*index, proposal.clone());
        for run in state.runs_of(&key("j")).filter(|r| r.number > seen) {
            found.extend(run.scheduled_for);
        }
        seen = state.job(&key("j")).map_or(0, |row| row.newest);
    }
    found
}
