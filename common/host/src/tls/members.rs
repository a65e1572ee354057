//! How an agent judges a server: by the cluster's CAs and the server's name, and not by its own clock's idea of "not yet".
//!
//! A certificate from the future is as good as one of today; what it shows is that our clock is behind, or the server's
//! ahead. Refusing it would take a node out of the cluster over a dead battery. An expired one stays refused.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::server::WebPkiClientVerifier;
use rustls::{CertificateError, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use super::{PeerIdentity, Roots, TlsError, peers, provider};

/// Judges servers by `roots`.
pub(super) fn verifier(roots: Arc<RootCertStore>) -> Result<Arc<dyn ServerCertVerifier>, TlsError> {
    let inner = WebPkiServerVerifier::builder_with_provider(roots, provider()).build().map_err(|e| TlsError::Verifier(e.to_string()))?;
    Ok(Arc::new(ClockBlind(inner)))
}

/// Whether the CA `ca` signed an agent's certificate. Both in DER; the time does not matter.
pub fn issued_by(certificate: &[u8], ca: &[u8]) -> bool {
    Roots::new(&[ca]).is_ok_and(|roots| roots.vouch_for(certificate))
}

impl Roots {
    /// Whether one of them signed an agent's certificate (DER); the time does not matter.
    pub fn vouch_for(&self, certificate: &[u8]) -> bool {
        let check = || {
            let identity = PeerIdentity::of(certificate).ok()?;
            let verifier = WebPkiClientVerifier::builder_with_provider(self.current(), provider()).build().ok()?;
            verifier.verify_client_cert(&CertificateDer::from(certificate), &[], peers::last_moment(&identity)).ok()
        };
        check().is_some()
    }
}

#[derive(Debug)]
struct ClockBlind(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for ClockBlind {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let check = |at| self.0.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, at);
        match check(now) {
            Err(Error::InvalidCertificate(CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. })) => {
                let identity = PeerIdentity::of(end_entity).map_err(|e| Error::General(e.to_string()))?;
                check(peers::last_moment(&identity))
            }
            checked => checked,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
