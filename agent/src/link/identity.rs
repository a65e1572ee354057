//! What proves this node to the cluster, on disk: `identity/agent` in the data directory, one file, 0600.
//!
//! One file, so that key, certificate, CA and addresses always belong together, whenever the host dies.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use optimus_common::codec::{self, DecodeError};
use optimus_common::env::Clock;
use optimus_common::join_token::{JoinToken, SERVERS_MAX, is_host_port};
use optimus_common::protocol::{JoinAnswer, ROOTS_MAX, Trusting};
use optimus_common::{ClusterId, NodeId, Timestamp};
use optimus_host::files;
use optimus_host::tls::{self, DER_MAX, Key, PeerIdentity, Role, Roots, TlsError};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

const DIR: &str = "identity";
const FILE: &str = "agent";
/// The key of a join that is not finished: a second try with it is the same node.
const PENDING: &str = "pending-key";
const KIND: u16 = 401;
const PENDING_KIND: u16 = 402;
const VERSION: u16 = 1;
const FILE_MAX: usize = 64 << 10;
/// CAs remembered after they were replaced.
const PINS_MAX: usize = 16;

/// Why this node's identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("failed to read or write {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the node's identity {} is damaged; restore it from a backup, or remove it and join again", path.display())]
    Damaged {
        path: PathBuf,
        #[source]
        source: DecodeError,
    },
    #[error("the node's identity cannot be used")]
    Tls(#[from] TlsError),
    #[error("the certificate is not one for this node: {0}")]
    NotOurs(String),
    #[error("the node's identity names no server")]
    NoServers,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    cluster: ClusterId,
    node: NodeId,
    servers: Vec<String>,
    /// Absent in files of releases before 0.2.
    #[serde(default)]
    learned: Vec<String>,
    certificate: Vec<u8>,
    /// The CA that signed it.
    ca: Vec<u8>,
    /// All CAs trusted. Absent, as are the pins, in files of releases before 0.2: then it is `ca` alone.
    #[serde(default)]
    roots: Vec<Vec<u8>>,
    /// SHA-256 of CAs that were trusted at some time: join tokens name them.
    #[serde(default)]
    pins: Vec<[u8; 32]>,
    /// How far the cluster's CA rotations were when it was told what to trust.
    #[serde(default)]
    progress: u64,
    /// PKCS#8, DER.
    key: Vec<u8>,
}

impl Drop for Stored {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.key);
    }
}

/// Who this node is.
#[derive(Debug, Clone)]
pub struct AgentIdentity {
    dir: PathBuf,
    pub cluster: ClusterId,
    pub node: NodeId,
    /// `host:port` of the servers as the join token has them; at least one.
    pub servers: Vec<String>,
    /// `host:port` of all servers as the control plane last told them. Those of the token stay beside them: they are
    /// known to have worked from here.
    pub learned: Vec<String>,
    pub(super) certificate: Vec<u8>,
    /// The CA that signed the certificate, DER.
    pub(super) ca: Vec<u8>,
    /// The CAs servers are known by, DER; 1 to [`ROOTS_MAX`].
    pub(super) roots: Vec<Vec<u8>>,
    pins: Vec<[u8; 32]>,
    progress: u64,
    pub(super) key: Arc<Key>,
    pub not_before: Timestamp,
    pub not_after: Timestamp,
}

impl AgentIdentity {
    /// The identity in a data directory; `None` before the first join.
    pub fn open(data_dir: &Path) -> Result<Option<Self>, IdentityError> {
        let dir = data_dir.join(DIR);
        let path = dir.join(FILE);
        let Some(bytes) = read(&path)? else { return Ok(None) };
        let stored: Stored = codec::from_envelope(KIND, VERSION, &bytes).map_err(|source| IdentityError::Damaged { path, source })?;
        let key = Arc::new(Key::from_pkcs8(&stored.key)?);
        let (servers, certificate, ca) = (stored.servers.clone(), stored.certificate.clone(), stored.ca.clone());
        let identity = Self::checked(dir, stored.cluster, stored.node, servers, certificate, ca, key)?;
        let roots = if stored.roots.is_empty() { identity.roots.clone() } else { stored.roots.clone() };
        Ok(Some(AgentIdentity { learned: stored.learned.clone(), roots, pins: stored.pins.clone(), progress: stored.progress, ..identity }))
    }

