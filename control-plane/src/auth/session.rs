//! Sessions of browsers: a cookie that every server of the cluster can check, got for a code that is good once.
//!
//! ```text
//! optimus console --(admin token)--> code, in the memory of one server, 5 minutes, one use
//! page            --(code)---------> cookie = expiry | nonce | MAC      key: from the admin token, which all servers have
//! ```
//! Nothing is stored but codes, and cookies that logged out before their time. Another admin token ends all sessions.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::HeaderMap;
use http::header::COOKIE;
use optimus_common::Timestamp;
use optimus_common::env::Entropy;

use super::token::AdminToken;

/// How long a code may be used.
pub const CODE_TTL: Duration = Duration::from_secs(5 * 60);
/// How long a session lasts.
pub const SESSION_TTL: Duration = Duration::from_secs(12 * 3600);
/// The prefix binds it to this host, to HTTPS and to the whole site (RFC 6265bis).
pub const COOKIE_NAME: &str = "__Host-optimus";
/// Most codes at once; the oldest goes.
const CODES_MAX: usize = 16;
/// Most cookies that are remembered as logged out; the one that ends soonest goes.
const ENDED_MAX: usize = 4096;

const NONCE: usize = 16;
const MAC: usize = 32;
const COOKIE_BYTES: usize = 8 + NONCE + MAC;

type Nonce = [u8; NONCE];

#[derive(Default)]
struct Inner {
    /// Hash and expiry, oldest first.
    codes: Vec<([u8; 32], Timestamp)>,
    ended: BTreeMap<Nonce, Timestamp>,
}

pub(super) struct Sessions {
    key: [u8; 32],
    inner: Mutex<Inner>,
}

