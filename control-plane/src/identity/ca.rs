//! The cluster's certificate authority: signs for agents and servers, decides nothing about who may have one.

use std::net::IpAddr;

use optimus_common::env::Env;
use optimus_common::{ClusterId, NodeId, Span, Timestamp};
use optimus_host::tls::{self, DER_MAX, Key, Role, SERVER_NAME, TlsError};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer};

/// How long the CA's own certificate holds.
pub const CA_LIFETIME: Span = Span(10 * 365 * DAY);
/// An agent outlives a day without servers and then renews within the grace of [`tls::RENEWAL_GRACE`].
pub const AGENT_LIFETIME: Span = Span(DAY);
pub const SERVER_LIFETIME: Span = Span(90 * DAY);
/// Certificates begin this long before they are made, for peers whose clocks are behind.
pub const BACKDATE: Span = Span(5 * 60_000);
/// The CA after a CA is below it for those who know no newer one.
const SUCCESSORS: u8 = 1;
const DAY: u64 = 24 * 3_600_000;
/// Length of an uncompressed P-256 point.
const P256_POINT: usize = 65;

/// Why no certificate was issued.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    #[error("certificate request of {0} bytes is longer than {DER_MAX}")]
    RequestTooLong(usize),
    #[error("malformed certificate request")]
    Request(#[source] rcgen::Error),
    #[error("the certificate request is not for a P-256 key")]
    Algorithm,
    #[error("`{0}` is neither a DNS name nor an IP address")]
    Name(String),
    #[error("failed to sign the certificate")]
    Sign(#[source] rcgen::Error),
    #[error("failed to make a key")]
    Key(#[from] TlsError),
}

/// A certificate and what the cluster remembers of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// DER.
    pub certificate: Vec<u8>,
    pub key_fingerprint: [u8; 32],
    pub expires_at: Timestamp,
    /// Certificate of the CA that signed, DER.
    pub issuer: Vec<u8>,
}

/// A certificate request that proved possession of its key.
pub struct CheckedRequest {
    public_key: rcgen::PublicKey,
    pub key_fingerprint: [u8; 32],
}

impl CheckedRequest {
    /// Reads a PKCS#10 request in DER and checks its signature. Only the key is used of it.
    pub fn parse(der: &[u8]) -> Result<Self, IssueError> {
        if der.len() > DER_MAX {
            return Err(IssueError::RequestTooLong(der.len()));
        }
        let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(der)).map_err(IssueError::Request)?;
        let public_key = request.public_key;
        // The algorithm was told by the signature; the length ties the key itself to the curve.
        if PublicKeyData::algorithm(&public_key) != &PKCS_ECDSA_P256_SHA256 || public_key.der_bytes().len() != P256_POINT {
            return Err(IssueError::Algorithm);
        }
        let key_fingerprint = tls::sha256(&public_key.subject_public_key_info());
        Ok(CheckedRequest { public_key, key_fingerprint })
    }
}

/// A new CA that does not sign yet.
pub struct Successor {
    /// DER.
    pub certificate: Vec<u8>,
    /// The same name and key, certified by the CA before. DER.
    pub cross: Vec<u8>,
    /// PKCS#8 in DER.
    pub secret: zeroize::Zeroizing<Vec<u8>>,
}

/// The CA's certificate and key.
pub struct Ca {
    cluster: ClusterId,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    /// Makes the CA of a new cluster; also gives its private key (PKCS#8, secret).
    pub fn create(cluster: ClusterId, env: &Env) -> Result<(Self, zeroize::Zeroizing<Vec<u8>>), IssueError> {
        let key = Key::generate()?;
        let secret = key.to_pkcs8();
        let certificate =
            authority(format!("optimus cluster {cluster}"), SUCCESSORS, env).self_signed(key.pair()).map_err(IssueError::Sign)?;
        Ok((Self::open(cluster, certificate.der(), key)?, secret))
    }

    /// Makes the CA that shall take this one's place, as number `number` of the cluster.
    pub fn successor(&self, number: u32, env: &Env) -> Result<Successor, IssueError> {
        let key = Key::generate()?;
        let name = format!("optimus cluster {} CA {number}", self.cluster);
        let certificate = authority(name.clone(), SUCCESSORS, env).self_signed(key.pair()).map_err(IssueError::Sign)?;
        let mut params = authority(name, 0, env);
        params.use_authority_key_identifier_extension = true;
        let cross = params.signed_by(key.pair(), &self.issuer).map_err(IssueError::Sign)?;
        Ok(Successor { certificate: certificate.der().to_vec(), cross: cross.der().to_vec(), secret: key.to_pkcs8() })
    }

