//! TLS between servers: both ends check that the other is the server it should be, and still a member.
//!
//! Membership is asked of [`PinnedKeys`], which the replicated state feeds:
//!
//! | certificate of server n | n is no member | the key on record | another key |
//! |---|---|---|---|
//! | valid | refused | accepted | refused |
//! | expired, or not valid yet | refused | accepted | refused |
//!
//! So neither an expiry nor a clock that is hours off locks a server out of its own cluster, and a removed one is out at once.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use optimus_common::env::Clock;
use optimus_common::{ClusterId, NodeId};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier};
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::{PeerIdentity, Role, Roots, TlsError, client_builder, provider};

/// The servers that are members, by the keys on record for them.
///
/// Asked in every handshake and for every request, so an answer must cost no more than a look into a map. A server that
/// has just joined, or not yet replayed its log, must know the members from elsewhere: who is not known is refused, also
/// the leader that would bring the state.
pub trait PinnedKeys: Debug + Send + Sync + 'static {
    /// SHA-256 of the public key (SubjectPublicKeyInfo, DER) of server `server`; `None` when it is no member.
    fn key_of(&self, server: u64) -> Option<[u8; 32]>;

    /// The same of node `node`. With the key on record a node is let in to renew, also when the CA that signed its
    /// certificate was replaced while it was away.
    fn key_of_node(&self, _node: NodeId) -> Option<[u8; 32]> {
        None
    }
}

/// For a server without peers: nobody is a member.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoPins;

impl PinnedKeys for NoPins {
    fn key_of(&self, _: u64) -> Option<[u8; 32]> {
        None
    }
}

/// [`PinnedKeys`] held in a table that its owner keeps up to date.
#[derive(Debug, Default)]
pub struct PinTable(RwLock<BTreeMap<u64, [u8; 32]>>);

impl PinTable {
    pub fn new(keys: impl IntoIterator<Item = (u64, [u8; 32])>) -> Arc<Self> {
        Arc::new(PinTable(RwLock::new(keys.into_iter().collect())))
    }

    /// Makes exactly these the members.
    pub fn replace(&self, keys: impl IntoIterator<Item = (u64, [u8; 32])>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = keys.into_iter().collect();
    }

    pub fn set(&self, server: u64, key: [u8; 32]) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(server, key);
    }

    pub fn remove(&self, server: u64) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&server);
    }
}

impl PinnedKeys for PinTable {
    fn key_of(&self, server: u64) -> Option<[u8; 32]> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&server).copied()
    }
}

/// The member a server's certificate must speak for.
#[derive(Debug, Clone)]
pub struct ExpectedServer {
    pub cluster: ClusterId,
    pub server: u64,
}

/// A client of exactly one other server, with this server's own certificate. Dial as [`super::SERVER_NAME`].
pub fn peer_client(
    roots: &Arc<Roots>,
    expected: ExpectedServer,
    certificate: Arc<dyn ResolvesClientCert>,
    pins: Arc<dyn PinnedKeys>,
    alpn: &[u8],
    clock: &Arc<dyn Clock>,
) -> Result<rustls::ClientConfig, TlsError> {
    let verifier = ServerVerifier { roots: roots.clone(), expected, pins };
    let mut config =
        client_builder(clock)?.dangerous().with_custom_certificate_verifier(Arc::new(verifier)).with_client_cert_resolver(certificate);
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = rustls::client::Resumption::disabled(); // each connection proves itself anew
    Ok(config)
}

/// Whether nothing but the time speaks against a certificate: it has expired, or by our clock is not valid yet.
pub(super) fn is_untimely(error: &Error) -> bool {
    use CertificateError::{Expired, ExpiredContext, NotValidYet, NotValidYetContext};
    matches!(error, Error::InvalidCertificate(Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. }))
}

/// The moment a certificate was last valid. What is checked at it holds but for the time.
pub(super) fn last_moment(identity: &PeerIdentity) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_millis(identity.not_after.0))
}

/// Judges a server's certificate by the table above; `checked` is what webpki said of it. Tells whether it has to be
/// checked again as of its [`last_moment`].
pub(super) fn judge(identity: &PeerIdentity, pins: &dyn PinnedKeys, checked: Result<(), Error>) -> Result<bool, Error> {
    let Role::Server(server) = identity.role else { return Err(Error::General("the certificate is not that of a server".into())) };
    let expired = match &checked {
        Ok(()) => false,
        Err(error) if is_untimely(error) => true,
        Err(_) => return checked.map(|()| false),
    };
    match pins.key_of(server) {
        None => Err(Error::InvalidCertificate(CertificateError::Revoked)),
        // A server keeps its key for its life, so another one is another server.
        Some(key) if key != identity.key_fingerprint && expired => Err(Error::InvalidCertificate(CertificateError::Expired)),
        Some(key) if key != identity.key_fingerprint => Err(Error::InvalidCertificate(CertificateError::Revoked)),
        Some(_) => Ok(expired),
    }
}

#[derive(Debug)]
struct ServerVerifier {
    roots: Arc<Roots>,
    expected: ExpectedServer,
    pins: Arc<dyn PinnedKeys>,
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verifier = WebPkiServerVerifier::builder_with_provider(self.roots.current(), provider())
            .build()
            .map_err(|e| Error::General(e.to_string()))?;
        let check = |at| verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, at).map(drop);
        let checked = check(now);
        if let Err(error) = &checked
            && !is_untimely(error)
        {
            return Err(error.clone());
        }
        let identity = PeerIdentity::of(end_entity).map_err(|e| Error::General(e.to_string()))?;
        let ExpectedServer { cluster, server } = self.expected;
        if identity.cluster != cluster || identity.role != Role::Server(server) {
            let (found, of) = (identity.role, identity.cluster);
            return Err(Error::General(format!(
                "the certificate is that of {found} in cluster {of}, expected server/{server} in {cluster}"
            )));
        }
        if judge(&identity, &*self.pins, checked)? {
            check(last_moment(&identity))?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
