//! Secrets, as far as they can be seen here: sealed.

use super::*;
use crate::state::secrets::SEALED_MAX;
use crate::state::{SECRETS_MAX, Secret, SecretKey, SecretVersion, VERSIONS_KEPT, Vault};

impl Step<'_> {
    pub(super) fn set_secret(&mut self, key: SecretKey, sealed: Vec<u8>, vault: Vault) -> Applied {
        if self.state.secrets.len() >= SECRETS_MAX && !self.state.secrets.contains_key(&key) {
            return too_many("secrets", SECRETS_MAX as u64);
        }
        if sealed.len() > SEALED_MAX {
            return too_many("bytes of a secret", SEALED_MAX as u64);
        }
        match self.state.vaults.get(&key.vault) {
            // Sealed with a key that somebody else was quicker than, or that is gone.
            Some(known) if known.id != vault.id => return Applied::Refused(Refusal::OtherVault(key.vault)),
            Some(_) => {}
            None => drop(self.state.vaults.insert(key.vault.clone(), Arc::new(vault))),
        }
        let known = self.state.secrets.get(&key).map(|row| Secret::clone(row));
        let mut row = known.unwrap_or(Secret { newest: 0, versions: vec![] });
        row.newest += 1;
        row.versions.push(Arc::new(SecretVersion { number: row.newest, sealed, created_at: self.at }));
        let newest = row.newest;
        self.forget_versions(&key, &mut row);
        self.state.secrets.insert(key.clone(), Arc::new(row));
        self.give_to_those_who_wait(&key, newest);
        self.event(EventKind::SecretSet, &key.vault.to_string(), &format!("secret {} has version {newest}", key.name), None);
        self.done()
    }

    /// Drops versions that no release kept was deployed with, but for the newest few.
    fn forget_versions(&self, key: &SecretKey, row: &mut Secret) {
        let workloads = self.state.workloads_in(&key.vault.project, &key.vault.environment);
        let releases = workloads.flat_map(|w| self.state.releases_of(&w.key));
        let pinned: std::collections::BTreeSet<u64> = releases.filter_map(|r| r.secrets.get(&key.name).copied()).collect();
        let keep_from = row.versions.len().saturating_sub(VERSIONS_KEPT);
        let mut at = 0;
        row.versions.retain(|version| {
            at += 1;
            at > keep_from || pinned.contains(&version.number)
        });
    }

    /// Releases that were deployed before there was such a secret: none of their copies has begun.
    fn give_to_those_who_wait(&mut self, key: &SecretKey, version: u64) {
        let workloads = self.state.workloads_in(&key.vault.project, &key.vault.environment);
        let releases = workloads.flat_map(|w| self.state.releases_of(&w.key));
        let waits = |r: &&Arc<Release>| r.spec.secrets.contains(&key.name) && !r.secrets.contains_key(&key.name);
        let waiting: Vec<(WorkloadKey, u64)> = releases.filter(waits).map(|r| (r.key.clone(), r.number)).collect();
        for at in waiting {
            if let Some(release) = self.state.releases.get_mut(&at) {
                Arc::make_mut(release).secrets.insert(key.name.clone(), version);
            }
        }
    }

    pub(super) fn remove_secret(&mut self, key: SecretKey) -> Applied {
        if !self.state.secrets.contains_key(&key) {
            return Applied::Refused(Refusal::NoSuchSecret(key));
        }
        if let Some(by) = self.state.secret_user(&key).map(|row| row.key.clone()) {
            return Applied::Refused(Refusal::SecretInUse { key, by });
        }
        self.state.secrets.remove(&key);
        self.event(EventKind::SecretSet, &key.vault.to_string(), &format!("secret {} removed", key.name), None);
        self.done()
    }
}
