//! TLS as every connection of Optimus uses it: ring passed explicitly, certificates of the cluster CA
//! only, time from the [`Clock`].
//!
//! A certificate says who its holder is in one URI: `spiffe://<cluster>/agent/<node id>` or
//! `spiffe://<cluster>/server/<number>`. Servers also carry the DNS name [`SERVER_NAME`], which the CA
//! gives to nobody else, so clients check the role by checking the name, whatever address they dialled.
//!
//! **Expiry.** A client certificate that expired less than [`RENEWAL_GRACE`] ago passes the handshake;
//! the session behind it may renew and nothing else ([`PeerIdentity::not_after`] tells). Without this
//! a weekend without servers would lock every agent out of its own cluster. The same holds for one whose CA was replaced
//! while the agent was away, if its key is the one on record. Certificates of servers follow the rules of [`PinnedKeys`].

mod members;
mod peers;
mod roots;

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use optimus_common::env::Clock;
use optimus_common::{ClusterId, NodeId, Span, Timestamp};
use rcgen::PublicKeyData as _;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::time_provider::TimeProvider;
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use sha2::{Digest as _, Sha256};

pub use self::members::issued_by;
pub use self::peers::{ExpectedServer, NoPins, PinTable, PinnedKeys, peer_client};
pub use self::roots::{ROOTS_MAX, Roots};

/// DNS name in the certificate of every server and of nothing else.
pub const SERVER_NAME: &str = "server.optimus.internal";
/// How long after its expiry an agent's certificate may still be used to renew it. Its key is on record and can be
/// revoked at any time, so this only bounds what nobody remembers; a host may well be off for a season.
pub const RENEWAL_GRACE: Span = Span(400 * 24 * 3_600_000);
/// Longest certificate or certificate request looked at.
pub const DER_MAX: usize = 8 << 10;

/// The one provider of cryptography.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(rustls::crypto::ring::default_provider())).clone()
}

pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Gives rustls the time of our clock.
pub struct EnvTime(pub Arc<dyn Clock>);

impl fmt::Debug for EnvTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EnvTime")
    }
}
impl TimeProvider for EnvTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_millis(self.0.now().0)))
    }
}

/// Why a certificate, key or request cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("malformed certificate: {0}")]
    Certificate(String),
    #[error("the certificate names no Optimus identity")]
    NoIdentity,
    #[error("failed to make a key or certificate request")]
    Generate(#[source] rcgen::Error),
    #[error("failed to set up TLS")]
    Setup(#[source] rustls::Error),
    #[error("failed to set up TLS: {0}")]
    Verifier(String),
}

/// Who a certificate speaks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Agent(NodeId),
    Server(u64),
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Role::Agent(node) => write!(f, "agent/{node}"),
            Role::Server(number) => write!(f, "server/{number}"),
        }
    }
}

/// The URI that names `role` in `cluster`.
pub fn spiffe_uri(cluster: ClusterId, role: Role) -> String {
    format!("spiffe://{cluster}/{role}")
}

/// What a certificate says of its holder. Only as good as the check of its signature, which the handshake made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerIdentity {
    pub cluster: ClusterId,
    pub role: Role,
    /// SHA-256 of the public key (its SubjectPublicKeyInfo, DER).
    pub key_fingerprint: [u8; 32],
    pub not_before: Timestamp,
    pub not_after: Timestamp,
}

impl PeerIdentity {
    /// Reads it from a certificate in DER.
    pub fn of(certificate: &[u8]) -> Result<Self, TlsError> {
        if certificate.len() > DER_MAX {
            return Err(TlsError::Certificate(format!("{} bytes are more than {DER_MAX}", certificate.len())));
        }
        let malformed = |e: &dyn fmt::Display| TlsError::Certificate(e.to_string());
        let (_, parsed) = x509_parser::parse_x509_certificate(certificate).map_err(|e| malformed(&e))?;
        let names = parsed.subject_alternative_name().map_err(|e| malformed(&e))?.ok_or(TlsError::NoIdentity)?;
        let mut uris = names.value.general_names.iter().filter_map(|name| match name {
            x509_parser::extensions::GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
        // Exactly one: with two, two readers might pick different ones.
        let (Some(uri), None) = (uris.next(), uris.next()) else { return Err(TlsError::NoIdentity) };
        let (cluster, role) = parse_uri(uri).ok_or(TlsError::NoIdentity)?;
        let time = |seconds: i64| Timestamp(u64::try_from(seconds).unwrap_or(0).saturating_mul(1000));
        Ok(PeerIdentity {
            cluster,
            role,
            key_fingerprint: sha256(parsed.tbs_certificate.subject_pki.raw),
            not_before: time(parsed.validity().not_before.timestamp()),
            not_after: time(parsed.validity().not_after.timestamp()),
        })
    }
}

fn parse_uri(uri: &str) -> Option<(ClusterId, Role)> {
    let mut parts = uri.strip_prefix("spiffe://")?.split('/');
    let cluster = parts.next()?.parse().ok()?;
    let role = match (parts.next()?, parts.next()?) {
        ("agent", node) => Role::Agent(node.parse().ok()?),
        ("server", number) => Role::Server(number.parse().ok()?),
        _ => return None,
    };
    // Compared as a whole, so that only the one spelling we write is an identity.
    (spiffe_uri(cluster, role) == uri).then_some((cluster, role))
}

/// A P-256 key pair.
pub struct Key(rcgen::KeyPair);

impl Key {
    pub fn generate() -> Result<Self, TlsError> {
        rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map(Key).map_err(TlsError::Generate)
    }

    /// From PKCS#8 in DER.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, TlsError> {
        let der = PrivatePkcs8KeyDer::from(der);
        rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&der, &rcgen::PKCS_ECDSA_P256_SHA256).map(Key).map_err(TlsError::Generate)
    }

