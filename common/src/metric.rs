//! Which figures are kept.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a value counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    Millicores,
    /// Thousandths of the time.
    Permille,
    Bytes,
    BytesPerSecond,
    Count,
    /// Hundredths, such as of a load average.
    Hundredths,
}

macro_rules! metrics {
    ($($(#[doc = $doc:literal])+ $name:ident = $id:literal, $word:literal, $unit:ident;)+) => {
        /// One figure of a subject. The numbers are stored and never change their meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
        #[serde(rename_all = "snake_case")]
        #[repr(u8)]
        pub enum Metric { $($(#[doc = $doc])+ $name = $id),+ }

        impl Metric {
            pub const ALL: &[Metric] = &[$(Metric::$name),+];

            pub fn from_id(id: u8) -> Option<Metric> {
                match id { $($id => Some(Metric::$name),)+ _ => None }
            }
            /// As it is written in queries.
            pub fn word(self) -> &'static str {
                match self { $(Metric::$name => $word),+ }
            }
            pub fn unit(self) -> Unit {
                match self { $(Metric::$name => Unit::$unit),+ }
            }
        }
    };
}

metrics! {
    /// CPU time used since the sample before.
    Cpu = 1, "cpu", Millicores;
    /// Time a quota held it back: may exceed 1000 with several threads.
    CpuThrottled = 2, "cpu_throttled", Permille;
    /// Memory that cannot be taken back without harm: in use without the inactive file cache.
    MemoryWorking = 3, "memory_working", Bytes;
    /// All memory charged, with the file cache.
    Memory = 4, "memory", Bytes;
    /// The most memory charged at once so far.
    MemoryPeak = 5, "memory_peak", Bytes;
    /// Processes killed for want of memory so far.
    OomKills = 6, "oom_kills", Count;
    /// Processes and threads.
    Pids = 7, "pids", Count;
    /// Open files of all processes.
    Fds = 8, "fds", Count;
    /// From disks.
    IoRead = 9, "io_read", BytesPerSecond;
    /// To disks.
    IoWrite = 10, "io_write", BytesPerSecond;
    /// By interfaces that reach other hosts.
    NetReceive = 11, "net_receive", BytesPerSecond;
    /// By interfaces that reach other hosts.
    NetTransmit = 12, "net_transmit", BytesPerSecond;
    /// Share of time some process waited for CPU (pressure stall information).
    PressureCpu = 13, "pressure_cpu", Permille;
    /// Likewise, for memory.
    PressureMemory = 14, "pressure_memory", Permille;
    /// Likewise, for disks.
    PressureIo = 15, "pressure_io", Permille;
    /// Load average of one minute. Host only.
    Load = 16, "load", Hundredths;
    /// Bytes used on the file system of the agent's data. Host only.
    Disk = 17, "disk", Bytes;
    /// Bytes left there for us. Host only.
    DiskFree = 18, "disk_free", Bytes;
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl std::str::FromStr for Metric {
    type Err = UnknownMetric;
    fn from_str(word: &str) -> Result<Self, UnknownMetric> {
        Metric::ALL.iter().copied().find(|m| m.word() == word).ok_or_else(|| UnknownMetric(word.to_owned()))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no metric `{0}`")]
pub struct UnknownMetric(pub String);

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_words_name_one_metric_each() {
        for metric in Metric::ALL {
            assert_eq!(Metric::from_id(*metric as u8), Some(*metric));
            assert_eq!(metric.word().parse::<Metric>().unwrap(), *metric);
        }
        assert_eq!(Metric::from_id(0), None);
        assert!("cpus".parse::<Metric>().is_err());
    }
}