    /// Puts together and stores what a join with this token gave.
    pub(super) fn create(data_dir: &Path, token: &JoinToken, answer: JoinAnswer, key: Key) -> Result<Self, IdentityError> {
        let JoinAnswer { cluster, node, certificate, ca } = answer;
        let dir = data_dir.join(DIR);
        let mut identity = Self::checked(dir, cluster, node, token.servers.clone(), certificate, ca, Arc::new(key))?;
        identity.pins = vec![token.ca_sha256];
        identity.store()?;
        let pending = identity.dir.join(PENDING);
        match fs::remove_file(&pending) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(IdentityError::Io { path: pending, source }),
            _ => Ok(identity),
        }
    }

    fn checked(
        dir: PathBuf,
        cluster: ClusterId,
        node: NodeId,
        servers: Vec<String>,
        certificate: Vec<u8>,
        ca: Vec<u8>,
        key: Arc<Key>,
    ) -> Result<Self, IdentityError> {
        if servers.is_empty() {
            return Err(IdentityError::NoServers);
        }
        let peer = check(&certificate, cluster, node, &key)?;
        let (not_before, not_after) = (peer.not_before, peer.not_after);
        let (roots, learned, pins) = (vec![ca.clone()], Vec::new(), Vec::new());
        Ok(AgentIdentity { dir, cluster, node, servers, learned, certificate, ca, roots, pins, progress: 0, key, not_before, not_after })
    }

    /// Takes a fresh certificate for the same node and key, and the CA that signed it, durably.
    pub(super) fn renew(&mut self, certificate: Vec<u8>, ca: Vec<u8>) -> Result<(), IdentityError> {
        let peer = check(&certificate, self.cluster, self.node, &self.key)?;
        if !tls::issued_by(&certificate, &ca) {
            return Err(IdentityError::NotOurs("it is not signed by the CA that came with it".into()));
        }
        if ca != self.ca && !self.superseded() && self.roots.contains(&ca) {
            // We have told that we hold one of the CA that signs now, and the old one may go any moment.
            return Err(IdentityError::NotOurs("a server that lags signed it with the CA before".into()));
        }
        let mut roots = self.roots.clone();
        if !roots.contains(&ca) && roots.len() < ROOTS_MAX {
            roots.push(ca.clone()); // a member of the cluster vouches for it
        }
        let (not_before, not_after) = (peer.not_before, peer.not_after);
        let fresh = AgentIdentity { certificate, ca, roots, not_before, not_after, ..self.clone() };
        fresh.store()?;
        *self = fresh;
        Ok(())
    }

    /// Trusts exactly these CAs from now on, durably; the first one signs. Gives whether that is news.
    pub(super) fn trust(&mut self, progress: u64, roots: Vec<Vec<u8>>) -> Result<bool, IdentityError> {
        if progress < self.progress || (progress == self.progress && roots == self.roots) {
            return Ok(false);
        }
        if roots.len() > ROOTS_MAX || roots.iter().any(|root| root.len() > DER_MAX) {
            return Err(IdentityError::NotOurs(format!("{} CAs, or one that is too long", roots.len())));
        }
        Roots::new(&roots)?; // what cannot be used must not take the place of what can
        let mut pins = self.pins.clone();
        for root in self.roots.iter().chain(&roots).map(|root| tls::sha256(root)) {
            if !pins.contains(&root) {
                pins.push(root);
            }
        }
        pins.drain(..pins.len().saturating_sub(PINS_MAX));
        let told = AgentIdentity { roots, pins, progress, ..self.clone() };
        told.store()?;
        *self = told;
        Ok(true)
    }

    /// What the control plane is told of it.
    pub(super) fn trusting(&self) -> Trusting {
        Trusting { roots: self.roots.iter().map(|root| tls::sha256(root)).collect(), signer: tls::sha256(&self.ca) }
    }

    /// True when another CA signs than the one that signed the certificate.
    pub(super) fn superseded(&self) -> bool {
        self.roots.first().is_some_and(|signs| *signs != self.ca)
    }

    /// Whether a join token that names this CA is for our cluster.
    pub(super) fn knows(&self, ca_sha256: &[u8; 32]) -> bool {
        self.pins.contains(ca_sha256) || self.roots.iter().any(|root| tls::sha256(root) == *ca_sha256)
    }

    /// Takes the addresses of the servers, durably. Gives whether they are news.
    pub(super) fn learn(&mut self, addresses: Vec<String>) -> Result<bool, IdentityError> {
        let mut learned: Vec<String> = Vec::new();
        for address in addresses.into_iter().filter(|a| is_host_port(a)).take(SERVERS_MAX) {
            if !learned.contains(&address) {
                learned.push(address);
            }
        }
        if learned.is_empty() || learned == self.learned {
            return Ok(false);
        }
        let told = AgentIdentity { learned, ..self.clone() };
        told.store()?;
        *self = told;
        Ok(true)
    }

    /// All known addresses in the order this node tries them.
    ///
    /// By a hash of node and address: every node has an order of its own, so that a thousand nodes spread over all
    /// servers, and those of a server that died over all others. Those of the token that are not among the servers now
    /// come last.
    pub fn order(&self) -> Vec<String> {
        let by_hash = |addresses: Vec<&String>| {
            let mut ranked: Vec<_> = addresses.into_iter().map(|a| (rank(self.node, a), a.clone())).collect();
            ranked.sort();
            ranked.into_iter().map(|(_, address)| address)
        };
        let rest = self.servers.iter().filter(|a| !self.learned.contains(a)).collect();
        by_hash(self.learned.iter().collect()).chain(by_hash(rest)).collect()
    }

    fn store(&self) -> Result<(), IdentityError> {
        let AgentIdentity {
            dir,
            cluster,
            node,
            servers,
            learned,
            certificate,
            ca,
            roots,
            pins,
            progress,
            key,
            not_before: _,
            not_after: _,
        } = self;
        let stored = Stored {
            cluster: *cluster,
            node: *node,
            servers: servers.clone(),
            learned: learned.clone(),
            certificate: certificate.clone(),
            ca: ca.clone(),
            roots: roots.clone(),
            pins: pins.clone(),
            progress: *progress,
            key: key.to_pkcs8().to_vec(),
        };
        let bytes = Zeroizing::new(codec::envelope(KIND, VERSION, &stored));
        write(dir, FILE, &bytes)
    }

    /// When to ask for a fresh certificate: at half its life.
    pub fn renew_at(&self) -> Timestamp {
        Timestamp(self.not_before.0 + self.not_after.since(self.not_before).0 / 2)
    }

    /// True once only renewing is possible with the certificate.
    pub fn expired(&self, clock: &dyn Clock) -> bool {
        clock.now() > self.not_after
    }

    /// SHA-256 of the CA that signed our certificate.
    pub fn ca_fingerprint(&self) -> [u8; 32] {
        tls::sha256(&self.ca)
    }
}

