//! The value of a secret, which shows itself to nobody by accident.

use std::fmt;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

/// Longest value, in bytes.
pub const SECRET_MAX: usize = 64 << 10;

/// Text without NUL, as it becomes an environment variable. Wiped when dropped; printed as `***`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SecretValue(Zeroizing<String>);

/// Why a text cannot be a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadSecret {
    #[error("a secret cannot be empty")]
    Empty,
    #[error("a secret holds at most {SECRET_MAX} bytes")]
    TooLong,
    #[error("a secret is text without NUL bytes; encode others, with base64 for example")]
    NotText,
}

impl SecretValue {
    /// # Errors
    /// [`BadSecret`]; nothing of the text is in it.
    pub fn new(text: impl Into<Zeroizing<String>>) -> Result<Self, BadSecret> {
        let text = text.into();
        match text.len() {
            0 => Err(BadSecret::Empty),
            n if n > SECRET_MAX => Err(BadSecret::TooLong),
            _ if text.contains('\0') => Err(BadSecret::NotText),
            _ => Ok(Self(text)),
        }
    }

    /// The value itself. Only for sealing it and for the workload it was meant for.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for SecretValue {
    type Error = BadSecret;

    fn try_from(text: String) -> Result<Self, BadSecret> {
        Self::new(text)
    }
}

impl From<SecretValue> for String {
    fn from(value: SecretValue) -> String {
        String::clone(&value.0)
    }
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_text_of_some_length_and_does_not_show_itself() {
        for (text, bad) in [("", BadSecret::Empty), ("a\0b", BadSecret::NotText), (&*"x".repeat(SECRET_MAX + 1), BadSecret::TooLong)] {
            assert_eq!(SecretValue::new(text.to_owned()), Err(bad));
        }
        let value = SecretValue::new("hunter2 é\n".to_owned()).expect("it is text");
        assert_eq!((format!("{value:?}").as_str(), value.reveal()), ("***", "hunter2 é\n"));
        assert!(serde_json::from_str::<SecretValue>("\"\"").is_err());
    }
}
