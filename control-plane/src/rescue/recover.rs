//! From the store of one survivor to a cluster of that server alone, when a majority is gone for good.
//!
//! ```text
//! inspect: read and apply all the survivor holds   (nothing changes)
//! refuse:  ask every old voter; a majority within reach means nothing needs recovering
//! write:   raft.recovering made beside, then raft <-> raft.recovering in one step, the old one kept under another name
//! ```
//! The survivor goes on under a new id. Under its old one, a server of before that comes back could still talk to it,
//! and two histories would mix.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use optimus_common::disk::Disk;
use optimus_common::env::Env;
use optimus_core::state::{Applied, Proposal, State};
use optimus_host::disk::HostDisk;
use optimus_host::files::{DataDirLock, LockError};

use super::exclusive;
use super::lineage::{self, Beginning, NoRoom};
use super::probe::Reach;
use super::restore::RAFT_DIR;
use crate::identity::root_key::{RootKey, RootKeyError};
use crate::raft::{self, Capture, Machine, Peer, SalvageError, Salvaged, Seed, StoreError};

/// Where the new store is made.
const MAKING: &str = "raft.recovering";

/// Why nothing was recovered. Nothing was changed, unless it says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    #[error("there is no raft store at {}", path.display())]
    NoStore { path: PathBuf },
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error("failed to open {}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Salvage(#[from] SalvageError),
    #[error("this server has no vote in its cluster: recover on one that had, or restore an export")]
    NoVoter,
    #[error("this server is the only one with a vote: nothing is lost, start it instead")]
    Alone,
    #[error("the store holds no cluster")]
    NoCluster,
    #[error(
        "servers {} can be reached, and with this one they are a majority of {voters}: nothing is lost, start this server instead",
        list(reachable)
    )]
    MajorityReachable { reachable: Vec<u64>, voters: usize },
    #[error("the root key is missing in {}; give a copy of it with --root-key", dir.display())]
    NoRootKey { dir: PathBuf },
    #[error("the root key does not fit")]
    RootKey(#[from] RootKeyError),
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    #[error("failed to write the new store; the old one is untouched")]
    Store(#[from] StoreError),
    #[error("failed to move {} away", path.display())]
    Move {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("failed to put the new store in the place of the old one; the old one is untouched")]
    Exchange(#[source] io::Error),
    #[error("the new store is in place, but the old one could not be renamed and is now {}", path.display())]
    Aside {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

fn list(ids: &[u64]) -> String {
    ids.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
}

/// The state without anybody who reads it.
#[derive(Debug, Default)]
pub struct OfflineState(pub State);

impl Machine for OfflineState {
    type Command = Proposal;
    type Answer = Applied;

    fn apply(&mut self, index: u64, proposal: Proposal) -> Applied {
        self.0.apply(index, proposal)
    }

    fn snapshot(&self) -> Capture {
        let state = self.0.clone();
        Box::new(move || state.to_bytes())
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), String> {
        self.0 = State::from_bytes(bytes).map_err(|e| e.to_string())?;
        Ok(())
    }

    fn published(&mut self, _: u64) {}
}

/// What a survivor holds. The data directory stays locked while this lives.
#[derive(Debug)]
pub struct Survivor {
    pub found: Salvaged<OfflineState>,
    data_dir: PathBuf,
    _lock: Option<DataDirLock>,
    _disk: Arc<dyn Disk>,
}

/// Which servers of before answer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reached {
    pub answering: Vec<u64>,
    pub silent: Vec<u64>,
}

/// Reads everything the server of `data_dir` holds. The server must be stopped.
///
/// # Errors
/// A running server, a damaged store.
pub fn inspect(data_dir: &Path) -> Result<Survivor, RecoverError> {
    let path = data_dir.join(RAFT_DIR);
    // Asked first: opening would make it.
    if !path.is_dir() {
        return Err(RecoverError::NoStore { path });
    }
    let lock = DataDirLock::acquire(data_dir)?;
    let disk: Arc<dyn Disk> = Arc::new(HostDisk::open(&path).map_err(|source| RecoverError::Open { path, source })?);
    let found = raft::salvage(disk.clone(), OfflineState::default())?;
    if found.machine.0.cluster.is_none() {
        return Err(RecoverError::NoCluster);
    }
    Ok(Survivor { found, data_dir: data_dir.to_owned(), _lock: Some(lock), _disk: disk })
}

/// Asks every other voter and refuses when those that answer would be a majority together with this one.
///
/// # Errors
/// [`RecoverError::MajorityReachable`].
pub async fn refuse_reachable_majority<M>(found: &Salvaged<M>, reach: &dyn Reach) -> Result<Reached, RecoverError> {
    let voters: BTreeSet<u64> = found.voters.iter().flatten().copied().collect();
    if !voters.contains(&found.node_id) {
        return Err(RecoverError::NoVoter);
    }
    if voters.len() == 1 {
        return Err(RecoverError::Alone);
    }
    let others = voters.iter().filter(|id| **id != found.node_id);
    let asked = futures_util::future::join_all(others.map(|id| async move {
        let Some(addr) = found.members.get(id) else { return (*id, false) };
        (*id, reach.reaches(&Peer { id: *id, addr: addr.clone() }).await)
    }));
    let (answering, silent): (Vec<_>, Vec<_>) = asked.await.into_iter().partition(|(_, answers)| *answers);
    let ids = |all: Vec<(u64, bool)>| all.into_iter().map(|(id, _)| id).collect::<Vec<_>>();
    let reached = Reached { answering: ids(answering), silent: ids(silent) };
    let up = |id: &u64| *id == found.node_id || reached.answering.contains(id);
    // While a change is under way both sets must agree.
    let quorum = found.voters.iter().all(|set| set.iter().filter(|id| up(id)).count() > set.len() / 2);
    if quorum {
        return Err(RecoverError::MajorityReachable { reachable: reached.answering, voters: voters.len() });
    }
    Ok(reached)
}

/// What became of the survivor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovered {
    pub beginning: Beginning,
    /// The old store.
    pub aside: PathBuf,
}

impl Survivor {
    /// The root key to go on with: `given`, or that of the data directory. Checked against the state.
    ///
    /// # Errors
    /// None there, or one that does not fit.
    pub fn root_key(&self, given: Option<RootKey>) -> Result<RootKey, RecoverError> {
        let fits = |key: &RootKey| super::restore::check_root_key(&self.found.machine.0, key).is_ok();
        let key = match given {
            Some(key) => key,
            None => RootKey::find(&self.data_dir, fits)?.ok_or_else(|| RecoverError::NoRootKey { dir: self.data_dir.clone() })?,
        };
        super::restore::check_root_key(&self.found.machine.0, &key)?;
        Ok(key)
    }

    /// The address the server had.
    pub fn addr(&self) -> Option<&str> {
        self.found.members.get(&self.found.node_id).map(String::as_str)
    }

    /// Makes this server the only one of its cluster. Call it after [`refuse_reachable_majority`].
    ///
    /// # Errors
    /// What the disk says; the message tells what it left.
    pub fn write(self, root_key: &RootKey, addr: &str, env: &Env) -> Result<Recovered, RecoverError> {
        let (term, index) = (self.found.term, self.found.last.1);
        let beginning = lineage::begin(index, term, env)?;
        let mut state = self.found.machine.0.clone();
        lineage::enter(&mut state, beginning);

        let (live, making) = (self.data_dir.join(RAFT_DIR), self.data_dir.join(MAKING));
        let stamp = env.clock.now().0;
        let moved = |path: &Path, to: String| {
            let to = self.data_dir.join(to);
            exclusive::rename_new(path, &to).map(|()| to).map_err(|source| (path.to_owned(), source))
        };
        // What an earlier try left may be the old store itself, so it is never removed.
        if making.exists() {
            moved(&making, format!("raft.left-{stamp}")).map_err(|(path, source)| RecoverError::Move { path, source })?;
        }
        let disk = HostDisk::open(&making).map_err(|source| RecoverError::Open { path: making.clone(), source })?;
        let Beginning { server: node_id, index, term } = beginning;
        raft::seed(Arc::new(disk), &Seed { node_id, addr: addr.to_owned(), term, index, content: state.to_bytes() })?;
        root_key.store(&self.data_dir)?;
        exclusive::exchange(&live, &making).map_err(RecoverError::Exchange)?;
        let aside = moved(&making, format!("raft.before-recover-{stamp}"));
        let aside = aside.map_err(|(path, source)| RecoverError::Aside { path, source })?;
        Ok(Recovered { beginning, aside })
    }
}

#[cfg(test)]
mod tests;
