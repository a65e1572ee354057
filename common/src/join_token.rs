//! The join token: one copy-paste string with all a new node needs to find the cluster and be let in.
//!
//! `opt_join_<base64url of MessagePack>_<crc32 in hex>`. It names the servers' addresses, pins the
//! cluster CA by its SHA-256 (there is no form without the pin), and carries a secret of which the
//! cluster keeps a hash only. Whatever is wrong with the text is said before any packet is sent.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::codec;
use crate::ids::TokenId;
use crate::time::Timestamp;

/// What every join token starts with; secret scanners look for it.
pub const PREFIX: &str = "opt_join_";
/// Longest text taken for a token.
pub const TEXT_MAX: usize = 4096;
/// Most server addresses in a token.
pub const SERVERS_MAX: usize = 16;
/// Longest server address: a DNS name and a port.
const SERVER_MAX: usize = 263;
/// Longest secret.
const SECRET_MAX: usize = 128;
/// Hex digits of the checksum at the end.
const CHECKSUM_DIGITS: usize = 8;
const FORMAT: u8 = 1;

/// What the holder of a token may become.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    #[default]
    Agent,
    Server,
}

impl Role {
    /// For `skip_serializing_if`: agents came first, and what was stored for them stays as it is.
    pub fn is_agent(&self) -> bool {
        *self == Role::Agent
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Agent => "agent",
            Role::Server => "server",
        })
    }
}

/// A decoded join token.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// `host:port` of the servers, the preferred one first.
    pub servers: Vec<String>,
    /// SHA-256 of the cluster CA's certificate (DER).
    pub ca_sha256: [u8; 32],
    pub role: Role,
    pub id: TokenId,
    /// Never logged.
    pub secret: String,
    pub expires_at: Timestamp,
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let JoinToken { servers, ca_sha256: _, role, id, secret: _, expires_at } = self;
        write!(f, "JoinToken({id}, {role:?}, servers {servers:?}, expires {expires_at}, secret withheld)")
    }
}

/// Why a text is not a usable join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinTokenError {
    #[error("the join token is empty")]
    Empty,
    #[error("not a join token: it must start with `{PREFIX}`")]
    Prefix,
    #[error("the join token holds {found:?}, which no token does; copy it again, on one line and without quotes")]
    Character { found: char },
    #[error("the join token is cut off: its end is missing; copy the whole line")]
    CutOff,
    #[error("the join token is damaged: its checksum does not match; copy it again")]
    Checksum,
    #[error("the join token is longer than {TEXT_MAX} characters")]
    TooLong,
    #[error("the join token is of format {0}, which this version does not know; upgrade optimus on this host")]
    Format(u8),
    #[error("the join token is malformed: {0}")]
    Malformed(String),
    #[error("the join token expired at {at}, {ago} ago; make a new one with `optimus nodes join-token`")]
    Expired { at: Timestamp, ago: crate::time::Span },
}

/// Bytes written as MessagePack binary instead of a list of numbers: tokens are pasted by people.
struct Binary(Vec<u8>);

impl Serialize for Binary {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_bytes(&self.0)
    }
}
impl<'de> Deserialize<'de> for Binary {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Binary;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes")
            }
            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Binary, E> {
                Ok(Binary(bytes.to_vec()))
            }
        }
        d.deserialize_bytes(Visitor)
    }
}

/// The payload. Short names: they are part of what people copy.
#[derive(Serialize, Deserialize)]
struct Wire {
    v: u8,
    #[serde(default)]
    servers: Vec<String>,
    ca: Binary,
    role: Role,
    id: TokenId,
    secret: String,
    until: u64,
}

