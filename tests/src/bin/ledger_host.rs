//! Hosts one consensus node with a [`Ledger`] in a directory, to be killed.
//!
//! ```text
//! optimus-test-ledger write DIR SEED [SYNCS]   writes as fast as it can; prints each acknowledgement AFTER it came
//! optimus-test-ledger large DIR SEED           the same with large writes, so that the log file is compacted
//! optimus-test-ledger read DIR                 opens what is there, prints it as JSON, then proves that it takes writes
//! ```
//! With SYNCS, every sync after the first SYNCS does nothing and says it did: a disk that lies.

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use optimus_common::disk::{Disk, DiskFile};
use optimus_control_plane::raft::{NoPeers, RaftConfig, RaftNode, Tuning};
use optimus_host::disk::HostDisk;
use optimus_tests::ledger::{Done, LARGE_FROM, LedgerMachine, Write};
use tokio::task::JoinSet;

type Node = RaftNode<LedgerMachine>;

/// Writers at a time: enough for entries that hold several writes.
const CLIENTS: u64 = 8;
/// Longest wait for leading.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    match args[..] {
        ["write", dir, seed] => runtime.block_on(write(dir, seed.parse()?, i64::MAX, 0)),
        ["write", dir, seed, syncs] => runtime.block_on(write(dir, seed.parse()?, syncs.parse()?, 0)),
        ["large", dir, seed] => runtime.block_on(write(dir, seed.parse()?, i64::MAX, LARGE_FROM)),
        ["read", dir] => runtime.block_on(read(dir)),
        _ => bail!("usage: write DIR SEED [SYNCS] | large DIR SEED | read DIR"),
    }
}

/// Snapshots and purges every few dozen entries, so that a cut finds them under way.
fn tuning() -> Tuning {
    Tuning { snapshot_every: 60, keep_logs: 10, ..Tuning::fast() }
}

async fn open(disk: impl Disk) -> anyhow::Result<(Node, LedgerMachine)> {
    let machine = LedgerMachine::default();
    let seen = machine.clone();
    let node = RaftNode::start(RaftConfig { node_id: 1, disk: Arc::new(disk), machine, tuning: tuning(), network: Arc::new(NoPeers) });
    let node = node.await.context("the store does not open")?;
    node.initialize_single("here:1").await?;
    let mut leads = node.is_leader();
    tokio::time::timeout(PATIENCE, leads.wait_for(|leads| *leads)).await.context("never leads")??;
    node.linearizable().await?;
    Ok((node, seen))
}

/// Writes for ever. Now and then the node is stopped and started, so that it votes.
async fn write(dir: &str, seed: u64, syncs: i64, first: u64) -> anyhow::Result<()> {
    let syncs = Arc::new(AtomicI64::new(syncs));
    let mut rounds = seed;
    loop {
        let (node, seen) = open(LyingDisk { inner: open_dir(dir).await?, syncs: syncs.clone() }).await?;
        let last = seen.ledger().last;
        rounds = rounds.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let left = Arc::new(AtomicU64::new(200 + (rounds >> 33) % 1500));
        let mut clients = JoinSet::new();
        for client in first..first + CLIENTS {
            let (node, left, mut sequence) = (node.clone(), left.clone(), last.get(&client).copied().unwrap_or(0));
            clients.spawn(async move {
                while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok() {
                    sequence += 1;
                    let (index, ()) = node.propose(Write::new(client, sequence)).await?;
                    // One write below PIPE_BUF: a whole line or none.
                    let line = format!("{index} {client} {sequence}\n");
                    std::io::stdout().lock().write_all(line.as_bytes())?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(ended) = clients.join_next().await {
            ended??;
        }
        node.shutdown().await;
    }
}

/// A snapshot that was being written when the node stopped may hold the directory a moment longer.
async fn open_dir(dir: &str) -> anyhow::Result<HostDisk> {
    let end = tokio::time::Instant::now() + PATIENCE;
    loop {
        match HostDisk::open(dir) {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock && tokio::time::Instant::now() < end => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            opened => return Ok(opened?),
        }
    }
}

async fn read(dir: &str) -> anyhow::Result<()> {
    let (node, seen) = open(open_dir(dir).await?).await?;
    let found = seen.ledger();
    let mut expected = found.clone();
    for sequence in 1..=20 {
        let client = 1_000_000;
        let sequence = found.last.get(&client).copied().unwrap_or(0) + sequence;
        let (index, ()) = node.propose(Write::new(client, sequence)).await?;
        expected.history.push(Done { index, client, sequence });
        expected.last.insert(client, sequence);
    }
    node.shutdown().await;
    drop(node);
    let (node, seen) = open(open_dir(dir).await?).await?;
    if seen.ledger() != expected {
        bail!("writes after the recovery did not survive a clean restart");
    }
    node.shutdown().await;
    println!("{}", serde_json::to_string(&found)?);
    Ok(())
}

/// A disk that stops syncing after some syncs, and does not say so.
#[derive(Debug)]
struct LyingDisk {
    inner: HostDisk,
    syncs: Arc<AtomicI64>,
}

#[derive(Debug)]
struct LyingFile {
    inner: Box<dyn DiskFile>,
    syncs: Arc<AtomicI64>,
}

fn honest(syncs: &AtomicI64) -> bool {
    syncs.fetch_sub(1, Ordering::Relaxed) > 0
}

impl Disk for LyingDisk {
    fn open(&self, name: &str) -> std::io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(LyingFile { inner: self.inner.open(name)?, syncs: self.syncs.clone() }))
    }
    fn exists(&self, name: &str) -> std::io::Result<bool> {
        self.inner.exists(name)
    }
    fn remove(&self, name: &str) -> std::io::Result<()> {
        self.inner.remove(name)
    }
    fn rename(&self, from: &str, to: &str) -> std::io::Result<()> {
        self.inner.rename(from, to)
    }
    fn list(&self) -> std::io::Result<Vec<String>> {
        self.inner.list()
    }
    fn sync_dir(&self) -> std::io::Result<()> {
        if honest(&self.syncs) { self.inner.sync_dir() } else { Ok(()) }
    }
}

impl DiskFile for LyingFile {
    fn len(&self) -> std::io::Result<u64> {
        self.inner.len()
    }
    fn read_at(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.inner.read_at(offset, into)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        self.inner.write_at(offset, data)
    }
    fn set_len(&self, len: u64) -> std::io::Result<()> {
        self.inner.set_len(len)
    }
    fn sync_data(&self) -> std::io::Result<()> {
        if honest(&self.syncs) { self.inner.sync_data() } else { Ok(()) }
    }
}
