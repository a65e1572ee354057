//! The task that archives: follows what is applied on this server and writes it out in segments.
//!
//! It reads the log store, so nothing waits for it and nothing is lost when it is slow. Where the log was purged before
//! it came by, it says so by beginning a new chain with an export.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use optimus_common::disk::Disk;
use optimus_common::{ClusterId, Span, Timestamp};
use optimus_host::telemetry::Chain;
use tokio_util::sync::CancellationToken;

use super::archive::{self, Named, SegmentHead, in_order};
use super::container::{self, PutError};
use super::crypt::Lock;
use super::export::{self, ExportHead};
use super::schedule::Figures;
use crate::consensus::CoreMachine;
use crate::raft::{LogEntry, RaftNode, StoreError};
use crate::store::Store;

/// A segment is written at this size of its commands, or at this age.
pub const SEGMENT_BYTES: usize = 4 << 20;
pub const SEGMENT_AGE: Duration = Duration::from_secs(60);
/// A new base is written so often, so that a restore need not replay for ever and old segments can go.
pub const BASE_EVERY: Span = Span::secs(24 * 3600);
/// Bytes read from the log at once.
const READ_BYTES: usize = 1 << 20;
/// Pause after a failure.
const RETRY: Duration = Duration::from_secs(5);
/// Longest time between two looks.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Bytes of a file read at once.
const PIECE: usize = 256 << 10;

/// How to archive.
#[derive(Debug, Clone)]
pub struct ArchiveOptions {
    pub dir: PathBuf,
    pub lock: Lock,
    /// How far back a restore may reach; older files go.
    pub keep: Span,
}

