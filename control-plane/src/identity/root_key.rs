//! The root key: seals the CA's private key, which is in replicated state, so that a copied log,
//! snapshot or backup holds no usable key.
//!
//! It is a file beside the data, 0600, never in the log, in snapshots or in exports. That protects
//! backups and disks of other hosts; it does not protect against whoever is root on a server.

use std::io;
use std::path::{Path, PathBuf};

use chacha20poly1305::aead::{Aead as _, KeyInit as _, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use optimus_common::env::Env;
use optimus_host::files;
use zeroize::Zeroizing;

/// Name of the file in the data directory.
pub const FILE: &str = "root.key";
/// Beginning of the names of files with keys that may take its place; the fingerprint follows.
const NEXT: &str = "root.key.next-";
/// The key before, beside it: what was exported and archived under it is restored with it.
pub const RETIRED: &str = "root.key.retired";
/// Keys kept that may take its place. Each attempt to replace it leaves one.
const NEXT_MAX: usize = 8;
/// What tells a root key from others. A secret of its own stands behind it, so that it says nothing of the key.
pub const FINGERPRINT_BYTES: usize = 16;

const HEAD: &str = "optimus-root-key-1:";
const KEY_BYTES: usize = 32;
const NONCE_BYTES: usize = 24;
/// First byte of what [`RootKey::seal`] gives.
const FORMAT: u8 = 1;
/// Longest key file, in bytes.
pub const FILE_MAX: usize = 256;

/// Why the root key, or what it sealed, cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum RootKeyError {
    #[error("failed to read or write the root key {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the root key {} is malformed; restore it from your backup", path.display())]
    Malformed { path: PathBuf },
    #[error("the root key {} is missing, but the cluster has data sealed with it; restore it from your backup", path.display())]
    Missing { path: PathBuf },
    #[error("the root key {} is another cluster's; a server that joins starts with an empty data directory", path.display())]
    Another { path: PathBuf },
    #[error("the root key does not open the {what}: it is another cluster's key, or the data is damaged")]
    Wrong { what: &'static str },
}

/// 32 random bytes.
#[derive(Clone)]
pub struct RootKey(Zeroizing<[u8; KEY_BYTES]>);

impl std::fmt::Debug for RootKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RootKey")
    }
}

