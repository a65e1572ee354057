//! What projects and environments may reserve together.

use optimus_common::WorkloadKey;
use optimus_common::reason::Refusal;
use optimus_common::spec::WorkloadSpec;

use crate::state::{Quota, QuotaKey, State};

/// What copies that have not ended reserve together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Thousandths of a core.
    pub cpu: u64,
    /// Bytes.
    pub memory: u64,
    /// Bytes.
    pub disk: u64,
    pub copies: u64,
    pub devices: u64,
}

impl Usage {
    /// What one copy reserves; of a release that is gone, only that there is a copy.
    pub fn of(spec: Option<&WorkloadSpec>) -> Usage {
        let Some(spec) = spec else { return Usage { copies: 1, ..Usage::default() } };
        Usage {
            cpu: u64::from(spec.resources.cpu.0),
            memory: spec.resources.memory_request.0,
            disk: spec.placement.disk.0,
            copies: 1,
            devices: spec.placement.devices.iter().map(|d| u64::from(d.count)).sum(),
        }
    }

    pub fn add(&mut self, other: &Usage) {
        let Usage { cpu, memory, disk, copies, devices } = other;
        self.cpu = self.cpu.saturating_add(*cpu);
        self.memory = self.memory.saturating_add(*memory);
        self.disk = self.disk.saturating_add(*disk);
        self.copies = self.copies.saturating_add(*copies);
        self.devices = self.devices.saturating_add(*devices);
    }

    pub fn subtract(&mut self, other: &Usage) {
        let Usage { cpu, memory, disk, copies, devices } = other;
        self.cpu = self.cpu.saturating_sub(*cpu);
        self.memory = self.memory.saturating_sub(*memory);
        self.disk = self.disk.saturating_sub(*disk);
        self.copies = self.copies.saturating_sub(*copies);
        self.devices = self.devices.saturating_sub(*devices);
    }
}

/// What is reserved by a project, or one of its environments.
pub fn usage(state: &State, key: &QuotaKey) -> Usage {
    let all = state.usage_by_environment(&key.project);
    let mut sum = Usage::default();
    for (environment, usage) in all {
        if key.environment.as_ref().is_none_or(|wanted| wanted == environment) {
            sum.add(usage);
        }
    }
    sum
}

/// The quotas a workload is under, the environment's first.
fn quotas_of<'s>(state: &'s State, key: &WorkloadKey) -> impl Iterator<Item = (QuotaKey, &'s Quota)> {
    let scope = |environment| QuotaKey { project: key.project.clone(), environment };
    [scope(Some(key.environment.clone())), scope(None)].into_iter().filter_map(|key| {
        let quota = state.quotas.get(&key)?;
        Some((key, &**quota))
    })
}

/// Whether one more copy stays within every quota of its workload. `used` tells what is reserved under a quota:
/// [`usage`], and whatever a plan under way changes.
pub fn within(state: &State, key: &WorkloadKey, spec: &WorkloadSpec, used: impl Fn(&QuotaKey) -> Usage) -> Result<(), Refusal> {
    if state.quotas.is_empty() {
        return Ok(());
    }
    let asked = Usage::of(Some(spec));
    for (key, quota) in quotas_of(state, key) {
        let used = used(&key);
        let limits = [
            ("cpu", quota.cpu.map(|c| u64::from(c.0)), used.cpu, asked.cpu),
            ("memory", quota.memory.map(|b| b.0), used.memory, asked.memory),
            ("disk", quota.disk.map(|b| b.0), used.disk, asked.disk),
            ("copies", quota.copies.map(u64::from), used.copies, asked.copies),
            ("devices", quota.devices.map(u64::from), used.devices, asked.devices),
        ];
        for (what, limit, used, asked) in limits {
            let Some(limit) = limit else { continue };
            let left = limit.saturating_sub(used);
            if asked > left {
                return Err(Refusal::Quota { scope: key.to_string(), what: what.into(), asked, left });
            }
        }
    }
    Ok(())
}
