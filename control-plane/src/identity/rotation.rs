//! The identity follows the replicated state: which CAs are trusted, which one signs, and who the servers are.
//!
//! ```text
//! state changed -> record on disk -> roots of every listener and dialler -> own certificate -> MemberCa: "I trust it now"
//! ```
//! In this order, so that what a server has told it trusts is still trusted after a crash.

use std::time::Duration;

use optimus_common::Span;

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
        let fresh = Authority::open(cluster, &self.root)?;
        // Trust first: with the certificate of a new CA others may answer at once with theirs.
        self.roots.replace(&cluster.roots())?;
        let own = certify(&fresh, &self.key, self.server, &self.names, &self.env)?;
        self.certificate.replace(own);
        tracing::info!(signing = cluster.authorities.signing, trusted = cluster.roots().len(), "the cluster's CAs have changed");
        *self.authority.write().unwrap_or_else(|e| e.into_inner()) = Arc::new(fresh);
        Ok(true)
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
        let key_sealed = self.root.seal(&secret, CA_KEY, self.cluster.0.as_bytes(), &self.env);
        Ok(Command::RotateCa { number, certificate, key_sealed, cross, overlap })
    }
}
