//! Exports every so often, made by the leader, the newest few kept.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use optimus_common::disk::Disk;
use optimus_common::{Span, Timestamp};
use optimus_host::telemetry::Chain;
use prometheus::{IntCounterVec, IntGaugeVec, Opts, Registry};
use tokio_util::sync::CancellationToken;

use super::container;
use super::crypt::Lock;
use super::export::{self, ExportHead};
use crate::store::Store;

/// Shortest time between two exports.
pub const EVERY_MIN: Span = Span::secs(10);
/// How often is looked whether one is due; also the pause after a failure.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How to export.
#[derive(Debug, Clone)]
pub struct ScheduleOptions {
    pub dir: PathBuf,
    pub lock: Lock,
    pub every: Span,
    /// Exports kept of each server, at least one.
    pub keep: usize,
}

/// What a server does for the day it is lost.
#[derive(Debug, Clone, Default)]
pub struct Options {
    pub schedule: Option<ScheduleOptions>,
    pub archive: Option<super::archiver::ArchiveOptions>,
}

/// What monitoring sees of one of the two tasks.
#[derive(Clone)]
pub struct Figures {
    what: &'static str,
    at: IntGaugeVec,
    index: IntGaugeVec,
    failures: IntCounterVec,
}

impl Figures {
    /// Registers the figures and gives them for exports and for the archive.
    pub fn register(registry: &Registry) -> (Self, Self) {
        let gauge = |name: &str, help: &str| IntGaugeVec::new(Opts::new(name, help), &["what"]).expect("the name is well-formed");
        let at = gauge("optimus_rescue_written_seconds", "When a file was last written (Unix time), by what it is.");
        let index = gauge("optimus_rescue_index", "Log index up to which files were written, by what they are.");
        let failures = Opts::new("optimus_rescue_failures_total", "Files that could not be written, by what they are.");
        let failures = IntCounterVec::new(failures, &["what"]).expect("the name is well-formed");
        for collector in [Box::new(at.clone()) as Box<dyn prometheus::core::Collector>, Box::new(index.clone()), Box::new(failures.clone())]
        {
            // A second server in one process would register them again; its figures are its own registry's.
            if let Err(error) = registry.register(collector) {
                tracing::error!(%error, "figures of exports are not shown");
            }
        }
        let of = |what| Figures { what, at: at.clone(), index: index.clone(), failures: failures.clone() };
        (of("export"), of("archive"))
    }

    pub(crate) fn wrote(&self, at: Timestamp, index: u64) {
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        self.at.with_label_values(&[self.what]).set(number(at.0 / 1000));
        self.index.with_label_values(&[self.what]).set(number(index));
    }

    pub(crate) fn failed(&self) {
        self.failures.with_label_values(&[self.what]).inc();
    }
}

/// Log index and time of a scheduled export, by its name.
fn parse(name: &str) -> Option<(u64, Timestamp)> {
    let (index, at) = name.strip_prefix("export-")?.strip_suffix(".age")?.split_once('-')?;
    Some((index.parse().ok()?, Timestamp(at.parse().ok()?)))
}

/// When the next export is due, given when the newest was made.
pub(crate) fn is_due(newest: Option<Timestamp>, every: Span, now: Timestamp) -> bool {
    // The difference, not the order: a clock that was set back must not stop the exports.
    newest.is_none_or(|newest| now.0.abs_diff(newest.0) >= every.0)
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ScheduleError {
    #[error("failed to read the directory of exports")]
    Disk(#[source] std::io::Error),
    #[error(transparent)]
    Put(#[from] container::PutError),
    #[error("the disk work of the export did not finish")]
    Lost,
}

pub(crate) struct Schedule {
    pub store: Store,
    pub disk: Arc<dyn Disk>,
    pub lock: Lock,
    pub every: Span,
    pub keep: usize,
    pub figures: Figures,
}

impl Schedule {
    /// Runs until `shutdown`.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        loop {
            if self.store.status().is_leader
                && let Err(error) = self.step().await
            {
                self.figures.failed();
                tracing::error!(error = %Chain(&error), "the scheduled export failed; trying again");
            }
            if shutdown.run_until_cancelled(self.store.env.clock.sleep(LOOK_EVERY)).await.is_none() {
                return;
            }
        }
    }

    /// Exports if it is time. Gives whether it did.
    pub(crate) async fn step(&self) -> Result<bool, ScheduleError> {
        let now = self.store.env.clock.now();
        let (disk, lock, every, keep) = (self.disk.clone(), self.lock.clone(), self.every, self.keep.max(1));
        let Some((head, state)) = ExportHead::now(&self.store) else { return Ok(false) };
        let index = head.covers;
        let work = move || -> Result<bool, ScheduleError> {
            let kept = || -> std::io::Result<Vec<(u64, Timestamp, String)>> {
                let mut all: Vec<_> = disk.list()?.into_iter().filter_map(|n| parse(&n).map(|(index, at)| (index, at, n))).collect();
                all.sort();
                Ok(all)
            };
            let newest = kept().map_err(ScheduleError::Disk)?.iter().map(|(_, at, _)| *at).max();
            if !is_due(newest, every, now) {
                return Ok(false);
            }
            container::sweep(&*disk).map_err(ScheduleError::Disk)?;
            let name = format!("export-{index:020}-{:020}.age", now.0);
            container::put(&*disk, &name, |out| export::write(out, &lock, &head, &state).map(drop))?;
            // Only after a new one is whole.
            let all = kept().map_err(ScheduleError::Disk)?;
            let surplus = all.len().saturating_sub(keep);
            all[..surplus].iter().try_for_each(|(_, _, name)| disk.remove(name)).map_err(ScheduleError::Disk)?;
            Ok(true)
        };
        let wrote = tokio::task::spawn_blocking(work).await.map_err(|_| ScheduleError::Lost)??;
        if wrote {
            self.figures.wrote(now, index);
            tracing::info!(index, "wrote a scheduled export");
        }
        Ok(wrote)
    }
}