impl Sessions {
    pub fn new(admin: &AdminToken) -> Self {
        let key = blake3::derive_key("optimus 2026-11-24 sessions of browsers", admin.expose().as_bytes());
        Sessions { key, inner: Mutex::default() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A code for one session.
    pub fn code(&self, now: Timestamp, entropy: &dyn Entropy) -> (String, Timestamp) {
        let mut bytes = [0u8; NONCE];
        entropy.fill(&mut bytes);
        let (code, expires_at) = (URL_SAFE_NO_PAD.encode(bytes), now + CODE_TTL.into());
        let mut inner = self.inner();
        if inner.codes.len() >= CODES_MAX {
            inner.codes.remove(0);
        }
        inner.codes.push((*blake3::hash(code.as_bytes()).as_bytes(), expires_at));
        (code, expires_at)
    }

    /// The cookie's value for a code, which is used up by it.
    pub fn open(&self, code: &str, now: Timestamp, entropy: &dyn Entropy) -> Option<(String, Timestamp)> {
        let hash = blake3::hash(code.as_bytes());
        let mut inner = self.inner();
        inner.codes.retain(|(_, until)| *until > now);
        // Compared in constant time, though a hash of a guess tells little.
        let at = inner.codes.iter().position(|(held, _)| hash == *held)?;
        inner.codes.remove(at);
        drop(inner);
        let expires_at = now + SESSION_TTL.into();
        let mut bytes = [0u8; COOKIE_BYTES];
        bytes[..8].copy_from_slice(&expires_at.0.to_be_bytes());
        entropy.fill(&mut bytes[8..8 + NONCE]);
        let mac = blake3::keyed_hash(&self.key, &bytes[..8 + NONCE]);
        bytes[8 + NONCE..].copy_from_slice(mac.as_bytes());
        Some((URL_SAFE_NO_PAD.encode(bytes), expires_at))
    }

    /// Whether it is the cookie of a session that goes on.
    pub fn knows(&self, cookie: &str, now: Timestamp) -> bool {
        self.read(cookie).is_some_and(|(nonce, until)| until > now && !self.inner().ended.contains_key(&nonce))
    }

    /// Ends a session. Other servers would still take its cookie, which the browser has thrown away.
    pub fn end(&self, cookie: &str, now: Timestamp) {
        let Some((nonce, until)) = self.read(cookie) else { return };
        let mut inner = self.inner();
        inner.ended.retain(|_, until| *until > now);
        if inner.ended.len() >= ENDED_MAX
            && let Some(soonest) = inner.ended.iter().min_by_key(|(_, until)| **until).map(|(nonce, _)| *nonce)
        {
            inner.ended.remove(&soonest);
        }
        inner.ended.insert(nonce, until);
    }

    fn read(&self, cookie: &str) -> Option<(Nonce, Timestamp)> {
        let bytes: [u8; COOKIE_BYTES] = URL_SAFE_NO_PAD.decode(cookie).ok()?.try_into().ok()?;
        let (said, mac) = bytes.split_at(8 + NONCE);
        let mac: [u8; MAC] = mac.try_into().ok()?;
        if blake3::keyed_hash(&self.key, said) != mac {
            return None;
        }
        let (until, nonce) = said.split_at(8);
        Some((nonce.try_into().ok()?, Timestamp(u64::from_be_bytes(until.try_into().ok()?))))
    }
}

/// The session's cookie, if the request has exactly one.
pub fn cookie(headers: &HeaderMap) -> Option<&str> {
    let pairs = headers.get_all(COOKIE).iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(';'));
    let mut ours = pairs.filter_map(|pair| pair.trim().split_once('=')).filter(|(name, _)| *name == COOKIE_NAME).map(|(_, value)| value);
    match (ours.next(), ours.next()) {
        (Some(value), None) => Some(value),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicU8, Ordering};

    use super::*;

    #[derive(Default)]
    struct Counting(AtomicU8);
    impl Entropy for Counting {
        fn fill(&self, bytes: &mut [u8]) {
            bytes.fill(self.0.fetch_add(1, Ordering::Relaxed));
        }
    }

    const NOW: Timestamp = Timestamp(1_000_000_000_000);

    #[test]
    fn a_code_is_good_once_and_not_for_long() {
        let dice = Counting::default();
        let sessions = Sessions::new(&AdminToken::generate(&dice));
        let (code, until) = sessions.code(NOW, &dice);
        assert!(sessions.open("AAAA", NOW, &dice).is_none());
        assert!(sessions.open(&code, NOW, &dice).is_some());
        assert!(sessions.open(&code, NOW, &dice).is_none(), "used twice");
        let (late, _) = sessions.code(NOW, &dice);
        assert!(sessions.open(&late, until, &dice).is_none(), "used too late");
        let codes: Vec<_> = (0..=CODES_MAX).map(|_| sessions.code(NOW, &dice).0).collect();
        assert!(sessions.open(&codes[0], NOW, &dice).is_none() && sessions.open(&codes[1], NOW, &dice).is_some());
    }

    #[test]
    fn a_cookie_is_good_on_every_server_until_its_end() {
        let dice = Counting::default();
        let token = AdminToken::generate(&dice);
        let (here, there) = (Sessions::new(&token), Sessions::new(&token));
        let (cookie, until) = here.open(&here.code(NOW, &dice).0, NOW, &dice).unwrap();
        assert!(here.knows(&cookie, NOW) && there.knows(&cookie, NOW) && !there.knows(&cookie, until));
        assert!(!Sessions::new(&AdminToken::generate(&dice)).knows(&cookie, NOW), "another token, other sessions");
        let mut forged = URL_SAFE_NO_PAD.decode(&cookie).unwrap();
        for at in 0..forged.len() {
            forged[at] ^= 1;
            assert!(!here.knows(&URL_SAFE_NO_PAD.encode(&forged), NOW), "byte {at} changed");
            forged[at] ^= 1;
        }
        for bad in ["", "x", "====", &cookie[1..]] {
            assert!(!here.knows(bad, NOW), "{bad}");
        }
        here.end(&cookie, NOW);
        assert!(!here.knows(&cookie, NOW));
    }

    #[test]
    fn the_cookie_is_found_among_others_and_two_are_none() {
        let of = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(COOKIE, value.parse().unwrap());
            }
            cookie(&headers).map(str::to_owned)
        };
        assert_eq!(of(&["a=b; __Host-optimus=c"]).as_deref(), Some("c"));
        assert_eq!(of(&["a=b", "__Host-optimus=c"]).as_deref(), Some("c"));
        assert_eq!(of(&["__Host-optimus=c; __Host-optimus=d"]), None);
        assert_eq!(of(&["optimus=c"]), None);
    }
}
