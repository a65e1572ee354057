//! What one control group uses.

use std::io;
use std::path::{Path, PathBuf};

use optimus_common::Figures;

use super::files::{Kept, field, some_total};

/// Where a group's figures are; unset where this host has none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GroupFiles {
    /// v1: nanoseconds in a file of their own; v2: in `cpu_stat`.
    pub cpuacct: Option<PathBuf>,
    pub cpu_stat: Option<PathBuf>,
    pub memory: Option<PathBuf>,
    pub memory_stat: Option<PathBuf>,
    pub memory_peak: Option<PathBuf>,
    pub oom: Option<PathBuf>,
    pub pids: Option<PathBuf>,
    pub procs: Option<PathBuf>,
    pub io: Option<PathBuf>,
    pub pressure_cpu: Option<PathBuf>,
    pub pressure_memory: Option<PathBuf>,
    pub pressure_io: Option<PathBuf>,
}

/// Reads one group again and again. Fails once the group is gone.
#[derive(Debug)]
pub struct GroupSampler {
    cpuacct: Option<Kept>,
    cpu_stat: Option<Kept>,
    memory: Option<Kept>,
    memory_stat: Option<Kept>,
    memory_peak: Option<Kept>,
    oom: Option<Kept>,
    pids: Option<Kept>,
    procs: Option<Kept>,
    io: Option<Kept>,
    pressure: [Option<Kept>; 3],
}

impl GroupSampler {
    pub fn open(files: &GroupFiles) -> GroupSampler {
        let open = |path: &Option<PathBuf>| path.as_deref().and_then(Kept::open);
        GroupSampler {
            cpuacct: open(&files.cpuacct),
            cpu_stat: open(&files.cpu_stat),
            memory: open(&files.memory),
            memory_stat: open(&files.memory_stat),
            memory_peak: open(&files.memory_peak),
            oom: open(&files.oom),
            pids: open(&files.pids),
            procs: open(&files.procs),
            io: open(&files.io),
            pressure: [open(&files.pressure_cpu), open(&files.pressure_memory), open(&files.pressure_io)],
        }
    }

    /// Everything but the open files.
    pub fn read(&self, buffer: &mut Vec<u8>) -> io::Result<Figures> {
        let mut figures = Figures::default();
        if let Some(file) = &self.cpu_stat {
            let text = file.read(buffer)?;
            figures.cpu_usec = field(text, "usage_usec");
            figures.throttled_usec = field(text, "throttled_usec").or_else(|| field(text, "throttled_time").map(|ns| ns / 1000));
        }
        if let Some(file) = &self.cpuacct {
            figures.cpu_usec = Some(file.number(buffer)? / 1000);
        }
        if let Some(file) = &self.memory {
            figures.memory = Some(file.number(buffer)?);
        }
        if let Some(file) = &self.memory_stat {
            let text = file.read(buffer)?;
            figures.inactive_file = field(text, "total_inactive_file").or_else(|| field(text, "inactive_file"));
        }
        if let Some(file) = &self.memory_peak {
            figures.memory_peak = Some(file.number(buffer)?);
        }
        if let Some(file) = &self.oom {
            figures.oom_kills = Some(optimus_runner::oom_kills(file.read(buffer)?));
        }
        if let Some(file) = &self.pids {
            figures.pids = Some(file.number(buffer)?);
        }
        if let Some(file) = &self.io {
            let (read, write) = io_totals(file.read(buffer)?);
            (figures.io_read, figures.io_write) = (Some(read), Some(write));
        }
        for (file, value) in self.pressure.iter().zip([&mut figures.pressure_cpu, &mut figures.pressure_memory, &mut figures.pressure_io]) {
            // Pressure may be switched off at boot: the file is there and cannot be read.
            *value = file.as_ref().and_then(|f| some_total(f.read(buffer).ok()?));
        }
        Ok(figures)
    }

    /// Open files of the group's processes, those of the first [`PROCESSES_COUNTED`]. Costs a call a process.
    pub fn fds(&self, buffer: &mut Vec<u8>) -> Option<u64> {
        let text = self.procs.as_ref()?.read(buffer).ok()?;
        Some(text.lines().take(PROCESSES_COUNTED).filter_map(|pid| open_files(Path::new("/proc").join(pid).join("fd").as_path())).sum())
    }
}

