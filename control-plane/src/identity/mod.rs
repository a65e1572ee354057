//! Who belongs to the cluster: its certificate authority, this server's own certificate, and the TLS
//! settings of the server's two listeners.
//!
//! The CA is made at the first start. Its private key lives in replicated state sealed with the
//! [root key](root_key), so that every server can issue. A server keeps its key pair for its life (peers know it by that)
//! in its [record](record) on disk; its certificate it makes anew at each start, at half its life, and when another CA
//! begins to sign. What is trusted and who signs follows the replicated state in one place: [`Identity::run`].

pub mod ca;
pub mod joining;
pub mod members;
pub mod record;
pub mod root_key;
pub mod rotation;
mod vaults;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use optimus_common::env::Env;
use optimus_common::protocol::{ALPN_AGENT, ALPN_JOIN, ALPN_RAFT, ALPN_RELAY};
use optimus_common::{ClusterId, NodeId, Timestamp};
use optimus_core::state::command::Refusal;
use optimus_core::state::{Applied, Cluster, Command, Member, State};
use optimus_host::telemetry::Chain;
use optimus_host::tls::{self, Key, PinnedKeys, Roots, TlsError};
use optimus_host::transport::{self, SetupError};
use rustls::client::ResolvesClientCert;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use tokio_util::sync::CancellationToken;

pub use ca::{Ca, CheckedRequest, IssueError, Issued};
pub use members::Members;
use record::{Record, RecordError};
use root_key::{RootKey, RootKeyError};
pub use vaults::SecretBox;

use crate::peers::PeerSettings;
use crate::store::{ProposeError, Store};

/// Longest wait at start for a leader that can make the cluster.
const CREATE_PATIENCE: Duration = Duration::from_secs(30);
const CREATE_RETRY: Duration = Duration::from_millis(100);
/// How often a server looks whether its certificate is due.
const RENEWAL_CHECK: Duration = Duration::from_secs(600);
const CA_KEY: &str = "CA key";

