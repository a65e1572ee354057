//! Quotas, pools and volumes.

use optimus_common::Name;

use super::*;
use crate::state::{POOLS_MAX, Pool, QUOTAS_MAX, Quota, QuotaKey, VOLUMES_MAX, Volume, VolumeKey};

impl Step<'_> {
    pub(super) fn set_quota(&mut self, key: QuotaKey, quota: Quota) -> Applied {
        if self.state.quotas.get(&key).is_some_and(|known| **known == quota) {
            return self.unchanged();
        }
        if self.state.quotas.len() >= QUOTAS_MAX && !self.state.quotas.contains_key(&key) {
            return too_many("quotas", QUOTAS_MAX as u64);
        }
        self.state.quotas.insert(key, Arc::new(quota));
        self.done()
    }

    pub(super) fn remove_quota(&mut self, key: &QuotaKey) -> Applied {
        match self.state.quotas.remove(key) {
            Some(_) => self.done(),
            None => Applied::Refused(Refusal::NoSuchQuota(key.clone())),
        }
    }

    pub(super) fn set_pool(&mut self, pool: Pool) -> Applied {
        if self.state.pools.get(&pool.name).is_some_and(|known| **known == pool) {
            return self.unchanged();
        }
        if self.state.pools.len() >= POOLS_MAX && !self.state.pools.contains_key(&pool.name) {
            return too_many("pools", POOLS_MAX as u64);
        }
        self.state.pools.insert(pool.name.clone(), Arc::new(pool));
        self.done()
    }

    pub(super) fn remove_pool(&mut self, name: &Name) -> Applied {
        match self.state.pools.remove(name) {
            Some(_) => self.done(),
            None => Applied::Refused(Refusal::NoSuchPool(name.clone())),
        }
    }

    pub(super) fn set_volume(&mut self, volume: Volume) -> Applied {
        if !self.state.nodes.contains_key(&volume.node) {
            return Applied::Refused(Refusal::NoSuchNode(volume.node));
        }
        if self.state.volumes.get(&volume.key).is_some_and(|known| **known == volume) {
            return self.unchanged();
        }
        if self.state.volumes.contains_key(&volume.key)
            && let Some(by) = self.state.volume_user(&volume.key)
        {
            return Applied::Refused(Refusal::VolumeInUse { volume: volume.key, by, moving: true });
        }
        if self.state.volumes.len() >= VOLUMES_MAX && !self.state.volumes.contains_key(&volume.key) {
            return too_many("volumes", VOLUMES_MAX as u64);
        }
        self.state.volumes.insert(volume.key.clone(), Arc::new(volume));
        self.done()
    }

    pub(super) fn remove_volume(&mut self, key: &VolumeKey) -> Applied {
        if self.state.volumes.contains_key(key)
            && let Some(by) = self.state.volume_user(key)
        {
            return Applied::Refused(Refusal::VolumeInUse { volume: key.clone(), by, moving: false });
        }
        match self.state.volumes.remove(key) {
            Some(_) => self.done(),
            None => Applied::Refused(Refusal::NoSuchVolume(key.clone())),
        }
    }
}
