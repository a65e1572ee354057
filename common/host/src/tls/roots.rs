//! The authorities whose signatures count. Several at once, so that a CA can be replaced with an overlap.

use std::sync::{Arc, PoisonError, RwLock};

use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;

use super::TlsError;

/// Most authorities trusted at once: the one before, the present one, the next, and one to spare.
pub const ROOTS_MAX: usize = 4;

/// Certificates of the cluster's CA. Shared by all who verify; a change holds from the next handshake on.
#[derive(Debug)]
pub struct Roots(RwLock<Arc<RootCertStore>>);

impl Roots {
    /// From certificates in DER, at least one.
    pub fn new<T: AsRef<[u8]>>(certificates: &[T]) -> Result<Arc<Self>, TlsError> {
        Ok(Arc::new(Roots(RwLock::new(store(certificates)?))))
    }

    /// Trusts exactly these from now on. After an error the old ones stay.
    pub fn replace<T: AsRef<[u8]>>(&self, certificates: &[T]) -> Result<(), TlsError> {
        let fresh = store(certificates)?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }

    /// Those trusted at the moment.
    pub fn current(&self) -> Arc<RootCertStore> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn store<T: AsRef<[u8]>>(certificates: &[T]) -> Result<Arc<RootCertStore>, TlsError> {
    if certificates.is_empty() || certificates.len() > ROOTS_MAX {
        return Err(TlsError::Verifier(format!("{} CA certificates given, 1 to {ROOTS_MAX} can be trusted at once", certificates.len())));
    }
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(CertificateDer::from(certificate.as_ref().to_vec())).map_err(TlsError::Setup)?;
    }
    Ok(Arc::new(roots))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_set_of_authorities_changes_nothing() {
        let certificate = |name: &str| {
            let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
            rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap().self_signed(&key).unwrap().der().to_vec()
        };
        let roots = Roots::new(&[certificate("a"), certificate("b")]).unwrap();
        assert_eq!(roots.current().len(), 2);
        assert!(roots.replace::<Vec<u8>>(&[]).is_err());
        assert!(roots.replace(&[b"junk".to_vec()]).is_err());
        assert!(roots.replace(&vec![certificate("c"); ROOTS_MAX + 1]).is_err());
        assert_eq!(roots.current().len(), 2);
        roots.replace(&[certificate("d")]).unwrap();
        assert_eq!(roots.current().len(), 1);
    }
}
