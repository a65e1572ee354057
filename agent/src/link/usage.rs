//! Tells the server what is used, on a stream of its own: the newest figures, as changes to those told before.

use std::collections::BTreeMap;

use optimus_common::protocol::VERSION_USAGE;
use optimus_common::usage::{AllocUsage, Usage};
use optimus_common::{AllocId, Figures, Span, Timestamp};
use optimus_host::transport::FrameWriter;
use quinn::Connection;
use tokio::sync::watch;

use super::Link;
use super::session::End;
use crate::metrics::history::Subject;
use crate::metrics::rates::Reading;

/// Sends for as long as the session lasts; to a server of an older version, nothing.
pub(super) async fn send(link: &Link, connection: &Connection, version: u16, mut every: watch::Receiver<Span>) -> End {
    if version < VERSION_USAGE {
        return std::future::pending().await;
    }
    let stream = match connection.open_uni().await {
        Ok(stream) => stream,
        Err(error) => return End::of_connection(&error, End::lost),
    };
    let mut writer = FrameWriter::new(stream);
    let mut told = Told::default();
    loop {
        if let Some(usage) = told.next(link.workloads.readings())
            && let Err(error) = writer.send(usage).await
        {
            return End::of_frame(&error, End::lost);
        }
        let pause = *every.borrow_and_update();
        tokio::select! {
            () = link.env.clock.sleep(pause.as_duration()) => {}
            changed = every.changed() => if changed.is_err() {
                return End::lost("the session is ending");
            },
        }
    }
}

/// What the server knows.
#[derive(Default)]
struct Told {
    host: Figures,
    allocs: BTreeMap<AllocId, Figures>,
    at: Timestamp,
}

impl Told {
    /// What to tell of the newest readings; nothing if they are none, or the same ones.
    fn next(&mut self, readings: Vec<(Subject, Reading)>) -> Option<Usage> {
        let at = readings.iter().map(|(_, reading)| reading.at).max().filter(|at| *at != self.at)?;
        let mut usage = Usage { at, host: vec![], allocs: vec![], gone: vec![] };
        let mut seen = BTreeMap::new();
        for (subject, reading) in readings {
            match subject {
                Subject::Host => {
                    usage.host = reading.figures.since(&self.host);
                    self.host = reading.figures;
                }
                Subject::Alloc(alloc) => {
                    let before = self.allocs.remove(&alloc).unwrap_or_default();
                    usage.allocs.push(AllocUsage { alloc, changes: reading.figures.since(&before) });
                    seen.insert(alloc, reading.figures);
                }
            }
        }
        usage.gone = std::mem::replace(&mut self.allocs, seen).into_keys().collect();
        self.at = at;
        Some(usage)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use optimus_common::figures::Change;
    use uuid::Uuid;

    use super::*;

    fn reading(second: u64, cpu: u64) -> Reading {
        let figures = Figures { cpu_usec: Some(cpu), pids: Some(3), ..Figures::default() };
        Reading { at: Timestamp(second * 1000), figures, ..Reading::default() }
    }

    #[test]
    fn only_changes_are_told() {
        let (a, b) = (AllocId(Uuid::from_u128(1)), AllocId(Uuid::from_u128(2)));
        let mut told = Told::default();
        assert_eq!(told.next(vec![]), None, "nothing is measured");
        let first = vec![(Subject::Host, reading(1, 5)), (Subject::Alloc(a), reading(1, 7)), (Subject::Alloc(b), reading(1, 8))];
        let usage = told.next(first.clone()).unwrap();
        assert_eq!((usage.host.len(), usage.allocs.len(), usage.allocs[0].changes.len()), (2, 2, 2));
        assert_eq!(told.next(first), None, "nothing new was measured");
        let usage = told.next(vec![(Subject::Host, reading(2, 5)), (Subject::Alloc(a), reading(2, 9))]).unwrap();
        assert_eq!(usage.host, []);
        assert_eq!(usage.allocs, [AllocUsage { alloc: a, changes: vec![Change { figure: 1, value: Some(9) }] }]);
        assert_eq!(usage.gone, [b]);
    }
}