impl RootKey {
    /// Reads the key of this data directory; `None` when there is none yet.
    pub fn open(data_dir: &Path) -> Result<Option<Self>, RootKeyError> {
        let path = data_dir.join(FILE);
        let io = |source| RootKeyError::Io { path: path.clone(), source };
        let text = match files::read_bounded(&path, FILE_MAX) {
            Ok(bytes) => Zeroizing::new(bytes),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io(e)),
        };
        files::check_private(&path).map_err(io)?;
        parse(&text).map(Some).ok_or(RootKeyError::Malformed { path })
    }

    /// Another key. It is nowhere yet.
    pub fn generate(env: &Env) -> Self {
        let mut key = Zeroizing::new([0u8; KEY_BYTES]);
        env.entropy.fill(key.as_mut_slice());
        RootKey(key)
    }

    /// Makes the key of this data directory. Durable before it is used.
    pub fn create(data_dir: &Path, env: &Env) -> Result<Self, RootKeyError> {
        let key = Self::generate(env);
        key.store(data_dir)?;
        Ok(key)
    }

    /// Takes the key handed over by the cluster this server joins. Durable when it returns.
    pub fn adopt(data_dir: &Path, text: &[u8]) -> Result<Self, RootKeyError> {
        let path = data_dir.join(FILE);
        let key = parse(text).ok_or_else(|| RootKeyError::Malformed { path: path.clone() })?;
        match Self::open(data_dir)? {
            None => key.store(data_dir)?,
            Some(held) if held.0 == key.0 => {}
            Some(_) => return Err(RootKeyError::Another { path }),
        }
        Ok(key)
    }

    /// Writes the key as that of a data directory. Durable when this returns.
    pub fn store(&self, data_dir: &Path) -> Result<(), RootKeyError> {
        let path = data_dir.join(FILE);
        files::write_private(&path, self.to_text().as_bytes()).map_err(|source| RootKeyError::Io { path, source })
    }

    /// Keeps the key as one that may take the place of that of the data directory. Durable when this returns.
    pub fn store_next(&self, data_dir: &Path) -> Result<(), RootKeyError> {
        let path = data_dir.join(self.next_name());
        let io = |source| RootKeyError::Io { path: path.clone(), source };
        let mut others: Vec<(std::time::SystemTime, PathBuf)> = Vec::new();
        for held in nexts(data_dir).map_err(io)? {
            others.push((held.metadata().and_then(|m| m.modified()).map_err(io)?, held));
        }
        others.sort();
        for (_, old) in others.iter().take((others.len() + 1).saturating_sub(NEXT_MAX)) {
            std::fs::remove_file(old).map_err(io)?;
        }
        files::write_private(&path, self.to_text().as_bytes()).map_err(io)
    }

    /// The first of the key of this data directory and those that may take its place that `fits`.
    pub fn find(data_dir: &Path, fits: impl Fn(&RootKey) -> bool) -> Result<Option<Self>, RootKeyError> {
        let Some(key) = Self::open(data_dir)? else { return Ok(None) };
        if fits(&key) {
            return Ok(Some(key));
        }
        let io = |source| RootKeyError::Io { path: data_dir.to_owned(), source };
        for path in nexts(data_dir).map_err(io)? {
            files::check_private(&path).map_err(io)?;
            let text = Zeroizing::new(files::read_bounded(&path, FILE_MAX).map_err(io)?);
            if let Some(next) = parse(&text).filter(|next| fits(next)) {
                return Ok(Some(next));
            }
        }
        Ok(Some(key))
    }

    /// Puts the key in the place of that of the data directory, which is kept as [`RETIRED`]. Durable when this returns.
    pub fn replace(&self, data_dir: &Path) -> Result<(), RootKeyError> {
        let io = |source| RootKeyError::Io { path: data_dir.join(FILE), source };
        if let Some(old) = Self::open(data_dir)?.filter(|old| old.0 != self.0) {
            files::write_private(&data_dir.join(RETIRED), old.to_text().as_bytes()).map_err(io)?;
        }
        self.store(data_dir)?;
        for path in nexts(data_dir).map_err(io)? {
            std::fs::remove_file(path).map_err(io)?;
        }
        Ok(())
    }

    /// The key itself, to be sealed with another one.
    pub(super) fn bytes(&self) -> &[u8] {
        &*self.0
    }

    /// What [`bytes`](Self::bytes) gave.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Some(Self(Zeroizing::new(bytes.try_into().ok()?)))
    }

    /// Tells this key from others, and nothing of it.
    pub fn fingerprint(&self) -> Vec<u8> {
        self.derive("fingerprint")[..FINGERPRINT_BYTES].to_vec()
    }

    fn next_name(&self) -> String {
        self.fingerprint().iter().fold(NEXT.to_owned(), |name, byte| format!("{name}{byte:02x}"))
    }

    /// The content of a key file.
    pub fn to_text(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::with_capacity(FILE_MAX)); // never grows: no copy is left behind
        text.push_str(HEAD);
        for byte in self.0.iter() {
            text.push_str(&format!("{byte:02x}"));
        }
        text.push('\n');
        text
    }

    /// Reads the content of a key file, wherever it was kept; `None` when it is none.
    pub fn from_text(text: &[u8]) -> Option<Self> {
        parse(text)
    }

    /// Encrypts `plain`; it opens again only for the same `what` and `context`.
    pub fn seal(&self, plain: &[u8], what: &'static str, context: &[u8], env: &Env) -> Vec<u8> {
        let mut nonce = [0u8; NONCE_BYTES];
        env.entropy.fill(&mut nonce);
        let aad = aad(what, context);
        let sealed = self
            .cipher()
            .encrypt(&XNonce::from(nonce), Payload { msg: plain, aad: &aad })
            .expect("a few hundred bytes are below the cipher's limit of 256 GiB");
        [&[FORMAT], nonce.as_slice(), &sealed].concat()
    }

    pub fn unseal(&self, sealed: &[u8], what: &'static str, context: &[u8]) -> Result<Zeroizing<Vec<u8>>, RootKeyError> {
        let wrong = || RootKeyError::Wrong { what };
        let (&FORMAT, rest) = sealed.split_first().ok_or_else(wrong)? else { return Err(wrong()) };
        let (nonce, body) = rest.split_first_chunk::<NONCE_BYTES>().ok_or_else(wrong)?;
        let aad = aad(what, context);
        self.cipher().decrypt(&XNonce::from(*nonce), Payload { msg: body, aad: &aad }).map(Zeroizing::new).map_err(|_| wrong())
    }

    /// A secret of its own for `purpose`, which tells nothing of this key.
    pub fn derive(&self, purpose: &str) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("optimus root key 1");
        hasher.update(&*self.0).update(purpose.as_bytes());
        hasher.finalize().into()
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new((&*self.0).into())
    }
}

