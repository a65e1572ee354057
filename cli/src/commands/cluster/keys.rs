//! Where locks and keys come from on the command line: files and prompts, never flags that others can see.

use std::path::{Path, PathBuf};

use optimus_control_plane::identity::root_key::{self, RootKey};
use optimus_control_plane::rescue::crypt::{self, PASSPHRASE_MAX};
use optimus_control_plane::rescue::{Key, Lock};
use optimus_host::files;

use super::failed;
use crate::error::Failure;
use crate::hidden;
use crate::output::Terminal;

/// Longest file of age identities.
const IDENTITIES_MAX: usize = 64 << 10;
/// Longest encrypted copy of a root key.
const SEALED_MAX: usize = 64 << 10;

/// `--recipient` and `--passphrase-file`
#[derive(Debug, Default, clap::Args)]
pub struct LockArgs {
    /// age recipient (age1...) to encrypt to (repeatable)
    #[arg(long = "recipient", short = 'r', value_name = "AGE1")]
    pub recipients: Vec<String>,
    /// File with a passphrase to encrypt with, in its first line
    #[arg(long, value_name = "FILE", conflicts_with = "recipients")]
    pub passphrase_file: Option<PathBuf>,
    /// Ask for a passphrase to encrypt with
    #[arg(long, conflicts_with_all = ["recipients", "passphrase_file"])]
    pub passphrase: bool,
}

impl LockArgs {
    /// Recipients, or a passphrase; checked.
    pub fn given(&self, terminal: &Terminal) -> Result<(Vec<String>, Option<String>), Failure> {
        let passphrase = match &self.passphrase_file {
            Some(path) => Some(first_line(path)?),
            None if self.passphrase => {
                let passphrase = ask("Passphrase: ", terminal)?;
                if ask("Again: ", terminal)? != passphrase {
                    return Err(Failure::usage("the two passphrases differ"));
                }
                Some(passphrase)
            }
            None => None,
        };
        self.check(passphrase.clone())?;
        Ok((self.recipients.clone(), passphrase))
    }

    pub fn lock(&self, terminal: &Terminal) -> Result<Lock, Failure> {
        let (_, passphrase) = self.given(terminal)?;
        self.check(passphrase)
    }

    fn check(&self, passphrase: Option<String>) -> Result<Lock, Failure> {
        Lock::of(&self.recipients, passphrase).map_err(|error| {
            Failure::usage("cannot encrypt")
                .because(error.to_string())
                .hint("name who may open it with --recipient AGE1 (`age-keygen` makes a key), or give --passphrase-file FILE")
        })
    }
}

/// `--identity` and `--passphrase-file`
#[derive(Debug, Default, clap::Args)]
pub struct KeyArgs {
    /// File with the age identity (AGE-SECRET-KEY-1...) that opens the files
    #[arg(long, short = 'i', value_name = "FILE")]
    identity: Option<PathBuf>,
    /// File with the passphrase that opens the files [default: asked for]
    #[arg(long, value_name = "FILE", conflicts_with = "identity")]
    passphrase_file: Option<PathBuf>,
}

impl KeyArgs {
    /// Whether a file was named: without one, the key is asked for.
    pub fn is_given(&self) -> bool {
        self.identity.is_some() || self.passphrase_file.is_some()
    }

    pub fn key(&self, terminal: &Terminal) -> Result<Key, Failure> {
        let key = match (&self.identity, &self.passphrase_file) {
            (Some(path), _) => {
                let text = read(path, IDENTITIES_MAX)?;
                let text = std::str::from_utf8(&text).map_err(|e| failed(&format!("cannot read {}", path.display()), &e))?;
                Key::identities(text)
            }
            (None, Some(path)) => Key::passphrase(first_line(path)?),
            (None, None) => Key::passphrase(ask("Passphrase: ", terminal)?),
        };
        key.map_err(|error| failed("cannot use the key", &error))
    }
}

/// Reads a root key: the file itself, or a copy of it that `key` opens.
pub fn root_key(path: &Path, key: Option<&Key>) -> Result<RootKey, Failure> {
    let what = format!("cannot read the root key {}", path.display());
    let bytes = zeroize::Zeroizing::new(read(path, SEALED_MAX)?);
    let text = match key {
        _ if !crypt::is_age(&bytes) => bytes,
        Some(key) => crypt::decrypt(key, &bytes, root_key::FILE_MAX).map_err(|error| failed(&what, &error))?,
        None => {
            return Err(Failure::usage(what).because("it is encrypted").hint("name what opens it with --identity or --passphrase-file"));
        }
    };
    RootKey::from_text(&text).ok_or_else(|| Failure::usage(what).because("it holds no root key"))
}

fn read(path: &Path, max: usize) -> Result<Vec<u8>, Failure> {
    files::read_bounded(path, max).map_err(|error| failed(&format!("cannot read {}", path.display()), &error))
}

fn first_line(path: &Path) -> Result<String, Failure> {
    let what = format!("cannot read the passphrase in {}", path.display());
    let bytes = read(path, PASSPHRASE_MAX + 2)?;
    let text = String::from_utf8(bytes).map_err(|_| Failure::usage(what).because("it is not UTF-8"))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// Asks for a passphrase.
fn ask(prompt: &str, terminal: &Terminal) -> Result<String, Failure> {
    hidden::ask(prompt, terminal).map_err(|failure| failure.hint("name a file with --passphrase-file, or an age identity with --identity"))
}
