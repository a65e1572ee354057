//! The servers of the cluster as this one knows them: where they are and which key each must show.
//!
//! Filled from the record on disk at start, then from replicated state as it changes, and written back, so that a
//! restart finds its peers before it has a leader.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, RwLock};

use optimus_core::state::{ServerRow, State};
use optimus_host::telemetry::Chain;
use optimus_host::tls::PinnedKeys;
use tokio_util::sync::CancellationToken;

use super::record::{Record, RecordError};
use crate::store::Store;

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

    /// Takes what the state says; tells whether that was news. Durable when it returns.
    ///
    /// A state that knows no servers yet is still being replayed, and says nothing.
    pub fn update(&self, state: &State) -> Result<bool, RecordError> {
        let Some(cluster) = state.cluster.as_ref().filter(|_| !state.servers.is_empty()) else { return Ok(false) };
        let fresh: BTreeMap<u64, ServerRow> = state.servers.iter().map(|(id, row)| (*id, ServerRow::clone(row))).collect();
        let record = {
            let held = self.0.record.read().unwrap_or_else(|e| e.into_inner());
            if *self.rows() == fresh && held.cluster == *cluster {
                return Ok(false);
            }
            held.updated(cluster.clone(), fresh.values().cloned().collect())
        };
        record.store(&self.0.data_dir)?;
        *self.0.record.write().unwrap_or_else(|e| e.into_inner()) = record;
        *self.0.rows.write().unwrap_or_else(|e| e.into_inner()) = fresh;
        Ok(true)
    }

    /// Follows the replicated state until `shutdown`.
    pub async fn run(&self, store: Store, shutdown: CancellationToken) {
        let mut applied = store.applied();
        let mut seen = None;
        loop {
            applied.mark_unchanged();
            let state = store.state();
            // Comparing the tables' roots first: nearly every change is about something else.
            if seen.as_ref().is_none_or(|s: &State| !s.servers.ptr_eq(&state.servers) || s.cluster != state.cluster) {
                match self.update(&state) {
                    Ok(_) => seen = Some(state),
                    Err(error) => tracing::error!(error = %Chain(&error), "failed to store the list of servers; trying again"),
                }
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                changed = applied.changed() => if changed.is_err() { return },
            }
        }
    }
}
