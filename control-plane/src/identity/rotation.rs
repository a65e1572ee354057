//! The identity follows the replicated state: which CAs are trusted, which one signs, and who the servers are.
//!
//! ```text
//! state changed -> record on disk -> roots of every listener and dialler -> own certificate -> MemberCa: "I trust it now"
//! ```
//! In this order, so that what a server has told it trusts is still trusted after a crash.

use std::time::Duration;

use optimus_common::Span;

use optimus_core::state::Rewrap;

use super::*;

/// Pause before a step that failed is tried again.
const RETRY: Duration = Duration::from_millis(500);
/// Longest wait for a proposal; it is made again if need be.
const TELL_WITHIN: Duration = Duration::from_secs(5);

impl Identity {
    /// Follows the replicated state and keeps this server's certificate fresh, until `shutdown`.
    pub async fn run(&self, store: Store, shutdown: CancellationToken) {
        let clock = self.env.clock.clone();
        let mut applied = store.applied();
        let mut seen: Option<State> = None;
        let mut look = clock.monotonic() + RENEWAL_CHECK;
        loop {
            applied.mark_unchanged();
            let state = store.state();
            let mut wait = look.saturating_sub(clock.monotonic());
            // Comparing the tables' roots first: nearly every change is about something else.
            if seen.as_ref().is_none_or(|s| !s.servers.ptr_eq(&state.servers) || s.cluster != state.cluster) {
                let followed = tokio::select! {
                    () = shutdown.cancelled() => return,
                    followed = self.follow(&store, &state) => followed,
                };
                match followed {
                    true => seen = Some(state),
                    false => wait = RETRY,
                }
            }
            if clock.monotonic() >= look {
                look = clock.monotonic() + RENEWAL_CHECK;
                if let Err(error) = self.renew_if_due() {
                    tracing::error!(error = %Chain(&error), "failed to renew the server certificate; trying again");
                }
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                changed = applied.changed() => if changed.is_err() { return },
                () = clock.sleep(wait) => {}
            }
        }
    }

    /// One look at a changed state; false when it has to be repeated.
    async fn follow(&self, store: &Store, state: &State) -> bool {
        if let Err(error) = self.members.update(state) {
            tracing::error!(error = %Chain(&error), "failed to store the list of servers; trying again");
            return false;
        }
        let Some(cluster) = state.cluster.as_ref().filter(|_| !state.servers.is_empty()) else { return true };
        if let Err(error) = self.adopt(cluster) {
            tracing::error!(error = %Chain(&error), "failed to take up the cluster's CAs; trying again");
            return false;
        }
        self.tell(store, state).await
    }

    /// Trusts and signs as `cluster` says, unless this server knows better already; tells whether that was news.
    pub fn adopt(&self, cluster: &Cluster) -> Result<bool, IdentityError> {
        let held = self.authority();
        if cluster.ca_progress() <= held.of.ca_progress() {
            return Ok(false); // as before, or still being replayed
        }
        let root = self.root_of(cluster)?;
        let fresh = Authority::open(cluster, &root)?;
        // Trust first: with the certificate of a new CA others may answer at once with theirs.
        self.roots.replace(&cluster.roots())?;
        let own = certify(&fresh, &self.key, self.server, &self.names, &self.env)?;
        self.certificate.replace(own);
        tracing::info!(signing = cluster.authorities.signing, trusted = cluster.roots().len(), "the cluster's CAs have changed");
        *self.authority.write().unwrap_or_else(|e| e.into_inner()) = Arc::new(fresh);
        Ok(true)
    }

    /// The root key that opens `cluster`. One that other servers and this one agreed on takes the place of the one held:
    /// first the record is sealed with it, then it is the data directory's.
    fn root_of(&self, cluster: &Cluster) -> Result<RootKey, IdentityError> {
        let held = self.root();
        if check_root_key(cluster, &held).is_ok() {
            return Ok(held);
        }
        let fits = |key: &RootKey| check_root_key(cluster, key).is_ok();
        let next = RootKey::find(&self.data_dir, fits)?.unwrap_or(held);
        check_root_key(cluster, &next)?;
        self.members.reseal(&self.key, &next, &self.env)?;
        next.replace(&self.data_dir)?;
        *self.root.write().unwrap_or_else(|e| e.into_inner()) = next.clone();
        tracing::info!("another root key is in use; the one before is kept as {}", super::root_key::RETIRED);
        Ok(next)
    }

    /// Keeps a root key that may come into use. Durable when this returns; gives its fingerprint.
    pub fn hold_root_key(&self, text: &[u8]) -> Result<Vec<u8>, IdentityError> {
        let malformed = || RootKeyError::Malformed { path: self.data_dir.clone() };
        let key = RootKey::from_text(text).ok_or_else(malformed)?;
        key.store_next(&self.data_dir)?;
        Ok(key.fingerprint())
    }

