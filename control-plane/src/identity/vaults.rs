//! Sealing secrets: each environment has a key, which is in the replicated state, sealed with the root key.
//!
//! ```text
//! root key (a file on each server) --seals--> key of shop/prod (replicated) --seals--> DATABASE_URL, version 3 (replicated)
//! ```
//! So another root key needs no secret sealed anew, and one environment's key opens nothing of another.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use optimus_common::secret::SecretValue;
use optimus_core::state::{SecretKey, SecretVersion, State, Vault, VaultKey};
use zeroize::Zeroizing;

use super::root_key::{RootKey, RootKeyError};
use super::{Identity, check_root_key};

const VAULT: &str = "key of an environment";
const SECRET: &str = "secret";
/// Most keys of environments kept open.
const OPENED_MAX: usize = 1024;

/// Seals and opens secrets. Nothing of a value is in an error.
pub trait SecretBox: Send + Sync + 'static {
    /// `value`, sealed, and the key it is sealed with: that of the environment, or a new one.
    ///
    /// # Errors
    /// When the root key does not open the environment's key.
    fn seal(&self, state: &State, key: &SecretKey, value: &SecretValue) -> Result<(Vec<u8>, Vault), RootKeyError>;
    /// The value of a version.
    ///
    /// # Errors
    /// When it was sealed with another key, or changed.
    fn open(&self, state: &State, key: &SecretKey, version: &SecretVersion) -> Result<SecretValue, RootKeyError>;
    /// Tells two requests apart in replicated state without telling anything of what is in them.
    fn blind(&self, body: &[u8]) -> Vec<u8>;
}

/// Keys of environments that were opened, by their ids.
#[derive(Debug, Default)]
pub(super) struct Opened(Mutex<BTreeMap<Vec<u8>, RootKey>>);

fn context(key: &VaultKey) -> Vec<u8> {
    key.to_string().into_bytes()
}

/// Seals an environment's key.
pub(super) fn wrap(root: &RootKey, at: &VaultKey, key: &RootKey, env: &optimus_common::env::Env) -> Vec<u8> {
    root.seal(key.bytes(), VAULT, &context(at), env)
}

impl Identity {
    /// The key of an environment, in the clear.
    pub(super) fn vault_key(&self, state: &State, at: &VaultKey, vault: &Vault) -> Result<RootKey, RootKeyError> {
        let opened = || self.opened.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = opened().get(&vault.id) {
            return Ok(known.clone());
        }
        let unseal = |root: &RootKey| root.unseal(&vault.key_sealed, VAULT, &context(at));
        let bytes = match (unseal(&self.root()), &state.cluster) {
            // The cluster has taken up another root key, and this server is about to.
            (Err(_), Some(cluster)) => {
                let next = RootKey::find(&self.data_dir, |key| check_root_key(cluster, key).is_ok())?;
                unseal(&next.ok_or(RootKeyError::Wrong { what: VAULT })?)?
            }
            (bytes, _) => bytes?,
        };
        let key = RootKey::from_bytes(&bytes).ok_or(RootKeyError::Wrong { what: VAULT })?;
        let mut opened = opened();
        if opened.len() >= OPENED_MAX {
            opened.clear();
        }
        opened.insert(vault.id.clone(), key.clone());
        Ok(key)
    }
}

impl SecretBox for Identity {
    fn seal(&self, state: &State, key: &SecretKey, value: &SecretValue) -> Result<(Vec<u8>, Vault), RootKeyError> {
        let (of, vault) = match state.vaults.get(&key.vault) {
            Some(vault) => (self.vault_key(state, &key.vault, vault)?, Vault::clone(vault)),
            None => {
                let fresh = RootKey::generate(&self.env);
                let vault = Vault { id: fresh.fingerprint(), key_sealed: wrap(&self.root(), &key.vault, &fresh, &self.env) };
                (fresh, vault)
            }
        };
        Ok((of.seal(value.reveal().as_bytes(), SECRET, key.to_string().as_bytes(), &self.env), vault))
    }

    fn open(&self, state: &State, key: &SecretKey, version: &SecretVersion) -> Result<SecretValue, RootKeyError> {
        let wrong = || RootKeyError::Wrong { what: SECRET };
        let vault = state.vaults.get(&key.vault).ok_or_else(wrong)?;
        let of = self.vault_key(state, &key.vault, vault)?;
        let plain = of.unseal(&version.sealed, SECRET, key.to_string().as_bytes())?;
        let text = std::str::from_utf8(&plain).map_err(|_| wrong())?;
        SecretValue::new(Zeroizing::new(text.to_owned())).map_err(|_| wrong())
    }

    fn blind(&self, body: &[u8]) -> Vec<u8> {
        blake3::keyed_hash(&self.root().derive("request with a secret"), body).as_bytes().to_vec()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use optimus_common::Name;
    use optimus_host::env::HostEnv;

    use super::*;
    use crate::identity::ServerNames;
    use crate::memory_store::memory_store;

    fn key(environment: &str, name: &str) -> SecretKey {
        let name_of = |text: &str| Name::new(text).unwrap();
        SecretKey { vault: VaultKey { project: name_of("shop"), environment: name_of(environment) }, name: name.to_owned() }
    }

    fn put(state: &mut State, identity: &Identity, key: &SecretKey, value: &str) -> SecretVersion {
        let (sealed, vault) = identity.seal(state, key, &SecretValue::new(value.to_owned()).unwrap()).unwrap();
        state.vaults.insert(key.vault.clone(), Arc::new(vault));
        SecretVersion { number: 1, sealed, created_at: optimus_common::Timestamp(0) }
    }

    #[tokio::test]
    async fn a_secret_opens_in_its_place_only_and_lives_on_under_another_root_key() {
        let (dir, env) = (tempfile::tempdir().unwrap(), HostEnv::new());
        let store = memory_store(env.clone());
        let identity = Identity::found(dir.path(), &store, &ServerNames { server: 1, names: vec![] }).await.unwrap();
        let mut state = State::clone(&store.state());
        let (url, other, staging) = (key("prod", "URL"), key("prod", "OTHER"), key("staging", "URL"));
        let sealed = put(&mut state, &identity, &url, "postgres://x");
        assert!(!sealed.sealed.windows(8).any(|w| w == b"postgres"));
        assert_eq!(identity.open(&state, &url, &sealed).unwrap().reveal(), "postgres://x");
        put(&mut state, &identity, &staging, "y");
        assert_ne!(state.vaults.get(&url.vault).unwrap().id, state.vaults.get(&staging.vault).unwrap().id);
        for place in [&other, &staging] {
            let error = identity.open(&state, place, &sealed).unwrap_err().to_string();
            assert!(!error.contains("postgres"), "{error}");
        }
        // Another root key: the same value, opened by whoever holds that key.
        let (next, rewrap) = identity.next_root_key(&state).unwrap();
        assert_eq!(rewrap.vaults.len(), 2);
        for (at, id, key_sealed) in rewrap.vaults {
            state.vaults.insert(at, Arc::new(Vault { id, key_sealed }));
        }
        *identity.opened.0.lock().unwrap() = BTreeMap::new();
        assert!(identity.open(&state, &url, &sealed).is_err(), "the cluster does not say yet that it has another root key");
        *identity.root.write().unwrap() = next;
        assert_eq!(identity.open(&state, &url, &sealed).unwrap().reveal(), "postgres://x");
    }
}
