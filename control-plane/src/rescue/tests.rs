//! The archive under a running server: restarts, purges, several servers, failures.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use optimus_common::disk::Disk;
use optimus_common::disk::sim::MemDisk;
use optimus_common::{Span, TokenId};
use optimus_core::state::{Applied, Command, State};
use optimus_host::disk::HostDisk;
use optimus_host::env::HostEnv;

use super::archive::{Archive, ArchiveError, Named, server_dir};
use super::archiver::{Archiver, ArchiverError};
use super::crypt::tests::pair;
use super::restore::{self, RestoreError, Source, Until};
use super::schedule::{Figures, Schedule, is_due};
use super::*;
use crate::consensus::{CoreMachine, RaftConsensus};
use crate::identity::root_key::RootKey;
use crate::identity::{Identity, ServerNames};
use crate::raft::{LogEntry, MemoryNetwork, RaftConfig, RaftNode, Tuning};
use crate::store::Store;

struct Server {
    raft: RaftNode<CoreMachine>,
    store: Store,
}

async fn server(tuning: Tuning, home: &Path) -> Server {
    let (machine, consensus) = RaftConsensus::machine();
    let network = MemoryNetwork::new();
    let config = RaftConfig { node_id: 1, disk: Arc::new(MemDisk::new()), machine, tuning, network: network.transport(1) };
    let raft = RaftNode::start(config).await.unwrap();
    raft.initialize_single("a:1").await.unwrap();
    let mut leads = raft.is_leader();
    tokio::time::timeout(Duration::from_secs(20), leads.wait_for(|l| *l)).await.unwrap().unwrap();
    let store = Store::new(Arc::new(consensus(raft.clone())), HostEnv::new());
    Identity::found(home, &store, &ServerNames { server: 1, names: vec![] }).await.unwrap();
    Server { raft, store }
}

impl Server {
    async fn tokens(&self, n: usize) {
        for _ in 0..n {
            let id = TokenId(self.store.env.new_id());
            let command = Command::CreateToken {
                id,
                secret_hash: vec![1; 32],
                expires_at: self.store.env.clock.now(),
                uses: 1,
                role: Default::default(),
            };
            assert!(matches!(self.store.propose(command).await.unwrap(), Applied::Done { .. }));
        }
    }

    fn archiver(&self, dir: &Path, lock: &Lock) -> Archiver {
        let disk = Arc::new(HostDisk::open(server_dir(dir, 1)).unwrap());
        let figures = Figures::register(&prometheus::Registry::new()).1;
        Archiver::new(self.raft.clone(), self.store.clone(), disk, lock.clone(), Span::secs(7 * 86_400), figures)
    }

    /// Archives everything there is, as a start and a stop would.
    async fn archive(&self, dir: &Path, lock: &Lock) {
        self.archiver(dir, lock).step(true).await.unwrap();
    }
}