/// Files with keys that may take the place of the one in use.
fn nexts(data_dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(data_dir)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(NEXT) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

fn aad(what: &str, context: &[u8]) -> Vec<u8> {
    [what.as_bytes(), &[0], context].concat()
}

fn parse(text: &[u8]) -> Option<RootKey> {
    let hex = std::str::from_utf8(text).ok()?.trim_end().strip_prefix(HEAD)?;
    if hex.len() != 2 * KEY_BYTES || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut key = Zeroizing::new([0u8; KEY_BYTES]);
    for (byte, digits) in key.iter_mut().zip(hex.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    // An all-zero key is a file that was allocated and never written.
    key.iter().any(|b| *b != 0).then_some(RootKey(key))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use optimus_host::env::HostEnv;

    #[test]
    fn what_is_sealed_opens_with_the_same_key_for_the_same_use_only() {
        let (dir, env) = (tempfile::tempdir().unwrap(), HostEnv::new());
        assert!(RootKey::open(dir.path()).unwrap().is_none());
        let key = RootKey::create(dir.path(), &env).unwrap();
        let sealed = key.seal(b"secret", "CA key", b"cluster", &env);
        let again = RootKey::open(dir.path()).unwrap().unwrap();
        assert_eq!(*again.unseal(&sealed, "CA key", b"cluster").unwrap(), b"secret");
        assert!(again.unseal(&sealed, "CA key", b"another").is_err());
        assert!(again.unseal(&sealed, "other", b"cluster").is_err());
        for i in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[i] ^= 1;
            assert!(again.unseal(&bad, "CA key", b"cluster").is_err(), "byte {i}");
            assert!(again.unseal(&sealed[..i], "CA key", b"cluster").is_err(), "cut at {i}");
        }
        let other = RootKey::create(tempfile::tempdir().unwrap().path(), &env).unwrap();
        assert!(other.unseal(&sealed, "CA key", b"cluster").is_err());
    }

    #[test]
    fn a_key_that_is_replaced_is_kept_and_those_that_were_not_taken_are_not() {
        let (dir, env) = (tempfile::tempdir().unwrap(), HostEnv::new());
        let old = RootKey::create(dir.path(), &env).unwrap();
        let nexts: Vec<RootKey> = (0..NEXT_MAX + 3).map(|_| RootKey::generate(&env)).collect();
        for next in &nexts {
            next.store_next(dir.path()).unwrap();
        }
        assert_eq!(super::nexts(dir.path()).unwrap().len(), NEXT_MAX, "bounded");
        let newest = nexts.last().unwrap();
        let is_newest = |key: &RootKey| key.fingerprint() == newest.fingerprint();
        assert_eq!(RootKey::find(dir.path(), |key| key.0 == old.0).unwrap().unwrap().0, old.0);
        let found = RootKey::find(dir.path(), is_newest).unwrap().unwrap();
        found.replace(dir.path()).unwrap();
        found.replace(dir.path()).unwrap(); // after a crash
        assert_eq!(RootKey::open(dir.path()).unwrap().unwrap().0, newest.0);
        assert_eq!(parse(&std::fs::read(dir.path().join(RETIRED)).unwrap()).unwrap().0, old.0);
        assert!(super::nexts(dir.path()).unwrap().is_empty());
    }

    #[test]
    fn a_bad_root_key_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        for bad in [String::new(), HEAD.into(), format!("{HEAD}{}", "0".repeat(64)), format!("{HEAD}{}", "é".repeat(32)), "x".repeat(300)]
        {
            files::write_private(&path, bad.as_bytes()).unwrap();
            assert!(RootKey::open(dir.path()).is_err(), "{bad:?}");
        }
        files::write_atomic(&path, format!("{HEAD}{}", "ab".repeat(32)).as_bytes(), 0o644).unwrap();
        assert!(RootKey::open(dir.path()).is_err(), "readable by others");
    }
}