fn rank(node: NodeId, address: &str) -> [u8; 32] {
    tls::sha256(&[node.0.as_bytes(), address.as_bytes()].concat())
}

/// The key a join is tried with: the one of the try before, if that was not finished.
pub(super) fn pending_key(data_dir: &Path) -> Result<Key, IdentityError> {
    let dir = data_dir.join(DIR);
    if let Some(bytes) = read(&dir.join(PENDING))? {
        let key = codec::from_envelope::<Vec<u8>>(PENDING_KIND, VERSION, &bytes).map(Zeroizing::new);
        match key.ok().and_then(|key| Key::from_pkcs8(&key).ok()) {
            Some(key) => return Ok(key),
            // Nothing depends on it but a try that failed.
            None => tracing::warn!("the key of an unfinished join is damaged; making another"),
        }
    }
    let key = Key::generate()?;
    let secret = key.to_pkcs8();
    let bytes = Zeroizing::new(codec::envelope(PENDING_KIND, VERSION, &*secret));
    write(&dir, PENDING, &bytes)?;
    Ok(key)
}

fn read(path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, IdentityError> {
    let io = |source| IdentityError::Io { path: path.to_owned(), source };
    match files::read_bounded(path, FILE_MAX) {
        Ok(bytes) => {
            files::check_private(path).map_err(io)?;
            Ok(Some(Zeroizing::new(bytes)))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io(e)),
    }
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), IdentityError> {
    let path = dir.join(name);
    files::create_private_dir(dir).and_then(|()| files::write_private(&path, bytes)).map_err(|source| IdentityError::Io { path, source })
}

/// A certificate must be for this node, this key and this cluster.
fn check(certificate: &[u8], cluster: ClusterId, node: NodeId, key: &Key) -> Result<PeerIdentity, IdentityError> {
    if certificate.len() > DER_MAX {
        return Err(IdentityError::NotOurs(format!("{} bytes are too long", certificate.len())));
    }
    let peer = PeerIdentity::of(certificate)?;
    if peer.cluster != cluster || peer.role != Role::Agent(node) {
        return Err(IdentityError::NotOurs(format!("it is for {} of cluster {}", peer.role, peer.cluster)));
    }
    if peer.key_fingerprint != key.fingerprint() {
        return Err(IdentityError::NotOurs("it is for another key".into()));
    }
    Ok(peer)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_key_of_an_unfinished_join_is_used_again() {
        let dir = tempfile::tempdir().unwrap();
        assert!(AgentIdentity::open(dir.path()).unwrap().is_none());
        let first = pending_key(dir.path()).unwrap();
        assert_eq!(pending_key(dir.path()).unwrap().fingerprint(), first.fingerprint());
        files::write_private(&dir.path().join(DIR).join(PENDING), b"junk").unwrap();
        assert_ne!(pending_key(dir.path()).unwrap().fingerprint(), first.fingerprint());
    }

    #[test]
    fn nodes_spread_over_servers_and_over_the_rest_when_one_dies() {
        let addresses: Vec<String> = (1..=3).map(|n| format!("10.0.0.{n}:7443")).collect();
        let (mut first, mut second) = ([0u32; 3], [0u32; 9]);
        for n in 0..3000u128 {
            let node = NodeId(uuid::Uuid::from_u128(n));
            let mut order: Vec<usize> = (0..3).collect();
            order.sort_by_key(|&i| rank(node, &addresses[i]));
            first[order[0]] += 1;
            second[order[0] * 3 + order[1]] += 1;
        }
        assert!(first.iter().all(|n| (850..1150).contains(n)), "{first:?}");
        assert!(second.iter().filter(|n| **n > 0).all(|n| (400..600).contains(n)), "{second:?}");
        assert_eq!(second.iter().filter(|n| **n > 0).count(), 6);
    }

    #[test]
    fn a_damaged_identity_is_named_and_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        write(&dir.path().join(DIR), FILE, b"OPT1 but no more").unwrap();
        let error = AgentIdentity::open(dir.path()).unwrap_err();
        assert!(matches!(error, IdentityError::Damaged { .. }), "{error}");
    }
}
