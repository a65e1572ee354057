//! Who this server is, on its own disk: all it needs to start, and to reach its peers, before there is a leader to ask.
//!
//! It is a copy of what the replicated state says, made whenever that changes, plus this server's own key. Its secrets
//! are sealed with the root key.

use std::io;
use std::path::{Path, PathBuf};

use optimus_common::codec::{self, DecodeError};
use optimus_common::env::Env;
use optimus_core::state::{Cluster, SERVERS_MAX, ServerRow};
use optimus_host::files;
use optimus_host::tls::{Key, TlsError};
use serde::{Deserialize, Serialize};

use super::root_key::{RootKey, RootKeyError};

/// Name of the file in the data directory.
pub const FILE: &str = "server.identity";
/// Name of the file that holds the key of a join that has not been answered yet.
pub const PENDING: &str = "server.pending";

const KIND: u16 = 0x5301;
const PENDING_KIND: u16 = 0x5302;
const VERSION: u16 = 1;
/// A row has a few hundred bytes, the cluster a few thousand.
const FILE_MAX: usize = 64 << 10;
const SERVER_KEY: &str = "server key";

/// Why the record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("failed to read or write {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{} is damaged; remove this server (`optimus cluster leave --server ID` elsewhere), move its data directory away and join anew",
        path.display()
    )]
    Damaged {
        path: PathBuf,
        #[source]
        source: DecodeError,
    },
    #[error(transparent)]
    RootKey(#[from] RootKeyError),
    #[error("the server's own key is malformed")]
    Key(#[from] TlsError),
}

/// The stored form.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Our Raft id.
    pub server: u64,
    pub cluster: Cluster,
    /// PKCS#8, sealed.
    key_sealed: Vec<u8>,
    /// The servers of the cluster as last seen, ourselves included.
    pub servers: Vec<ServerRow>,
}

impl Record {
    pub fn new(server: u64, cluster: Cluster, key: &Key, servers: Vec<ServerRow>, root: &RootKey, env: &Env) -> Self {
        let key_sealed = root.seal(&key.to_pkcs8(), SERVER_KEY, cluster.id.0.as_bytes(), env);
        Record { server, cluster, key_sealed, servers }
    }

    /// The record of this data directory; `None` when this server has neither founded nor joined a cluster.
    pub fn load(data_dir: &Path) -> Result<Option<Self>, RecordError> {
        let path = data_dir.join(FILE);
        match read(&path)? {
            None => Ok(None),
            Some(bytes) => codec::from_envelope(KIND, VERSION, &bytes).map(Some).map_err(|source| RecordError::Damaged { path, source }),
        }
    }

    /// Durable when it returns.
    pub fn store(&self, data_dir: &Path) -> Result<(), RecordError> {
        let path = data_dir.join(FILE);
        let bounded = Record { servers: self.servers.iter().take(SERVERS_MAX).cloned().collect(), ..self.clone() };
        files::write_private(&path, &codec::envelope(KIND, VERSION, &bounded)).map_err(|source| RecordError::Io { path, source })
    }

    /// The same record, its secrets sealed with another root key.
    pub fn resealed(&self, key: &Key, root: &RootKey, env: &Env) -> Self {
        Record::new(self.server, self.cluster.clone(), key, self.servers.clone(), root, env)
    }

    /// The same server in the cluster as it is now.
    pub fn updated(&self, cluster: Cluster, servers: Vec<ServerRow>) -> Self {
        Record { server: self.server, cluster, key_sealed: self.key_sealed.clone(), servers }
    }

    /// This server's key pair.
    pub fn key(&self, root: &RootKey) -> Result<Key, RecordError> {
        Ok(Key::from_pkcs8(&root.unseal(&self.key_sealed, SERVER_KEY, self.cluster.id.0.as_bytes())?)?)
    }
}

/// The key a join asks with: kept until the join is done, so that asking again burns no second use of the token.
pub fn pending_key(data_dir: &Path) -> Result<Key, RecordError> {
    let path = data_dir.join(PENDING);
    if let Some(bytes) = read(&path)? {
        let secret: Vec<u8> =
            codec::from_envelope(PENDING_KIND, VERSION, &bytes).map_err(|source| RecordError::Damaged { path: path.clone(), source })?;
        return Ok(Key::from_pkcs8(&zeroize::Zeroizing::new(secret))?);
    }
    let key = Key::generate()?;
    let bytes = zeroize::Zeroizing::new(codec::envelope(PENDING_KIND, VERSION, &*key.to_pkcs8()));
    files::write_private(&path, &bytes).map_err(|source| RecordError::Io { path, source })?;
    Ok(key)
}

/// The join is done and its key is in the record.
pub fn forget_pending(data_dir: &Path) {
    // A file left behind is read by nobody: there is a record now.
    let _ = std::fs::remove_file(data_dir.join(PENDING));
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, RecordError> {
    let io = |source| RecordError::Io { path: path.to_owned(), source };
    match files::read_bounded(path, FILE_MAX) {
        Ok(bytes) => {
            files::check_private(path).map_err(io)?;
            Ok(Some(bytes))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io(e)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use optimus_common::{ClusterId, Timestamp};
    use optimus_host::env::HostEnv;

    use super::*;

    #[test]
    fn a_record_comes_back_and_damage_is_told() {
        let (dir, env) = (tempfile::tempdir().unwrap(), HostEnv::new());
        assert!(Record::load(dir.path()).unwrap().is_none());
        let root = RootKey::create(dir.path(), &env).unwrap();
        let cluster = Cluster {
            id: ClusterId(env.new_id()),
            created_at: Timestamp(1),
            ca_certificate: vec![1],
            ca_key_sealed: vec![2],
            version: 1,
            authorities: Default::default(),
        };
        let key = Key::generate().unwrap();
        let record = Record::new(7, cluster, &key, vec![], &root, &env);
        record.store(dir.path()).unwrap();
        let back = Record::load(dir.path()).unwrap().unwrap();
        assert!(back == record);
        assert_eq!(back.key(&root).unwrap().fingerprint(), key.fingerprint());
        let bytes = std::fs::read(dir.path().join(FILE)).unwrap();
        assert!(!bytes.windows(32).any(|w| key.to_pkcs8().windows(32).any(|k| k == w)), "the key is sealed");

        let other = tempfile::tempdir().unwrap();
        assert!(back.key(&RootKey::create(other.path(), &env).unwrap()).is_err(), "another root key");
        let mut bad = bytes.clone();
        *bad.last_mut().unwrap() ^= 1;
        files::write_private(&dir.path().join(FILE), &bad).unwrap();
        assert!(matches!(Record::load(dir.path()), Err(RecordError::Damaged { .. })));
    }

    #[test]
    fn a_join_that_is_asked_for_again_uses_the_same_key() {
        let dir = tempfile::tempdir().unwrap();
        let first = pending_key(dir.path()).unwrap().fingerprint();
        assert_eq!(pending_key(dir.path()).unwrap().fingerprint(), first);
        forget_pending(dir.path());
        assert_ne!(pending_key(dir.path()).unwrap().fingerprint(), first);
    }
}
