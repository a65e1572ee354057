//! After a start: what does still run that the ledger does not name?
//!
//! A run without a wanted allocation is either to be stopped (the set that dropped it was written, and the agent died
//! before it acted) or, when the ledger was lost, to be kept until a server says what is wanted.

use std::fs;
use std::sync::Arc;

use optimus_common::AllocId;
use optimus_common::protocol::DesiredAlloc;

use super::{ALLOC_FILE, Manager};
use crate::alloc::worker::alloc_dir;
use crate::driver::{Recovered, Run};
use crate::ledger::KIND_DESIRED;

/// Directories that are looked through at a start; there are never near so many.
const DIRS_MAX: usize = 100_000;

impl Manager {
    /// Looks for live runs that no wanted allocation accounts for.
    pub(super) async fn restore(&self, rebuilt: bool) {
        for id in self.unaccounted() {
            let Some(run) = self.find_alive(id).await else { continue };
            match self.read_copy(id) {
                Some(alloc) => {
                    tracing::warn!(alloc = %id, workload = %alloc.key, pid = run.pid(), keep = rebuilt, "found a run the ledger does not name");
                    let mut inner = self.lock();
                    if rebuilt {
                        // Wanted until a server says otherwise.
                        inner.wanted.allocs.insert(id, Arc::new(alloc));
                    } else {
                        self.take(&mut inner, Arc::new(alloc), false);
                    }
                }
                None => {
                    tracing::error!(alloc = %id, pid = run.pid(), "found a run of which nothing else is known; it stays until a server says what is wanted");
                    self.lock().orphans.insert(id, run);
                }
            }
        }
    }

    fn unaccounted(&self) -> Vec<AllocId> {
        let inner = self.lock();
        let entries = match fs::read_dir(&self.ctx.allocs_dir) {
            Ok(entries) => entries,
            Err(error) => {
                tracing::error!(dir = %self.ctx.allocs_dir.display(), %error, "failed to look for runs");
                return vec![];
            }
        };
        let ids = entries.take(DIRS_MAX).filter_map(Result::ok).filter_map(|e| e.file_name().to_str()?.parse().ok());
        ids.filter(|id| !inner.wanted.allocs.contains_key(id)).collect()
    }

    async fn find_alive(&self, id: AllocId) -> Option<Arc<dyn Run>> {
        for driver in self.drivers.values() {
            if let Some(Recovered::Alive(run)) = driver.recover(id).await {
                return Some(run);
            }
        }
        None
    }

    fn read_copy(&self, id: AllocId) -> Option<DesiredAlloc> {
        let path = alloc_dir(&self.ctx.allocs_dir, id).join(ALLOC_FILE);
        let opened = fs::read(&path).map_err(|e| e.to_string());
        match opened.and_then(|bytes| self.sealer.open(KIND_DESIRED, id, &bytes).map_err(|e| crate::ledger::chain(&e))) {
            Ok(alloc) => Some(alloc),
            Err(error) => {
                tracing::warn!(path = %path.display(), error, "cannot use the copy of an allocation");
                None
            }
        }
    }
}
