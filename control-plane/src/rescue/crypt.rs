//! The locks and keys of what leaves a server: the age format, version 1, to recipients or a passphrase.
//!
//! age is used because the operator can open the files without us (`age -d`), and because it notices a changed, cut or
//! lengthened file at any place.

use std::io::{self, BufRead, Write};

use age::secrecy::{ExposeSecret as _, SecretString};
use age::stream::{StreamReader, StreamWriter};
use age::{DecryptError, Decryptor, Encryptor, Identity, IdentityFile, Recipient};

/// Shortest passphrase, in bytes.
pub const PASSPHRASE_MIN: usize = 12;
/// Longest passphrase, in bytes.
pub const PASSPHRASE_MAX: usize = 1024;
/// Most recipients of one file.
pub const RECIPIENTS_MAX: usize = 32;
/// Base-2 logarithm of scrypt's cost: 128 MiB and a fraction of a second.
const WORK: u8 = 17;
/// Largest cost taken from a file: 1 GiB.
const WORK_MAX: u8 = 20;
/// What an age file begins with.
const HEAD: &[u8] = b"age-encryption.org/";

/// Why there is no lock or key, or why it does not fit.
#[derive(Debug, thiserror::Error)]
pub enum CryptError {
    #[error("neither a recipient nor a passphrase was given: an export holds the cluster's keys in sealed form and all configuration")]
    NoLock,
    #[error("give recipients or a passphrase, not both")]
    TwoLocks,
    #[error("`{recipient}` is no age recipient (age1...): {reason}")]
    Recipient { recipient: String, reason: &'static str },
    #[error("{0} recipients are more than {RECIPIENTS_MAX}")]
    TooManyRecipients(usize),
    #[error("a passphrase has {PASSPHRASE_MIN} to {PASSPHRASE_MAX} bytes, this one has {0}")]
    Passphrase(usize),
    #[error("failed to read the age identities")]
    Identities(#[source] io::Error),
    #[error("there is no age identity (AGE-SECRET-KEY-1...) in the file")]
    NoIdentity,
    #[error("this is no age file, or its head is damaged")]
    NotAge,
    #[error("the passphrase is wrong, or the head of the file is damaged")]
    WrongPassphrase,
    #[error("none of the given age identities opens the file, or its head is damaged")]
    WrongIdentity,
    #[error("the file is encrypted with a passphrase, and an age identity was given")]
    NeedsPassphrase,
    #[error("the file is encrypted to age recipients, and a passphrase was given")]
    NeedsIdentity,
    #[error("the file asks for 2^{0} units of work to open, more than anything of ours does")]
    TooMuchWork(u8),
    #[error("failed to read the head of the file")]
    Read(#[source] io::Error),
    #[error("failed to encrypt")]
    Encrypt(#[source] Box<age::EncryptError>),
}

impl CryptError {
    /// Where the encrypted bytes go refused them.
    pub(crate) fn write(error: io::Error) -> Self {
        Self::Encrypt(Box::new(age::EncryptError::Io(error)))
    }
}

/// Who may open what is written.
#[derive(Clone)]
pub struct Lock(Locked);

#[derive(Clone)]
enum Locked {
    Recipients(Vec<age::x25519::Recipient>),
    Passphrase(SecretString),
}

impl std::fmt::Debug for Lock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Locked::Recipients(all) => write!(f, "Lock({} recipients)", all.len()),
            Locked::Passphrase(_) => f.write_str("Lock(passphrase)"),
        }
    }
}

impl Lock {
    /// A lock of what an operator gave; exactly one of the two kinds.
    ///
    /// # Errors
    /// Neither or both, a recipient that is none, a passphrase that is too short or long.
    pub fn of(recipients: &[String], passphrase: Option<String>) -> Result<Self, CryptError> {
        match (recipients, passphrase) {
            ([], None) => Err(CryptError::NoLock),
            ([], Some(passphrase)) => passphrase_of(passphrase).map(|p| Lock(Locked::Passphrase(p))),
            (_, Some(_)) => Err(CryptError::TwoLocks),
            (all, None) if all.len() > RECIPIENTS_MAX => Err(CryptError::TooManyRecipients(all.len())),
            (all, None) => {
                let parse = |text: &String| {
                    let recipient = text.trim().to_owned();
                    recipient.parse().map_err(|reason| CryptError::Recipient { recipient, reason })
                };
                all.iter().map(parse).collect::<Result<_, _>>().map(|all| Lock(Locked::Recipients(all)))
            }
        }
    }