    /// PKCS#8 in DER. Secret.
    pub fn to_pkcs8(&self) -> zeroize::Zeroizing<Vec<u8>> {
        zeroize::Zeroizing::new(self.0.serialize_der())
    }

    /// For signing certificates.
    pub fn pair(&self) -> &rcgen::KeyPair {
        &self.0
    }

    pub fn into_pair(self) -> rcgen::KeyPair {
        self.0
    }

    pub fn fingerprint(&self) -> [u8; 32] {
        sha256(&self.0.subject_public_key_info())
    }

    pub fn private_der(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.0.serialize_der()))
    }

    /// A PKCS#10 request in DER. It proves possession of the key; what it says beside that, the CA ignores.
    pub fn request(&self) -> Result<Vec<u8>, TlsError> {
        let request = rcgen::CertificateParams::default().serialize_request(&self.0).map_err(TlsError::Generate)?;
        Ok(request.der().to_vec())
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(withheld)")
    }
}

fn client_builder(clock: &Arc<dyn Clock>) -> Result<rustls::ConfigBuilder<rustls::ClientConfig, rustls::WantsVerifier>, TlsError> {
    rustls::ClientConfig::builder_with_details(provider(), Arc::new(EnvTime(clock.clone())))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Setup)
}

/// A client of the cluster's servers with a certificate of its own, which trusts the CAs `roots` (DER). Dial as
/// [`SERVER_NAME`].
pub fn member_client<T: AsRef<[u8]>>(
    roots: &[T],
    certificate: &[u8],
    key: &Key,
    alpn: &[u8],
    clock: &Arc<dyn Clock>,
) -> Result<rustls::ClientConfig, TlsError> {
    let mut config = client_builder(clock)?
        .dangerous()
        .with_custom_certificate_verifier(members::verifier(Roots::new(roots)?.current())?)
        .with_client_auth_cert(vec![CertificateDer::from(certificate.to_vec())], key.private_der())
        .map_err(TlsError::Setup)?;
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = rustls::client::Resumption::disabled(); // each session proves itself anew
    Ok(config)
}