    /// Takes up the CA of an existing cluster.
    pub fn open(cluster: ClusterId, certificate: &[u8], key: Key) -> Result<Self, IssueError> {
        let certificate = CertificateDer::from(certificate.to_vec());
        let issuer = Issuer::from_ca_cert_der(&certificate, key.into_pair()).map_err(IssueError::Sign)?;
        Ok(Ca { cluster, certificate, issuer })
    }

    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Certifies the key of `request` as the agent of `node`.
    pub fn issue_agent(&self, request: &CheckedRequest, node: NodeId, env: &Env) -> Result<Issued, IssueError> {
        let mut params = base(format!("optimus agent {node}"), env, AGENT_LIFETIME);
        params.subject_alt_names = vec![self.uri(Role::Agent(node))?];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params, &request.public_key, request.key_fingerprint, env)
    }

    /// Certifies `key` as server `number`, reachable under `names`.
    pub fn issue_server(&self, key: &Key, number: u64, names: &[String], env: &Env) -> Result<Issued, IssueError> {
        let mut params = base(format!("optimus server {number}"), env, SERVER_LIFETIME);
        params.subject_alt_names = vec![self.uri(Role::Server(number))?, dns(SERVER_NAME)?];
        for name in names {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => dns(name)?,
            });
        }
        // Servers also dial each other.
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params, key.pair(), key.fingerprint(), env)
    }

    fn uri(&self, role: Role) -> Result<SanType, IssueError> {
        let uri = tls::spiffe_uri(self.cluster, role);
        Ok(SanType::URI(uri.clone().try_into().map_err(|_| IssueError::Name(uri))?))
    }

    fn sign(
        &self,
        params: CertificateParams,
        key: &impl PublicKeyData,
        key_fingerprint: [u8; 32],
        env: &Env,
    ) -> Result<Issued, IssueError> {
        let mut params = params;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let expires_at = Timestamp(u64::try_from(params.not_after.unix_timestamp()).unwrap_or(0) * 1000);
        debug_assert!(expires_at > env.clock.now());
        let certificate = params.signed_by(key, &self.issuer).map_err(IssueError::Sign)?;
        Ok(Issued { certificate: certificate.der().to_vec(), key_fingerprint, expires_at, issuer: self.certificate.to_vec() })
    }
}

/// What the certificates of CAs have in common. `below`: how many other CAs may come between this one and a certificate.
fn authority(name: String, below: u8, env: &Env) -> CertificateParams {
    let mut params = base(name, env, CA_LIFETIME);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(below));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn dns(name: &str) -> Result<SanType, IssueError> {
    let valid = !name.is_empty()
        && name.len() <= 253
        && name.split('.').all(|label| {
            !label.is_empty()
                && label.len() <= 63
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
        });
    if !valid {
        return Err(IssueError::Name(name.to_owned()));
    }
    Ok(SanType::DnsName(name.to_owned().try_into().map_err(|_| IssueError::Name(name.to_owned()))?))
}

/// What all our certificates have in common.
fn base(common_name: String, env: &Env, lifetime: Span) -> CertificateParams {
    let now = env.clock.now();
    let at = |time: Timestamp| rcgen::date_time_ymd(1970, 1, 1) + std::time::Duration::from_secs(time.0 / 1000);
    let mut serial = [0u8; 16];
    env.entropy.fill(&mut serial);
    serial[0] = serial[0] & 0x3f | 0x40; // positive, and of full length
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    // The field holds 64 characters.
    params.distinguished_name.push(DnType::CommonName, common_name.chars().take(64).collect::<String>());
    params.not_before = at(now - BACKDATE);
    params.not_after = at(now + lifetime);
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use optimus_host::env::HostEnv;
    use optimus_host::tls::PeerIdentity;

    #[test]
    fn a_certificate_says_who_it_is_for_and_how_long() {
        let env = HostEnv::new();
        let (cluster, node) = (ClusterId(env.new_id()), NodeId(env.new_id()));
        let (ca, _) = Ca::create(cluster, &env).unwrap();
        let key = Key::generate().unwrap();
        let request = CheckedRequest::parse(&key.request().unwrap()).unwrap();
        let issued = ca.issue_agent(&request, node, &env).unwrap();
        let identity = PeerIdentity::of(&issued.certificate).unwrap();
        assert_eq!((identity.cluster, identity.role), (cluster, Role::Agent(node)));
        assert_eq!(identity.key_fingerprint, key.fingerprint());
        assert_eq!(identity.key_fingerprint, issued.key_fingerprint);
        assert_eq!(identity.not_after, issued.expires_at);
        let now = env.clock.now();
        assert!(now.since(identity.not_before) >= BACKDATE && identity.not_after.since(now) <= AGENT_LIFETIME);
    }

    #[test]
    fn a_request_must_prove_its_key() {
        let good = Key::generate().unwrap().request().unwrap();
        assert!(CheckedRequest::parse(&good).is_ok());
        let mut bad = good.clone();
        let last = bad.len() - 1;
        bad[last] ^= 1;
        assert!(CheckedRequest::parse(&bad).is_err());
        assert!(CheckedRequest::parse(&vec![0x30; DER_MAX + 1]).is_err());
        let p384 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        let request = CertificateParams::default().serialize_request(&p384).unwrap();
        assert!(matches!(CheckedRequest::parse(request.der()), Err(IssueError::Algorithm)));
    }

    #[test]
    fn names_of_servers_are_checked() {
        let env = HostEnv::new();
        let (ca, _) = Ca::create(ClusterId(env.new_id()), &env).unwrap();
        let key = Key::generate().unwrap();
        let issue = |name: &str| ca.issue_server(&key, 1, &[name.to_owned()], &env);
        for good in ["10.0.0.1", "::1", "optimus.example.org", "host_1"] {
            assert!(issue(good).is_ok(), "{good}");
        }
        for bad in ["", "a..b", "-a", "*.example.org", "exämple.org", "a b"] {
            assert!(matches!(issue(bad), Err(IssueError::Name(_))), "{bad}");
        }
    }
}