    /// Encrypts what is written to the result; [`StreamWriter::finish`] ends the file.
    pub(crate) fn wrap<W: Write>(&self, out: W) -> Result<StreamWriter<W>, CryptError> {
        let encryptor = match &self.0 {
            Locked::Recipients(all) => Encryptor::with_recipients(all.iter().map(|r| r as &dyn Recipient)),
            Locked::Passphrase(passphrase) => {
                let mut recipient = age::scrypt::Recipient::new(passphrase.clone());
                recipient.set_work_factor(WORK);
                Encryptor::with_recipients(std::iter::once(&recipient as &dyn Recipient))
            }
        };
        let encryptor = encryptor.map_err(|e| CryptError::Encrypt(Box::new(e)))?;
        encryptor.wrap_output(out).map_err(CryptError::write)
    }
}

/// What opens a file.
pub struct Key(Keys);

enum Keys {
    Identities(Vec<Box<dyn Identity>>),
    Passphrase(SecretString),
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key")
    }
}

impl Key {
    /// The identities of an age key file (`age-keygen`).
    ///
    /// # Errors
    /// A file without any, or with a line that is none.
    pub fn identities(text: &str) -> Result<Self, CryptError> {
        let file = IdentityFile::from_buffer(text.as_bytes()).map_err(CryptError::Identities)?;
        let all = file.into_identities().map_err(|_| CryptError::NoIdentity)?;
        if all.is_empty() {
            return Err(CryptError::NoIdentity);
        }
        Ok(Key(Keys::Identities(all)))
    }

    /// A passphrase.
    ///
    /// # Errors
    /// One that could not have locked anything of ours.
    pub fn passphrase(passphrase: String) -> Result<Self, CryptError> {
        passphrase_of(passphrase).map(|p| Key(Keys::Passphrase(p)))
    }

    /// Decrypts `input`. What is read from the result is authentic as far as it was read; its end is only authentic once
    /// a read has said so.
    pub(crate) fn open<R: BufRead>(&self, input: R) -> Result<StreamReader<R>, CryptError> {
        let decryptor = Decryptor::new_buffered(input).map_err(|e| self.explain(e))?;
        match (&self.0, decryptor.is_scrypt()) {
            (Keys::Identities(_), true) => Err(CryptError::NeedsPassphrase),
            (Keys::Passphrase(_), false) => Err(CryptError::NeedsIdentity),
            (Keys::Identities(all), false) => decryptor.decrypt(all.iter().map(|i| &**i)).map_err(|e| self.explain(e)),
            (Keys::Passphrase(passphrase), true) => {
                let mut identity = age::scrypt::Identity::new(passphrase.clone());
                identity.set_max_work_factor(WORK_MAX);
                decryptor.decrypt(std::iter::once(&identity as &dyn Identity)).map_err(|e| self.explain(e))
            }
        }
    }

    fn explain(&self, error: DecryptError) -> CryptError {
        match (error, &self.0) {
            (DecryptError::Io(e), _) if e.kind() != io::ErrorKind::UnexpectedEof => CryptError::Read(e),
            (DecryptError::ExcessiveWork { required, .. }, _) => CryptError::TooMuchWork(required),
            (DecryptError::InvalidHeader | DecryptError::UnknownFormat | DecryptError::Io(_), _) => CryptError::NotAge,
            (_, Keys::Passphrase(_)) => CryptError::WrongPassphrase,
            (_, Keys::Identities(_)) => CryptError::WrongIdentity,
        }
    }
}

fn passphrase_of(passphrase: String) -> Result<SecretString, CryptError> {
    let passphrase = SecretString::from(passphrase);
    match passphrase.expose_secret().len() {
        PASSPHRASE_MIN..=PASSPHRASE_MAX => Ok(passphrase),
        other => Err(CryptError::Passphrase(other)),
    }
}

