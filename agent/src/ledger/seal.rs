//! Seals values for disk: XChaCha20-Poly1305 around the versioned envelope's payload.
//!
//! `envelope(kind, version, nonce | ciphertext)`. The kind and the allocation are bound in, so a row cannot be
//! passed off as another. The key lies beside the data: it protects copies of the files, not the whole disk.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use optimus_common::AllocId;
use optimus_common::codec::{self, DecodeError};
use optimus_common::env::Entropy;
use serde::{Serialize, de::DeserializeOwned};
use zeroize::Zeroizing;

const VERSION: u16 = 1;
const NONCE: usize = 24;
const KEY: usize = 32;

/// Why a sealed value cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    #[error("malformed")]
    Decode(#[from] DecodeError),
    #[error("kind {found:#06x} version {version} where kind {wanted:#06x} was expected")]
    Kind { found: u16, version: u16, wanted: u16 },
    #[error("sealed with another key, for another place, or changed")]
    Tag,
}

/// Seals and opens with one key. Cheap to clone.
#[derive(Clone)]
pub struct Sealer {
    cipher: XChaCha20Poly1305,
    entropy: Arc<dyn Entropy>,
}

impl Sealer {
    /// With the key in `path` (mode 0600), made if there is none.
    pub fn from_file(path: &Path, entropy: Arc<dyn Entropy>) -> io::Result<Self> {
        let mut key = Zeroizing::new([0u8; KEY]);
        match File::open(path) {
            Ok(mut file) => {
                if file.metadata()?.len() != KEY as u64 {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a ledger key has {KEY} bytes")));
                }
                file.read_exact(key.as_mut())?;
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                entropy.fill(key.as_mut());
                write_durably(path, key.as_ref())?;
            }
            Err(e) => return Err(e),
        }
        let cipher = XChaCha20Poly1305::new_from_slice(key.as_ref()).map_err(io::Error::other)?;
        Ok(Sealer { cipher, entropy })
    }

    pub fn seal<T: Serialize>(&self, kind: u16, alloc: AllocId, value: &T) -> Vec<u8> {
        let mut nonce = [0u8; NONCE];
        self.entropy.fill(&mut nonce);
        let plain = Zeroizing::new(codec::to_msgpack(value));
        let bound = bound(kind, alloc);
        let sealed = self
            .cipher
            .encrypt(&XNonce::from(nonce), Payload { msg: plain.as_ref(), aad: &bound })
            .expect("a value is far shorter than the cipher's limit of 256 GiB");
        let mut payload = nonce.to_vec();
        payload.extend_from_slice(&sealed);
        codec::envelope_bytes(kind, VERSION, &payload)
    }

    pub fn open<T: DeserializeOwned>(&self, kind: u16, alloc: AllocId, bytes: &[u8]) -> Result<T, SealError> {
        let (found, version, payload) = codec::open_envelope(bytes)?;
        if (found, version) != (kind, VERSION) {
            return Err(SealError::Kind { found, version, wanted: kind });
        }
        let Some((nonce, sealed)) = payload.split_first_chunk::<NONCE>() else { return Err(SealError::Tag) };
        let bound = bound(kind, alloc);
        let plain = self.cipher.decrypt(&XNonce::from(*nonce), Payload { msg: sealed, aad: &bound }).map_err(|_| SealError::Tag)?;
        Ok(codec::from_msgpack(&Zeroizing::new(plain))?)
    }
}

fn bound(kind: u16, alloc: AllocId) -> [u8; 18] {
    let mut bound = [0; 18];
    bound[..2].copy_from_slice(&kind.to_le_bytes());
    bound[2..].copy_from_slice(alloc.0.as_bytes());
    bound
}

/// Writes a private file so that after a power cut it is there whole or not at all.
pub fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let beside = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}