/// Why a server has no identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error(transparent)]
    RootKey(#[from] RootKeyError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("failed to create the cluster")]
    Propose(#[source] ProposeError),
    #[error("failed to create the cluster: {0}")]
    Refused(Refusal),
    #[error("the cluster was created, but its record did not appear within {} s", CREATE_PATIENCE.as_secs())]
    NotApplied,
    #[error("failed to issue a certificate")]
    Issue(#[from] IssueError),
    #[error("failed to set up TLS")]
    Tls(#[from] TlsError),
    #[error("failed to set up TLS")]
    Key(#[source] rustls::Error),
    #[error("failed to set up QUIC")]
    Quic(#[from] SetupError),
}

/// What this server is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerNames {
    /// Its number among the servers.
    pub server: u64,
    /// DNS names and IP addresses (without port) people and agents may reach it at, beside `localhost`,
    /// the loopback addresses and the host's own name, which are always there.
    pub names: Vec<String>,
}

/// This server's part in the cluster's identity.
pub struct Identity {
    env: Env,
    cluster: ClusterId,
    authority: RwLock<Arc<Authority>>,
    data_dir: PathBuf,
    root: RwLock<RootKey>,
    server: u64,
    key: Key,
    names: Vec<String>,
    roots: Arc<Roots>,
    certificate: Arc<OwnCertificate>,
    members: Members,
    opened: vaults::Opened,
}

impl Identity {
    /// Founds the cluster in `store`: makes root key, CA and this server's own key and record. Started anew after it was
    /// cut short, it goes on where it ended.
    pub async fn found(data_dir: &Path, store: &Store, names: &ServerNames) -> Result<Arc<Self>, IdentityError> {
        let env = store.env.clone();
        let key = RootKey::open(data_dir)?;
        let (cluster, key) = match (settled(store).await?.cluster, key) {
            (Some(cluster), Some(key)) => (cluster, key),
            // A new key would not open the old CA; making one would only hide that.
            (Some(_), None) => return Err(RootKeyError::Missing { path: data_dir.join(root_key::FILE) }.into()),
            (None, key) => {
                let key = match key {
                    Some(key) => key, // a first start that was cut short
                    None => RootKey::create(data_dir, &env)?,
                };
                (create(store, &key).await?, key)
            }
        };
        let record = match Record::load(data_dir)? {
            Some(record) if record.cluster.id == cluster.id && record.server == names.server => record,
            _ => {
                let record = Record::new(names.server, cluster, &Key::generate()?, vec![], &key, &env);
                record.store(data_dir)?;
                record
            }
        };
        Self::open(data_dir, record, names, &env)
    }

    /// The identity this data directory's record tells of. Needs nobody else.
    pub fn open(data_dir: &Path, record: Record, names: &ServerNames, env: &Env) -> Result<Arc<Self>, IdentityError> {
        let fits = |key: &RootKey| check_root_key(&record.cluster, key).is_ok();
        let root = RootKey::find(data_dir, fits)?.ok_or_else(|| RootKeyError::Missing { path: data_dir.join(root_key::FILE) })?;
        let cluster = record.cluster.id;
        let authority = Authority::open(&record.cluster, &root)?;
        // Cut short while it took up another root key: the record's own key may be sealed with the one before.
        let key = match (record.key(&root), RootKey::open(data_dir)?) {
            (Err(_), Some(before)) => record.key(&before)?,
            (key, _) => key?,
        };
        let record = record.resealed(&key, &root, env);
        record.store(data_dir)?;
        root.replace(data_dir)?;
        let mut all = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
        all.extend(host_name());
        all.extend(names.names.iter().cloned());
        all.sort();
        all.dedup();
        let own = certify(&authority, &key, record.server, &all, env)?;
        let roots = Roots::new(&authority.of.roots())?;
        Ok(Arc::new(Identity {
            env: env.clone(),
            cluster,
            authority: RwLock::new(Arc::new(authority)),
            data_dir: data_dir.to_owned(),
            root: RwLock::new(root),
            server: record.server,
            key,
            names: all,
            roots,
            certificate: Arc::new(OwnCertificate(RwLock::new(own))),
            members: Members::new(record, data_dir.to_owned()),
            opened: vaults::Opened::default(),
        }))
    }

    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// This server's Raft id.
    pub fn server(&self) -> u64 {
        self.server
    }

    /// SHA-256 of this server's public key.
    pub fn key_fingerprint(&self) -> [u8; 32] {
        self.key.fingerprint()
    }

    /// The servers of the cluster.
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// The text of the root key's file: for a server that joins `cluster`, and nobody else. `None` while this server has
    /// yet to take up the key that the cluster has now.
    pub fn root_key_text(&self, cluster: &Cluster) -> Option<zeroize::Zeroizing<String>> {
        let root = self.root();
        check_root_key(cluster, &root).ok().map(|()| root.to_text())
    }

    fn root(&self) -> RootKey {
        self.root.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    fn authority(&self) -> Arc<Authority> {
        self.authority.read().unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Certificate of the CA that signs, DER.
    pub fn ca_der(&self) -> Vec<u8> {
        self.authority().of.ca_certificate.clone()
    }

    /// Certificates of all CAs trusted at the moment, DER; the one that signs first.
    pub fn trusted(&self) -> Vec<Vec<u8>> {
        self.trust().1
    }

    /// The same, and how far the rotations are.
    pub fn trust(&self) -> (u64, Vec<Vec<u8>>) {
        let held = self.authority();
        (held.of.ca_progress(), held.of.roots().into_iter().map(<[u8]>::to_vec).collect())
    }

    /// The same as PEM, for HTTPS clients.
    pub fn ca_pem(&self) -> String {
        self.trusted().iter().map(|der| pem(der)).collect()
    }

    /// SHA-256 of the certificate of the CA that signs: what join tokens pin.
    pub fn ca_fingerprint(&self) -> [u8; 32] {
        tls::sha256(&self.ca_der())
    }

    /// Certifies the key of a checked request as the agent of `node`, for [`ca::AGENT_LIFETIME`].
    pub fn issue_agent(&self, request: &CheckedRequest, node: NodeId) -> Result<Issued, IssueError> {
        self.authority().ca.issue_agent(request, node, &self.env)
    }

    /// TLS for the HTTPS API. Follows renewals by itself.
    pub fn api_tls(&self) -> Result<Arc<rustls::ServerConfig>, IdentityError> {
        Ok(Arc::new(tls::https_server(self.certificate.clone(), &self.env.clock)?))
    }

    /// QUIC for agents and for those who join. Follows renewals by itself.
    pub fn quic_server(&self, pins: Arc<dyn PinnedKeys>) -> Result<quinn::ServerConfig, IdentityError> {
        self.quic(pins, &[ALPN_AGENT, ALPN_JOIN])
    }

    /// The same, also for the servers that `pins` says are members.
    pub fn quic_server_with_peers(&self, pins: Arc<dyn PinnedKeys>) -> Result<quinn::ServerConfig, IdentityError> {
        self.quic(pins, &[ALPN_AGENT, ALPN_JOIN, ALPN_RAFT, ALPN_RELAY])
    }

    fn quic(&self, pins: Arc<dyn PinnedKeys>, alpn: &[&[u8]]) -> Result<quinn::ServerConfig, IdentityError> {
        let config = tls::machine_server(&self.roots, self.certificate.clone(), pins, alpn, &self.env.clock)?;
        Ok(transport::server_config(config)?)
    }

    /// The authorities trusted by everything made from this identity.
    pub fn roots(&self) -> &Arc<Roots> {
        &self.roots
    }

    /// For [`transport::server_endpoint`]: the same at each start of this server. Secret.
    pub fn reset_secret(&self) -> [u8; 32] {
        self.root().derive(&format!("QUIC reset of server {}", self.server))
    }

    /// What this server needs to call the others.
    pub fn peer_settings(&self, pins: Arc<dyn PinnedKeys>) -> PeerSettings {
        PeerSettings {
            cluster: self.cluster,
            server: self.server,
            roots: self.roots.clone(),
            certificate: self.certificate.clone(),
            pins,
            env: self.env.clone(),
        }
    }

    /// When the certificate this server shows at the moment expires.
    pub fn certificate_expires_at(&self) -> Timestamp {
        self.certificate.current().expires_at
    }

    /// Replaces this server's certificate if half its life is over; tells whether it was.
    pub fn renew_if_due(&self) -> Result<bool, IdentityError> {
        if self.env.clock.now() < self.certificate.current().renew_at {
            return Ok(false);
        }
        let fresh = certify(&self.authority(), &self.key, self.server, &self.names, &self.env)?;
        tracing::info!(expires_at = %fresh.expires_at, "server certificate renewed");
        self.certificate.replace(fresh);
        Ok(true)
    }
}

/// The state once it is known to be the newest: a cluster still being replayed from the log must not
/// be taken for none.
async fn settled(store: &Store) -> Result<State, IdentityError> {
    let deadline = store.env.clock.monotonic() + CREATE_PATIENCE;
    loop {
        let state = store.state();
        if state.cluster.is_some() {
            return Ok(state);
        }
        match store.read().await {
            Ok(state) => return Ok(state),
            Err(error @ ProposeError::Stopping) => return Err(IdentityError::Propose(error)),
            Err(error) if store.env.clock.monotonic() >= deadline => return Err(IdentityError::Propose(error)),
            Err(_) => store.env.clock.sleep(CREATE_RETRY).await,
        }
    }
}

/// Makes the cluster, or finds the one another server made meanwhile.
async fn create(store: &Store, key: &RootKey) -> Result<Cluster, IdentityError> {
    let env = &store.env;
    let id = ClusterId(env.new_id());
    let (ca, secret) = Ca::create(id, env)?;
    let ca_key_sealed = key.seal(&secret, CA_KEY, id.0.as_bytes(), env);
    let command = Command::CreateCluster { id, ca_certificate: ca.certificate().to_vec(), ca_key_sealed };
    let deadline = env.clock.monotonic() + CREATE_PATIENCE;
    // The same command each time: whichever try commits, the key is the one we hold.
    loop {
        if store.state().cluster.is_some() {
            break;
        }
        match store.propose(command.clone()).await {
            Ok(Applied::Refused(Refusal::ClusterExists)) => break,
            Ok(Applied::Refused(other)) => return Err(IdentityError::Refused(other)),
            Ok(_) => break,
            Err(error @ ProposeError::Stopping) => return Err(IdentityError::Propose(error)),
            Err(error) if env.clock.monotonic() >= deadline => return Err(IdentityError::Propose(error)),
            Err(error) => {
                tracing::debug!(%error, "cluster not created yet");
                env.clock.sleep(CREATE_RETRY).await;
            }
        }
    }
    let mut applied = store.applied();
    loop {
        if let Some(cluster) = store.state().cluster {
            return Ok(cluster);
        }
        let left = deadline.saturating_sub(env.clock.monotonic());
        tokio::select! {
            changed = applied.changed() => changed.map_err(|_| IdentityError::Propose(ProposeError::Stopping))?,
            () = env.clock.sleep(left) => return Err(IdentityError::NotApplied),
        }
    }
}

/// Whether `key` opens the CA key of `cluster`.
///
/// # Errors
/// [`RootKeyError::Wrong`] when it does not.
pub fn check_root_key(cluster: &Cluster, key: &RootKey) -> Result<(), RootKeyError> {
    key.unseal(&cluster.ca_key_sealed, CA_KEY, cluster.id.0.as_bytes()).map(drop)
}

/// The host's name, if it can be in a certificate.
pub fn host_name() -> Option<String> {
    let name = rustix::system::uname().nodename().to_str().ok()?.to_owned();
    let fits = !name.is_empty()
        && name.len() <= 253
        && name.split('.').all(|l| {
            (1..=63).contains(&l.len())
                && !l.starts_with('-')
                && !l.ends_with('-')
                && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        });
    fits.then_some(name)
}

fn certify(authority: &Authority, key: &Key, server: u64, names: &[String], env: &Env) -> Result<Own, IdentityError> {
    let issued = authority.ca.issue_server(key, server, names, env)?;
    let now = env.clock.now();
    // The CAs go along, for those who know only the hash of one; and the way from the CA before to the one that signs.
    let mut chain = vec![CertificateDer::from(issued.certificate)];
    let cross = &authority.of.authorities.cross;
    if !cross.is_empty() {
        chain.push(cross.clone().into());
    }
    chain.extend(authority.of.roots().into_iter().map(|root| CertificateDer::from(root.to_vec())));
    let certified = CertifiedKey::from_der(chain, key.private_der(), &tls::provider()).map_err(IdentityError::Key)?;
    let renew_at = Timestamp(now.0 + issued.expires_at.since(now).0 / 2);
    Ok(Own { certified: Arc::new(certified), expires_at: issued.expires_at, renew_at })
}

/// Who signs, and what is trusted, as of one moment.
struct Authority {
    of: Cluster,
    ca: Ca,
}

impl Authority {
    fn open(of: &Cluster, root: &RootKey) -> Result<Self, IdentityError> {
        let secret = root.unseal(&of.ca_key_sealed, CA_KEY, of.id.0.as_bytes())?;
        Ok(Authority { of: of.clone(), ca: Ca::open(of.id, &of.ca_certificate, Key::from_pkcs8(&secret)?)? })
    }
}

/// A certificate in DER as PEM.
pub fn pem(der: &[u8]) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<&str> = text.as_bytes().chunks(64).map(|l| std::str::from_utf8(l).expect("base64 is ASCII")).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}

#[derive(Clone)]
struct Own {
    certified: Arc<CertifiedKey>,
    expires_at: Timestamp,
    renew_at: Timestamp,
}

/// The certificate new connections are shown.
struct OwnCertificate(RwLock<Own>);

impl OwnCertificate {
    fn replace(&self, fresh: Own) {
        *self.0.write().unwrap_or_else(|e| e.into_inner()) = fresh;
    }

    fn current(&self) -> Own {
        self.0.read().unwrap_or_else(|e| e.into_inner()).clone()
    }
}
impl fmt::Debug for OwnCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OwnCertificate")
    }
}
impl ResolvesServerCert for OwnCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current().certified)
    }
}
/// Servers show each other the same certificate whoever dials.
impl ResolvesClientCert for OwnCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current().certified)
    }
    fn has_certs(&self) -> bool {
        true
    }
}