/// Whether bytes are the beginning of an age file.
pub fn is_age(bytes: &[u8]) -> bool {
    bytes.starts_with(HEAD)
}

/// Encrypts a few bytes, such as a key.
///
/// # Errors
/// What the library says.
pub fn encrypt(lock: &Lock, plain: &[u8]) -> Result<Vec<u8>, CryptError> {
    let failed = CryptError::write;
    let mut writer = lock.wrap(Vec::new())?;
    writer.write_all(plain).map_err(failed)?;
    writer.finish().map_err(failed)
}

/// Decrypts at most `max` bytes.
///
/// # Errors
/// A key that does not fit, a damaged file, or a longer one.
pub fn decrypt(key: &Key, sealed: &[u8], max: usize) -> Result<zeroize::Zeroizing<Vec<u8>>, CryptError> {
    use std::io::Read as _;
    let mut plain = zeroize::Zeroizing::new(Vec::with_capacity(max + 1));
    key.open(sealed)?.take(max as u64 + 1).read_to_end(&mut plain).map_err(CryptError::Read)?;
    if plain.len() > max {
        return Err(CryptError::Read(io::Error::new(io::ErrorKind::InvalidData, format!("it holds more than {max} bytes"))));
    }
    Ok(plain)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use super::*;

    /// A fresh identity: its lock and its key.
    pub(crate) fn pair() -> (Lock, Key, String) {
        let identity = age::x25519::Identity::generate();
        let recipient = identity.to_public().to_string();
        let text = identity.to_string().expose_secret().to_owned();
        (Lock::of(&[recipient], None).unwrap(), Key::identities(&text).unwrap(), text)
    }

    #[test]
    fn what_is_locked_opens_with_its_key_only() {
        let (lock, key, _) = pair();
        let (_, other, _) = pair();
        let sealed = encrypt(&lock, b"secret").unwrap();
        assert!(is_age(&sealed));
        assert_eq!(&*decrypt(&key, &sealed, 6).unwrap(), b"secret");
        assert!(decrypt(&key, &sealed, 5).is_err(), "longer than allowed");
        assert!(matches!(decrypt(&other, &sealed, 6), Err(CryptError::WrongIdentity)));
        let passphrase = Key::passphrase("a long passphrase".into()).unwrap();
        assert!(matches!(decrypt(&passphrase, &sealed, 6), Err(CryptError::NeedsIdentity)));
        for at in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[at] ^= 1;
            assert!(decrypt(&key, &bad, 6).is_err(), "byte {at}");
            assert!(decrypt(&key, &sealed[..at], 6).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_passphrase_opens_what_it_locked() {
        let lock = Lock::of(&[], Some("correct horse battery".into())).unwrap();
        let sealed = encrypt(&lock, b"x").unwrap();
        let open = |text: &str| decrypt(&Key::passphrase(text.into()).unwrap(), &sealed, 1);
        assert_eq!(&*open("correct horse battery").unwrap(), b"x");
        assert!(matches!(open("correct horse batterz"), Err(CryptError::WrongPassphrase)));
        assert!(matches!(decrypt(&pair().1, &sealed, 1), Err(CryptError::NeedsPassphrase)));
    }

    #[test]
    fn no_lock_two_locks_and_bad_ones_are_refused() {
        assert!(matches!(Lock::of(&[], None), Err(CryptError::NoLock)));
        assert!(matches!(Lock::of(&[], Some("short".into())), Err(CryptError::Passphrase(5))));
        assert!(matches!(Lock::of(&[], Some(String::new())), Err(CryptError::Passphrase(0))));
        assert!(matches!(Lock::of(&["age1nonsense".into()], None), Err(CryptError::Recipient { .. })));
        assert!(matches!(Lock::of(&["age1x".into()], Some("a long passphrase".into())), Err(CryptError::TwoLocks)));
        let many = vec![String::new(); RECIPIENTS_MAX + 1];
        assert!(matches!(Lock::of(&many, None), Err(CryptError::TooManyRecipients(_))));
        assert!(Key::identities("").is_err() && Key::identities("nonsense").is_err());
    }
}
