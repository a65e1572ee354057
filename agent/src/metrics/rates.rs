//! From totals as the kernel counts them to the figures people read.

use std::time::Duration;

use optimus_common::{Figures, Timestamp};

use super::Metric;
use super::chunk::Row;

/// What the kernel says of a subject at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reading {
    pub at: Timestamp,
    /// The same moment on a clock that does not jump.
    pub mono: Duration,
    pub figures: Figures,
}

/// Shortest time a rate is told over: below it, ticks of the kernel's counters show more than use does.
const SHORTEST: Duration = Duration::from_millis(50);

/// The figures of `now`; rates are over the time since `before`, and missing without it.
///
/// A total that went back (the subject was replaced, a device was unplugged) has no rate this time.
pub fn row(before: Option<&Reading>, now: &Reading) -> Row {
    let mut row = Row::empty(now.at);
    let figures = &now.figures;
    let mut gauge = |metric, value: Option<u64>| {
        if let Some(value) = value {
            row.set(metric, value);
        }
    };
    gauge(Metric::Memory, figures.memory);
    gauge(Metric::MemoryWorking, figures.memory_working());
    gauge(Metric::MemoryPeak, figures.memory_peak);
    gauge(Metric::OomKills, figures.oom_kills);
    gauge(Metric::Pids, figures.pids);
    gauge(Metric::Fds, figures.fds);
    gauge(Metric::Load, figures.load);
    gauge(Metric::Disk, figures.disk);
    gauge(Metric::DiskFree, figures.disk_free);
    let Some(before) = before else { return row };
    let elapsed = now.mono.saturating_sub(before.mono);
    if elapsed < SHORTEST {
        return row;
    }
    let (elapsed, before) = (elapsed.as_micros(), &before.figures);
    // `units` for a total that grows by one a microsecond.
    let mut rate = |metric, before: Option<u64>, now: Option<u64>, units: u128| {
        if let (Some(before), Some(now)) = (before, now)
            && let Some(grown) = now.checked_sub(before)
        {
            let rounded = (u128::from(grown) * units + elapsed / 2) / elapsed;
            row.set(metric, u64::try_from(rounded).unwrap_or(u64::MAX));
        }
    };
    const MILLI: u128 = 1000;
    const A_SECOND: u128 = 1_000_000;
    rate(Metric::Cpu, before.cpu_usec, figures.cpu_usec, MILLI);
    rate(Metric::CpuThrottled, before.throttled_usec, figures.throttled_usec, MILLI);
    rate(Metric::PressureCpu, before.pressure_cpu, figures.pressure_cpu, MILLI);
    rate(Metric::PressureMemory, before.pressure_memory, figures.pressure_memory, MILLI);
    rate(Metric::PressureIo, before.pressure_io, figures.pressure_io, MILLI);
    rate(Metric::IoRead, before.io_read, figures.io_read, A_SECOND);
    rate(Metric::IoWrite, before.io_write, figures.io_write, A_SECOND);
    rate(Metric::NetReceive, before.net_receive, figures.net_receive, A_SECOND);
    rate(Metric::NetTransmit, before.net_transmit, figures.net_transmit, A_SECOND);
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64, figures: Figures) -> Reading {
        Reading { at: Timestamp(1_800_000_000_000 + ms), mono: Duration::from_millis(ms), figures }
    }

    #[test]
    fn rates_are_over_the_time_that_passed() {
        let before = at(
            1000,
            Figures { cpu_usec: Some(5_000_000), io_read: Some(1000), memory: Some(900), inactive_file: Some(1000), ..Figures::default() },
        );
        let now = at(
            3000,
            Figures { cpu_usec: Some(6_000_000), io_read: Some(5000), memory: Some(900), inactive_file: Some(200), ..Figures::default() },
        );
        let row = row(Some(&before), &now);
        assert_eq!(row.get(Metric::Cpu), Some(500), "half a core");
        assert_eq!(row.get(Metric::IoRead), Some(2000));
        assert_eq!(row.get(Metric::MemoryWorking), Some(700));
        assert_eq!(row.get(Metric::NetReceive), None, "no such figure is no zero");
    }

    #[test]
    fn the_first_reading_has_no_rates_and_a_total_that_went_back_has_none_either() {
        let now = at(1000, Figures { cpu_usec: Some(10), pids: Some(3), ..Figures::default() });
        assert_eq!(row(None, &now).get(Metric::Cpu), None);
        assert_eq!(row(None, &now).get(Metric::Pids), Some(3));
        let later = at(2000, Figures { cpu_usec: Some(5), ..Figures::default() });
        assert_eq!(row(Some(&now), &later).get(Metric::Cpu), None);
        assert_eq!(row(Some(&now), &now).get(Metric::Cpu), None, "no time has passed");
    }

    #[test]
    fn the_wall_clock_may_jump() {
        let before = at(1000, Figures { cpu_usec: Some(0), ..Figures::default() });
        let now = Reading { at: Timestamp(5), ..at(2000, Figures { cpu_usec: Some(250_000), ..Figures::default() }) };
        assert_eq!(row(Some(&before), &now).get(Metric::Cpu), Some(250));
    }
}