impl JoinToken {
    /// The text to hand to the new node.
    pub fn encode(&self) -> String {
        let JoinToken { servers, ca_sha256, role, id, secret, expires_at } = self;
        let wire = Wire {
            v: FORMAT,
            servers: servers.clone(),
            ca: Binary(ca_sha256.to_vec()),
            role: *role,
            id: *id,
            secret: secret.clone(),
            until: expires_at.0,
        };
        let body = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(codec::to_msgpack(&wire)));
        let sum = crc32fast::hash(body.as_bytes());
        format!("{body}_{sum:08x}")
    }

    /// Reads a token's text; blanks around it are taken off. Does not look at its expiry: see [`JoinToken::check`].
    pub fn decode(text: &str) -> Result<Self, JoinTokenError> {
        let text = text.trim();
        if text.is_empty() {
            return Err(JoinTokenError::Empty);
        }
        if text.len() > TEXT_MAX {
            return Err(JoinTokenError::TooLong);
        }
        let Some(rest) = text.strip_prefix(PREFIX) else {
            // `opt_jo` is the start of a token, not something else.
            return Err(if PREFIX.starts_with(text) { JoinTokenError::CutOff } else { JoinTokenError::Prefix });
        };
        if let Some(found) = rest.chars().find(|c| !matches!(c, 'a'..='z' | 'A'..='Z' | '0'..='9' | '-' | '_')) {
            return Err(JoinTokenError::Character { found });
        }
        // The body may hold `_` too, so a token cut inside it still has a last part: of the wrong shape.
        let (payload, sum) = rest.rsplit_once('_').ok_or(JoinTokenError::CutOff)?;
        if sum.len() != CHECKSUM_DIGITS {
            return Err(JoinTokenError::CutOff);
        }
        let stored = u32::from_str_radix(sum, 16).map_err(|_| JoinTokenError::CutOff)?;
        if stored != crc32fast::hash(&text.as_bytes()[..PREFIX.len() + payload.len()]) {
            return Err(JoinTokenError::Checksum);
        }
        let malformed = |what: String| JoinTokenError::Malformed(what);
        let bytes = URL_SAFE_NO_PAD.decode(payload).map_err(|e| malformed(e.to_string()))?;
        /// The format number alone, so that a later format is named and not called malformed.
        #[derive(Deserialize)]
        struct Head {
            v: u8,
        }
        let head: Head = codec::from_msgpack(&bytes).map_err(|e| malformed(e.to_string()))?;
        if head.v != FORMAT {
            return Err(JoinTokenError::Format(head.v));
        }
        let wire: Wire = codec::from_msgpack(&bytes).map_err(|e| malformed(e.to_string()))?;
        let ca_sha256: [u8; 32] = wire.ca.0.try_into().map_err(|_| malformed("the CA fingerprint is not 32 bytes long".into()))?;
        if wire.servers.is_empty() || wire.servers.len() > SERVERS_MAX {
            return Err(malformed(format!("it names {} servers; 1 to {SERVERS_MAX} are possible", wire.servers.len())));
        }
        if let Some(bad) = wire.servers.iter().find(|s| s.len() > SERVER_MAX || !is_host_port(s)) {
            return Err(malformed(format!("`{bad}` is not an address of the form host:port")));
        }
        if wire.secret.is_empty() || wire.secret.len() > SECRET_MAX {
            return Err(malformed(format!("its secret is {} characters long", wire.secret.len())));
        }
        Ok(JoinToken {
            servers: wire.servers,
            ca_sha256,
            role: wire.role,
            id: wire.id,
            secret: wire.secret,
            expires_at: Timestamp(wire.until),
        })
    }

    /// Refuses a token that has expired by our own clock. The servers check again by theirs.
    pub fn check(&self, now: Timestamp) -> Result<(), JoinTokenError> {
        if now >= self.expires_at {
            return Err(JoinTokenError::Expired { at: self.expires_at, ago: now.since(self.expires_at) });
        }
        Ok(())
    }
}

/// True for `name:port`, `1.2.3.4:port` and `[::1]:port`.
pub fn is_host_port(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let host_ok = match host.strip_prefix('[') {
        Some(v6) => v6.strip_suffix(']').is_some_and(|v6| v6.parse::<std::net::Ipv6Addr>().is_ok()),
        None => !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')),
    };
    host_ok && port.parse::<u16>().is_ok_and(|port| port != 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            servers: vec!["10.0.0.1:6780".into(), "optimus.example.org:6780".into()],
            ca_sha256: [7; 32],
            role: Role::Agent,
            id: TokenId(uuid::Uuid::from_u128(42)),
            secret: "c2VjcmV0LXNlY3JldC1zZWNyZXQ".into(),
            expires_at: Timestamp(1_800_000_000_000),
        }
    }

    #[test]
    fn a_token_survives_the_round_trip() {
        let text = token().encode();
        assert!(text.len() < 300, "{} characters are too many to paste", text.len());
        assert_eq!(JoinToken::decode(&format!("  {text}\n")).unwrap(), token());
    }

    #[test]
    fn a_token_cut_off_anywhere_says_so_or_fails_its_checksum() {
        let text = token().encode();
        for end in 1..text.len() {
            let error = JoinToken::decode(&text[..end]).unwrap_err();
            assert!(matches!(error, JoinTokenError::CutOff | JoinTokenError::Checksum), "cut at {end}: {error}");
        }
        assert_eq!(JoinToken::decode(&text[..text.len() - 3]), Err(JoinTokenError::CutOff));
    }

    #[test]
    fn every_changed_character_is_noticed() {
        let text = token().encode();
        for i in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[i] = if bytes[i] == b'x' { b'y' } else { b'x' };
            assert!(JoinToken::decode(std::str::from_utf8(&bytes).unwrap()).is_err(), "character {i}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(JoinToken::decode("  "), Err(JoinTokenError::Empty));
        assert_eq!(JoinToken::decode("K10abc::server:1"), Err(JoinTokenError::Prefix));
        assert_eq!(JoinToken::decode("opt_join_\"abc\""), Err(JoinTokenError::Character { found: '"' }));
        assert_eq!(JoinToken::decode(&"a".repeat(TEXT_MAX + 1)), Err(JoinTokenError::TooLong));
        let late = Timestamp(1_800_000_060_000);
        assert!(token().check(Timestamp(1_799_999_999_999)).is_ok());
        assert!(token().check(late).unwrap_err().to_string().contains("1m ago"));
    }

    #[test]
    fn v1_text_still_decodes() {
        let text = include_str!("../../tests/golden/join-token-v1.txt");
        assert_eq!(JoinToken::decode(text).unwrap(), token());
    }

    #[test]
    fn the_secret_is_not_in_the_debug_form() {
        assert!(!format!("{:?}", token()).contains(&token().secret));
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in "(opt_join_)?[ -~]{0,200}(_[0-9a-f]{8})?") {
            let _ = JoinToken::decode(&text);
        }

        #[test]
        fn no_payload_with_a_good_checksum_panics(payload in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let body = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(payload));
            let text = format!("{body}_{:08x}", crc32fast::hash(body.as_bytes()));
            let _ = JoinToken::decode(&text);
        }
    }
}