#[derive(Debug, thiserror::Error)]
pub enum ArchiverError {
    #[error("failed to read the archive")]
    Read(#[source] std::io::Error),
    #[error("the archive is of another cluster ({found}): give each cluster a directory of its own")]
    Foreign { found: String },
    #[error(transparent)]
    Put(#[from] PutError),
    #[error("failed to read the log")]
    Log(#[from] StoreError),
    #[error("the disk work of the archive did not finish")]
    Lost,
}

pub(crate) struct Archiver {
    node: RaftNode<CoreMachine>,
    store: Store,
    disk: Arc<dyn Disk>,
    lock: Lock,
    keep: Span,
    figures: Figures,
    chain: Option<Link>,
    buffer: Vec<LogEntry>,
    bytes: usize,
    /// When the first entry of the buffer was read, on the monotonic clock.
    since: Duration,
}

/// The end of the chain on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Link {
    cluster: ClusterId,
    /// Last index archived.
    end: u64,
    /// BLAKE3 of the newest file.
    hash: [u8; 32],
    /// When the newest base was taken.
    base: Timestamp,
    /// Whether a segment follows it.
    grown: bool,
}

impl Archiver {
    pub(crate) fn new(node: RaftNode<CoreMachine>, store: Store, disk: Arc<dyn Disk>, lock: Lock, keep: Span, figures: Figures) -> Self {
        Archiver { node, store, disk, lock, keep, figures, chain: None, buffer: Vec::new(), bytes: 0, since: Duration::ZERO }
    }

    /// Runs until `shutdown`, and then writes out what it has.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        let clock = self.store.env.clock.clone();
        let mut applied = self.store.applied();
        loop {
            applied.mark_unchanged();
            let pause = match self.step(false).await {
                Ok(pause) => pause,
                Err(error) => {
                    self.figures.failed();
                    tracing::error!(error = %Chain(&error), "the archive could not be written; it goes on when it can");
                    // What was read is read again: the failure may have come from any of it.
                    self.forget();
                    RETRY
                }
            };
            tokio::select! {
                () = shutdown.cancelled() => break,
                changed = applied.changed(), if pause != RETRY => if changed.is_err() { break },
                () = clock.sleep(pause) => {}
            }
        }
        if let Err(error) = self.step(true).await {
            self.figures.failed();
            tracing::error!(error = %Chain(&error), "the end of the archive could not be written; it is written at the next start");
        }
    }

    fn forget(&mut self) {
        (self.chain, self.bytes) = (None, 0);
        self.buffer.clear();
    }

    /// Reads what is new and writes what is due. Gives how long nothing will be due by itself.
    pub(crate) async fn step(&mut self, last: bool) -> Result<Duration, ArchiverError> {
        let Some(cluster) = self.store.state().cluster.map(|c| c.id) else { return Ok(LOOK_EVERY) };
        let mut link = match self.chain {
            Some(link) => link,
            None => match self.open(cluster).await? {
                Some(link) => link,
                None => self.base(cluster).await?,
            },
        };
        self.chain = Some(link);
        loop {
            let next = self.buffer.last().map_or(link.end, |e| e.index) + 1;
            let read = self.node.read_entries(next, u64::MAX, READ_BYTES).await?;
            match read.first() {
                Some(first) if first.index != next => {
                    tracing::warn!(from = next, to = first.index - 1, "the log was purged before it was archived; the archive begins anew");
                    self.flush(&mut link).await?;
                    link = self.base(cluster).await?;
                    self.chain = Some(link);
                    continue;
                }
                // The log behind a snapshot may be empty.
                None if next <= self.purged() => {
                    self.flush(&mut link).await?;
                    link = self.base(cluster).await?;
                    self.chain = Some(link);
                    continue;
                }
                None => break,
                Some(_) => {}
            }
            if self.buffer.is_empty() {
                self.since = self.store.env.clock.monotonic();
            }
            for entry in read {
                self.bytes += entry.commands.iter().map(|c| c.len()).sum::<usize>() + 16;
                self.buffer.push(entry);
                if self.bytes >= SEGMENT_BYTES {
                    self.flush(&mut link).await?;
                }
            }
        }
        let age = self.store.env.clock.monotonic().saturating_sub(self.since);
        if !self.buffer.is_empty() && (last || age >= SEGMENT_AGE) {
            self.flush(&mut link).await?;
        }
        let now = self.store.env.clock.now();
        if link.grown && now.since(link.base) >= BASE_EVERY && self.buffer.is_empty() {
            self.chain = Some(self.base(cluster).await?);
            self.clear(now).await?;
        }
        Ok(if self.buffer.is_empty() { LOOK_EVERY } else { SEGMENT_AGE.saturating_sub(age).min(LOOK_EVERY) })
    }

    fn purged(&self) -> u64 {
        self.node.status().purged.unwrap_or(0)
    }

    /// The chain as it is on disk.
    async fn open(&self, cluster: ClusterId) -> Result<Option<Link>, ArchiverError> {
        let mark = format!("cluster-{cluster}");
        let found = self.work(move |disk| {
            container::sweep(disk)?;
            let names = disk.list()?;
            let foreign = names.iter().find(|n| n.starts_with("cluster-") && **n != mark).cloned();
            let mut files: Vec<Named> = names.iter().filter_map(|n| Named::parse(n)).collect();
            files.sort_by_key(in_order);
            let base = files.iter().filter_map(|f| if let Named::Base { at, .. } = f { Some(*at) } else { None }).max();
            let newest = match files.last() {
                Some(newest) => Some((*newest, hash(disk, &newest.name())?)),
                None => None,
            };
            if foreign.is_none() && !names.contains(&mark) {
                disk.open(&mark)?.sync_data()?;
                disk.sync_dir()?;
            }
            Ok((foreign, base, newest))
        });
        let (foreign, base, newest) = found.await?;
        if let Some(found) = foreign {
            return Err(ArchiverError::Foreign { found });
        }
        let link = |(newest, hash): (Named, [u8; 32]), base| Link {
            cluster,
            end: newest.end(),
            hash,
            base,
            grown: matches!(newest, Named::Segment { .. }),
        };
        Ok(newest.zip(base).map(|(newest, base)| link(newest, base)))
    }

    /// Writes an export of the state now, where a chain begins.
    async fn base(&mut self, cluster: ClusterId) -> Result<Link, ArchiverError> {
        let Some((head, state)) = ExportHead::now(&self.store) else { return Err(ArchiverError::Lost) };
        let named = Named::Base { index: head.covers, at: head.taken_at };
        let (lock, at, end) = (self.lock.clone(), head.taken_at, head.covers);
        let hash = self
            .work(move |disk| {
                let put = container::put(disk, &named.name(), |out| export::write(out, &lock, &head, &state).map(drop));
                Ok(put.map(|()| hash(disk, &named.name())))
            })
            .await??
            .map_err(ArchiverError::Read)?;
        self.figures.wrote(self.store.env.clock.now(), end);
        Ok(Link { cluster, end, hash, base: at, grown: false })
    }

    /// Writes the buffer as a segment.
    async fn flush(&mut self, link: &mut Link) -> Result<(), ArchiverError> {
        let (Some(first), Some(last)) = (self.buffer.first(), self.buffer.last()) else { return Ok(()) };
        let (from, to) = (first.index, last.index);
        let head = SegmentHead {
            cluster: link.cluster,
            server: self.node.id(),
            from,
            to,
            times: archive::times_of(&self.buffer),
            previous: link.hash,
        };
        let (entries, lock) = (std::mem::take(&mut self.buffer), self.lock.clone());
        self.bytes = 0;
        let hash = self
            .work(move |disk| {
                let name = Named::Segment { from, to }.name();
                Ok(container::put(disk, &name, |mut out| {
                    use std::io::Write as _;
                    let bytes = archive::seal(&lock, &head, &entries)?;
                    let failed = super::CryptError::write;
                    out.write_all(&bytes).map_err(failed)?;
                    Ok(*blake3::hash(&bytes).as_bytes())
                }))
            })
            .await??;
        (link.end, link.hash, link.grown) = (to, hash, true);
        self.chain = Some(*link);
        self.figures.wrote(self.store.env.clock.now(), to);
        Ok(())
    }

    /// Removes what lies before the newest base that is older than `keep`.
    async fn clear(&self, now: Timestamp) -> Result<(), ArchiverError> {
        let keep = self.keep;
        self.work(move |disk| {
            let mut files: Vec<Named> = disk.list()?.iter().filter_map(|n| Named::parse(n)).collect();
            files.sort_by_key(in_order);
            let old = |f: &Named| matches!(f, Named::Base { at, .. } if now.since(*at) >= keep);
            let Some(first_kept) = files.iter().rposition(old) else { return Ok(()) };
            // Oldest first, so that a crash leaves a whole chain.
            files[..first_kept].iter().try_for_each(|f| disk.remove(&f.name()))?;
            disk.sync_dir()
        })
        .await
    }

    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Disk) -> std::io::Result<T> + Send + 'static,
    ) -> Result<T, ArchiverError> {
        let disk = self.disk.clone();
        let done = tokio::task::spawn_blocking(move || work(&*disk)).await.map_err(|_| ArchiverError::Lost)?;
        done.map_err(ArchiverError::Read)
    }
}

fn hash(disk: &dyn Disk, name: &str) -> std::io::Result<[u8; 32]> {
    let file = disk.open(name)?;
    let (length, mut at) = (file.len()?, 0);
    let (mut hasher, mut piece) = (blake3::Hasher::new(), vec![0; PIECE]);
    while at < length {
        let n = (length - at).min(PIECE as u64) as usize;
        file.read_at(at, &mut piece[..n])?;
        hasher.update(&piece[..n]);
        at += n as u64;
    }
    Ok(*hasher.finalize().as_bytes())
}
