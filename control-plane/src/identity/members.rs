//! The servers of the cluster as this one knows them: where they are and which key each must show.
//!
//! Filled from the record on disk at start, then from replicated state as it changes, and written back, so that a
//! restart finds its peers before it has a leader.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, RwLock};

use optimus_common::env::Env;
use optimus_core::state::{ServerRow, State};
use optimus_host::tls::{Key, PinnedKeys};

use super::record::{Record, RecordError};
use super::root_key::RootKey;

/// The address book; cheap to clone.
#[derive(Clone)]
pub struct Members(Arc<Inner>);

struct Inner {
    rows: RwLock<BTreeMap<u64, ServerRow>>,
    record: RwLock<Record>,
    data_dir: PathBuf,
}

impl std::fmt::Debug for Members {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Members({:?})", self.rows().keys())
    }
}

impl PinnedKeys for Members {
    fn key_of(&self, id: u64) -> Option<[u8; 32]> {
        self.rows().get(&id).and_then(|row| row.key_fingerprint.as_slice().try_into().ok())
    }
}

impl Members {
    pub fn new(record: Record, data_dir: PathBuf) -> Self {
        let rows = record.servers.iter().map(|row| (row.id, row.clone())).collect();
        Members(Arc::new(Inner { rows: RwLock::new(rows), record: RwLock::new(record), data_dir }))
    }

    fn rows(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<u64, ServerRow>> {
        self.0.rows.read().unwrap_or_else(|e| e.into_inner())
    }

    /// Where to reach server `id`.
    pub fn address(&self, id: u64) -> Option<String> {
        self.rows().get(&id).map(|row| row.address.clone())
    }

    /// Seals the secrets of the record with `root`. Durable when it returns.
    pub fn reseal(&self, key: &Key, root: &RootKey, env: &Env) -> Result<(), RecordError> {
        let record = self.0.record.read().unwrap_or_else(|e| e.into_inner()).resealed(key, root, env);
        record.store(&self.0.data_dir)?;
        *self.0.record.write().unwrap_or_else(|e| e.into_inner()) = record;
        Ok(())
    }

    /// Takes what the state says; tells whether that was news. Durable when it returns.
    ///
    /// A state that knows no servers yet is still being replayed, and says nothing.
    pub fn update(&self, state: &State) -> Result<bool, RecordError> {
        let Some(cluster) = state.cluster.as_ref().filter(|_| !state.servers.is_empty()) else { return Ok(false) };
        let fresh: BTreeMap<u64, ServerRow> = state.servers.iter().map(|(id, row)| (*id, ServerRow::clone(row))).collect();
        let record = {
            let held = self.0.record.read().unwrap_or_else(|e| e.into_inner());
            let older = cluster.ca_progress() < held.cluster.ca_progress();
            if *self.rows() == fresh && (held.cluster == *cluster || older) {
                return Ok(false);
            }
            // A state that is still being replayed must not take back a CA that others sign with by now.
            let cluster = if cluster.ca_progress() < held.cluster.ca_progress() { &held.cluster } else { cluster };
            held.updated(cluster.clone(), fresh.values().cloned().collect())
        };
        record.store(&self.0.data_dir)?;
        *self.0.record.write().unwrap_or_else(|e| e.into_inner()) = record;
        *self.0.rows.write().unwrap_or_else(|e| e.into_inner()) = fresh;
        Ok(true)
    }
}
