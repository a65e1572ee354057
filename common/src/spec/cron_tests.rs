#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

fn table(cron: &str, zone: &str) -> Timetable {
    Timetable::of(&Schedule { timezone: zone.into(), ..Schedule::of(cron) }).unwrap()
}

fn at(text: &str) -> Timestamp {
    Timestamp(text.parse::<Instant>().unwrap().as_millisecond() as u64)
}

fn locals(cron: &str, zone: &str, after: &str, n: usize) -> Vec<String> {
    let table = table(cron, zone);
    let first = table.after(at(after));
    std::iter::successors(first, |last| table.after(last.at)).take(n).map(|i| i.local).collect()
}

#[test]
fn a_fixed_time_in_the_gap_runs_right_after_it() {
    assert_eq!(
        locals("30 2 * * *", "Europe/Berlin", "2026-03-28T00:00:00Z", 3),
        [
            "2026-03-28T02:30:00+01:00[Europe/Berlin]",
            "2026-03-29T03:00:00+02:00[Europe/Berlin]",
            "2026-03-30T02:30:00+02:00[Europe/Berlin]"
        ]
    );
}

#[test]
fn a_fixed_time_in_the_repeated_hour_runs_once() {
    assert_eq!(
        locals("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00Z", 2),
        ["2026-10-25T02:30:00+02:00[Europe/Berlin]", "2026-10-26T02:30:00+01:00[Europe/Berlin]"]
    );
}

#[test]
fn an_interval_goes_on_through_the_repeated_hour() {
    let found = locals("*/30 * * * *", "Europe/Berlin", "2026-10-24T23:59:00Z", 5);
    assert_eq!(found[..4].iter().map(|l| &l[11..22]).collect::<Vec<_>>(), ["02:00:00+02", "02:30:00+02", "02:00:00+01", "02:30:00+01"]);
    assert!(found[4].contains("T03:00"));
}

#[test]
fn what_is_no_schedule_is_refused_with_its_reason() {
    let refused = |cron: &str, zone: &str| Timetable::of(&Schedule { timezone: zone.into(), ..Schedule::of(cron) }).unwrap_err();
    assert!(matches!(refused("* * * *", "UTC"), CronError::Line(_)));
    assert!(matches!(refused("* * * * * *", "UTC"), CronError::Line(_)));
    assert!(matches!(refused("61 * * * *", "UTC"), CronError::Line(_)));
    assert!(matches!(refused("0 0 30 2 *", "UTC"), CronError::Line(_)));
    assert!(matches!(refused("0 0 * * *", "Europe/Berln"), CronError::Zone(_)));
    assert!(matches!(refused("0 0 * * *", "../../etc/passwd"), CronError::Zone(_)));
}

#[test]
fn the_newest_of_many_are_found_without_reading_all() {
    let table = table("* * * * *", "UTC");
    let (newest, more) = table.between(at("2020-01-01T00:00:00Z"), at("2026-01-01T00:00:30Z"), 3);
    assert!(more);
    assert_eq!(
        newest.iter().map(|i| i.at).collect::<Vec<_>>(),
        ["23:58", "23:59"].map(|t| at(&format!("2025-12-31T{t}:00Z"))).into_iter().chain([at("2026-01-01T00:00:00Z")]).collect::<Vec<_>>()
    );
    let (none, more) = table.between(at("2026-01-01T00:00:00Z"), at("2026-01-01T00:00:59Z"), 3);
    assert!(none.is_empty() && !more);
}

const ZONES: [&str; 8] = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "America/Sao_Paulo",
    "Australia/Lord_Howe", // half an hour
    "Asia/Kathmandu",
    "Africa/Casablanca", // changes around Ramadan
    "Pacific/Apia",      // skipped a whole day
];

/// Every minute a line with plain numbers names, told apart from croner: by asking each minute of the year what the
/// local clock shows.
fn expected(hour: i8, minute: i8, zone: &TimeZone, from: Timestamp, days: u64) -> Vec<Timestamp> {
    let mut found = Vec::new();
    let mut seen: Option<jiff::civil::Date> = None;
    let mut before: Option<Zoned> = None;
    for n in 0..=days * 24 * 60 {
        let now = Instant::from_millisecond((from.0 + n * 60_000) as i64).unwrap().to_zoned(zone.clone());
        let wanted = now.date().at(hour, minute, 0, 0);
        // The clock shows it, or has just jumped over it.
        let jumped = before.as_ref().is_some_and(|b| b.date() == now.date() && b.datetime() < wanted && now.datetime() > wanted);
        if (now.datetime() == wanted || jumped) && seen != Some(now.date()) {
            seen = Some(now.date());
            if n > 0 {
                found.push(Timestamp(from.0 + n * 60_000));
            }
        }
        before = Some(now);
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// In every zone and over every clock change: once a day, never missed, never doubled.
    #[test]
    fn a_daily_run_happens_once_each_day(zone in 0..ZONES.len(), hour in 0i8..24, minute in 0i8..60, day in 0u64..300) {
        let from = Timestamp(at("2026-01-01T00:00:00Z").0 + day * 86_400_000);
        let zone_of = zone_of(ZONES[zone]);
        let table = table(&format!("{minute} {hour} * * *"), ZONES[zone]);
        let until = Timestamp(from.0 + 120 * 86_400_000);
        let found: Vec<Timestamp> = table.all(from, until).iter().map(|i| i.at).collect();
        prop_assert_eq!(found, expected(hour, minute, &zone_of, from, 120));
    }

    /// Asking from any instant gives a later one, and none lies between.
    #[test]
    fn the_next_is_later_and_nothing_is_between(zone in 0..ZONES.len(), step in 1u32..60, offset in 0u64..31_536_000) {
        let table = table(&format!("*/{step} * * * *"), ZONES[zone]);
        let from = Timestamp(at("2026-01-01T00:00:00Z").0 + offset * 1000);
        let next = table.after(from).unwrap();
        prop_assert!(next.at > from);
        prop_assert_eq!(table.after(Timestamp(next.at.0 - 1)).unwrap(), next);
    }
}

fn zone_of(name: &str) -> TimeZone {
    super::zone(name).unwrap()
}
