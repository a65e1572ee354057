//! From totals as the kernel counts them to the figures people read.

use std::time::Duration;

use optimus_common::Timestamp;

use super::Metric;
use super::chunk::Row;

/// What the kernel says of a subject at one moment. Totals count from the subject's start; unset where this host or
/// this subject has no such figure.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reading {
    pub at: Timestamp,
    /// The same moment on a clock that does not jump.
    pub mono: Duration,
    pub cpu_usec: Option<u64>,
    pub throttled_usec: Option<u64>,
    pub memory: Option<u64>,
    /// File cache nobody used lately: given back without harm.
    pub inactive_file: Option<u64>,
    pub memory_peak: Option<u64>,
    pub oom_kills: Option<u64>,
    pub pids: Option<u64>,
    pub fds: Option<u64>,
    pub io_read: Option<u64>,
    pub io_write: Option<u64>,
    pub net_receive: Option<u64>,
    pub net_transmit: Option<u64>,
    /// Total time some process was held up, microseconds.
    pub pressure_cpu: Option<u64>,
    pub pressure_memory: Option<u64>,
    pub pressure_io: Option<u64>,
    /// Hundredths.
    pub load: Option<u64>,
    pub disk: Option<u64>,
    pub disk_free: Option<u64>,
}

/// Shortest time a rate is told over: below it, ticks of the kernel's counters show more than use does.
const SHORTEST: Duration = Duration::from_millis(50);

/// The figures of `now`; rates are over the time since `before`, and missing without it.
///
/// A total that went back (the subject was replaced, a device was unplugged) has no rate this time.
pub fn row(before: Option<&Reading>, now: &Reading) -> Row {
    let mut row = Row::empty(now.at);
    let mut gauge = |metric, value: Option<u64>| {
        if let Some(value) = value {
            row.set(metric, value);
        }
    };
    gauge(Metric::Memory, now.memory);
    gauge(Metric::MemoryWorking, now.memory.map(|used| used.saturating_sub(now.inactive_file.unwrap_or(0))));
    gauge(Metric::MemoryPeak, now.memory_peak);
    gauge(Metric::OomKills, now.oom_kills);
    gauge(Metric::Pids, now.pids);
    gauge(Metric::Fds, now.fds);
    gauge(Metric::Load, now.load);
    gauge(Metric::Disk, now.disk);
    gauge(Metric::DiskFree, now.disk_free);
    let Some(before) = before else { return row };
    let elapsed = now.mono.saturating_sub(before.mono);
    if elapsed < SHORTEST {
        return row;
    }
    let elapsed = elapsed.as_micros();
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
    rate(Metric::Cpu, before.cpu_usec, now.cpu_usec, MILLI);
    rate(Metric::CpuThrottled, before.throttled_usec, now.throttled_usec, MILLI);
    rate(Metric::PressureCpu, before.pressure_cpu, now.pressure_cpu, MILLI);
    rate(Metric::PressureMemory, before.pressure_memory, now.pressure_memory, MILLI);
    rate(Metric::PressureIo, before.pressure_io, now.pressure_io, MILLI);
    rate(Metric::IoRead, before.io_read, now.io_read, A_SECOND);
    rate(Metric::IoWrite, before.io_write, now.io_write, A_SECOND);
    rate(Metric::NetReceive, before.net_receive, now.net_receive, A_SECOND);
    rate(Metric::NetTransmit, before.net_transmit, now.net_transmit, A_SECOND);
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Reading {
        Reading { at: Timestamp(1_800_000_000_000 + ms), mono: Duration::from_millis(ms), ..Reading::default() }
    }

    #[test]
    fn rates_are_over_the_time_that_passed() {
        let before = Reading { cpu_usec: Some(5_000_000), io_read: Some(1000), memory: Some(900), inactive_file: Some(1000), ..at(1000) };
        let now = Reading { cpu_usec: Some(6_000_000), io_read: Some(5000), memory: Some(900), inactive_file: Some(200), ..at(3000) };
        let row = row(Some(&before), &now);
        assert_eq!(row.get(Metric::Cpu), Some(500), "half a core");
        assert_eq!(row.get(Metric::IoRead), Some(2000));
        assert_eq!(row.get(Metric::MemoryWorking), Some(700));
        assert_eq!(row.get(Metric::NetReceive), None, "no such figure is no zero");
    }

    #[test]
    fn the_first_reading_has_no_rates_and_a_total_that_went_back_has_none_either() {
        let now = Reading { cpu_usec: Some(10), pids: Some(3), ..at(1000) };
        assert_eq!(row(None, &now).get(Metric::Cpu), None);
        assert_eq!(row(None, &now).get(Metric::Pids), Some(3));
        let later = Reading { cpu_usec: Some(5), ..at(2000) };
        assert_eq!(row(Some(&now), &later).get(Metric::Cpu), None);
        assert_eq!(row(Some(&now), &now).get(Metric::Cpu), None, "no time has passed");
    }

    #[test]
    fn the_wall_clock_may_jump() {
        let before = Reading { cpu_usec: Some(0), ..at(1000) };
        let now = Reading { at: Timestamp(5), cpu_usec: Some(250_000), ..at(2000) };
        assert_eq!(row(Some(&before), &now).get(Metric::Cpu), Some(250));
    }
}
