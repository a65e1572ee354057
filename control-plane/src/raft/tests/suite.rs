//! openraft's own conformance suite on the production store, on both kinds of disk.

use std::sync::Arc;

use openraft::StorageError;
use openraft::testing::{StoreBuilder, Suite};
use optimus_common::disk::Disk;
use optimus_common::disk::sim::MemDisk;
use optimus_host::disk::HostDisk;
use tokio::sync::watch;

use super::super::fatal::Fatal;
use super::super::log_store::{LogStore, WriterHandle};
use super::super::snapshots::SnapshotStore;
use super::super::state_machine::StateMachine;
use super::super::tuning::IoMode;
use super::super::types::Types;
use super::Kv;

/// Keeps alive what the store needs; the purge gate stands open, since the suite purges without snapshots.
struct Guard {
    _gate: watch::Sender<Option<u64>>,
    _writer: WriterHandle,
    _dir: Option<tempfile::TempDir>,
}

struct OnDisk {
    real: bool,
}

impl StoreBuilder<Types, LogStore, StateMachine<Kv>, Guard> for OnDisk {
    async fn build(&self) -> Result<(Guard, LogStore, StateMachine<Kv>), StorageError<u64>> {
        let dir = self.real.then(|| tempfile::tempdir().unwrap());
        let (disk, io): (Arc<dyn Disk>, _) = match &dir {
            Some(dir) => (Arc::new(HostDisk::open(dir.path()).unwrap()), IoMode::Threads),
            None => (Arc::new(MemDisk::new()), IoMode::Inline),
        };
        let fatal = Fatal::new();
        let (gate, open) = watch::channel(Some(u64::MAX));
        let (snapshots, newest) = SnapshotStore::open(disk.clone()).unwrap();
        let (log, writer) = LogStore::open(disk, 99, open, fatal.clone(), io).await.unwrap();
        log.accept_any_order();
        let machine = StateMachine::new(Kv::default(), newest, Arc::new(snapshots), watch::Sender::new(0), fatal, io).unwrap();
        Ok((Guard { _gate: gate, _writer: writer, _dir: dir }, log, machine))
    }
}

#[test]
fn openrafts_suite_passes_on_a_real_disk() {
    Suite::test_all(OnDisk { real: true }).unwrap();
}

#[test]
fn openrafts_suite_passes_on_the_simulated_disk() {
    Suite::test_all(OnDisk { real: false }).unwrap();
}