fn bases(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut all: Vec<_> = std::fs::read_dir(server_dir(dir, 1)).unwrap().map(|e| e.unwrap().path()).collect();
    all.retain(|p| matches!(Named::parse(p.file_name().unwrap().to_str().unwrap()), Some(Named::Base { .. })));
    all.sort();
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_archive_replays_to_the_very_state_and_begins_anew_where_the_log_was_purged() {
    let temp = tempfile::tempdir().unwrap();
    let (dir, (lock, key, _)) = (temp.path().join("archive"), pair());
    let server = server(Tuning { keep_logs: 0, ..Tuning::fast() }, temp.path()).await;
    for n in [3, 0, 5, 1] {
        server.tokens(n).await;
        server.archive(&dir, &lock).await;
    }
    let archives = [dir.clone()];
    let source = |export, until| Source { export, archives: &archives, until, key: &key };
    let first = bases(&dir).remove(0);
    let restored = restore::read(&source(&first, Until::End)).unwrap();
    assert_eq!(restored.state.digest(), server.store.state().digest(), "replayed to another state");
    let export = restored.export.clone();
    let middle = restore::read(&source(&first, Until::Index(export.index + 2))).unwrap();
    assert_eq!((middle.state.index, middle.replayed), (export.index + 2, 2));
    let early = restore::read(&source(&first, Until::Index(export.index - 1)));
    assert!(matches!(early, Err(RestoreError::LaterIndex { .. })));
    let elsewhere = tempfile::tempdir().unwrap();
    assert!(restored.check_root_key(&RootKey::create(elsewhere.path(), &HostEnv::new()).unwrap()).is_err());

    // The archive was off while the log was purged.
    let end = server.store.state().index;
    server.tokens(4).await;
    server.raft.trigger_snapshot().await.unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while server.raft.status().purged.is_none_or(|p| p <= end + 1) {
        assert!(std::time::Instant::now() < deadline, "not purged");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    server.archive(&dir, &lock).await;
    server.tokens(2).await;
    server.archive(&dir, &lock).await;
    assert_eq!(bases(&dir).len(), 2, "a new chain begins");
    let gap = restore::read(&source(&first, Until::End)).unwrap_err();
    assert!(matches!(gap, RestoreError::Archive(ArchiveError::Gap { from, .. }) if from == end + 1), "{gap}");
    let upto = restore::read(&source(&first, Until::Index(end))).unwrap();
    assert_eq!(upto.reached, end, "what lies before the gap can still be restored");
    let second = bases(&dir).remove(1);
    let restored = restore::read(&source(&second, Until::End)).unwrap();
    assert_eq!(restored.state.digest(), server.store.state().digest());
    server.raft.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_of_another_cluster_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let (dir, (lock, ..)) = (temp.path().join("archive"), pair());
    let homes = [temp.path().join("a"), temp.path().join("b")];
    homes.iter().for_each(|h| std::fs::create_dir(h).unwrap());
    let (one, two) = (server(Tuning::fast(), &homes[0]).await, server(Tuning::fast(), &homes[1]).await);
    one.archive(&dir, &lock).await;
    let refused = two.archiver(&dir, &lock).step(true).await;
    assert!(matches!(refused, Err(ArchiverError::Foreign { .. })), "{refused:?}");
    one.raft.shutdown().await;
    two.raft.shutdown().await;
}

#[test]
fn archives_of_two_servers_cover_each_other_and_must_agree() {
    let temp = tempfile::tempdir().unwrap();
    let (lock, key, _) = pair();
    let cluster = optimus_common::ClusterId(HostEnv::new().new_id());
    let put = |server: u64, from: u64, to: u64, salt: u8| {
        let entries: Vec<LogEntry> =
            (from..=to).map(|index| LogEntry { term: 1, index, commands: vec![vec![index as u8, salt].into()] }).collect();
        let head = archive::SegmentHead { cluster, server, from, to, times: None, previous: [0; 32] };
        let dir = server_dir(temp.path(), server);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join(Named::Segment { from, to }.name()), archive::seal(&lock, &head, &entries).unwrap()).unwrap();
    };
    let walk = || {
        let mut seen = Vec::new();
        let archive = Archive::open(&[temp.path().to_owned()], cluster)?;
        archive.walk(2, u64::MAX, &key, |e| -> Result<bool, ArchiveError> {
            seen.push(e.index);
            Ok(true)
        })?;
        Ok::<_, ArchiveError>(seen)
    };
    assert!(matches!(walk(), Err(ArchiveError::Empty { .. })));
    // Each has a hole that the other fills.
    put(1, 1, 4, 0);
    put(2, 3, 8, 0);
    put(1, 8, 9, 0);
    assert_eq!(walk().unwrap(), (3..=9).collect::<Vec<_>>());
    put(3, 4, 5, 1);
    assert!(matches!(walk(), Err(ArchiveError::Differs { index: 4, .. })));
    std::fs::remove_dir_all(server_dir(temp.path(), 3)).unwrap();
    // A segment right after another one of its server must have been written after it.
    put(2, 9, 10, 0);
    assert!(matches!(walk(), Err(ArchiveError::Chain { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scheduled_exports_are_due_by_time_kept_by_number_and_open() {
    let temp = tempfile::tempdir().unwrap();
    let (lock, key, _) = pair();
    let server = server(Tuning::fast(), temp.path()).await;
    let disk = MemDisk::new();
    let figures = Figures::register(&prometheus::Registry::new()).0;
    let mut schedule =
        Schedule { store: server.store.clone(), disk: Arc::new(disk.clone()), lock, every: Span::secs(3600), keep: 2, figures };
    assert!(schedule.step().await.unwrap());
    assert!(!schedule.step().await.unwrap(), "not due again");
    schedule.every = Span(0);
    for _ in 0..3 {
        server.tokens(1).await;
        assert!(schedule.step().await.unwrap());
    }
    let names = disk.list().unwrap();
    assert_eq!(names.len(), 2, "{names:?}");
    let file = disk.open(&names[1]).unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_at(0, &mut bytes).unwrap();
    let export = export::read(&bytes[..], &key).unwrap();
    let state: State = server.store.state();
    assert_eq!(export.state.digest(), state.digest());
    // A full disk costs the new one only.
    disk.set_capacity(Some(100));
    assert!(schedule.step().await.is_err());
    assert_eq!(disk.list().unwrap(), names);
    server.raft.shutdown().await;
}

#[test]
fn a_clock_that_was_set_back_does_not_stop_the_exports() {
    let (hour, at) = (Span::secs(3600), |s: u64| optimus_common::Timestamp(s * 1000));
    assert!(is_due(None, hour, at(0)));
    assert!(!is_due(Some(at(7200)), hour, at(7201)) && is_due(Some(at(7200)), hour, at(10_800)));
    assert!(is_due(Some(at(900_000)), hour, at(7200)));
}