/// Processes of one group whose open files are counted.
pub const PROCESSES_COUNTED: usize = 64;

/// Since Linux 6.2 the size of the directory is the number of files; before, they are counted.
fn open_files(dir: &Path) -> Option<u64> {
    match std::fs::metadata(dir).ok()?.len() {
        0 => Some(std::fs::read_dir(dir).ok()?.count() as u64),
        files => Some(files),
    }
}

/// Bytes read and written over all devices: v2 `io.stat` (`8:0 rbytes=1 wbytes=2 ...`) or v1
/// `blkio.throttle.io_service_bytes` (`8:0 Read 1`).
fn io_totals(text: &str) -> (u64, u64) {
    let (mut read, mut write) = (0u64, 0u64);
    for line in text.lines() {
        let mut words = line.split(' ').skip(1);
        match (words.next(), words.next()) {
            (Some("Read"), Some(n)) => read = read.saturating_add(n.parse().unwrap_or(0)),
            (Some("Write"), Some(n)) => write = write.saturating_add(n.parse().unwrap_or(0)),
            _ => {
                for word in line.split(' ') {
                    if let Some(n) = word.strip_prefix("rbytes=") {
                        read = read.saturating_add(n.parse().unwrap_or(0));
                    } else if let Some(n) = word.strip_prefix("wbytes=") {
                        write = write.saturating_add(n.parse().unwrap_or(0));
                    }
                }
            }
        }
    }
    (read, write)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_summed_over_devices() {
        assert_eq!(io_totals("8:0 rbytes=10 wbytes=5 rios=1 wios=1 dbytes=0 dios=0\n8:16 rbytes=1 wbytes=2\n"), (11, 7));
        assert_eq!(io_totals("8:0 Read 4\n8:0 Write 6\n8:0 Sync 10\n8:0 Async 0\n8:0 Total 10\nTotal 10\n"), (4, 6));
        assert_eq!(io_totals(""), (0, 0));
    }

    #[test]
    fn both_kinds_of_groups_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            Some(path)
        };
        let mut buffer = Vec::new();
        let v2 = GroupFiles {
            cpu_stat: file("cpu.stat", "usage_usec 500\nuser_usec 1\nthrottled_usec 20\n"),
            memory: file("memory.current", "4096\n"),
            memory_stat: file("memory.stat", "anon 1\ninactive_file 96\n"),
            oom: file("memory.events", "low 0\noom 1\noom_kill 2\n"),
            pressure_cpu: file("cpu.pressure", "some avg10=0.00 avg60=0.00 avg300=0.00 total=7\n"),
            ..GroupFiles::default()
        };
        let reading = GroupSampler::open(&v2).read(&mut buffer).unwrap();
        assert_eq!(
            (reading.cpu_usec, reading.throttled_usec, reading.memory, reading.inactive_file),
            (Some(500), Some(20), Some(4096), Some(96))
        );
        assert_eq!((reading.oom_kills, reading.pressure_cpu, reading.pids), (Some(2), Some(7), None));
        let v1 = GroupFiles {
            cpuacct: file("cpuacct.usage", "2000000\n"),
            cpu_stat: file("v1.cpu.stat", "nr_periods 1\nnr_throttled 1\nthrottled_time 3000\n"),
            memory_stat: file("v1.memory.stat", "inactive_file 1\ntotal_inactive_file 55\n"),
            ..GroupFiles::default()
        };
        let reading = GroupSampler::open(&v1).read(&mut buffer).unwrap();
        assert_eq!((reading.cpu_usec, reading.throttled_usec, reading.inactive_file), (Some(2000), Some(3), Some(55)));
    }

    #[test]
    fn my_own_open_files_are_counted() {
        let before = open_files(Path::new("/proc/self/fd")).unwrap();
        let _more: Vec<_> = (0..5).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        assert!(open_files(Path::new("/proc/self/fd")).unwrap() >= before.min(3) + 5);
    }
}