    /// Another root key, held by this server, and the command that brings it into use once `holders` hold it.
    pub fn next_root_key(&self, state: &State) -> Result<(RootKey, Rewrap), IdentityError> {
        let next = RootKey::generate(&self.env);
        next.store_next(&self.data_dir)?;
        let of = &self.authority().of;
        let secret = self.root().unseal(&of.ca_key_sealed, CA_KEY, of.id.0.as_bytes())?;
        let ca_key_sealed = next.seal(&secret, CA_KEY, of.id.0.as_bytes(), &self.env);
        let mut vaults = Vec::new();
        for (at, vault) in &state.vaults {
            let key = self.vault_key(state, at, vault)?;
            vaults.push((at.clone(), vault.id.clone(), vaults::wrap(&next, at, &key, &self.env)));
        }
        let (steps, root_key, holders) = (of.authorities.steps, next.fingerprint(), vec![self.server]);
        let rewrap = Rewrap { steps, root_key, ca_key_sealed, holders, vaults };
        Ok((next, rewrap))
    }

    /// Numbers of the newest CA this server trusts and of the one that signed its certificate.
    pub fn ca_numbers(&self) -> (u32, u32) {
        let held = self.authority();
        (held.of.trusted().1, held.of.authorities.signing)
    }

    /// Lets the cluster know what this server trusts, if that is not what the state says.
    async fn tell(&self, store: &Store, state: &State) -> bool {
        let (trusted, signer) = self.ca_numbers();
        let Some(row) = state.servers.get(&self.server) else { return true };
        let command = Command::MemberCa { member: Member::Server(self.server), trusted, signer };
        if (row.ca_trusted, row.ca_signer) == (trusted, signer) || state.cluster.as_ref().is_none_or(|c| c.version < command.level()) {
            return true;
        }
        let told = tokio::select! {
            told = store.propose(command) => told,
            () = self.env.clock.sleep(TELL_WITHIN) => return false,
        };
        match told {
            Ok(Applied::Refused(refusal)) => {
                tracing::warn!(%refusal, "the cluster did not take which CA this server trusts");
                false
            }
            Ok(_) => true,
            Err(error) => {
                tracing::debug!(%error, "not told yet which CA this server trusts");
                false
            }
        }
    }

    /// The command that announces a new CA. Its key exists only sealed from here on.
    pub fn next_ca(&self, overlap: Span) -> Result<Command, IdentityError> {
        let held = self.authority();
        let number = held.of.authorities.newest.saturating_add(1);
        let ca::Successor { certificate, cross, secret } = held.ca.successor(number, &self.env)?;
        let key_sealed = self.root().seal(&secret, CA_KEY, self.cluster.0.as_bytes(), &self.env);
        Ok(Command::RotateCa { number, certificate, key_sealed, cross, overlap })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::Arc;

    use optimus_core::state::ServerRow;
    use optimus_host::env::HostEnv;

    use super::*;
    use crate::memory_store::memory_store;

    fn open(dir: &Path, env: &Env) -> Arc<Identity> {
        let record = Record::load(dir).unwrap().unwrap();
        Identity::open(dir, record, &ServerNames { server: 1, names: vec![] }, env).unwrap()
    }

    #[tokio::test]
    async fn another_root_key_is_taken_up_wherever_it_was_cut_short() {
        let (dir, env) = (tempfile::tempdir().unwrap(), HostEnv::new());
        let store = memory_store(env.clone());
        let before = Identity::found(dir.path(), &store, &ServerNames { server: 1, names: vec![] }).await.unwrap();
        let mut state = store.state();
        let (next, rewrap) = before.next_root_key(&State::default()).unwrap();
        let cluster = state.cluster.as_mut().unwrap();
        cluster.ca_key_sealed = rewrap.ca_key_sealed;
        cluster.authorities.steps += 1;
        let cluster = cluster.clone();
        assert!(before.root_key_text(&cluster).is_none(), "nobody is let in with the old key any more");

        // The power fails when the record has the new state, and nothing else is done.
        let row = ServerRow {
            id: 1,
            name: "s".into(),
            address: "h:1".into(),
            api: "h:2".into(),
            key_fingerprint: vec![],
            version: "1".into(),
            level: 3,
            joined_at: Default::default(),
            leaving: false,
            ca_trusted: 0,
            ca_signer: 0,
            clock_skew_ms: None,
        };
        state.servers.insert(1, Arc::new(row));
        assert!(before.members.update(&state).unwrap());
        let after = open(dir.path(), &env);
        assert_eq!(after.root_key_text(&cluster).unwrap(), next.to_text());
        assert_eq!(after.key_fingerprint(), before.key_fingerprint(), "it is the same server");
        assert_eq!(RootKey::open(dir.path()).unwrap().unwrap().to_text(), next.to_text());

        // Once more, to its end; then a state that is still being replayed, and a start.
        let (third, rewrap) = after.next_root_key(&State::default()).unwrap();
        let mut newer = cluster.clone();
        newer.ca_key_sealed = rewrap.ca_key_sealed;
        newer.authorities.steps += 1;
        state.cluster = Some(newer.clone());
        after.members.update(&state).unwrap();
        assert!(after.adopt(&newer).unwrap());
        assert!(!after.adopt(&cluster).unwrap(), "an older state takes nothing back");
        assert_eq!(after.root_key_text(&newer).unwrap(), third.to_text());
        assert_eq!(open(dir.path(), &env).key_fingerprint(), before.key_fingerprint());
    }
}
