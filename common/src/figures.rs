//! What the kernel says of a host or a copy at one moment, and how it travels.

use serde::{Deserialize, Serialize};

macro_rules! figures {
    ($($(#[doc = $doc:literal])+ $name:ident = $id:literal;)+) => {
        /// Totals count from the subject's start and gauges are as of now; unset where this host or this subject has no
        /// such figure. The numbers of the fields are sent and never change their meaning.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct Figures { $($(#[doc = $doc])+ pub $name: Option<u64>),+ }

        impl Figures {
            /// How many there are.
            pub const COUNT: usize = [$($id),+].len();

            /// What differs from `before`, by number. A figure that is not to be had any more differs too.
            pub fn since(&self, before: &Figures) -> Vec<Change> {
                let mut changes = Vec::new();
                $(if self.$name != before.$name { changes.push(Change { figure: $id, value: self.$name }); })+
                changes
            }

            /// Takes what [`Figures::since`] found. A number of a newer agent changes nothing.
            pub fn take(&mut self, changes: &[Change]) {
                for Change { figure, value } in changes {
                    match figure { $($id => self.$name = *value,)+ _ => {} }
                }
            }
        }
    };
}

figures! {
    /// CPU time, microseconds.
    cpu_usec = 1;
    /// Time a quota held it back, microseconds.
    throttled_usec = 2;
    /// Memory charged, bytes.
    memory = 3;
    /// File cache in it that nobody used lately: given back without harm.
    inactive_file = 4;
    /// The most charged at once so far, bytes.
    memory_peak = 5;
    /// Processes killed for want of memory.
    oom_kills = 6;
    /// Processes and threads now.
    pids = 7;
    /// Open files now.
    fds = 8;
    /// Bytes read from disks.
    io_read = 9;
    /// Bytes written to disks.
    io_write = 10;
    /// Bytes received from other hosts.
    net_receive = 11;
    /// Bytes sent to other hosts.
    net_transmit = 12;
    /// Time some process waited for CPU, microseconds.
    pressure_cpu = 13;
    /// Likewise, for memory.
    pressure_memory = 14;
    /// Likewise, for disks.
    pressure_io = 15;
    /// Load average of one minute in hundredths. Host only.
    load = 16;
    /// Bytes used on the file system of the agent's data. Host only.
    disk = 17;
    /// Bytes left there for us. Host only.
    disk_free = 18;
}

/// One figure that is another than before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    pub figure: u8,
    pub value: Option<u64>,
}

impl Figures {
    /// Memory that cannot be taken back without harm.
    pub fn memory_working(&self) -> Option<u64> {
        self.memory.map(|used| used.saturating_sub(self.inactive_file.unwrap_or(0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_make_the_one_into_the_other() {
        let before = Figures { cpu_usec: Some(5), memory: Some(7), fds: Some(1), ..Figures::default() };
        let after = Figures { cpu_usec: Some(6), memory: Some(7), fds: None, ..Figures::default() };
        let mut changes = after.since(&before);
        assert_eq!(changes.len(), 2);
        changes.push(Change { figure: 250, value: Some(1) }); // of a newer agent
        let mut taken = before;
        taken.take(&changes);
        assert_eq!(taken, after);
        assert_eq!(after.since(&after), []);
    }
}