/// A client that knows nothing but the SHA-256 of the CA, and has no certificate. Dial as [`SERVER_NAME`].
pub fn pinned_client(ca_sha256: [u8; 32], alpn: &[u8], clock: &Arc<dyn Clock>) -> Result<rustls::ClientConfig, TlsError> {
    let mut config =
        client_builder(clock)?.dangerous().with_custom_certificate_verifier(Arc::new(PinnedCa { ca_sha256 })).with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// What a rustls error of [`pinned_client`] holds when the server is of another cluster.
pub const PIN_MISMATCH: &str = "the server is not of the cluster the join token was made for";

/// Takes the CA from the server's chain if, and only if, its hash is the pinned one; then checks the
/// chain, the name and the validity as always.
#[derive(Debug)]
struct PinnedCa {
    ca_sha256: [u8; 32],
}

impl ServerCertVerifier for PinnedCa {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let ca = intermediates.iter().find(|c| sha256(c) == self.ca_sha256).ok_or_else(|| rustls::Error::General(PIN_MISMATCH.into()))?;
        let mut roots = RootCertStore::empty();
        roots.add(ca.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider())
            .build()
            .map_err(|e| rustls::Error::General(e.to_string()))?;
        // During a CA rotation the way to the pinned CA leads over the new one, certified by the old.
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// The server side for machines: asks for a certificate of the cluster CA. A client without one passes
/// the handshake (it may redeem a join token); whoever serves a protocol for members must look at
/// the peer's identity before the first byte. `pins` says which servers are members.
pub fn machine_server(
    roots: &Arc<Roots>,
    certificates: Arc<dyn rustls::server::ResolvesServerCert>,
    pins: Arc<dyn PinnedKeys>,
    alpn: &[&[u8]],
    clock: &Arc<dyn Clock>,
) -> Result<rustls::ServerConfig, TlsError> {
    let mut config = rustls::ServerConfig::builder_with_details(provider(), Arc::new(EnvTime(clock.clone())))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Setup)?
        .with_client_cert_verifier(Arc::new(MemberVerifier { roots: roots.clone(), pins }))
        .with_cert_resolver(certificates);
    config.alpn_protocols = alpn.iter().map(|a| a.to_vec()).collect();
    // No resumption: each session shows its certificate, so that revocation holds for all of them.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    Ok(config)
}

/// The server side for people and their tools: HTTPS without client certificates.
pub fn https_server(
    certificates: Arc<dyn rustls::server::ResolvesServerCert>,
    clock: &Arc<dyn Clock>,
) -> Result<rustls::ServerConfig, TlsError> {
    let mut config = rustls::ServerConfig::builder_with_details(provider(), Arc::new(EnvTime(clock.clone())))
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Setup)?
        .with_no_client_auth()
        .with_cert_resolver(certificates);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// Checks client certificates as webpki does, but lets expired ones through: of agents within [`RENEWAL_GRACE`], of
/// servers as [`PinnedKeys`] says; and agents with the key on record, whoever signed for it.
#[derive(Debug)]
struct MemberVerifier {
    roots: Arc<Roots>,
    pins: Arc<dyn PinnedKeys>,
}

impl ClientCertVerifier for MemberVerifier {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    /// None: a client has one certificate to show, and the authorities may change while we run.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        use rustls::Error::InvalidCertificate;
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots.current(), provider())
            .build()
            .map_err(|e| rustls::Error::General(e.to_string()))?;
        let on_record = || match PeerIdentity::of(end_entity) {
            Ok(PeerIdentity { role: Role::Agent(node), key_fingerprint, .. }) => self.pins.key_of_node(node) == Some(key_fingerprint),
            _ => false,
        };
        let check = |at| match verifier.verify_client_cert(end_entity, intermediates, at) {
            // The handshake proves that it has the key, and a key says more than a CA that may be gone.
            Err(InvalidCertificate(CertificateError::UnknownIssuer)) if on_record() => Ok(()),
            checked => checked.map(drop),
        };
        let checked = check(now);
        if let Err(error) = &checked
            && !peers::is_untimely(error)
        {
            return Err(error.clone());
        }
        let unusable = || InvalidCertificate(CertificateError::ApplicationVerificationFailure);
        let identity = PeerIdentity::of(end_entity).map_err(|_| unusable())?;
        let again = match identity.role {
            Role::Server(_) => peers::judge(&identity, &*self.pins, checked)?,
            Role::Agent(_) => {
                let ago = Timestamp(now.as_secs().saturating_mul(1000)).since(identity.not_after);
                if checked.is_err() && ago > RENEWAL_GRACE {
                    return Err(InvalidCertificate(CertificateError::Expired));
                }
                checked.is_err()
            }
        };
        if again {
            // Everything else about it must hold at the last moment of its life.
            check(peers::last_moment(&identity))?;
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_the_spelling_we_write_is_an_identity() {
        let cluster = ClusterId(uuid::Uuid::from_u128(1));
        let node = NodeId(uuid::Uuid::from_u128(2));
        for role in [Role::Agent(node), Role::Server(3)] {
            assert_eq!(parse_uri(&spiffe_uri(cluster, role)), Some((cluster, role)));
        }
        let good = spiffe_uri(cluster, Role::Server(3));
        for bad in [
            format!("{good}/x"),
            format!("{good}?x"),
            good.replace("/3", "/03"),
            good.replace("server", "user"),
            good.replace("spiffe", "http"),
            good.to_uppercase(),
            good.replace('-', ""),
        ] {
            assert_eq!(parse_uri(&bad), None, "{bad}");
        }
    }

    #[test]
    fn a_key_keeps_its_fingerprint_through_storage() {
        let key = Key::generate().unwrap();
        let again = Key::from_pkcs8(&key.to_pkcs8()).unwrap();
        assert_eq!(key.fingerprint(), again.fingerprint());
        assert!(Key::from_pkcs8(b"junk").is_err());
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic_as_a_certificate(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..600)) {
            let _ = PeerIdentity::of(&bytes);
        }
    }
}
