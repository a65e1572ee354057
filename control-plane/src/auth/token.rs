//! The admin token: made at first start, kept in a file only its owner may read.
//!
//! `optimus_admin_` and 48 base64url characters: 32 random bytes and their CRC-32. The prefix lets
//! secret scanners find a leaked one, the checksum tells a typo from a wrong token.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use optimus_common::env::Entropy;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

const PREFIX: &str = "optimus_admin_";
const SECRET_BYTES: usize = 32;
/// More than any token file holds.
const FILE_MAX: u64 = 1024;

/// The text of an admin token. Wiped when dropped, never printed by `Debug`.
#[derive(Clone)]
pub struct AdminToken(Zeroizing<String>);

/// All a server remembers of it.
pub(super) struct TokenHash([u8; 32]);

impl TokenHash {
    /// Compares in constant time. High entropy needs no slow hash.
    pub fn matches(&self, text: &str) -> bool {
        let given: [u8; 32] = Sha256::digest(text.as_bytes()).into();
        self.0.ct_eq(&given).into()
    }
}

impl AdminToken {
    pub fn generate(entropy: &dyn Entropy) -> Self {
        let mut bytes = Zeroizing::new([0u8; SECRET_BYTES + 4]);
        entropy.fill(&mut bytes[..SECRET_BYTES]);
        let checksum = crc32fast::hash(&bytes[..SECRET_BYTES]).to_be_bytes();
        bytes[SECRET_BYTES..].copy_from_slice(&checksum);
        AdminToken(Zeroizing::new(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(&bytes[..]))))
    }

    /// Takes a text of the right shape and checksum.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let bytes = Zeroizing::new(URL_SAFE_NO_PAD.decode(text.strip_prefix(PREFIX)?).ok()?);
        let (secret, checksum) = bytes.split_at_checked(SECRET_BYTES)?;
        (checksum == crc32fast::hash(secret).to_be_bytes()).then(|| AdminToken(Zeroizing::new(text.to_owned())))
    }

    /// The text itself, for the file and the client that sends it.
    pub fn expose(&self) -> &str {
        &self.0
    }

    pub(super) fn hash(&self) -> TokenHash {
        TokenHash(Sha256::digest(self.0.as_bytes()).into())
    }
}

impl std::fmt::Debug for AdminToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AdminToken(..)")
    }
}

/// Why the token file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    #[error("failed to read the token file {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("failed to write the token file {}", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the token file {} may be read by others (mode {mode:o}); set it to 600 and replace the token", path.display())]
    Exposed { path: PathBuf, mode: u32 },
    #[error("the token file {} holds no admin token; remove it and a new one is made", path.display())]
    Damaged { path: PathBuf },
}

/// Reads the token kept at `path`, or makes one there (mode 600, on disk before this returns).
///
/// A file that others may read, or that holds something else, is an error: neither is silently mended.
pub fn load_or_create(path: &Path, entropy: &dyn Entropy) -> Result<AdminToken, TokenFileError> {
    if let Some(token) = load(path)? {
        return Ok(token);
    }
    let token = AdminToken::generate(entropy);
    match create(path, &token) {
        Ok(()) => Ok(token),
        // Somebody else was quicker: theirs counts.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            load(path)?.ok_or_else(|| TokenFileError::Write { path: path.into(), source: error })
        }
        Err(source) => Err(TokenFileError::Write { path: path.into(), source }),
    }
}

fn load(path: &Path) -> Result<Option<AdminToken>, TokenFileError> {
    let failed = |source| TokenFileError::Read { path: path.into(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mode = file.metadata().map_err(failed)?.mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(TokenFileError::Exposed { path: path.into(), mode });
    }
    let mut bytes = Zeroizing::new(Vec::new());
    file.take(FILE_MAX).read_to_end(&mut bytes).map_err(failed)?;
    let token = std::str::from_utf8(&bytes).ok().and_then(AdminToken::parse);
    token.map(Some).ok_or_else(|| TokenFileError::Damaged { path: path.into() })
}

/// Written beside and linked into place, so that the file is there whole or not at all and never
/// replaces another.
fn create(path: &Path, token: &AdminToken) -> io::Result<()> {
    let beside = path.with_extension("new");
    match std::fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    file.write_all(token.expose().as_bytes())?;
    file.write_all(b"\n")?;
    file.sync_all()?;
    let linked = std::fs::hard_link(&beside, path);
    std::fs::remove_file(&beside)?;
    linked?;
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    struct Fixed(u8);
    impl Entropy for Fixed {
        fn fill(&self, bytes: &mut [u8]) {
            bytes.fill(self.0);
        }
    }

    #[test]
    fn a_token_reads_back_and_a_typo_does_not() {
        let token = AdminToken::generate(&Fixed(3));
        assert!(token.expose().starts_with(PREFIX));
        assert_eq!(token.expose().len(), PREFIX.len() + 48);
        assert!(AdminToken::parse(token.expose()).is_some());
        for place in PREFIX.len()..token.expose().len() {
            let mut typo = token.expose().to_owned();
            let other = if &typo[place..=place] == "A" { "B" } else { "A" };
            typo.replace_range(place..=place, other);
            assert!(AdminToken::parse(&typo).is_none(), "{typo}");
        }
        for bad in ["", PREFIX, "optimus_admin_AAAA", "é"] {
            assert!(AdminToken::parse(bad).is_none());
        }
        assert!(!format!("{token:?}").contains(&token.expose()[PREFIX.len()..]));
    }

    #[test]
    fn the_file_is_made_once_and_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.token");
        let first = load_or_create(&path, &Fixed(1)).unwrap();
        let again = load_or_create(&path, &Fixed(2)).unwrap();
        assert_eq!(first.expose(), again.expose());
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);

        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(load_or_create(&path, &Fixed(2)), Err(TokenFileError::Exposed { mode: 0o644, .. })));
    }

    #[test]
    fn a_damaged_file_is_an_error_not_a_new_token() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.token");
        std::fs::write(&path, b"\xff\xfe garbage").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert!(matches!(load_or_create(&path, &Fixed(2)), Err(TokenFileError::Damaged { .. })));
    }
}
